"""Files of every kind give the same rows; samples and slices are what they say."""

import json

import datasets
import pytest
from datasets import Dataset, DatasetDict

from graft.trainer.arguments import DataArguments
from graft.trainer.configuration_error import ConfigurationError
from graft.trainer.data import prepare_training
from graft.trainer.splits import load_splits, rows_during_training

ROWS = [{"source": f"text {i}", "target": f"summary {i}"} for i in range(10)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def folder(tmp_path):
    rows = Dataset.from_list(ROWS)
    rows.to_json(tmp_path / "rows.jsonl")
    rows.to_csv(tmp_path / "rows.csv")
    rows.to_parquet(tmp_path / "rows.parquet")
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    return tmp_path


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet", "json"])
def test_every_kind_of_file_gives_the_same_rows(folder, suffix):
    splits = load_splits(DataArguments(train=str(folder / f"rows.{suffix}")))
    assert splits["train"].to_list() == ROWS
    assert set(splits) == {"train"}


def test_a_text_file_is_one_row_however_many_lines_it_has(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n\nthree")
    (tmp_path / "b.txt").write_text("four")
    rows = load_splits(DataArguments(test=str(tmp_path / "*.txt")))["test"]
    assert rows["text"] == ["one\ntwo\n\nthree", "four"]


def test_a_list_of_files_is_read_in_its_order(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"source": name}))
    rows = load_splits(DataArguments(train=[str(tmp_path / "b.jsonl"), str(tmp_path / "a.jsonl")]))["train"]
    assert rows["source"] == ["b", "a"]


def test_the_first_rows_or_a_seeded_sample_in_the_old_order(folder):
    data = {"train": str(folder / "rows.jsonl"), "max_train_samples": 4}
    assert load_splits(DataArguments(**data))["train"].to_list() == ROWS[:4]
    sample = load_splits(DataArguments(**data, sample_seed=1))["train"].to_list()
    assert sample == load_splits(DataArguments(**data, sample_seed=1))["train"].to_list()
    assert sample == [row for row in ROWS if row in sample]
    assert sample != ROWS[:4]
    assert len(sample) == 4


@pytest.mark.parametrize(("start", "end"), [(2, 5), (7, None), (-3, None), (0, -1), (None, 2)])
def test_the_test_slice_has_the_meaning_it_has_in_python(folder, start, end):
    splits = load_splits(DataArguments(test=str(folder / "rows.jsonl"), test_slice=[start, end]))
    assert splits["test"].to_list() == ROWS[start:end]


@pytest.mark.parametrize(
    ("amount", "expected"), [(None, 10), (3, 3), (0.5, 5), (0.01, 1), (99, 10), (1.0, 10), (1, 1)]
)
def test_part_of_the_rows_is_a_number_or_a_share(amount, expected):
    rows = Dataset.from_list(ROWS)
    data = DataArguments(train="x", eval_during_training=amount)
    part = rows_during_training(rows, data)
    assert len(part) == expected
    assert part.to_list() == rows_during_training(rows, data).to_list()


def test_a_saved_dataset_is_read_with_its_own_names_of_splits(tmp_path):
    rows = Dataset.from_list(ROWS)
    DatasetDict({"learn": rows, "dev": rows.select([1]), "test": rows.select([2])}).save_to_disk(tmp_path / "saved")
    names = {"train": "learn", "validation": "dev"}
    splits = load_splits(DataArguments(dataset=str(tmp_path / "saved"), splits=names))
    assert {name: len(split) for name, split in splits.items()} == {"train": 10, "validation": 1, "test": 1}
    with pytest.raises(
        ConfigurationError, match="`data.splits` names 'nothing', but .* has the splits learn, dev, test"
    ):
        load_splits(DataArguments(dataset=str(tmp_path / "saved"), splits={"train": "nothing"}))


def test_a_folder_of_data_files_is_a_dataset(folder, tmp_path):
    (tmp_path / "d").mkdir()
    Dataset.from_list(ROWS).to_parquet(tmp_path / "d" / "train.parquet")
    assert load_splits(DataArguments(dataset=str(tmp_path / "d")))["train"].to_list() == ROWS


def test_a_dataset_script_is_refused_with_the_way_out(tmp_path):
    script = tmp_path / "old" / "old.py"
    script.parent.mkdir()
    script.write_text("raise SystemExit('executed')")
    with pytest.raises(ConfigurationError, match="convert it to Parquet"):
        load_splits(DataArguments(dataset=str(script)))


def test_missing_mixed_unknown_broken_and_empty_files_are_refused(folder):
    cases = {
        "absent.jsonl": "`data.train` '.*absent.jsonl' names no file",
        "rows.*": "must all be of one kind .* got .csv, .json",
        "model.bin": "must all be of one kind .* got .bin",
        "broken.parquet": "`data.train` cannot be read as parquet",
    }
    (folder / "model.bin").write_bytes(b"x")
    (folder / "broken.parquet").write_bytes(b"no parquet")
    for pattern, message in cases.items():
        with pytest.raises(ConfigurationError, match=message):
            load_splits(DataArguments(train=str(folder / pattern)))
    with pytest.raises(ConfigurationError, match="The split test has no rows"):
        load_splits(DataArguments(test=str(folder / "rows.jsonl"), test_slice=[50, None]))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("b.jsonl", b'{"source": "x"}\n{"source": broken\n', r"b.jsonl, line 2, column 12: Expecting value"),
        ("b.jsonl", b'{"source": "x"}\n5\n', "b.jsonl, line 2: a row must be an object with columns, got 5"),
        ("b.jsonl", b'{"other": "x"}\n', "b.jsonl has the columns other, but .*a.jsonl has source"),
        ("b.json", b'[{"source": "x"},\n {"source" 3}]', "b.json, line 2, column 12: Expecting ':' delimiter"),
        ("b.csv", b"source\nx,y\nz,y,z\n", r"b.csv: .*line 3"),
    ],
)
def test_the_file_and_the_line_that_cannot_be_read_are_named(tmp_path, name, content, message):
    first = {".csv": "source\nx\n"}.get(name[-4:], '{"source": "x"}\n')
    (tmp_path / f"a.{name.partition('.')[2]}").write_text(first)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigurationError, match=message) as caught:
        load_splits(DataArguments(train=str(tmp_path / f"*.{name.partition('.')[2]}")))
    assert "{'" not in str(caught.value)


def test_text_that_is_no_utf8_is_named_with_its_line(tmp_path, configure, byte_tokenizer):
    (tmp_path / "a.jsonl").write_bytes(b'{"source": "x", "target": "y"}\n{"source": "\xff", "target": "y"}\n')
    configuration = configure(train=str(tmp_path / "a.jsonl"), validation=None)
    with pytest.raises(ConfigurationError, match="The split train holds text that is no UTF-8: .*a.jsonl, line 2: "):
        prepare_training(load_splits(configuration.data)["train"], byte_tokenizer, configuration, 64)
