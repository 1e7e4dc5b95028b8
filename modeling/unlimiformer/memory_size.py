"""What a memory will cost before anything is read: its bytes, and the windows the model has to read for it."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from transformers import PreTrainedConfig

from ...configuration.configuration_unlimiformer import UnlimiformerConfig
from .families import (
    decoder_family,
    encoder_decoder_family,
    encoder_width,
    has_scaled_positions,
    memory_layers,
    model_shape,
    trained_positions,
)
from .key_index import index_bytes
from .remember import Documents


class MemorySize(NamedTuple):
    """Bytes of the stored vectors (`Memory.nbytes`), windows to be read, and tokens in them with their overlaps.

    `index_nbytes` are those of `Memory.index_nbytes`.
    """

    nbytes: int
    windows: int
    tokens_read: int
    index_nbytes: int = 0

    def __str__(self) -> str:
        index = f" and {self.index_nbytes / 2**20:,.1f} MB of indexes" if self.index_nbytes else ""
        read = f"{self.windows:,} windows of {self.tokens_read:,} tokens together"
        return f"{self.nbytes / 2**20:,.1f} MB{index} from {read}"


def resolve_window(model_config: PreTrainedConfig, config: UnlimiformerConfig) -> int:
    """Tokens the model reads at a time: `window`, or what it was trained on, less room for what follows in a decoder.

    Raises:
        ValueError: the window is longer than the positions of the model, or `reserve` takes all of them.
    """
    trained = trained_positions(model_config, "encoder")
    window = _default_window(model_config, config, trained) if config.window is None else config.window
    if trained is not None and window > trained and not has_scaled_positions(model_config):
        raise ValueError(f"`window` must be at most the model's {trained} positions, got {window}.")
    if config.keys_per_query == "window" and config.sinks > window:
        raise ValueError(f"`sinks` must lie in [0, `window`], got {config.sinks} of {window}.")
    return window


def _default_window(model_config: PreTrainedConfig, config: UnlimiformerConfig, trained: int | None) -> int:
    if model_config.is_encoder_decoder:
        window = encoder_decoder_family(model_config).window
        return min(value for value in (window, trained) if value is not None)
    assert trained is not None  # every decoder has a length it was trained on
    if decoder_family(model_config).positions == "rotary":
        return max(1, trained // 2)
    if config.reserve >= trained:
        raise ValueError(f"`reserve` must leave some of the model's {trained} positions, got {config.reserve}.")
    return trained - config.reserve


def estimate_memory(
    model_config: PreTrainedConfig,
    tokens: int | Sequence[int],
    config: UnlimiformerConfig | None = None,
    dtype: torch.dtype = torch.float32,
) -> MemorySize:
    """What remembering will cost, from a model's config alone: exact for a model without adapters.

    Args:
        model_config: of a family that is served.
        tokens: of the document, or of each.
        config: the options, `UnlimiformerConfig()` by default.
        dtype: of the model.

    Raises:
        ValueError: an option does not fit the model, or a document is empty.
    """
    config = config or UnlimiformerConfig()
    keeps_keys = config.store == "keys_values" or not model_config.is_encoder_decoder
    return memory_size(model_config, documents_of(tokens), config, dtype, keeps_keys)


def documents_of(tokens: int | Sequence[int], prefix: int = 0) -> Documents:
    """Documents of these lengths, without their ids, each behind `prefix` tokens that every window repeats."""
    lengths = torch.tensor([tokens] if isinstance(tokens, int) else list(tokens))
    if not len(lengths) or int(lengths.min()) < 1:
        raise ValueError(f"`tokens` must be the length of each document, at least 1, got {tokens}.")
    return Documents(torch.empty(len(lengths), 0, dtype=torch.long), lengths + prefix, (prefix,) * len(lengths))


def memory_size(
    model_config: PreTrainedConfig, documents: Documents, config: UnlimiformerConfig, dtype: torch.dtype, keys: bool
) -> MemorySize:
    """Bytes of the memory of `documents`, those held counted too, and what has to be read.

    Args:
        model_config: of the model.
        documents: to be read; their ids are not looked at.
        config: the options.
        dtype: of the model.
        keys: whether keys and values are stored, not hidden states.
    """
    window = resolve_window(model_config, config)
    shape, layers = model_shape(model_config), memory_layers(config, model_config)
    count, longest = len(documents.lengths), int(documents.lengths.max())
    stored: torch.dtype = getattr(torch, config.memory_dtype) if config.memory_dtype else dtype
    both = 2 * shape.key_heads * shape.head_dim  # numbers of one token's key and value in one layer
    per_token = len(layers) * both if keys else encoder_width(model_config)
    nbytes = count * longest * per_token * stored.itemsize
    if model_config.is_encoder_decoder:
        windowed = config.heads is not None or config.first_step == "window"
        others = shape.layers if windowed else shape.layers - len(layers)
        nbytes += count * min(longest, window) * others * both * dtype.itemsize
    readings = documents.readings(window, config.overlap, causal=not model_config.is_encoder_decoder)
    dim, stores = (shape.head_dim, len(layers) * shape.key_heads) if keys else (encoder_width(model_config), 1)
    indexes = stores * index_bytes(config, window, documents.lengths.tolist(), dim)
    return MemorySize(nbytes, len(readings), sum(reading.length for reading in readings), indexes)


def check_budget(size: MemorySize, config: UnlimiformerConfig, keys: bool, is_encoder_decoder: bool) -> None:
    """Refuse, before anything is read, a memory of more than `max_bytes`.

    Raises:
        ValueError: names both numbers and the options that would make it smaller.
    """
    wanted = size.nbytes + size.index_nbytes
    if config.max_bytes is None or wanted <= config.max_bytes:
        return
    ways = ["give fewer or shorter documents", "let fewer layers read it (`first_layer`)"]
    if not keys:
        ways = ways[:1]
    if size.index_nbytes:
        ways.append('search it exactly (`index` "exact")')
    if keys and is_encoder_decoder:
        ways.append('keep the encoder\'s output only (`store` "hidden")')
    if config.memory_dtype in (None, "float32"):
        ways.append('store it in half precision (`memory_dtype` "bfloat16")')
    raise ValueError(
        f"`max_bytes` is {config.max_bytes:,} and the memory would take {wanted:,} bytes: raise it, or "
        f"{', or '.join(ways)}."
    )
