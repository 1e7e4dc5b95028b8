"""A graph-aware Llama: causal, blind to padding, the same with a cache, and every weight learns, in each variant."""

import copy

import pytest
import torch
from tiny_graph_llamas import SIZES
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

from graft.configuration.configuration_gnn import MESSAGE_MLPS, LlamaGNNConfig
from graft.modeling.graph.modeling_llama_gnn import LlamaDecoderLayerWithGNN, LlamaForCausalLMWithGNN
from graft.modeling.transformers_compat import cache_argument, cache_of

SPARSE = {"rank": 8, "num_layers": 2, "scale_first": 0.5}
LATENT = {"tokens_per_latent": [3, 4]}
BESIDE = {"base_attention": True, "scale": 0.5}
VARIANTS = {
    "gin": {"output_projection": True},
    "gin, relu": {"edges": {"transform": "relu", "threshold": 0.05}},
    "gin, top_k": {"edges": {"transform": "top_k", "fraction": 0.4, "straight_through": True}},
    "gin, small blocks": {"edges": {"transform": "silu", "trains_threshold": True}, "block_bytes": 1000},
    "gin, scaled_topk": {"edges": {"transform": "scaled_topk", "fraction": 0.5, "straight_through": True}},
    "gin, differential": {"differential": True, "differential_norm": True},
    "gin, scored": {"scores": "mlp", "scoring_width": 8},
    "gin, no softmax": {"normalisation": "relu", "temperature": 8},
    "gin, beside": {"base_attention": True, "scale": 0.5},
    "gin, beside, differential": {**BESIDE, "differential": True, "edges": {"transform": "silu"}},
    "gin, beside, scored": {**BESIDE, "scores": "mlp", "scoring_width": 8, "output_projection": True},
    "pna": {"attention": "pna", "mlp_ratio": 2},
    "pna, silu": {"attention": "pna", "edges": {"transform": "silu", "threshold": 0.1}, "mlp_ratio": 2},
    "pna, sigmoid": {"attention": "pna", "edges": {"transform": "sigmoid", "trains_threshold": True}},
    "pna, no softmax": {"attention": "pna", "normalisation": "relu", "block_bytes": 40000},
    "pna_vector": {"attention": "pna_vector", "edges": {"threshold": 0.1}},
    "cg": {"attention": "cg", "latent": {"tokens_per_latent": [3, 5]}},
    "cg, beside": {"attention": "cg", "base_attention": True, "latent": {**LATENT, "num_layers": 2}},
    "cg, one map": {"attention": "cg", "latent": {"tokens_per_latent": [2, 12], "projects": False, "skip": True}},
    "cg_interpolate": {"attention": "cg_interpolate", "latent": {**LATENT, "projects": False}},
    "cg_interpolate, maps": {"attention": "cg_interpolate", "latent": {**LATENT, "num_layers": 2, "skip": True}},
    "cg_interpolate, beside": {"attention": "cg_interpolate", "base_attention": True, "latent": LATENT},
    "sparse": {"attention": "llama", "sparse": SPARSE},
    "sparse, after": {"attention": "llama", "sparse": SPARSE, "placement": "after_mlp"},
    "sparse, parallel": {"attention": "llama", "sparse": SPARSE, "placement": "parallel", "block_bytes": 1000},
    "sparse, gcn": {"attention": "llama", "sparse": {**SPARSE, "layer": "gcn"}},
    "sparse, recombination": {"attention": "llama", "sparse": {**SPARSE, "layer": "recombination"}},
    "sparse, pna": {"attention": "llama", "sparse": {**SPARSE, "layer": "pna", "towers": 2}, "shares_scores": True},
    "sparse, per head": {
        "attention": "llama",
        "sparse": {**SPARSE, "per_head": True, "mixes_heads": True, "activation": "prelu", "storage": "sparse"},
        "adjacency": {"distance": "far", "normalises_rows": True},
    },
    "sparse, learned": {
        "attention": "llama",
        "sparse": {**SPARSE, "reads": "normed_input", "matches_scale": True},
        "adjacency": {"combine": "learned", "learned_width": 5, "cutoff": None, "sharpness": None},
    },
    "sparse, stored": {
        "attention": "llama",
        "sparse": {**SPARSE, "storage": "sparse"},
        "shares_scores": True,
        "block_bytes": 1000,
    },
    "linear": {"attention": "llama", "mlp": "linear"},
    "shallow": {"attention": "llama", "mlp": "shallow"},
    "none": {"attention": "llama", "mlp": "none", "sparse": SPARSE},
    "halfway": {"attention": "llama", "mlp": "halfway_gin"},
    "hops": {"attention": "llama", "mlp": "multi_hop", "sparse": SPARSE, "placement": "after_mlp"},
    "aggregations": {"attention": "llama", "mlp": "multi_aggregation"},
    "one layer": {"layers": [1]},
}
LATENTS = ["cg", "cg, beside", "cg_interpolate"]
GRAPHS = ["gin", "gin, relu", "gin, differential", "gin, scored", "gin, beside, differential"]
DIFFERENT = [
    *GRAPHS,
    "pna",
    "pna, silu",
    "pna_vector",
    *LATENTS,
    "sparse",
    "sparse, per head",
    "hops",
    "aggregations",
]


