"""What a model can do beyond its own forward while it is evaluated: here, read a memory of the whole document.

The Trainer knows only the protocol `Ability`: it opens `evaluating(...)` around an evaluation, gets a function that
turns batches into the model's inputs, and leaves the context whatever happens, so nothing stays on the model.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from transformers import DynamicCache, TrainerState

from graft.atomic_files import write_json
from graft.configuration.configuration_unlimiformer import UnlimiformerConfig
from graft.modeling.transformers_compat import cache_argument
from graft.modeling.unlimiformer.attach import unlimiform
from graft.modeling.unlimiformer.training_regimes import training_with_memory

logger = logging.getLogger(__name__)

MEMORY_FILE = "memory.json"
Batch = Mapping[str, Any]


@dataclass
class Part:
    """Rows of a batch that go through the model together.

    Args:
        rows: (part,) which rows of the batch these are.
        loss_inputs: keywords of the model's forward without labels.
        prompt_inputs: keywords of `generate`; None where nothing is generated.
        labels: (part, length) or None; their end lies where the end of the model's logits lies.
    """

    rows: Tensor
    loss_inputs: dict[str, Any]
    prompt_inputs: dict[str, Any] | None
    labels: Tensor | None


Read = Callable[[Batch], list[Part]]


class Ability(Protocol):
    """What the Trainer asks of an ability."""

    columns: tuple[str, ...]
    """Columns of a dataset that batches must keep for it."""

    subject: str
    """What it is of: "unlimiformer", "retro" or "graph"; tag and citation in the card follow from it."""

    def training_kwargs(self, state: TrainerState) -> dict[str, Any]:
        """Keywords for the model's forward in this optimizer step."""

    def evaluating(self, model: nn.Module, view: str | None) -> AbstractContextManager[Read | None]:
        """Change the model for one evaluation, undo it at the end; yields how batches are read, None for plainly."""

    def save(self, folder: Path) -> None:
        """Write what a saved model needs to have the ability again."""

    def card_section(self) -> str:
        """Markdown for the model card: what the ability is and its settings."""


@runtime_checkable
class ReadsInTraining(Protocol):
    """An ability that also changes what the model is given in training."""

    def training_inputs(
        self, model: nn.Module, batch: Batch, state: TrainerState
    ) -> AbstractContextManager[dict[str, Any]]:
        """Change the model for one forward, undo it at the end; yields the inputs of that forward."""


@runtime_checkable
class ChoosesDecay(Protocol):
    """An ability whose models have weights that the stock would let decay, but should not."""

    def decayed_parameters(self, model: nn.Module) -> list[str]:
        """Names of the parameters that weight decay acts on, in the order of the model."""


@runtime_checkable
class ViewsRows(Protocol):
    """An ability in one of whose views rows are others than those given."""

    def viewed_rows(self, rows: Any, view: str) -> Any:
        """The rows as evaluated in `view`, as many and in their order."""


@runtime_checkable
class DescribesRows(Protocol):
    """An ability that knows of evaluated rows what they do not say in a column."""

    def row_facts(self, rows: Any, tokenizer: Any) -> dict[str, list[Any]]:
        """Columns, a value for each row in its order."""


