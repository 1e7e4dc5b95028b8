"""A retro-fitted decoder is the stock one until it reads neighbours, and then reads them where the paper says."""

import itertools
import json

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from graft import UnlimiformerConfig, unlimiform
from graft.modeling.attachment import Attachment
from graft.modeling.residual_tap import tap_residual
from graft.modeling.retro.retrofit import RetroFit, retrofit
from graft.modeling.retro.retrofit_config import RetroFitConfig
from graft.modeling.retro.retrofit_options import every_third_layer

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gpt2", "gemma2", "gemma3_text", "olmo2"]
OPTIONS = {"chunk_size": 4, "neighbour_length": 6, "cross_attention_layers": [0, 2]}


def logits(model, ids, **inputs):
    with torch.no_grad():
        return model(ids, **inputs).logits


def everything(model):
    """What a removed attachment must leave as it found it."""
    modules = {
        name: (type(module), sorted(vars(module)), len(module._forward_hooks), len(module._forward_pre_hooks))
        for name, module in model.named_modules()
    }
    weights = {name: (tensor.clone(), tensor.requires_grad) for name, tensor in model.named_parameters()}
    return modules, weights, model.config.to_dict()


def assert_same(found, expected):
    assert found[0] == expected[0]
    assert found[2] == expected[2]
    assert found[1].keys() == expected[1].keys()
    for name, (tensor, trained) in found[1].items():
        assert torch.equal(tensor, expected[1][name][0])
        assert trained == expected[1][name][1]


# ---- What it computes


def naive_rotate(x, position, width, theta):
    turned = x.clone()
    for pair in range(width // 2):
        angle = torch.tensor(position * theta ** (-2 * pair / width), dtype=x.dtype)
        first, second = x[..., pair], x[..., pair + width // 2]
        turned[..., pair] = first * angle.cos() - second * angle.sin()
        turned[..., pair + width // 2] = second * angle.cos() + first * angle.sin()
    return turned


def naive_reads(layer, config, hidden, encoded, visible):
    """(tokens, width) of one row: what each token reads, one by one. `encoded` has (n, r, width) for each chunk."""
    cca, m = layer.cross_attention, config.chunk_size
    heads, shared, width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    output = torch.zeros_like(hidden)
    for p in range(m - 1, len(hidden)):
        u, offset = (p + 1) // m - 1, (p + 1) % m
        if u >= len(encoded):
            u, offset = len(encoded) - 1, p - len(encoded) * m + 1
        query = (cca.query.weight @ layer.norm(hidden[p])).view(heads, width)
        query = naive_rotate(query, m - 1 + offset, config.rotary_dim, config.rope_theta)
        attended = []
        for h in range(heads):
            g = h // (heads // shared)
            keys, values = [cca.null_key[g]], [cca.null_value[g]]
            for n, r in itertools.product(*map(range, encoded[u].shape[:2])):
                if visible[u, n, r]:
                    key, value = (cca.key_value.weight @ encoded[u][n, r]).view(2, shared, width)[:, g]
                    keys.append(naive_rotate(key, r, config.rotary_dim, config.rope_theta))
                    values.append(value)
            weights = (torch.stack(keys) @ query[h] / width**0.5).softmax(0)
            attended.append(weights @ torch.stack(values))
        output[p] = cca.output.weight @ torch.cat(attended) + cca.output.bias
    return output


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "olmo2"])
@pytest.mark.parametrize("length", [3, 4, 7, 13])
def test_logits_equal_a_loop_over_tokens_that_adds_what_each_reads(decoders, family, length):
    model, handle = decoders.fit(family)
    ids = decoders.ids(1, length)
    retrieved = decoders.Retriever().retrieved(ids)
    found = logits(model, ids, retrieved=retrieved)
    adapter, config = handle.adapter, handle.adapter.config
    handle.remove()
    encoded = []

    def naive_update(index):
        def update(hidden, keywords):
            if index == 0:
                chunks = hidden[0, : length // 4 * 4].unflatten(0, (-1, 4))
                for chunk, neighbours in zip(chunks, retrieved[0], strict=True):
                    embedded = model.get_input_embeddings()(neighbours)
                    states = adapter.encoder(embedded[None, None], (neighbours != 1)[None, None], chunk[None, None])
                    encoded.append(states[0, 0])
            if not encoded:
                return torch.zeros_like(hidden)
            return naive_reads(adapter.layers[str(index)], config, hidden[0], encoded, retrieved[0] != 1)[None]

        return update

    with Attachment() as attachment:
        for index in (0, 2):
            tap_residual(attachment, model, index, naive_update(index))
        expected = logits(model, ids)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_without_neighbours_it_is_the_base_bit_for_bit(decoders, family):
    base = decoders.build(family)
    ids = decoders.ids(2, 13)
    before, generated = logits(base, ids), base.generate(ids, max_new_tokens=6, do_sample=False)
    model, handle = decoders.fit(family)
    assert torch.equal(logits(model, ids), before)
    assert torch.equal(model.generate(**handle.inputs(ids), max_new_tokens=6, do_sample=False), generated)
    assert torch.equal(logits(model.train(), ids), before)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_begins_at_the_base(decoders, family):
    model = decoders.build(family)
    ids = decoders.ids(2, 13)
    before = logits(model, ids)
    retrofit(model, RetroFitConfig(**OPTIONS))
    found = logits(model, ids, retrieved=decoders.Retriever().retrieved(ids))
    torch.testing.assert_close(found, before, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_new_weights_get_gradients_and_all_of_them_do(decoders, family):
    model, handle = decoders.fit(family)
    ids = decoders.ids(2, 13)
    model.train()
    model(ids, labels=ids, retrieved=decoders.Retriever().retrieved(ids)).loss.backward()
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in model.parameters())
    for name, parameter in handle.adapter.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("family", FAMILIES)
def test_neighbours_of_a_chunk_move_its_last_token_and_none_before(decoders, family):
    model, _ = decoders.fit(family)
    ids = decoders.ids(1, 14)
    retrieved = decoders.Retriever().retrieved(ids)
    on = logits(model, ids, retrieved=retrieved)
    off = logits(model, ids)
    assert torch.equal(on[:, :3], off[:, :3])
    assert (on[:, 3] - off[:, 3]).abs().max() > 1e-6
    for chunk in range(3):
        other = retrieved.clone()
        other[:, chunk] = decoders.ids(1, 2, 6, seed=5)
        moved = (logits(model, ids, retrieved=other) - on).abs().amax(-1)[0]
        assert not moved[: 4 * chunk + 3].any()
        assert moved[4 * chunk + 3] > 1e-6


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "olmo2"])
def test_a_changed_token_moves_no_logit_before_it(decoders, family):
    model, _ = decoders.fit(family)
    ids = decoders.ids(1, 14)
    retrieved = decoders.Retriever().retrieved(ids)
    on = logits(model, ids, retrieved=retrieved)
    for place in range(14):
        other = ids.clone()
        other[0, place] = 3 + (other[0, place] - 2) % 58
        assert torch.equal(logits(model, other, retrieved=retrieved)[:, :place], on[:, :place])


