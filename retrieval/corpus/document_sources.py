"""Where documents come from: a folder of text, JSON lines, Parquet, rows of a data set; always in the same order."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import pyarrow.parquet as pq

from graft.atomic_files import sha256

Errors = Literal["strict", "replace", "skip"]
ERRORS = ("strict", "replace", "skip")
KINDS = "a folder, a .txt, .md, .jsonl or .parquet file"


@dataclass(frozen=True)
class Document:
    """A named text; `text` is None if it could not be decoded and is to be counted as skipped.

    A source that knows the tokens already gives them as `ids`, and no text.
    """

    name: str
    text: str | None
    ids: np.ndarray | None = None


class DocumentSource(Protocol):
    """Documents in an order that never changes, from any of them on."""

    def documents(self, start: int = 0) -> Iterator[Document]:
        """The documents from number `start` on."""
        ...

    def fingerprint(self) -> dict[str, Any]:
        """What tells this source from another: its kind, and hashes of names and content."""
        ...

    def num_bytes(self) -> int:
        """About how many bytes of text there are, for the estimate of space."""
        ...


class TextFolder:
    """The files of a folder that match a glob, each one document, in the order of their relative paths as bytes.

    Args:
        folder: where they are.
        glob: as in `pathlib`; "**/*.txt" takes sub-folders too.
        errors: of a file that is not UTF-8: "strict" raises, "replace" puts U+FFFD, "skip" leaves it out, counted.

    Raises:
        FileNotFoundError: nothing matches.
    """

    def __init__(self, folder: str | Path, glob: str = "**/*.txt", errors: Errors = "strict") -> None:
        self.folder, self.glob, self.errors = Path(folder), glob, _known(errors)
        found = [path for path in self.folder.glob(glob) if path.is_file()]
        if not found:
            raise FileNotFoundError(f"no file in `folder` {self.folder} matches `glob` {glob!r}.")
        self.names = sorted((path.relative_to(self.folder).as_posix() for path in found), key=_bytes)

    def documents(self, start: int = 0) -> Iterator[Document]:
        """The files from number `start` on."""
        for name in self.names[start:]:
            yield Document(name, _decode((self.folder / name).read_bytes(), str(self.folder / name), self.errors))

    def fingerprint(self) -> dict[str, Any]:
        """Kind, number, and hashes of the relative paths and of what the files hold."""
        content = (sha256(self.folder / name) for name in self.names)
        return {"kind": "folder", "errors": self.errors, **_identity(self.names, content)}

    def num_bytes(self) -> int:
        """The size of all files."""
        return sum((self.folder / name).stat().st_size for name in self.names)


class JSONLines:
    """Files with one JSON object per line; a document is called by its file and line, counted from 1.

    Args:
        paths: one file or several, read in the order of their names.
        text_field: the key that holds the text.
        errors: of a line that is not UTF-8; a line that is no object with a text under the key raises or is skipped.
    """

    def __init__(
        self, paths: str | Path | Sequence[str | Path], text_field: str = "text", errors: Errors = "strict"
    ) -> None:
        self.paths, self.text_field, self.errors = _existing(paths), text_field, _known(errors)

    def documents(self, start: int = 0) -> Iterator[Document]:
        """The lines from number `start` on, empty lines not counted."""
        seen = 0
        for path in self.paths:
            with path.open("rb") as file:
                for number, line in enumerate(file, 1):
                    if not line.strip():
                        continue
                    seen += 1
                    if seen > start:
                        yield Document(f"{path.name}:{number}", self._text(line, f"{path}, line {number}"))

    def _text(self, line: bytes, where: str) -> str | None:
        decoded = _decode(line, where, self.errors)
        if decoded is None:
            return None
        try:
            text = json.loads(decoded)[self.text_field]
            if not isinstance(text, str):
                raise TypeError(f"it is {type(text).__name__}")
        except (ValueError, KeyError, TypeError) as error:
            if self.errors == "skip":
                return None
            raise ValueError(
                f'{where}: expected a JSON object with a text under {self.text_field!r} ({error!r}); errors="skip" '
                "leaves such lines out."
            ) from error
        return text

    def fingerprint(self) -> dict[str, Any]:
        """Kind, key, and hashes of the names and of what the files hold."""
        identity = _identity([path.name for path in self.paths], map(sha256, self.paths))
        return {"kind": "jsonl", "errors": self.errors, "text_field": self.text_field, **identity}

    def num_bytes(self) -> int:
        """The size of all files."""
        return sum(path.stat().st_size for path in self.paths)


class ParquetFiles:
    """Parquet files; a document is a row, called by its file and row number.

    Args:
        paths: one file or several, read in the order of their names.
        text_field: the column of texts; nulls are skipped and counted.

    Raises:
        ValueError: a file is no Parquet, or lacks the column.
    """

    def __init__(self, paths: str | Path | Sequence[str | Path], text_field: str = "text") -> None:
        self.paths, self.text_field = _existing(paths), text_field
        for path in self.paths:
            try:
                columns = pq.read_schema(path).names
            except Exception as error:
                raise ValueError(f"{path} is not a Parquet file ({error}).") from error
            if text_field not in columns:
                raise ValueError(f"{path} has columns {columns}, `text_field` {text_field!r} is none of them.")

    def documents(self, start: int = 0) -> Iterator[Document]:
        """The rows from number `start` on; row groups before it are not read."""
        seen = 0
        for path in self.paths:
            with pq.ParquetFile(path) as file:
                first = 0
                for group in range(file.num_row_groups):
                    rows = file.metadata.row_group(group).num_rows
                    if seen + rows > start:
                        texts = file.read_row_group(group, [self.text_field])[self.text_field].to_pylist()
                        for index in range(max(start - seen, 0), rows):
                            yield Document(f"{path.name}:{first + index}", texts[index])
                    seen, first = seen + rows, first + rows

    def fingerprint(self) -> dict[str, Any]:
        """Kind, column, and hashes of the names and of what the files hold."""
        identity = _identity([path.name for path in self.paths], map(sha256, self.paths))
        return {"kind": "parquet", "text_field": self.text_field, **identity}

    def num_bytes(self) -> int:
        """The size of the column before Parquet's compression, as the files state it."""
        total = 0
        for path in self.paths:
            description = pq.read_metadata(path)
            groups = [description.row_group(index) for index in range(description.num_row_groups)]
            columns = [group.column(index) for group in groups for index in range(group.num_columns)]
            total += sum(c.total_uncompressed_size for c in columns if c.path_in_schema == self.text_field)
        return total


