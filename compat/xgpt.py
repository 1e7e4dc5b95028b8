"""Names, options and weights of xgpt (Buehler 2025, arXiv 2501.02393) onto ours.

`GNNConfig(**old options)` gives our options; `FATES` says of each old option what became of it. A model is then
`LlamaForCausalLMWithGNN(LlamaGNNConfig(..., gnn_config=GNNConfig(...)))`, and `convert_state_dict` fits old weights.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from transformers.modeling_flash_attention_utils import FlashAttentionKwargs
from transformers.models.llama.modeling_llama import LlamaAttention as LlamaAttention_Original

from graft.compat.xgpt_weights import convert_state_dict
from graft.configuration.configuration_gnn import GNNConfig as OurGNNConfig
from graft.configuration.configuration_gnn import LlamaGNNConfig
from graft.modeling.graph.adjacency import LearnedHeadCombination as AggregatedLearnableAdjacencyTransformer
from graft.modeling.graph.cg_attention import CGAttention as CG_Attention
from graft.modeling.graph.cg_attention import CGAttentionInterpolate as CG_Attention_Interpolate
from graft.modeling.graph.edge_transforms import edge_weights
from graft.modeling.graph.gin_attention import LlamaAttentionGIN
from graft.modeling.graph.graph_mlp import LlamaMLPHalfwayGIN as LlamaMLP_HalfwayGIN
from graft.modeling.graph.graph_mlp import LlamaMLPMultiAggregation as LlamaMLP_HalfwayGIN_MultiAggregation
from graft.modeling.graph.graph_mlp import LlamaMLPMultiHop as LlamaMLP_MultiHop
from graft.modeling.graph.graph_mlp import LlamaSimpleMLP, ShallowLlamaMLP
from graft.modeling.graph.graph_parameters import graph_parameters as extract_gnn_parameters_with_labels
from graft.modeling.graph.graph_parameters import plot_graph_parameters, set_parameters
from graft.modeling.graph.graph_recorder import GraphRecorder
from graft.modeling.graph.latent_attention import LatentCrossAttention as CrossAttention
from graft.modeling.graph.latent_attention import LatentTransformerLayer
from graft.modeling.graph.modeling_llama_gnn import (
    LlamaDecoderLayerWithGNN,
    LlamaForCausalLMWithGNN,
    LlamaModelWithGNN,
)
from graft.modeling.graph.per_head_mlp import PerHeadMLP as GINLayer
from graft.modeling.graph.pna_attention import LlamaAttentionPNA
from graft.modeling.graph.pna_edges import LlamaAttentionPNAVector as LlamaAttentionPNA_LM
from graft.modeling.graph.sparse_graph_layers import (
    CausalGCNLayer,
    CausalGINLayer,
    CausalGNNRecombinationLayer,
    CausalGraphNeuralNetwork,
)
from graft.modeling.graph.sparse_pna_layer import CausalPNALayer
from graft.modeling.graph.token_groups import TokenGroups as PerceiverAR_Fixed_Token_Per_Latent
from graft.trainer.loss_plot import plot_losses as plot_loss_over_epochs
from graft.trainer.tokenizer_training import plot_token_lengths as plot_token_length_histogram
from graft.trainer.tokenizer_training import train_byte_level_tokenizer as train_tokenizer_from_scratch
from graft.trainer.trainable_parameters import count_trainable_parameters, train_all_but, train_only

logger = logging.getLogger(__name__)

CrossAttentionPlus = CrossAttention
LatentTransformerLayerPlus = LatentTransformerLayer
PerceiverAR_Fixed_Token_Per_Latent_Scaling = PerceiverAR_Fixed_Token_Per_Latent
freeze_except_select = train_only
freeze_except_original_no_trainable_scale = train_all_but
plot_gnn_parameters_vertical_with_layer_connections_and_ylabels = plot_graph_parameters
visualize_two_adj_matrices_torch = GraphRecorder

__all__ = [
    "AggregatedLearnableAdjacencyTransformer",
    "CG_Attention",
    "CG_Attention_Interpolate",
    "CausalGCNLayer",
    "CausalGINLayer",
    "CausalGNNRecombinationLayer",
    "CausalGraphNeuralNetwork",
    "CausalPNALayer",
    "CrossAttention",
    "CrossAttentionPlus",
    "FATES",
    "Fate",
    "FlashAttentionKwargs",
    "GINLayer",
    "GNNConfig",
    "GraphRecorder",
    "LatentTransformerLayer",
    "LatentTransformerLayerPlus",
    "LlamaAttentionGIN",
    "LlamaAttentionPNA",
    "LlamaAttentionPNA_LM",
    "LlamaAttention_Original",
    "LlamaDecoderLayerWithGNN",
    "LlamaForCausalLMWithGNN",
    "LlamaGNNConfig",
    "LlamaMLP_HalfwayGIN",
    "LlamaMLP_HalfwayGIN_MultiAggregation",
    "LlamaMLP_MultiHop",
    "LlamaModelWithGNN",
    "LlamaSimpleMLP",
    "PerceiverAR_Fixed_Token_Per_Latent",
    "PerceiverAR_Fixed_Token_Per_Latent_Scaling",
    "ShallowLlamaMLP",
    "convert_state_dict",
    "count_trainable_parameters",
    "edge_weights",
    "extract_gnn_parameters_with_labels",
    "freeze_except_original_no_trainable_scale",
    "freeze_except_select",
    "load_model_with_pretrained_transformer",
    "plot_gnn_parameters_vertical_with_layer_connections_and_ylabels",
    "plot_loss_over_epochs",
    "plot_token_length_histogram",
    "reset_threshold_parameters",
    "train_tokenizer_from_scratch",
    "unfreeze_all",
    "visualize_two_adj_matrices_torch",
]


@dataclass(frozen=True)
class Fate:
    """What became of an old option.

    Args:
        default: the old one.
        kind: "taken" under its meaning, perhaps by another name or value; "dropped".
        ours: dotted name of our option, where one carries it.
        reason: of what was dropped, or how values are read.
    """

    default: Any
    kind: Literal["taken", "dropped"]
    ours: str | None = None
    reason: str = ""


def _taken(default: Any, ours: str, reason: str = "") -> Fate:
    return Fate(default, "taken", ours, reason)


def _unread(default: Any) -> Fate:
    return Fate(default, "dropped", None, "never read")


_NO_EFFECT, _DERIVED = "read without effect", "derived"
_GIN = "attention_GIN_MLP_"

FATES: dict[str, Fate] = {
    "use_GNN_from_attention": _taken("none", "attention"),
    "MLP_type": _taken("standard_MLP", "mlp"),
    "gnn_logic": _taken("before_MLP", "placement", "use_original_hidden_states sets sparse.reads"),
    "gnn_mode": _taken("none", "sparse", "none is no network, per_head sets sparse.per_head"),
    "per_head_ff": _taken(False, "sparse.mixes_heads"),
    "gnn_type": _taken("causal_gnn", "sparse.layer", "the default names no layer; one must be given with a network"),
    "num_layers": _taken(3, "sparse.num_layers"),
    "hidden_dim": _taken(128, "sparse.rank"),
    "activation": _taken("relu", "sparse.activation"),
    "dropout": _taken(0.2, "sparse.dropout"),
    "use_layer_norm": _taken(True, "sparse.normalises"),
    "gnn_residual": _taken(True, "sparse.residual"),
    "lambda_GNN": _taken(0.5, "sparse.scale_last"),
    "lambda_GNN_initial": _taken(None, "sparse.scale_first", "None is lambda_GNN"),
    "GIN_use_MLP": _taken(True, "sparse.mlp"),
    "GIN_use_norm": _taken(False, "sparse.mlp_norm"),
    "GIN_hidden_dim_multiplier": _taken(2, "sparse.mlp_ratio"),
    "GIN_edge_weight_scaling": _taken(True, "sparse.weighted_edges"),
    "aggregators": _taken(None, "sparse.aggregators"),
    "scalers": _taken(None, "sparse.scalers"),
    "degree": Fate(None, "dropped", None, "unused there; sparse.log_degree holds the mean of log(degree + 1)"),
    "norm_to_hidden_states": _taken(False, "sparse.matches_scale", "per token: over all tokens it leaks"),
    "use_original_hidden_states": _taken(False, "sparse.reads"),
    "adj_construction_method": _taken("sum", "adjacency.combine"),
    "threshold_any_tau": _taken(10.0, "adjacency.temperature"),
    "learnable_aggregate_activation": _taken("softmax", "adjacency.learned_activation"),
    "adj_transform_hidden_dim": _taken(128, "adjacency.learned_width"),
    "continuous_transform_alpha": _taken(10.0, "adjacency.sharpness", "0 is None"),
    "threshold": _taken(0.5, "adjacency.threshold"),
    "zero_below_epsilon_threshold": _taken(True, "adjacency.cutoff", "False is None"),
    "epsilon_threshold": _taken(0.5, "adjacency.cutoff"),
    "remove_self_connections": _taken(False, "adjacency.self_loops"),
    "use_distance_scaling": _taken(False, "adjacency.distance", "True is 'far'"),
    "distance_weight_strength": _taken(1.0, "adjacency.distance_strength"),
    "distance_scaling_method": Fate("power", "dropped", None, "only powers do not depend on the length"),
    f"{_GIN}multiplier": _taken(2, "mlp_ratio"),
    "use_sharpening": _taken(False, "sharpening", "False is None"),
    "initial_sharpening_value": _taken(1.0, "sharpening"),
    "sharpening_value_init": Fate("value", "dropped", None, "a random start: give a value"),
    "use_differential_attention": _taken(False, "differential"),
    "use_differential_attention_group_norm": _taken(False, "differential_norm", "of outputs: of weights it leaks"),
    f"{_GIN}o_proj_at_end": _taken(False, "output_projection"),
    f"{_GIN}use_scoring_fnct": _taken(False, "scores"),
    f"{_GIN}scoring_hidden_dim": _taken(512, "scoring_width"),
    f"{_GIN}GIN_use_softmax": _taken(True, "normalisation"),
    f"{_GIN}GIN_use_ReLU_instead_of_softmax": _taken(True, "normalisation", "without softmax, relu in any case"),
    f"{_GIN}GIN_softmax_temperature": _taken(1.0, "temperature"),
    f"{_GIN}GIN_threshold_mode": _taken("none", "edges.transform"),
    f"{_GIN}GIN_threshold_value": _taken(0.2, "edges.threshold"),
    f"{_GIN}GIN_learnable_threshold": _taken(False, "edges.trains_threshold"),
    f"{_GIN}GIN_binary_scale": _taken(1.0, "edges.binary_weight"),
    f"{_GIN}GIN_top_k_fraction_of_sequence_length": _taken(0.1, "edges.fraction", "of what a row may read"),
    f"{_GIN}GIN_sharp_softplus_beta": _taken(10.0, "edges.steepness"),
    "num_latents_list": _taken([64, 32, 8], "latent.tokens_per_latent", "max_position_embeddings / latents"),
    "max_position_embeddings": _taken(2048, "latent.tokens_per_latent", "no table needs it"),
    "num_latent_layers": _taken(4, "latent.num_layers"),
    "CG_Attention_use_skip": _taken(True, "latent.skip"),
    "use_projection": _taken(False, "latent.projects"),
    "mix_weights_initial": _taken(0.5, "latent.mix"),
    "num_latents": Fate(32, "dropped", None, _DERIVED),
    "add_rope": Fate(False, "dropped", None, "crashes there"),
    "enforce_causality": Fate(True, "dropped", None, "graphs are always causal"),
    "rms_norm_eps": Fate(1e-5, "dropped", None, "the base's"),
    "model_type": Fate("gnn", "dropped", None, "LlamaGNNConfig.model_type"),
    "tokenizer": Fate(None, "dropped", None, "GraphRecorder.page takes one"),
    "plot_for_debugging": Fate(False, "dropped", None, "GraphRecorder"),
    "use_original_hidden_states_add_attention": Fate(False, "dropped", None, _NO_EFFECT),
    "group_tokens_for_coarse_graining": Fate(False, "dropped", None, _NO_EFFECT),
    "use_fixed_number_of_tokens_per_latent": Fate(False, "dropped", None, _NO_EFFECT),
    "residual_epsilon_uniform_value": Fate(0.1, "dropped", None, "of a parameter that nothing uses"),
    f"{_GIN}GIN_mode": Fate("default", "dropped", None, "its other value is undefined"),
    "combined_norm": _unread(True),
    "top_k": _unread(8),
    "N_GNN_from_attention_layers": _unread(1),
    "use_GNN_from_attention_add_RoPE_at_every_layer": _unread(False),
    "attention_epsilon_strategy": _unread("default"),
    "residual_epsilon_strategy": _unread("default"),
    "attention_epsilon_uniform_value": _unread(0.5),
    "use_soft_masking": _unread(False),
    "soft_masking_k": _unread(10.0),
    "soft_masking_initial_threshold": _unread(0.01),
    "use_graph_property_modulation": _unread(False),
    "use_graph_property_modulation_with_norm": _unread(False),
    "use_graph_property_modulation_with_norm_use_causal_clustering": _unread(True),
    "LlamaAttentionHierarchicalPerceiverAR_use_rope": _unread(True),
    "use_layer_norm_in_GIN_MLP": _unread(False),
    "use_no_norm_in_GIN_MLP": _unread(False),
    "use_hierarchical_attention": _unread(False),
    "hierarchical_enc_dec_type": _unread("PerceiverAR"),
    f"{_GIN}GIN_MLP_mode": _unread("shared"),
    f"{_GIN}attention_mix_mode": _unread("A"),
    f"{_GIN}separate_attention": _unread(False),
    f"{_GIN}GIN_MLP_pre_aggregate": _unread(True),
    f"{_GIN}GIN_fuse_mode": _unread("epsilon"),
    f"{_GIN}use_second_order": _unread(False),
    f"{_GIN}second_order_factor": _unread(0.1),
    "GIN_after_attention": _unread(True),
    "GIN_after_attention_pre_GIN_norm": _unread(True),
    "GIN_after_attention_skip": _unread(True),
    # Read by getattr, or expected and absent.
    "dropout_rate": _taken(0.1, "mlp_dropout"),
    "tokens_per_latent": _taken(None, "latent.tokens_per_latent", "instead of num_latents_list"),
    "interpolation_method_for_adj_scaling": Fate("nearest", "dropped", None, "the redesigned map needs none"),
    "towers": _taken(1, "sparse.towers"),
    "edge_dim": Fate(None, "dropped", None, "an edge has one weight"),
    "pre_layers": Fate(1, "dropped", None, "one layer, which factorises"),
    "post_layers": Fate(1, "dropped", None, "one layer"),
    "divide_input": Fate(True, "dropped", None, "towers are slices"),
    "act": Fate("relu", "dropped", None, "the messages are linear"),
    "act_kwargs": Fate(None, "dropped", None, "the messages are linear"),
}

_VALUES: dict[str, dict[Any, Any]] = {
    "use_GNN_from_attention": {
        "none": "llama",
        "LlamaAttention_Original": "llama",
        "LlamaAttentionGIN": "gin",
        "LlamaAttentionPNA": "pna",
        "LlamaAttentionPNA_LM": "pna_vector",
        "CG_Attention": "cg",
        "CG_Attention_Interpolate": "cg_interpolate",
    },
    "MLP_type": {
        "standard_MLP": "standard",
        "linear_MLP": "linear",
        "shallow_MLP": "shallow",
        "no_MLP": "none",
        "LlamaMLP_HalfwayGIN": "halfway_gin",
        "LlamaMLP_HalfwayGIN_MultiHop": "multi_hop",
        "LlamaMLP_HalfwayGIN_MultiAggregation": "multi_aggregation",
    },
    "gnn_logic": {"before_MLP": "before_mlp", "after_MLP": "after_mlp", "parallel_GNN_MLP": "parallel"},
    "gnn_mode": {"none": "none", "single": "single", "per_head": "per_head"},
    "gnn_type": {
        "causal_gin": "gin",
        "causal_gcn": "gcn",
        "causal_pna": "pna",
        "causal_recombination": "recombination",
        "causal_gnn": None,
    },
    "adj_construction_method": {
        "sum": "sum",
        "mean": "mean",
        "learnable_aggregate": "learned",
        "threshold_any": "any",
    },
    f"{_GIN}GIN_threshold_mode": {
        **{
            name: name
            for name in ("none", "relu", "silu", "softplus", "sharp_softplus", "binary", "silu+binary", "top_k")
        },
        **{f"{name}_below_binary_above": f"{name}_below_binary_above" for name in ("relu", "silu", "softplus")},
        "sigmoid_elementwise": "sigmoid",
        "flowthreshold": "flow",
        "scaled_topk_causal_4d": "scaled_topk",
    },
}


def GNNConfig(**old: Any) -> OurGNNConfig:  # noqa: N802  (the original's name)
    """Our options for the original's; what it had as defaults is used where nothing is given.

    Options that are dropped are accepted, and logged if they are not at their default. Distances between attention
    and network that the original cannot build are refused, with its reason, by our config.

    Raises:
        ValueError: unknown options, all by name, or a value that an option does not have.
    """
    if unknown := sorted(set(old) - set(FATES)):
        raise ValueError(f"xgpt's GNNConfig has no option {', '.join(unknown)}.")
    for name, value in old.items():
        if FATES[name].kind == "dropped" and value != FATES[name].default:
            logger.warning("xgpt's option `%s` (%r) is dropped: %s.", name, value, FATES[name].reason)
    given = {name: fate.default for name, fate in FATES.items()} | old
    for name, values in _VALUES.items():
        if given[name] not in values:
            raise ValueError(f"`{name}` must be one of {', '.join(map(str, values))}, got {given[name]!r}.")
        given[name] = values[given[name]]
    return OurGNNConfig(**_options(given))


def _options(old: Mapping[str, Any]) -> dict[str, Any]:
    """Our options as a dict; old values are translated already. Options of what is not built are left out."""
    kind = old["use_GNN_from_attention"]
    parts: list[Callable[[Mapping[str, Any]], dict[str, Any]]] = []
    options: dict[str, Any] = {"attention": kind, "mlp": old["MLP_type"], "mlp_ratio": old[f"{_GIN}multiplier"]}
    if kind == "gin":
        parts.append(_gin_options)
    if kind in ("gin", "pna", "pna_vector"):
        parts.append(_edge_options)
    if kind in ("cg", "cg_interpolate"):
        parts.append(_latent_options)
    if old["gnn_mode"] != "none":
        parts.append(_sparse_options)
    for part in parts:
        options |= part(old)
    return options


def _gin_options(old: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "mlp_dropout": old["dropout_rate"],
        "scores": "mlp" if old[f"{_GIN}use_scoring_fnct"] else "dot",
        "scoring_width": old[f"{_GIN}scoring_hidden_dim"],
        "differential": old["use_differential_attention"],
        "differential_norm": old["use_differential_attention"] and old["use_differential_attention_group_norm"],
        "sharpening": old["initial_sharpening_value"] if old["use_sharpening"] else None,
        "temperature": old[f"{_GIN}GIN_softmax_temperature"],
        "output_projection": old[f"{_GIN}o_proj_at_end"],
    }


def _edge_options(old: Mapping[str, Any]) -> dict[str, Any]:
    edges = {
        "transform": old[f"{_GIN}GIN_threshold_mode"],
        "threshold": old[f"{_GIN}GIN_threshold_value"],
        "trains_threshold": old[f"{_GIN}GIN_learnable_threshold"],
        "steepness": old[f"{_GIN}GIN_sharp_softplus_beta"],
        "binary_weight": old[f"{_GIN}GIN_binary_scale"],
        "fraction": old[f"{_GIN}GIN_top_k_fraction_of_sequence_length"],
    }
    return {"edges": edges, "normalisation": "softmax" if old[f"{_GIN}GIN_use_softmax"] else "relu"}


def _latent_options(old: Mapping[str, Any]) -> dict[str, Any]:
    sizes = [max(2, old["max_position_embeddings"] // count) for count in old["num_latents_list"]]
    if old["tokens_per_latent"] is not None:
        sizes = [old["tokens_per_latent"]]
    latent = {
        "tokens_per_latent": sorted(set(sizes)),
        "num_layers": old["num_latent_layers"],
        "skip": old["CG_Attention_use_skip"],
        "projects": old["use_projection"],
        "mix": old["mix_weights_initial"],
    }
    return {"latent": latent}


def _sparse_options(old: Mapping[str, Any]) -> dict[str, Any]:
    if old["gnn_type"] is None:
        raise ValueError(
            f"`gnn_type` must be one of {', '.join(name for name in _VALUES['gnn_type'] if name != 'causal_gnn')} "
            "where `gnn_mode` asks for a network; its old default 'causal_gnn' names none."
        )
    is_per_head = old["gnn_mode"] == "per_head"
    first = old["lambda_GNN"] if old["lambda_GNN_initial"] is None else old["lambda_GNN_initial"]
    sparse = {
        "layer": old["gnn_type"],
        "rank": old["hidden_dim"],
        "num_layers": old["num_layers"],
        "per_head": is_per_head,
        "mixes_heads": is_per_head and old["per_head_ff"],
        "mlp": old["GIN_use_MLP"],
        "mlp_norm": "layer" if old["GIN_use_norm"] else "none",
        "mlp_ratio": old["GIN_hidden_dim_multiplier"],
        "weighted_edges": old["GIN_edge_weight_scaling"],
        "towers": old["towers"],
        "activation": old["activation"],
        "dropout": old["dropout"],
        "residual": old["gnn_residual"],
        "normalises": old["use_layer_norm"],
        "matches_scale": old["norm_to_hidden_states"],
        "reads": "normed_input" if old["use_original_hidden_states"] else "residual",
        "scale_first": first,
        "scale_last": old["lambda_GNN"],
    }
    sparse |= {name: old[name] for name in ("aggregators", "scalers") if old[name] is not None}
    adjacency = {
        "combine": old["adj_construction_method"],
        "temperature": old["threshold_any_tau"],
        "learned_activation": old["learnable_aggregate_activation"],
        "learned_width": old["adj_transform_hidden_dim"],
        "distance": "far" if old["use_distance_scaling"] else None,
        "distance_strength": old["distance_weight_strength"],
        "sharpness": old["continuous_transform_alpha"] or None,
        "threshold": old["threshold"],
        "cutoff": old["epsilon_threshold"] if old["zero_below_epsilon_threshold"] else None,
        "self_loops": not old["remove_self_connections"],
    }
    return {"sparse": sparse, "adjacency": adjacency, "placement": old["gnn_logic"]}


def load_model_with_pretrained_transformer(name: str, gnn_config: OurGNNConfig, **kwargs: Any) -> Any:
    """`LlamaForCausalLMWithGNN.from_pretrained(name, gnn_config=gnn_config)`: all weights that fit are taken over."""
    return LlamaForCausalLMWithGNN.from_pretrained(name, gnn_config=gnn_config, **kwargs)


def reset_threshold_parameters(model: Any, new_value: float) -> list[str]:
    """`set_parameters(model, "threshold", new_value)`."""
    return set_parameters(model, "threshold", new_value)


def unfreeze_all(model: Any) -> list[str]:
    """`train_all_but(model, [])`."""
    return train_all_but(model, [])
