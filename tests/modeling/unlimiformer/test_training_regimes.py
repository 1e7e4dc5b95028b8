"""Training with memory: gradients against dense references in float64, samples, blocks, padding, and learning."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis.strategies import integers, lists
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.masking_utils import eager_mask
from transformers.modeling_outputs import BaseModelOutput

from graft.configuration.configuration_unlimiformer import UnlimiformerConfig
from graft.modeling.transformers_compat import cache_argument
from graft.modeling.unlimiformer import knn_attention as knn_attention_module
from graft.modeling.unlimiformer.attach import unlimiform
from graft.modeling.unlimiformer.knn_attention import KeyChoice, knn_attention
from graft.modeling.unlimiformer.training_regimes import (
    REGIMES,
    random_encoded,
    sampled_tokens,
    training_with_memory,
)

WINDOW, LENGTH, TARGET = 16, 45, 6
CLOSE = {"rtol": 1e-9, "atol": 1e-9}


def config_of(**options):
    return UnlimiformerConfig(**{"window": WINDOW, "keys_per_query": 5, "training": "retrieval", **options})


def gradients(model, loss):
    """Of every parameter, in float64; zeros where there is none."""
    model.zero_grad()
    loss.backward()
    found = {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return found


def loss_with_memory(model, config, batch, step=0):
    with training_with_memory(model, config, batch, step) as inputs:
        return model(**inputs).loss


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("regime", sorted(REGIMES))
@pytest.mark.parametrize(
    ("family", "store"), [("bart", "hidden"), ("bart", "keys_values"), ("t5", "auto"), ("llama", "auto")]
)
def test_every_parameter_has_a_gradient_as_several_processes_need_it(tiny, family, store, regime):
    model = tiny.model(family)
    ids, answers = tiny.ids(2, LENGTH), tiny.ids(2, TARGET, seed=2)
    batch = {"input_ids": ids} if model.config.is_encoder_decoder else {"memory_ids": ids, "input_ids": answers}
    loss_with_memory(model, config_of(store=store, training=regime), {**batch, "labels": answers}, step=1).backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def naive_top_k_attention(query, key, value, top_k, visible):
    outputs, totals = [], []
    for b, h, t in itertools.product(*map(range, query.shape[:3])):
        scores = key[b, h] @ query[b, h, t]
        kept = scores.detach().masked_fill(~visible[b], -torch.inf).argsort(descending=True)[:top_k]
        kept = kept[visible[b, kept]]
        outputs.append(scores[kept].softmax(0) @ value[b, h, kept])
        totals.append(scores[kept].logsumexp(0))
    return torch.stack(outputs).view_as(query), torch.stack(totals).view(query.shape[:3])


@pytest.mark.parametrize("scores_bytes", [2**28, 1])
@given(seed=integers(0, 2**16), source=integers(2, 9), target=integers(1, 5), top_k=integers(1, 9))
def test_gradients_of_the_chosen_keys_are_those_of_naive_loops_in_one_block_and_in_many(
    scores_bytes, seed, source, target, top_k
):
    rng = torch.Generator().manual_seed(seed)
    make = [torch.randn(2, 3, n, 4, dtype=torch.float64, generator=rng) for n in (target, source, source)]
    weights = torch.randn(2, 3, target, 5, dtype=torch.float64, generator=rng)
    visible = torch.arange(source) < torch.tensor([[source], [source - 1]])
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(knn_attention_module, "SCORES_BYTES", scores_bytes)
        for attention in (
            lambda *tensors: knn_attention(*tensors, KeyChoice(top_k), visible[:, None, None]),
            lambda *tensors: naive_top_k_attention(*tensors, top_k, visible),
        ):
            tensors = [tensor.clone().requires_grad_() for tensor in make]
            output, total = attention(*tensors)
            ((output * weights[..., :4]).sum() + (total * weights[..., 4]).sum()).backward()
            found.append([tensor.grad for tensor in tensors])
    for ours, naive in zip(*found, strict=True):
        torch.testing.assert_close(ours, naive, **CLOSE)


def test_a_query_that_sees_nothing_passes_no_nan_on():
    query, keys = (torch.randn(1, 1, n, 4, requires_grad=True) for n in (2, 3))
    visible = torch.tensor([[True, True, False], [False, False, False]])[None, None]
    output, _ = knn_attention(query, keys, keys, KeyChoice(2), visible)
    output.sum().backward()
    assert bool(query.grad.isfinite().all())
    assert bool(keys.grad.isfinite().all())
    assert bool((query.grad[..., 1, :] == 0).all())


# Encoder-decoders: against the stock model over all window encodings, its cross-attention masked densely


def dense_top_k(top_k, source):
    """An attention function that keeps the `top_k` best scores of attention over `source` keys, and all of others."""

    def attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
        scores = scaling * query @ key.transpose(-1, -2)
        if attention_mask is not None:
            allowed = attention_mask[..., : key.shape[2]]
            scores = scores.masked_fill(~allowed, -torch.inf) if allowed.dtype == torch.bool else scores + allowed
        if key.shape[2] == source:
            least = scores.detach().topk(top_k, dim=-1).values[..., -1:]
            scores = scores.masked_fill(scores < least, -torch.inf)
        return (scores.softmax(-1) @ value).transpose(1, 2), None

    return attention


def naive_states(model, ids, kept, window=WINDOW):
    parts = []
    for start, end, keep_start, keep_end in kept(ids.shape[1], window, 0.5, False):
        states = model.get_encoder()(input_ids=ids[:, start:end]).last_hidden_state
        parts.append(states[:, keep_start - start : keep_end - start])
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("store", ["hidden", "keys_values"])
@pytest.mark.parametrize("keys", [5, None])
def test_retrieval_has_the_loss_and_gradients_of_dense_attention_over_all_window_encodings(tiny, store, keys):
    model = tiny.model("bart", dtype=torch.float64).train()
    ids, labels = tiny.ids(2, LENGTH), tiny.ids(2, TARGET, seed=1)
    AttentionInterface.register("naive_top_k", dense_top_k(keys or LENGTH, LENGTH))
    AttentionMaskInterface.register("naive_top_k", eager_mask)
    config = config_of(keys_per_query=keys, store=store)
    loss = loss_with_memory(model, config, {"input_ids": ids, "labels": labels})
    found = gradients(model, loss)
    model.set_attn_implementation("naive_top_k")
    states = naive_states(model, ids, tiny.kept)
    expected = model(encoder_outputs=BaseModelOutput(last_hidden_state=states), labels=labels).loss
    torch.testing.assert_close(loss, expected, **CLOSE)
    assert_same(found, gradients(model, expected))


@pytest.mark.parametrize("windows_per_batch", [1, 2, 9])
def test_all_batches_of_windows_but_the_last_are_encoded_again_in_the_backward_pass(tiny, windows_per_batch):
    model, tokens = tiny.model("bart"), []
    model.get_encoder().register_forward_pre_hook(lambda m, a, k: tokens.append(len(k["input_ids"])), with_kwargs=True)
    batch = {"input_ids": tiny.ids(1, 80), "labels": tiny.ids(1, TARGET, seed=2)}
    loss = loss_with_memory(model, config_of(overlap=0, windows_per_batch=windows_per_batch), batch)
    read = list(tokens)
    assert sum(read) == 80 // WINDOW
    tokens.clear()
    loss.backward()
    assert tokens == read[:-1][::-1]


def test_gradients_of_a_padded_batch_are_the_mean_of_each_documents(tiny):
    model = tiny.model("bart", dtype=torch.float64).train()
    rows, labels = [tiny.ids(n, seed=n) for n in (LENGTH, 20)], tiny.ids(2, TARGET, seed=1)
    ids, mask = tiny.pad(rows, "right")
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    found = gradients(model, loss_with_memory(model, config_of(), batch))
    alone = [
        gradients(model, loss_with_memory(model, config_of(), {"input_ids": row[None], "labels": labels[i : i + 1]}))
        for i, row in enumerate(rows)
    ]
    assert_same(found, {name: (alone[0][name] + alone[1][name]) / 2 for name in found})


# Decoders: against one prompt, or a cache without gradient


@pytest.mark.parametrize("memory_gradient", [False, True])
def test_a_decoder_learns_through_what_reads_its_memory_and_on_demand_through_the_memory(tiny, memory_gradient):
    model = tiny.model("llama", dtype=torch.float64).train()
    ids, local = tiny.ids(2, 30), tiny.ids(2, TARGET, seed=1)
    config = config_of(window=64, keys_per_query=None, memory_gradient=memory_gradient)
    loss = loss_with_memory(model, config, {"memory_ids": ids, "input_ids": local, "labels": local})
    found = gradients(model, loss)
    if memory_gradient:
        labels = torch.cat([torch.full_like(ids, -100), local], dim=1)
        labels[:, 30] = -100  # its predecessor lies in the memory
        expected = model(torch.cat([ids, local], dim=1), labels=labels).loss
    else:
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model.model(ids, use_cache=True, **cache_argument(cache))
        expected = model(local, labels=local, **cache_argument(cache)).loss
    torch.testing.assert_close(loss, expected, **CLOSE)
    assert_same(found, gradients(model, expected))


def test_left_padded_local_tokens_give_a_decoder_the_gradients_of_each_row_alone(tiny):
    model = tiny.model("llama", dtype=torch.float64).train()
    documents, asked = [tiny.ids(n, seed=n) for n in (LENGTH, 20)], [tiny.ids(n, seed=n) for n in (6, 4)]
    (memory, memory_mask), (ids, mask) = tiny.pad(documents, "left"), tiny.pad(asked, "left")
    batch = {"memory_ids": memory, "memory_mask": memory_mask, "input_ids": ids, "attention_mask": mask}
    config = config_of(memory_gradient=True)

    def loss(given):  # the model's own is float32
        with training_with_memory(model, config, given, 0) as inputs:
            logits = model(**inputs).logits
        real = given.get("attention_mask", torch.ones_like(given["input_ids"])).bool()
        return logits[real].logsumexp(-1).sum()

    together = loss(batch)
    found = gradients(model, together)
    alone = [
        loss({"memory_ids": document[None], "input_ids": row[None]})
        for document, row in zip(documents, asked, strict=True)
    ]
    torch.testing.assert_close(together, sum(alone), **CLOSE)
    assert_same(found, gradients(model, sum(alone)))


# Samples


@given(lengths=lists(integers(1, 30), min_size=1, max_size=4), count=integers(1, 20), seed=integers(0, 2**20))
def test_sampled_tokens_are_different_real_and_in_the_order_of_the_text(lengths, count, seed):
    ids, real = sampled_tokens(torch.tensor(lengths), count, seed)
    for row, there, length in zip(ids, real, lengths, strict=True):
        chosen = row[there].tolist()
        assert chosen == sorted(set(chosen))
        assert len(chosen) == min(count, length)
        assert max(chosen) < length


def test_sampled_tokens_are_uniform():
    counts = torch.zeros(10)
    for seed in range(2000):
        counts[sampled_tokens(torch.tensor([10]), 3, seed)[0][0]] += 1
    assert float((counts / 2000 - 0.3).abs().max()) < 0.05  # five standard errors


def test_each_layer_and_step_reads_other_tokens_and_the_same_ones_again_when_resumed(tiny):
    with unlimiform(tiny.model("bart"), config_of()) as unlimited:
        memory = unlimited.remember(tiny.ids(1, LENGTH))
    of = {(step, layer): random_encoded(memory, step)._layer_memory(layer).keys for step in (0, 1) for layer in (0, 1)}
    assert all(keys.shape[2] == WINDOW for keys in of.values())
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(of.values(), 2))
    assert torch.equal(random_encoded(memory, 1)._layer_memory(1).keys, of[1, 1])
    stored = {tuple(row.tolist()) for row in memory.hidden[0]}
    assert all(tuple(row.tolist()) in stored for row in of[0, 0][0, 0])


@pytest.mark.parametrize("family", ["bart", "llama"])
def test_random_tokens_of_a_document_within_the_window_are_all_of_it(tiny, family):
    model = tiny.model(family, dtype=torch.float64).train()
    ids, local = tiny.ids(2, WINDOW), tiny.ids(2, TARGET, seed=1)
    batch = {"input_ids": ids if family == "bart" else local, "labels": local, "memory_ids": ids}
    if family == "bart":
        del batch["memory_ids"]
    losses = [
        loss_with_memory(model, config_of(keys_per_query=None, training=regime), batch, step=3) for regime in REGIMES
    ]
    torch.testing.assert_close(losses[1], losses[0], **CLOSE)
    torch.testing.assert_close(losses[2], losses[0], **CLOSE)


def test_alternating_retrieves_in_even_steps_and_samples_in_odd_ones(tiny):
    model, batch = tiny.model("bart").train(), {"input_ids": tiny.ids(1, LENGTH), "labels": tiny.ids(1, TARGET)}
    for step, regime in enumerate(("retrieval", "random", "retrieval", "random")):
        losses = [loss_with_memory(model, config_of(training=name), batch, step) for name in ("alternating", regime)]
        assert torch.equal(*losses)


# The model afterwards, learning, mistakes


def test_nothing_stays_on_the_model_even_if_its_forward_fails(tiny):
    model, batch = tiny.model("bart").train(), {"input_ids": tiny.ids(1, LENGTH), "labels": tiny.ids(1, TARGET)}
    before = model(**batch).loss
    loss_with_memory(model, config_of(), batch)
    with pytest.raises(RuntimeError, match="stop"), training_with_memory(model, config_of(), batch, 0):
        raise RuntimeError("stop")
    assert torch.equal(model(**batch).loss, before)
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("regime", ["retrieval", "alternating"])
def test_training_lowers_the_loss_of_what_only_the_memory_holds(regime):
    torch.manual_seed(0)
    answers, fillers, length = 4, 8, 24
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=2 * answers + fillers + 1, max_position_embeddings=64, **shape))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    config = UnlimiformerConfig(window=8, overlap=0.0, keys_per_query=4, training=regime, memory_gradient=True)
    losses = []
    for step in range(60):
        chosen = torch.randint(0, answers, (32,))
        ids = torch.randint(2 * answers, 2 * answers + fillers, (32, length))
        ids[torch.arange(32), torch.randint(0, length, (32,))] = answers + chosen  # the fact
        local = torch.stack([torch.full_like(chosen, 2 * answers + fillers), chosen], dim=1)  # question, answer
        loss = loss_with_memory(model, config, {"memory_ids": ids, "input_ids": local, "labels": local}, step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) / 10 < 0.7  # the question alone says nothing: log(4) = 1.39


@pytest.mark.parametrize(("family", "needed"), [("bart", "input_ids"), ("llama", "memory_ids")])
def test_a_batch_without_what_is_remembered_is_refused(tiny, family, needed):
    model = tiny.model(family).train()
    batch = {"labels": tiny.ids(1, TARGET)} | ({} if family == "bart" else {"input_ids": tiny.ids(1, TARGET)})
    with pytest.raises(ValueError, match=rf"`batch` must hold '{needed}'.*{family}.*'labels'"):
        loss_with_memory(model, config_of(), batch)


def test_a_regime_is_needed_and_layers_must_keep_their_cache(tiny):
    model, batch = tiny.model("bart").train(), {"input_ids": tiny.ids(1, LENGTH), "labels": tiny.ids(1, TARGET)}
    with pytest.raises(ValueError, match=r"`training` must be one of.*'standard'"):
        loss_with_memory(model, config_of(training="standard"), batch)
    model.get_decoder().layers[0].gradient_checkpointing = True
    with pytest.raises(ValueError, match="without gradient checkpointing"):
        loss_with_memory(model, config_of(), batch)