def quickly(quick, of=VARIANTS):
    """All variants, of which these run in the quick tier too."""
    assert set(quick) <= set(of)
    return [*quick, *(pytest.param(name, marks=pytest.mark.slow) for name in of if name not in quick)]


def build(variant="gin", dtype=torch.float64, **changes):
    torch.manual_seed(0)
    options = VARIANTS[variant] if isinstance(variant, str) else variant
    model = LlamaForCausalLMWithGNN(LlamaGNNConfig(**{**SIZES, **changes}, gnn_config=options)).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("epsilon", "sharpening", "row_gain", "slope")):
                parameter.uniform_(0.5, 1.5)
            if "output.maps" in name and not parameter.any():
                parameter.normal_(std=0.3)
    return model


def tokens(batch=2, length=13, seed=0):
    return torch.randint(2, 61, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_later_tokens_change_no_earlier_logit(variant, training, implementation):
    model = build(variant, torch.float32, attention_dropout=0.2)
    model.set_attn_implementation(implementation)
    model.train(training)
    ids = tokens()
    other = ids.clone()
    other[:, 8:] = tokens(seed=5)[:, 8:]
    logits = []
    for each in (ids, other):
        torch.manual_seed(3)  # the same dropout
        with torch.no_grad():
            logits.append(model(each).logits)
    assert torch.equal(logits[0][:, :8], logits[1][:, :8])
    assert not torch.allclose(logits[0][:, 8:], logits[1][:, 8:])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_padding_on_either_side_and_its_content_change_no_real_logit(variant, implementation):
    model = build(variant, torch.float32)
    model.set_attn_implementation(implementation)
    ids, length = tokens(3), 13
    for side in ("left", "right"):
        mask = torch.ones(3, length, dtype=torch.long)
        hidden = [0, 4, 7]
        for row, pads in enumerate(hidden):
            mask[row, slice(0, pads) if side == "left" else slice(length - pads, length)] = 0
        # As `generate` numbers them: the rotary table is float32, equal only at equal positions.
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            one = model(ids * mask, attention_mask=mask, position_ids=positions).logits
            two = model(torch.where(mask == 1, ids, 60), attention_mask=mask, position_ids=positions).logits
            assert one.isfinite().all()
            for row in range(3):
                real = mask[row] == 1
                assert torch.equal(one[row, real], two[row, real])
                alone = model(ids[row : row + 1, real]).logits[0]
                torch.testing.assert_close(one[row, real], alone, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("variant", [name for name in VARIANTS if not name.startswith("cg")])
def test_packed_documents_give_what_each_gives_alone(variant):
    model = build(variant)
    ids = tokens(1, 12)
    positions = torch.tensor([[*range(5), *range(7)]])
    with torch.no_grad():
        packed = model(ids, position_ids=positions, use_cache=False).logits
        for part in (slice(0, 5), slice(5, 12)):
            torch.testing.assert_close(packed[:, part], model(ids[:, part]).logits, atol=1e-10, rtol=1e-9)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("pieces", [[1] * 13, [9, 4], [6, 1, 6]])
def test_in_pieces_with_a_cache_logits_are_those_of_the_whole(variant, pieces):
    model, ids = build(variant), tokens()
    cache, at, found = DynamicCache(), 0, []
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        for piece in pieces:
            found.append(model(ids[:, at : at + piece], **cache_argument(cache)).logits)
            at += piece
    torch.testing.assert_close(torch.cat(found, 1), whole, atol=1e-10, rtol=1e-9)


@pytest.mark.parametrize("variant", quickly(DIFFERENT))
def test_a_cropped_cache_goes_on_as_if_the_tokens_had_not_been(variant):
    model, ids = build(variant), tokens()
    with torch.no_grad():
        cache = cache_of(model(ids, use_cache=True))
        cache.crop(-5)
        found = model(ids[:, 8:].flip(1), **cache_argument(cache)).logits
        whole = model(torch.cat([ids[:, :8], ids[:, 8:].flip(1)], 1)).logits
    torch.testing.assert_close(found, whole[:, 8:], atol=1e-10, rtol=1e-9)


WAYS = {
    "greedy": {"do_sample": False},
    "beams": {"num_beams": 3, "do_sample": False},
    "sampling": {"do_sample": True, "num_return_sequences": 2},
    "prompt lookup": {"prompt_lookup_num_tokens": 2, "do_sample": False},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("variant", quickly(DIFFERENT))
def test_generation_with_a_cache_gives_the_tokens_without_one(variant, way):
    model = build(variant)
    ids = tokens(1 if way == "prompt lookup" else 2)
    mask = torch.ones_like(ids)
    if way != "prompt lookup":
        mask[0, :4] = 0
    found = []
    for use_cache in (True, way == "prompt lookup"):
        torch.manual_seed(1)
        options = WAYS[way] if not found or way != "prompt lookup" else WAYS["greedy"]
        found.append(model.generate(ids, attention_mask=mask, max_new_tokens=8, use_cache=use_cache, **options))
    assert torch.equal(*found)


KEEPS_MORE = [  # nodes, latents or what an MLP's messages read: beside keys and values, in dynamic caches alone
    name
    for name, options in VARIANTS.items()
    if "sparse" in options or "latent" in options or options.get("mlp") in MESSAGE_MLPS
]
KEEPS_PAIRS = [name for name in VARIANTS if name not in KEEPS_MORE]
STATIC_QUICKLY = ["gin", "gin, relu", "gin, beside, differential", "gin, scored", "pna", "pna, silu", "pna_vector"]


@pytest.mark.parametrize("variant", quickly(STATIC_QUICKLY, KEEPS_PAIRS))
def test_a_static_cache_gives_the_tokens_of_a_dynamic_one(variant):
    model, ids = build(variant), tokens()
    cache = StaticCache(model.config, max_cache_len=24)
    options = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    one = model.generate(ids, disable_compile=True, **options, **cache_argument(cache))
    other = model.generate(ids, **options)
    assert torch.equal(one.sequences, other.sequences)
    torch.testing.assert_close(torch.stack(one.logits), torch.stack(other.logits), atol=1e-10, rtol=1e-9)


@pytest.mark.parametrize("variant", KEEPS_MORE)
def test_a_static_cache_is_refused_where_nodes_or_latents_must_be_kept(variant):
    model = build(variant)
    with pytest.raises(ValueError, match="needs a dynamic cache that keeps all tokens, got a StaticLayer"):
        model(tokens(), **cache_argument(StaticCache(model.config, max_cache_len=24)))


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_gets_a_gradient(variant):
    model = build(variant).train()
    model(tokens(), labels=tokens()).loss.backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    zero = [name for name, parameter in model.named_parameters() if not without and not parameter.grad.any()]
    assert not without
    assert not zero


@pytest.mark.parametrize("variant", quickly(["gin", "gin, relu", "pna", "sparse", "cg_interpolate"]))
def test_compiled_as_one_graph_the_forward_gives_the_same_logits(variant):
    """Traced whole, without the C++ of an inductor."""
    model, ids = build(variant), tokens()
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        found = compiled(ids, use_cache=False).logits
        torch.testing.assert_close(found, model(ids, use_cache=False).logits, atol=1e-10, rtol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["cg", "cg, beside", "cg_interpolate"])
def test_compiled_latent_attention_counts_padding_on_the_device(variant):
    model, ids = build(variant), tokens(3)
    mask = torch.ones_like(ids)
    mask[1, :4] = mask[2, :7] = 0
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        found, expected = (each(ids, attention_mask=mask, use_cache=False).logits for each in (compiled, model))
    torch.testing.assert_close(found[mask == 1], expected[mask == 1], atol=1e-10, rtol=1e-9)


@pytest.mark.parametrize("variant", quickly(["cg_interpolate"]))
def test_compiled_as_one_graph_a_pass_goes_on_from_a_cache(variant):
    """Left padding differs by row, and groups of latents with it; the compiled pass reads none of it on the host."""
    layers = 2 if variant == "one layer" else 1
    model, ids = build(variant, num_hidden_layers=layers), tokens()
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    torch.compiler.reset()
    compiled, found = torch.compile(model, fullgraph=True, backend="aot_eager"), []
    with torch.no_grad():
        for forward in (model, compiled):
            cache, at = DynamicCache(config=model.config), 0
            for step in (5, 7, 1):
                continued = model if at == 0 else forward
                given = {"attention_mask": mask[:, : at + step], **cache_argument(cache)}
                logits = continued(ids[:, at : at + step], **given).logits
                found.append(logits[mask[:, at : at + step] == 1])
                at += step
    torch.testing.assert_close(torch.cat(found[3:]), torch.cat(found[:3]), atol=1e-10, rtol=1e-9)


CHECKPOINTED_QUICKLY = ["gin", "gin, small blocks", "gin, beside, scored", "pna", "pna, no softmax", "cg", "sparse"]


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("variant", quickly(CHECKPOINTED_QUICKLY))
def test_gradient_checkpointing_gives_the_same_gradients(variant, reentrant):
    model = build({**VARIANTS[variant], "mlp_dropout": 0.0}).train()
    for module in model.modules():
        if hasattr(module, "dropout"):
            module.dropout = 0.0
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.zero_grad()
        model(tokens(), labels=tokens()).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_is_saved_and_loaded_with_equal_logits_and_options(variant, tmp_path):
    model = build(variant)
    model.save_pretrained(tmp_path)
    loaded = LlamaForCausalLMWithGNN.from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert loaded.config.gnn_config == model.config.gnn_config
    state = model.state_dict()
    assert loaded.state_dict().keys() == state.keys()
    assert all(torch.equal(weight, state[name]) for name, weight in loaded.state_dict().items())
    aligned = copy.deepcopy(loaded)  # mapped weights may lie otherwise in memory, and products then round otherwise
    with torch.no_grad():
        assert torch.equal(aligned(tokens()).logits, model(tokens()).logits)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_shared_keys_give_what_as_many_equal_keys_give(variant):
    """Grouped heads, against heads of their own with each group's rows repeated.

    A GIN's nodes are packed by groups in the cache, so the cached pass is compared too.
    """
    shared = build(variant)
    full = build(variant, num_key_value_heads=SIZES["num_attention_heads"])
    repeats, state = SIZES["num_attention_heads"] // SIZES["num_key_value_heads"], shared.state_dict()
    for name, wanted in full.state_dict().items():
        if state[name].shape != wanted.shape:
            rows = state[name].unflatten(0, (SIZES["num_key_value_heads"], -1))
            state[name] = rows.repeat_interleave(repeats, dim=0).flatten(0, 1)
    full.load_state_dict(state)
    with torch.no_grad():
        one, other = ([], [])
        for model, found in ((shared, one), (full, other)):
            cache = DynamicCache()
            for part in (tokens()[:, :9], tokens()[:, 9:]):
                found.append(model(part, **cache_argument(cache)).logits)
    torch.testing.assert_close(torch.cat(one, 1), torch.cat(other, 1), atol=1e-10, rtol=1e-9)


def plain_llama(folder):
    torch.manual_seed(4)
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    model.save_pretrained(folder)
    return model


EQUAL_AT_FIRST = {
    "sparse": {"attention": "llama", "sparse": {"rank": 8, "scale_last": 0.0}},
    "after": {"attention": "llama", "sparse": {"rank": 8, "scale_last": 0.0}, "placement": "after_mlp"},
    "parallel": {"attention": "llama", "sparse": {"rank": 8, "scale_last": 0.0}, "placement": "parallel"},
    "nothing": {"attention": "llama"},
    "gin beside": {"base_attention": True},
    "differential beside": {"base_attention": True, "differential": True, "edges": {"transform": "softplus"}},
    "cg beside": {"attention": "cg", "base_attention": True, "latent": LATENT},
    "cg_interpolate beside": {"attention": "cg_interpolate", "base_attention": True, "latent": LATENT},
    "scored beside": {"base_attention": True, "scores": "mlp"},
    "halfway": {"attention": "llama", "mlp": "halfway_gin", "mlp_message_scale": 0},
}


@pytest.mark.parametrize("name", EQUAL_AT_FIRST)
def test_a_plain_llama_with_graph_networks_of_scale_zero_gives_its_own_logits_bit_for_bit(name, tmp_path):
    base = plain_llama(tmp_path)
    model = LlamaForCausalLMWithGNN.from_pretrained(tmp_path, gnn_config=EQUAL_AT_FIRST[name]).eval()
    assert torch.equal(model(tokens()).logits, base(tokens()).logits)
    caches = DynamicCache(), DynamicCache()
    for part in (tokens()[:, :9], tokens()[:, 9:], tokens()[:, :1]):
        one, other = (
            each(part, **cache_argument(cache)).logits for each, cache in zip((model, base), caches, strict=True)
        )
        assert torch.equal(one, other)


def test_pna_on_the_mean_begins_as_the_plain_llama(tmp_path):
    base = plain_llama(tmp_path)
    options = {"attention": "pna", "residual_mean": True}
    model = LlamaForCausalLMWithGNN.from_pretrained(tmp_path, gnn_config=options).eval()
    torch.testing.assert_close(model(tokens()).logits, base(tokens()).logits, atol=2e-5, rtol=1e-4)


def test_gin_takes_what_fits_from_a_plain_llama_and_names_the_rest(tmp_path):
    base = plain_llama(tmp_path)
    model, report = LlamaForCausalLMWithGNN.from_pretrained(
        tmp_path, gnn_config={"sharpening": 1.3, "layers": [0, 2]}, output_loading_info=True
    )
    new = {name.split("self_attn.")[1] for name in report["missing_keys"]}
    parts = {"up_weight", "up_bias", "gain", "down_weight", "down_bias"}
    assert new == {"epsilon", "sharpening", *(f"update.{part}" for part in parts)}
    assert {name.split(".")[2] for name in report["missing_keys"]} == {"0", "2"}
    assert {name.split("self_attn.")[1] for name in report["unexpected_keys"]} == {"v_proj.weight", "o_proj.weight"}
    state, stock = model.state_dict(), base.state_dict()
    assert all(torch.equal(state[name], stock[name]) for name in state.keys() & stock.keys())
    attention = model.model.layers[0].self_attn
    assert attention.sharpening.item() == pytest.approx(1.3)  # built without memory, then set
    assert (attention.epsilon == 0).all()
    assert (attention.update.gain == 1).all()
    assert attention.update.up_weight.std().item() == pytest.approx(0.3, rel=0.2)


def test_graph_layers_stand_where_the_config_says():
    model = build("one layer")
    graphs = [isinstance(layer, LlamaDecoderLayerWithGNN) for layer in model.model.layers]
    assert graphs == [False, True, False]


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name.startswith("sparse")])
def test_a_message_runs_along_edges_where_attention_carries_nothing(variant):
    """With values 0 attention sends nothing, so an earlier token moves later logits through edges or not at all.

    The original's sparse network fails this: it keeps self-loops only.
    """
    model = build(variant, num_hidden_layers=1)
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight.zero_()
    moved = []
    for no_edges in (False, True):
        ids, other = tokens(1), tokens(1)
        other[0, 0] = (other[0, 0] + 1) % 61
        if no_edges:
            options = model.model.layers[0].options.adjacency
            options.combine, options.sharpness, options.cutoff = "mean", None, 1 - 1e-12
        with torch.no_grad():
            change = (model(ids).logits - model(other).logits)[0, 1:].abs().max()
        moved.append(bool(change > 0))
    assert moved == [True, False]


@pytest.mark.parametrize("variant", VARIANTS)
def test_bfloat16_is_finite_and_near_float32(variant):
    model = build(variant, torch.float32, initializer_range=0.05)
    wide = model(tokens()).logits
    narrow = model.to(torch.bfloat16)(tokens()).logits
    assert narrow.dtype == torch.bfloat16
    assert narrow.isfinite().all()
    assert (narrow.float() - wide).abs().mean() < 0.1 * wide.std()


@pytest.mark.parametrize("variant", quickly(DIFFERENT))
def test_autocast_is_finite_in_both_passes(variant):
    model = build(variant, torch.float32).train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(tokens(), labels=tokens()).loss
    loss.backward()
    assert loss.isfinite()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_hidden_states_and_attentions_of_all_layers_are_recorded():
    for variant in ("gin", "pna", "sparse", "one layer"):
        model = build(variant, torch.float32)
        model.set_attn_implementation("eager")
        output = model(tokens(), output_hidden_states=True, output_attentions=True)
        assert len(output.hidden_states) == 4
        assert [tuple(weights.shape) for weights in output.attentions] == [(2, 4, 13, 13)] * 3


def test_padding_between_tokens_is_refused_for_pna_with_row_and_position():
    mask = torch.ones(2, 13, dtype=torch.long)
    mask[1, 4:6] = 0
    with pytest.raises(ValueError, match="row 1 begins again at position 6"):
        build("pna")(tokens(), attention_mask=mask)
    assert build("gin")(tokens(), attention_mask=mask).logits.isfinite().all()


def test_packed_documents_and_masks_of_other_forms_are_refused_for_latents():
    model, positions = build("cg"), torch.tensor([[*range(5), *range(8)]])
    with pytest.raises(ValueError, match="`position_ids` must rise by 1"):
        model(tokens(1), position_ids=positions, use_cache=False)
    with pytest.raises(ValueError, match=r"must be \(batch, source\), got \(1, 1, 13, 13\)"):
        model(tokens(1), attention_mask=torch.ones(1, 1, 13, 13, dtype=torch.bool).tril())


def test_attention_implementations_without_readable_masks_are_refused():
    with pytest.raises((ValueError, ImportError), match=r"(?i)flex"):
        build("gin").set_attn_implementation("flex_attention")
    with pytest.raises((ValueError, ImportError), match=r"(?i)flash.?attention.?2"):
        build("gin").set_attn_implementation("flash_attention_2")


def test_a_cache_filled_by_a_stock_llama_is_refused():
    ids = tokens()
    with torch.no_grad():
        cache = cache_of(build("linear")(ids, use_cache=True))
    with pytest.raises(RuntimeError, match="holds 13 tokens .*have not seen.*fresh cache"):
        build("sparse")(ids[:, :1], **cache_argument(cache))
