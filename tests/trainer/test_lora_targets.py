"""LoRA on each class of ours where nothing is said of `target_modules`: which maps it learns on, saved and loaded."""

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from graft.configuration.configuration_gnn import LlamaGNNConfig
from graft.configuration.configuration_retro import RetroConfig
from graft.configuration.configuration_unlimiformer import UnlimiformerBartConfig, UnlimiformerLlamaConfig
from graft.modeling.graph.modeling_llama_gnn import LlamaForCausalLMWithGNN
from graft.modeling.retro.modeling_retro import RetroForCausalLM
from graft.modeling.unlimiformer.modeling_unlimiformer_bart import UnlimiformerBart
from graft.modeling.unlimiformer.modeling_unlimiformer_llama import UnlimiformerLlamaForCausalLM
from graft.trainer.arguments import AdapterArguments, ModelArguments
from graft.trainer.loading import with_adapter

HEADS = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA = {**HEADS, "intermediate_size": 24, "max_position_embeddings": 64}
SIDES = {f"{side}_{name}": 2 for side in ("encoder", "decoder") for name in ("layers", "attention_heads", "ffn_dim")}
RETRO = {"encoder_hidden_size": 12, "num_encoder_layers": 1, "cross_attention_layers": [1], "chunk_size": 4}
GRAPHS = {
    "gin": {"attention": "gin"},
    "pna": {"attention": "pna"},
    "sparse": {"attention": "llama", "sparse": {"rank": 4, "scale_first": 0.3}},
}
NOT_ADAPTED = {"lm_head", "input_projection"}


def build(kind):
    torch.manual_seed(0)
    if kind == "retro":
        return RetroForCausalLM(RetroConfig(**HEADS, **RETRO)).eval()
    if kind == "bart":
        return UnlimiformerBart(UnlimiformerBartConfig(vocab_size=50, d_model=16, **SIDES)).eval()
    if kind == "llama":
        return UnlimiformerLlamaForCausalLM(UnlimiformerLlamaConfig(**LLAMA)).eval()
    return LlamaForCausalLMWithGNN(LlamaGNNConfig(**LLAMA, gnn_config=GRAPHS[kind])).eval()


def inputs(kind):
    ids = torch.randint(3, 50, (2, 13), generator=torch.Generator().manual_seed(0))
    neighbours = torch.randint(3, 50, (2, 3, 2, 6), generator=torch.Generator().manual_seed(1))
    more = {"retro": {"retrieved": neighbours}, "bart": {"decoder_input_ids": ids[:, :5].clone()}}
    return {"input_ids": ids, **more.get(kind, {})}


@pytest.mark.parametrize("kind", ["retro", "bart", "llama", *GRAPHS])
def test_every_linear_map_but_those_of_the_vocabulary_learns_and_the_adapter_alone_restores_the_model(kind, tmp_path):
    model, given = build(kind), inputs(kind)
    linear = {name for name, part in model.named_modules() if isinstance(part, torch.nn.Linear)}
    arguments = ModelArguments(task="seq2seq" if kind == "bart" else "causal", name=str(tmp_path / "base"))
    adapted = with_adapter(model, AdapterArguments(r=2), arguments)
    wrapped = {name for name, part in adapted.get_base_model().named_modules() if hasattr(part, "lora_A")}
    assert wrapped == {name for name in linear if name.rpartition(".")[2] not in NOT_ADAPTED}
    trained = {name: weight for name, weight in adapted.named_parameters() if weight.requires_grad}
    with torch.no_grad():
        for weight in trained.values():
            weight.normal_(std=0.3)
    adapted.train()(**given, labels=given.get("decoder_input_ids", given["input_ids"])).loss.backward()
    assert [name for name, weight in trained.items() if weight.grad is None or not weight.grad.any()] == []
    adapted.save_pretrained(tmp_path)
    assert {name.replace(".default", "") for name in trained} == set(load_file(tmp_path / "adapter_model.safetensors"))
    with torch.no_grad():
        loaded = PeftModel.from_pretrained(build(kind), tmp_path).eval()
        assert torch.equal(loaded(**given).logits, adapted.eval()(**given).logits)
        assert not torch.allclose(build(kind)(**given).logits, adapted(**given).logits, atol=1e-2)
