"""The splits of a run as they are on disk or in a data set: loaded, sliced, sampled, with their own columns."""

from __future__ import annotations

import glob
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict, IterableDatasetDict, load_dataset, load_from_disk

from graft.trainer.arguments import DataArguments, RetrievalArguments
from graft.trainer.configuration_error import ConfigurationError
from graft.trainer.corpus_rows import load_corpora
from graft.trainer.streamed_rows import first_rows, in_memory, is_streamed
from graft.trainer.unreadable_files import first_fault, reason_of

SPLITS = ("train", "validation", "test")
_READERS = {
    ".csv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".md": "text",
    ".parquet": "parquet",
    ".rst": "text",
    ".txt": "text",
}


def _files(split: str, patterns: str | list[str]) -> list[str]:
    """The files that `data.<split>` names, in sorted order within each pattern."""
    found: list[str] = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        matches = [pattern] if Path(pattern).is_file() else sorted(glob.glob(pattern, recursive=True))
        matches = [match for match in matches if Path(match).is_file()]
        if not matches:
            raise ConfigurationError(f"`data.{split}` {pattern!r} names no file.")
        found += matches
    return found


def _load_files(split: str, patterns: str | list[str], streaming: bool = False) -> Any:
    files = _files(split, patterns)
    suffixes = sorted({Path(file).suffix.lower() for file in files})
    if len({_READERS.get(suffix) for suffix in suffixes}) > 1 or suffixes[0] not in _READERS:
        raise ConfigurationError(
            f"The files of `data.{split}` must all be of one kind out of {', '.join(sorted(_READERS))}; got "
            f"{', '.join(suffix or 'no suffix' for suffix in suffixes)}."
        )
    reader = _READERS[suffixes[0]]
    try:
        rows = _read(reader, split, files, streaming)
        if streaming:
            first_rows(rows, 1)  # reads the first file's beginning
        return rows
    except Exception as error:  # what pandas, pyarrow and datasets raise for broken files has no common class
        fault = first_fault(files, lambda file: _read(reader, split, [file]).column_names) or reason_of(error)
        raise ConfigurationError(f"`data.{split}` cannot be read as {reader}: {fault}.") from error


def _read(reader: str, split: str, files: list[str], streaming: bool = False) -> Any:
    """Rows of these files. By `load_dataset` a server would be told of each time a file of this machine is read."""
    readers = {"csv": Dataset.from_csv, "json": Dataset.from_json, "parquet": Dataset.from_parquet}
    if reader == "text":
        return Dataset.from_text(files, split=split, streaming=streaming, sample_by="document")  # a row is a file
    return readers[reader](files, split=split, streaming=streaming)


def not_utf8(data: DataArguments, split: str, error: UnicodeDecodeError) -> ConfigurationError:
    """What to raise for text that is no UTF-8, which shows only when its row is read: it names file and line."""
    files = _files(split, patterns) if (patterns := getattr(data, split)) else []
    fault = first_fault(files, lambda file: _load_files(split, [file]).column_names)
    return ConfigurationError(f"The split {split} holds text that is no UTF-8: {fault or error}.")


def _load_named(data: DataArguments) -> dict[str, Any]:
    """The splits of `data.dataset`: a folder written by `save_to_disk`, a folder of data files, or a Hub id.

    With `data.streaming` all are streams, of a data set that may not fit on this disk.
    """
    assert data.dataset is not None
    saved = Path(data.dataset)
    try:
        if (saved / "dataset_dict.json").is_file() or (saved / "state.json").is_file():
            loaded: Any = load_from_disk(data.dataset)
        else:
            options: dict[str, Any] = {"data_dir": data.data_dir, "revision": data.revision}
            loaded = load_dataset(data.dataset, data.config, streaming=data.streaming, **options)
    except Exception as error:  # offline, unknown id, broken files, scripts: no common class
        reason = " ".join(str(error).split())
        if "scripts are no longer supported" in reason:
            reason += " `datasets` has dropped loading scripts: convert it to Parquet."
        raise ConfigurationError(f"`data.dataset` {data.dataset!r} cannot be loaded: {reason}") from error
    if not isinstance(loaded, DatasetDict | IterableDatasetDict):
        loaded = {"train": loaded}
    named = {split: data.splits.get(split, split) for split in SPLITS}
    if missing := [name for split, name in named.items() if split in data.splits and name not in loaded]:
        raise ConfigurationError(
            f"`data.splits` names {missing[0]!r}, but {data.dataset!r} has the splits {', '.join(loaded)}."
        )
    return {split: loaded[name] for split, name in named.items() if name in loaded}


def _streamed(rows: Any, split: str, data: DataArguments, count: int | None) -> Any:
    """Training rows as a stream, whatever they were loaded as, and the others as rows in memory."""
    if split == "train":
        return rows if is_streamed(rows) else rows.to_iterable_dataset()  # those of `save_to_disk`
    takes_first = data.sample_seed is None and data.test_slice is None
    return in_memory(rows, count if takes_first else None) if is_streamed(rows) else rows


def _sampled(rows: Any, count: int | None, seed: int | None) -> Any:
    """The first `count` rows, or with a seed that many drawn ones in their old order; all for None."""
    if is_streamed(rows):
        return rows if count is None else rows.take(count)
    if count is None or count >= len(rows):
        return rows
    if seed is None:
        return rows.select(range(count))
    return rows.select(np.sort(np.random.default_rng(seed).choice(len(rows), count, replace=False)))


def load_splits(data: DataArguments, retrieval: RetrievalArguments | None = None) -> dict[str, Any]:
    """The splits that the configuration names, sliced and sampled; with `retrieval` those of corpora.

    Raises:
        ConfigurationError: no such file, files of different kinds, an unreadable file or data set, an empty split.
    """
    splits: dict[str, Any]
    if retrieval is not None:
        splits = dict(load_corpora(data, retrieval))
    elif data.dataset is not None:
        splits = _load_named(data)
    else:
        patterns = {split: getattr(data, split) for split in SPLITS}
        streamed = "train" if data.streaming else None
        splits = {split: _load_files(split, files, split == streamed) for split, files in patterns.items() if files}
    counts = {"train": data.max_train_samples, "validation": data.max_eval_samples, "test": data.max_test_samples}
    if data.streaming:
        splits = {split: _streamed(rows, split, data, counts[split]) for split, rows in splits.items()}
    if "test" in splits and data.test_slice is not None:
        start, end = data.test_slice
        splits["test"] = splits["test"].select(list(range(*slice(start, end).indices(len(splits["test"])))))
    splits = {split: _sampled(rows, counts[split], data.sample_seed) for split, rows in splits.items()}
    if empty := [split for split, rows in splits.items() if not first_rows(rows, 1)]:
        raise ConfigurationError(f"The split {empty[0]} has no rows.")
    return splits


def rows_during_training(rows: Any, data: DataArguments) -> Any:
    """The part of the validation rows that is evaluated while training, the same for the same seed."""
    amount = data.eval_during_training
    if amount is None:
        return rows
    count = max(1, round(amount * len(rows))) if isinstance(amount, float) and amount <= 1 else int(amount)
    return _sampled(rows, count, data.sample_seed or 0)