@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "olmo2"])
def test_packed_documents_equal_each_alone(decoders, family, trains):
    model, _ = decoders.fit(family)
    model.train(trains)
    documents = [decoders.ids(1, length, seed=length) for length in (8, 12, 4)]
    retriever = decoders.Retriever()
    positions = torch.cat([torch.arange(document.shape[1]) for document in documents])[None]
    packed = torch.cat(documents, dim=1)
    found = logits(model, packed, position_ids=positions, retrieved=retriever.retrieved(packed))
    alone = [logits(model, document, retrieved=retriever.retrieved(document)) for document in documents]
    # the bases compute their rotary angles in float32, which depend on the length by rounding
    torch.testing.assert_close(found, torch.cat(alone, dim=1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_padding_on_either_side_changes_no_real_logit(decoders, family):
    model, _ = decoders.fit(family)
    retriever = decoders.Retriever()
    rows = [decoders.ids(1, length, seed=length) for length in (13, 9)]
    for side in ("left", "right"):
        short = torch.full((1, 4), 1)
        padded = torch.cat([short, rows[1]] if side == "left" else [rows[1], short], dim=1)
        ids = torch.cat([rows[0], padded])
        mask = torch.ones_like(ids)
        mask[1] = padded[0] != 1
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        retrieved = torch.full((2, 3, 2, 6), 1)
        retrieved[0], retrieved[1, :2] = retriever.retrieved(rows[0])[0], retriever.retrieved(rows[1])[0]
        found = logits(model, ids, attention_mask=mask, position_ids=positions, retrieved=retrieved)
        for row, real in enumerate(rows):
            alone = logits(model, real, retrieved=retriever.retrieved(real))
            torch.testing.assert_close(found[row, mask[row] == 1], alone[0], rtol=1e-5, atol=1e-5)


def test_an_encoder_of_another_width_projects_the_embedding(decoders):
    config = RetroFitConfig(**OPTIONS, encoder_hidden_size=16, num_attention_heads=2, head_dim=6, gated_mlp=True)
    model, handle = decoders.fit("llama", config)
    ids = decoders.ids(2, 9)
    logits(model, ids, retrieved=decoders.Retriever().retrieved(ids))
    assert handle.adapter.embedding_projection.weight.shape == (16, 32)


def test_weights_are_float32_on_a_bfloat16_base(decoders):
    model, handle = decoders.fit("llama", dtype=torch.bfloat16)
    ids = decoders.ids(2, 13)
    assert {parameter.dtype for parameter in handle.trainable_parameters()} == {torch.float32}
    output = model(ids, labels=ids, retrieved=decoders.Retriever().retrieved(ids))
    output.loss.backward()
    assert output.logits.dtype == torch.bfloat16
    assert output.logits.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in handle.trainable_parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_gives_finite_gradients_also_where_a_chunk_has_no_neighbours(decoders, dtype):
    model, handle = decoders.fit("llama", dtype=dtype)
    ids = decoders.ids(2, 13)
    retrieved = decoders.Retriever().retrieved(ids)
    retrieved[0, 1] = 1
    with torch.autocast("cpu", torch.bfloat16):
        model.train()(ids, labels=ids, retrieved=retrieved).loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in handle.trainable_parameters())


# ---- Training


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "olmo2"])
def test_checkpointing_gives_the_same_gradients(decoders, family):
    model, handle = decoders.fit(family)
    model.train()
    ids = decoders.ids(2, 13)
    retrieved = decoders.Retriever().retrieved(ids)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        handle.adapter.zero_grad()
        model(ids, labels=ids, retrieved=retrieved).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in handle.trainable_parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=1e-11, atol=1e-11)


