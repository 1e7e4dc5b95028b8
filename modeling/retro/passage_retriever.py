"""A retriever that needs no embedder and no index on disk: BM25 over the token ids of passages."""

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ...atomic_files import new_file

PASSAGES_FILE = "passages.safetensors"
_PADDING, _CHUNK = "pad_token_id", "chunk_size"
TERM_SATURATION, LENGTH_WEIGHT = 1.5, 0.75


class PassageRetriever:
    """The passages whose first `chunk_size` tokens score best against a chunk, by BM25 with tokens for words.

    score(q, d) = sum over distinct tokens t of q of idf(t) f / (f + k1 (1 - b + b |d| / mean |d|)), f how often t is
    in d, idf(t) = ln(1 + (N - n_t + 1/2) / (n_t + 1/2)), n_t the passages with t, k1 1.5, b 0.75 (Robertson and
    Zaragoza 2009). The earlier passage wins a tie. Passages that share no token are not found.

    Args:
        passages: (passages, neighbour_length) ids, a chunk and what follows it, padded.
        chunk_size: tokens of the chunk at the beginning of each.
        pad_token_id: what the passages are padded with; it is no word.
        num_neighbours: per chunk.
    """

    def __init__(self, passages: Tensor, chunk_size: int, pad_token_id: int, num_neighbours: int = 2) -> None:
        if passages.dim() != 2 or not len(passages):
            raise ValueError(f"`passages` must be (passages, neighbour_length), got {tuple(passages.shape)}.")
        for name, value in (("chunk_size", chunk_size), ("num_neighbours", num_neighbours)):
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        self.passages, self.chunk_size, self.pad_token_id = passages, chunk_size, pad_token_id
        self.num_neighbours = num_neighbours
        self._weights = _bm25_weights(passages[:, :chunk_size].long(), pad_token_id)

    def __call__(self, chunks: Tensor) -> Tensor:
        """(rows, chunk_size) ids to (rows, num_neighbours, neighbour_length) int64 on their device, padded."""
        scores = self._scores(chunks.cpu())
        best, found = scores.sort(dim=1, descending=True, stable=True)
        best, found = best[:, : self.num_neighbours], found[:, : self.num_neighbours]
        rows = self.passages[found].long().masked_fill((best <= 0)[..., None], self.pad_token_id)
        return rows.to(chunks.device)

    def _scores(self, chunks: Tensor) -> Tensor:
        """(rows, passages): of each chunk with every passage."""
        vocabulary = self._weights.shape[1]
        asked = torch.zeros(len(chunks), vocabulary)
        asked.scatter_(1, chunks.clamp(max=vocabulary - 1), (chunks < vocabulary).float())
        return (self._weights @ asked.T).T


def _bm25_weights(chunks: Tensor, pad_token_id: int) -> Tensor:
    """What each token adds to a passage's score: (passages, largest id + 2) float32, sparse; the last column is 0."""
    is_word = chunks != pad_token_id
    lengths = is_word.sum(1)
    count, width = len(chunks), int(chunks.max()) + 2
    pairs = (torch.arange(count)[:, None] * width + chunks)[is_word]
    pairs, often = pairs.unique(return_counts=True)
    passage, token = pairs // width, pairs % width
    having = torch.bincount(token, minlength=width).float()
    rarity = torch.log1p((count - having + 0.5) / (having + 0.5))
    relative = lengths / lengths.float().mean().clamp(min=1)
    damping = TERM_SATURATION * (1 - LENGTH_WEIGHT + LENGTH_WEIGHT * relative[passage])
    weights = rarity[token] * often / (often + damping)
    places = torch.stack([passage, token])
    return torch.sparse_coo_tensor(places, weights, (count, width), check_invariants=True, is_coalesced=True)


def write_passages(folder: Path, passages: Tensor, chunk_size: int, pad_token_id: int) -> Path:
    """Write PASSAGES_FILE into `folder`: what `read_passages` makes a retriever of."""
    told = {_CHUNK: str(chunk_size), _PADDING: str(pad_token_id)}
    with new_file(folder / PASSAGES_FILE) as temporary:
        save_file({"passages": passages.to(torch.int32).contiguous()}, temporary, metadata=told)
    return folder / PASSAGES_FILE


def read_passages(path: Path, pad_token_id: int, num_neighbours: int) -> PassageRetriever:
    """A retriever of the passages that `write_passages` wrote, padded with `pad_token_id` from now on."""
    with safe_open(path, "pt") as file:
        told = file.metadata()
        passages = file.get_tensor("passages")
    passages = passages.masked_fill(passages == int(told[_PADDING]), pad_token_id)
    return PassageRetriever(passages, int(told[_CHUNK]), pad_token_id, num_neighbours)
