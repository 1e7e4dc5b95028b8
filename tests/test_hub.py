"""Pushed by the real client to a server of our own, loaded by id where graft cannot be imported: the same model."""

import json

import pytest
from stranger import program_without

MODELS = """
import torch
from graft.configuration.configuration_gnn import LlamaGNNConfig
from graft.configuration.configuration_retro import RetroConfig
from graft.configuration.configuration_unlimiformer import UnlimiformerBartConfig, UnlimiformerLlamaConfig
from graft.modeling.graph.modeling_llama_gnn import LlamaForCausalLMWithGNN
from graft.modeling.retro.modeling_retro import RetroForCausalLM
from graft.modeling.unlimiformer.modeling_unlimiformer_bart import UnlimiformerBart
from graft.modeling.unlimiformer.modeling_unlimiformer_llama import UnlimiformerLlamaForCausalLM

HEADS = dict(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
LLAMA = dict(HEADS, intermediate_size=24, max_position_embeddings=64, eos_token_id=None)
SIDES = {f"{side}_{name}": 2 for side in ("encoder", "decoder") for name in ("layers", "attention_heads")}
RETRO = dict(encoder_hidden_size=12, num_encoder_layers=1, cross_attention_layers=[1], chunk_size=4)


def build(kind):
    torch.manual_seed(0)
    if kind == "bart":
        bart = dict(vocab_size=50, d_model=16, encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=32)
        return UnlimiformerBart(UnlimiformerBartConfig(**bart, **SIDES)).eval()
    if kind == "llama":
        options = dict(window=16, local_tokens=8, keys_per_query=4)
        return UnlimiformerLlamaForCausalLM(UnlimiformerLlamaConfig(**LLAMA, unlimiformer_config=options)).eval()
    if kind == "retro":
        return RetroForCausalLM(RetroConfig(**HEADS, **RETRO)).eval()
    gnn = dict(attention="llama", sparse=dict(rank=4, scale_last=0.5)) if kind == "sparse" else dict(attention="gin")
    return LlamaForCausalLMWithGNN(LlamaGNNConfig(**LLAMA, gnn_config=gnn)).eval()


def logits(model, kind):
    ids = torch.randint(3, 50, (1, 40), generator=torch.Generator().manual_seed(0))
    decoder = dict(decoder_input_ids=ids[:, :5]) if kind == "bart" else {}
    with torch.no_grad():
        return model(input_ids=ids, **decoder).logits
"""
PUSH = (
    MODELS
    + """
import json, sys
model = build(sys.argv[1])
model.push_to_hub(sys.argv[2], token="hf_a_secret")
print(json.dumps(logits(model, sys.argv[1]).tolist()))
"""
)
STRANGER = (
    program_without("graft", "faiss")
    + """
import json
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

kind, repository, revision = sys.argv[1:]
auto = AutoModelForSeq2SeqLM if kind == "bart" else AutoModelForCausalLM
try:
    auto.from_pretrained(repository, trust_remote_code=False)
except ValueError as error:
    assert "trust_remote_code" in str(error), error
else:
    raise AssertionError("code ran without trust")
model = auto.from_pretrained(repository, trust_remote_code=True, revision=revision).eval()
ids = torch.randint(3, 50, (1, 40), generator=torch.Generator().manual_seed(0))
decoder = dict(decoder_input_ids=ids[:, :5]) if kind == "bart" else {}
with torch.no_grad():
    print(json.dumps(model(input_ids=ids, **decoder).logits.tolist()))
"""
)
ADAPTERS = (
    MODELS
    + """
import sys
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM
from graft.modeling.retro.retrofit_config import RetroFitConfig
import graft.registration

torch.manual_seed(0)
base = LlamaForCausalLM(LlamaConfig(**LLAMA, pad_token_id=1)).eval()
base.push_to_hub("me/base", token="hf_a_secret")
base = LlamaForCausalLM.from_pretrained("me/base").eval()
ids = torch.randint(3, 50, (1, 12), generator=torch.Generator().manual_seed(0))
neighbours = torch.randint(3, 50, (1, 3, 2, 6), generator=torch.Generator().manual_seed(1))
if sys.argv[1] == "lora":
    config, given = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"), {}
else:
    config, given = RetroFitConfig(chunk_size=4, neighbour_length=6, task_type="CAUSAL_LM"), {"retrieved": neighbours}
adapted = get_peft_model(base, config).eval()
for parameter in adapted.parameters():
    if parameter.requires_grad:
        torch.nn.init.normal_(parameter, std=0.3)
adapted.push_to_hub("me/adapter", token="hf_a_secret")
expected = adapted(input_ids=ids, **given).logits
loaded = AutoPeftModelForCausalLM.from_pretrained("me/adapter").eval()
assert torch.equal(loaded(input_ids=ids, **given).logits, expected)
plain = LlamaForCausalLM.from_pretrained("me/base").eval()
assert not torch.allclose(plain(input_ids=ids).logits, expected)
"""
)
AGAIN = (
    MODELS
    + """
model = build("retro")
model.push_to_hub("me/retro", token="hf_a_secret")
with torch.no_grad():
    model.lm_head.weight.add_(1)
model.push_to_hub("me/retro", token="hf_a_secret")
"""
)


def slow(value):
    return pytest.param(value, marks=pytest.mark.slow)  # each starts two processes


@pytest.mark.parametrize("kind", [slow("bart"), "llama", "retro", slow("gin"), "sparse"])
def test_a_pushed_model_loads_by_its_id_where_graft_is_absent_with_the_same_logits(hub, kind):
    expected = json.loads(hub.run(PUSH, kind, f"me/{kind}").stdout.splitlines()[-1])
    repository = hub.repositories[f"me/{kind}"]
    assert not [name for name in repository.files if name.endswith((".bin", ".pt", ".pth", ".pkl"))]
    assert not [name for name, content in repository.files.items() if b"hf_a_secret" in content]
    found = hub.run(STRANGER, kind, f"me/{kind}", repository.sha, home="stranger").stdout.splitlines()[-1]
    assert json.loads(found) == expected
    assert "model.safetensors" in hub.asked


@pytest.mark.parametrize("method", [slow("lora"), "retrofit"])
def test_an_adapter_is_pushed_alone_and_loads_onto_its_base_by_id(hub, method):
    hub.run(ADAPTERS, method)
    files = hub.repositories["me/adapter"].files
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(files)
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "me/base"
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pth", ".pkl"))]


def test_a_second_push_changes_only_what_changed(hub):
    hub.run(AGAIN)
    first, second = hub.repositories["me/retro"].commits
    assert {"model.safetensors", "config.json", "modeling_retro.py"} <= first
    assert second == {"model.safetensors"}


def test_a_push_goes_on_after_the_connection_was_lost(hub):
    hub.dropped_uploads = 1
    hub.run(PUSH, "retro", "me/retro")
    assert "model.safetensors" in hub.repositories["me/retro"].files
    assert hub.dropped_uploads == 0


def test_a_push_with_a_wrong_token_says_so_and_uploads_nothing(hub):
    done = hub.run(PUSH.replace("hf_a_secret", "hf_another"), "retro", "me/retro", succeeds=False)
    assert "401" in done.stderr
    assert "me/retro" not in hub.repositories
