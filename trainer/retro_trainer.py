"""Training of models that read neighbours: three losses tell whether they do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerState

from graft.trainer.abilities import Batch, Part, Read
from graft.trainer.evaluation import Evaluation
from graft.trainer.token_losses import IGNORED
from graft.trainer.trainer import GraftTrainer

VIEWS = ("retrieved", "without", "random")
"""Evaluation with the neighbours that were found, with none, and with those of other chunks."""


class RetrievalAbility:
    """Evaluates with neighbours, without, and with random ones; for models whose forward takes `retrieved`."""

    columns: tuple[str, ...] = ("retrieved",)
    subject = "retro"

    def training_kwargs(self, state: TrainerState) -> dict[str, Any]:
        """Nothing: the batch brings its neighbours."""
        return {}

    @contextmanager
    def evaluating(self, model: nn.Module, view: str | None) -> Iterator[Read | None]:
        """How batches are read in one of `VIEWS`; any other view reads what was found."""
        chosen = view if view in VIEWS else "retrieved"
        yield lambda batch: [_part(batch, chosen)]

    def save(self, folder: Path) -> None:
        """Nothing: a model with neighbours says so in its own config."""

    def card_section(self) -> str:
        """What retrieval does, and how to read the three losses."""
        return (
            "**Retrieval (RETRO).** Each chunk of the text is looked up in a corpus, and the next one reads what was "
            "found through chunked cross-attention. `retrieved` is evaluated with the neighbours found, `without` "
            "with none, `random` with those of other chunks: retrieval is used if the first loss is the lowest."
        )


def shuffled_neighbours(retrieved: Tensor) -> Tensor:
    """Give each chunk the neighbours of another one of the batch, always the same for the same batch.

    Args:
        retrieved: (batch, chunks, neighbours, neighbour_length).
    """
    flat = retrieved.flatten(0, 1)
    return flat.roll(max(1, len(flat) // 2), dims=0).view_as(retrieved) if len(flat) else retrieved


def _part(batch: Batch, view: str) -> Part:
    rows = torch.arange(len(batch["input_ids"]), device=batch["input_ids"].device)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids") if name in batch}
    if view != "without" and "retrieved" in batch:
        found = batch["retrieved"]
        inputs["retrieved"] = shuffled_neighbours(found) if view == "random" else found
    return Part(rows, inputs, None, batch.get("labels"))


class RetroTrainer(GraftTrainer):
    """`GraftTrainer` with retrieval: evaluates rows in the three `VIEWS`, and decays matrices alone.

    Args:
        args: as in GraftTrainer; a data set given as `eval_dataset` is evaluated in every view.

    Raises:
        ValueError: a data set says by its `check_model` that the model cannot read its rows.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        rows = kwargs.get("eval_dataset")
        if rows is not None and not isinstance(rows, Mapping):
            kwargs["eval_dataset"] = dict.fromkeys(VIEWS, rows)
        kwargs["abilities"] = [*kwargs.get("abilities", ()), RetrievalAbility()]
        super().__init__(*args, **kwargs)
        evaluated = self.eval_dataset.values() if isinstance(self.eval_dataset, Mapping) else ()
        config: Any = getattr(self.model, "config", None)
        for data in (self.train_dataset, *evaluated):
            if hasattr(data, "check_model") and hasattr(config, "chunk_size"):
                data.check_model(config.chunk_size, config.vocab_size)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Matrices that are no embeddings or null slots, in the order of the model, which is that of every process."""
        return decayed_parameters(model)

    def _as_evaluation(self, output: Any, prefix: str) -> Evaluation:
        evaluation = super()._as_evaluation(output, prefix)
        if "scored_bytes" not in evaluation.rows and self.processing_class is not None:
            counted = [scored_bytes(row["labels"], self.processing_class) for row in self._evaluated]
            evaluation.rows = {**evaluation.rows, "scored_bytes": counted}
        return evaluation


def decayed_parameters(model: nn.Module) -> list[str]:
    """Names of the weights that weight decay may act on: matrices of linear maps, in the order of the model."""
    spared = (nn.Embedding, nn.LayerNorm, nn.RMSNorm)
    of_spared = {
        f"{name}.{own}" if name else own
        for name, module in model.named_modules()
        if isinstance(module, spared) or "Norm" in type(module).__name__
        for own, _ in module.named_parameters(recurse=False)
    }
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.dim() > 1 and name not in of_spared and not name.rpartition(".")[2].startswith("null_")
    ]


def scored_bytes(labels: Tensor, tokenizer: Any) -> int:
    """UTF-8 bytes of the text that a loss is taken over: of (tokens,) labels but the first, which nothing predicts."""
    kept = labels[1:]
    return len(tokenizer.decode(kept[kept != IGNORED], skip_special_tokens=True).encode())
