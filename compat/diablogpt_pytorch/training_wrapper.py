"""The document's wrapper: from a folder of texts to batches, an optimizer and generation."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset
from transformers import LogitsProcessor, LogitsProcessorList

from graft.atomic_files import write_json
from graft.retrieval.corpus.corpus import Corpus
from graft.retrieval.corpus.corpus_retriever import CorpusRetriever
from graft.retrieval.corpus.retro_dataset import RetroDataset
from graft.trainer.retrieval_ability import decayed_parameters

from .retrieval import (
    chunks_to_precalculated_knn_,
    corpus_folder,
    embedder,
    text_folder_to_chunks_,
    wants_reprocessing,
)
from .retro import RETRO

Filter = Callable[..., Tensor]


def top_k(logits: Tensor, thres: float = 0.9) -> Tensor:
    """Keep the best max(1, (1 - thres) V) of the last axis."""
    count = max(1, int((1 - thres) * logits.shape[-1]))
    least = logits.topk(count, dim=-1).values[..., -1:]
    return logits.masked_fill(logits < least, -torch.inf)


def top_p(logits: Tensor, thres: float = 0.9) -> Tensor:
    """Keep the least set of the last axis that holds a share of at least `thres`."""
    ordered, order = logits.sort(dim=-1, descending=True)
    before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
    return logits.masked_fill((before >= thres).scatter(-1, order, before >= thres), -torch.inf)


class _Filtered(LogitsProcessor):
    def __init__(self, keep: Filter, thres: float) -> None:
        self.keep = partial(keep, thres=thres)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return self.keep(scores)


@dataclass(frozen=True)
class RawFiles:
    """Where the wrapper writes.

    Args:
        chunks_memmap_path, seqs_memmap_path, doc_ids_memmap_path: raw files; the corpus lies beside the chunks.
        processed_stats_json_path: the counts; None is beside the chunks, where no other corpus writes.
    """

    chunks_memmap_path: str | Path = "./train.chunks.dat"
    seqs_memmap_path: str | Path = "./train.seq.dat"
    doc_ids_memmap_path: str | Path = "./train.doc_ids.dat"
    processed_stats_json_path: str | Path | None = None


class TrainingWrapper(nn.Module):
    """A model, and the corpus that a folder of texts becomes.

    Args:
        diablogpt, retro: the model, under either name.
        knn: neighbours per chunk.
        chunk_size: that of the model.
        documents_path, glob: the texts.
        max_chunks, max_seqs: caps, which stop at a whole document or row.
        knn_extra_neighbors: see `chunks_to_precalculated_knn_`.
        faiss_index_filename: not needed: the index lies in the corpus.
        max_index_memory_usage, current_memory_available: budgets, which choose the index.
        files: those of `RawFiles`.

    Raises:
        ValueError: none or both models, or a chunk size that is not the model's.
    """

    def __init__(
        self,
        *,
        diablogpt: RETRO | None = None,
        retro: RETRO | None = None,
        knn: int,
        chunk_size: int,
        documents_path: str | Path,
        glob: str = "**/*.txt",
        max_chunks: int = 1_000_000,
        max_seqs: int = 100_000,
        knn_extra_neighbors: int = 100,
        faiss_index_filename: str | Path = "knn.index",
        max_index_memory_usage: str = "100m",
        current_memory_available: str = "1G",
        **files: Any,
    ) -> None:
        super().__init__()
        given = [model for model in (diablogpt, retro) if model is not None]
        if len(given) != 1:
            raise ValueError(f"exactly one of `diablogpt` and `retro` must be given, got {len(given)}.")
        self.retro = given[0]
        if chunk_size != self.retro.chunk_size:
            raise ValueError(f"`chunk_size` must be the model's {self.retro.chunk_size}, got {chunk_size}.")
        raw = RawFiles(**files)
        self.stats = text_folder_to_chunks_(
            folder=documents_path,
            glob=glob,
            chunks_memmap_path=raw.chunks_memmap_path,
            seqs_memmap_path=raw.seqs_memmap_path,
            doc_ids_memmap_path=raw.doc_ids_memmap_path,
            chunk_size=chunk_size,
            seq_len=self.retro.seq_len,
            max_chunks=max_chunks,
            max_seqs=max_seqs,
        )
        _write_stats(raw, self.stats)
        corpus = Corpus(corpus_folder(raw.chunks_memmap_path))
        if corpus.vocab_size > self.retro.model.config.vocab_size:  # before the chunks are embedded
            raise ValueError(
                f"`num_tokens` of the model is {self.retro.model.config.vocab_size}, the corpus's tokenizer has "
                f"{corpus.vocab_size}."
            )
        chunks_to_precalculated_knn_(
            num_chunks=self.stats["chunks"],
            chunk_size=chunk_size,
            chunk_memmap_path=raw.chunks_memmap_path,
            doc_ids_memmap_path=raw.doc_ids_memmap_path,
            num_nearest_neighbors=knn,
            num_extra_neighbors=knn_extra_neighbors,
            max_index_memory_usage=max_index_memory_usage,
            current_memory_available=current_memory_available,
            index_file=faiss_index_filename,
            force_reprocess=wants_reprocessing(),
        )
        corpus = Corpus(corpus.folder)
        rows = RetroDataset(corpus, knn, legacy=True)
        self.ds: Dataset[Any] = Subset(rows, range(self.stats["seqs"])) if self.stats["seqs"] < len(rows) else rows
        self.retriever = CorpusRetriever(corpus, embedder(), knn)

    def get_dataloader(self, **options: Any) -> DataLoader[Any]:
        """Batches of rows (batch, t + 1) and neighbours (batch, t / m, knn, 2 m).

        Args:
            options: of `DataLoader`, such as batch_size and shuffle.
        """
        return DataLoader(self.ds, **options)

    def get_optimizer(self, lr: float = 3e-4, wd: float = 0.1) -> torch.optim.AdamW:
        """AdamW; matrices decay by `wd`, embeddings, norms, biases and null slots do not. The order is the model's."""
        decayed = set(decayed_parameters(self.retro))
        named = [(name, p) for name, p in self.retro.named_parameters() if p.requires_grad]
        groups = [
            {"params": [p for name, p in named if name in decayed], "weight_decay": wd},
            {"params": [p for name, p in named if name not in decayed], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=lr)

    @torch.no_grad()
    def generate(
        self,
        start: Tensor | None = None,
        filter_fn: Filter = top_k,
        filter_thres: float = 0.9,
        temperature: float = 1.0,
    ) -> Tensor:
        """Sample up to the length of the model, looking up each chunk once it is complete.

        Args:
            start: (batch, tokens) to go on from; by default one start token.
            filter_fn: logits and `thres` to logits, such as `top_k` and `top_p`.
            filter_thres: its threshold.
            temperature: 0 takes the best token.

        Returns:
            (batch, at most seq_len) ids with those of `start`.
        """
        tokenizer, model = self.retriever.corpus.tokenizer, self.retro.model
        if start is None:
            start = torch.tensor([[tokenizer.cls_token_id]])
        start = start.to(model.device)
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature > 0 else {}
        was_training = model.training
        model.eval()
        try:
            generated: Tensor = model.generate(
                start,
                retriever=self.retriever,
                attention_mask=torch.ones_like(start),
                logits_processor=LogitsProcessorList([_Filtered(filter_fn, filter_thres)]),
                max_length=self.retro.seq_len,
                eos_token_id=tokenizer.sep_token_id,
                pad_token_id=self.retro.pad_id,
                **{"do_sample": False, **sampling},
            )
        finally:
            model.train(was_training)
        return generated


def _write_stats(raw: RawFiles, stats: dict[str, int]) -> None:
    path = raw.processed_stats_json_path or Path(raw.chunks_memmap_path).with_suffix(".stats.json")
    write_json(path, json.loads(json.dumps(stats)))
