"""graft-merge: a LoRA's update in its base's weights; a graph network in a graph-aware Llama; others are refused."""

import os
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BartConfig,
    BartForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import graft.registration  # noqa: F401  (PEFT knows our methods in whatever order tests run)
from graft.configuration.configuration_retro import RetroConfig
from graft.modeling.graph.modeling_llama_gnn import LlamaForCausalLMWithGNN
from graft.modeling.graph.sparse_gin_config import SparseGINConfig
from graft.modeling.retro.modeling_retro import RetroForCausalLM
from graft.modeling.retro.retrofit import retrofit
from graft.modeling.retro.retrofit_config import RetroFitConfig
from graft.scripts.merge import main

HEADS = {"num_attention_heads": 2, "num_hidden_layers": 2}
LLAMA = LlamaConfig(vocab_size=40, hidden_size=16, intermediate_size=24, max_position_embeddings=64, **HEADS)
SIDES = {f"{side}_{name}": 2 for side in ("encoder", "decoder") for name in ("layers", "attention_heads")}
BART = BartConfig(vocab_size=40, d_model=16, encoder_ffn_dim=24, decoder_ffn_dim=24, **SIDES)
RETRO = {"encoder_hidden_size": 12, "num_encoder_layers": 1, "cross_attention_layers": [1], "chunk_size": 4}
BASES = {
    "llama": lambda: LlamaForCausalLM(LLAMA),
    "bart": lambda: BartForConditionalGeneration(BART),
    "retro": lambda: RetroForCausalLM(RetroConfig(vocab_size=40, hidden_size=16, **HEADS, **RETRO)),
}
TARGETS = {"llama": ["q_proj", "down_proj"], "bart": ["q_proj", "fc1"], "retro": ["qkv", "up"]}
IDS = torch.randint(3, 40, (2, 9), generator=torch.Generator().manual_seed(0))


def logits_of(model):
    with torch.no_grad():
        return model.float().eval()(input_ids=IDS).logits


def adapted(base, tmp_path, dtype=torch.float32):
    """A base saved, and the folder of a LoRA on it with a visible update; what both together compute."""
    torch.manual_seed(0)
    model = BASES[base]().to(dtype)
    model.save_pretrained(tmp_path / "base")
    names = {name.rpartition(".")[2] for name, part in model.named_modules() if isinstance(part, torch.nn.Linear)}
    targets = sorted(set(TARGETS[base]) & names)
    assert targets, sorted(names)
    task = "SEQ_2_SEQ_LM" if base == "bart" else "CAUSAL_LM"
    peft_model = get_peft_model(
        model, LoraConfig(r=2, target_modules=targets, task_type=task, base_model_name_or_path=str(tmp_path / "base"))
    )
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    peft_model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    peft_model.save_pretrained(tmp_path / "adapter")
    return logits_of(peft_model)


def load(base, folder):
    auto = AutoModelForSeq2SeqLM if base == "bart" else AutoModelForCausalLM
    return auto.from_pretrained(folder)


@pytest.mark.parametrize("base", BASES)
def test_the_merged_folder_computes_what_base_and_adapter_did(base, tmp_path):
    expected = adapted(base, tmp_path)
    assert main([str(tmp_path / "adapter"), str(tmp_path / "merged")]) == 0
    merged = load(base, tmp_path / "merged")
    torch.testing.assert_close(logits_of(merged), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits_of(load(base, tmp_path / "base")), expected, atol=1e-2)
    assert not any("lora" in name for name in merged.state_dict())
    assert (tmp_path / "merged" / "model.safetensors").is_file()


def test_a_bfloat16_base_is_merged_in_float32_and_rounded_once(tmp_path):
    adapted("llama", tmp_path, torch.bfloat16)
    assert main([str(tmp_path / "adapter"), str(tmp_path / "merged")]) == 0
    assert main([str(tmp_path / "adapter"), str(tmp_path / "wide"), "--dtype", "float32"]) == 0
    merged, wide = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("merged", "wide"))
    assert merged.dtype == torch.bfloat16
    assert wide.dtype == torch.float32
    for name, weight in merged.state_dict().items():
        assert torch.equal(weight, wide.state_dict()[name].to(torch.bfloat16))


def test_an_adapter_that_changes_the_computation_is_refused_by_name(tmp_path, capsys):
    model = LlamaForCausalLM(LLAMA)
    model.save_pretrained(tmp_path / "base")
    with retrofit(model, RetroFitConfig(chunk_size=4, neighbour_length=6)) as handle:
        handle.save_pretrained(tmp_path / "adapter")
    assert main([str(tmp_path / "adapter"), str(tmp_path / "merged"), "--base", str(tmp_path / "base")]) == 2
    assert "is of RETROFIT, which changes what is computed" in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()


GRAPHS = {
    "all layers": {},
    "one layer, narrow": {"layers_to_transform": [1], "adjacency": {"combine": "mean", "threshold": 0.05}},
    "two steps": {"num_layers": 2, "activation": "gelu"},
    "one pass": {"shares_scores": True},
}


