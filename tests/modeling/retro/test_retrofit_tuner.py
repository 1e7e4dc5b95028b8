"""Retro-fit as a PEFT method: what PEFT promises of its methods holds, and merging is refused by name."""

import copy
import json

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

from graft.modeling.retro.retrofit import RetroFit, retrofit
from graft.modeling.retro.retrofit_config import RetroFitConfig
from graft.modeling.retro.retrofit_tuner import register_with_peft

register_with_peft()

FAMILIES = ["llama", "qwen3", "gpt2", "gemma2", "olmo2"]
OPTIONS = {
    "chunk_size": 4,
    "neighbour_length": 6,
    "cross_attention_layers": [0, 2],
    "task_type": "CAUSAL_LM",
}


def logits(model, ids, **inputs):
    with torch.no_grad():
        return model(input_ids=ids, **inputs).logits


def new_weights(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


@pytest.fixture
def fitted(decoders):
    """A PEFT model with random new weights; its base, ids and neighbours."""

    def fit(family="llama", **options):
        base = decoders.build(family, **options)
        model = get_peft_model(base, RetroFitConfig(**OPTIONS))
        decoders.shake(new_weights(model))
        ids = decoders.ids(2, 13)
        return model, base, ids, decoders.Retriever().retrieved(ids)

    return fit


@pytest.mark.parametrize("family", FAMILIES)
def test_it_gives_the_logits_of_retrofit(decoders, fitted, family):
    model, _, ids, retrieved = fitted(family)
    other, _ = decoders.fit(family)
    assert torch.equal(logits(model, ids, retrieved=retrieved), logits(other, ids, retrieved=retrieved))


@pytest.mark.parametrize("family", FAMILIES)
def test_only_new_weights_are_trained_and_no_name_of_the_base_changes(decoders, fitted, family):
    base = decoders.build(family)
    names = list(base.state_dict())
    model, found, ids, retrieved = fitted(family)
    assert list(found.state_dict()) == names
    model(input_ids=ids, labels=ids, retrieved=retrieved).loss.backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == {name for name, _ in model.named_parameters() if ".retrofit.adapters." in name}
    assert trained


@pytest.mark.parametrize("family", FAMILIES)
def test_disabled_or_without_neighbours_it_is_the_base_bit_for_bit(decoders, fitted, family):
    model, _, ids, retrieved = fitted(family)
    before = logits(decoders.build(family), ids)
    assert torch.equal(logits(model, ids), before)
    with model.disable_adapter():
        assert torch.equal(logits(model, ids, retrieved=retrieved), before)
    assert not torch.equal(logits(model, ids, retrieved=retrieved), before)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_adapter_alone_is_saved_and_loads_under_another_name(decoders, fitted, family, tmp_path):
    model, _, ids, retrieved = fitted(family)
    found = logits(model, ids, retrieved=retrieved)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert saved
    assert all(name.startswith("base_model.retrofit.adapters.") and "default" not in name for name in saved)
    config = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(config, RetroFitConfig)
    assert config.chunk_size == 4
    loaded = PeftModel.from_pretrained(decoders.build(family), tmp_path, adapter_name="another")
    assert torch.equal(logits(loaded, ids, retrieved=retrieved), found)
    assert not new_weights(loaded)
    trainable = PeftModel.from_pretrained(decoders.build(family), tmp_path, is_trainable=True)
    assert len(new_weights(trainable)) == len(saved)


def test_folders_of_peft_and_of_the_handle_are_the_same(decoders, fitted, tmp_path):
    model, _, ids, retrieved = fitted()
    found = logits(model, ids, retrieved=retrieved)
    model.save_pretrained(tmp_path / "peft")
    other = decoders.build("llama")
    handle = RetroFit.from_pretrained(other, tmp_path / "peft")
    assert torch.equal(logits(other, ids, retrieved=retrieved), found)
    handle.save_pretrained(tmp_path / "handle")
    loaded = PeftModel.from_pretrained(decoders.build("llama"), tmp_path / "handle")
    assert torch.equal(logits(loaded, ids, retrieved=retrieved), found)
    names = [load_file(tmp_path / kind / "adapter_model.safetensors").keys() for kind in ("peft", "handle")]
    assert names[0] == names[1]
    assert json.loads((tmp_path / "handle/adapter_config.json").read_text())["peft_type"] == "RETROFIT"


@pytest.mark.parametrize("merge", ["merge_and_unload", "merge_adapter"])
def test_merging_is_refused_by_name(fitted, merge):
    model, _, ids, retrieved = fitted()
    found = logits(model, ids, retrieved=retrieved)
    with pytest.raises(ValueError, match=r"RETROFIT cannot be merged into its base: .*`unload\(\)` gives the base"):
        getattr(model, merge)()
    assert torch.equal(logits(model, ids, retrieved=retrieved), found)


@pytest.mark.parametrize("family", FAMILIES)
def test_unloading_gives_the_base_back(decoders, fitted, family):
    model, base, ids, _ = fitted(family)
    unloaded = model.unload()
    assert unloaded is base
    assert torch.equal(logits(base, ids), logits(decoders.build(family), ids))
    assert not hasattr(base, "peft_config")
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in base.modules())


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_retrieves_as_the_handle_does(decoders, fitted, family):
    model, _, ids, _ = fitted(family, eos_token_id=None)
    retriever = decoders.Retriever()
    found = model.generate(**model.inputs(ids, retriever=retriever), max_new_tokens=10, do_sample=False)
    other, handle = decoders.fit(family, eos_token_id=None)
    expected = other.generate(**handle.inputs(ids, retriever=retriever), max_new_tokens=10, do_sample=False)
    assert torch.equal(found, expected)


