"""The block `retrieval` of scripts/run.py: a RETRO from scratch on prepared corpora, resumed, loaded without graft."""

import json
import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from stranger import program_without, run_program, snippet_of
from transformers import AutoModelForCausalLM

import graft.registration  # noqa: F401
from graft.retrieval.corpus.retro_collator import DataCollatorForRetro
from graft.retrieval.corpus.retro_dataset import RetroDataset
from graft.scripts.run import main
from graft.trainer.arguments import RetrievalArguments
from graft.trainer.config_file import read_configuration
from graft.trainer.corpus_rows import load_corpora
from graft.trainer.training_run import RunFlags, build_trainer, prepare, training_arguments

SIZES = {
    "vocab_size": 320, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_encoder_layers": 1,
    "cross_attention_layers": [0, 1], "chunk_size": 8, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2,
}  # fmt: skip
VIEWS = ("retrieved", "without", "random")


@pytest.fixture
def make_config(corpora, write_short_run):
    """A function that writes a configuration with these blocks changed."""

    def write(**changes) -> str:
        blocks = {
            "model": {
                "task": "causal", "from_config": True, "config": "graft_retro", "config_overrides": SIZES,
                "tokenizer": str(corpora / "corpus" / "tokenizer"),
            },
            "data": {"train": str(corpora / "corpus"), "validation": str(corpora / "held-out")},
            "retrieval": {},
        }  # fmt: skip
        return write_short_run(blocks, changes)

    return write


def naive_loss(model, corpus, neighbours: bool) -> float:
    """Mean loss of all rows, one by one, of a model or of the one in a folder."""
    if isinstance(model, Path):
        model = AutoModelForCausalLM.from_pretrained(model).eval()
    rows, sums, count = RetroDataset(corpus), 0.0, 0
    for number in range(len(rows)):
        batch = DataCollatorForRetro(corpus.pad_token_id)([rows[number]])
        if not neighbours:
            del batch["retrieved"]
        labels = batch.pop("labels")
        with torch.no_grad():
            logits = model(**batch).logits
        losses = torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:], reduction="none")
        sums, count = sums + float(losses.sum()), count + int((labels[0, 1:] != -100).sum())
    return sums / count


def test_a_run_trains_evaluates_in_three_views_and_the_folder_loads_where_graft_is_absent(
    make_config, corpora, held_out, tmp_path, losses_of
):
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_retrieved_bits_per_byte"}
    assert main([make_config(training=best)]) == 0
    out = tmp_path / "out"
    record = json.loads((out / "run.json").read_text())
    assert record["status"] == "complete"
    names = {f"eval_{view}_{value}" for view in VIEWS for value in ("loss", "perplexity", "bits_per_byte")}
    assert names <= set(record["results"])
    assert record["results"]["eval_retrieved_loss"] == pytest.approx(naive_loss(out, held_out, True), rel=1e-4)
    assert record["results"]["eval_without_loss"] == pytest.approx(naive_loss(out, held_out, False), rel=1e-4)
    assert len({record["results"][f"eval_{view}_loss"] for view in VIEWS}) == 3
    assert record["rows"]["validation_random"] == {
        "rows": len(RetroDataset(held_out)), "prepared": len(RetroDataset(held_out)), "truncated": 0,
    }  # fmt: skip
    assert losses_of(out)[4] < losses_of(out)[1]
    predictions = [json.loads(line) for line in (out / "predictions" / "eval_random-step-000004.jsonl").open()]
    assert predictions[0]["id"] == "row:0:0"
    card = (out / "README.md").read_text()
    assert "- retro\n" in card
    assert "trained with 2 of them" in card
    assert "2112.04426" in card
    run_program(program_without("graft") + snippet_of(card))


def test_embeddings_norms_and_null_slots_do_not_decay(make_config):
    configuration = read_configuration([make_config()])
    flags = RunFlags(dry_run=True)
    trainer = build_trainer(prepare(configuration, training_arguments(configuration), flags), flags)
    decayed = trainer.get_decay_parameter_names(trainer.model)
    spared = {name for name, _ in trainer.model.named_parameters()} - set(decayed)
    assert "model.layers.0.cross_attention.null_key" in spared
    assert all(re.search("norm|bias|embed|null", name) for name in spared)
    assert decayed


