"""scripts/run.py from a configuration file to a finished folder, and what it says to a user's mistakes."""

import json
import re
from pathlib import Path

import pytest
from safetensors.torch import load_file
from stranger import run_program, snippet_of
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from graft.scripts.generate import main as generate
from graft.scripts.run import main


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("task", ["seq2seq", "causal"])
def test_run_leaves_a_finished_folder(make_run, tmp_path, task):
    assert main([str(make_run(task)), "--no-abbreviation-is-known"]) == 2
    assert main([str(make_run(task))]) == 0
    out = tmp_path / "out"
    record = json.loads((out / "run.json").read_text())
    assert record["status"] == "complete"
    assert {"eval_truncated_loss", "eval_truncated_rougeL", "test_loss"} <= set(record["results"])
    assert record["rows"]["train"] == {"rows": 24, "prepared": 24, "truncated": 0}
    assert record["configuration"]["model"]["task"] == task
    logged = lines_of(out / "metrics.jsonl")
    assert [line["step"] for line in logged if "loss" in line] == [1, 2, 3, 4]
    assert all(line["tokens_per_second"] > 0 for line in logged if "loss" in line)
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    for name in ("eval_truncated-step-000002", "eval_truncated-step-000004"):
        ids = [line["id"] for line in lines_of(out / "predictions" / f"{name}.jsonl")]
        assert ids == [f"validation-{n}" for n in range(5)]
    assert len(lines_of(out / "predictions" / "test.jsonl")) == 3
    assert [line["id"] for line in lines_of(out / "samples.jsonl")] == [
        "validation-0",
        "validation-2",
        "validation-4",
    ] * 2
    pickles = [path for path in out.rglob("*") if path.suffix in (".bin", ".pt", ".pth", ".pkl")]
    assert {path.name for path in pickles} == {"optimizer.pt", "scheduler.pt", "rng_state.pth"}
    assert {path.parent.name for path in pickles} == {"checkpoint-2", "checkpoint-4"}


def test_run_json_repeats_the_run(make_run, tmp_path, losses_of):
    assert main([str(make_run("causal"))]) == 0
    assert main([str(tmp_path / "out" / "run.json"), "--training.output_dir", str(tmp_path / "again")]) == 0
    assert losses_of(tmp_path / "again") == losses_of(tmp_path / "out")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "again"))
    assert all(second[name].equal(weight) for name, weight in first.items())


def test_dry_run_shows_the_plan_and_writes_nothing(make_run, tmp_path, capsys):
    assert main([str(make_run("causal")), "--dry-run"]) == 0
    plan = capsys.readouterr().out
    assert "train: 8 rows tried" in plan
    assert "labels" in plan
    assert not (tmp_path / "out").exists()


def test_adapter_run_saves_the_adapter_alone_and_its_card_snippet_runs(make_run, tmp_path):
    options = [
        "--adapter.r",
        "2",
        "--no-generation",
        "--metrics",
        "perplexity",
        "--training.predict_with_generate=false",
    ]
    assert main([str(make_run("causal")), *options]) == 0
    out = tmp_path / "out"
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == str(tmp_path / "model")
    assert set(json.loads((out / "adapter_config.json").read_text())["target_modules"]) == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
    }  # fmt: skip
    assert not (out / "model.safetensors").exists()
    assert all("lora" in name for name in load_file(out / "adapter_model.safetensors"))
    card = (out / "README.md").read_text()
    assert "library_name: peft" in card
    run_program(snippet_of(card))


GRAPH_ADAPTER = ["--adapter.type", "sparse_gin", "--adapter.options", '{"rank": 8, "scale_first": 0.5}']
SCORED = ["--no-generation", "--metrics", "perplexity", "--training.predict_with_generate=false"]


@pytest.mark.parametrize("memory", [[], ["--memory.local_tokens", "8", "--data.eval_views", "full"]])
def test_graph_adapter_is_trained_alone_and_its_card_snippet_runs(make_run, tmp_path, memory):
    assert main([str(make_run("causal")), *GRAPH_ADAPTER, *SCORED, *memory]) == 0
    out = tmp_path / "out"
    saved = json.loads((out / "adapter_config.json").read_text())
    assert (saved["peft_type"], saved["rank"]) == ("SPARSE_GIN", 8)
    assert saved["base_model_name_or_path"] == str(tmp_path / "model")
    assert not (out / "model.safetensors").exists()
    weights = load_file(out / "adapter_model.safetensors")
    record = json.loads((out / "run.json").read_text())
    assert sum(weight.numel() for weight in weights.values()) == record["parameters"]["trained"]
    first = load_file(out / "checkpoint-2" / "adapter_model.safetensors")
    assert any(not first[name].equal(weight) for name, weight in weights.items())
    card = (out / "README.md").read_text()
    assert "adapted (sparse GIN) from" in card
    assert "`rank=8`" in card
    run_program(snippet_of(card))


