"""Weights of xgpt's models, renamed and stacked for ours: GIN attention, PNA attention, the sparse graph network."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

_LAYER = re.compile(r"^((?:model\.)?layers\.\d+\.)(.+)$")
_RENAMED = (
    (r"self_attn\.q_proj_2\.(.+)", r"self_attn.second_q_proj.\1"),
    (r"self_attn\.k_proj_2\.(.+)", r"self_attn.second_k_proj.\1"),
    (r"self_attn\.sharpening_parameters\.0", "self_attn.sharpening"),
    (r"self_attn\.lambda_param\.0", "self_attn.differential_lambda"),
    (r"self_attn\.threshold\.0", "self_attn.edges.threshold"),
    (r"self_attn\.mlp_scoring\.2\.weight", "self_attn.score_heads.weight"),
    (r"self_attn\.mlp_scoring\.0\.bias", "self_attn.score_target.bias"),
    (r"self_attn\.aggregator_mlp\.0\.(.+)", r"self_attn.aggregate_up.\1"),
    (r"self_attn\.aggregator_mlp\.2\.(.+)", r"self_attn.aggregate_down.\1"),
    (r"trainable_scale", "graph.scale"),
    (r"gnn_norm\.weight", "graph.norm.weight"),
    (r"gnn\.input_projection\.(.+)", r"graph.network.map_in.\1"),
    (r"gnn\.output_projection\.(.+)", r"graph.network.map_out.\1"),
    (r"gnn\.convs\.(\d+)\.epsilon", r"graph.network.layers.\1.epsilon"),
    (r"gnn\.convs\.(\d+)\.linear1\.(.+)", r"graph.network.layers.\1.update.up.\2"),
    (r"gnn\.convs\.(\d+)\.linear2\.(.+)", r"graph.network.layers.\1.update.down.\2"),
    (r"gnn\.convs\.(\d+)\.norm\.(.+)", r"graph.network.layers.\1.update.inner_norm.\2"),
    (r"gnn\.convs\.(\d+)\.transform\.(.+)", r"graph.network.layers.\1.update.\2"),
    (r"gnn\.convs\.(\d+)\.linear\.(.+)", r"graph.network.layers.\1.map.\2"),
)
_DROPPED = (
    r"self_attn\.residual_epsilon\.\d+",  # nothing used it
    r"self_attn\.rmsnorm\.weight",  # nor that
    r"self_attn\.groupnorm\..+",  # mixed later rows in
    r"self_attn\.mlp_scoring\.2\.bias",  # one number for all scores of a row
    r"self_attn\.gin_layers\.\d+\.normlayer\.weight",  # stands in the MLP too
    r"self_attn\.rotary_emb\.inv_freq",
)
_OF_HEADS = re.compile(r"^self_attn\.gin_layers\.(\d+)\.(epsilon|mlp\.[024]\.(?:weight|bias))$")
_HEADS = {
    "epsilon": "self_attn.epsilon",
    "mlp.0.weight": "self_attn.update.up_weight",
    "mlp.0.bias": "self_attn.update.up_bias",
    "mlp.2.weight": "self_attn.update.gain",
    "mlp.4.weight": "self_attn.update.down_weight",
    "mlp.4.bias": "self_attn.update.down_bias",
}


def convert_state_dict(old: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The weights of an xgpt model under the names and in the shapes of `model`, for `load_state_dict`.

    Its sparse network sent messages along self-loops only: with the same weights, our causal edges compute something
    else, and the PEFT method's `edge_mode="self_only"` what it computed. PNA attention needs `aggregates="sum"`.

    Raises:
        ValueError: weights that are unknown, that are missing, or of another shape; all are listed.
    """
    heads: dict[tuple[str, str], dict[int, Tensor]] = {}
    new: dict[str, Tensor] = {}
    for name, weight in old.items():
        layer = _LAYER.match(name)
        before, inner = (layer[1], layer[2]) if layer else ("", name)
        if layer and any(re.fullmatch(pattern, inner) for pattern in _DROPPED):
            continue
        if found := _OF_HEADS.match(inner):
            heads.setdefault((before, found[2]), {})[int(found[1])] = weight
        elif inner == "self_attn.mlp_scoring.0.weight":  # W1 [n_i; n_j] = U n_i + V n_j
            target, source = weight.chunk(2, dim=1)
            new |= {before + "self_attn.score_target.weight": target, before + "self_attn.score_source.weight": source}
        else:
            new[before + _renamed(inner)] = weight
    for (before, part), weights in heads.items():
        new[before + _HEADS[part]] = _stacked([weights[head] for head in sorted(weights)])
    return _fitted(new, model)


def _renamed(inner: str) -> str:
    for pattern, ours in _RENAMED:
        if found := re.fullmatch(pattern, inner):
            return found.expand(ours)
    return inner


def _stacked(weights: list[Tensor]) -> Tensor:
    """(heads, in, out) of maps, (heads, 1, width) of vectors, (heads, 1, 1) of numbers."""
    stacked = torch.stack(weights)
    if stacked.dim() == 3:
        return stacked.transpose(1, 2).contiguous()
    return stacked.view(len(weights), 1, -1)


def _fitted(new: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    wanted = model.state_dict()
    fitted = {
        name: weight.reshape(wanted[name].shape) if name in wanted and weight.numel() == 1 else weight
        for name, weight in new.items()
    }
    tied = getattr(getattr(model, "config", None), "tie_word_embeddings", False)
    missing = sorted(name for name in wanted if name not in fitted and not (tied and name == "lm_head.weight"))
    faults = {
        "unknown": sorted(set(fitted) - set(wanted)),
        "missing": missing,
        "of another shape": sorted(n for n, w in fitted.items() if n in wanted and w.shape != wanted[n].shape),
    }
    if any(faults.values()):
        told = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in faults.items() if names)
        raise ValueError(f"The weights do not fit the model: {told}.")
    return fitted
