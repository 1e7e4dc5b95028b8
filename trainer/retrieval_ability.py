"""Reading neighbours in a run: three losses tell whether it helps; which weights decay; what a loss is taken over."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerState

from graft.modeling.retro.retrofit_config import RetroFitConfig
from graft.trainer.abilities import Batch, Part, Read
from graft.trainer.arguments import RetrievalArguments, View
from graft.trainer.graph_ability import changed_settings
from graft.trainer.others_neighbours import OthersNeighbours
from graft.trainer.own_adapters import adapter_options
from graft.trainer.token_losses import IGNORED

VIEWS: tuple[View, ...] = ("retrieved", "without", "random")
"""Evaluation with the neighbours that were found, with none, and with those of other rows."""


class RetrievalAbility:
    """Evaluates with neighbours, without, and with random ones; for models whose forward takes `retrieved`."""

    columns: tuple[str, ...] = ("retrieved",)
    subject = "retro"

    def __init__(self, retrieval: RetrievalArguments | None = None) -> None:
        self.retrieval = retrieval

    def training_kwargs(self, state: TrainerState) -> dict[str, Any]:
        """No cache: the batch brings its neighbours, and with a cache stock models do not tell packed texts apart."""
        return {"use_cache": False}

    @contextmanager
    def evaluating(self, model: nn.Module, view: str | None) -> Iterator[Read | None]:
        """How batches are read in one of `VIEWS`; any other view reads what was found."""
        chosen = view if view in VIEWS else "retrieved"
        yield lambda batch: [_part(batch, chosen)]

    def viewed_rows(self, rows: Any, view: str) -> Any:
        """In the view "random" each row brings the neighbours of another one."""
        return OthersNeighbours(rows) if view == "random" else rows

    def decayed_parameters(self, model: nn.Module) -> list[str]:
        """Matrices that are no embeddings or null slots."""
        return decayed_parameters(model)

    def row_facts(self, rows: Any, tokenizer: Any) -> dict[str, list[int]]:
        """The bytes of text that each row's loss is taken over; nothing without a tokenizer."""
        if tokenizer is None:
            return {}
        return {"scored_bytes": [scored_bytes(row["labels"], tokenizer) for row in rows]}

    def save(self, folder: Path) -> None:
        """Nothing: a model with neighbours says so in its own config, or in that of its adapter."""

    def card_section(self) -> str:
        """What retrieval does, and how to read the three losses."""
        read = (
            ""
            if self.retrieval is None
            else f" It was trained with {self.retrieval.num_neighbours} of them for each chunk."
        )
        return (
            "**Retrieval (RETRO).** Each chunk of the text is looked up in a corpus, and the next one reads what was "
            "found through chunked cross-attention. `retrieved` is evaluated with the neighbours found, `without` "
            "with none, `random` with those of other rows: retrieval is used if the first loss is the lowest." + read
        )


class RetroFitAbility(RetrievalAbility):
    """The same, by new weights on a frozen base."""

    def __init__(self, retrieval: RetrievalArguments, config: RetroFitConfig) -> None:
        super().__init__(retrieval)
        known = adapter_options(RetroFitConfig)
        self.options = {name: value for name, value in config.to_dict().items() if name in known}

    def card_section(self) -> str:
        """The same, and which weights are new."""
        settings = changed_settings(self.options, RetroFitConfig().to_dict())
        return (
            f"{super().card_section()} An encoder of neighbours and the cross-attention were added to the frozen base "
            f"(retro-fit), which is what `without` evaluates. Settings: {settings}."
        )


def _part(batch: Batch, view: str) -> Part:
    rows = torch.arange(len(batch["input_ids"]), device=batch["input_ids"].device)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids") if name in batch}
    inputs["use_cache"] = False  # as in training
    if view != "without" and "retrieved" in batch:
        inputs["retrieved"] = batch["retrieved"]
    return Part(rows, inputs, None, batch.get("labels"))


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
