"""run.json: all that repeats a run (its merged configuration) and all that explains it (versions, hardware, rows)."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from graft.atomic_files import write_json
from graft.trainer.arguments import RunConfiguration
from graft.trainer.callbacks import output_folder
from graft.trainer.checkpoints import RUN_FILE
from graft.trainer.config_file import to_dict

_PACKAGES = ("graft-transformers", "torch", "transformers", "peft", "accelerate", "datasets", "tokenizers", "numpy")


def run_record(configuration: RunConfiguration, args: Any, flags: dict[str, Any]) -> dict[str, Any]:
    """The record as it stands before training; `--resume` and a second run read its `configuration`."""
    batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    return {
        "configuration": to_dict(configuration),
        "status": "running",
        "flags": flags,
        "seed": args.seed,
        "world_size": args.world_size,
        "effective_batch_size": batch,
        "versions": versions(),
        "git_revision": git_revision(),
        "hardware": hardware(args),
    }


def versions() -> dict[str, str]:
    """Python and the packages that a result depends on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # run from a folder, not installed
            continue
    return found


def git_revision() -> str | None:
    """The commit of graft's own repository, with a plus sign if files differ from it; None if it is installed."""
    command = ["git", "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def hardware(args: Any) -> dict[str, Any]:
    """The device the run uses, in words."""
    device = torch.device(args.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {"device": device.type, "name": name, "cores": os.cpu_count(), "processes": args.world_size}


def record_before(args: TrainingArguments) -> dict[str, Any]:
    """The record that an earlier run of this configuration left in the folder, read before it is written anew."""
    path = output_folder(args) / RUN_FILE
    with args.main_process_first(desc="reading the record"):
        before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return dict(before)


def write_record(args: TrainingArguments, record: Mapping[str, Any]) -> None:
    """Write the record to the output folder, from one process."""
    if args.process_index == 0:
        write_json(output_folder(args) / RUN_FILE, record)
