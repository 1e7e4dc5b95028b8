"""How a model learns with its memory: what stands in a training batch as a document becomes a memory with gradient.

Bertsch et al. 2023, section 3.3: "retrieval" trains on what each query retrieves, "random" on a random part of the
document as large as the window, and "alternating" changes between both. A choice of keys has no gradient; the queries,
the chosen keys and values, and through them the encoder have.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...configuration.configuration_unlimiformer import UnlimiformerConfig
from .attach import unlimiform
from .knn_attention import KeyChoice
from .layer_memory import LayerMemory
from .memory import Memory
from .read_documents import read_documents
from .remember import Documents, real_tokens, vocabulary_size

Regime = Callable[[Memory, int], Memory]
"""What the decoder reads of a memory in an optimizer step."""


@dataclass(frozen=True)
class SampledMemory(Memory):
    """A memory of which each layer reads a window's worth of random tokens, all of them, in the order of the text.

    Args:
        seed: of the choice; each layer makes its own.
    """

    seed: int = 0

    def _layer_memory(self, layer: int) -> LayerMemory | None:
        memory = super()._layer_memory(layer)
        if memory is None or memory.is_window:
            return memory
        ids, real = sampled_tokens(self.lengths, self.window, self.seed * 1024 + layer)
        ids, real = ids.to(memory.keys.device), real.to(memory.keys.device)

        def taken(stored: Tensor) -> Tensor:
            return stored.gather(2, ids[:, None, :, None].expand(-1, stored.shape[1], -1, stored.shape[3]))

        keys = taken(memory.keys)
        values = keys if memory.values is memory.keys else taken(memory.values)
        if memory.visible is not None:
            real = real & memory.visible.gather(1, ids)
        return replace(
            memory, keys=keys, values=values, visible=None if bool(real.all()) else real, choice=KeyChoice()
        )


def sampled_tokens(lengths: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Of each document `count` different tokens, or all of a shorter one, ascending.

    Args:
        lengths: (documents,).

    Returns:
        ids (documents, at most count) and which of them are real, both on the CPU.
    """
    generator = torch.Generator().manual_seed(seed)
    longest = int(lengths.max())
    order = torch.rand(len(lengths), longest, generator=generator)
    order = order.masked_fill(torch.arange(longest) >= lengths[:, None], torch.inf)  # what is no token comes last
    ids = order.argsort(dim=1)[:, :count].sort(dim=1).values
    return ids, ids < lengths[:, None]


def retrieval(memory: Memory, step: int) -> Memory:
    """Each query reads the keys that score best for it."""
    return memory


def random_encoded(memory: Memory, step: int) -> Memory:
    """Each layer reads a random part, another in each step."""
    given = {field.name: getattr(memory, field.name) for field in fields(Memory)}
    return SampledMemory(**{**given, "indexes": {}}, seed=step)  # all that was drawn is read


def alternating(memory: Memory, step: int) -> Memory:
    """`retrieval` in even optimizer steps, `random_encoded` in odd ones."""
    return (retrieval, random_encoded)[step % 2](memory, step)


REGIMES: dict[str, Regime] = {
    "retrieval": retrieval,
    "random": random_encoded,
    "alternating": alternating,
}


@contextmanager
def training_with_memory(
    model: PreTrainedModel, config: UnlimiformerConfig, batch: Mapping[str, Any], step: int, is_served: bool = False
) -> Iterator[dict[str, Any]]:
    """Let attention read a memory in one forward; yields its inputs, in which the batch's document is remembered.

    Args:
        model: a model with a language-modelling head, no PEFT wrapper around it.
        config: the options; `config.training` names the regime.
        batch: of an encoder-decoder `input_ids` and `attention_mask` (documents, source) of any length; of a decoder
            `memory_ids` and `memory_mask` (documents, memory), what is remembered, and `input_ids` and
            `attention_mask` (documents, target) that follow it. Other entries, such as `labels`, stay.
        step: number of the optimizer step.
        is_served: whether the model reads memories already, as the permanent classes do.

    Raises:
        ValueError: the regime is "standard", the model checkpoints its layers, which then lose their cache, or `batch`
            lacks what is to be remembered.
    """
    if config.training not in REGIMES:
        raise ValueError(
            f"`training` must be one of {sorted(REGIMES)} for a memory in training, got {config.training!r}."
        )
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        raise ValueError(
            f"`training` {config.training!r} needs a model without gradient checkpointing, which takes the cache from "
            "its layers; an encoder's windows are checkpointed anyway."
        )
    with nullcontext() if is_served else unlimiform(model, config):
        encodes = bool(model.config.is_encoder_decoder)
        names = ("input_ids", "attention_mask") if encodes else ("memory_ids", "memory_mask")
        if names[0] not in batch:
            raise ValueError(
                f"`batch` must hold {names[0]!r}, what a {model.config.model_type} remembers"
                f"{'' if encodes else ' of the text before its `input_ids`'}, got {sorted(batch)}."
            )
        ids, lengths = real_tokens(batch[names[0]], batch.get(names[1]), vocabulary_size(model), names[0])
        with torch.set_grad_enabled(torch.is_grad_enabled() and (encodes or config.memory_gradient)):
            memory = read_documents(model, config, Documents(ids, lengths))
        memory = REGIMES[config.training](memory, step)
        rest = {name: value for name, value in batch.items() if name not in (*names, "input_ids", "attention_mask")}
        given = memory.inputs() if encodes else memory.inputs(batch["input_ids"], batch.get("attention_mask"))
        yield rest | given
