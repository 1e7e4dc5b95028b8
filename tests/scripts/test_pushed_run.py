"""A run that publishes what it trained: its card's code runs elsewhere, and a push that fails loses nothing."""

import os
import shlex

import pytest
from stranger import program_without, snippet_of

from graft.trainer.published_files import is_published

RUN = """
import sys
from graft.scripts.run import main

raise SystemExit(main(sys.argv[1:]))
"""
HF = "from huggingface_hub.cli.hf import main\nmain()"
PUSHES = {"push_to_hub": True, "hub_model_id": "me/run", "max_steps": 2, "save_steps": 2}
PUSHES |= {"hub_strategy": "end", "eval_strategy": "no"}
TEXT = [
    *("--data.target_column", "null", "--data.max_source_length", "32", "--data.scored_tokens", "8"),
    *("--no-generation", "--metrics", "perplexity", "--training.predict_with_generate", "false"),
]
GRAPH = ["--graph.attention", "llama", "--graph.sparse", '{"rank": 4, "scale_first": 0.2}']


@pytest.fixture
def pushing_run(make_run, monkeypatch):
    """The configuration of a run that pushes to me/run, and a token for it."""
    monkeypatch.setenv("HF_TOKEN", "hf_a_secret")
    return str(make_run("causal", **PUSHES))


@pytest.mark.slow
def test_the_snippet_of_the_pushed_card_runs_by_id_and_commit_where_graft_is_absent(hub, pushing_run, monkeypatch):
    hub.run(RUN, pushing_run, *TEXT, *GRAPH)
    repository = hub.repositories["me/run"]
    snippet = snippet_of(repository.files["README.md"].decode())
    assert 'folder = "me/run"' in snippet
    assert snippet.count('trust_remote_code=True, revision="COMMIT"') == 2
    assert not [name for name in repository.files if name.endswith((".bin", ".pt", ".pth", ".pkl"))]
    assert not [name for name, content in repository.files.items() if b"hf_a_secret" in content]
    monkeypatch.delenv("HF_TOKEN")
    stranger = program_without("graft") + snippet.replace("COMMIT", repository.sha)
    assert hub.run(stranger, home="stranger").stdout.startswith("A long document ...")


@pytest.mark.slow
def test_a_push_that_fails_leaves_a_whole_folder_and_says_how_to_push_later(hub, pushing_run, tmp_path):
    hub.dropped_uploads = 10**6
    done = hub.run(RUN, pushing_run, *TEXT)
    out = tmp_path / "out"
    later = done.stderr.partition("Push later: ")[2].splitlines()[0]
    assert later.startswith(f"hf upload me/run {out} . ")
    assert '"status": "complete"' in (out / "run.json").read_text()
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= set(os.listdir(out))
    repository = hub.repositories["me/run"]
    assert not repository.files
    hub.dropped_uploads = 0
    hub.run(HF, *shlex.split(later)[1:])
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= set(repository.files)
    assert all(map(is_published, repository.files))
    assert (out / "checkpoint-2" / "optimizer.pt").is_file()


@pytest.mark.parametrize("token", [pytest.param("hf_another", marks=pytest.mark.slow), "hf_a_secret"])
def test_a_repository_that_cannot_be_made_is_one_line_before_training(hub, pushing_run, tmp_path, monkeypatch, token):
    monkeypatch.setenv("HF_TOKEN", token)
    if token == "hf_a_secret":
        hub.shutdown()  # nobody listens
        hub.server_close()
    done = hub.run(RUN, pushing_run, *TEXT, succeeds=False)
    assert done.returncode == 2
    [line] = [line for line in done.stderr.splitlines() if line.startswith("graft-train: ")]
    assert "`training.push_to_hub`: the repository 'me/run' cannot be made" in line
    assert "hf auth login" in line
    assert not (tmp_path / "out" / "run.json").exists()
