"""What memory needs to know of each model family of transformers: two tables, and the facts of a model's shape.

A family is a `model_type`. Our permanent classes count as the family they extend.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ...configuration.configuration_unlimiformer import UnlimiformerConfig
from ..transformers_compat import defect_of
from .positions import Pairing, Rotation

PERMANENT = "graft_unlimiformer_"
"""What the model types of our permanent classes begin with."""


def _always(config: PreTrainedConfig, layer: int) -> bool:
    return True


def _never(config: PreTrainedConfig, layer: int) -> bool:
    return False


def _unless_listed(config: PreTrainedConfig, layer: int) -> bool:
    """`no_rope_layers` holds, against its name, 1 for the layers that rotate."""
    return bool(config.no_rope_layers[layer])


def _unless_full_beside_sliding(config: PreTrainedConfig, layer: int) -> bool:
    """Models that mix both kinds of layers rotate in the sliding ones only."""
    return getattr(config, "sliding_window", None) is None or layer not in full_attention_layers(config)


@dataclass(frozen=True)
class DecoderFamily:
    """How a decoder-only family places its tokens, and where its attention modules are.

    Args:
        positions: "rotary" turns keys; "table" adds one of a fixed number of learned vectors to the embeddings.
        pairing: of rotated dimensions.
        rotates: whether a layer turns its keys.
        layers: path from the body to its list of layers.
        attention: path from a layer to its self-attention.
    """

    positions: Literal["rotary", "table"] = "rotary"
    pairing: Pairing = "halves"
    rotates: Callable[[PreTrainedConfig, int], bool] = _always
    layers: str = "layers"
    attention: str = "self_attn"


@dataclass(frozen=True)
class EncoderDecoderFamily:
    """Where an encoder-decoder family keeps its cross-attention.

    Args:
        layers: path from the decoder to its list of layers.
        attention: path from a layer to its cross-attention.
        swapped: the family computes its own softmax, so the module is exchanged for one of ours while attached.
        is_sparse: the encoder's output also holds the logits of routers.
        lacks_causal_mask: given a cache, or no `input_ids`, the decoder lets tokens see those behind them.
        has_global_tokens: the encoder takes a mask of tokens that see, and are seen by, all of their window.
        window: default window where no table limits the encoder.
        encoder_positions, decoder_positions: fields of the config with the trained lengths; None: no limit.
    """

    layers: str = "layers"
    attention: str = "encoder_attn"
    swapped: bool = False
    is_sparse: bool = False
    lacks_causal_mask: bool = False
    has_global_tokens: bool = False
    window: int | None = None
    encoder_positions: str | None = "max_position_embeddings"
    decoder_positions: str | None = "max_position_embeddings"


_ROTARY = DecoderFamily()
_NEIGHBOURS = DecoderFamily(pairing="neighbours")
_BART = EncoderDecoderFamily()
_GROWING = EncoderDecoderFamily(decoder_positions=None)
_T5 = EncoderDecoderFamily(
    "block", "layer.1.EncDecAttention", window=512, encoder_positions=None, decoder_positions=None
)

DECODERS: dict[str, DecoderFamily] = {
    **dict.fromkeys(("llama", "mistral", "mixtral", "ministral", "arcee", "seed_oss"), _ROTARY),
    **dict.fromkeys(("qwen2", "qwen2_moe", "qwen3", "qwen3_moe"), _ROTARY),
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text"), _ROTARY),
    **dict.fromkeys(("phi", "phi3", "stablelm", "nemotron", "starcoder2"), _ROTARY),
    **dict.fromkeys(("olmo", "olmo2", "olmo3", "granite", "gpt_oss"), _ROTARY),
    **dict.fromkeys(("cohere", "glm", "glm4", "helium", "ernie4_5"), _NEIGHBOURS),
    "cohere2": DecoderFamily(pairing="neighbours", rotates=_unless_full_beside_sliding),
    "exaone4": DecoderFamily(rotates=_unless_full_beside_sliding),
    "smollm3": DecoderFamily(rotates=_unless_listed),
    "gpt_neox": DecoderFamily(attention="attention"),
    "gptj": DecoderFamily(pairing="neighbours", layers="h", attention="attn"),
    "codegen": DecoderFamily(pairing="neighbours", layers="h", attention="attn"),
    "gpt2": DecoderFamily("table", rotates=_never, layers="h", attention="attn"),
    "gpt_bigcode": DecoderFamily("table", rotates=_never, layers="h", attention="attn"),
    "opt": DecoderFamily("table", rotates=_never, layers="decoder.layers"),
    "biogpt": DecoderFamily("table", rotates=_never),
}
ENCODER_DECODERS: dict[str, EncoderDecoderFamily] = {
    **dict.fromkeys(("bart", "blenderbot", "blenderbot-small", "marian", "mbart", "pegasus", "plbart"), _BART),
    "bigbird_pegasus": _BART,
    **dict.fromkeys(("m2m_100", "pegasus_x"), _GROWING),
    "nllb-moe": replace(_GROWING, attention="cross_attention", is_sparse=True),
    **dict.fromkeys(("t5", "mt5", "umt5"), _T5),
    "switch_transformers": replace(_T5, is_sparse=True),
    "longt5": replace(_T5, window=4096),
    "t5gemma": EncoderDecoderFamily(attention="cross_attn"),
    "mvp": replace(_BART, swapped=True),
    "fsmt": replace(_GROWING, swapped=True, lacks_causal_mask=True),
    "led": replace(
        _BART,
        swapped=True,
        has_global_tokens=True,
        encoder_positions="max_encoder_position_embeddings",
        decoder_positions="max_decoder_position_embeddings",
    ),
}

_OWN_SOFTMAX = "its attention computes its own softmax"
_NOT_TEXT = "its encoder reads no text"
_HYBRID = "its layers without attention carry a state through the whole input, which windows would cut"
REFUSED: dict[str, str] = {
    **dict.fromkeys(
        ("falcon", "gpt_neo", "xglm", "bloom", "mpt", "trocr", "openai-gpt", "ctrl", "xlnet"), _OWN_SOFTMAX
    ),
    **dict.fromkeys(("whisper", "speech_to_text", "moonshine", "musicgen", "dia", "udop", "florence2"), _NOT_TEXT),
    **dict.fromkeys(("qwen3_next", "lfm2", "bamba", "jamba", "falcon_h1", "granitemoehybrid", "zamba2"), _HYBRID),
    **dict.fromkeys(("gemma3n", "gemma3n_text", "gemma4_text"), "its layers share keys and values with each other"),
    **dict.fromkeys(("deepseek_v2", "deepseek_v3"), "its cache holds compressed latents instead of keys and values"),
    "prophetnet": "it attends from several streams of states at once",
    "t5gemma2": "its decoder attends to itself and to the encoder in one softmax",
    "llama4_text": "its attention is chunked, and its queries are scaled by their position",
    "hunyuan_v1_dense": "its keys are normed after they are rotated, so they cannot be moved",
}
"""Families that cannot be served, and why."""


def family_name(config: PreTrainedConfig) -> str:
    """The `model_type`; of a permanent class, that of the model it extends."""
    return config.model_type.removeprefix(PERMANENT)


def decoder_family(config: PreTrainedConfig) -> DecoderFamily:
    """The row of a decoder that is served."""
    return DECODERS[family_name(config)]


def encoder_decoder_family(config: PreTrainedConfig) -> EncoderDecoderFamily:
    """The row of an encoder-decoder that is served."""
    return ENCODER_DECODERS[family_name(config)]


def check_family(model: PreTrainedModel) -> None:
    """Refuse a model of no served family, or of one that this transformers decodes wrongly.

    Raises:
        TypeError: says why, and lists the families that are served or names what helps.
    """
    family = family_name(model.config)
    table = ENCODER_DECODERS if model.config.is_encoder_decoder else DECODERS
    if family not in table or model.get_output_embeddings() is None:
        reason = f", whose attention graft does not serve: {REFUSED[family]}" if family in REFUSED else ""
        if not reason and family not in table:
            reason = ", whose attention graft does not serve"
        raise TypeError(
            f"`model` is a {type(model).__name__} (model_type {model.config.model_type!r}){reason}. "
            f"Supported, with a language-modelling head: {', '.join((*ENCODER_DECODERS, *DECODERS))}."
        )
    if defect := defect_of(family, model):
        raise TypeError(f"`model` is a {type(model).__name__}, which cannot be served here: {defect}.")


def attention_modules(model: PreTrainedModel) -> list[nn.Module]:
    """The attention of each decoder layer that may read a memory: cross-attention, or a decoder's self-attention."""
    family: EncoderDecoderFamily | DecoderFamily
    if model.config.is_encoder_decoder:
        family, body = encoder_decoder_family(model.config), model.get_decoder()
    else:
        family, body = decoder_family(model.config), getattr(model, model.base_model_prefix)
    return [layer.get_submodule(family.attention) for layer in body.get_submodule(family.layers)]


