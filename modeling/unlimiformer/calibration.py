"""Choosing how a decoder's memory is read by what best predicts the document itself, with no memory as the rival.

The end of a document is scored behind a memory of what stands before it, under each candidate and without memory: its
own next-token losses say which settings help on this text. Memory is taken only where it wins by a margin.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...configuration.configuration_unlimiformer import UnlimiformerConfig
from ..attachment import device_of
from .families import (
    decoder_family,
    has_scaled_positions,
    key_rotations,
    layer_range,
    memory_layers,
    model_shape,
    trained_positions,
)
from .index_recall import indexed
from .memory import Memory
from .positions import memory_positions, rotate
from .report import AttentionReport

_HOW_IT_IS_READ = {"keys_per_query", "first_layer", "last_layer", "heads", "sinks", "exclude_window", "positions"}
"""Options that need no other reading of the document; rotary keys can be moved to where another rule puts them."""


@dataclass(frozen=True)
class Trial:
    """What one way of reading the memory lost.

    Args:
        config: the options; None for the window alone.
        losses: (tokens,) of each scored token, in nats.
        difference: mean loss less that of the window alone, so below 0 the memory helps.
        standard_error: of the difference, over tokens.
    """

    config: UnlimiformerConfig | None
    losses: Tensor
    difference: float
    standard_error: float

    def bound(self, margin: float) -> float:
        """What the difference is not above, give or take: `margin` standard errors more than measured."""
        return self.difference + margin * self.standard_error


@dataclass(frozen=True)
class Calibration:
    """What `calibrate` found.

    Args:
        memory: as it is best read; None where no way was better than the window alone.
        trials: the lowest bound first; that of the window alone is 0.
    """

    memory: Memory | None
    trials: tuple[Trial, ...]

    @property
    def config(self) -> UnlimiformerConfig | None:
        """The options that won; None for the window alone."""
        return self.trials[0].config

    def inputs(self, question_ids: Tensor, question_mask: Tensor | None = None, **options: Any) -> dict[str, Any]:
        """As `memory.inputs`; those of the question alone where the window alone won."""
        if self.memory is not None:
            return self.memory.inputs(question_ids, question_mask, **options)
        mask = torch.ones_like(question_ids) if question_mask is None else question_mask
        return {"input_ids": question_ids, "attention_mask": mask}


def candidates_of(memory: Memory) -> list[UnlimiformerConfig]:
    """The ways of reading a memory that did best somewhere (docs/memory.md), as far as it holds their layers."""
    layers = model_shape(memory.model_config).layers
    rotary = decoder_family(memory.model_config).positions == "rotary"
    first, last = layer_range(memory.config, layers)
    few, many = replace(memory.config, keys_per_query=64), replace(memory.config, keys_per_query=None)
    chosen = [few, many]
    if (upper := max(layers // 2, first)) < last:
        chosen.append(replace(memory.config, keys_per_query=8, first_layer=upper))
    if rotary:
        chosen.append(replace(few, positions="origin"))
    return chosen


def calibrate(
    model: PreTrainedModel,
    memory: Memory,
    candidates: Sequence[UnlimiformerConfig] | None = None,
    local_tokens: int | None = None,
    tokens: int = 256,
    margin: float = 1.0,
) -> Calibration:
    """Choose how to read a memory by the losses of the document's own last tokens, of which it holds no trace then.

    Costs one forward of `local_tokens` + `tokens` tokens for each candidate and document. Candidates are compared by
    exact search; an index, if the memory has one, is built anew for the one that is taken.

    Args:
        model: a decoder whose attention is served, which made the memory.
        memory: of one or more documents, for which one way is chosen.
        candidates: options that differ in how the memory is read only; by default `candidates_of(memory)`.
        local_tokens: tokens in ordinary attention before the first scored one, as there will be when the memory is
            used; by default the option of that name.
        tokens: how many are scored at the end of each document.
        margin: standard errors by which a candidate must beat the window alone.

    Raises:
        TypeError: `model` is no decoder.
        ValueError: a candidate needs another reading, or a document is too short.
    """
    if memory.is_encoder_decoder:
        raise TypeError("`memory` is of an encoder-decoder: only a decoder predicts the document it has read.")
    chosen = candidates_of(memory) if candidates is None else list(candidates)
    for candidate in chosen:
        _check_candidate(memory, candidate)
    local = memory.config.local_tokens if local_tokens is None else local_tokens
    if local < 1 or tokens < 2:
        raise ValueError(f"`local_tokens` must be at least 1 and `tokens` at least 2, got {local} and {tokens}.")
    shortest = int(memory.lengths.min())
    if shortest <= local + tokens:
        raise ValueError(
            f"`memory` holds a document of {shortest} tokens, and `local_tokens` {local} + `tokens` {tokens} of it "
            "are predicted from what precedes them: ask for fewer."
        )
    plain: list[Tensor] = []
    losses: list[list[Tensor]] = [[] for _ in chosen]
    for document in sorted(set(memory.documents)):
        alone = memory.select([memory.documents.index(document)])
        before = int(alone.lengths[0]) - local - tokens
        text = alone.input_ids[:, before : before + local + tokens].to(device_of(model))
        plain.append(next_token_losses(model, {"input_ids": text}, tokens))
        for found, candidate in zip(losses, chosen, strict=True):
            found.append(next_token_losses(model, as_read(model, alone, candidate, before).inputs(text), tokens))
    trials = ranked(torch.cat(plain), [(c, torch.cat(found)) for c, found in zip(chosen, losses, strict=True)], margin)
    best = trials[0].config
    return Calibration(None if best is None else indexed(model, as_read(model, memory, best)), trials)


@torch.no_grad()
def next_token_losses(model: PreTrainedModel, inputs: dict[str, Any], count: int) -> Tensor:
    """Negative log-likelihood (count,), in nats, of the last tokens of `inputs["input_ids"]` (1, more than count)."""
    logits = model(**inputs, logits_to_keep=count + 1).logits[0, :-1]
    targets = inputs["input_ids"][0, -count:]
    wide = torch.promote_types(logits.dtype, torch.float32)
    return torch.nn.functional.cross_entropy(logits.to(wide), targets, reduction="none")


def ranked(plain: Tensor, candidates: Sequence[tuple[UnlimiformerConfig, Tensor]], margin: float) -> tuple[Trial, ...]:
    """Trials from the losses (tokens,) of the window alone and of each candidate, the lowest bound first."""
    trials = [Trial(None, plain, 0.0, 0.0)]
    for config, losses in candidates:
        more = losses - plain
        trials.append(Trial(config, losses, float(more.mean()), float(more.std() / len(more) ** 0.5)))
    return tuple(sorted(trials, key=lambda trial: trial.bound(margin)))  # stable: at 0 the window alone


def _check_candidate(memory: Memory, candidate: UnlimiformerConfig) -> None:
    made, wanted = asdict(memory.config), asdict(candidate)
    if other := sorted(name for name in made if made[name] != wanted[name] and name not in _HOW_IT_IS_READ):
        raise ValueError(
            f"`candidates` may differ from the memory in {sorted(_HOW_IT_IS_READ)} only, one has `{other[0]}` "
            f"{wanted[other[0]]!r} and the memory {made[other[0]]!r}."
        )
    layers = memory_layers(candidate, memory.model_config)
    if missing := sorted(set(layers) - set(memory.keys)):
        raise ValueError(f"`candidates` holds one that reads layers {missing}, which the memory does not hold.")
    if candidate.positions != "squeeze" and decoder_family(memory.model_config).positions != "rotary":
        raise ValueError(f"`candidates` holds `positions` {candidate.positions!r}, but this model's keys cannot move.")
    trained, longest = trained_positions(memory.model_config, "decoder") or 0, int(memory.lengths.max())
    if candidate.positions == "true" and longest > trained and not has_scaled_positions(memory.model_config):
        raise ValueError(
            f'`candidates` holds `positions` "true", which places {longest} tokens, past the trained {trained}.'
        )


def as_read(model: PreTrainedModel, memory: Memory, config: UnlimiformerConfig, tokens: int | None = None) -> Memory:
    """The memory of the first `tokens` tokens of its documents, None for all, read as `config` says.

    Tokens keep what they saw when the whole document was read; only keys are moved to their new places.
    """
    longest = memory.input_ids.shape[1] if tokens is None else tokens
    lengths = memory.lengths.clamp(max=longest)
    named = {name: tensor[..., :longest, :] for name, tensor in memory.tensors().items()}
    moves = [
        memory_positions(new, memory.window, config.positions)[0]
        - memory_positions(old, memory.window, memory.config.positions)[0][:new]
        for old, new in zip(memory.lengths.tolist(), lengths.tolist(), strict=True)
    ]
    if any(bool(move.any()) for move in moves):
        turns = key_rotations(model)
        for layer, keys in memory.keys.items():
            moved = torch.zeros_like(keys[..., :longest, :])
            for document, move in enumerate(moves):
                of_document = keys[document, :, : len(move)]
                moved[document, :, : len(move)] = rotate(of_document, move, turns.get(layer))
            named[f"keys.{layer}"] = moved
    return replace(memory.with_tensors(named), config=config, lengths=lengths, input_ids=memory.input_ids[:, :longest])


@torch.no_grad()
def far_attention(model: PreTrainedModel, memory: Memory, question_ids: Tensor) -> Tensor:
    """How much of its attention each head gives to the memory, to rank layers and heads: (layers, heads) in [0, 1].

    The share of the softmax over memory and local tokens, mean over the question's tokens, less what falls on the
    document's first tokens, which draw attention whatever they say. Zero where a layer or head reads no memory.

    Args:
        model: a decoder whose attention is served.
        memory: what is read.
        question_ids: (len(memory), target), such as the text that follows the document.
    """
    report = AttentionReport()
    inputs = memory.inputs(question_ids, record=report)
    getattr(model, model.base_model_prefix)(**inputs)
    shape = model_shape(memory.model_config)
    shares = torch.zeros(shape.layers, shape.heads)
    for layer, of_heads in report.far_attention().items():
        shares[layer] = of_heads
    return shares
