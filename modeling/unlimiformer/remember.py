"""Reading documents into a memory: windows through an encoder or a decoder's body, once.

Where gradient is enabled an encoder's windows are checkpointed, so that the activations of one batch of windows are
held at a time: those of the last batch, which the backward pass needs first, are kept and not computed again.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm.auto import tqdm
from transformers import DynamicCache, PreTrainedModel

from ...configuration.configuration_unlimiformer import UnlimiformerConfig
from ..attachment import device_of
from ..cpu_linear import Linear
from ..transformers_compat import cache_argument
from .families import encoder_width, key_rotations, memory_layers, model_shape, projections
from .memory import Memory
from .model_fingerprint import model_fingerprint
from .positions import memory_positions, rotate
from .windows import Window, plan_windows

TOKENS_PER_BATCH = {"cpu": 1024}
"""Tokens read in one forward pass under "auto": more would cost a CPU memory and win nothing (2,048 took as long)."""
TOKENS_PER_BATCH_ELSEWHERE = 16384


@dataclass(frozen=True)
class Reading:
    """One window of one document, `prefix` tokens in front of it that are no part of it.

    The prefix is read in every window and kept from the first, so that it is stored once, before the document.
    """

    document: int
    window: Window
    prefix: int = 0

    @property
    def length(self) -> int:
        """Tokens read, with the prefix."""
        return self.prefix + self.window.end - self.window.start

    @property
    def kept(self) -> slice:
        """Which of the tokens read are kept."""
        start = self.place.start - self.window.start
        return slice(start, self.prefix + self.window.keep_end - self.window.start)

    @property
    def place(self) -> slice:
        """Where they belong among the stored tokens, which begin with the prefix."""
        start = self.prefix + self.window.keep_start if self.window.start else 0
        return slice(start, self.prefix + self.window.keep_end)

    def tokens(self, ids: Tensor) -> Tensor:
        """The tokens read (length,) of `ids` (tokens,), or what is said of them; the prefix and the document."""
        body = ids[self.prefix + self.window.start : self.prefix + self.window.end]
        return torch.cat([ids[: self.prefix], body])


@dataclass(frozen=True)
class Documents:
    """What is to be read.

    Args:
        ids: (documents, longest), each a prefix and a document, right-padded.
        lengths: (documents,), real tokens of each, on the CPU.
        prefixes: how many of them are a prefix; empty if none is.
        held: the first tokens of each that a memory holds already: they are read as context only, and what is made of
            the others is stored from 0 on. Empty if none are.
        global_tokens: like `ids`, True where a token has global attention in each window that reads it; None for none.
    """

    ids: Tensor
    lengths: Tensor
    prefixes: tuple[int, ...] = ()
    held: tuple[int, ...] = ()
    global_tokens: Tensor | None = None

    def prefix_of(self, document: int) -> int:
        """Tokens of the prefix of a document."""
        return self.prefixes[document] if self.prefixes else 0

    def held_of(self, document: int) -> int:
        """Tokens of a document that are not to be stored."""
        return self.held[document] if self.held else 0

    def to(self, device: torch.device) -> "Documents":
        """The same with ids on `device`."""
        global_tokens = None if self.global_tokens is None else self.global_tokens.to(device)
        return replace(self, ids=self.ids.to(device), global_tokens=global_tokens)

    @property
    def longest(self) -> int:
        """Tokens to be stored of the document that has most."""
        return max(length - self.held_of(document) for document, length in enumerate(self.lengths.tolist()))

    def place(self, reading: Reading) -> slice:
        """Where the kept tokens of a window are stored."""
        held = self.held_of(reading.document)
        return slice(reading.place.start - held, reading.place.stop - held)

    def readings(self, window: int, overlap: float, causal: bool) -> list[Reading]:
        """All windows that keep tokens to be stored, document by document."""
        found = []
        for document, length in enumerate(self.lengths.tolist()):
            prefix, held = self.prefix_of(document), self.held_of(document)
            windows = plan_windows(length - prefix, window - prefix, overlap, causal)
            planned = [Reading(document, part, prefix) for part in windows]
            found += [reading for reading in planned if reading.place.start >= held]
        return found


def check_weights_in_place(model: PreTrainedModel) -> None:
    """Refuse a model whose weights come and go with each forward: a memory reads those of its layers.

    Raises:
        ValueError: some were offloaded; names one.
    """
    for name, weight in model.named_parameters():
        if weight.is_meta:
            raise ValueError(
                f"`model` has offloaded weights, `{name}` among them: a memory is read and asked with all of them in "
                "place; load it with a `device_map` that offloads none, such as 'cpu' or 'cuda'."
            )


def real_tokens(
    input_ids: Tensor, attention_mask: Tensor | None, vocab_size: int, name: str = "input_ids"
) -> tuple[Tensor, Tensor]:
    """The documents without their padding: ids (documents, longest), right-padded with 0, and lengths on the CPU.

    Args:
        input_ids: (documents, longest), padded on the left or right.
        attention_mask: like `input_ids`, 1 for real tokens; None if all are.
        vocab_size: ids must lie below it.
        name: of the argument, for errors.

    Raises:
        ValueError: no tokens, a mask of another shape or with holes, an id outside the vocabulary; says where.
    """
    if input_ids.ndim != 2 or 0 in input_ids.shape:
        raise ValueError(f"`{name}` must be (documents, tokens), both at least 1, got {tuple(input_ids.shape)}.")
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"`attention_mask` must have the shape of `{name}`, {tuple(input_ids.shape)}, got "
            f"{tuple(attention_mask.shape)}."
        )
    real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    lengths = real.sum(1)
    if not bool((lengths > 0).all()):
        raise ValueError(f"`attention_mask` leaves document {int(lengths.argmin())} no token.")
    starts = real.int().argmax(1)
    places = torch.arange(input_ids.shape[1], device=input_ids.device)
    expected = (places >= starts[:, None]) & (places < (starts + lengths)[:, None])
    if not torch.equal(expected, real):
        document, place = (real != expected).nonzero()[0].tolist()
        raise ValueError(
            f"`attention_mask` has a hole in document {document} near position {place}: real tokens must be together."
        )
    wrong = real & ((input_ids < 0) | (input_ids >= vocab_size))
    if bool(wrong.any()):
        document, place = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"`{name}` holds {int(input_ids[document, place])} at position {place} of document {document}, outside "
            f"the vocabulary of {vocab_size}."
        )
    longest = int(lengths.max())
    columns = (starts[:, None] + torch.arange(longest, device=input_ids.device)).clamp(max=input_ids.shape[1] - 1)
    ids = input_ids.gather(1, columns)
    return ids.masked_fill(torch.arange(longest, device=ids.device) >= lengths[:, None], 0), lengths.cpu()


def joined_rows(first: Tensor, second: Tensor, lengths: tuple[Tensor, Tensor]) -> Tensor:
    """The rows of `second` behind those of `first`, (rows, longest), right-padded with 0.

    Args:
        first, second: (rows, ...), right-padded.
        lengths: (rows,) of each of the two.
    """
    ends = lengths[0] + lengths[1]
    joint = second.new_zeros(len(second), int(ends.max()))
    for row, (middle, end) in enumerate(zip(lengths[0].tolist(), ends.tolist(), strict=True)):
        joint[row, :middle] = first[row, :middle]
        joint[row, middle:end] = second[row, : end - middle]
    return joint


def vocabulary_size(model: PreTrainedModel) -> int:
    """How many ids the model's input embeddings know."""
    embeddings: Any = model.get_input_embeddings()
    return int(embeddings.weight.shape[0])


