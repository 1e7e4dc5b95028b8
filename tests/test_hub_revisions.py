"""Models and adapters of one commit: what pins the code that runs, and what warns because nothing does."""

import pytest

PUSH = """
import sys
import torch
from peft import LoraConfig, get_peft_model
from graft.configuration.configuration_unlimiformer import UnlimiformerLlamaConfig
from graft.modeling.unlimiformer.modeling_unlimiformer_llama import UnlimiformerLlamaForCausalLM
from graft.trainer.tokenizer_training import train_tokenizer

torch.manual_seed(0)
tokenizer = train_tokenizer(["the cat sat on a mat near the sea while rain fell"] * 20, 300, 64)
sizes = dict(vocab_size=300, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24)
options = dict(window=16, local_tokens=8, keys_per_query=4)
config = UnlimiformerLlamaConfig(**sizes, max_position_embeddings=64, unlimiformer_config=options)
model = UnlimiformerLlamaForCausalLM(config)
token = dict(token="hf_a_secret")
model.push_to_hub("me/base", **token)
tokenizer.push_to_hub("me/base", **token)
from huggingface_hub import HfApi
commit = HfApi().repo_info("me/base").sha
for name, revision in (("me/pinned", commit), ("me/unpinned", None)):
    base = UnlimiformerLlamaForCausalLM.from_pretrained("me/base")
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", base_model_name_or_path="me/base")
    adapted = get_peft_model(base, lora)
    adapted.peft_config["default"].revision = revision
    adapted.push_to_hub(name, **token)
"""
ASK = """
import sys
from graft.scripts.generate import main
name, *options = sys.argv[1:]
given = ["--prompt", "the cat sat on a mat", "--question", "who?", "--max_new_tokens", "3", "--trust-remote-code"]
raise SystemExit(main([name, *given, *options]))
"""
MERGE = """
import sys
from graft.scripts.merge import main
raise SystemExit(main([*sys.argv[1:], "--trust-remote-code"]))
"""
WARNING = "pin the revision"


def test_code_that_runs_is_pinned_by_the_revision_or_warns(hub, tmp_path):
    hub.run(PUSH)
    commits = {name: hub.repositories[f"me/{name}"].sha for name in ("base", "pinned")}
    assert WARNING in hub.run(ASK, "me/base").stderr
    # An adapter by its id: its config says which commit of its base it is for.
    assert WARNING not in hub.run(ASK, "me/pinned", "--revision", commits["pinned"]).stderr
    done = hub.run(MERGE, "me/pinned", "merged", "--revision", commits["pinned"])
    assert WARNING not in done.stderr
    assert {"model.safetensors", "tokenizer.json"} <= {path.name for path in (tmp_path / "merged").iterdir()}


@pytest.mark.slow  # eight processes
def test_a_branch_pins_nothing_and_an_unknown_commit_is_one_error(hub):
    hub.run(PUSH)
    commits = {name: hub.repositories[f"me/{name}"].sha for name in ("base", "unpinned")}
    assert WARNING in hub.run(ASK, "me/base", "--revision", "main").stderr
    assert WARNING not in hub.run(ASK, "me/base", "--revision", commits["base"]).stderr
    done = hub.run(ASK, "me/base", "--revision", "0" * 40, succeeds=False)
    assert done.returncode == 2
    assert "`model` 'me/base' cannot be loaded" in done.stderr
    assert WARNING in hub.run(ASK, "me/unpinned", "--revision", commits["unpinned"]).stderr
    assert WARNING in hub.run(MERGE, "me/unpinned", "again").stderr
    done = hub.run(MERGE, "me/pinned", "none", "--revision", "0" * 40, succeeds=False)
    assert done.returncode == 2
    assert "`adapter` 'me/pinned' cannot be loaded" in done.stderr
