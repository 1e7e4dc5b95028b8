"""What `graft-export-generate` does: a `custom_generate` folder with the weights and passages that its code reads."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch

from graft.modeling.custom_generate import write_custom_generate
from graft.modeling.retro.passage_retriever import write_passages
from graft.modeling.retro.retrofit_config import RetroFitConfig
from graft.modeling.retro.retrofit_files import CONFIG_FILE, WEIGHTS_FILE, read_options
from graft.retrieval.corpus.corpus import Corpus
from graft.trainer.configuration_error import ConfigurationError


def export_memory(output: Path) -> Path:
    """Write the folder that gives any model a memory."""
    return write_custom_generate(output, "memory")


def export_retrieval(output: Path, adapter: Path, corpus: Path | None = None) -> Path:
    """Write the folder that gives a decoder its retro-fit, and with `corpus` the passages to be found.

    Args:
        output: a new folder.
        adapter: what `RetroFit.save_pretrained`, PEFT or graft-train wrote.
        corpus: prepared; its tokens are copied, so whoever has the folder can read its texts.

    Raises:
        ConfigurationError: there is no retro-fit in `adapter`, or its chunks are not those of `corpus`.
        FileExistsError: `output` exists.
        CorpusError: `corpus` is none.
    """
    try:
        options = read_options(adapter)
        config = RetroFitConfig(**options)
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"`--adapter` must be the folder of a retro-fit: {error}") from error
    files = [adapter / CONFIG_FILE, adapter / WEIGHTS_FILE]
    with tempfile.TemporaryDirectory() as scratch:
        if corpus is not None:
            files.append(_passages(Path(scratch), config, Corpus(corpus)))
        return write_custom_generate(output, "retrieval", files)


def _passages(folder: Path, config: RetroFitConfig, corpus: Corpus) -> Path:
    if corpus.chunk_size != config.chunk_size:
        raise ConfigurationError(
            f"`--corpus` {corpus.folder} has chunks of {corpus.chunk_size} tokens, the retro-fit of "
            f"{config.chunk_size}: prepare one with --chunk-size {config.chunk_size}."
        )
    length = config.neighbour_length or 2 * config.chunk_size
    passages = torch.from_numpy(corpus.passages(np.arange(len(corpus)), length))
    return write_passages(folder, passages, corpus.chunk_size, corpus.pad_token_id)