def test_reentrant_checkpointing_is_refused(decoders):
    model, _ = decoders.fit("llama")
    model.train().gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    ids = decoders.ids(2, 13)
    with pytest.raises(ValueError, match="`use_reentrant` of gradient checkpointing must be False"):
        model(ids, labels=ids, retrieved=decoders.Retriever().retrieved(ids))


def test_training_learns_to_read_a_neighbours_continuation(decoders):
    """Rows are noise but for one thing: each chunk's neighbour says what comes next. Rows are new in every step."""
    model = decoders.build("llama", torch.float32, initializer_range=0.1, num_hidden_layers=2)
    options = {"chunk_size": 4, "neighbour_length": 8, "cross_attention_layers": [1], "num_encoder_layers": 1}
    torch.manual_seed(0)
    handle = retrofit(model, RetroFitConfig(**options))
    optimizer = torch.optim.AdamW(handle.trainable_parameters(), lr=5e-3)

    def rows(count, seed):
        ids = decoders.ids(count, 20, seed=seed)
        chunks = ids.unflatten(1, (5, 4))
        return ids[:, :16], torch.cat([chunks[:, :-1], chunks[:, 1:]], dim=-1)[:, :, None]

    def loss(ids, retrieved):
        scores = model(ids, retrieved=retrieved).logits[:, 3:-1]  # of what follows a complete chunk
        return torch.nn.functional.cross_entropy(scores.transpose(1, 2), ids[:, 4:])

    model.train()
    for step in range(250):
        optimizer.zero_grad()
        loss(*rows(16, seed=step)).backward()
        optimizer.step()
    ids, retrieved = rows(64, seed=1000)
    with torch.no_grad():
        true, random, none = loss(ids, retrieved), loss(ids, retrieved.roll(1, 0)), loss(ids, None)
    assert true < none - 0.15
    assert true < random - 0.15


def test_dropout_follows_the_model(decoders):
    model, handle = decoders.fit("llama", RetroFitConfig(**OPTIONS, residual_dropout=0.5))
    ids = decoders.ids(1, 9)
    retrieved = decoders.Retriever().retrieved(ids)
    assert torch.equal(logits(model, ids, retrieved=retrieved), logits(model, ids, retrieved=retrieved))
    model.train()
    assert not torch.equal(logits(model, ids, retrieved=retrieved), logits(model, ids, retrieved=retrieved))


# ---- Attaching and removing


@pytest.mark.parametrize("family", FAMILIES)
def test_removal_gives_the_model_back(decoders, family):
    base = decoders.build(family)
    ids = decoders.ids(2, 9)
    before, state = logits(base, ids), everything(base)
    with retrofit(base, RetroFitConfig(**OPTIONS)) as handle:
        decoders.shake(handle.trainable_parameters())
        assert not torch.equal(logits(base, ids, retrieved=decoders.Retriever().retrieved(ids)), before)
    assert_same(everything(base), state)
    assert torch.equal(logits(base, ids), before)
    with pytest.raises(RuntimeError, match="removed"):
        handle.inputs(ids)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("first", ["memory", "retrieval"])
