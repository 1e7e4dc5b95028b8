"""`unlimiform(model, config)`: give a model people already have a memory, until it is taken away again."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...configuration.configuration_unlimiformer import UnlimiformerConfig
from ..attachment import Attachment, AttentionStep, device_of, serves
from .append_to_memory import check_appendable, grown, joined
from .attend import attend_to_memory, cross_attend_to_memory, offer_memory
from .calibration import Calibration, calibrate, far_attention
from .families import (
    attention_modules,
    check_family,
    decoder_family,
    dispatches,
    encoder_decoder_family,
    family_name,
    has_scaled_positions,
    key_rotations,
    memory_layers,
    model_shape,
    rope_parameters,
    trained_positions,
)
from .memory import Memory, keys_rule, model_fingerprint
from .memory_size import MemorySize, check_budget, documents_of, memory_size, resolve_window
from .remember import (
    Documents,
    check_weights_in_place,
    folds,
    joined_rows,
    real_tokens,
    remember_decoded,
    remember_encoded,
    stores_keys,
    vocabulary_size,
)
from .report import AttentionReport, HeadPlace, recording
from .retrieval_heads import retrieval_heads
from .swapped_cross_attention import SwappedCrossAttention

Padded = tuple[Tensor, Tensor | None]
"""Ids (documents, longest), padded on either side, and their mask or None."""


def memory_attentions(model: PreTrainedModel, config: UnlimiformerConfig) -> tuple[list[nn.Module], AttentionStep]:
    """The attention modules that will be served, one for each decoder layer, and the step that serves them.

    Raises:
        TypeError: the model is of no supported family; says why and lists those that are.
        ValueError: an option does not fit the model.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"`model` must be a transformers model, got {type(model).__name__}; of a PEFT model pass "
            "`model.get_base_model()`."
        )
    check_family(model)
    attentions = attention_modules(model)
    swaps = model.config.is_encoder_decoder and encoder_decoder_family(model.config).swapped
    if not swaps and not all(map(dispatches, attentions)):
        raise TypeError(
            f"`model` is a {type(model).__name__}, whose attention transformers {transformers.__version__} computes "
            "by itself: it needs a newer transformers."
        )
    step: AttentionStep = attend_to_memory
    if model.config.is_encoder_decoder:
        step = cross_attend_to_memory
        if getattr(model.model if family_name(model.config) == "mvp" else None, "use_prompt", False):
            raise ValueError("`model` puts prompts in front of its keys (`use_prompt`), which a memory does not hold.")
        if config.store == "hidden" and not folds(attentions):
            raise ValueError(
                '`store` "hidden" folds plain linear projections, which an adapter has replaced: "keys_values" serves.'
            )
    else:
        _check_decoder(model, config)
    memory_layers(config, model.config)
    heads = model_shape(model.config).heads
    if config.heads is not None and max(config.heads) >= heads:
        raise ValueError(f"`heads` must lie in [0, {heads}) for this model, got {config.heads}.")
    return attentions, step


def _check_decoder(model: PreTrainedModel, config: UnlimiformerConfig) -> None:
    if config.store == "hidden":
        raise ValueError('`store` "hidden" needs an encoder; a decoder keeps "keys_values".')
    if config.first_step == "window":
        raise ValueError(
            '`first_step` "window" needs an encoder; a decoder reads its "memory" from the first step on.'
        )
    if config.positions != "squeeze" and decoder_family(model.config).positions == "table":
        raise ValueError(
            f"`positions` {config.positions!r} moves rotary keys, and `model` has a table of positions, which its "
            'keys hold for good: use "squeeze", which leaves them as their window made them.'
        )
    rope = rope_parameters(model.config)
    if rope.get("rope_type", "default") in ("dynamic", "longrope"):
        raise ValueError(
            f"`model` changes its rotary frequencies with the length of its input (rope_type {rope['rope_type']!r}), "
            "so remembered keys cannot be moved."
        )


def _spelt(layers: tuple[int, ...]) -> str:
    """The layers that hold memory, in words: a range where they follow each other, else each of them."""
    if layers == tuple(range(layers[0], layers[-1] + 1)):
        return f"layers {layers[0]} to {layers[-1]}"
    return f"layers {', '.join(map(str, layers))}"


