"""Documentation that is on this machine anyway: docstrings of installed packages, pages of Debian's documentation.

Sources are parsed, never imported: nothing runs, and the same versions give the same texts in the same order.
"""

from __future__ import annotations

import ast
import gc
import gzip
import hashlib
import importlib.metadata
import importlib.util
import itertools
import logging
import multiprocessing
import os
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

logger = logging.getLogger(__name__)

PACKAGES = ("accelerate", "datasets", "networkx", "numpy", "pandas", "peft", "sympy", "torch", "transformers")
DEBIAN_DOCUMENTATION = Path("/usr/share/doc")

_SKIPPED = re.compile(r"^(tests?|testing|_vendor|vendor|third_party|test_.*\.py|.*_test\.py|conftest\.py)$")
_LEAST_BYTES = 300
_GENERATED, _HEADER = b"automatically generated", 1500  # such files of transformers repeat the one they were made from
_FILES_FOR_ONE_PROCESS = 500
_SYNOPSIS = re.compile(r"^[ \t]*:synopsis:[ \t]*(.+)\n", re.MULTILINE)

_NAMED = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Docstring:
    """One documented thing.

    Args:
        name: dotted name of the module, class or function, or the path of a page.
        package: the installed package, or Debian's.
        module: the unit that is never divided between splits.
        text: the docstring without its indentation, or the page.
        summary: what the thing is in one sentence, if the text says so apart from the rest.
        body: the text without the summary.
    """

    name: str
    package: str
    module: str
    text: str
    summary: str
    body: str


@dataclass(frozen=True)
class Origin:
    """A package that texts came from, as its own metadata describes it."""

    package: str
    version: str
    licence: str


def _split_summary(text: str) -> tuple[str, str]:
    """The first paragraph on one line, and the rest."""
    first, _, rest = text.partition("\n\n")
    return " ".join(first.split()), rest.strip()


def _documented(tree: ast.Module, module: str) -> Iterator[tuple[str, str]]:
    """(name, docstring) of the module and of all its classes and functions, in the order of the source."""
    pending: list[tuple[str, _Documented]] = [(module, tree)]
    while pending:
        name, node = pending.pop()
        if text := ast.get_docstring(node, clean=True):
            yield name, text
        if isinstance(node, ast.Module | ast.ClassDef):  # what a function defines inside is nobody's documentation
            inner = [child for child in node.body if isinstance(child, _NAMED)]
            pending += [(f"{name}.{child.name}", child) for child in reversed(inner)]


def _module_name(root: Path, file: Path) -> str:
    parts = [root.name, *file.relative_to(root).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def package_folder(package: str) -> Path | None:
    """Where an installed package's sources are, found without importing it; None if it is not installed."""
    spec = importlib.util.find_spec(package)
    locations = list(spec.submodule_search_locations or []) if spec is not None else []
    return Path(locations[0]) if locations else None


def file_docstrings(root: Path, file: Path) -> list[Docstring]:
    """The docstrings of one source file of the package in `root`; none if no string in it is long enough to matter."""
    source = file.read_bytes()
    if max(map(len, source.split(b'"""')[1::2]), default=0) < _LEAST_BYTES or _GENERATED in source[:_HEADER]:
        return []  # parsing is nearly all the time that a data set takes
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):  # templates, and code for other versions of Python
        logger.debug("%s cannot be parsed and is left out.", file)
        return []
    module = _module_name(root, file)
    return [
        Docstring(name, root.name, module, text, *_split_summary(text)) for name, text in _documented(tree, module)
    ]


def package_docstrings(root: Path) -> Iterator[Docstring]:
    """All docstrings under a package's folder, by file and then in the order of the source.

    Tests are left out, files generated from others, and files without one docstring of 300 bytes. Large packages are
    parsed by several processes.
    """
    files = [
        file
        for file in sorted(root.rglob("*.py"))
        if not any(_SKIPPED.match(part) for part in file.relative_to(root).parts)
    ]
    read = partial(file_docstrings, root)
    if len(files) < _FILES_FOR_ONE_PROCESS:
        yield from itertools.chain.from_iterable(map(read, files))
        return
    # spawn: the caller may have threads (torch), which a fork would copy in whatever state they are.
    # Without the cyclic collector, which walks every syntax tree again and again; the trees have no cycles.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(4, os.cpu_count() or 1), context, initializer=gc.disable) as pool:
        yield from itertools.chain.from_iterable(pool.map(read, files, chunksize=64))


def debian_pages(root: Path = DEBIAN_DOCUMENTATION) -> Iterator[Docstring]:
    """Pages of Debian's `python3.*-doc`, where installed; the summary is the page's `:synopsis:`."""
    folders = {folder.resolve() for folder in root.glob("python3*/html/_sources") if folder.is_dir()}
    if not folders:
        logger.info("No Debian documentation of Python under %s; it is left out.", root)
    for folder in sorted(folders):
        package = folder.parts[-3]
        for file in sorted([*folder.rglob("*.txt"), *folder.rglob("*.txt.gz")]):
            content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
            text = content.decode("utf-8", errors="replace").strip()
            name = f"{package}/{file.relative_to(folder).as_posix().partition('.')[0]}"
            synopsis = _SYNOPSIS.search(text)
            summary = " ".join(synopsis[1].split()) if synopsis else ""
            yield Docstring(name, package, name, text, summary, _SYNOPSIS.sub("", text).strip())


def origin_of(package: str) -> Origin:
    """Version and licence of an installed distribution, from its own metadata, first line only."""
    metadata = importlib.metadata.metadata(package)
    classifiers = [c.rpartition(" :: ")[2] for c in metadata.get_all("Classifier") or [] if c.startswith("License ::")]
    given = [(metadata.get_all(field) or [""])[0] for field in ("License-Expression", "License")]
    licence = given[0] or ", ".join(classifiers) or given[1] or "unknown"
    return Origin(package, metadata["Version"], licence.strip().splitlines()[0])


def without_duplicates(docstrings: Iterable[Docstring]) -> Iterator[Docstring]:
    """The first of all docstrings whose text, or whose body, is the same but for spaces."""
    seen: set[bytes] = set()
    for docstring in docstrings:
        parts = [docstring.text] + ([docstring.body] if docstring.body else [])
        hashes = {hashlib.sha256(" ".join(part.split()).encode()).digest() for part in parts}
        if seen.isdisjoint(hashes):
            yield docstring
        seen |= hashes
