"""Where neighbours come from: the protocol `Retriever`, retrievers that need no corpus, and asking one in generation.

A retriever of a corpus is in graft.retrieval.corpus; any function from chunks to neighbours will do.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ...configuration.configuration_retro import RetroConfig
from .retrieval_cache import OpenChunk
from .retrieval_pass import leading_padding


class Retriever(Protocol):
    """Finds neighbours of chunks."""

    def __call__(self, chunks: Tensor) -> Tensor:
        """(rows, chunk_size) ids to (rows, neighbours, neighbour_length) ids, padding where short or missing."""


class FixedNeighbours:
    """The same neighbours for every chunk: passages that the user gives.

    Args:
        neighbours: (neighbours, neighbour_length) ids, padded.
    """

    def __init__(self, neighbours: Tensor) -> None:
        if neighbours.dim() != 2:
            raise ValueError(f"`neighbours` must be (neighbours, neighbour_length), got {tuple(neighbours.shape)}.")
        self.neighbours = neighbours

    @classmethod
    def from_texts(cls, texts: Sequence[str], tokenizer: Any, config: RetroConfig) -> "FixedNeighbours":
        """Tokenise passages, without special tokens; each is cut or padded to the config's `neighbour_length`."""
        length = config.longest_neighbour
        rows = torch.full((len(texts), length), config.pad_token_id)
        for row, ids in zip(rows, tokenizer(list(texts), add_special_tokens=False)["input_ids"], strict=True):
            kept = torch.tensor(ids[:length])
            row[: len(kept)] = kept
        return cls(rows)

    def __call__(self, chunks: Tensor) -> Tensor:
        return self.neighbours.to(chunks.device).expand(len(chunks), -1, -1)


class CallableRetriever:
    """Makes a retriever of a function on texts.

    Args:
        find: texts of chunks to a list of passages for each.
        tokenizer: decodes chunks and encodes passages.
        config: `neighbour_length`, `num_neighbours` and `pad_token_id` are read.
    """

    def __init__(
        self, find: Callable[[list[str]], Sequence[Sequence[str]]], tokenizer: Any, config: RetroConfig
    ) -> None:
        self.find, self.tokenizer, self.config = find, tokenizer, config

    def __call__(self, chunks: Tensor) -> Tensor:
        texts = self.tokenizer.batch_decode(chunks, skip_special_tokens=True)
        length, count = self.config.longest_neighbour, self.config.num_neighbours
        found = torch.full((len(chunks), count, length), self.config.pad_token_id)
        for row, passages in zip(found, self.find(texts), strict=True):
            some = list(passages)[:count]
            if some:
                row[: len(some)] = FixedNeighbours.from_texts(some, self.tokenizer, self.config).neighbours
        return found.to(chunks.device)


class CachingRetriever:
    """Remembers what a retriever found: beams and samples share chunks, and drafts are tried twice.

    Args:
        retriever: asked for chunks that are not known.
        size: chunks remembered; the longest unused is forgotten first.
    """

    def __init__(self, retriever: Retriever, size: int = 4096) -> None:
        check_retriever(retriever)
        if size < 1:
            raise ValueError(f"`size` must be at least 1, got {size}.")
        self.retriever, self.size = retriever, size
        self._known: OrderedDict[bytes, Tensor] = OrderedDict()

    def __call__(self, chunks: Tensor) -> Tensor:
        keys = [row.numpy().tobytes() for row in chunks.cpu().contiguous()]
        known = {key: self._known[key] for key in keys if key in self._known}
        missing = {key: row for row, key in enumerate(keys) if key not in known}
        if missing:
            found = self.retriever(chunks[list(missing.values())])
            known |= dict(zip(missing, found, strict=True))
        for key in keys:
            self._known[key] = known[key]
            self._known.move_to_end(key)
        while len(self._known) > self.size:
            self._known.popitem(last=False)
        return torch.stack([known[key] for key in keys])


def check_retriever(retriever: Any) -> None:
    """Raise TypeError unless `retriever` is None or can be called."""
    if retriever is not None and not callable(retriever):
        raise TypeError(
            "`retriever` must be callable, (rows, chunk_size) ids to (rows, neighbours, neighbour_length) ids, "
            f"got {type(retriever).__name__}."
        )


def retrieve_completed(
    retriever: Retriever,
    config: RetroConfig,
    input_ids: Tensor,
    masks: tuple[Tensor | None, Tensor | None],
    chunk: OpenChunk | None,
) -> Tensor | None:
    """The neighbours of the chunks that a forward pass over `input_ids` will complete.

    Equal chunks are looked up once. Rows that end with padding while decoding have finished, and are not looked up.

    Args:
        input_ids: (batch, new).
        masks: attention mask and position ids of the pass.
        chunk: where the generation stands; None without a cache.

    Returns:
        (batch, chunks, neighbours, neighbour_length); None if no chunk is completed.
    """
    new = input_ids.shape[1]
    held = None
    if chunk is None:
        chunk = OpenChunk(config.chunk_size)
    elif chunk.past:
        held = chunk.ids
    if new > 1 or chunk.past == 0:
        chunk.padding = leading_padding(*masks, chunk.past + new)
    grid = chunk.grid(new)
    if not grid.closed:
        return None
    chunks, _ = grid.continue_chunks(held, input_ids)
    wanted = grid.completes().to(input_ids.device).expand(chunks.shape[:2])
    if new == 1:
        wanted = wanted & (input_ids != config.pad_token_id)
    if not wanted.any():
        return chunks.new_full((*chunks.shape[:2], 1, 1), config.pad_token_id)
    asked, places = chunks[wanted].unique(dim=0, return_inverse=True)
    found = _ask(retriever, asked, config)
    retrieved = found.new_full((*chunks.shape[:2], *found.shape[1:]), config.pad_token_id)
    retrieved[wanted] = found[places]
    return retrieved


def _ask(retriever: Retriever, chunks: Tensor, config: RetroConfig) -> Tensor:
    """Ask and check: (rows, m) to (rows, neighbours, neighbour_length)."""
    name = type(retriever).__name__
    try:
        found = retriever(chunks)
    except Exception as error:
        raise ValueError(
            f"`retriever` {name} failed on {len(chunks)} chunks, the first {chunks[0].tolist()}."
        ) from error
    length = config.longest_neighbour
    wanted = f"({len(chunks)}, neighbours, at most {length})"
    if not isinstance(found, Tensor) or found.dim() != 3 or len(found) != len(chunks) or found.shape[2] > length:
        got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(f"`retriever` {name} must return ids {wanted} for chunks {tuple(chunks.shape)}, got {got}.")
    if found.numel() and not 0 <= int(found.min()) <= int(found.max()) < config.vocab_size:
        worst = int(found.flatten(1).max(1).values.argmax())
        raise ValueError(
            f"`retriever` {name} returned ids in [{int(found.min())}, {int(found.max())}] for chunk "
            f"{chunks[worst].tolist()}, but `vocab_size` is {config.vocab_size}."
        )
    return found.to(chunks.device, torch.int64)
