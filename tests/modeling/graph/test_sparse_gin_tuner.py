"""Sparse-GIN as a PEFT method: a graph beside the attention of any decoder, causal, cached, saved, taken away."""

import copy
import threading

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTuner
from safetensors.torch import load_file
from tiny_decoders import ADAPTED, PARALLEL, tiny_decoder
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, StaticCache

from graft.configuration.configuration_gnn import GNNConfig
from graft.modeling.attachment import serve
from graft.modeling.graph.attention_rows import ScoredPairs
from graft.modeling.graph.sparse_gin_config import SparseGINConfig
from graft.modeling.graph.sparse_gin_model import register_with_peft
from graft.modeling.graph.sparse_graph_layers import SparseGraphUpdate
from graft.modeling.transformers_compat import cache_argument, cache_of

register_with_peft()

REFUSED = (ValueError, TypeError, StrictDataclassError)
FEW = ["llama", "mistral", "gemma2", "olmo2", "gpt2", "gpt_neox"]
OPTIONS = {"rank": 6, "task_type": "CAUSAL_LM", "dropout": 0.0, "scale_first": 0.5}


def layer_norm_of(decoder):
    names = ("norm", "final_layernorm", "final_layer_norm")
    return next(getattr(decoder, name) for name in names if hasattr(decoder, name))


