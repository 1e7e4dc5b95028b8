import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from graft.configuration.configuration_gnn import LlamaGNNConfig
from graft.modeling.graph.modeling_llama_gnn import LlamaForCausalLMWithGNN
from graft.scripts.inspect_graph import main
from graft.trainer.tokenizer_training import train_byte_level_tokenizer

TEXT = "tokens are nodes & edges <lead> from earlier to later ones"


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    sizes = {"vocab_size": 300, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 16, "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
    config = LlamaGNNConfig(**sizes, gnn_config={"attention": "llama", "sparse": {"rank": 4}})
    LlamaForCausalLMWithGNN(config).save_pretrained(tmp_path / "model")
    train_byte_level_tokenizer([TEXT], 300).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_the_command_writes_a_page_pictures_and_numbers(folder, tmp_path, capsys):
    page = tmp_path / "look" / "graph.html"
    assert main([str(folder), "--text", TEXT, "--output", str(page), "--max-tokens", "12"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert [row["kind"] for row in shown] == ["sparse", "sparse"]
    found = json.loads(page.with_suffix(".json").read_text())
    assert found["statistics"] == shown
    assert len(found["tokens"]) == 12
    assert {row["kind"] for row in found["parameters"]} == {"graph scale", "graph layer 0 epsilon"}
    assert all(j <= i < 12 and weight > 0.6 for j, i, weight in found["edges"]["1"])
    assert len(found["edges"]["1"]) == pytest.approx(12 * shown[1]["edges_per_row"])
    assert page.read_text().count("data:image/png;base64") == 3


def test_the_command_is_a_program_and_reads_files(folder, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    script = Path(__file__).parents[2] / "scripts" / "inspect_graph.py"
    command = [sys.executable, str(script), str(folder), "--text", str(tmp_path / "text.txt")]
    done = subprocess.run([*command, "--output", str(tmp_path / "g.html")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "<lead>" in "".join(json.loads((tmp_path / "g.json").read_text())["tokens"])
    assert "&lt;" in (tmp_path / "g.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere/to-be-found", "--text", "a"], "nowhere/to-be-found"),
        (["{folder}", "--text", " "], "at least one token"),
        (["{folder}", "--text", "a", "--max-tokens", "0"], "`max_tokens` must be at least 1, got 0"),
    ],
)
def test_mistakes_are_one_line(folder, capsys, arguments, message):
    assert main([argument.format(folder=folder) for argument in arguments]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("graft-inspect-graph: ")
    assert message in last
