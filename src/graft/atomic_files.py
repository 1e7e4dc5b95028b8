"""Files and folders that are either whole or absent: written under a temporary name, then renamed.

A reader, or a job that starts again after a kill, never meets half a file. What belongs together carries a manifest
with sizes and SHA-256 sums, checked before anything is read.
"""

import hashlib
import json
import mmap
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path, PureWindowsPath
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

MANIFEST = "manifest.json"
MAPPED_BYTES = 16 * 2**20
"""Of a file whose checksum is taken, at a time."""
THREADS = 8
"""At most; more would wait for the disk."""


def _temporary_name(path: Path) -> Path:
    """A name beside `path` (a rename must not cross file systems), hidden, used by nobody else."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")


@contextmanager
def new_file(path: str | Path) -> Iterator[Path]:
    """Give a temporary path to write to; it becomes `path` at the end of the `with`, or vanishes after an exception.

    Folders above `path` are made. A file already at `path` is replaced in one step.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary_name(path)
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())  # the content reaches the disk before the name does
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(path: str | Path, replace: bool = False) -> Iterator[Path]:
    """Give a temporary folder to fill; it becomes `path` at the end of the `with`, or vanishes after an exception.

    Args:
        path: where the folder shall be; an empty folder there counts as absent.
        replace: take the place of what is at `path`, which is deleted only once the new folder stands there.

    Raises:
        FileExistsError: something is at `path` and `replace` is false.
    """
    path = Path(path)
    occupied = path.exists() and not (path.is_dir() and not any(path.iterdir()))
    if occupied and not replace:
        raise FileExistsError(
            f"`path` {path} exists and is not an empty folder; choose another (in Python: or replace=True)."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, previous = _temporary_name(path), _temporary_name(path)
    temporary.mkdir()
    try:
        yield temporary
        if path.exists():
            os.replace(path, previous)
        os.replace(temporary, path)
    except BaseException:
        if previous.exists() and not path.exists():
            os.replace(previous, path)
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        _delete(previous)


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> Path:
    """Write `text` in UTF-8 with Unix line ends; the file is whole or untouched."""
    with new_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")
    return Path(path)


def write_json(path: str | Path, value: Any) -> Path:
    """Write `value` as JSON that people can read: indented, keys in their order, no NaN (which is no JSON)."""
    return write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def sha256(path: str | Path) -> str:
    """SHA-256 of a file's content in hexadecimal; mapped in pieces, it is not copied and may be larger than memory."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        for start in range(0, size, MAPPED_BYTES):
            length = min(MAPPED_BYTES, size - start)
            with mmap.mmap(file.fileno(), length, access=mmap.ACCESS_READ, offset=start) as piece:
                digest.update(piece)
    return digest.hexdigest()


def side_by_side(call: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """`call` of each item, in their order, several at a time: for calls such as `sha256`, which let others run."""
    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as threads:
        yield from threads.map(call, items)


def write_manifest(folder: str | Path, details: Mapping[str, Any]) -> Path:
    """Write `manifest.json`: `details`, and the size and SHA-256 of every file under `folder`.

    Call it last, on a folder that is complete; `details` hold what a reader must know first (shapes, versions).
    """
    folder = Path(folder)
    names = _names(folder)
    sums = side_by_side(sha256, [folder / name for name in names])
    files = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": digest}
        for name, digest in zip(names, sums, strict=True)
    }
    return write_json(folder / MANIFEST, {"details": dict(details), "files": files})


def read_manifest(folder: str | Path, verify: bool = True) -> dict[str, Any]:
    """Return the `details` that `write_manifest` was given, after checking that the files are the ones it listed.

    Args:
        folder: holds `manifest.json`. Files it does not list are left alone.
        verify: also compare SHA-256 sums, which reads every file once; otherwise names and sizes only.

    Raises:
        FileNotFoundError: there is no manifest.
        ValueError: the manifest is no such JSON, or a listed file is missing or differs; names it.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {MANIFEST}: it was not written by graft, or not to its end.")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        details, files = dict(manifest["details"]), dict(manifest["files"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a manifest ({error}).") from error
    for name, expected in files.items():
        _check_listed(path.parent, name, expected)
    if verify:
        sums = side_by_side(sha256, [path.parent / name for name in files])
        for (name, expected), digest in zip(files.items(), sums, strict=True):
            if digest != expected["sha256"]:
                raise ValueError(f"{path.parent / name} is damaged: its SHA-256 differs from the one in its manifest.")
    return details


def listed_files(folder: str | Path) -> list[str]:
    """Names, relative to `folder`, of the files that a manifest lists which `read_manifest` has accepted."""
    return list(json.loads((Path(folder) / MANIFEST).read_text(encoding="utf-8"))["files"])


def leaves_folder(name: str) -> bool:
    """Whether a file named so, relative to a folder, would lie outside of it, on any system.

    Its name decides, and not where a link leads: the cache of the Hub keeps a repository's files behind links.
    """
    named = PureWindowsPath(name)  # which splits at both slashes
    return bool(named.drive or named.root or ".." in named.parts)


def _check_listed(folder: Path, name: str, expected: Mapping[str, Any]) -> None:
    path = folder / name
    if leaves_folder(name):
        raise ValueError(f"{folder / MANIFEST} lists {name!r}, which lies outside its folder.")
    if not path.is_file():
        raise ValueError(f"{folder} lacks {name!r}, which its manifest lists.")
    if (size := path.stat().st_size) != expected["bytes"]:
        raise ValueError(f"{path} has {size} bytes, its manifest says {expected['bytes']}.")


def _names(folder: Path) -> list[str]:
    files = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in files if name != MANIFEST)
