"""Which of several data files cannot be read, and in which line, for the error that ends a run."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path


def first_fault(files: Sequence[str], columns_of: Callable[[str], list[str]]) -> str:
    """The first file that is at fault, its line where it has lines of JSON, and what is wrong there; "" for none.

    Args:
        files: of one split; they are read again, so ask only where reading them has failed.
        columns_of: reads one file alone and gives its columns.
    """
    first: list[str] | None = None
    for file in files:
        if reason := _fault_of_json(Path(file)):
            return f"{file}, {reason}"
        try:
            columns = columns_of(file)
        except Exception as error:  # what pandas, pyarrow and datasets raise for broken files has no common class
            return f"{file}: {reason_of(error) or 'it holds no row'}"
        if first is None:
            first = columns
        if sorted(columns) != sorted(first):
            return f"{file} has the columns {', '.join(columns)}, but {files[0]} has {', '.join(first)}"
    return ""


def reason_of(error: BaseException) -> str:
    """What the innermost cause says, on one line."""
    return " ".join(str(error.__cause__ or error).split())


def _fault_of_json(file: Path) -> str:
    if file.suffix.lower() not in (".json", ".jsonl"):
        return ""
    if file.suffix.lower() == ".json" and file.read_bytes().lstrip()[:1] == b"[":
        return _fault(file.read_bytes(), 1, list)  # one array
    with file.open("rb") as lines:
        faults = (_fault(line, number, dict) for number, line in enumerate(lines, start=1) if line.strip())
        return next(filter(None, faults), "")


def _fault(text: bytes, line: int, kind: type) -> str:
    """What is wrong with JSON that begins in `line` and must be of a `kind`."""
    try:
        value = json.loads(text.decode("utf-8"))
    except json.JSONDecodeError as error:
        return f"line {line + error.lineno - 1}, column {error.colno}: {error.msg}"
    except UnicodeDecodeError as error:
        return f"line {line}: {error}"
    return "" if isinstance(value, kind) else f"line {line}: a row must be an object with columns, got {value!r}"
