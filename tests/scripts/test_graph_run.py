"""The block `graph` of scripts/run.py: from scratch and from a checkpoint, resumed, loaded where graft is absent."""

import json
import re
from pathlib import Path

import pytest
from safetensors.torch import load_file
from stranger import program_without, run_program, snippet_of

from graft.scripts.run import main
from graft.trainer.arguments import ModelArguments
from graft.trainer.loading import load_config

TEXT_ONLY = [
    *("--data.target_column", "null", "--data.max_source_length", "32", "--data.scored_tokens", "8"),
    *("--no-generation", "--metrics", "bits_per_byte", "--training.predict_with_generate", "false"),
]
SPARSE = ["--graph.attention", "llama", "--graph.sparse", '{"rank": 4, "scale_first": 0.2}']


def test_graph_layers_on_a_checkpoint_train_alone_and_the_folder_loads_where_graft_is_absent(make_run, tmp_path):
    config = str(make_run("causal"))
    options = [*TEXT_ONLY, *SPARSE, "--graph.sparse.num_layers", "2", "--graph.train", "graph", "--training.seed", "3"]
    assert main([config, *options]) == 0
    out = tmp_path / "out"
    record = json.loads((out / "run.json").read_text())
    assert record["parameters"]["trained"] < record["parameters"]["total"]
    assert record["configuration"]["graph"]["sparse"]["num_layers"] == 2
    before, after = load_file(tmp_path / "model" / "model.safetensors"), load_file(out / "model.safetensors")
    assert all(after[name].equal(weight) for name, weight in before.items())
    assert {name for name in after if ".graph.network.layers.1." in name}
    assert (out / "graph_parameters.png").read_bytes().startswith(b"\x89PNG")
    card = (out / "README.md").read_text()
    assert "`sparse={" in card
    assert "- graph\n" in card
    assert "2501.02393" in card
    assert "unlimiformer" not in card
    snippet = snippet_of(card)
    assert "trust_remote_code=True" in snippet
    run_program(program_without("graft") + snippet)


def test_a_run_from_scratch_follows_the_recipe_and_learns(make_run, tmp_path, losses_of):
    make_run("causal")
    recipe = Path(__file__).parents[2] / "configs" / "graph_language_model.json"
    sizes = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    small = [token for name, size in sizes.items() for token in (f"--model.config_overrides.{name}", str(size))]
    options = f"""
        --data.train {tmp_path / "train.jsonl"} --data.validation {tmp_path / "validation.jsonl"}
        --data.source_column body --data.id_column name --data.max_source_length 32 --data.scored_tokens 16
        --graph.edges.transform relu --graph.edges.trains_threshold true --graph.edges.threshold 0.05
        --training.max_steps 30 --training.eval_steps 15 --training.save_steps 15 --training.logging_steps 5
        --training.learning_rate 0.01 --training.warmup_steps 0 --training.per_device_train_batch_size 4
        --training.use_cpu --training.output_dir {tmp_path / "scratch"}
    """.split()
    assert main([str(recipe), *small, *options]) == 0
    folder = tmp_path / "scratch"
    losses = losses_of(folder)
    assert losses[30] < losses[5]
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "graft_llama_gnn"
    assert config["gnn_config"]["edges"]["threshold"] == 0.05
    assert "eval_truncated_bits_per_byte" in json.loads((folder / "run.json").read_text())["results"]


def test_a_resumed_run_equals_one_that_was_not_stopped(make_run, tmp_path, losses_of, interrupt):
    config = str(make_run("causal"))
    options = [*TEXT_ONLY, *SPARSE]
    assert main([config, *options]) == 0
    whole = losses_of(tmp_path / "out")
    interrupt(tmp_path / "out")
    assert main(["--resume", str(tmp_path / "out")]) == 0
    assert losses_of(tmp_path / "out") == whole


def test_a_graph_checkpoint_trains_on_with_the_layers_it_has(make_run, tmp_path, capsys):
    config = str(make_run("causal", max_steps=1, eval_strategy="no", do_train=True))
    assert main([config, *TEXT_ONLY, *SPARSE]) == 0
    trained = ["--model.name", str(tmp_path / "out"), "--training.output_dir", str(tmp_path / "on")]
    assert main([config, *TEXT_ONLY, *trained, "--graph.train", "scale"]) == 0
    assert json.loads((tmp_path / "on" / "run.json").read_text())["parameters"]["trained"] == 2
    assert main([config, *TEXT_ONLY, *trained, "--graph.attention", "pna"]) == 2
    assert "other graph layers than the model has" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("seq2seq", [], "`graph`.*`model.task` must be 'causal', got 'seq2seq'"),
        ("causal", ["--memory.window", "24"], "`graph` and `memory` exclude"),
        ("causal", ["--adapter.r", "2"], "`graph` and `adapter` exclude.*graph.train"),
        ("causal", ["--graph.atention", "gin"], "graph.atention.*did you mean `graph.attention`"),
        ("causal", ["--graph.attention", "gat"], "graph.attention.*one of 'gin'.*got 'gat'"),
        (
            "causal",
            ["--graph.edges.transfrom", "relu"],
            "`graph.edges.transfrom` is unknown; did you mean `graph.edges.transform`",
        ),
        ("causal", ["--graph.edges.threshold", "-0.1"], r"`graph.edges.threshold` must lie in \[0, 1\), got -0.1"),
        ("causal", ["--graph.layers", "[0, 7]"], r"`graph.layers` must name layers in \[0, 2\), got \[0, 7\]"),
        ("causal", ["--graph.train", "gnn"], "`graph.train`.*'gnn', which is in no parameter's name"),
    ],
)
def test_mistakes_are_one_line(make_run, tmp_path, capsys, task, options, message):
    config = str(make_run(task, **({} if task == "seq2seq" else {"predict_with_generate": False})))
    plain = [] if task == "seq2seq" else TEXT_ONLY
    assert main([config, *plain, "--graph.mlp_ratio", "0.5", *options]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(message, last), last
    assert not (tmp_path / "out" / "run.json").exists()


def test_what_follows_from_sizes_follows_from_the_overrides():
    sizes = {"hidden_size": 256, "num_attention_heads": 8}
    model = ModelArguments(task="causal", from_config=True, config="llama", tokenizer="t", config_overrides=sizes)
    assert load_config(model).head_dim == 32
