"""What differs between the transformers versions we support (5.17 to 5.24), and nothing else.

5.24 renames the argument `past_key_values` to `cache`. The old name still works there, with a warning.
5.18 first starts assisted decoding rightly from a cache that holds tokens already: before, it cuts the mask short.
FSMT and UMT5 decode wrongly in 5.17 (`defect_of`).
"""

import inspect
from typing import Any

import transformers
from transformers import Cache, LlamaForCausalLM, PreTrainedModel

CACHE_ARGUMENT = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"
"""The name under which this version's models, attention modules and `generate` take the cache."""

ASSISTED_SINCE = "5.18"
ASSISTS_FROM_A_CACHE = tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 18)
"""Whether assisted decoding may start from a cache that holds tokens already."""


def defect_of(family: str, model: PreTrainedModel) -> str | None:
    """What this version itself decodes wrongly for a model of `family`, and what helps; None where it is right."""
    installed, decoder = f"transformers {transformers.__version__}", model.get_decoder()
    implementation = model.config._attn_implementation
    if family == "fsmt" and "cache_length" not in inspect.signature(decoder.embed_positions.forward).parameters:
        return (
            f"with a cache, {installed} keeps only the last of several answer tokens, and places each at the start; "
            "install a newer one"
        )
    if family == "umt5" and implementation != "eager" and not decoder.block[0].layer[0].SelfAttention.is_causal:
        return (
            f"under attn_implementation={implementation!r}, {installed} lets answer tokens see those that follow; "
            'load it with attn_implementation="eager", or install a newer one'
        )
    return None


def cache_argument(cache: Cache) -> dict[str, Any]:
    """The keyword arguments that hand `cache` to a model or to `generate`."""
    return {CACHE_ARGUMENT: cache}


def cache_of(arguments: dict[str, Any]) -> Any:
    """The cache among keyword arguments, under any name that models and attention modules have for it; or None."""
    caches = (arguments.get(name) for name in ("cache", "past_key_values", "layer_past", "layer_state"))
    return next((cache for cache in caches if cache is not None), None)


def take_cache(arguments: dict[str, Any]) -> Any:
    """Remove the cache from keyword arguments, under either name, and return it; None if there is none."""
    caches = [arguments.pop(name, None) for name in ("cache", "past_key_values")]
    return caches[0] if caches[0] is not None else caches[1]


def without_cache(output: Any) -> Any:
    """A model's output without its cache, which `generate` would otherwise go on with; a tuple stays as it is."""
    if isinstance(output, tuple):
        return output
    return type(output)(**{name: value for name, value in output.items() if name not in ("cache", "past_key_values")})
