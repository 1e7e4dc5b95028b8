"""What a model with memory is: the options of the memory, and one config for each permanent class.

Bertsch et al. 2023, "Unlimiformer: Long-Range Transformers with Unlimited Length Input", arXiv 2305.01625.
"""

# No `from __future__ import annotations` here: it would silently switch the strict type checks off.
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import BartConfig, LlamaConfig, Qwen3Config, T5Config

COUNTS = ("keys_per_query", "window", "local_tokens", "reserve", "windows_per_batch", "max_bytes", "index_refine")
INDEX_WIDTHS = {"ivf_flat": "nprobe", "ivf_pq": "nprobe", "hnsw": "ef_search"}
"""Kinds of index of which a search may read more or less, and the parameter that says how much."""


@strict
@dataclass
class UnlimiformerConfig:
    """How attention reads an input longer than its window.

    Args:
        keys_per_query: keys each head keeps for each query: a number, "window" (as many as the window has tokens), or
            None for all of them, which is exact full attention over the memory.
        window: tokens the model reads at a time; None takes all positions an encoder was trained on, and half of a
            decoder's, since question and answer need room behind them.
        overlap: share of a window that repeats the one before, in [0, 1). Reading costs 1 / (1 - overlap) passes.
        store: what is kept of each token: "hidden", the encoder's output, once for all layers; "keys_values", what
            each layer projected from it; "auto" is "hidden" for encoder-decoders and "keys_values" for decoders.
        first_layer, last_layer: decoder layers `[first_layer:last_layer]` read the memory, negative numbers count from
            the end. The others attend to the first window (encoder-decoder) or to local tokens only (decoder).
        heads: heads that read the memory, None for all. The others do as layers outside the range do.
        exclude_window: of a document longer than the window, hide the keys of its first window.
        first_step: "memory" reads it from the first decoded token on; "window" lets the first step of an
            encoder-decoder see the first window only, as the original did.
        positions: where a rotary decoder places the memory's keys: "squeeze" maps the document onto one window, "true"
            leaves each token where it was (up to the trained length), "origin" puts all of them at position 0.
        local_tokens: how many of the last tokens of a decoder's input stay in ordinary attention when one long input
            is given instead of a document and a question.
        sinks: first tokens of the document that a decoder always keeps, whatever their score.
        reserve: positions that a decoder with a table of positions (GPT-2, OPT) keeps free for question and answer
            where `window` is None.
        memory_dtype: what the memory is stored in: "float32", "bfloat16", "float16", or None for the model's dtype.
        windows_per_batch: windows read in one forward pass; "auto" picks a number that suits the device.
        max_bytes: refuse, before anything is read, a memory of more bytes; None for no limit.
        index: how the best keys of a query are found: "exact" scores every key; the others ask an index of faiss
            (extra `faiss`) for candidates and score only these, so they may miss some: "flat" (all keys, for
            comparison), "ivf_flat", "ivf_pq", "hnsw", "scalar". In training search is exact.
        index_parameters: of that index, such as {"nlist": 256, "nprobe": 16}; None for its defaults.
        index_recall: share of the exact best keys, in (0, 1], that the index shall find of what stretches of the
            document ask: `nprobe` or `ef_search` is doubled until it does. None for 0.95, or for what the one named in
            `index_parameters` gives.
        index_refine: candidates asked of an index for each key that is kept; None for 4 where it ranks by codes
            ("ivf_pq", "scalar"), else 1.
        training: what the decoder reads in training: "standard", the first window, with memory in evaluation only;
            "retrieval", its best keys of the whole document; "random", a window's worth of random tokens;
            "alternating", retrieval in even optimizer steps and random in odd ones. docs/memory.md says more.
        memory_gradient: whether a decoder in training learns through its memory too, not only through what reads it.
    """

    keys_per_query: int | Literal["window"] | None = "window"
    window: int | None = None
    overlap: float | int = 0.5
    store: Literal["auto", "hidden", "keys_values"] = "auto"
    first_layer: int = 0
    last_layer: int | None = None
    heads: list[int] | None = None
    exclude_window: bool = False
    first_step: Literal["memory", "window"] = "memory"
    positions: Literal["squeeze", "true", "origin"] = "squeeze"
    local_tokens: int = 256
    sinks: int = 0
    reserve: int = 256
    memory_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    windows_per_batch: int | Literal["auto"] = "auto"
    max_bytes: int | None = None
    index: Literal["exact", "flat", "ivf_flat", "ivf_pq", "hnsw", "scalar"] = "exact"
    index_parameters: dict[str, int] | None = None
    index_recall: float | int | None = None
    index_refine: int | None = None
    training: Literal["standard", "retrieval", "random", "alternating"] = "standard"
    memory_gradient: bool = False

    def validate_ranges(self) -> None:
        """Refuse numbers outside their range; the message names the field, its value and what is allowed."""
        for name in COUNTS:
            value = getattr(self, name)
            if isinstance(value, int) and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        if not 0 <= self.overlap < 1:
            raise ValueError(f"`overlap` must lie in [0, 1), got {self.overlap}.")
        most = self.window if self.keys_per_query == "window" else self.keys_per_query
        if self.sinks < 0 or (most is not None and self.sinks > most):
            raise ValueError(f"`sinks` must lie in [0, `keys_per_query`], got {self.sinks} of {self.keys_per_query}.")
        if self.heads is not None and (
            not self.heads or min(self.heads) < 0 or len(set(self.heads)) < len(self.heads)
        ):
            raise ValueError(f"`heads` must name different heads from 0 on, or be None for all, got {self.heads}.")

    def validate_index(self) -> None:
        """Refuse an index without a choice of keys, options of an index without one, and parameters below 1."""
        if self.index != "exact" and self.keys_per_query is None:
            raise ValueError(
                f"`index` {self.index!r} finds the best keys, and `keys_per_query` None keeps all of them: give a "
                'number, or use "exact".'
            )
        for name in ("index_parameters", "index_recall", "index_refine"):
            if self.index == "exact" and getattr(self, name) is not None:
                raise ValueError(f'`{name}` is of an index, and `index` is "exact", got {getattr(self, name)}.')
        for name, value in (self.index_parameters or {}).items():
            if value < 1:
                raise ValueError(f"`index_parameters` must be at least 1, got {value} for {name!r}.")
        if self.index_recall is not None:
            self._check_index_recall(self.index_recall)

    def _check_index_recall(self, recall: float) -> None:
        if not 0 < recall <= 1:
            raise ValueError(f"`index_recall` must lie in (0, 1], got {recall}.")
        width = INDEX_WIDTHS.get(self.index)
        if width is None:
            raise ValueError(f"`index_recall` is of {', '.join(INDEX_WIDTHS)}, and `index` is {self.index!r}.")
        if width in (self.index_parameters or {}):
            raise ValueError(f"`index_recall` {recall} chooses {width!r}, and `index_parameters` gives it: give one.")

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON values."""
        return asdict(self)


def _read_options(options: Any) -> UnlimiformerConfig:
    """The options from an UnlimiformerConfig, a dict of its fields, or None for the defaults."""
    if options is None:
        return UnlimiformerConfig()
    if isinstance(options, dict):
        known = {field.name for field in fields(UnlimiformerConfig)}
        if unknown := sorted(set(options) - known):
            raise ValueError(f"`unlimiformer_config` has no field {unknown}; it has {sorted(known)}.")
        return UnlimiformerConfig(**options)
    if type(options).__name__ != "UnlimiformerConfig":  # the class may be a saved folder's own copy
        raise ValueError(
            "`unlimiformer_config` must be an UnlimiformerConfig, a dict of its fields or None, "
            f"got {type(options).__name__}."
        )
    return options


class _HoldsUnlimiformerConfig:
    """A model config with the options of its memory in one field, `unlimiformer_config`."""

    unlimiformer_config: Any

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "model_type":  # of the stock checkpoint that is being loaded; ours stays
            return
        # transformers sets what `from_pretrained` is given after the config was made, so this is where it is checked.
        super().__setattr__(name, _read_options(value) if name == "unlimiformer_config" else value)

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """As of any config; a stock checkpoint of the model ours extends is no stranger, so it causes no warning."""
        found, unused = super().get_config_dict(*args, **kwargs)  # type: ignore[misc]
        if found.get("model_type") in [vars(base).get("model_type") for base in cls.__mro__]:
            found["model_type"] = cls.model_type  # type: ignore[attr-defined]
        return found, unused

    def to_dict(self) -> dict[str, Any]:
        output: dict[str, Any] = super().to_dict()  # type: ignore[misc]
        if hasattr(output.get("unlimiformer_config"), "to_dict"):
            output["unlimiformer_config"] = output["unlimiformer_config"].to_dict()
        return output


@strict
class UnlimiformerBartConfig(_HoldsUnlimiformerConfig, BartConfig):
    """A BartConfig with `unlimiformer_config`: an UnlimiformerConfig, a dict of its fields, None for defaults."""

    model_type = "graft_unlimiformer_bart"

    unlimiformer_config: Any = None


@strict
class UnlimiformerLlamaConfig(_HoldsUnlimiformerConfig, LlamaConfig):
    """A LlamaConfig with `unlimiformer_config`: an UnlimiformerConfig, a dict of its fields, None for defaults."""

    model_type = "graft_unlimiformer_llama"

    unlimiformer_config: Any = None


@strict
class UnlimiformerQwen3Config(_HoldsUnlimiformerConfig, Qwen3Config):
    """A Qwen3Config with `unlimiformer_config`: an UnlimiformerConfig, a dict of its fields, None for defaults."""

    model_type = "graft_unlimiformer_qwen3"

    unlimiformer_config: Any = None


@strict
class UnlimiformerT5Config(_HoldsUnlimiformerConfig, T5Config):
    """A T5Config with `unlimiformer_config`: an UnlimiformerConfig, a dict of its fields, None for defaults."""

    model_type = "graft_unlimiformer_t5"

    unlimiformer_config: Any = None
