"""The paper's data sets are read from files shaped like those on the Hub, and every recipe of configs/paper starts."""

import json
import zipfile
from pathlib import Path

import pytest
from datasets import Dataset, load_dataset
from transformers import BartConfig, BartForConditionalGeneration

from graft.scripts.prepare_paper_dataset import main as prepare
from graft.scripts.run import main as run
from graft.trainer.config_file import read_configuration
from graft.trainer.configuration_error import ConfigurationError
from graft.trainer.paper_datasets import PAPER_DATASETS, SCROLLS, prepare_paper_dataset, squad_rows

RECIPES = Path(__file__).parents[2] / "configs" / "paper"
DOCUMENT = "The report tells of nine bridges.\n\nIt ends here."
QUESTION = "How many bridges?"
CHOICES = f"{QUESTION}\n\n (A) One\n (B) Two\n (C) Nine\n (D) Ten"


def scrolls_zip(path, name):
    before = {"quality": CHOICES}.get(name, QUESTION)
    text = DOCUMENT if name in ("gov_report", "summ_screen_fd") else f"{before}\n\n{DOCUMENT}"
    with zipfile.ZipFile(path, "w") as archive:
        for split in ("train", "validation", "test"):
            rows = [{"id": f"{split}-{n}", "pid": f"{split}-{n}_0", "input": text, "output": "nine"} for n in range(3)]
            archive.writestr(f"{name}/{split}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def hub_folder(folder, name):
    squad = {"id": "a", "title": "T", "context": DOCUMENT, "question": QUESTION}
    squad |= {"answers": {"text": ["nine", "nine", "9"], "answer_start": [20, 20, 20]}}
    context = {"title": ["Other", "Roads", "Bridges"], "sentences": [["No."], ["There are ", "roads."], ["Nine."]]}
    facts = {"title": ["Bridges", "Roads", "Bridges"], "sent_id": [0, 0, 0]}
    hotpot = {"id": "a", "question": QUESTION, "answer": "nine", "type": "bridge", "level": "easy"}
    hotpot |= {"supporting_facts": facts, "context": context}
    first = squad if name.startswith("squad") else hotpot
    rows = [{**first, "id": f"{n}"} | ({"context": f"{n} {DOCUMENT}"} if first is squad else {}) for n in range(12)]
    for split in ("train", "validation"):
        Dataset.from_list(rows).to_parquet(folder / f"{split}.parquet")
    return str(folder)


def source_of(folder, name):
    folder.mkdir(parents=True, exist_ok=True)
    return scrolls_zip(folder / f"{name}.zip", name) if name in SCROLLS else hub_folder(folder, name)


def prepared(tmp_path, name):
    prepare_paper_dataset(name, tmp_path / "out", source_of(tmp_path / "source", name))
    return load_dataset("parquet", data_files=str(tmp_path / "out" / "train.parquet"), split="train").to_list()


@pytest.mark.parametrize("name", ["gov_report", "qmsum", "quality"])
def test_a_scrolls_row_is_split_between_question_and_document(tmp_path, name):
    row = prepared(tmp_path, name)[0]
    assert row["document"] == DOCUMENT
    assert row.get("question") == {"gov_report": None, "qmsum": QUESTION, "quality": CHOICES}[name]
    assert (row["id"], row["answer"]) == ("train-0", "nine")


def test_a_scrolls_row_without_a_blank_line_is_named():
    with pytest.raises(ConfigurationError, match="The row 'x' has no blank line between question and document"):
        SCROLLS["qasper"]({"id": "x", "input": "no document", "output": "?"})


def test_distractors_stand_behind_the_passage_or_around_it(tmp_path):
    alone, behind, around = (
        prepared(tmp_path / name, name)
        for name in ("squad", "squad_ordered_distractors", "squad_shuffled_distractors")
    )
    for number in range(12):
        own = alone[number]["document"]
        assert own == f"{number} {DOCUMENT}"
        assert behind[number]["document"].startswith(own)
        assert sum(f"{n} {DOCUMENT}" in f"\n{behind[number]['document']}" for n in range(12)) >= 10
        assert own in around[number]["document"]
    assert any(not around[n]["document"].startswith(alone[n]["document"]) for n in range(12))
    assert alone[0]["answer"] == ["nine", "9"]
    few = [{"id": "a", "context": "b", "question": "c", "answers": {"text": ["d"]}}]
    assert list(squad_rows(few, True))[0]["document"] == "b"


def test_hotpotqa_keeps_both_gold_passages_or_the_second(tmp_path):
    assert prepared(tmp_path / "both", "hotpotqa")[0]["document"] == "Nine.\nThere are roads."
    assert prepared(tmp_path / "second", "hotpotqa_second_only")[0]["document"] == "There are roads."


def test_a_missing_download_is_answered_with_its_command(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert prepare(["qasper"]) == 2
    command = "hf download tau/scrolls qasper.zip --repo-type dataset --local-dir .cache/scrolls"
    assert command in capsys.readouterr().err


def test_there_is_a_recipe_for_each_data_set():
    assert {path.stem for path in RECIPES.glob("*.json")} == {*PAPER_DATASETS, "base"}


@pytest.fixture(scope="module")
def tiny_bart(tmp_path_factory, tokenizers):
    folder = tmp_path_factory.mktemp("bart")
    sizes = {"vocab_size": 320, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1}
    sizes |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 128}
    BartForConditionalGeneration(BartConfig(**sizes)).save_pretrained(folder)
    tokenizers["byte_level"].save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", PAPER_DATASETS)
def test_a_recipe_reads_what_was_prepared_for_it(tmp_path, tiny_bart, name, capsys):
    recipe = [RECIPES / "base.json", RECIPES / f"{name}.json"]
    whole = read_configuration(recipe)
    assert whole.data.train == f".cache/paper/{name}/train.parquet"
    assert whole.training["eval_steps"] * whole.training["num_train_epochs"] == pytest.approx(0.5, abs=1e-4)
    counts = prepare_paper_dataset(name, tmp_path / "out", source_of(tmp_path / "source", name))
    assert all(counts.values())
    files = [f"--data.{split}={tmp_path / 'out' / split}.parquet" for split in ("train", "validation")]
    small = ["--data.max_target_length", "16", "--generation.max_new_tokens", "8", "--training.use_cpu"]
    options = [*files, *small, f"--model.name={tiny_bart}", f"--training.output_dir={tmp_path / 'run'}"]
    assert run([*map(str, recipe), *options, "--dry-run"]) == 0
    plan = capsys.readouterr().out
    assert "nine" in plan
    assert ("How many bridges?" in plan) == (name not in ("gov_report", "summ_screen_fd"))
