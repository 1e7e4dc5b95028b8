"""Reading and writing the residual stream of a stock decoder layer, between its attention and its feed-forward.

A layer computes h + a, a from attention, before its feed-forward. A tap hands h + a to a callable and adds what comes
back, with hooks only: one sees h where the layer's norm reads it, one adds to a before the layer does. Nothing stays
on a module. Between the two hooks, which run in one call of one layer, h is kept for the running thread alone, so
threads may share a model; gradient checkpointing runs the hooks again, for they sit inside the layer.
"""

import itertools
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from .attachment import Attachment

ResidualUpdate = Callable[[Tensor, dict[str, Any]], Tensor | None]
"""`update(hidden, keywords)`: `hidden` (batch, length, hidden_size) is h + a, `keywords` are those of the layer's
attention (cache, mask, any keyword given to the model). What it returns is added; None adds nothing."""


@dataclass(frozen=True)
class TapPlaces:
    """Names inside a decoder layer.

    Args:
        attention: the self-attention.
        source: the module whose first input is the residual stream h.
        target: the module whose output the layer adds to h.
        multiplier: attribute of the layer that scales that output, None for 1.
    """

    attention: str = "self_attn"
    source: str = "input_layernorm"
    target: str = "self_attn"
    multiplier: str | None = None


_PRE_NORM = TapPlaces()
PLACES = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma", "graft_unlimiformer_llama"), _PRE_NORM),
    "phi3": TapPlaces(target="resid_attn_dropout"),
    "granite": TapPlaces(multiplier="residual_multiplier"),
    **dict.fromkeys(("gemma2", "gemma3_text"), TapPlaces(target="post_attention_layernorm")),
    **dict.fromkeys(("olmo2", "olmo3"), TapPlaces(source="self_attn", target="post_attention_layernorm")),
    "gpt2": TapPlaces(attention="attn", source="ln_1", target="attn"),
}
"""Where each family is tapped, by `model_type`."""

PLACES_IN_PARALLEL = {
    **dict.fromkeys(("cohere", "phi"), _PRE_NORM),
    "gpt_neox": TapPlaces(attention="attention", target="post_attention_dropout"),
}
"""The same where the feed-forward does not read what is added: a method must be of use beside it."""

PARALLEL = ("codegen", "cohere", "cohere2", "falcon", "gpt_neox", "gpt_neox_japanese", "gptj", "phi")
"""Families whose attention and feed-forward read one norm and are added together: there is nothing in between."""


class NoPlaceError(TypeError, ValueError):
    """The layers of a model cannot be tapped: a model of the wrong type, for whom asks for a type or for a value."""


_OPEN = threading.local()
_NUMBERS = itertools.count()


def tap_places(model: PreTrainedModel, in_parallel: bool = False) -> TapPlaces:
    """Where the layers of a model are tapped.

    Args:
        in_parallel: whether families are taken whose feed-forward runs beside attention and reads no update.

    Raises:
        TypeError: `model` is no transformers model.
        NoPlaceError: its family cannot be tapped; says why and lists those that can.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"`model` must be a transformers model, got {type(model).__name__}.")
    family, places = model.config.model_type, PLACES | (PLACES_IN_PARALLEL if in_parallel else {})
    if family not in places:
        if model.config.is_encoder_decoder:
            reason = "an encoder-decoder"
        elif family in PARALLEL:
            reason = "of a family that computes attention and feed-forward in parallel, with nothing in between"
        else:
            reason = "of a family that graft has not placed and tested"
        raise NoPlaceError(
            f"`model` is a {type(model).__name__} (model_type {family!r}), {reason}. "
            f"Supported model types: {', '.join(sorted(places))}."
        )
    return places[family]


def tappable_layers(model: PreTrainedModel, in_parallel: bool = False) -> nn.ModuleList:
    """The decoder layers of a model that can be tapped; arguments and errors as of `tap_places`."""
    tap_places(model, in_parallel)
    decoder: Any = getattr(model, model.base_model_prefix, model)
    layers: nn.ModuleList = decoder.h if model.config.model_type == "gpt2" else decoder.layers
    return layers


class ThreadSlot:
    """A place for one object of the running thread, between two hooks of one call of one layer."""

    def __init__(self) -> None:
        self.name = f"slot_{next(_NUMBERS)}"

    def put(self, content: Any) -> None:
        """Keep `content` until it is taken."""
        setattr(_OPEN, self.name, content)

    def look(self) -> Any:
        """What lies here."""
        return getattr(_OPEN, self.name, None)

    def take(self) -> Any:
        """What lies here, and let go of it."""
        content = self.look()
        setattr(_OPEN, self.name, None)  # torch.compile cannot follow `delattr`
        return content


class ResidualTap:
    """One tap of one layer: three hooks and, while a thread is between them, the stream of that thread."""

    def __init__(self, update: ResidualUpdate, multiplier: float = 1.0) -> None:
        self.update = update
        self.multiplier = multiplier
        self.slot = ThreadSlot()

    def take_residual(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Pre-hook of the source: keep h."""
        self.slot.put((args[0] if args else kwargs["hidden_states"], kwargs))

    def take_keywords(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Pre-hook of the attention: keep its keywords."""
        self.slot.put((self.slot.look()[0], kwargs))

    def add_update(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Hook of the target: let go of what was kept, and add the update to the output."""
        residual, keywords = self.slot.take()
        added = output[0] if isinstance(output, tuple) else output
        is_scaled = self.multiplier != 1.0
        update = self.update(residual + (added * self.multiplier if is_scaled else added), keywords)
        if update is None:
            return output
        changed = added + (update / self.multiplier if is_scaled else update)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed


def tap_residual(
    attachment: Attachment, model: PreTrainedModel, index: int, update: ResidualUpdate, in_parallel: bool = False
) -> None:
    """Add `update(h + a, keywords)` to the residual stream of layer `index` until `attachment` is removed.

    Several taps of one layer act in the order they were made, each seeing what the one before added.

    Raises:
        TypeError, ValueError: as `tap_places` does, with `in_parallel` as there.
    """
    layer, places = tappable_layers(model, in_parallel)[index], tap_places(model, in_parallel)
    tap = ResidualTap(update, 1.0 if places.multiplier is None else float(getattr(layer, places.multiplier)))
    attachment.before(getattr(layer, places.source), tap.take_residual)
    attachment.before(getattr(layer, places.attention), tap.take_keywords)
    attachment.after(getattr(layer, places.target), tap.add_update)