class DatasetRows:
    """Rows of a `datasets.Dataset`, or any sequence of mappings; a document is called by its row number.

    Args:
        rows: indexable, each row a mapping.
        text_field: the key that holds the text; None as a text is skipped and counted.

    Raises:
        ValueError: the rows are none, or lack the key.
    """

    def __init__(self, rows: Any, text_field: str = "text") -> None:
        self.rows, self.text_field = rows, text_field
        if not len(rows):
            raise ValueError("`rows` must hold at least one row, got none.")
        if text_field not in rows[0]:
            raise ValueError(f"`rows` have {sorted(rows[0])}, `text_field` {text_field!r} is none of them.")

    def documents(self, start: int = 0) -> Iterator[Document]:
        """The rows from number `start` on."""
        for index in range(start, len(self.rows)):
            yield Document(f"row:{index}", self.rows[index][self.text_field])

    def fingerprint(self) -> dict[str, Any]:
        """Kind, key, and the data set's own fingerprint, or else the hash of the texts."""
        known = getattr(self.rows, "_fingerprint", None)
        if known is None:
            known = _joined(json.dumps(row[self.text_field]) for row in self.rows)
        return {"kind": "rows", "text_field": self.text_field, "count": len(self.rows), "sha256": known}

    def num_bytes(self) -> int:
        """Estimated from at most 1,000 rows spread over all."""
        step = max(1, len(self.rows) // 1000)
        sample = [len((self.rows[i][self.text_field] or "").encode()) for i in range(0, len(self.rows), step)]
        return sum(sample) * len(self.rows) // len(sample)


def open_source(
    path: str | Path, glob: str = "**/*.txt", text_field: str = "text", errors: Errors = "strict"
) -> DocumentSource:
    """The source that a path names: a folder of text, one .txt or .md file, a .jsonl file, or a .parquet file.

    Raises:
        FileNotFoundError: there is nothing at `path`, or nothing that matches `glob`.
        ValueError: it is another kind of file.
    """
    path = Path(path)
    if path.is_dir():
        return TextFolder(path, glob, errors)
    if not path.exists():
        raise FileNotFoundError(f"`path` {path} does not exist; give {KINDS}.")
    if path.suffix in (".txt", ".md"):
        return TextFolder(path.parent, escape(path.name), errors)
    if path.suffix in (".jsonl", ".ndjson"):
        return JSONLines(path, text_field, errors)
    if path.suffix == ".parquet":
        return ParquetFiles(path, text_field)
    raise ValueError(f"`path` must be {KINDS}, got {path}.")


def _existing(paths: str | Path | Sequence[str | Path]) -> list[Path]:
    given = [Path(paths)] if isinstance(paths, str | Path) else [Path(path) for path in paths]
    if not given:
        raise FileNotFoundError("`paths` must name at least one file, got none.")
    if absent := [str(path) for path in given if not path.is_file()]:
        raise FileNotFoundError(f"`paths` names files that do not exist: {', '.join(absent)}.")
    return sorted(given, key=lambda path: _bytes(path.as_posix()))


def _known(errors: Errors) -> Errors:
    if errors not in ERRORS:
        raise ValueError(f"`errors` must be one of {ERRORS}, got {errors!r}.")
    return errors


def _decode(content: bytes, where: str, errors: Errors) -> str | None:
    try:
        return content.decode("utf-8", "replace" if errors == "replace" else "strict")
    except UnicodeDecodeError as error:
        if errors == "skip":
            return None
        reason = f'{error.reason}, in {where} at byte {error.start}; errors="replace" or "skip" goes on'
        raise UnicodeDecodeError(error.encoding, error.object, error.start, error.end, reason) from error


def _bytes(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")


def _identity(names: Sequence[str], content: Iterable[str]) -> dict[str, Any]:
    """How many files, the hash of their names, and that of the hashes of their content."""
    return {"count": len(names), "names": _joined(names), "sha256": _joined(content)}


def _joined(texts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(_bytes(text) + b"\0")
    return digest.hexdigest()