def new_weights(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def shake(parameters, seed=1):
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            noise = 0.3 * torch.randn(parameter.shape, generator=rng, dtype=torch.float64)
            parameter.copy_(noise + (0.5 if parameter.shape == (1,) else 0.0))


def fit(family="llama", base=None, adapter_name="default", dtype=torch.float64, **options):
    base = tiny_decoder(family, dtype) if base is None else base
    model = get_peft_model(base, SparseGINConfig(**{**OPTIONS, **options}), adapter_name=adapter_name)
    shake([parameter for name, parameter in model.named_parameters() if f".adapters.{adapter_name}." in name])
    return model.eval()


def ids(batch=2, length=13, seed=0):
    return torch.randint(3, 61, (batch, length), generator=torch.Generator().manual_seed(seed))


def logits(model, tokens, **inputs):
    with torch.no_grad():
        return model(input_ids=tokens, **inputs).logits


def test_one_layer_of_a_llama_equals_its_equation_written_out():
    """t + lambda norm(GIN(t, A)) with t = h + a, recomputed from the base's own modules."""
    model = fit(layers_to_transform=[1], trains_adjacency=True)
    base, tokens = model.get_base_model(), ids()
    update = model.sparse_gin.adapters["default"].layers["1"]
    seen = {}
    layer = base.model.layers[1]
    layer.register_forward_pre_hook(lambda m, a, k: seen.update(h=a[0], **k), with_kwargs=True)
    with model.disable_adapter():
        logits(model, tokens)
        attention, normed = layer.self_attn, layer.input_layernorm(seen["h"])
        table = seen["position_embeddings"]
        attended = attention(normed, position_embeddings=table, attention_mask=None)[0]
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, repeat_kv

    query, key = (proj(normed).unflatten(-1, (-1, 8)).transpose(1, 2) for proj in (attention.q_proj, attention.k_proj))
    query, key = apply_rotary_pos_emb(query, key, *table)
    edges = update.edges(ScoredPairs(query, repeat_kv(key, 2), 8**-0.5, None))
    after = seen["h"] + attended
    after = after + update(after, edges)
    hidden = after + layer.mlp(layer.post_attention_layernorm(after))
    hidden = base.model.layers[2](hidden, position_embeddings=table, attention_mask=None)
    expected = base.lm_head(base.model.norm(hidden))
    torch.testing.assert_close(logits(model, tokens), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("family", ADAPTED)
def test_later_tokens_change_no_earlier_logit_and_the_adapter_acts(family):
    model, tokens = fit(family), ids()
    other = tokens.clone()
    other[:, 8:] = ids(seed=5)[:, 8:]
    one, two = logits(model, tokens), logits(model, other)
    assert torch.equal(one[:, :8], two[:, :8])
    with model.disable_adapter():
        assert not torch.allclose(logits(model, tokens), one)


@pytest.mark.parametrize("family", ["gpt_neox, one by one", *PARALLEL])
def test_beside_a_parallel_mlp_the_update_is_added_to_what_both_give(family):
    """In one layer: the base's output and lambda norm(GIN(h + a, A)), which an MLP that follows would read."""
    options = {"num_hidden_layers": 1, **({"use_parallel_residual": False} if "," in family else {})}
    base, tokens, seen = tiny_decoder(family.split(",")[0], **options), ids(), {}
    decoder = getattr(base, base.base_model_prefix)
    layer, norm = decoder.layers[0], layer_norm_of(decoder)
    attention = getattr(layer, "attention", None) or layer.self_attn
    layer.register_forward_hook(lambda module, args, output: seen.update(h=args[0], out=output))
    inner = attention.register_forward_hook(lambda module, args, output: seen.update(a=output[0]))
    logits(base, tokens)
    inner.remove()
    plain, residual = seen["out"], seen["h"] + seen["a"]
    model = fit(base=base)
    adapter = model.base_model.sparse_gin.adapters["default"]
    is_parallel = "," not in family
    assert ("placement='parallel'" in repr(adapter)) == is_parallel
    given = []
    adapter.layers["0"].register_forward_hook(lambda module, args, output: given.append((args[0], output)))
    found = logits(model, tokens)
    torch.testing.assert_close(given[0][0], residual, atol=1e-10, rtol=1e-10)
    assert torch.allclose(seen["out"], plain + given[0][1], atol=1e-10) == is_parallel
    expected = base.get_output_embeddings()(norm(seen["out"])) * getattr(base, "logit_scale", 1.0)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("family", ADAPTED)
def test_only_new_weights_are_trained_and_no_name_of_the_base_changes(family):
    names = list(tiny_decoder(family).state_dict())
    model, tokens = fit(family), ids()
    assert list(model.get_base_model().state_dict()) == names
    model.train()(input_ids=tokens, labels=tokens).loss.backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == {name for name, _ in model.named_parameters() if ".sparse_gin.adapters." in name}
    assert all(parameter.grad.any() for name, parameter in model.named_parameters() if name in trained)


@pytest.mark.parametrize("family", ADAPTED)
def test_disabled_or_unloaded_it_is_the_base_bit_for_bit(family):
    expected, tokens = logits(tiny_decoder(family), ids()), ids()
    model = fit(family)
    with model.disable_adapter():
        assert torch.equal(logits(model, tokens), expected)
    base = model.get_base_model()
    config = base.config.to_dict()
    unloaded = model.unload()
    assert unloaded is base
    assert torch.equal(logits(base, tokens), expected)
    assert base.config.to_dict() == config
    assert not hasattr(base, "peft_config")
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in base.modules())
    assert not any(hasattr(module, "graft_attention_chain") for module in base.modules())


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FEW)
def test_padding_on_either_side_and_its_content_change_no_real_logit(family, implementation):
    if family == "gemma2" and implementation == "sdpa":
        pytest.skip("Gemma 2 has no sdpa: its scores are capped")
    model = fit(family, dtype=torch.float32)  # in float64 the stock eager attention makes padding NaN
    model.get_base_model().set_attn_implementation(implementation)
    tokens = ids(3)
    for side in ("left", "right"):
        mask = torch.ones_like(tokens)
        for row, pads in enumerate((0, 4, 7)):
            mask[row, slice(0, pads) if side == "left" else slice(13 - pads, 13)] = 0
        inputs = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
        one, two = (logits(model, torch.where(mask == 1, tokens, pad), **inputs) for pad in (1, 60))
        assert one.isfinite().all()
        for row in range(3):
            real = mask[row] == 1
            assert torch.equal(one[row, real], two[row, real])
            alone = logits(model, tokens[row : row + 1, real])[0]
            torch.testing.assert_close(one[row, real], alone, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ADAPTED)
def test_in_pieces_with_a_cache_logits_are_those_of_the_whole(family):
    """Also where a sliding window of 8 has dropped keys."""
    model, tokens = fit(family, num_layers=2), ids(length=21)
    whole = logits(model, tokens, use_cache=False)
    for pieces in ([9, *[1] * 12], [6, 3, 12]):
        cache, at, found = DynamicCache(config=model.config), 0, []
        for piece in pieces:
            found.append(logits(model, tokens[:, at : at + piece], **cache_argument(cache)))
            at += piece
        torch.testing.assert_close(torch.cat(found, 1), whole, atol=1e-5, rtol=1e-4)