def graph_adapter(base, folder, **options):
    """The folder of a sparse-GIN adapter that acts on a base, whose folder lies beside; both as one model."""
    torch.manual_seed(0)
    base.save_pretrained(folder / "base")
    given = {"rank": 4, "scale_first": 0.4} | options
    model = get_peft_model(base, SparseGINConfig(task_type="CAUSAL_LM", **given)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "sparse_gin" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    model.save_pretrained(folder / "adapter")
    return model


@pytest.mark.parametrize("options", GRAPHS.values(), ids=GRAPHS)
def test_a_sparse_gin_adapter_of_a_llama_becomes_a_graph_llama_that_computes_the_same(options, tmp_path):
    stock = LlamaForCausalLM(LlamaConfig(**LLAMA.to_dict() | {"rms_norm_eps": 1e-3, "tie_word_embeddings": True}))
    plain = logits_of(stock)
    model = graph_adapter(stock, tmp_path, **options)
    expected, written = logits_of(model), model.generate(input_ids=IDS, max_new_tokens=5, do_sample=False)
    given = [str(tmp_path / "adapter"), str(tmp_path / "merged"), "--base", str(tmp_path / "base")]
    assert main(given) == 0
    merged = LlamaForCausalLMWithGNN.from_pretrained(tmp_path / "merged")
    assert merged.config.gnn_config.shares_scores == options.get("shares_scores", False)
    torch.testing.assert_close(logits_of(merged), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(plain, expected, atol=1e-2)
    assert torch.equal(merged.generate(IDS, max_new_tokens=5, do_sample=False), written)


def test_the_graph_llama_that_was_written_loads_by_its_code_where_graft_is_not(tmp_path):
    expected = logits_of(graph_adapter(LlamaForCausalLM(LLAMA), tmp_path))
    given = [str(tmp_path / "adapter"), str(tmp_path / "merged"), "--base", str(tmp_path / "base")]
    assert main(given) == 0
    program = (
        "import sys, torch\n"
        "sys.modules['graft'] = None\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()\n"
        "ids = torch.randint(3, 40, (2, 9), generator=torch.Generator().manual_seed(0))\n"
        "print(type(model).__name__, model(input_ids=ids).logits.square().sum().item())"
    )
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-c", program, str(tmp_path / "merged")]
    said = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout.split()
    assert said[0] == "LlamaForCausalLMWithGNN"
    assert float(said[1]) == pytest.approx(expected.square().sum().item(), rel=1e-4)


OTHERS = {
    "GPT2LMHeadModel": (lambda: GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2)), {}),
    "'self_only'": (lambda: LlamaForCausalLM(LLAMA), {"edge_mode": "self_only"}),
}


@pytest.mark.parametrize("named", OTHERS)
def test_another_sparse_gin_adapter_is_refused_by_name_with_how_to_load_it(named, tmp_path, capsys):
    make_base, options = OTHERS[named]
    graph_adapter(make_base(), tmp_path, **options)
    given = [str(tmp_path / "adapter"), str(tmp_path / "merged"), "--base", str(tmp_path / "base")]
    assert main(given) == 2
    error = capsys.readouterr().err.rpartition("graft-merge: ")[2]
    assert "is of SPARSE_GIN, which changes what is computed" in error
    assert f"after `import graft.registration` `PeftModel.from_pretrained(base, '{tmp_path / 'adapter'}')`" in error
    assert named in error
    assert error.count("\n") == 1
    assert not (tmp_path / "merged").exists()


def test_an_adapter_that_is_not_merged_loads_as_the_refusal_says(tmp_path):
    make_base, options = OTHERS["GPT2LMHeadModel"]
    expected = logits_of(graph_adapter(make_base(), tmp_path, **options))
    program = (
        "import sys, torch, graft.registration\n"
        "from peft import PeftModel\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(sys.argv[1]), sys.argv[2]).eval()\n"
        "ids = torch.randint(3, 40, (2, 9), generator=torch.Generator().manual_seed(0))\n"
        "print(model(input_ids=ids).logits.square().sum().item())"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "base"), str(tmp_path / "adapter")]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert float(said) == pytest.approx(expected.square().sum().item(), rel=1e-4)


def test_mistakes_are_one_line_and_leave_nothing(tmp_path, capsys):
    adapted("llama", tmp_path)
    given = [str(tmp_path / "adapter"), str(tmp_path / "merged")]
    assert main([str(tmp_path / "nowhere"), given[1]]) == 2
    assert "`adapter`" in capsys.readouterr().err
    assert main([*given, "--base", str(tmp_path / "nowhere")]) == 2
    assert "`base`" in capsys.readouterr().err
    config = AutoConfig.from_pretrained(tmp_path / "base")
    config.quantization_config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    config.save_pretrained(tmp_path / "base")
    assert main(given) == 2
    assert "is quantised" in capsys.readouterr().err
    BASES["bart"]().save_pretrained(tmp_path / "other")
    assert main([*given, "--base", str(tmp_path / "other")]) == 2
    assert "does not fit" in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()
    (tmp_path / "merged").mkdir()
    assert main(given) == 2
    assert "exists; choose a new folder" in capsys.readouterr().err
