"""The files of a retro-fit, which are those of PEFT: its options as JSON and the new weights alone as safetensors."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from ...atomic_files import new_file, write_json
from .retrofit_adapter import RetroFitAdapter

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
WEIGHTS_PREFIX = "base_model.retrofit.adapters."
"""Where a PEFT model has the adapter: `PeftModel.from_pretrained` loads what is written here, and the other way."""


def write_retrofit(folder: Path, adapter: RetroFitAdapter, options: dict[str, Any]) -> None:
    """Write both files, each in one step; the folder is made if absent."""
    weights = {WEIGHTS_PREFIX + name: tensor.contiguous() for name, tensor in adapter.state_dict().items()}
    with new_file(folder / WEIGHTS_FILE) as temporary:
        save_file(weights, temporary, metadata={"format": "pt"})
    write_json(folder / CONFIG_FILE, options)


def read_options(folder: Path) -> dict[str, Any]:
    """What CONFIG_FILE says.

    Raises:
        ValueError: one of the two files is missing; names it.
    """
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise ValueError(f"`folder` {folder} holds no retro-fit: it lacks {name}.")
    options: dict[str, Any] = json.loads((folder / CONFIG_FILE).read_text("utf-8"))
    return options


def load_weights(adapter: RetroFitAdapter, folder: Path) -> None:
    """Give `adapter` the weights in `folder`.

    Raises:
        ValueError: they are not those of this adapter; names one.
    """
    path = folder / WEIGHTS_FILE
    weights = {name.removeprefix(WEIGHTS_PREFIX): tensor for name, tensor in load_file(path).items()}
    own = adapter.state_dict()
    for name in sorted(own.keys() | weights.keys()):
        found = tuple(weights[name].shape) if name in weights else None
        wanted = tuple(own[name].shape) if name in own else None
        if found != wanted:
            raise ValueError(f"{path} has {name} of shape {found}, a retro-fit of this model has {wanted}.")
    adapter.load_state_dict(weights)
