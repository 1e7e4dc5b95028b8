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
        rows = [(row, longest - len(row["input_ids"])) for row in features]
        fill = self.pad_token_id
        return {
            "input_ids": torch.stack([_longer(row["input_ids"], more, fill) for row, more in rows]),
            "labels": torch.stack([_longer(row["labels"], more, NO_LOSS) for row, more in rows]),
            "position_ids": torch.stack([_counted_on(row["position_ids"], more) for row, more in rows]),
            "retrieved": torch.stack([_with_chunks(row["retrieved"], chunks, fill) for row in features]),
        }


def _longer(tokens: Tensor, more: int, fill: int) -> Tensor:
    return pad(tokens, (0, more), value=fill) if more else tokens  # `pad` copies even where nothing is to be added


def _counted_on(positions: Tensor, more: int) -> Tensor:
    return torch.cat([positions, positions[-1] + 1 + torch.arange(more)]) if more else positions


def _with_chunks(retrieved: Tensor, chunks: int, fill: int) -> Tensor:
    more = chunks - len(retrieved)
    return pad(retrieved, (0, 0, 0, 0, 0, more), value=fill) if more else retrieved
