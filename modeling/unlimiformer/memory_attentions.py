"""The attention modules of a model that will read a memory, and the step that does; refused where one does not fit."""

import transformers
from torch import nn
from transformers import PreTrainedModel

from ...configuration.configuration_unlimiformer import UnlimiformerConfig
from ..attachment import AttentionStep
from .attend import attend_to_memory, cross_attend_to_memory
from .families import (
    attention_modules,
    check_family,
    decoder_family,
    dispatches,
    encoder_decoder_family,
    family_name,
    memory_layers,
    model_shape,
    rope_parameters,
)
from .key_index import new_store
from .remember import folds


def memory_attentions(model: PreTrainedModel, config: UnlimiformerConfig) -> tuple[list[nn.Module], AttentionStep]:
    """The attention modules that will be served, one for each decoder layer, and the step that serves them.

    Raises:
        ImportError: an index is asked for and faiss is missing.
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
    if config.index != "exact":
        new_store(config, model_shape(model.config).head_dim)
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