def test_one_of_several_adapters_is_active_and_others_can_be_deleted(decoders, fitted):
    model, base, ids, retrieved = fitted()
    found = logits(model, ids, retrieved=retrieved)
    model.add_adapter("wide", RetroFitConfig(chunk_size=8, neighbour_length=6, cross_attention_layers=[1]))
    assert torch.equal(logits(model, ids, retrieved=retrieved), found)
    model.set_adapter("wide")
    assert {name.split(".")[3] for name, parameter in model.named_parameters() if parameter.requires_grad} == {"wide"}
    decoders.shake(new_weights(model), seed=5)
    wide = logits(model, ids, retrieved=retrieved[:, :1])
    assert not torch.equal(wide, logits(model, ids))
    with pytest.raises(ValueError, match="has 3 chunks, the sequence has 1 complete chunks of `chunk_size` 8"):
        logits(model, ids, retrieved=retrieved)
    model.set_adapter("default")
    assert torch.equal(logits(model, ids, retrieved=retrieved), found)
    model.delete_adapter("wide")
    assert torch.equal(logits(model, ids, retrieved=retrieved), found)
    assert sum(bool(module._forward_pre_hooks) for module in base.model.layers[1].modules()) == 0
    with pytest.raises(ValueError, match="must name one RETROFIT adapter"):
        model.base_model.set_adapter(["default", "default"])


def test_lora_sits_beside_it_and_each_saves_its_own(decoders, tmp_path):
    ids = decoders.ids(2, 13)
    retrieved = decoders.Retriever().retrieved(ids)
    lora = get_peft_model(
        decoders.build("llama"), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"), adapter_name="lora"
    )
    decoders.shake(new_weights(lora))
    alone = logits(lora, ids)
    both = get_peft_model(lora.get_base_model(), RetroFitConfig(**OPTIONS), adapter_name="retro")
    decoders.shake([parameter for name, parameter in both.named_parameters() if ".retro." in name])
    assert torch.equal(logits(both, ids), alone)
    found = logits(both, ids, retrieved=retrieved)
    assert not torch.equal(found, alone)
    both(input_ids=ids, labels=ids, retrieved=retrieved).loss.backward()
    trained = {name for name, parameter in both.named_parameters() if parameter.grad is not None}
    assert {("lora_" in name, ".retrofit." in name) for name in trained} == {(True, False), (False, True)}
    both.save_pretrained(tmp_path)
    saved = {name: load_file(tmp_path / name / "adapter_model.safetensors") for name in ("lora", "retro")}
    assert all("lora_" in name for name in saved["lora"])
    assert all(".retrofit." in name for name in saved["retro"])
    again = PeftModel.from_pretrained(decoders.build("llama"), tmp_path / "lora", adapter_name="lora")
    again = PeftModel.from_pretrained(again.get_base_model(), tmp_path / "retro", adapter_name="retro")
    assert torch.equal(logits(again, ids, retrieved=retrieved), found)
    both.unload()
    assert torch.equal(logits(lora, ids), alone)