def test_memory_and_retrieval_leave_in_any_order(decoders, first, order):
    model = decoders.build("llama")
    ids = decoders.ids(2, 9)
    before, state = logits(model, ids), everything(model)
    makers = [
        lambda: unlimiform(model, UnlimiformerConfig(keys_per_query=None, window=8)),
        lambda: retrofit(model, RetroFitConfig(**OPTIONS)),
    ]
    attachments = [make() for make in (makers if first == "memory" else makers[::-1])]
    assert torch.equal(logits(model, ids), before)
    for place in order:
        attachments[place].remove()
    assert_same(everything(model), state)
    assert torch.equal(logits(model, ids), before)


def test_installing_that_fails_half_way_undoes_what_was_done(decoders, monkeypatch):
    model = decoders.build("llama")
    state = everything(model)

    def fail(*args, **kwargs):
        raise ArithmeticError("no more hooks")

    monkeypatch.setattr(model.model.layers[2].self_attn, "register_forward_hook", fail)
    with pytest.raises(ArithmeticError, match="no more hooks"):
        retrofit(model, RetroFitConfig(**OPTIONS))
    monkeypatch.undo()
    assert_same(everything(model), state)


def test_a_model_has_one_retrofit_at_a_time(decoders):
    model, handle = decoders.fit("llama")
    with pytest.raises(RuntimeError, match="has retrieval already"):
        retrofit(model, RetroFitConfig(**OPTIONS))
    handle.remove()
    retrofit(model, RetroFitConfig(**OPTIONS))


def test_the_repr_says_what_it_is(decoders):
    model, handle = decoders.fit("llama")
    assert repr(handle).startswith("RetroFit(LlamaForCausalLM, layers [0, 2] of 3, chunks of 4, ")
    assert f"{handle.trainable_share:.1%} of all weights new" in repr(handle)
    new = sum(parameter.numel() for parameter in handle.trainable_parameters())
    assert handle.trainable_share == new / (new + sum(parameter.numel() for parameter in model.parameters()))
    handle.remove()
    assert repr(handle).endswith(", removed)")


# ---- On disk


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_saved_and_loaded_it_gives_the_same_logits(decoders, family, tmp_path):
    model, handle = decoders.fit(family)
    ids = decoders.ids(2, 13)
    retrieved = decoders.Retriever().retrieved(ids)
    found = logits(model, ids, retrieved=retrieved)
    handle.save_pretrained(tmp_path / "fit")
    assert sorted(path.name for path in (tmp_path / "fit").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    other = decoders.build(family)
    loaded = RetroFit.from_pretrained(other, tmp_path / "fit")
    assert loaded.config.chunk_size == 4
    assert torch.equal(logits(other, ids, retrieved=retrieved), found)


def test_a_folder_of_another_base_is_refused_and_leaves_the_model_alone(decoders, tmp_path):
    _, handle = decoders.fit("llama")
    handle.save_pretrained(tmp_path)
    other = decoders.build("llama", hidden_size=48, num_attention_heads=6)
    state = everything(other)
    with pytest.raises(ValueError, match=r"adapter_model.safetensors has encoder.* of shape .*, a retro-fit of this"):
        RetroFit.from_pretrained(other, tmp_path)
    assert_same(everything(other), state)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match="holds no retro-fit: it lacks adapter_model.safetensors"):
        RetroFit.from_pretrained(other, tmp_path)


def test_an_option_that_is_not_known_is_refused_when_loaded(decoders, tmp_path):
    _, handle = decoders.fit("llama")
    handle.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chunk_sise": 4}))
    with pytest.raises(TypeError, match="chunk_sise"):
        RetroFit.from_pretrained(decoders.build("llama"), tmp_path)


# ---- Mistakes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chunk_size": 0}, "`chunk_size` must be at least 1, got 0"),
        ({"neighbour_length": 0}, "`neighbour_length` must be at least 1, got 0"),
        ({"num_encoder_layers": 0}, "`num_encoder_layers` must be at least 1, got 0"),
        ({"cross_attention_layers": []}, "at least one decoder layer"),
        ({"cross_attention_layers": [2, 2]}, r"different layers from 0 on in rising order, got \[2, 2\]"),
        ({"cross_attention_layers": [-1]}, r"different layers from 0 on in rising order, got \[-1\]"),
        ({"rotary_dim": 3}, "`rotary_dim` must be even, got 3"),
        ({"residual_dropout": 1.0}, r"`residual_dropout` must lie in \[0, 1\), got 1.0"),
        ({"initializer_range": 0.0}, "`initializer_range` must be above 0, got 0.0"),
        ({"norm": "batch"}, "batch"),
        ({"chunk_size": "4"}, "chunk_size"),
    ],
)
def test_options_that_no_base_could_make_right_are_refused(options, message):
    with pytest.raises(StrictDataclassError, match=message):
        RetroFitConfig(**options)


