"""Rows of a RetroDataset to a batch for the model."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from .retro_dataset import NO_LOSS


class DataCollatorForRetro:
    """Stack rows; shorter ones are filled up at the end to the longest.

    The batch needs no mask: positions restart where a document starts, and padding stands behind all that is real, so
    no real token sees it.

    Args:
        pad_token_id: of the corpus.
    """

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, features: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Int64 input_ids, labels, position_ids (batch, t) and retrieved (batch, chunks, neighbours, length)."""
        longest = max(len(row["input_ids"]) for row in features)
        chunks = max(len(row["retrieved"]) for row in features)
        behind = [longest - len(row["input_ids"]) for row in features]
        ids, fill = torch.stack, self.pad_token_id
        return {
            "input_ids": ids([pad(r["input_ids"], (0, n), value=fill) for r, n in zip(features, behind, strict=True)]),
            "labels": ids([pad(r["labels"], (0, n), value=NO_LOSS) for r, n in zip(features, behind, strict=True)]),
            "position_ids": ids([_counted_on(r["position_ids"], n) for r, n in zip(features, behind, strict=True)]),
            "retrieved": ids([_with_chunks(row["retrieved"], chunks, fill) for row in features]),
        }


def _counted_on(positions: Tensor, more: int) -> Tensor:
    return torch.cat([positions, positions[-1] + 1 + torch.arange(more)])


def _with_chunks(retrieved: Tensor, chunks: int, fill: int) -> Tensor:
    return pad(retrieved, (0, 0, 0, 0, 0, chunks - len(retrieved)), value=fill)