class Unlimited(Attachment):
    """A model with a memory: remembers documents, generates from them; `remove()` or the end of a `with` undoes it."""

    def __init__(self, model: PreTrainedModel, config: UnlimiformerConfig) -> None:
        super().__init__()
        self.model = model
        self.config = config
        self.attentions, step = memory_attentions(model, config)
        self.window = resolve_window(model.config, config)
        if any(serves(module, step) or isinstance(module, SwappedCrossAttention) for module in self.attentions):
            raise RuntimeError("`model` has a memory already: `remove()` the other attachment first.")
        with self.installing():
            if model.config.is_encoder_decoder and encoder_decoder_family(model.config).swapped:
                self._swap_modules()
                return
            for attention in self.attentions:
                self.serve(attention, step, offer_memory)

    def _swap_modules(self) -> None:
        """Put a module of ours in place of each cross-attention until removal."""
        theirs = {id(attention) for attention in self.attentions}
        for name, module in list(self.model.named_modules()):
            if id(module) in theirs:
                parent, _, child = name.rpartition(".")
                owner = self.model.get_submodule(parent)
                self._undo.callback(setattr, owner, child, module)
                setattr(owner, child, SwappedCrossAttention(module))

    def __repr__(self) -> str:
        state = "" if self.is_attached else ", removed"
        rule = keys_rule(self.config, self.window)
        layers = _spelt(memory_layers(self.config, self.model.config))
        return f"Unlimited({type(self.model).__name__}, {rule}, {layers}, window {self.window}{state})"

    def remember(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        progress: bool = False,
        prefix_ids: Tensor | None = None,
        prefix_mask: Tensor | None = None,
        global_attention_mask: Tensor | None = None,
    ) -> Memory:
        """Read documents once, in windows, without gradient.

        Args:
            input_ids: (documents, longest), left- or right-padded.
            attention_mask: like `input_ids`, 1 for real tokens.
            progress: show a bar.
            prefix_ids: (documents, tokens) that an encoder reads in front of every window, such as a question, so that
                it encodes all of the document in its light (Ivgi et al. 2022, SLED, arXiv 2208.00748); stored once.
            prefix_mask: like `prefix_ids`, 1 for real tokens.
            global_attention_mask: like `input_ids`, 1 for tokens that LED's encoder gives global attention in each
                window that holds them (Beltagy et al. 2020, arXiv 2004.05150); those of a prefix then have it in all.

        Raises:
            ValueError: an input that cannot be read, a document beyond the trained length under "true" positions, a
                memory of more than `max_bytes`, a prefix that leaves a window no room, or of a decoder, or global
                attention of a model that has none.
            RuntimeError: the attachment was removed.
        """
        self.check_attached()
        documents, prefix = (input_ids, attention_mask), (prefix_ids, prefix_mask)
        return remember(self.model, self.config, documents, progress, prefix, global_attention_mask)

    def append(
        self,
        memory: Memory,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        progress: bool = False,
        global_attention_mask: Tensor | None = None,
    ) -> Memory:
        """A memory of the same documents with more behind them, as if all had been remembered at once.

        Only windows that the new tokens change are read. `memory` stays as it is; it says how the result is read
        (`keys_per_query`, `sinks`, ...) and in which dtype it is kept.

        Args:
            memory: made by this model with these options, here or in another process.
            input_ids: (len(memory), longest), left- or right-padded.
            attention_mask: like `input_ids`, 1 for real tokens.
            progress: show a bar.
            global_attention_mask: of the tokens appended, as of `remember`.

        Raises:
            ValueError: other weights or options made the memory, or as `remember`.
            RuntimeError: the attachment was removed.
        """
        self.check_attached()
        documents = (input_ids, attention_mask)
        return append(self.model, memory, self.config, documents, progress, global_attention_mask)

    def estimate(self, tokens: int | Sequence[int], prefix: int = 0) -> MemorySize:
        """Bytes of the memory of documents of so many tokens, and the windows to be read, `prefix` more in each."""
        return size_of(self.model, self.config, documents_of(tokens, prefix))

    def calibrate(self, memory: Memory, **options: Any) -> Calibration:
        """Choose how a decoder's memory is read by what best predicts the end of its documents, see `calibrate`.

        Args:
            memory: made by this model.
            options: candidates, local_tokens, tokens, margin.
        """
        self.check_attached()
        return calibrate(self.model, memory, **options)

    def far_attention(self, memory: Memory, question_ids: Tensor) -> Tensor:
        """(layers, heads): the share of its attention that each head gives to the memory, see `far_attention`."""
        self.check_attached()
        return far_attention(self.model, memory, question_ids)

    def retrieval_heads(self, memory: Memory, **options: Any) -> list[HeadPlace]:
        """The (layer, head) of a decoder that find what they are asked, the best first, see `retrieval_heads`.

        Args:
            memory: made by this model.
            options: count, probes, tokens.
        """
        self.check_attached()
        return retrieval_heads(self.model, memory, **options)

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        progress: bool = False,
        global_attention_mask: Tensor | None = None,
        **options: Any,
    ) -> Any:
        """Remember and generate in one call; options go to `model.generate`.

        Of a decoder's input the last `local_tokens` stay in ordinary attention and everything before them is
        remembered; an input no longer than that is generated from by the stock model.

        Returns:
            What `model.generate` returns; a decoder's sequences begin with their local tokens.
        """
        self.check_attached()
        if self.model.config.is_encoder_decoder:
            memory = self.remember(input_ids, attention_mask, progress, global_attention_mask=global_attention_mask)
            inputs = memory.inputs(max_new_tokens=new_tokens(self.model, options))
        else:
            check_global(self.model, global_attention_mask)
            inputs = self.split(input_ids, attention_mask, progress, new_tokens(self.model, options))
        return self.model.generate(**inputs, **options)  # type: ignore[operator]

    def split(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        progress: bool = False,
        max_new_tokens: int = 0,
    ) -> dict[str, Any]:
        """Inputs for a decoder: the last `local_tokens` of each row, behind a memory of all before them."""
        self.check_attached()
        documents = (input_ids, attention_mask)
        memory, local, mask = split_documents(self.model, self.config, documents, progress)
        if memory is None:
            return {"input_ids": local, "attention_mask": mask}
        return memory.inputs(local, mask, max_new_tokens=max_new_tokens)

    def record(self) -> AbstractContextManager[AttentionReport]:
        """Give one report to every cache this thread makes inside the `with`."""
        self.check_attached()
        return recording()


