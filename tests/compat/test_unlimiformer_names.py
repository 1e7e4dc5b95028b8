"""The original Unlimiformer's names: each argument becomes an option, does nothing for a reason, or is refused."""

import pytest
import torch
from transformers import BartConfig, BartForConditionalGeneration, LlamaConfig, LlamaForCausalLM

from graft.compat.unlimiformer import DROPPED, REFUSED, RENAMED, Unlimiformer, UnlimiformerArguments
from graft.configuration.configuration_unlimiformer import UnlimiformerConfig
from graft.modeling.unlimiformer.attach import unlimiform

SIDES = {f"{side}_{name}": 2 for side in ("encoder", "decoder") for name in ("layers", "attention_heads")}
BART = {"vocab_size": 40, "d_model": 16, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 32}
LLAMA = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
LLAMA |= {"num_attention_heads": 2, "max_position_embeddings": 64, "eos_token_id": None}
IDS = torch.randint(3, 40, (1, 80), generator=torch.Generator().manual_seed(0))


def build(family):
    torch.manual_seed(0)
    if family == "bart":
        return BartForConditionalGeneration(BartConfig(**BART, **SIDES, init_std=0.4)).eval()
    return LlamaForCausalLM(LlamaConfig(**LLAMA, initializer_range=0.4)).eval()


def test_each_renamed_argument_reaches_its_option():
    old = {"layer_begin": 1, "layer_end": 3, "unlimiformer_exclude": True, "unlimiformer_chunk_size": 64}
    old |= {"unlimiformer_chunk_overlap": 0.25, "unlimiformer_head_num": 2, "use_datastore": True}
    found = UnlimiformerArguments(**old)
    assert (found.first_layer, found.last_layer, found.exclude_window, found.window) == (1, 3, True, 64)
    assert (found.overlap, found.heads, found.store) == (0.25, [2], "hidden")
    assert UnlimiformerArguments(use_datastore=False).store == "keys_values"
    assert UnlimiformerArguments() == UnlimiformerConfig()
    regimes = [
        UnlimiformerArguments(unlimiformer_training=one, random_unlimiformer_training=other).training
        for one, other in ((False, False), (True, False), (False, True), (True, True))
    ]
    assert regimes == ["standard", "retrieval", "random", "alternating"]
    assert set(RENAMED.values()) <= set(UnlimiformerConfig().to_dict())


@pytest.mark.parametrize("name", DROPPED)
def test_an_argument_without_effect_is_taken_and_changes_nothing(name):
    assert UnlimiformerArguments(**{name: True}) == UnlimiformerConfig()


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_done_is_refused_and_its_absence_is_not(name):
    with pytest.raises(ValueError, match=f"`{name}`: "):
        UnlimiformerArguments(**{name: True})
    assert UnlimiformerArguments(**{name: False}) == UnlimiformerConfig()


def test_a_strange_argument_is_named():
    with pytest.raises(TypeError, match=r"no argument \['layer_start'\]"):
        UnlimiformerArguments(layer_start=3)


@pytest.mark.parametrize("family", ["bart", "llama"])
def test_a_converted_model_generates_what_unlimiform_does_and_is_given_back(family):
    model = build(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    options = {"window": 16, "first_layer": 1}
    options |= {"first_step": "window"} if family == "bart" else {"store": "keys_values"}
    with unlimiform(model, UnlimiformerConfig(**options)) as expected:
        tokens = expected.generate(IDS, max_new_tokens=6, do_sample=False) if family == "bart" else None
        if family == "llama":
            memory = expected.remember(IDS)
            tokens = model.generate(**memory.inputs(IDS[:, :3]), max_new_tokens=6, do_sample=False)
    unlimited = Unlimiformer.convert_model(
        model, layer_begin=1, unlimiformer_chunk_size=16, use_datastore=family == "llama", test_unlimiformer=True
    )
    if family == "bart":
        found = unlimited.generate(IDS, max_new_tokens=6, do_sample=False)
    else:
        found = model.generate(**unlimited.remember(IDS).inputs(IDS[:, :3]), max_new_tokens=6, do_sample=False)
    assert torch.equal(found, tokens)
    unlimited.remove()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