def test_a_resumed_run_equals_one_that_was_not_stopped(make_config, tmp_path, losses_of, interrupt):
    assert main([make_config()]) == 0
    out = tmp_path / "out"
    whole = losses_of(out)
    interrupt(out)
    assert main(["--resume", str(out)]) == 0
    assert losses_of(out) == whole
    assert json.loads((out / "run.json").read_text())["training"]["resumed_from"] == "checkpoint-2"


def test_the_plan_shows_a_row_and_its_neighbours_and_writes_nothing(make_config, tmp_path, capsys):
    assert main([make_config(retrieval={"num_neighbours": 1, "neighbour_length": 5}), "--dry-run"]) == 0
    plan = capsys.readouterr().out
    assert "RetrievalArguments(num_neighbours=1, neighbour_length=5)" in plan
    assert "views      retrieved, without, random" in plan
    assert "neighbour 0 of the first chunk (5 tokens): '" in plan
    assert "neighbour 1" not in plan
    assert not (tmp_path / "out").exists()


def test_a_finished_run_is_trained_on_and_its_test_rows_are_scored(make_config, corpora, tmp_path):
    assert main([make_config(), "--training.max_steps", "1", "--training.save_steps", "1"]) == 0
    blocks = json.loads(Path(make_config()).read_text())
    blocks["model"] = {"task": "causal", "name": str(tmp_path / "out")}
    blocks["data"]["test"] = str(corpora / "held-out")
    path = tmp_path / "on.json"
    path.write_text(json.dumps(blocks))
    options = ["--data.eval_views", "retrieved", "--data.max_test_samples", "2", "--data.eval_during_training", "1"]
    assert main([str(path), *options, "--training.output_dir", str(tmp_path / "on")]) == 0
    results = json.loads((tmp_path / "on" / "run.json").read_text())["results"]
    assert "test_loss" in results
    assert "eval_without_loss" not in results
    assert len((tmp_path / "on" / "predictions" / "test.jsonl").read_text().splitlines()) == 2


def test_a_finished_run_is_evaluated_without_training_rows(make_config, tmp_path):
    assert main([make_config()]) == 0
    blocks = json.loads(Path(make_config()).read_text())
    before = json.loads((tmp_path / "out" / "run.json").read_text())["results"]
    blocks["model"] = {"task": "causal", "name": str(tmp_path / "out")}
    blocks["data"]["train"] = None
    blocks["training"] |= {"do_train": False, "eval_strategy": "no", "output_dir": str(tmp_path / "scored")}
    path = tmp_path / "scored.json"
    path.write_text(json.dumps(blocks))
    assert main([str(path)]) == 0
    results = json.loads((tmp_path / "scored" / "run.json").read_text())["results"]
    for view in VIEWS:
        assert results[f"eval_{view}_loss"] == pytest.approx(before[f"eval_{view}_loss"], rel=1e-5)


def test_a_lora_on_a_trained_retro_learns_alone_goes_on_after_a_kill_and_loads_where_graft_is_absent(
    make_config, held_out, tmp_path, losses_of, interrupt
):
    assert main([make_config(), "--training.max_steps", "1", "--training.save_steps", "1"]) == 0
    base = (tmp_path / "out").rename(tmp_path / "base")
    blocks = json.loads(Path(make_config()).read_text())
    blocks |= {"model": {"task": "causal", "name": str(base)}, "adapter": {"type": "lora", "r": 2}}
    config = tmp_path / "lora.json"
    config.write_text(json.dumps(blocks))
    assert main([str(config)]) == 0
    out = tmp_path / "out"
    record, whole = json.loads((out / "run.json").read_text()), losses_of(out)
    saved = load_file(out / "adapter_model.safetensors")
    assert record["parameters"]["trained"] == sum(weight.numel() for weight in saved.values())
    assert any("cross_attention" in name for name in saved)  # also the maps that read neighbours
    assert not (out / "model.safetensors").exists()
    loaded = AutoPeftModelForCausalLM.from_pretrained(out).eval()
    for view, neighbours in (("retrieved", True), ("without", False)):
        expected = naive_loss(loaded, held_out, neighbours)
        assert record["results"][f"eval_{view}_loss"] == pytest.approx(expected, rel=1e-4)
    assert not torch.allclose(
        torch.tensor(naive_loss(base, held_out, True)), torch.tensor(naive_loss(loaded, held_out, True)), atol=1e-4
    )
    run_program(program_without("graft") + snippet_of((out / "README.md").read_text()))
    interrupt(out)
    assert main(["--resume", str(out)]) == 0
    assert losses_of(out) == whole