def new_tokens(model: PreTrainedModel, options: dict[str, Any]) -> int:
    """The `max_new_tokens` that `model.generate(**options)` will go by, 0 if it goes by another limit."""
    generation = options.get("generation_config") or model.generation_config
    return options.get("max_new_tokens", generation.max_new_tokens) or 0


def remember(
    model: PreTrainedModel,
    config: UnlimiformerConfig,
    documents: Padded,
    progress: bool = False,
    prefix: tuple[Tensor | None, Tensor | None] = (None, None),
    global_attention_mask: Tensor | None = None,
) -> Memory:
    """Read documents with a model whose attention is served; `prefix` is as `documents`, one for each, or no ids."""
    check_weights_in_place(model)
    ids, lengths = real_tokens(*documents, vocabulary_size(model))
    real = Documents(ids, lengths, global_tokens=global_tokens(model, documents, global_attention_mask))
    prefix_ids, prefix_mask = prefix
    if prefix_ids is not None:
        window = resolve_window(model.config, config)
        tokens = real_tokens(prefix_ids, prefix_mask, vocabulary_size(model), "prefix_ids")
        real = _with_prefixes(model, window, real, tokens)
    elif prefix_mask is not None:
        raise ValueError("`prefix_mask` says which of `prefix_ids` are real, but `prefix_ids` is None.")
    return _read(model, config, real, progress)


def check_global(model: PreTrainedModel, global_attention_mask: Tensor | None) -> None:
    """Refuse global attention for an encoder that has none, or for a decoder."""
    encodes = model.config.is_encoder_decoder
    if global_attention_mask is not None and not (encodes and encoder_decoder_family(model.config).has_global_tokens):
        raise ValueError(
            f"`global_attention_mask` is for LED, whose encoder has global attention; {type(model).__name__} has none."
        )


def global_tokens(model: PreTrainedModel, documents: Padded, global_attention_mask: Tensor | None) -> Tensor | None:
    """Which real tokens have global attention, placed as `real_tokens` places their ids."""
    check_global(model, global_attention_mask)
    if global_attention_mask is None:
        return None
    ids, mask = documents
    if global_attention_mask.shape != ids.shape:
        raise ValueError(
            f"`global_attention_mask` must have the shape of `input_ids`, {tuple(ids.shape)}, got "
            f"{tuple(global_attention_mask.shape)}."
        )
    return real_tokens((global_attention_mask > 0).long(), mask, 2)[0].bool()


def append(
    model: PreTrainedModel,
    memory: Memory,
    config: UnlimiformerConfig,
    documents: Padded,
    progress: bool = False,
    global_attention_mask: Tensor | None = None,
) -> Memory:
    """The memory of what `memory` holds with `documents` behind it, one for each of its rows."""
    check_weights_in_place(model)
    check_appendable(memory, config, resolve_window(model.config, config), model_fingerprint(model))
    ids, lengths = real_tokens(*documents, vocabulary_size(model))
    more_global = global_tokens(model, documents, global_attention_mask)
    both = grown(memory, (ids.to(memory.input_ids.device), lengths), more_global)
    rotations = {} if memory.is_encoder_decoder else key_rotations(model)
    return joined(memory, _read(model, config, both, progress), both, rotations)


def size_of(model: PreTrainedModel, config: UnlimiformerConfig, documents: Documents) -> MemorySize:
    """What remembering `documents` will cost, adapters included."""
    return memory_size(model.config, documents, config, model.dtype, _keeps_keys(model, config))