def test_an_option_that_does_not_exist_is_refused():
    with pytest.raises(TypeError, match="chunk_sise"):
        RetroFitConfig(chunk_sise=4)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"cross_attention_layers": [3]}, ValueError, r"`cross_attention_layers` must lie in \[0, 3\).*got \[3\]"),
        ({"pad_token_id": 61}, ValueError, r"`pad_token_id` must lie in \[0, vocab_size 61\), got 61"),
        ({"rotary_dim": 10}, StrictDataclassError, "`rotary_dim` must be even and at most `head_dim` 8, got 10"),
        ({"num_key_value_heads": 3}, StrictDataclassError, "`num_key_value_heads` must divide"),
        ({"encoder_cross_attention_layers": [2]}, StrictDataclassError, "`encoder_cross_attention_layers`"),
    ],
)
def test_options_that_do_not_fit_the_base_are_refused_before_it_is_touched(decoders, options, error, message):
    model = decoders.build("llama")
    state = everything(model)
    with pytest.raises(error, match=message):
        retrofit(model, RetroFitConfig(**options))
    assert_same(everything(model), state)


def test_a_base_without_padding_needs_a_token_for_it(decoders):
    model = decoders.build("llama", pad_token_id=None, eos_token_id=None)
    with pytest.raises(ValueError, match=r"`pad_token_id` must lie in \[0, vocab_size 61\), got None"):
        retrofit(model, RetroFitConfig(**OPTIONS))


@pytest.mark.parametrize(
    ("family", "options"),
    [("gptj", {"n_embd": 32, "n_layer": 1, "n_head": 4, "rotary_dim": 4}), ("gpt_neox", {"num_hidden_layers": 1})],
)
def test_parallel_families_are_refused_with_those_that_are_supported(family, options):
    sizes = {"vocab_size": 61, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 40}
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(family, **(options if "n_embd" in options else sizes | options))
    )
    with pytest.raises(ValueError, match=rf"'{family}'.*in parallel.*Supported model types: .*llama.*qwen3"):
        retrofit(model)


def test_an_encoder_decoder_is_refused_with_those_that_are_supported():
    sizes = {"vocab_size": 61, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
    config = AutoConfig.for_model("bart", **sizes, decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16)
    with pytest.raises(ValueError, match="'bart'.*encoder-decoder.*Supported model types: .*llama"):
        retrofit(AutoModelForSeq2SeqLM.from_config(config))
    with pytest.raises(TypeError, match="`model` must be a transformers model, got Linear"):
        retrofit(torch.nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("retrieved", "error", "message"),
    [
        (torch.full((2, 2, 2, 6), 3), ValueError, "`retrieved` has 2 chunks, the sequence has 3 complete chunks"),
        (torch.full((2, 3, 6), 3), ValueError, r"`retrieved` must be \(batch, chunks, neighbours, length\)"),
        (torch.full((2, 3, 2, 7), 3), ValueError, "at most `neighbour_length` 6"),
        (torch.full((1, 3, 2, 6), 3), ValueError, r"`retrieved` must be \(batch, chunks, neighbours, length\)"),
        (torch.full((2, 3, 2, 6), 3.0), TypeError, "`retrieved` must hold token ids"),
    ],
)
def test_neighbours_that_do_not_fit_are_refused(decoders, retrieved, error, message):
    model, _ = decoders.fit("llama")
    with pytest.raises(error, match=message):
        model(decoders.ids(2, 13), retrieved=retrieved)


def test_embeddings_without_ids_cannot_be_chunked(decoders):
    model, _ = decoders.fit("llama")
    with pytest.raises(ValueError, match="`input_ids` must be given to retrieve"):
        model(inputs_embeds=torch.zeros(1, 9, 32).double(), retrieved=torch.full((1, 2, 2, 6), 3))


def test_layers_are_the_papers_by_default():
    assert every_third_layer(12) == [5, 8, 11]
    assert every_third_layer(30) == [14, 17, 20, 23, 26, 29]
    assert [every_third_layer(count) for count in (1, 2, 3)] == [[0], [1], [2]]