def dispatches(attention: nn.Module) -> bool:
    """Whether this transformers lets the attention's config choose how it is computed: GPT-J's does so lately only."""
    return hasattr(sys.modules[type(attention).__module__], "ALL_ATTENTION_FUNCTIONS")


class Projections(NamedTuple):
    """The four projections of a cross-attention, whatever its family calls them."""

    query: nn.Module
    key: nn.Module
    value: nn.Module
    output: nn.Module


_PROJECTION_NAMES = (
    ("q_proj", "k_proj", "v_proj", "out_proj"),
    ("q_proj", "k_proj", "v_proj", "o_proj"),
    ("q", "k", "v", "o"),
)


def projections(attention: nn.Module) -> Projections:
    """The projections of a cross-attention module of any served family."""
    names = next(names for names in _PROJECTION_NAMES if all(hasattr(attention, name) for name in names))
    return Projections(*(getattr(attention, name) for name in names))


# Layers


class ModelShape(NamedTuple):
    """What must agree for one model to read another's memory; of the decoder."""

    layers: int
    heads: int
    key_heads: int
    head_dim: int
    hidden_size: int


def _first_of(config: PreTrainedConfig, *names: str) -> int:
    return next(value for name in names if (value := getattr(config, name, None)) is not None)


def model_shape(model_config: PreTrainedConfig) -> ModelShape:
    """The shape of a model's decoder."""
    config = getattr(model_config, "decoder", None) or model_config
    heads = _first_of(config, "decoder_attention_heads", "num_decoder_attention_heads", "num_attention_heads")
    hidden = config.hidden_size
    return ModelShape(
        _first_of(config, "decoder_layers", "num_decoder_layers", "num_hidden_layers"),
        heads,
        1 if getattr(config, "multi_query", False) else getattr(config, "num_key_value_heads", None) or heads,
        getattr(config, "head_dim", None) or getattr(config, "d_kv", None) or hidden // heads,
        hidden,
    )


