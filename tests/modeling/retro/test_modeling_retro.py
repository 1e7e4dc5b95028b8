"""RETRO against a loop over tokens in float64, and the properties that its forward must hold."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from graft.configuration.configuration_retro import RetroConfig
from graft.modeling.retro.modeling_retro import RetroForCausalLM
from graft.modeling.transformers_compat import cache_argument, cache_of


def tiny_config(**changes) -> RetroConfig:
    sizes = {
        "vocab_size": 23,
        "hidden_size": 12,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "head_dim": 6,
        "encoder_hidden_size": 8,
        "num_encoder_layers": 2,
        "cross_attention_layers": [0, 2],
        "chunk_size": 4,
        "rotary_dim": 4,
        "max_position_embeddings": 64,
        "initializer_range": 0.4,
    }
    return RetroConfig(**{**sizes, **changes})


def tiny_model(seed: int = 0, **changes) -> RetroForCausalLM:
    torch.manual_seed(seed)
    model = RetroForCausalLM(tiny_config(**changes)).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases, norms and gates off their beginnings
            parameter += 0.2 * torch.randn_like(parameter)
    return model


def random_inputs(seed: int, batch: int, length: int, chunk_size: int = 4, neighbours: int = 2, longest: int = 8):
    rng = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 23, (batch, length), generator=rng)
    retrieved = torch.randint(1, 23, (batch, length // chunk_size, neighbours, longest), generator=rng)
    return ids, retrieved


# ---- the loop: one token at a time, no batch, no fused attention, written from the equations ----


def naive_norm(module, x: Tensor) -> Tensor:
    if isinstance(module, torch.nn.Identity):
        return x
    if isinstance(module, torch.nn.LayerNorm):
        centred = x - x.mean()
        return centred / (centred.square().mean() + module.eps).sqrt() * module.weight + module.bias
    if isinstance(module, torch.nn.RMSNorm):
        return x / (x.square().mean() + module.eps).sqrt() * module.weight
    rms = x.square().mean().clamp(min=module.eps**2).sqrt()
    return x / rms * module.weight * torch.sigmoid(x * module.gate)


def naive_rotate(x: Tensor, position: int, width: int, theta: float) -> Tensor:
    turned = x.clone()
    for i in range(width // 2):
        angle = position * theta ** (-2 * i / width)
        a, b = x[i].clone(), x[i + width // 2].clone()
        turned[i] = a * math.cos(angle) - b * math.sin(angle)
        turned[i + width // 2] = b * math.cos(angle) + a * math.sin(angle)
    return turned


def naive_heads(weight: Tensor, x: Tensor, head_dim: int) -> list[Tensor]:
    return list((weight @ x).split(head_dim))


def naive_attend(attention, query: list[Tensor], keys: list[list[Tensor]], values: list[list[Tensor]]) -> Tensor:
    """One query per head, against the keys of its group; keys[j][shared head]."""
    merged = []
    for head, q in enumerate(query):
        shared = head * len(keys[0]) // len(query)
        scores = torch.stack([q @ key[shared] for key in keys]) / math.sqrt(len(q))
        weights = scores.relu() if hasattr(attention, "norm") else scores.softmax(0)
        merged.append(sum(w * value[shared] for w, value in zip(weights, values, strict=True)))
    output = torch.cat(merged)
    return naive_norm(attention.norm, output) if hasattr(attention, "norm") else output


def naive_feed_forward(module, x: Tensor) -> Tensor:
    if hasattr(module, "up"):
        return module.down(module.activation(module.up(x)))
    gate, up = (module.gate_and_up.weight @ x).chunk(2)
    return module.down(module.activation(gate) * up)


def naive_residual(module, h: Tensor, sublayer) -> Tensor:
    if hasattr(module, "scale"):
        return naive_norm(module.norm, module.scale * h + sublayer(h))
    return h + sublayer(naive_norm(module.norm, h))


class NaiveRetro:
    """A row of tokens at a time; `retrieved` is a list of chunks of neighbours, or None."""

    def __init__(self, model: RetroForCausalLM) -> None:
        self.model, self.config = model.model, model.config
        self.head = model.lm_head
        self.heads, self.shared, self.head_dim = self.config.head_sizes

    def rotate(self, heads: list[Tensor], position: int) -> list[Tensor]:
        return [naive_rotate(head, position, self.config.rotary_dim, self.config.rope_theta) for head in heads]

    def project(self, module, x: Tensor) -> list[list[Tensor]]:
        heads = naive_heads(module.weight, x, self.head_dim)
        sets, start = [], 0
        for count in (*module.sets.rotated, module.sets.values):
            sets.append(heads[start : start + count])
            start += count
        return sets

    def self_attention(self, layer, module, rows: list[Tensor], visible: list[list[int]]) -> list[Tensor]:
        residual = layer.self_residual
        normed = rows if hasattr(residual, "scale") else [naive_norm(residual.norm, row) for row in rows]
        projected = [self.project(module.query_key_value, row) for row in normed]
        queries = [self.rotate(q, p) for p, (q, _, _) in enumerate(projected)]
        keys = [self.rotate(k, p) for p, (_, k, _) in enumerate(projected)]
        values = [v for _, _, v in projected]
        new = []
        for p, row in enumerate(rows):
            seen = visible[p]
            read = naive_attend(module.attention, queries[p], [keys[j] for j in seen], [values[j] for j in seen])
            new.append(naive_residual(residual, row, lambda _, read=read: module.output(read)))
        return new

    def feed_forward(self, layer, row: Tensor) -> Tensor:
        return naive_residual(layer.feed_forward_residual, row, lambda x: naive_feed_forward(layer.feed_forward, x))

    def encode(self, ids: list[int], chunk: list[Tensor]) -> list[Tensor]:
        rows = [self.model.embed_tokens.weight[i] for i in ids]
        seen = [j for j, i in enumerate(ids) if i != self.config.pad_token_id] or [0]
        for layer in self.model.encoder.layers:
            rows = self.self_attention(layer, layer.self_attention, rows, [seen] * len(rows))
            if layer.has_cross_attention:
                module, residual = layer.cross_attention, layer.cross_residual
                projected = [self.project(module.key_value, row) for row in chunk]
                keys = [self.rotate(k, p) for p, (k, _) in enumerate(projected)]
                values = [v for _, v in projected]

                def read(x, position, module=module, keys=keys, values=values):
                    query = self.rotate(self.project(module.query, x)[0], position)
                    return module.output(naive_attend(module.attention, query, keys, values))

                rows = [naive_residual(residual, row, lambda x, p=p: read(x, p)) for p, row in enumerate(rows)]
            rows = [self.feed_forward(layer, row) for row in rows]
        return [self.model.encoder.output(naive_norm(self.model.encoder.norm, row)) for row in rows]

    def cross_attend(self, module, x: Tensor, position: int, neighbours) -> Tensor:
        m = self.config.chunk_size
        chunk = (position + 1) // m - 1
        if position < m - 1 or neighbours is None:
            return torch.zeros_like(x)
        offset = (position + 1) % m
        place = m - 1 + offset
        if self.config.rope == "legacy":
            place = 2 * m - 2 if offset == 0 else 0
        query = self.rotate(self.project(module.query, x)[0], place)
        keys, values = [list(module.null_key)], [list(module.null_value)]
        for ids, rows in neighbours[chunk]:
            for j, row in enumerate(rows):
                if ids[j] != self.config.pad_token_id:
                    key, value = self.project(module.key_value, row)
                    keys.append(self.rotate(key, j))
                    values.append(value)
        return module.output(naive_attend(module.attention, query, keys, values))

    def logits(self, ids: list[int], retrieved: list[list[list[int]]] | None) -> Tensor:
        model, m = self.model, self.config.chunk_size
        rows = []
        for p, i in enumerate(ids):
            row = model.embed_tokens.weight[i]
            if model.embed_positions is not None:
                row = row + model.embed_positions.weight[p]
            rows.append(model.input_projection(row))
        neighbours = None
        for layer in model.layers:
            rows = self.self_attention(
                layer, layer.causal_attention, rows, [list(range(p + 1)) for p in range(len(rows))]
            )
            if layer.reads_neighbours:
                if neighbours is None and retrieved is not None:
                    neighbours = [
                        [(found, self.encode(found, rows[u * m : (u + 1) * m])) for found in of_chunk]
                        for u, of_chunk in enumerate(retrieved)
                    ]
                module = layer.cross_attention

                def read(x, position, module=module, neighbours=neighbours):
                    return self.cross_attend(module, x, position, neighbours)

                residual = layer.cross_residual
                rows = [naive_residual(residual, row, lambda x, p=p: read(x, p)) for p, row in enumerate(rows)]
            rows = [self.feed_forward(layer, row) for row in rows]
        return torch.stack([self.head(naive_norm(model.norm, row)) for row in rows])


VARIANTS = {
    "plain": {},
    "grouped heads, gated rms, relu2": {"num_key_value_heads": 1, "norm": "gated_rms", "hidden_act": "relu2"},
    "deepnorm": {"residual": "deepnorm", "norm": "layer"},
    "rela, gated mlp": {"attention": "rela", "gated_mlp": True, "hidden_act": "silu"},
    "legacy, learned positions": {"rope": "legacy", "position_embedding": "rotary+learned", "head_bias": True},
    "tied, first encoder layer reads": {
        "encoder_hidden_size": 12,
        "tie_word_embeddings": True,
        "encoder_cross_attention_layers": [0],
    },
    "encoder apart, one layer reads": {"encoder_cross_attention_layers": [], "cross_attention_layers": [1]},
    "chunks of one": {"chunk_size": 1, "neighbour_length": 3},
}


@pytest.mark.parametrize("variant", VARIANTS)
@settings(max_examples=max(4, settings.default.max_examples // 5))  # the loop is slow
@given(seed=st.integers(0, 2**31), length=st.sampled_from([1, 3, 4, 5, 7, 8, 11]), neighbours=st.integers(1, 3))
def test_forward_equals_a_loop_over_tokens(variant, seed, length, neighbours):
    model = tiny_model(seed, **VARIANTS[variant])
    m = model.config.chunk_size
    ids, retrieved = random_inputs(seed, 1 + seed % 2, length, m, neighbours, model.config.neighbour_length)
    rng = torch.Generator().manual_seed(seed)
    cut = torch.randint(0, retrieved.shape[3] + 1, (*retrieved.shape[:3], 1), generator=rng)
    retrieved = retrieved.masked_fill(torch.arange(retrieved.shape[3]) >= cut, 0)  # padding of any length, also all
    loop = NaiveRetro(model)
    expected = torch.stack([loop.logits(i, r) for i, r in zip(ids.tolist(), retrieved.tolist(), strict=True)])
    torch.testing.assert_close(model(ids, retrieved=retrieved).logits, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("variant", ["plain", "deepnorm", "rela, gated mlp"])
def test_gradients_equal_those_of_the_loop(variant):
    model = tiny_model(**VARIANTS[variant])
    twin = copy.deepcopy(model)
    ids, retrieved = random_inputs(3, 1, 9)
    retrieved[0, 1, 0, 5:] = 0
    model(ids, retrieved=retrieved).logits.square().mean().backward()
    NaiveRetro(twin).logits(ids[0].tolist(), retrieved[0].tolist()).square().mean().backward()
    for (name, ours), (_, theirs) in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        assert ours.grad is not None, name
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-8, atol=1e-10, msg=name)


@given(position=st.integers(0, 18))
def test_a_changed_token_moves_no_logit_before_it(position):
    model = tiny_model()
    ids, retrieved = random_inputs(1, 1, 19)
    changed = ids.clone()
    changed[0, position] = ids[0, position] % 22 + 1
    before, after = model(ids, retrieved=retrieved).logits[0], model(changed, retrieved=retrieved).logits[0]
    assert torch.equal(before[:position], after[:position])
    assert not torch.allclose(before[position], after[position])


@pytest.mark.parametrize("chunk", [0, 1, 2, 3])
def test_changed_neighbours_move_logits_from_the_last_token_of_their_chunk_on(chunk):
    model = tiny_model()
    ids, retrieved = random_inputs(2, 1, 19)
    changed = retrieved.clone()
    changed[0, chunk, 1, 2] = retrieved[0, chunk, 1, 2] % 22 + 1
    before, after = model(ids, retrieved=retrieved).logits[0], model(ids, retrieved=changed).logits[0]
    first = (chunk + 1) * 4 - 1
    assert torch.equal(before[:first], after[:first])
    assert not torch.allclose(before[first], after[first])


def test_the_order_of_neighbours_is_irrelevant_but_a_duplicate_counts_twice():
    model = tiny_model()
    ids, retrieved = random_inputs(4, 2, 13, neighbours=3)
    logits = model(ids, retrieved=retrieved).logits
    torch.testing.assert_close(model(ids, retrieved=retrieved.flip(2)).logits, logits, rtol=1e-12, atol=1e-12)
    doubled = torch.cat([retrieved, retrieved[:, :, :1]], dim=2)
    assert not torch.allclose(model(ids, retrieved=doubled).logits, logits, atol=1e-6)


def test_neighbours_of_padding_only_are_finite_and_count_as_none():
    model = tiny_model()
    ids, retrieved = random_inputs(5, 2, 13)
    empty = model(ids, retrieved=torch.zeros_like(retrieved)).logits
    assert empty.isfinite().all()
    one = torch.cat([retrieved[:, :, :1], torch.zeros_like(retrieved[:, :, :1])], dim=2)
    torch.testing.assert_close(model(ids, retrieved=one).logits, model(ids, retrieved=retrieved[:, :, :1]).logits)
    torch.testing.assert_close(model(ids, retrieved=torch.zeros_like(retrieved[..., :1])).logits, empty)


@pytest.mark.parametrize("variant", ["plain", "deepnorm", "rela, gated mlp", "legacy, learned positions"])
def test_the_first_tokens_are_the_same_with_and_without_neighbours(variant):
    model = tiny_model(**VARIANTS[variant])
    ids, retrieved = random_inputs(6, 2, 13)
    with_neighbours, without = model(ids, retrieved=retrieved).logits, model(ids).logits
    assert torch.equal(with_neighbours[:, :3], without[:, :3])
    assert not torch.allclose(with_neighbours[:, 3], without[:, 3])


@given(data=st.data())
def test_packed_documents_equal_their_documents_alone(data):
    model = tiny_model()
    m = 4
    lengths = data.draw(st.lists(st.integers(1, 13), min_size=1, max_size=4))
    ids, retrieved, positions, places, start = [], [], [], [], 0
    for number, length in enumerate(lengths):
        document, found = random_inputs(number, 1, -(-length // m) * m)
        document[0, length:] = 0
        ids.append(document)
        retrieved.append(found)
        positions.append(torch.arange(document.shape[1])[None])
        places.append((start, length))
        start += document.shape[1]
    ids, retrieved, positions = torch.cat(ids, 1), torch.cat(retrieved, 1), torch.cat(positions, 1)
    packed = model(ids, position_ids=positions, retrieved=retrieved).logits[0]
    for start, length in places:
        alone = model(
            ids[:, start : start + length], retrieved=retrieved[:, start // m : start // m + length // m]
        ).logits[0]
        torch.testing.assert_close(packed[start : start + length], alone, rtol=1e-10, atol=1e-10)


def test_a_document_that_begins_inside_a_chunk_is_refused():
    ids, retrieved = random_inputs(0, 1, 8)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]])
    with pytest.raises(ValueError, match="`position_ids` start a document inside a chunk.*`chunk_size` 4"):
        tiny_model()(ids, position_ids=positions, retrieved=retrieved)


@pytest.mark.parametrize("use_cache", [False, True])
@given(lengths=st.lists(st.integers(1, 14), min_size=1, max_size=4))
def test_left_padded_rows_equal_each_row_alone(lengths, use_cache):
    model = tiny_model()
    width = max(lengths)
    padded, mask = torch.zeros(2, len(lengths), width, dtype=torch.long)
    retrieved = torch.zeros(len(lengths), max(lengths) // 4, 2, 8, dtype=torch.long)
    rows = []
    for row, length in enumerate(lengths):
        ids, found = random_inputs(row, 1, length)
        rows.append((ids, found))
        padded[row, width - length :] = ids
        mask[row, width - length :] = 1
        retrieved[row, : length // 4] = found
    logits = model(padded, attention_mask=mask, retrieved=retrieved, use_cache=use_cache).logits
    for row, (ids, found) in enumerate(rows):
        alone = model(ids, retrieved=found).logits[0]
        torch.testing.assert_close(logits[row, width - lengths[row] :], alone, rtol=1e-10, atol=1e-10)


def test_right_padding_changes_no_real_logit():
    model = tiny_model()
    ids, retrieved = random_inputs(7, 2, 10)
    padded = torch.cat([ids, torch.zeros(2, 3, dtype=torch.long)], dim=1)
    mask = torch.tensor([[1] * 10 + [0] * 3] * 2)
    found = torch.cat([retrieved, torch.zeros_like(retrieved[:, :1])], dim=1)
    logits = model(padded, attention_mask=mask, retrieved=found).logits[:, :10]
    torch.testing.assert_close(logits, model(ids, retrieved=retrieved).logits, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("length", [2, 4, 9, 12])
def test_the_training_loss_equals_the_loss_over_all_logits(length):
    model = tiny_model()
    ids, retrieved = random_inputs(8, 3, length)
    labels = ids.masked_fill(torch.rand(ids.shape, generator=torch.Generator().manual_seed(0)) < 0.3, -100)
    logits = model(ids, retrieved=retrieved).logits
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    evaluated = model(ids, retrieved=retrieved, labels=labels)
    trained = model.train()(ids, retrieved=retrieved, labels=labels)
    assert trained.logits is None
    torch.testing.assert_close(evaluated.loss, expected)
    torch.testing.assert_close(trained.loss, expected)
    divided = model(ids, retrieved=retrieved, labels=labels, num_items_in_batch=7).loss
    torch.testing.assert_close(divided * 7, expected * (labels[:, 1:] != -100).sum())


@pytest.mark.parametrize("past", [3, 4, 6])
def test_the_training_loss_behind_a_cache_is_that_of_the_tokens_given(past):
    model = tiny_model()
    ids, retrieved = random_inputs(13, 2, 12)
    logits = model(ids, retrieved=retrieved).logits[:, past:-1]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, past + 1 :].flatten())
    cache = cache_of(model(ids[:, :past], retrieved=retrieved[:, : past // 4], use_cache=True))
    rest = {"retrieved": retrieved[:, past // 4 :], "labels": ids[:, past:], **cache_argument(cache)}
    torch.testing.assert_close(model.train()(ids[:, past:], **rest).loss, expected)


def test_gradient_checkpointing_changes_no_gradient():
    ids, retrieved = random_inputs(9, 2, 13)
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(ids, retrieved=retrieved, labels=ids).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_eager_attention_gives_weights_and_the_logits_of_sdpa():
    model = tiny_model()
    ids, retrieved = random_inputs(10, 2, 9)
    retrieved[0, 0, 1] = 0
    expected = model(ids, retrieved=retrieved).logits
    model.set_attn_implementation("eager")
    output = model(ids, retrieved=retrieved, output_attentions=True, output_hidden_states=True)
    torch.testing.assert_close(output.logits, expected)
    assert [tuple(weights.shape) for weights in output.attentions] == [(2, 2, 9, 9)] * 3
    assert len(output.hidden_states) == 4


def test_deepnorm_begins_with_the_gains_of_its_paper():
    config = tiny_config(residual="deepnorm", norm="layer", hidden_size=64, head_dim=32, encoder_hidden_size=64)
    model = RetroForCausalLM(config)
    attention = model.model.layers[0].causal_attention
    queries, values = attention.query_key_value.weight[:64], attention.query_key_value.weight[128:]
    gain = (12 * 3) ** -0.25
    assert (values.std() / queries.std()).item() == pytest.approx(gain, rel=0.1)
    up = model.model.layers[1].feed_forward.up.weight
    assert up.std().item() == pytest.approx(gain * math.sqrt(2 / (64 + 256)), rel=0.1)


BAD_RETRIEVED = {
    "too many chunks": (
        torch.ones(2, 3, 2, 8, dtype=torch.long),
        ValueError,
        "`retrieved` has 3 chunks, the sequence has 2 complete chunks of `chunk_size` 4",
    ),
    "three axes": (
        torch.ones(2, 2, 8, dtype=torch.long),
        ValueError,
        r"`retrieved` must be \(batch, chunks, neighbours, length\) = \(2, 2",
    ),
    "too long": (torch.ones(2, 2, 2, 9, dtype=torch.long), ValueError, "at most `neighbour_length` 8"),
    "of another batch": (torch.ones(1, 2, 2, 8, dtype=torch.long), ValueError, r"= \(2, 2, .*got \(1, 2, 2, 8\)"),
    "floats": (torch.ones(2, 2, 2, 8), TypeError, "`retrieved` must hold token ids .*got torch.float32"),
}


@pytest.mark.parametrize("case", BAD_RETRIEVED)
def test_retrieved_of_a_wrong_shape_is_refused(case):
    retrieved, error, message = BAD_RETRIEVED[case]
    ids, _ = random_inputs(0, 2, 10)
    with pytest.raises(error, match=message):
        tiny_model()(ids, retrieved=retrieved)


def test_positions_beyond_learned_ones_are_refused():
    model = tiny_model(position_embedding="rotary+learned", max_position_embeddings=8)
    ids, retrieved = random_inputs(0, 1, 9)
    with pytest.raises(ValueError, match="position 8, .* end at `max_position_embeddings` 8"):
        model(ids, retrieved=retrieved)


@pytest.mark.parametrize("kind", ["autocast", "weights"])
def test_bfloat16_is_near_single_precision(kind):
    model = tiny_model().float().train()
    ids, retrieved = random_inputs(11, 2, 13)
    retrieved[0, 1, 0] = 0
    expected = model(ids, retrieved=retrieved, labels=ids).loss
    if kind == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(ids, retrieved=retrieved, labels=ids).loss
    else:
        loss = model.bfloat16()(ids, retrieved=retrieved, labels=ids).loss
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=0.05)
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_a_misspelt_argument_is_refused():
    ids, retrieved = random_inputs(0, 1, 9)
    with pytest.raises(TypeError, match=r"no argument \['retreived'\].*'retrieved'"):
        tiny_model()(ids, retreived=retrieved)