def test_a_lora_on_random_weights_is_refused(make_config, capsys):
    """The saved adapter would lack its base."""
    assert main([make_config(adapter={"r": 2})]) == 2
    assert "`adapter` needs a base with weights, but `model.from_config` starts from random" in capsys.readouterr().err


def test_rows_are_chosen_in_order_or_drawn(corpora, make_config):
    configuration = read_configuration([make_config()])
    rows = load_corpora(configuration.data, configuration.retrieval)["train"]
    chosen = rows.select([3, 1]).select([1])
    assert len(chosen) == 1
    assert chosen["id"] == [rows["id"][1]] == [chosen[0]["id"]]
    assert torch.equal(chosen.__getitems__([0])[0]["input_ids"], rows.data[1]["input_ids"])
    assert chosen["truncated"] == [False]


@pytest.mark.parametrize(("field", "value"), [("num_neighbours", 1), ("neighbour_length", 5)])
def test_a_field_of_retrieval_acts(make_config, field, value):
    assert {each.name for each in fields(RetrievalArguments)} == {"num_neighbours", "neighbour_length"}
    shapes = []
    for retrieval in ({}, {field: value}):
        configuration = read_configuration([make_config(retrieval=retrieval)])
        rows = load_corpora(configuration.data, configuration.retrieval)["train"]
        shapes.append(tuple(rows[0]["retrieved"].shape))
    assert shapes == [(4, 2, 16), (4, 1, 16) if field == "num_neighbours" else (4, 2, 5)]


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"model": {"task": "seq2seq"}}, [], "`retrieval` needs `model.task` 'causal', got 'seq2seq'"),
        ({"model": {"tokenizer": "train"}}, [], "'train' would make another tokenizer"),
        ({"memory": {}}, [], "`retrieval` and `memory` exclude each other"),
        ({"graph": {}}, [], "`retrieval` and `graph` exclude each other"),
        ({"data": {"source_column": "body"}}, [], "`data.source_column` would do nothing"),
        ({"data": {"target_column": "summary"}}, [], "`data.target_column` would do nothing"),
        ({"data": {"dataset": "somewhere", "train": None, "validation": None}}, [], "`data.dataset` would do nothing"),
        ({"data": {"validation": "absent"}}, [], "`data.validation` must be the folder.*corpus.*'absent'"),
        ({"data": {"eval_views": ["full"]}}, [], "holds 'full', but rows with neighbours are evaluated as retrieved"),
        ({}, ["--no-retrieval", "--data.eval_views", "random"], "holds 'random', which is of the block `retrieval`"),
        ({"retrieval": {"num_neighbours": 0}}, [], "`retrieval.num_neighbours` must be at least 1, got 0"),
        ({"retrieval": {"num_neighbours": 9}}, [], "`retrieval.num_neighbours` must lie in 1 ... 2.*got 9"),
        ({}, ["--retrieval.neighbors", "2"], "retrieval.neighbors.*did you mean `retrieval.num_neighbours`"),
        ({}, ["--model.config_overrides.chunk_size", "4"], "`chunk_size` of the model is 4, .*/corpus is .* 8 "),
        ({}, ["--model.config_overrides.pad_token_id", "3"], "`pad_token_id` of the model is 3, but .* with 1"),
        ({"model": {"config": "llama", "config_overrides": {}}}, [], "needs a model that reads neighbours.*a llama"),
        ({"training": {"output_dir": "out", "do_predict": True}}, [], "there is no `data.test`"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(make_config, tmp_path, capsys, changes, options, message):
    assert main([make_config(**changes), *options]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(message, last), last
    assert not (tmp_path / "out" / "run.json").exists()


def test_a_corpus_of_another_tokenizer_or_with_too_long_rows_is_refused(make_config, make_run, tmp_path, capsys):
    make_run("causal")  # a tokenizer trained on the same texts in another order
    other = ["--model.tokenizer", str(tmp_path / "model")]
    assert main([make_config(), *other]) == 2
    said = capsys.readouterr().err
    prints = re.search(r"another tokenizer than the model's \(SHA-256 (\w{12}), not (\w{12})\): set `model.tok", said)
    assert prints is not None
    assert prints[1] != prints[2]
    learned = ["--model.config_overrides.position_embedding", "rotary+learned"]
    short = ["--model.config_overrides.max_position_embeddings", "16"]
    assert main([make_config(), *short, *learned]) == 2
    assert "has rows of 32 tokens, more than the model's 16 positions" in capsys.readouterr().err