WAYS = {
    "greedy": {"do_sample": False},
    "beams": {"num_beams": 3, "do_sample": False},
    "prompt lookup": {"prompt_lookup_num_tokens": 2, "do_sample": False},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", FEW)
def test_generation_with_a_cache_gives_the_tokens_without_one(family, way):
    if way == "prompt lookup" and family in ("mistral", "gemma2"):
        pytest.skip("a cache that slides is not cropped behind its window")
    model, tokens = fit(family), ids(1 if way == "prompt lookup" else 2)
    mask = torch.ones_like(tokens)
    if way != "prompt lookup":
        mask[0, :4] = 0
    found = []
    for use_cache in (True, way == "prompt lookup"):
        options = WAYS["greedy" if found and way == "prompt lookup" else way]
        found.append(
            model.generate(input_ids=tokens, attention_mask=mask, max_new_tokens=8, use_cache=use_cache, **options)
        )
    assert torch.equal(*found)


def test_a_cropped_cache_goes_on_as_if_the_tokens_had_not_been():
    model, tokens = fit(), ids()
    with torch.no_grad():
        cache = cache_of(model(input_ids=tokens, use_cache=True))
    cache.crop(-5)
    found = logits(model, tokens[:, 8:].flip(1), **cache_argument(cache))
    whole = logits(model, torch.cat([tokens[:, :8], tokens[:, 8:].flip(1)], 1))
    torch.testing.assert_close(found, whole[:, 8:], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("edge_mode", "moves"), [("causal", True), ("self_only", False)])
@pytest.mark.parametrize("storage", ["dense", "sparse"])
def test_a_message_runs_along_edges_where_attention_carries_nothing(edge_mode, moves, storage):
    """With values 0, an earlier token moves later logits through edges or not at all.

    Queries are 0 too: the weight of a self-loop depends on the other keys of its row otherwise.
    """
    base = tiny_decoder(num_hidden_layers=1)
    for part in ("v_proj", "q_proj"):
        torch.nn.init.zeros_(getattr(base.model.layers[0].self_attn, part).weight)
    model = fit(base=base, edge_mode=edge_mode, storage=storage, adjacency={"combine": "sum"})
    tokens, other = ids(1), ids(1)
    other[0, 0] = 3 + (other[0, 0] - 2) % 58
    change = (logits(model, tokens) - logits(model, other))[0, 1:].abs().max()
    assert bool(change > 0) is moves


def test_self_loops_are_those_of_the_causal_graph():
    pairs = ScoredPairs(*torch.randn(2, 1, 2, 6, 4, dtype=torch.float64), 0.5, None)
    graphs = []
    for edge_mode in ("causal", "self_only"):
        model = fit(edge_mode=edge_mode)
        graphs.append(model.sparse_gin.adapters["default"].layers["0"].edges(pairs).whole().weight)
    torch.testing.assert_close(graphs[1], torch.diag_embed(graphs[0].diagonal(dim1=-2, dim2=-1)))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_storages_and_blocks_give_the_same(family):
    tokens = ids()
    found = [
        logits(fit(family, storage=storage, block_bytes=size), tokens)
        for storage, size in (("dense", 2**26), ("sparse", 2**26), ("sparse", 800), ("auto", 800))
    ]
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("trains_adjacency", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(trains_adjacency, reentrant):
    model, tokens = fit(trains_adjacency=trains_adjacency).train(), ids()
    model.enable_input_require_grads()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.get_base_model().gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in new_weights(model)])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-10)


def test_gradients_with_trained_edges_are_those_of_finite_differences_and_others_are_near():
    model, tokens = fit(trains_adjacency=True, adjacency={"cutoff": None}, activation="silu"), ids()
    weight = model.sparse_gin.adapters["default"].layers["0"].network.map_out.weight

    def loss():
        return model(input_ids=tokens, labels=tokens).loss

    (exact,) = torch.autograd.grad(loss(), weight)
    step, direction = 1e-3, torch.randn_like(weight)  # norms are in float32
    with torch.no_grad():
        weight += step * direction
        above = loss()
        weight -= 2 * step * direction
        below = loss()
        weight += step * direction
    slope = ((above - below) / (2 * step)).to(exact.dtype)
    torch.testing.assert_close(slope, (exact * direction).sum(), atol=1e-4, rtol=1e-2)
    model.sparse_gin.adapters["default"].trains_adjacency = False
    (detached,) = torch.autograd.grad(loss(), weight)
    assert not torch.allclose(detached, exact)
    assert torch.cosine_similarity(detached.flatten(), exact.flatten(), 0) > 0.5


# Attention answered of the weights that the graph is made from


