"""A data set of documentation: (body, summary) pairs, and long documents, split so that no text is on two sides.

Nothing random and nothing of today enters it: the same installed packages and the same seed give the same bytes.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from graft.atomic_files import MANIFEST, new_folder, read_manifest, write_manifest
from graft.trainer.configuration_error import ConfigurationError
from graft.trainer.documentation import (
    DEBIAN_DOCUMENTATION,
    PACKAGES,
    Docstring,
    Origin,
    debian_pages,
    origin_of,
    package_docstrings,
    package_folder,
    without_duplicates,
)

logger = logging.getLogger(__name__)

KIND = "graft documentation dataset"
SPLITS = ("train", "validation", "test")
_MOST_SUMMARY_WORDS = 60  # a longer first paragraph is a text of its own, no summary

Row = dict[str, Any]


@dataclass(frozen=True)
class DocumentationSettings:
    """What the data set holds.

    Args:
        packages: installed packages to read; those that are absent are left out, with a log line.
        debian: folder of Debian's documentation.
        seed: of the split.
        held_out: share of the modules in validation, and the same in test.
        least_body_words: of a pair.
        least_document_words: of a long document.
    """

    packages: tuple[str, ...] = PACKAGES
    debian: Path = DEBIAN_DOCUMENTATION
    seed: int = 0
    held_out: float = 0.1
    least_body_words: int = 60
    least_document_words: int = 2000


def split_of(module: str, settings: DocumentationSettings) -> str:
    """The split a module belongs to: a hash of seed and name, so that another package changes nothing for it."""
    digest = hashlib.sha256(f"{settings.seed}:{module}".encode()).digest()
    place = int.from_bytes(digest[:8], "big") / 2**64
    return "test" if place < settings.held_out else "validation" if place < 2 * settings.held_out else "train"


def pairs_of(docstrings: Sequence[Docstring], least_body_words: int) -> list[Row]:
    """Rows (id, package, module, source, target, words): a body of so many words and its summary of at least three."""
    rows = []
    for docstring in docstrings:
        words = len(docstring.body.split())
        if words >= least_body_words and 3 <= len(docstring.summary.split()) <= _MOST_SUMMARY_WORDS:
            texts = {"source": docstring.body, "target": docstring.summary, "words": words}
            rows.append({"id": docstring.name, "package": docstring.package, "module": docstring.module} | texts)
    return rows


def documents_of(docstrings: Sequence[Docstring], least_words: int) -> list[Row]:
    """Rows (id, package, text, words): all docstrings of one module under headings, where that is long enough."""
    rows = []
    for module, group in itertools.groupby(docstrings, key=lambda docstring: docstring.module):
        members = list(group)
        sections = [f"{member.name}\n{'=' * len(member.name)}\n\n{member.text}" for member in members]
        # A page has its own headings.
        text = "\n\n\n".join(sections) if members[0].name != module or len(members) > 1 else members[0].text
        if (words := len(text.split())) >= least_words:
            rows.append({"id": module, "package": members[0].package, "text": text, "words": words})
    return rows


def collect(settings: DocumentationSettings) -> tuple[list[Docstring], list[Origin]]:
    """All texts without duplicates, and where they come from.

    Raises:
        ConfigurationError: none of the packages is installed.
    """
    folders = {package: package_folder(package) for package in sorted(settings.packages)}
    for package in [package for package, folder in folders.items() if folder is None]:
        logger.info("The package %s is not installed; its documentation is left out.", package)
    present = {package: folder for package, folder in folders.items() if folder is not None}
    if not present:
        raise ConfigurationError(f"None of the packages {', '.join(sorted(settings.packages))} is installed.")
    texts = itertools.chain(*map(package_docstrings, present.values()), debian_pages(settings.debian))
    docstrings = list(without_duplicates(texts))
    origins = [origin_of(package) for package in present]
    debian = sorted({docstring.package for docstring in docstrings} - set(present))
    origins += [Origin(f"{package}-doc (Debian)", package, "PSF-2.0") for package in debian]
    return docstrings, origins


def _check_output(output: Path) -> None:
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    try:
        kind = read_manifest(output, verify=False).get("kind") if output.is_dir() else None
    except (FileNotFoundError, ValueError):
        kind = None
    if kind != KIND:
        raise ConfigurationError(
            f"`output` {str(output)!r} exists and is no documentation data set (it has no {MANIFEST} that says so); "
            "choose a new or empty folder."
        )


def _write_rows(path: Path, rows: list[Row], texts: tuple[str, ...]) -> None:
    types = [(name, pa.int64() if name == "words" else pa.string()) for name in texts]
    parquet.write_table(pa.Table.from_pylist(rows, schema=pa.schema(types)), path, compression="zstd")


def build_documentation_dataset(output: str | Path, settings: DocumentationSettings | None = None) -> dict[str, int]:
    """Write the data set into `output`, whole or not at all, and return the number of rows of each file.

    Files: {train,validation,test}.parquet (pairs), documents-{train,validation,test}.parquet, README.md and
    manifest.json. A file that would have no rows is not written, since `datasets` cannot read it. An earlier
    data set of ours in `output` is replaced once the new one is complete.

    Raises:
        ConfigurationError: `output` holds something else, or no package is installed.
    """
    settings, output = settings or DocumentationSettings(), Path(output)
    _check_output(output)
    docstrings, origins = collect(settings)
    files: dict[str, list[Row]] = {}
    for split in SPLITS:
        mine = [docstring for docstring in docstrings if split_of(docstring.module, settings) == split]
        files[split] = pairs_of(mine, settings.least_body_words)
        files[f"documents-{split}"] = documents_of(mine, settings.least_document_words)
    pair_columns = ("id", "package", "module", "source", "target", "words")
    with new_folder(output, replace=True) as folder:
        for name, rows in files.items():
            if not rows:
                logger.warning("%s.parquet would have no rows and is not written.", name)
                continue
            columns = ("id", "package", "text", "words") if name.startswith("documents-") else pair_columns
            _write_rows(folder / f"{name}.parquet", rows, columns)
        (folder / "README.md").write_text(data_card(files, origins, settings), encoding="utf-8", newline="\n")
        write_manifest(folder, {"kind": KIND, "seed": settings.seed})
    return {name: len(rows) for name, rows in files.items()}


def data_card(files: dict[str, list[Row]], origins: Sequence[Origin], settings: DocumentationSettings) -> str:
    """What is in the folder, how long the texts are, where they come from and under which licences."""
    rows = []
    for name, contents in files.items():
        words = sorted(row["words"] for row in contents)
        middle = round(statistics.median(words)) if words else 0
        rows.append(f"| {name}.parquet | {len(words):,} | {middle:,} | {words[-1] if words else 0:,} |")
    counts = dict.fromkeys([origin.package for origin in origins], 0)
    for contents in files.values():
        for row in contents:
            counts[row["package"]] = counts.get(row["package"], 0) + 1
    sources = [
        f"| {origin.package} | {origin.version} | {origin.licence} | {counts.get(origin.package, 0):,} |"
        for origin in origins
    ]
    return f"""# Documentation of installed packages

Built on this machine by `scripts/build_documentation_dataset.py` (seed {settings.seed}). The texts belong to the
packages named below and stay under their licences; the folder is made for use here, not for publishing.

- `train`, `validation`, `test`: pairs. `source` is a docstring without its first paragraph, at least
  {settings.least_body_words} words; `target` is that paragraph, 3 to {_MOST_SUMMARY_WORDS} words. Of a page of
  Python's manual, `target` is its synopsis.
- `documents-*`: all docstrings of one module, in the order of its source, each under its name as a heading; at least
  {settings.least_document_words:,} words. A page of Python's manual is a document of its own.

| file | rows | median words | most words |
| --- | ---: | ---: | ---: |
{chr(10).join(rows)}

A module lies in one split only, pairs and documents alike, and of docstrings that repeat word for word only the
first is kept, so no text is on two sides. Docstrings follow templates and many differ in little (model families of
transformers above all): expect easy scores, and compare them with each other only. The language is English, with code
in between.

| package | version | licence | rows |
| --- | --- | --- | ---: |
{chr(10).join(sources)}
"""