def first_window(input_ids: Tensor, attention_mask: Tensor | None, window: int) -> tuple[Tensor, Tensor | None]:
    """The first `window` real tokens of each row and their mask; rows that fit stay as they are."""
    if input_ids.shape[1] <= window:
        return input_ids, attention_mask
    if attention_mask is None:
        return input_ids[:, :window], None
    starts = attention_mask.argmax(1, keepdim=True)
    columns = starts + torch.arange(window, device=input_ids.device)
    inside = columns < input_ids.shape[1]
    columns = columns.clamp(max=input_ids.shape[1] - 1)
    return input_ids.gather(1, columns), attention_mask.gather(1, columns) * inside


def plan_batches(
    documents: Documents, window: int, config: UnlimiformerConfig, causal: bool, device: torch.device
) -> list[list[Reading]]:
    """All windows of all documents in batches of equal length, so that nothing is padded."""
    readings = documents.readings(window, config.overlap, causal)
    readings.sort(key=lambda reading: reading.length)  # stable: a document's windows stay in order
    per_batch = config.windows_per_batch
    tokens = TOKENS_PER_BATCH.get(device.type, TOKENS_PER_BATCH_ELSEWHERE)
    batches: list[list[Reading]] = []
    for reading in readings:
        size = max(1, tokens // reading.length) if per_batch == "auto" else per_batch
        if not batches or len(batches[-1]) >= size or batches[-1][0].length != reading.length:
            batches.append([])
        batches[-1].append(reading)
    return batches


def read_windows(ids: Tensor, batches: list[list[Reading]], progress: bool) -> Iterator[tuple[list[Reading], Tensor]]:
    """Each batch of windows with its tokens (windows, length)."""
    with tqdm(total=sum(map(len, batches)), unit="window", desc="reading", disable=not progress) as bar:
        for batch in batches:
            yield batch, torch.stack([reading.tokens(ids[reading.document]) for reading in batch])
            bar.update(len(batch))


def check_finite(states: Tensor, batch: list[Reading]) -> None:
    """Raise ValueError naming the window if an encoded state is NaN or infinite."""
    finite = states.isfinite().flatten(1).all(1)
    if not bool(finite.all()):
        bad = batch[int(finite.int().argmin())]
        raise ValueError(
            f"the model's states of tokens [{bad.window.start}, {bad.window.end}) of document {bad.document} are not "
            f"finite in {states.dtype}: load the model in bfloat16 or float32."
        )


def stored_dtype(model: PreTrainedModel, config: UnlimiformerConfig) -> torch.dtype:
    """What the memory is stored in: `memory_dtype`, or the dtype of the model."""
    dtype: torch.dtype = getattr(torch, config.memory_dtype) if config.memory_dtype else model.dtype
    return dtype


def folds(attentions: list[nn.Module]) -> bool:
    """Whether key and value projections are plain matrices, so that hidden states can stand for keys and values."""
    both = (projection for module in attentions for projection in projections(module)[1:3])
    return all(type(projection) in (nn.Linear, Linear) for projection in both)


def stores_keys(config: UnlimiformerConfig, attentions: list[nn.Module]) -> bool:
    """Whether an encoder-decoder's memory holds keys and values, not hidden states."""
    return config.store == "keys_values" or (config.store == "auto" and not folds(attentions))


def cross_projections(attention: nn.Module, states: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """Keys and values (documents, heads, source, head_dim) that a cross-attention makes of encoder states."""
    made = (projection(states) for projection in projections(attention)[1:3])
    keys, values = (projected.unflatten(-1, (-1, head_dim)).transpose(1, 2) for projected in made)
    return keys, values


@contextmanager
def kept_attention_type(encoder: Any) -> Iterator[None]:
    """BigBird's encoder exchanges its block-sparse attention for good where an input is short: put it back."""
    layers = list(encoder.layers) if hasattr(encoder, "set_attention_type") else []
    before = [(layer.attention_type, layer.self_attn.attention_type, layer.self_attn.self) for layer in layers]
    kind = getattr(encoder, "attention_type", None)
    try:
        yield
    finally:
        for layer, (outer, inner, attention) in zip(layers, before, strict=True):
            layer.attention_type, layer.self_attn.attention_type, layer.self_attn.self = outer, inner, attention
        if layers:
            encoder.attention_type = kind


def _encoded(encoder: Any, tokens: Tensor, global_tokens: Tensor | None, keeps_activations: bool) -> Tensor:
    """The encoder's states (windows, length, hidden_size); without activations a backward pass computes them again."""
    options = {} if global_tokens is None else {"global_attention_mask": global_tokens.long()}

    def states(ids: Tensor) -> Tensor:
        with kept_attention_type(encoder):
            found: Tensor = encoder(input_ids=ids, **options).last_hidden_state
        return found

    if keeps_activations or not torch.is_grad_enabled():
        return states(tokens)
    made: Tensor = checkpoint(states, tokens, use_reentrant=False)
    return made


def remember_encoded(
    model: PreTrainedModel,
    attentions: list[nn.Module],
    config: UnlimiformerConfig,
    window: int,
    documents: Documents,
    progress: bool = False,
) -> Memory:
    """Read documents with the encoder of an encoder-decoder.

    Args:
        model: the model.
        attentions: its cross-attention modules, one for each decoder layer.
        config: the options.
        window: tokens of a window.
        documents: what is read.
        progress: show a bar.
    """
    documents = documents.to(device_of(model))
    ids, count, longest = documents.ids, len(documents.lengths), documents.longest
    layers = memory_layers(config, model.config)
    width, head_dim = encoder_width(model.config), model_shape(model.config).head_dim
    states = torch.zeros(count, longest, width, dtype=stored_dtype(model, config), device=ids.device)
    windowed = config.heads is not None or config.first_step == "window"
    read_first = [layer for layer in range(len(attentions)) if windowed or layer not in layers]
    first_length = min(ids.shape[1], window) if read_first else 0  # else it is held for nobody
    first_window = torch.zeros(count, first_length, width, dtype=model.dtype, device=ids.device)
    batches = plan_batches(documents, window, config, causal=False, device=ids.device)
    for batch, tokens in read_windows(ids, batches, progress):
        global_tokens = documents.global_tokens
        if global_tokens is not None:
            global_tokens = torch.stack([reading.tokens(global_tokens[reading.document]) for reading in batch])
        encoded = _encoded(model.get_encoder(), tokens, global_tokens, keeps_activations=batch is batches[-1])
        check_finite(encoded, batch)
        for reading, row in zip(batch, encoded, strict=True):
            states[reading.document, documents.place(reading)] = row[reading.kept].to(states.dtype)
            if read_first and reading.window.start == 0:
                first_window[reading.document, : reading.length] = row
        del encoded, row  # before the next window is read
    keeps_keys = stores_keys(config, attentions)
    keys, values, window_keys, window_values = {}, {}, {}, {}
    for layer, attention in enumerate(attentions):
        if keeps_keys and layer in layers:
            made = cross_projections(attention, states.to(model.dtype), head_dim)
            keys[layer], values[layer] = (tensor.to(states.dtype).contiguous() for tensor in made)
        if layer in read_first:
            made = cross_projections(attention, first_window, head_dim)
            window_keys[layer], window_values[layer] = map(Tensor.contiguous, made)
    hidden = None if keeps_keys else states
    return _memory(model, config, window, documents, hidden, keys, values, window_keys, window_values)


def remember_decoded(
    model: PreTrainedModel,
    config: UnlimiformerConfig,
    window: int,
    documents: Documents,
    progress: bool = False,
) -> Memory:
    """Read documents with a decoder's body; what its layers in range cached of the kept tokens is the memory.

    A window leaves its keys rotated from position 0 on; each is moved once to its place behind the local tokens.
    """
    documents = documents.to(device_of(model))
    ids, count, longest = documents.ids, len(documents.lengths), documents.longest
    layers, rotations = memory_layers(config, model.config), key_rotations(model)
    body: Any = getattr(model, model.base_model_prefix)
    targets = [memory_positions(length, window, config.positions)[0] for length in documents.lengths.tolist()]
    dtype = stored_dtype(model, config)
    keys: dict[int, Tensor] = {}
    values: dict[int, Tensor] = {}
    batches = plan_batches(documents, window, config, causal=True, device=ids.device)
    for batch, tokens in read_windows(ids, batches, progress):
        cache = DynamicCache(config=model.config)
        check_finite(body(input_ids=tokens, use_cache=True, **cache_argument(cache)).last_hidden_state, batch)
        for layer in layers:
            cached: Any = cache.layers[layer]
            new_keys, new_values = cached.keys, cached.values
            if layer not in keys:
                for store, new in ((keys, new_keys), (values, new_values)):
                    store[layer] = new.new_zeros(count, new.shape[1], longest, new.shape[3], dtype=dtype)
            for row, reading in enumerate(batch):
                read_at = torch.arange(reading.length)[reading.kept]
                offsets = targets[reading.document][reading.place] - read_at
                moved = rotate(new_keys[row, :, reading.kept], offsets, rotations.get(layer))
                place = documents.place(reading)
                keys[layer][reading.document, :, place] = moved.to(dtype)
                values[layer][reading.document, :, place] = new_values[row, :, reading.kept].to(dtype)
    return _memory(model, config, window, documents, None, keys, values)


def _memory(
    model: PreTrainedModel, config: UnlimiformerConfig, window: int, documents: Documents, *stored: Any
) -> Memory:
    """A memory whose rows ask the documents in order; `stored` as the last fields of Memory."""
    rows = tuple(range(len(documents.lengths)))
    fingerprint, ids, lengths = model_fingerprint(model), documents.ids, documents.lengths
    memory = Memory(config, model.config, window, fingerprint, ids, lengths, rows, *stored)
    return replace(memory, prefixes=documents.prefixes, global_tokens=documents.global_tokens)