@pytest.fixture
def shared(monkeypatch):
    """How many passes of attention were answered together with their graph."""
    made, count = SparseGraphUpdate.attend_with_edges, []

    def counting(*args, **kwargs):
        count.append(1)
        return made(*args, **kwargs)

    monkeypatch.setattr(SparseGraphUpdate, "attend_with_edges", counting)
    return count


@pytest.mark.parametrize("trains_adjacency", [True, False])
@pytest.mark.parametrize("family", [family for family in ADAPTED if family != "gemma2"])  # which has no sdpa
def test_sharing_scores_changes_neither_logits_nor_gradients(family, trains_adjacency, shared):
    tokens, found = ids(length=21), []
    mask = torch.ones_like(tokens)
    mask[0, :4] = 0
    for shares in (False, True):
        model = fit(family, shares_scores=shares, trains_adjacency=trains_adjacency, block_bytes=2000)
        for parameter in model.parameters():
            parameter.requires_grad_()
        loss = model(input_ids=tokens, attention_mask=mask, labels=tokens.masked_fill(mask == 0, -100)).loss
        loss.backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        found.append((logits(model, tokens), gradients))
    assert len(shared) == 2 * model.config.num_hidden_layers
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-4)  # norms are in float32


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2"])
def test_shared_scores_generate_with_a_cache_what_they_do_without(family, shared):
    model, tokens = fit(family, shares_scores=True), ids()
    answers = [
        model.generate(input_ids=tokens, max_new_tokens=9, do_sample=False, use_cache=use_cache)
        for use_cache in (True, False)
    ]
    assert torch.equal(*answers)
    assert shared


def test_scores_are_shared_only_where_nobody_else_answers_for_attention(shared):
    model, tokens = fit(shares_scores=True), ids()
    expected = logits(model, tokens)
    assert shared.pop()
    shared.clear()
    layers = model.get_base_model().model.layers
    asked = []

    def step(proceed, *args, **kwargs):
        asked.append(1)
        return proceed(*args, **kwargs)

    undo = [serve(layer.self_attn, step) for layer in layers]
    torch.testing.assert_close(logits(model, tokens), expected, atol=1e-6, rtol=1e-5)
    assert (len(asked), shared) == (len(layers), [])
    for take_out in undo:
        take_out()
    assert torch.equal(logits(model, tokens), expected)
    shared.clear()
    model.get_base_model().set_attn_implementation("eager")
    weights = model(input_ids=tokens, output_attentions=True).attentions
    assert shared == []
    assert all(weight.shape == (2, 4, 13, 13) for weight in weights)