def decoder_vocabulary(model_config: PreTrainedConfig) -> int:
    """How many ids the decoder's embeddings know."""
    config = getattr(model_config, "decoder", None) or model_config
    return int(_first_of(config, "decoder_vocab_size", "tgt_vocab_size", "vocab_size"))


def encoder_width(model_config: PreTrainedConfig) -> int:
    """Numbers of one token of the encoder's output."""
    config = getattr(model_config, "encoder", None) or model_config
    return int(config.hidden_size)


def layer_types(model_config: PreTrainedConfig) -> list[str]:
    """The kind of attention of each decoder layer: "full_attention" or another word."""
    count = model_shape(model_config).layers
    if model_config.is_encoder_decoder:
        return ["full_attention"] * count
    if getattr(model_config, "use_sliding_window", None) is False:
        return ["full_attention"] * count
    types = getattr(model_config, "layer_types", None)
    if types is None:
        slides = getattr(model_config, "sliding_window", None) is not None
        types = ["sliding_attention" if slides else "full_attention"] * count
    return list(types)


def full_attention_layers(model_config: PreTrainedConfig) -> list[int]:
    """The decoder layers that see all tokens before a query, not a sliding window of them."""
    return [layer for layer, kind in enumerate(layer_types(model_config)) if kind == "full_attention"]


