"""What a corpus folder holds, in one file that is the only truth about it.

`manifest.json` names every file with its stage, shape, size and SHA-256, and says how far each stage has come. It is
replaced in one step after each shard, so a kill costs at most the shard that was being made; files it does not name
are leftovers. It holds no times and no process ids: the same input gives the same bytes, resumed or not.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from graft.atomic_files import MANIFEST, leaves_folder, new_file, sha256, write_json

FORMAT = 1
STAGES = ("tokenize", "embed", "index", "neighbours", "pack")
NEEDS = {"tokenize": (), "embed": ("tokenize",), "index": ("embed",), "neighbours": ("embed",), "pack": ("tokenize",)}
"""The stages whose result a stage reads directly."""
STAGE_FOLDERS = ("tokens", "tokenizer", "embeddings", "index", "neighbours")

SCRATCH = ".scratch"


class CorpusError(ValueError):
    """A corpus folder that is damaged, incomplete, foreign or newer than this version of graft."""


class Manifest:
    """The manifest of the corpus in `folder`: `content` is what the file holds, without its checksum."""

    def __init__(self, folder: str | Path, content: dict[str, Any]) -> None:
        self.folder = Path(folder)
        self.content = content

    @classmethod
    def new(cls, folder: str | Path) -> Manifest:
        """A manifest of nothing yet; it is not written."""
        versions = {name: metadata.version(name) for name in ("numpy", "tokenizers", "torch", "transformers")}
        content = {"format": FORMAT, "versions": versions, "corpus": {}, "counts": {}, "stages": {}, "files": {}}
        return cls(folder, content)

    @classmethod
    def read(cls, folder: str | Path) -> Manifest:
        """Read and check `manifest.json`.

        Raises:
            FileNotFoundError: there is none.
            CorpusError: it is not ours, is damaged, or comes from a newer version.
        """
        path = Path(folder) / MANIFEST
        if not path.is_file():
            raise FileNotFoundError(f"{folder} has no {MANIFEST}: it is no corpus, or none was begun there.")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise CorpusError(f"{path} is not JSON ({error}); restore it, or build the corpus again.") from error
        stated = content.get("format") if isinstance(content, dict) else None
        if isinstance(stated, int) and stated > FORMAT:  # first: what else it holds is for its own version to say
            raise CorpusError(
                f"{path} has format {stated}, this version of graft reads up to {FORMAT}: upgrade graft, or build the "
                "corpus again from stage 'tokenize' with overwrite=True."
            )
        if not isinstance(stated, int) or not {"stages", "files", "checksum"} <= content.keys():
            raise CorpusError(f"{path} is not the manifest of a corpus: it lacks `format`, `stages` or `files`.")
        checksum = content.pop("checksum")
        if checksum != _checksum(content):
            raise CorpusError(f"{path} is damaged: its content does not have the checksum it states.")
        return cls(folder, content)

    @property
    def path(self) -> Path:
        """Where it is written."""
        return self.folder / MANIFEST

    @property
    def corpus(self) -> dict[str, Any]:
        """Chunk size, dtype and tokenizer."""
        return self.content["corpus"]

    @property
    def counts(self) -> dict[str, int]:
        """Documents, chunks, tokens, padding and what was left out."""
        return self.content["counts"]

    @property
    def files(self) -> dict[str, dict[str, Any]]:
        """Name, relative to the folder, to stage, shape, dtype, bytes and sha256."""
        return self.content["files"]

    @property
    def stages(self) -> dict[str, dict[str, Any]]:
        """Name to status, settings and what else the stage notes."""
        return self.content["stages"]

    def is_complete(self, stage: str) -> bool:
        """Whether the stage has been run to its end."""
        return self.stages.get(stage, {}).get("status") == "complete"

    def require(self, stage: str) -> None:
        """Raise CorpusError unless the stage is complete."""
        if not self.is_complete(stage):
            state = "was interrupted" if stage in self.stages else "has not run"
            raise CorpusError(f"{self.folder}: stage {stage!r} {state}; run it (again), it goes on where it stopped.")

    def files_of(self, stage: str, suffix: str = "") -> list[str]:
        """The names of a stage's files that end in `suffix`, sorted."""
        return sorted(name for name, file in self.files.items() if file["stage"] == stage and name.endswith(suffix))

    def store(self, stage: str, name: str, array: np.ndarray | Callable[[Path], None], raw: bool = False) -> None:
        """Write one file under a temporary name, rename it, and note it; `write` makes the note last.

        Args:
            stage: whose file it is.
            name: relative to the folder.
            array: what to write (as .npy, or its bytes if `raw`), or a function that writes to the path it is given.
            raw: no .npy header.
        """
        details: dict[str, Any] = {"stage": stage}
        with new_file(self.folder / name) as temporary:
            if callable(array):
                array(temporary)
            else:
                details |= {"shape": list(array.shape), "dtype": array.dtype.name}
                _write_array(temporary, array, raw)
            details |= {"bytes": temporary.stat().st_size, "sha256": sha256(temporary)}
        self.files[name] = details

    def drop(self, stage: str) -> None:
        """Forget a stage and all that was made from it; the files go once the manifest is written."""
        for later in STAGES:
            if stage in NEEDS[later] and later in self.stages:
                self.drop(later)
        self.stages.pop(stage, None)
        for name in self.files_of(stage):
            del self.files[name]

    def write(self) -> None:
        """Replace the manifest in one step."""
        content = self.content
        content["stages"] = {name: content["stages"][name] for name in STAGES if name in content["stages"]}
        content["files"] = dict(sorted(content["files"].items()))
        write_json(self.path, {**content, "checksum": _checksum(content)})

    def remove_leftovers(self) -> None:
        """Delete files in our folders that the manifest does not name: half-written ones, those of dropped stages."""
        for scratch in (self.folder / SCRATCH, *self.folder.glob(f".{SCRATCH}.*.tmp")):  # the latter half-written
            shutil.rmtree(scratch, ignore_errors=True)
        ours = [path for name in STAGE_FOLDERS for path in (self.folder / name).rglob("*") if path.is_file()]
        ours += [path for path in self.folder.glob(".*.tmp") if path.is_file()]
        ours += [self.folder / name for name in ("documents.npy", "last_lengths.npy", "sequences.npy")]
        ours += [self.folder / "document_names.arrow"]
        for path in ours:
            if path.relative_to(self.folder).as_posix() not in self.files:
                path.unlink(missing_ok=True)

    def check_file(self, name: str, checksum: bool) -> None:
        """Raise CorpusError, naming the stage to rerun, if a listed file is missing, resized or (checked) changed."""
        listed, path = self.files[name], self.folder / name
        again = f"run stage {listed['stage']!r} again with overwrite=True"
        if leaves_folder(name):
            raise CorpusError(f"{self.path} lists {name!r}, which lies outside its folder.")
        if not path.is_file():
            raise CorpusError(f"{path} is missing; {again}.")
        if (size := path.stat().st_size) != listed["bytes"]:
            raise CorpusError(f"{path} has {size} bytes, the manifest says {listed['bytes']}; {again}.")
        if checksum and sha256(path) != listed["sha256"]:
            raise CorpusError(f"{path} is damaged, its SHA-256 differs from the manifest's; {again}.")


def fingerprint(value: Mapping[str, Any]) -> str:
    """SHA-256 of a JSON value, whatever the order of its keys."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def described(value: Any) -> str:
    """A setting for people: of what has a hash its name, if any, and the beginning of the hash."""
    if not isinstance(value, dict) or "sha256" not in value:
        return repr(value)
    return " ".join(filter(None, [str(value.get("name", "")), f"sha256 {value['sha256'][:12]}"]))


def _checksum(content: Mapping[str, Any]) -> str:
    return fingerprint(content)


def _write_array(path: Path, array: np.ndarray, raw: bool) -> None:
    little = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
    with path.open("wb") as file:
        if raw:
            little.tofile(file)
        else:
            np.lib.format.write_array(file, little, version=(1, 0), allow_pickle=False)