def test_a_base_at_lambda_0_is_the_base_up_to_rounding_with_shared_scores():
    model = fit(shares_scores=True)
    with torch.no_grad():
        for update in model.sparse_gin.adapters["default"].layers.values():
            update.scale.zero_()
    torch.testing.assert_close(logits(model, ids()), logits(tiny_decoder(), ids()), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("family", FEW)
def test_the_adapter_alone_is_saved_and_loads_under_another_name(family, tmp_path):
    model, tokens = fit(family, adjacency={"combine": "mean", "cutoff": 0.5}), ids()
    found = logits(model, tokens)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert saved
    assert all(name.startswith("base_model.sparse_gin.adapters.layers.") for name in saved)
    config = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(config, SparseGINConfig)
    assert (config.rank, config.adjacency.combine, config.adjacency.cutoff) == (6, "mean", 0.5)
    loaded = PeftModel.from_pretrained(tiny_decoder(family), tmp_path, adapter_name="another")
    assert torch.equal(logits(loaded.eval(), tokens), found)
    assert not new_weights(loaded)


@pytest.mark.parametrize("merge", ["merge_and_unload", "merge_adapter"])
def test_merging_is_refused_by_name(merge):
    with pytest.raises(ValueError, match="SPARSE_GIN cannot be merged into its base: .* depends on the input's graph"):
        getattr(fit(), merge)()


def test_one_of_several_adapters_is_active_and_others_can_be_deleted():
    model, tokens = fit(), ids()
    found = logits(model, tokens)
    model.add_adapter("wide", SparseGINConfig(rank=9, layers_to_transform=[2], scale_first=0.4))
    model.eval()
    assert torch.equal(logits(model, tokens), found)
    model.set_adapter("wide")
    wide = logits(model, tokens)
    assert not torch.equal(wide, found)
    with torch.no_grad():
        cache = cache_of(model(input_ids=tokens, use_cache=True))
    model.set_adapter("default")
    assert torch.equal(logits(model, tokens), found)
    with pytest.raises(RuntimeError, match="The cache holds 13 tokens .*fresh cache"):
        model(input_ids=tokens[:, :1], **cache_argument(cache))
    with pytest.raises(ValueError, match="must name one SPARSE_GIN adapter, one is active at a time"):
        model.base_model.set_adapter(["default", "wide"])
    model.delete_adapter("wide")
    assert torch.equal(logits(model, tokens), found)


def test_a_cache_of_which_an_adapter_missed_tokens_is_refused():
    model, tokens = fit(), ids()
    with torch.no_grad():
        cache = cache_of(model(input_ids=tokens, use_cache=True))
    with model.disable_adapter():
        logits(model, tokens[:, :2], **cache_argument(cache))
    with pytest.raises(RuntimeError, match="holds 16 tokens and adapter 'default' has seen 14 of them.*fresh cache"):
        model(input_ids=tokens[:, :1], **cache_argument(cache))


def test_a_cache_of_a_like_named_adapter_of_another_width_is_refused():
    tokens = ids()
    with torch.no_grad():
        cache = cache_of(fit()(input_ids=tokens, use_cache=True))
    with pytest.raises(RuntimeError, match="holds nodes of width 6, this graph network's have 9.*fresh cache"):
        fit(rank=9)(input_ids=tokens[:, :1], **cache_argument(cache))


def test_attention_whose_masks_cannot_be_read_is_refused_before_it_runs():
    model = fit(dtype=torch.float32, layers_to_transform=[2])
    base, ran = model.get_base_model(), []
    base.model.embed_tokens.register_forward_hook(lambda *args: ran.append(True))
    with pytest.raises(ImportError, match="(?i)flash"):
        base.set_attn_implementation("flash_attention_2")
    base.set_attn_implementation("flex_attention")
    with pytest.raises(ValueError, match="`attn_implementation` must be one of 'eager', 'sdpa'.*got 'flex_attention'"):
        model(input_ids=ids())
    assert not ran
    base.set_attn_implementation("sdpa")
    assert logits(model, ids()).isfinite().all()


def test_a_cache_filled_without_the_adapter_is_refused():
    model, tokens = fit(), ids()
    with model.disable_adapter(), torch.no_grad():
        cache = cache_of(model(input_ids=tokens, use_cache=True))
    with pytest.raises(RuntimeError, match="13 tokens"):
        model(input_ids=tokens[:, :1], **cache_argument(cache))
    with pytest.raises(ValueError, match="needs a dynamic cache"):
        model(input_ids=tokens, **cache_argument(StaticCache(model.config, max_cache_len=24)))


@pytest.mark.parametrize("first", ["lora", "graph"])
def test_lora_sits_beside_it_and_each_saves_its_own(first, tmp_path):
    tokens, base = ids(), tiny_decoder()
    lora_config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    if first == "lora":
        get_peft_model(base, lora_config, adapter_name="lora")
        both = fit(base=base, adapter_name="graph")
        shake([parameter for name, parameter in both.named_parameters() if "lora_" in name], 3)
    else:
        graph = fit(base=base, adapter_name="graph")
        both = get_peft_model(graph.get_base_model(), lora_config, adapter_name="lora")
        shake([parameter for name, parameter in both.named_parameters() if "lora_" in name], 3)
        both = graph
    found = logits(both, tokens)
    with pytest.raises(ValueError, match="`adapter_name` 'lora' is used by another adapter"):
        get_peft_model(base, SparseGINConfig(**OPTIONS), adapter_name="lora")
    both.save_pretrained(tmp_path, selected_adapters=["graph"])
    saved = load_file(tmp_path / "graph" / "adapter_model.safetensors")
    assert all(".sparse_gin." in name for name in saved)
    if first == "lora":
        both.save_pretrained(tmp_path, selected_adapters=["lora"])
        assert all("lora_" in name for name in load_file(tmp_path / "lora" / "adapter_model.safetensors"))
        again = PeftModel.from_pretrained(tiny_decoder(), tmp_path / "lora", adapter_name="lora")
        again = PeftModel.from_pretrained(again.get_base_model(), tmp_path / "graph", adapter_name="graph")
        assert torch.equal(logits(again.eval(), tokens), found)
        both.train()(input_ids=tokens, labels=tokens).loss.backward()
        trained = {name for name, parameter in both.named_parameters() if parameter.grad is not None}
        assert {("lora_" in name, ".sparse_gin." in name) for name in trained} == {(True, False), (False, True)}
        both.unload()
        assert not torch.equal(logits(base, tokens), logits(tiny_decoder(), tokens))


def test_two_threads_share_a_model():
    model, given = fit(), [ids(seed=1), ids(length=17, seed=2)]
    expected = [logits(model, each) for each in given]
    wrong = []

    def work(index):
        wrong.extend(index for _ in range(15) if not torch.equal(logits(model, given[index]), expected[index]))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_copy_has_its_own_weights():
    model, tokens = fit(), ids()
    found = logits(model, tokens)
    other = copy.deepcopy(model)
    assert torch.equal(logits(other, tokens), found)
    shake(new_weights(other), seed=9)
    assert not torch.equal(logits(other, tokens), found)
    assert torch.equal(logits(model, tokens), found)


def test_a_bfloat16_base_gets_float32_weights():
    model = get_peft_model(tiny_decoder(dtype=torch.bfloat16), SparseGINConfig(**OPTIONS)).eval()
    assert {parameter.dtype for parameter in new_weights(model)} == {torch.float32}
    found = logits(model, ids())
    assert found.dtype == torch.bfloat16
    assert found.isfinite().all()


def test_a_few_steps_of_training_lower_the_loss():
    model, tokens = get_peft_model(tiny_decoder(dtype=torch.float32), SparseGINConfig(**OPTIONS)).train(), ids(4)
    optimiser, losses = torch.optim.AdamW(new_weights(model), lr=1e-2), []
    for _ in range(12):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3


def test_the_readme_shape_has_as_many_parameters_as_the_paper_says():
    """28.2 M in Llama-3.2-3B: 28 layers, 3,072 wide, rank 155."""
    config = SparseGINConfig()
    with torch.device("meta"):
        update = SparseGraphUpdate(config.graph_options(), 3072, 24, 0.0, 1e-6)
    assert 28 * sum(parameter.numel() for parameter in update.parameters()) == pytest.approx(28.2e6, rel=2e-3)
    assert isinstance(config.graph_options(), GNNConfig)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "`rank` must be at least 1, got 0"),
        ({"layers_to_transform": []}, r"`layers_to_transform` must name different layers .* got \[\]"),
        ({"layers_to_transform": [-1]}, r"`layers_to_transform` must name different layers from 0 on, got \[-1\]"),
        ({"layers_to_transform": [1, 1]}, r"`layers_to_transform` must name different layers .* got \[1, 1\]"),
        ({"edge_mode": "both"}, "(?s)'edge_mode'.*both"),
        ({"rnk": 3}, "'rnk'"),
        ({"adjacency": {"threshold": -0.1}}, r"`adjacency.threshold` must lie in \[0, 1\), got -0.1"),
        ({"adjacency": {"cut": 1}}, r"`adjacency\.cut` is unknown;.* `adjacency` has combine, cutoff"),
        ({"storage": "sparse", "adjacency": {"cutoff": None}}, "`storage='sparse'` .* needs a bound .*use 'dense'"),
        ({"edge_mode": "self_only", "adjacency": {"self_loops": False}}, "keeps self-loops alone"),
        ({"edge_mode": "external_only", "shares_scores": True}, "`shares_scores` shares attention's scores"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(REFUSED, match=message):
        SparseGINConfig(**options)


def test_a_peft_that_cannot_be_extended_is_refused_by_its_version(monkeypatch):
    monkeypatch.delattr(BaseTuner, "_get_adapter_state_dict")
    with pytest.raises(ImportError, match=r"SPARSE_GIN as a PEFT method needs peft 0\.21 or newer, this is \d"):
        register_with_peft()


def test_layers_and_families_that_are_not_there_are_refused():
    with pytest.raises(ValueError, match=r"`layers_to_transform` must lie in \[0, 3\) for this model, got \[40\]"):
        get_peft_model(tiny_decoder(), SparseGINConfig(**{**OPTIONS, "layers_to_transform": [40]}))
    for family, heads in (("mamba", {}), ("falcon", {"num_attention_heads": 2}), ("bloom", {"n_head": 2})):
        config = AutoConfig.for_model(family, vocab_size=61, hidden_size=16, num_hidden_layers=1, **heads)
        with pytest.raises(TypeError, match=f"'{family}'.*Supported model types: cohere, .*gpt_neox, .*llama"):
            get_peft_model(AutoModelForCausalLM.from_config(config), SparseGINConfig(**OPTIONS))
    with pytest.raises(ValueError, match="`adapter_names` per row is not supported by SPARSE_GIN"):
        fit()(input_ids=ids(), adapter_names=["default", "default"])
