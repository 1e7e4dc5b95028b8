"""A tiny model, trained for a minute to look up facts within its window, finds them at 100 times its window."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from graft.configuration.configuration_unlimiformer import UnlimiformerConfig
from graft.modeling.unlimiformer.attach import unlimiform

pytestmark = pytest.mark.slow

WINDOW, FACTS, NAMES, FILLERS, STEPS, NOISE = 32, 4, 8, 16, 1200, 0.5
FIRST_FACT = 2 * NAMES
"""Tokens: names, as many answers, a fact for each pair of both, fillers."""


def documents(count, length, rng, facts_before):
    """Fillers with `FACTS` facts among the first `facts_before` tokens; the names they are about and the answers."""
    ids = torch.randint(0, FILLERS, (count, length), generator=rng) + FIRST_FACT + NAMES**2
    places = torch.rand(count, facts_before, generator=rng).topk(FACTS, dim=1).indices
    names = torch.rand(count, NAMES, generator=rng).topk(FACTS, dim=1).indices  # no two facts about one name
    answers = torch.randint(0, NAMES, (count, FACTS), generator=rng)
    return ids.scatter(1, places, FIRST_FACT + NAMES * names + answers), names, NAMES + answers


def noisy(embeddings, rng):
    """Token vectors with Gaussian noise of `NOISE` times their size (NEFTune, Jain et al. 2023, arXiv 2310.05914).

    Without it the loss is small as soon as a fact's score is a little above those of 28 fillers, and 3,200 fillers
    outweigh that. With it some fillers of each document look like facts, so the score must rise far above.
    """
    size = embeddings.detach().square().mean().sqrt()
    return embeddings + NOISE * size * torch.randn(embeddings.shape, generator=rng)


def train(seed):
    """A model trained on documents of one window, then asked about every fact in them."""
    torch.manual_seed(seed)
    rng = torch.Generator().manual_seed(seed)
    vocabulary = FIRST_FACT + NAMES**2 + FILLERS
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, max_position_embeddings=4 * WINDOW, **shape))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 50) * (1 - step / STEPS)
    )
    for _ in range(STEPS):
        ids, names, answers = documents(64, WINDOW, rng, WINDOW)
        embeddings = model.get_input_embeddings()(torch.cat([ids, names], dim=1))
        logits = model(inputs_embeds=noisy(embeddings, rng)).logits[:, WINDOW:]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), answers.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


@pytest.fixture(scope="module")
def trained():
    return train(seed=0)


def accuracy(logits, answers):
    return float((logits[:, -1].argmax(-1) == answers).double().mean())


@torch.no_grad()
def found(model, times, keys_per_query):
    """Share of answers found in documents of `times` windows: by the last window alone, and with memory."""
    length = times * WINDOW
    before = length if times == 1 else length - WINDOW  # nothing to be found in the last window
    ids, names, answers = documents(100, length, torch.Generator().manual_seed(1), before)
    question, answers = names[:, :1], answers[:, 0]
    truncated = accuracy(model(torch.cat([ids[:, -WINDOW:], question], dim=1)).logits, answers)
    with unlimiform(model, UnlimiformerConfig(window=WINDOW, keys_per_query=keys_per_query)) as handle:
        return truncated, accuracy(model(**handle.remember(ids).inputs(question)).logits, answers)


@pytest.mark.parametrize("keys_per_query", [4, "window"])
@pytest.mark.parametrize("times", [10, 100])
def test_memory_finds_a_fact_at_many_windows_as_well_as_at_one_where_truncation_guesses(
    trained, times, keys_per_query
):
    within, remembered_within = found(trained, 1, keys_per_query)
    truncated, remembered = found(trained, times, keys_per_query)
    assert within >= 0.95
    assert remembered_within == pytest.approx(within, abs=0.01)  # one window: the same attention
    assert remembered >= within - 0.05
    assert truncated <= 1 / NAMES + 0.1
