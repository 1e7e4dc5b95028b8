"""Which checkpoint a run goes on from, and whether an output folder belongs to this run.

The stock picks the checkpoint with the highest number and dies on one that a kill left half-written.
"""

from __future__ import annotations

import json
import logging
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from graft.trainer.configuration_error import ConfigurationError

logger = logging.getLogger(__name__)

RUN_FILE = "run.json"
STATE_FILE = "trainer_state.json"  # the stock writes it last
SENTINEL = "checkpoint-is-incomplete.txt"  # written by the stock when SIGTERM interrupts a save
COMPARED_BLOCKS = ("model", "data", "retrieval", "adapter")


def last_complete_checkpoint(output_dir: str | Path) -> Path | None:
    """The newest checkpoint in `output_dir` from which a run can go on; None if no save was ever finished there.

    Newer ones that are incomplete are logged and left where they are.

    Raises:
        ConfigurationError: a finished save was damaged and no other checkpoint is whole; says why, one by one.
    """
    skipped: list[tuple[Path, str]] = []
    whole = None
    for folder in _checkpoints(Path(output_dir)):
        reason = incompleteness(folder)
        if reason is None:
            whole = folder
            break
        skipped.append((folder, reason))
    if whole is None and any((folder / STATE_FILE).exists() for folder, _ in skipped):
        listed = "; ".join(f"{folder.name}: {why}" for folder, why in skipped)
        raise ConfigurationError(
            f"No checkpoint in `output_dir` {output_dir} is complete: {listed}. Delete them to start anew."
        )
    for folder, why in skipped:  # without a whole one, the run was killed during its first save and starts anew
        logger.warning("%s is incomplete (%s) and was skipped.", folder.name, why)
    return whole


def incompleteness(checkpoint: Path) -> str | None:
    """Why the run cannot go on from `checkpoint`, or None if it can."""
    if (checkpoint / SENTINEL).exists():
        return f"it holds {SENTINEL}"
    try:
        json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return f"{STATE_FILE} is missing or unreadable"
    for name in ("optimizer.pt", "scheduler.pt"):
        if not (checkpoint / name).is_file():
            return f"{name} is missing"
    if not any(checkpoint.glob("rng_state*.pth")):
        return "rng_state.pth is missing"
    return _unreadable_weights(checkpoint)


def _checkpoints(output_dir: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    if not output_dir.is_dir():
        return []
    found = [path for path in output_dir.iterdir() if path.is_dir() and re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")), reverse=True)


def _unreadable_weights(checkpoint: Path) -> str | None:
    weights = {path.name for path in checkpoint.glob("*.safetensors")}
    if not weights:
        return "it holds no safetensors weights"
    index = checkpoint / "model.safetensors.index.json"
    if index.is_file():
        absent = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()) - weights)
        if absent:
            return f"{absent[0]} is missing"
    for name in sorted(weights):
        if not _safetensors_is_whole(checkpoint / name):
            return f"{name} is shorter than its header says"
    return None


def _safetensors_is_whole(path: Path) -> bool:
    """True if the file is exactly as long as its header says: 8 bytes of header length, header, tensors."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if len(start) < 8:
            return False
        (header_length,) = struct.unpack("<Q", start)
        if 8 + header_length > size:
            return False
        try:
            header = json.loads(file.read(header_length))
        except ValueError:
            return False
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    return 8 + header_length + max(ends, default=0) == size


def differing_keys(run: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Dotted names under `model`, `data`, `retrieval` and `adapter` that differ between two merged configurations."""
    return [key for block in COMPARED_BLOCKS for key in _differences(block, run.get(block), other.get(block))]


def _differences(name: str, one: Any, other: Any) -> list[str]:
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        keys = sorted(set(one) | set(other))
        return [found for key in keys for found in _differences(f"{name}.{key}", one.get(key), other.get(key))]
    return [] if one == other else [name]


def check_output_dir(output_dir: str | Path, configuration: Mapping[str, Any], fresh: bool = False) -> None:
    """Refuse a folder that holds another run, or anything at all if the run is to start afresh.

    Args:
        configuration: the merged configuration as JSON values; compared with the one in the folder's run.json.
        fresh: the run must not go on from anything, so the folder must be empty or absent.

    Raises:
        ConfigurationError: names the keys that differ, or the folder that is not empty.
    """
    folder = Path(output_dir)
    if fresh:
        if folder.is_dir() and any(folder.iterdir()):
            raise ConfigurationError(
                f"`--fresh` needs an empty `training.output_dir`; {folder} holds files. Name another one."
            )
        return
    record = folder / RUN_FILE
    if not record.is_file():
        return
    before = json.loads(record.read_text(encoding="utf-8")).get("configuration", {})
    if keys := differing_keys(before, configuration):
        shown = ", ".join(keys[:8]) + (" ..." if len(keys) > 8 else "")
        raise ConfigurationError(
            f"`training.output_dir` {folder} holds another run; these differ: {shown}. Name another folder "
            "(`--fresh` needs an empty one)."
        )
