"""A LoRA inside a retro-fit: what it computes, what trains, that it is saved with the rest and leaves with it."""

import re

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from peft import LoraConfig, PeftModel, get_peft_model
from transformers.pytorch_utils import Conv1D

import graft.registration  # noqa: F401  (PEFT knows RetroFitConfig then)
from graft import UnlimiformerConfig, unlimiform
from graft.modeling.retro.retrofit import RetroFit, retrofit
from graft.modeling.retro.retrofit_config import RetroFitConfig

OPTIONS = {"chunk_size": 4, "neighbour_length": 6, "cross_attention_layers": [0, 2]}
LORA = OPTIONS | {"lora_rank": 2, "lora_alpha": 5}


def logits(model, ids, **inputs):
    with torch.no_grad():
        return model(ids, **inputs).logits


def fold(model, updates):
    """W + (alpha / r) B A written into the base's maps, by the names that stand in the updates' own."""
    layers = model.transformer.h if model.config.model_type == "gpt2" else model.model.layers
    with torch.no_grad():
        for name, update in updates.items():
            module = layers.get_submodule(name.replace("-", "."))
            change = 5 / 2 * update.up.weight @ update.down.weight
            module.weight += change.T if isinstance(module, Conv1D) else change


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "phi3"])
def test_logits_are_those_of_a_base_with_the_updates_in_its_weights(decoders, family):
    ids = decoders.ids(2, 13)
    retrieved = decoders.Retriever().retrieved(ids)
    model, handle = decoders.fit(family, RetroFitConfig(**LORA))
    found = logits(model, ids, retrieved=retrieved), logits(model, ids)
    other, plain = decoders.fit(family, RetroFitConfig(**OPTIONS))
    without = logits(other, ids, retrieved=retrieved), logits(other, ids)
    plain.adapter.load_state_dict(handle.adapter.state_dict(), strict=False)
    fold(other, handle.adapter.updates)
    expected = logits(other, ids, retrieved=retrieved), logits(other, ids)
    for one, same, base in zip(found, expected, without, strict=True):
        torch.testing.assert_close(one, same, rtol=1e-9, atol=1e-9)
        assert not torch.allclose(one, base)
    assert len(handle.adapter.updates) == 3 * {"llama": 7, "gpt2": 4, "gemma2": 7, "phi3": 4}[family]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_it_begins_at_the_base_and_removal_gives_the_base_back(decoders, family):
    model, ids = decoders.build(family), decoders.ids(2, 13)
    before = logits(model, ids)
    handle = retrofit(model, RetroFitConfig(**LORA))
    assert torch.equal(logits(model, ids), before)
    decoders.shake(handle.trainable_parameters())
    assert not torch.allclose(logits(model, ids), before)
    assert "LoRA of rank 2" in repr(handle)
    handle.remove()
    assert torch.equal(logits(model, ids), before)
    assert not any(module._forward_hooks for module in model.modules())


def test_every_update_gets_a_gradient_and_no_weight_of_the_base_does(decoders):
    model, handle = decoders.fit("llama", RetroFitConfig(**LORA, lora_targets=["q_proj", "down_proj"]))
    ids = decoders.ids(2, 13)
    model.train()(ids, labels=ids, retrieved=decoders.Retriever().retrieved(ids)).loss.backward()
    assert sorted(handle.adapter.updates) == sorted(
        f"{layer}-{name}" for layer in range(3) for name in ("self_attn-q_proj", "mlp-down_proj")
    )
    assert all(parameter.grad is not None for parameter in handle.trainable_parameters())
    assert all(float(p.grad.abs().max()) > 0 for p in handle.adapter.updates.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_cached_generation_behind_a_memory_is_what_one_pass_prefers(decoders):
    model, handle = decoders.fit("llama", RetroFitConfig(**LORA))
    ids, retriever = decoders.ids(2, 9), decoders.Retriever()
    with unlimiform(model, UnlimiformerConfig(window=16, keys_per_query=6)) as unlimited:
        memory = unlimited.remember(decoders.ids(2, 40, seed=1))
        inputs = handle.inputs(**memory.inputs(ids), retriever=retriever)
        found = model.generate(**inputs, max_new_tokens=7, do_sample=False, eos_token_id=None)
        again = handle.inputs(**memory.inputs(found[:, :-1]), retriever=retriever)
        best = logits(model, again.pop("input_ids"), **again).argmax(-1)
    assert torch.equal(best[:, 8:], found[:, 9:])


def test_one_folder_holds_both_for_the_handle_and_for_peft(decoders, tmp_path):
    model, handle = decoders.fit("llama", RetroFitConfig(**LORA, lora_targets=["v_proj"]))
    ids = decoders.ids(2, 13)
    expected = logits(model, ids)
    handle.save_pretrained(tmp_path / "one")
    handle.remove()
    base = logits(model, ids)
    adapted = PeftModel.from_pretrained(model, tmp_path / "one")
    torch.testing.assert_close(logits(adapted, ids), expected, rtol=1e-12, atol=1e-12)
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted, ids), base)
    adapted.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="cannot be merged"):
        adapted.merge_and_unload()
    assert torch.equal(logits(adapted.unload(), ids), base)
    RetroFit.from_pretrained(model, tmp_path / "other")
    torch.testing.assert_close(logits(model, ids), expected, rtol=1e-12, atol=1e-12)


def test_new_weights_stay_float32_on_a_bfloat16_base(decoders):
    model = decoders.build("llama", torch.bfloat16)
    handle = retrofit(model, RetroFitConfig(**LORA))
    assert {parameter.dtype for parameter in handle.trainable_parameters()} == {torch.float32}
    assert logits(model, decoders.ids(1, 9)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_rank": 0}, "`lora_rank` must be at least 1, got 0"),
        ({"lora_rank": 2, "lora_alpha": 0}, "`lora_alpha` must be above 0, got 0"),
        ({"lora_rank": 2, "lora_targets": []}, "`lora_targets` must name at least one"),
        ({"lora_alpha": 8}, "would do nothing: give `lora_rank`"),
        ({"lora_targets": ["q_proj"]}, "would do nothing: give `lora_rank`"),
        ({"lora_rank": 2, "lora_targets": ["qproj"]}, r"must be of down_proj, .*, got \['qproj'\]"),
    ],
)
def test_wrong_options_are_refused_and_leave_the_model_alone(decoders, options, message):
    model, ids = decoders.build("llama"), decoders.ids(1, 9)
    before = logits(model, ids)
    with pytest.raises((StrictDataclassError, ValueError)) as caught:
        retrofit(model, RetroFitConfig(**OPTIONS, **options))
    assert re.search(message, str(caught.value.__cause__ or caught.value))
    assert torch.equal(logits(model, ids), before)


def test_a_base_with_the_lora_of_peft_is_refused(decoders):
    model = decoders.build("llama")
    get_peft_model(model, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="`lora_rank` is for a base without LoRA"):
        retrofit(model, RetroFitConfig(**LORA))
    assert retrofit(model, RetroFitConfig(**OPTIONS)).is_attached


def test_the_lora_of_peft_may_come_afterwards_and_each_leaves_alone(decoders):
    model, handle = decoders.fit("llama", RetroFitConfig(**LORA))
    ids = decoders.ids(2, 13)
    ours = logits(model, ids)
    theirs = get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    both = logits(model, ids)
    assert not torch.allclose(both, ours)
    handle.remove()
    assert not torch.allclose(logits(model, ids), both)
    theirs.unload()
    assert torch.equal(logits(model, ids), logits(decoders.build("llama"), ids))
