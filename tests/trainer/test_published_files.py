"""What leaves the machine: an upload by the real client to a server of our own, in a process of its own."""

import json
import os
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
from hub_server import HubServer
from safetensors.torch import load
from stranger import program_without

from graft.trainer.published_files import check_hub_strategy, is_published

CODE = """
import sys
from pathlib import Path
import torch
from transformers import LlamaConfig, Seq2SeqTrainingArguments
from datasets import Dataset
from graft.configuration.configuration_unlimiformer import UnlimiformerLlamaConfig
from graft.modeling.unlimiformer.modeling_unlimiformer_llama import UnlimiformerLlamaForCausalLM
from graft.trainer.trainer import GraftSeq2SeqTrainer

folder, strategy = sys.argv[1:]
torch.manual_seed(0)
config = UnlimiformerLlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                                 num_attention_heads=2, max_position_embeddings=64)
rows = Dataset.from_dict({"input_ids": [[5, 6, 7]] * 4, "attention_mask": [[1] * 3] * 4, "labels": [[5, 6, 7]] * 4})
args = Seq2SeqTrainingArguments(folder, use_cpu=True, max_steps=2, save_steps=1, push_to_hub=True, report_to="none",
                                hub_model_id="me/model", hub_strategy=strategy, disable_tqdm=True,
                                hub_always_push=True, hub_token="hf_a_secret")
collate = lambda features: {name: torch.tensor([f[name] for f in features]) for name in features[0]}
trainer = GraftSeq2SeqTrainer(UnlimiformerLlamaForCausalLM(config), args, data_collator=collate, train_dataset=rows)
trainer.train()
trainer._finish_current_push()
"""
AT_THE_END = """
Path(folder, "predictions").mkdir()
Path(folder, "predictions", "private.jsonl").write_text("{}")
trainer.push_to_hub()
"""
TOLD = """
with torch.no_grad():
    print(trainer.model.eval()(torch.tensor([[5, 6, 7]]), use_cache=False).logits.tolist())
"""
STRANGER = (
    program_without("graft")
    + """
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("me/model", trust_remote_code=True, revision=sys.argv[1]).eval()
with torch.no_grad():
    print(model(torch.tensor([[5, 6, 7]]), use_cache=False).logits.tolist())
"""
)


@pytest.fixture
def server():
    with HubServer() as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running
        running.shutdown()


@pytest.mark.parametrize("strategy", ["every_save", pytest.param("end", marks=pytest.mark.slow)])
def test_each_strategy_publishes_code_and_weights_and_never_a_pickle_or_a_token(server, tmp_path, strategy):
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    environment |= {"HF_ENDPOINT": server.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home")}
    environment |= {"HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1", "NO_PROXY": "127.0.0.1"}
    out = tmp_path / "out"
    command = [sys.executable, "-c", CODE + AT_THE_END, str(out), strategy]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-3000:]
    repository = server.repositories["me/model"]
    first = repository.commits[0]
    assert {"model.safetensors", "config.json", "modeling_unlimiformer_llama.py", "training_args.json"} <= first
    assert len(repository.commits) >= 3 if strategy == "every_save" else len(repository.commits) == 1
    assert "README.md" in repository.files
    assert load(repository.files["model.safetensors"])
    code = json.loads(repository.files["config.json"])["auto_map"]["AutoModelForCausalLM"].partition(".")[0]
    assert f"{code}.py" in first
    assert not [name for name in repository.files if name.endswith((".bin", ".pt", ".pth", ".pkl"))]
    assert not [
        name for name in repository.files if name.startswith(("checkpoint", "predictions")) or "trainer_state" in name
    ]
    assert not [name for name, content in repository.files.items() if b"hf_a_secret" in content]
    assert (out / "checkpoint-2" / "optimizer.pt").is_file()


def test_a_repository_loads_where_graft_is_absent_after_its_first_push(hub, tmp_path):
    one_step = CODE.replace("max_steps=2", "max_steps=1") + TOLD
    expected = hub.run(one_step, str(tmp_path / "out"), "every_save").stdout.splitlines()[-1]
    repository = hub.repositories["me/model"]
    assert len(repository.commits) == 1
    found = hub.run(STRANGER, repository.sha, home="stranger").stdout.splitlines()[-1]
    assert json.loads(found) == json.loads(expected)


@pytest.mark.parametrize("strategy", ["checkpoint", "all_checkpoints"])
def test_strategies_that_upload_whole_checkpoints_are_refused(strategy):
    with pytest.raises(ValueError, match=f"'{strategy}' would publish the optimizer's pickles; use 'every_save'"):
        check_hub_strategy(SimpleNamespace(hub_strategy=SimpleNamespace(value=strategy)))
    check_hub_strategy(SimpleNamespace(hub_strategy=SimpleNamespace(value="every_save")))


def test_the_list_of_what_is_published():
    assert all(
        map(is_published, ["model-00001-of-00002.safetensors", "config.json", "windows.py", "README.md", "loss.png"])
    )
    private = ["optimizer.pt", "rng_state_0.pth", "training_args.bin", "predictions/test.jsonl", "trainer_state.json"]
    assert not any(map(is_published, [*private, "samples.jsonl", "checkpoint-3/model.safetensors", "_tmp.json"]))