def layer_range(config: UnlimiformerConfig, count: int) -> tuple[int, int]:
    """The layers [first, last) of `count` that are to read the memory.

    Raises:
        ValueError: the range is empty or leaves the model.
    """
    first = config.first_layer + (count if config.first_layer < 0 else 0)
    last = count if config.last_layer is None else config.last_layer + (count if config.last_layer < 0 else 0)
    if not 0 <= first < last <= count:
        raise ValueError(
            f"`first_layer` {config.first_layer} and `last_layer` {config.last_layer} must pick some of the {count} "
            f"decoder layers: -{count} <= first < last <= {count}, negative numbers counting from the end."
        )
    return first, last


def memory_layers(config: UnlimiformerConfig, model_config: PreTrainedConfig) -> tuple[int, ...]:
    """The decoder layers that hold memory: those in range that have full attention.

    Raises:
        ValueError: there is none; lists the types of the layers.
    """
    first, last = layer_range(config, model_shape(model_config).layers)
    layers = tuple(layer for layer in full_attention_layers(model_config) if first <= layer < last)
    if not layers:
        raise ValueError(
            f"memory needs full attention, and layers {first} to {last - 1} of `model` are of type "
            f"{layer_types(model_config)[first:last]}. Where a model was trained with it, load it with "
            "`sliding_window=None`."
        )
    return layers


# Positions


def rope_parameters(model_config: PreTrainedConfig) -> dict[str, Any]:
    """The rotary embedding's parameters, of its layers with full attention; empty without one."""
    parameters = getattr(model_config, "rope_parameters", None) or {}
    return parameters.get("full_attention", parameters) or {}


def has_scaled_positions(model_config: PreTrainedConfig) -> bool:
    """Whether the model's rotary embedding is stretched beyond the length it was trained on."""
    return rope_parameters(model_config).get("rope_type", "default") != "default"


def trained_positions(model_config: PreTrainedConfig, part: Literal["encoder", "decoder"]) -> int | None:
    """How many positions the encoder or the decoder of a model was trained on, None where nothing limits them."""
    if not model_config.is_encoder_decoder:
        return int(model_config.max_position_embeddings)
    family = encoder_decoder_family(model_config)
    field = family.encoder_positions if part == "encoder" else family.decoder_positions
    config = getattr(model_config, part, None) or model_config
    return None if field is None else int(getattr(config, field))


def key_rotations(model: PreTrainedModel) -> dict[int, Rotation]:
    """How each layer with full attention turns its keys; a layer that does not turn them is absent."""
    family, body = decoder_family(model.config), getattr(model, model.base_model_prefix)
    turning = [layer for layer in full_attention_layers(model.config) if family.rotates(model.config, layer)]
    if not turning:
        return {}
    rotary = body.rotary_emb
    frequencies = getattr(rotary, "inv_freq", None)
    if frequencies is None:  # one embedding for each type of layer
        frequencies = getattr(rotary, "full_attention_inv_freq", None)
    if frequencies is None:  # a table of sines and cosines of the positions
        rotated = rotary.pos_embd_dim
        frequencies = 1.0 / 10000 ** (torch.arange(0, rotated, 2, dtype=torch.float64) / rotated)
    return dict.fromkeys(turning, Rotation(frequencies, family.pairing))
