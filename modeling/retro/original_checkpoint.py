"""Weights trained with RETRO-pytorch (0.3.9), turned into a RetroForCausalLM that computes the same.

The checkpoint holds weights only, so what its constructor was given is read from names and shapes; what they cannot
tell is asked for. `rope="legacy"` keeps the positions that the weights were trained with.
"""

import os
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...configuration.configuration_retro import RetroConfig
from .modeling_retro import RetroForCausalLM

HEADS = 8
"""RETRO-pytorch never passes its argument `heads` on: every model has 8."""


def load_original(path: str | os.PathLike[str], chunk_size: int = 64, **options: Any) -> RetroForCausalLM:
    """Read a checkpoint, `torch.save(retro.state_dict(), path)`, without running what a pickle may hold.

    Args:
        path: the file.
        chunk_size: as the model was made with; weights do not tell.
        options: further fields of RetroConfig, e.g. `pad_token_id`, `eos_token_id`, or dropout.

    Raises:
        ValueError: the file holds no weights of RETRO-pytorch; the first missing or surplus name is given.
    """
    weights = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(weights, Mapping) or "token_emb.weight" not in weights or "to_logits.weight" not in weights:
        raise ValueError(
            f"`path` {os.fspath(path)} must hold the state dict of a RETRO-pytorch model, with `token_emb.weight` and "
            "`to_logits.weight`."
        )
    return convert_original(weights, chunk_size, **options)


def convert_original(weights: Mapping[str, Tensor], chunk_size: int = 64, **options: Any) -> RetroForCausalLM:
    """As `load_original`, from the state dict itself."""
    config = original_config(weights, chunk_size, **options)
    model = RetroForCausalLM(config)
    converted = {ours: value for name, value in weights.items() for ours in [_our_name(name)] if ours is not None}
    converted = _fuse(converted)
    expected = model.state_dict()
    if wrong := sorted(set(converted) ^ set(expected)):
        raise ValueError(
            f"The checkpoint is none of RETRO-pytorch 0.3.9 that we know: {wrong[0]} is missing or surplus."
        )
    model.load_state_dict({name: value.view(expected[name].shape) for name, value in converted.items()})
    return model


def original_config(weights: Mapping[str, Tensor], chunk_size: int, **options: Any) -> RetroConfig:
    """The config that names and shapes of the weights tell."""
    vocab_size, encoder_width = weights["token_emb.weight"].shape
    decoder_inside, decoder_width = weights["decoder.layers.0.2.fn.ff.0.weight"].shape
    norm_names = {name.rpartition(".")[2] for name in weights if name.startswith("decoder.layers.0.0.norm.")}
    norm = "layer" if "bias" in norm_names else "gated_rms" if "weight" in norm_names else "rms"
    is_prenorm = any(name.startswith("decoder.norm_out.") for name in weights)
    head_dim = weights["decoder.layers.0.0.fn.to_q.weight"].shape[0] // HEADS
    fields: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": decoder_width,
        "intermediate_size": decoder_inside,
        "num_hidden_layers": _count(weights, "decoder"),
        "num_attention_heads": HEADS,
        "head_dim": head_dim,
        "encoder_hidden_size": encoder_width,
        "encoder_intermediate_size": weights["encoder.layers.0.2.fn.ff.0.weight"].shape[0],
        "num_encoder_layers": _count(weights, "encoder"),
        "cross_attention_layers": _layers_with(weights, r"decoder\.layers\.(\d+)\.1\.fn\.cross_attn\.to_q\.weight"),
        "encoder_cross_attention_layers": _layers_with(weights, r"encoder\.layers\.(\d+)\.1\.fn\.to_q\.weight"),
        "chunk_size": chunk_size,
        "rotary_dim": min(head_dim, 32),
        "rope": "legacy",
        "position_embedding": "rotary+learned",
        "max_position_embeddings": weights["pos_emb.weight"].shape[0],
        "norm": norm,
        "residual": "prenorm" if is_prenorm else "deepnorm",
        "head_bias": True,
    }
    return RetroConfig(**{**fields, **options})


_RENAMED = (
    (r"^token_emb\.", "model.embed_tokens."),
    (r"^pos_emb\.", "model.embed_positions."),
    (r"^to_decoder_model_dim\.", "model.input_projection."),
    (r"^to_logits\.", "lm_head."),
    (r"^encoder\.project_out\.", "model.encoder.output."),
    (r"^encoder\.norm_out\.", "model.encoder.norm."),
    (r"^decoder\.norm_out\.", "model.norm."),
    (r"^encoder\.layers\.", "model.encoder.layers."),
    (r"^decoder\.layers\.", "model.layers."),
    (r"^(model\.layers\.\d+)\.0\.fn\.", r"\1.causal_attention."),
    (r"^(model\.encoder\.layers\.\d+)\.0\.fn\.", r"\1.self_attention."),
    (r"^(model\.layers\.\d+)\.1\.fn\.cross_attn\.", r"\1.cross_attention."),
    (r"^(model\.encoder\.layers\.\d+)\.1\.fn\.", r"\1.cross_attention."),
    (r"\.2\.fn\.ff\.0\.", ".feed_forward.up."),
    (r"\.2\.fn\.ff\.3\.", ".feed_forward.down."),
    (r"\.0\.norm\.", ".self_residual.norm."),
    (r"\.1\.norm\.", ".cross_residual.norm."),
    (r"\.2\.norm\.", ".feed_forward_residual.norm."),
    (r"\.to_out\.", ".output."),
    (r"\.null_k$", ".null_key"),
    (r"\.null_v$", ".null_value"),
    # Their RMSNorm calls its scale gamma, and its gate weight.
    (r"(norm)\.weight$", r"\1.gate_or_weight"),
    (r"(norm)\.gamma$", r"\1.weight"),
)


def _our_name(name: str) -> str | None:
    """The name of one weight in our model, with q, k and v still apart; None for tables that we compute."""
    if name.endswith("inv_freq"):
        return None
    for pattern, replacement in _RENAMED:
        name = re.sub(pattern, replacement, name)
    return name


def _fuse(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Join the projections that we compute by one product, and settle which `norm.weight` is a gate."""
    fused: dict[str, Tensor] = {}
    for name, value in weights.items():
        if name.endswith(".gate_or_weight"):
            norm = name.removesuffix(".gate_or_weight")
            fused[f"{norm}.gate" if f"{norm}.weight" in weights else f"{norm}.weight"] = value
        elif name.endswith(".to_q.weight"):
            attention = name.removesuffix(".to_q.weight")
            key_value = [weights[f"{attention}.to_{part}.weight"] for part in "kv"]
            if ".cross_attention" in attention:
                fused[f"{attention}.query.weight"] = value
                fused[f"{attention}.key_value.weight"] = torch.cat(key_value)
            else:
                fused[f"{attention}.query_key_value.weight"] = torch.cat([value, *key_value])
        elif not name.endswith((".to_k.weight", ".to_v.weight")):
            fused[name] = value
    return fused


def _count(weights: Mapping[str, Tensor], part: str) -> int:
    return 1 + max(_layers_with(weights, rf"{part}\.layers\.(\d+)\.0\.fn\.to_q\.weight"))


def _layers_with(weights: Mapping[str, Tensor], pattern: str) -> list[int]:
    """Numbers of the layers that have a weight of this name."""
    return sorted(int(found[1]) for name in weights if (found := re.fullmatch(pattern, name)))
