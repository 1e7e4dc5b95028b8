"""Calibration scores the document's own end behind its beginning, and never takes a memory that loses to no memory."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis.strategies import floats, integers, lists

from graft.configuration.configuration_unlimiformer import UnlimiformerConfig
from graft.modeling.unlimiformer.attach import unlimiform
from graft.modeling.unlimiformer.calibration import as_read, candidates_of, ranked
from graft.modeling.unlimiformer.report import SINKS

WINDOW, STRIDE, LOCAL, TOKENS = 16, 8, 5, 6
LENGTH = WINDOW + 5 * STRIDE + LOCAL + TOKENS
"""What stands before the end is whole windows, which are read alike in any document."""
CLOSE = {"rtol": 0, "atol": 1e-9}


def few_keys(**options):
    return UnlimiformerConfig(**{"window": WINDOW, "keys_per_query": 4, "local_tokens": LOCAL, **options})


def naive_losses(model, memory, text):
    """Of each of the last `TOKENS` tokens of `text`, one at a time."""
    losses = []
    for place in range(len(text) - TOKENS, len(text)):
        with torch.no_grad():
            logits = model(**memory.inputs(text[None, :place])).logits[0, -1]
        losses.append(-logits.log_softmax(-1)[text[place]])
    return torch.stack(losses)


@pytest.mark.parametrize("positions", ["squeeze", "origin", "true"])
@pytest.mark.parametrize("family", ["llama", "cohere", "phi"])
def test_the_beginning_of_a_memory_is_the_memory_of_the_beginning(tiny, family, positions):
    model, ids, question = tiny.model(family, dtype=torch.float64), tiny.ids(1, LENGTH), tiny.ids(1, 4, seed=1)
    begins, wanted = LENGTH - LOCAL - TOKENS, few_keys(positions=positions)
    with torch.no_grad():
        with unlimiform(model, wanted) as unlimited:
            expected = model(**unlimited.remember(ids[:, :begins]).inputs(question)).logits
        with unlimiform(model, few_keys()) as unlimited:
            memory = as_read(model, unlimited.remember(ids), wanted, begins)
            torch.testing.assert_close(model(**memory.inputs(question)).logits, expected, **CLOSE)


def test_trials_hold_the_losses_of_naive_loops_over_each_document(tiny):
    model, rows = tiny.model("llama", dtype=torch.float64), [tiny.ids(LENGTH), tiny.ids(LENGTH - STRIDE, seed=1)]
    candidates = [few_keys(positions="origin"), few_keys(keys_per_query=None, first_layer=1)]
    with unlimiform(model, few_keys()) as unlimited:
        found = unlimited.calibrate(unlimited.remember(*tiny.pad(rows, "left")), candidates=candidates, tokens=TOKENS)
    losses = {str(trial.config): trial.losses for trial in found.trials}
    for candidate in candidates:
        with unlimiform(model, candidate) as unlimited:
            ends = [len(row) - LOCAL - TOKENS for row in rows]
            expected = [
                naive_losses(model, unlimited.remember(row[None, :end]), row[end:])
                for row, end in zip(rows, ends, strict=True)
            ]
        torch.testing.assert_close(losses[str(candidate)], torch.cat(expected), **CLOSE)
    with torch.no_grad():
        alone = [model(row[None, end:]).logits[0, -TOKENS - 1 : -1] for row, end in zip(rows, ends, strict=True)]
    expected = torch.nn.functional.cross_entropy(
        torch.cat(alone), torch.cat([row[-TOKENS:] for row in rows]), reduction="none"
    )
    torch.testing.assert_close(losses["None"], expected, **CLOSE)


def test_the_chosen_memory_reads_the_whole_document_as_the_best_candidate_says(tiny):
    model, ids, question = tiny.model("llama", dtype=torch.float64), tiny.ids(1, LENGTH), tiny.ids(1, 4, seed=1)
    with torch.no_grad(), unlimiform(model, few_keys()) as unlimited:
        # a margin below 0 takes what differs most from the window alone, so some memory is taken here
        found = unlimited.calibrate(unlimited.remember(ids), tokens=TOKENS, margin=-100.0)
        logits = model(**found.inputs(question)).logits
    with torch.no_grad(), unlimiform(model, found.config) as unlimited:
        torch.testing.assert_close(logits, model(**unlimited.remember(ids).inputs(question)).logits, **CLOSE)


def test_where_the_window_alone_is_best_the_question_is_read_by_the_stock_model(tiny):
    model, ids, question = tiny.model("llama"), tiny.ids(1, LENGTH), tiny.ids(1, 4, seed=1)
    with torch.no_grad(), unlimiform(model, few_keys()) as unlimited:
        found = unlimited.calibrate(unlimited.remember(ids), tokens=TOKENS, margin=1e6)
        assert found.memory is None
        assert found.config is None
        assert torch.equal(model(**found.inputs(question)).logits, model(question).logits)


@given(
    losses=lists(lists(floats(0, 9), min_size=4, max_size=4), min_size=2, max_size=5),
    margin=floats(0, 3),
    more=integers(0, 3),
)
def test_a_way_is_chosen_only_if_it_beats_the_window_alone_by_the_margin(losses, margin, more):
    plain, *others = (torch.tensor(row, dtype=torch.float64) for row in losses)
    configs = [UnlimiformerConfig(keys_per_query=number + 1) for number in range(len(others))]
    trials = ranked(plain, list(zip(configs, others, strict=True)), margin)
    differences = [(row - plain) for row in others]
    bounds = [float(d.mean() + margin * d.std(unbiased=True) / 2) for d in differences]
    assert trials[0].bound(margin) == pytest.approx(min([0.0, *bounds]), abs=1e-12)
    if trials[0].config is not None:
        assert float(trials[0].losses.mean()) < float(plain.mean()) + 1e-12  # a tie may be rounded to either side
    stricter = ranked(plain, list(zip(configs, others, strict=True)), margin + more)
    assert trials[0].config is not None or stricter[0].config is None


def test_far_attention_is_the_share_of_the_stock_models_weights_on_the_document(tiny):
    model, ids, question = tiny.model("llama", dtype=torch.float64), tiny.ids(1, 40), tiny.ids(1, 6, seed=1)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = model(torch.cat([ids, question], dim=1), output_attentions=True).attentions
    expected = torch.stack([layer[0, :, 40:, SINKS:40].sum(-1).mean(-1) for layer in weights])
    config = UnlimiformerConfig(window=64, keys_per_query=None, first_layer=1)
    with unlimiform(model, replace(config, first_layer=0)) as unlimited:
        found = unlimited.far_attention(unlimited.remember(ids), question)
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-6)
    with unlimiform(model, config) as unlimited:
        found = unlimited.far_attention(unlimited.remember(ids), question)
    assert bool((found[0] == 0).all())
    assert bool((found[1:] > 0).all())


def test_candidates_stay_within_the_layers_that_the_memory_holds(tiny):
    for first, last, found in ((2, None, {2}), (0, 1, {0}), (-3, -1, {-3, 1})):
        with unlimiform(tiny.model("llama"), few_keys(first_layer=first, last_layer=last)) as unlimited:
            memory = unlimited.remember(tiny.ids(1, LENGTH))
            assert unlimited.calibrate(memory, tokens=TOKENS).trials
            assert {candidate.first_layer for candidate in candidates_of(memory)} == found


REFUSED = {
    "another window": ({"candidates": [few_keys(window=8)]}, r"`candidates`.*`window` 8.*16"),
    "a layer that is not held": ({"candidates": [few_keys(first_layer=0)]}, r"`candidates`.*layers \[0\]"),
    "a long end": ({"tokens": LENGTH}, r"document of \d+ tokens.*`local_tokens` 5"),
    "no scored token": ({"tokens": 1}, r"`tokens` at least 2.*got 5 and 1"),
}


@pytest.mark.parametrize("mistake", REFUSED)
def test_what_cannot_be_tried_is_refused_before_anything_is_scored(tiny, mistake):
    options, message = REFUSED[mistake]
    with unlimiform(tiny.model("llama"), few_keys(first_layer=1)) as unlimited:
        memory = unlimited.remember(tiny.ids(1, LENGTH))
        with pytest.raises(ValueError, match=message):
            unlimited.calibrate(memory, **options)


def test_keys_of_a_table_of_positions_are_not_moved(tiny):
    with unlimiform(tiny.model("gpt2"), few_keys()) as unlimited:
        memory = unlimited.remember(tiny.ids(1, LENGTH))
        assert unlimited.calibrate(memory, tokens=TOKENS).trials
        with pytest.raises(ValueError, match="keys cannot move"):
            unlimited.calibrate(memory, candidates=[few_keys(positions="origin")], tokens=TOKENS)


def test_true_positions_beyond_the_trained_length_are_refused(tiny):
    with unlimiform(tiny.model("llama", max_position_embeddings=50), few_keys()) as unlimited:
        memory = unlimited.remember(tiny.ids(1, LENGTH))
        with pytest.raises(ValueError, match=rf'"true".*places {LENGTH} tokens.*trained 50'):
            unlimited.calibrate(memory, candidates=[few_keys(positions="true")], tokens=TOKENS)


def test_an_encoder_decoder_is_refused(tiny):
    with unlimiform(tiny.model("bart"), UnlimiformerConfig(window=WINDOW)) as unlimited:
        memory = unlimited.remember(tiny.ids(1, LENGTH))
        with pytest.raises(TypeError, match="only a decoder"):
            unlimited.calibrate(memory)