def test_a_resumed_graph_adapter_equals_one_that_was_not_stopped(make_run, tmp_path, losses_of, interrupt):
    assert main([str(make_run("causal")), *GRAPH_ADAPTER, *SCORED]) == 0
    out = tmp_path / "out"
    whole, weights = losses_of(out), load_file(out / "adapter_model.safetensors")
    interrupt(out)
    assert main(["--resume", str(out)]) == 0
    assert losses_of(out) == whole
    again = load_file(out / "adapter_model.safetensors")
    assert all(again[name].equal(weight) for name, weight in weights.items())


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("causal", ["--adapter.options", '{"rnk": 8}'], "no 'rnk'; 'sparse_gin' takes .*rank"),
        ("causal", ["--adapter.options", '{"rank": "wide"}'], "`adapter.options`.*rank"),
        ("causal", ["--adapter.options", '{"layers_to_transform": [7]}'], "layers_to_transform.*7"),
        ("causal", ["--adapter.r", "4"], "`adapter.r` is of `adapter.type` 'lora'"),
        ("causal", ["--adapter.type", "lora"], "`adapter.options` are of `adapter.type` 'sparse_gin' or 'retrofit'"),
        ("seq2seq", [], "for `model.task` 'causal', got 'seq2seq'"),
    ],
)
def test_a_wrong_graph_adapter_is_one_error(make_run, tmp_path, capsys, task, options, message):
    assert main([str(make_run(task)), *GRAPH_ADAPTER, *options]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out" / "run.json").exists()


def test_chunks_are_scored_and_generate_nothing(make_run, tmp_path):
    config = str(make_run("causal", do_train=True, do_eval=True, do_predict=True, eval_strategy="no"))
    views = ["--data.eval_views", "chunked", "truncated", "--data.chunk_size", "20"]
    assert main([config, *views]) == 0
    results = json.loads((tmp_path / "out" / "run.json").read_text())["results"]
    assert {"eval_chunked_loss", "eval_truncated_loss", "eval_truncated_rouge1", "test_rouge1"} <= results.keys()
    assert "eval_chunked_rouge1" not in results
    lines = (tmp_path / "out" / "predictions" / "eval_chunked-step-000004.jsonl").read_text().splitlines()
    assert len(lines) > 5
    assert {json.loads(line)["prediction"] for line in lines} == {None}


def test_a_packed_run_takes_the_step_of_its_rows_one_by_one(make_run, tmp_path, losses_of):
    sizes = {"per_device_train_batch_size": 24, "max_steps": 2, "optim": "sgd", "learning_rate": 0.1}
    config = str(make_run("causal", **sizes, do_train=True, eval_strategy="no", save_strategy="no"))
    assert main([config]) == 0
    assert main([config, "--data.packing", "--training.output_dir", str(tmp_path / "packed")]) == 0
    assert losses_of(tmp_path / "packed") == pytest.approx(losses_of(tmp_path / "out"), abs=1e-5)
    rows = json.loads((tmp_path / "packed" / "run.json").read_text())["rows"]["train"]
    assert rows["prepared"] < rows["rows"] == 24


def test_text_without_target_is_scored_by_likelihood(make_run, tmp_path):
    options = [
        *("--data.target_column", "null", "--data.max_source_length", "32", "--data.scored_tokens", "8"),
        *("--no-generation", "--metrics", "bits_per_byte", "--training.predict_with_generate", "false"),
        *("--data.eval_views", "truncated", "context"),
    ]
    assert main([str(make_run("causal")), *options]) == 0
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert {"eval_truncated_bits_per_byte", "eval_context_bits_per_byte"} <= set(record["results"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data.target_column", "abstract"], "abstract.*body.*summary"),
        (["--model.task", "causal"], "task.*'causal'.*BartForConditionalGeneration.*'seq2seq'"),
        (["--model.name", "nowhere/to-be-found"], "model.name.*nowhere/to-be-found"),
        (["--model.config_overrides.d_modell", "8"], "config_overrides.*d_modell.*d_model"),
        (["--model.from_config", "true", "--adapter.r", "4"], "adapter.*from_config"),
        (["--adapter.target_modules", '["nothing"]'], "adapter.target_modules"),
        (["--data.max_target_length", "200"], "data.max_target_length.*128 positions, got 200"),
        (["--metric", "no_such_module:score"], "--metric.*MODULE:FUNCTION.*no_such_module"),
        (["--training.save_strategy", "sometimes"], "training.*sometimes"),
        (["--data.chunksize", "8"], "data.chunksize"),
        (["--resume", "{folder}/never"], "never/run.json"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(make_run, tmp_path, capsys, options, message):
    import re

    config = str(make_run("seq2seq"))
    assert (
        main([config, *(option.format(folder=tmp_path) if "{folder}" in option else option for option in options)])
        == 2
    )
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("graft-train: ")
    assert re.search(message, last), last
    assert not (tmp_path / "out" / "run.json").exists()


def test_a_folder_with_another_run_is_refused(make_run, capsys):
    config = str(make_run("causal", max_steps=1, eval_strategy="no", do_train=True))
    assert main([config]) == 0
    assert main([config, "--data.max_source_length", "20"]) == 2
    assert "data.max_source_length" in capsys.readouterr().err.splitlines()[-1]
    assert main([config, "--fresh"]) == 2
    assert "--fresh" in capsys.readouterr().err.splitlines()[-1]


def test_adapter_is_trained_plainly_and_evaluated_with_memory(make_run, tmp_path):
    config = make_run("causal", predict_with_generate=False)
    options = [
        *("--data.target_column", "null", "--data.max_source_length", "32", "--data.scored_tokens", "8"),
        *("--data.eval_views", "full", "truncated", "context", "--memory.local_tokens", "8", "--memory.window", "24"),
        *("--no-generation", "--metrics", "perplexity", "--adapter.r", "2"),
    ]
    assert main([str(config), *options]) == 0
    out = tmp_path / "out"
    results = json.loads((out / "run.json").read_text())["results"]
    assert {f"eval_{view}_perplexity" for view in ("full", "truncated", "context")} <= set(results)
    assert json.loads((out / "memory.json").read_text())["local_tokens"] == 8
    card = (out / "README.md").read_text()
    assert "`local_tokens=8`" in card
    snippet = snippet_of(card).replace("A long document", "the cat " * 60)
    assert "model.get_base_model(), UnlimiformerConfig(window=24, local_tokens=8)" in snippet
    run_program(snippet)
    assert generate([str(out), "--prompt", "the cat " * 60, "--question", "", "--max_new_tokens", "3"]) == 0


def test_bart_from_scratch_learns_its_tokenizer_and_is_evaluated_with_memory(make_run, tmp_path, losses_of):
    make_run("seq2seq")
    recipe = Path(__file__).parents[2] / "configs" / "bart_from_scratch.json"
    sizes = {"vocab_size": 400, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64}
    sizes |= {"decoder_ffn_dim": 64, "max_position_embeddings": 32}
    small = [token for name, size in sizes.items() for token in (f"--model.config_overrides.{name}", str(size))]
    files = [
        t for name in ("train", "validation", "test") for t in (f"--data.{name}", str(tmp_path / f"{name}.jsonl"))
    ]
    options = f"""
        --data.source_column body --data.target_column summary --data.id_column name --data.max_source_length 32
        --data.max_target_length 16 --generation.max_new_tokens 16 --memory.window 32
        --training.max_steps 20 --training.eval_steps 10 --training.save_steps 10 --training.logging_steps 5
        --training.learning_rate 0.01 --training.warmup_steps 0 --training.per_device_train_batch_size 4
        --training.use_cpu --training.output_dir {tmp_path / "scratch"}
    """.split()
    assert main([str(recipe), *small, *files, *options]) == 0
    folder = tmp_path / "scratch"
    assert AutoModelForSeq2SeqLM.from_pretrained(folder).config.d_model == 32
    assert len(AutoTokenizer.from_pretrained(folder)) <= 400
    losses = losses_of(folder)
    assert losses[20] < losses[5]
    results = json.loads((folder / "run.json").read_text())["results"]
    assert {"eval_full_rougeL", "eval_truncated_rougeL", "test_rougeL"} <= set(results)
    full, truncated = (
        lines_of(folder / "predictions" / f"eval_{view}-step-000020.jsonl") for view in ("full", "truncated")
    )
    assert [line["truncated"] for line in full] == [False] * 5
    assert [line["truncated"] for line in truncated] == [line["source_tokens"] > 30 for line in truncated]
    assert any(line["truncated"] for line in truncated)
