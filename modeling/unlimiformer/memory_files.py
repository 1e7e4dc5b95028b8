"""A memory on disk: safetensors files, a folder of indexes, a description, checksums; whole or not at all."""

import fnmatch
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from ...atomic_files import listed_files, new_folder, read_manifest, write_json, write_manifest
from .families import model_shape
from .key_index import KeyIndex
from .model_fingerprint import model_fingerprint

TENSORS_PATTERN = "memory{suffix}.safetensors"
"""One file, or numbered ones of at most FILE_BYTES (a tensor is never cut), whose checksums are taken side by side."""
FILE_BYTES = 128 * 2**20
DESCRIPTION_FILE = "memory.json"
INDEX_FOLDER = "indexes"


def write_memory_files(
    folder: Path,
    named: Mapping[str, Tensor],
    description: Mapping[str, Any],
    indexes: Mapping[str, KeyIndex],
    replace: bool,
) -> None:
    """Write `folder`, new, empty or to be replaced.

    Raises:
        FileExistsError: the folder holds something already and `replace` is false.
    """
    with new_folder(folder, replace) as new:
        files = split_state_dict_into_shards_factory(
            dict(named),
            get_storage_size=lambda tensor: tensor.nbytes,
            filename_pattern=TENSORS_PATTERN,
            max_shard_size=FILE_BYTES,
        )
        for file, names in files.filename_to_tensors.items():
            save_file({name: named[name].contiguous() for name in names}, new / file)
        for name, index in indexes.items():
            index.save(new / INDEX_FOLDER / name)
        write_json(new / DESCRIPTION_FILE, description)
        write_manifest(new, {"kind": "graft.Memory"})


def read_memory_files(
    folder: Path, model: PreTrainedModel, strict: bool, verify: bool
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The description and the mapped tensors of a memory that `model` may read; arguments as of `from_pretrained`.

    Raises:
        ValueError: a file is missing, truncated or damaged (it is named), or other weights made the memory.
    """
    try:
        read_manifest(folder, verify)
        description = json.loads((folder / DESCRIPTION_FILE).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"`folder` {folder} holds no whole memory: {error}") from error
    shape = model_shape(model.config)._asdict()
    if description["shape"] != shape:
        raise ValueError(
            f"`folder` {folder} was made by a model with other layers: {description['shape']}, this "
            f"{model.config.model_type} has {shape}."
        )
    found = model_fingerprint(model)
    if strict and description["fingerprint"] != found:
        raise ValueError(
            f"`folder` {folder} was made by weights {description['fingerprint']} of a "
            f"{description['model_type']}, this {model.config.model_type} has {found}. Remember again, or pass "
            "strict=False to use it as it is."
        )
    named: dict[str, Tensor] = {}
    for name in fnmatch.filter(listed_files(folder), TENSORS_PATTERN.format(suffix="*")):  # no other was checked
        with safe_open(str(folder / name), framework="pt") as file:
            named |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    return description, named