def base_model(model: Any) -> Any:
    """The model inside a PEFT wrapper, or `model` itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def has_own_memory(model: Any) -> bool:
    """Whether the model's own forward remembers long inputs (a permanent class, ours or a saved folder's copy)."""
    return getattr(base_model(model).config, "unlimiformer_config", None) is not None


class MemoryAbility:
    """Documents longer than the window are read through a memory (Unlimiformer) while the model is evaluated.

    Only the view "full", and evaluations without a view, use it. In training the stock model runs, unless
    `config.training` names a regime: then each batch's documents are remembered first.
    """

    columns: tuple[str, ...] = ("memory_ids", "memory_mask")
    subject = "unlimiformer"

    def __init__(self, config: UnlimiformerConfig) -> None:
        self.config = config

    def training_kwargs(self, state: TrainerState) -> dict[str, Any]:
        """Nothing: what a step needs is in `training_inputs`."""
        return {}

    def training_inputs(
        self, model: nn.Module, batch: Batch, state: TrainerState
    ) -> AbstractContextManager[dict[str, Any]]:
        """Attach the memory for one forward in training, whose inputs come back; the batch itself in "standard"."""
        if self.config.training == "standard":
            return nullcontext(dict(batch))
        return training_with_memory(
            base_model(model), self.config, batch, state.global_step, is_served=has_own_memory(model)
        )

    @contextmanager
    def evaluating(self, model: nn.Module, view: str | None) -> Iterator[Read | None]:
        """Attach the memory, unless the view goes without one; a model with its own memory is asked for that."""
        if view not in (None, "full"):
            yield None
            return
        base = base_model(model)
        with nullcontext(base) if has_own_memory(model) else unlimiform(base, self.config) as reader:
            logger.info("Evaluating with memory: %s", self.config if reader is base else repr(reader))
            if base.config.is_encoder_decoder:
                yield lambda batch: [_read_source(reader, batch)]
            else:
                yield lambda batch: _read_document(reader, batch)

    def save(self, folder: Path) -> None:
        """Write the options to memory.json, where scripts/generate.py finds them."""
        write_json(folder / MEMORY_FILE, self.config.to_dict())

    def memory_options(self) -> dict[str, Any]:
        """The options that are not the defaults."""
        defaults = UnlimiformerConfig().to_dict()
        return {name: value for name, value in self.config.to_dict().items() if value != defaults[name]}

    def card_section(self) -> str:
        """What memory does, and the options that are not the defaults."""
        changed = self.memory_options()
        settings = ", ".join(f"`{name}={value!r}`" for name, value in changed.items()) or "the defaults"
        return (
            "**Memory (Unlimiformer).** Inputs longer than the model's window are read window by window into a "
            "memory, from which attention takes the keys that score best for each query; the weights are those of "
            f"the base architecture. Settings: {settings}."
        )


def read_plainly(batch: Batch) -> list[Part]:
    """The whole batch as it is: what the base model sees."""
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    return [Part(_all_rows(batch), inputs, _prompt(batch), batch.get("labels"))]


def plain_reading(model: Any) -> Read:
    """How `model` reads batches without memory, also where its own forward would remember a long input."""
    base = base_model(model)
    if not has_own_memory(base):
        return read_plainly

    def read(batch: Batch) -> list[Part]:
        (part,) = read_plainly(batch)
        if base.config.is_encoder_decoder:  # what is encoded already is read as it is
            encoded = base.get_encoder()(**part.loss_inputs, return_dict=True)
            inputs = {"encoder_outputs": encoded, "attention_mask": batch["attention_mask"]}
            return [replace(part, loss_inputs=inputs, prompt_inputs=dict(inputs))]
        cache = cache_argument(DynamicCache(config=base.config))  # and so is what comes with a cache
        return [replace(part, prompt_inputs={**(part.prompt_inputs or {}), **cache})]

    return read


def _all_rows(batch: Batch) -> Tensor:
    return torch.arange(len(batch["input_ids"]), device=batch["input_ids"].device)


def _prompt(batch: Batch) -> dict[str, Any] | None:
    """What is generated from: the prompts, left-padded, of a causal batch; the sources of another."""
    if "prompt_ids" in batch:
        return {"input_ids": batch["prompt_ids"], "attention_mask": batch["prompt_mask"]}
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}


def _read_source(reader: Any, batch: Batch) -> Part:
    """Encoder-decoder: the whole source becomes the memory, which scoring and generating share."""
    memory = reader.remember(batch["input_ids"], batch["attention_mask"])
    return Part(_all_rows(batch), memory.inputs(), memory.inputs(), batch.get("labels"))


def _read_document(reader: Any, batch: Batch) -> list[Part]:
    """Decoder-only: what lies before the local tokens becomes the memory; rows without such tokens go plainly."""
    if "memory_ids" not in batch:
        return read_plainly(batch)
    remembers = batch["memory_mask"].any(dim=1)
    parts = []
    if not remembers.all():
        rows = (~remembers).nonzero()[:, 0]
        parts += [replace(part, rows=rows) for part in read_plainly(_rows_of(batch, rows))]
    if remembers.any():
        rows = remembers.nonzero()[:, 0]
        chosen = _rows_of(batch, rows)
        memory = reader.remember(chosen["memory_ids"], chosen["memory_mask"])
        prompts = memory.inputs(chosen["prompt_ids"], chosen["prompt_mask"]) if "prompt_ids" in chosen else None
        scored = memory.inputs(chosen["input_ids"], chosen["attention_mask"])
        parts.append(Part(rows, scored, prompts, chosen.get("labels")))
    return parts


def _rows_of(batch: Batch, rows: Tensor) -> Batch:
    return {name: value[rows] for name, value in batch.items() if isinstance(value, Tensor)}