def test_a_trainer_trains_and_saves_it(decoders, tmp_path):
    base = decoders.build("llama", torch.float32)
    model = get_peft_model(base, RetroFitConfig(**OPTIONS))
    ids = decoders.ids(8, 12)
    retrieved = decoders.Retriever().retrieved(ids)
    rows = [{"input_ids": row, "labels": row, "retrieved": some} for row, some in zip(ids, retrieved, strict=True)]
    before = [parameter.clone() for parameter in base.parameters()]
    options = {"per_device_train_batch_size": 4, "max_steps": 6, "report_to": "none", "disable_tqdm": True}
    arguments = TrainingArguments(
        output_dir=str(tmp_path), **options, use_cpu=True, learning_rate=1e-2, remove_unused_columns=False
    )
    trainer = Trainer(model, arguments, train_dataset=rows)
    result = trainer.train()
    assert result.training_loss < 5
    trainer.save_model(str(tmp_path / "last"))
    assert (tmp_path / "last/adapter_model.safetensors").is_file()
    assert all(torch.equal(old, new) for old, new in zip(before, base.parameters(), strict=True))
    assert all(
        layer.cross_attention.output.weight.any() for layer in model.retrofit.adapters["default"].layers.values()
    )


def test_a_bfloat16_base_gets_float32_weights_unless_told_otherwise(decoders):
    for autocast, dtype in ((True, torch.float32), (False, torch.bfloat16)):
        base = decoders.build("llama", torch.bfloat16)
        model = get_peft_model(base, RetroFitConfig(**OPTIONS), autocast_adapter_dtype=autocast)
        assert {parameter.dtype for parameter in new_weights(model)} == {dtype}
        ids = decoders.ids(2, 13)
        assert logits(model, ids, retrieved=decoders.Retriever().retrieved(ids)).isfinite().all()


def test_loading_into_empty_weights_gives_the_same(decoders, fitted, tmp_path):
    model, _, ids, retrieved = fitted()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(decoders.build("llama"), tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(logits(loaded, ids, retrieved=retrieved), logits(model, ids, retrieved=retrieved))


def test_a_copy_has_its_own_weights(decoders, fitted):
    model, _, ids, retrieved = fitted()
    found = logits(model, ids, retrieved=retrieved)
    other = copy.deepcopy(model)
    assert torch.equal(logits(other, ids, retrieved=retrieved), found)
    decoders.shake(new_weights(other), seed=9)
    assert not torch.equal(logits(other, ids, retrieved=retrieved), found)
    assert torch.equal(logits(model, ids, retrieved=retrieved), found)


def test_adapter_names_per_row_are_refused(fitted):
    model, _, ids, retrieved = fitted()
    with pytest.raises(ValueError, match="`adapter_names` per row is not supported by RETROFIT"):
        model(input_ids=ids, retrieved=retrieved, adapter_names=["default", "default"])


def test_a_model_is_not_retrofitted_twice(decoders, fitted):
    _, base, _, _ = fitted()
    with pytest.raises(RuntimeError, match="has retrieval already"):
        retrofit(base, RetroFitConfig(chunk_size=4))
    other, _ = decoders.fit("llama")
    with pytest.raises(RuntimeError, match="has retrieval already"):
        get_peft_model(other, RetroFitConfig(**OPTIONS))


def test_a_parallel_family_is_refused_as_by_retrofit(decoders):
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model("gptj", vocab_size=61, n_embd=32, n_layer=1, n_head=4, rotary_dim=4)
    with pytest.raises(ValueError, match="'gptj'.*in parallel.*Supported model types"):
        get_peft_model(AutoModelForCausalLM.from_config(config), RetroFitConfig(**OPTIONS))


def test_registering_again_changes_nothing(fitted):
    register_with_peft()
    model, _, _, _ = fitted()
    assert model.peft_config["default"].peft_type == "RETROFIT"
    assert model.get_nb_trainable_parameters()[0] == sum(parameter.numel() for parameter in new_weights(model))