def _keeps_keys(model: PreTrainedModel, config: UnlimiformerConfig) -> bool:
    return not model.config.is_encoder_decoder or stores_keys(config, memory_attentions(model, config)[0])


def _with_prefixes(
    model: PreTrainedModel, window: int, documents: Documents, prefix: tuple[Tensor, Tensor]
) -> Documents:
    """The documents, each behind its prefix, which every window will repeat."""
    ids, lengths = prefix
    if not model.config.is_encoder_decoder:
        raise ValueError(
            "`prefix_ids` needs an encoder; a decoder is asked behind its memory, with `inputs(question)`."
        )
    if len(ids) != len(documents.ids):
        raise ValueError(f"`prefix_ids` must have a row for each of {len(documents.ids)} documents, got {len(ids)}.")
    if int(lengths.max()) >= window:
        raise ValueError(
            f"`prefix_ids` has {int(lengths.max())} tokens, and a window {window}: it must also hold some document."
        )
    both = (lengths, documents.lengths)
    seen = documents.global_tokens
    return Documents(
        joined_rows(ids, documents.ids, both),
        lengths + documents.lengths,
        tuple(lengths.tolist()),
        global_tokens=None if seen is None else joined_rows(torch.ones_like(ids, dtype=torch.bool), seen, both),
    )


@torch.no_grad()
def _read(model: PreTrainedModel, config: UnlimiformerConfig, documents: Documents, progress: bool) -> Memory:
    return read_documents(model, config, documents, progress)


def read_documents(
    model: PreTrainedModel, config: UnlimiformerConfig, documents: Documents, progress: bool = False
) -> Memory:
    """Read documents in windows, with gradient where it is enabled; `model` must be one whose attention is served."""
    window, encodes = resolve_window(model.config, config), bool(model.config.is_encoder_decoder)
    if config.max_bytes is not None:
        check_budget(size_of(model, config, documents), config, _keeps_keys(model, config), encodes)
    if encodes:
        return remember_encoded(model, memory_attentions(model, config)[0], config, window, documents, progress)
    trained, longest = trained_positions(model.config, "decoder") or 0, int(documents.lengths.max())
    if config.positions == "true" and longest > trained and not has_scaled_positions(model.config):
        raise ValueError(
            f'`positions` "true" places {longest} tokens, and the model was trained on {trained}: '
            'use "squeeze" or "origin".'
        )
    return remember_decoded(model, config, window, documents, progress)


def split_documents(
    model: PreTrainedModel, config: UnlimiformerConfig, documents: Padded, progress: bool = False
) -> tuple[Memory | None, Tensor, Tensor]:
    """Split each row of a decoder's input into a memory and the last `local_tokens`.

    Returns:
        The memory, None if no row is longer than `local_tokens`; the local tokens (rows, at most local_tokens),
        left-padded, and their mask.

    Raises:
        ValueError: some rows are longer than `local_tokens` and some are not.
    """
    ids, lengths = real_tokens(*documents, vocabulary_size(model))
    local = lengths.clamp(max=config.local_tokens)
    before = lengths - local
    device = device_of(model)
    ids = ids.to(device)
    width = int(local.max())
    columns = torch.arange(width) + (lengths - width)[:, None]
    mask = (torch.arange(width) >= (width - local)[:, None]).to(device, torch.long)
    question = ids.gather(1, columns.clamp(min=0).to(device)) * mask
    if int(before.max()) == 0:
        return None, question, mask
    if int(before.min()) == 0:
        raise ValueError(
            f"`input_ids` holds a document of {int(lengths.min())} tokens, no longer than `local_tokens` "
            f"{config.local_tokens}, beside one of {int(lengths.max())}: give them in separate calls."
        )
    longest = int(before.max())
    kept = (torch.arange(longest) < before[:, None]).to(device, torch.long)
    return remember(model, config, (ids[:, :longest], kept), progress), question, mask


def unlimiform(model: PreTrainedModel, config: UnlimiformerConfig | None = None) -> Unlimited:
    """Let attention in `model` read a memory of documents of any length until the attachment is removed.

    Nothing of the model is replaced: an attention function is registered for the modules concerned, and the memory
    travels in the cache. A forward without a memory in its cache is the stock model's, bit for bit, in train and eval.

        with unlimiform(model, UnlimiformerConfig(keys_per_query=64)) as unlimited:
            memory = unlimited.remember(input_ids)
            answer = model.generate(**memory.inputs(question_ids), max_new_tokens=50)

    Args:
        model: with a language-modelling head, of a family in families.py: docs/memory.md lists them.
        config: the options, `UnlimiformerConfig()` by default.

    Raises:
        TypeError: the model is of no supported family.
        ValueError: an option does not fit the model.
        RuntimeError: the model has a memory already.
    """
    return Unlimited(model, config or UnlimiformerConfig())
