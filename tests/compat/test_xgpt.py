"""The owner's names lead to ours; each old option has a fate; old weights fit."""

import logging
import re
from pathlib import Path

import pytest
import torch

import graft.compat.xgpt as xgpt
from graft.configuration.configuration_gnn import LlamaGNNConfig
from graft.modeling.graph.modeling_llama_gnn import LlamaForCausalLMWithGNN

# The classes and functions of the owner's document, and the functions of spec 3.1.
CLASSES = [
    "GNNConfig",
    "LlamaDecoderLayerWithGNN",
    "AggregatedLearnableAdjacencyTransformer",
    "LlamaAttention_Original",
    "LlamaSimpleMLP",
    "ShallowLlamaMLP",
    "GINLayer",
    "LlamaAttentionGIN",
    "LlamaAttentionPNA",
    "LlamaAttentionPNA_LM",
    "CausalGINLayer",
    "CausalGCNLayer",
    "CausalPNALayer",
    "CausalGNNRecombinationLayer",
    "CausalGraphNeuralNetwork",
    "CrossAttention",
    "LatentTransformerLayer",
    "PerceiverAR_Fixed_Token_Per_Latent",
    "CG_Attention",
    "CrossAttentionPlus",
    "LatentTransformerLayerPlus",
    "PerceiverAR_Fixed_Token_Per_Latent_Scaling",
    "CG_Attention_Interpolate",
    "LlamaMLP_HalfwayGIN",
    "LlamaMLP_MultiHop",
    "LlamaMLP_HalfwayGIN_MultiAggregation",
    "FlashAttentionKwargs",
    "LlamaModelWithGNN",
    "LlamaForCausalLMWithGNN",
]
FUNCTIONS = [
    "load_model_with_pretrained_transformer",
    "freeze_except_select",
    "freeze_except_original_no_trainable_scale",
    "unfreeze_all",
    "count_trainable_parameters",
    "reset_threshold_parameters",
    "extract_gnn_parameters_with_labels",
    "plot_gnn_parameters_vertical_with_layer_connections_and_ylabels",
    "plot_loss_over_epochs",
    "visualize_two_adj_matrices_torch",
    "train_tokenizer_from_scratch",
    "plot_token_length_histogram",
]
SIZES = {"vocab_size": 31, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12}


@pytest.mark.parametrize("name", [*CLASSES, *FUNCTIONS])
def test_every_name_of_the_original_is_there(name):
    assert callable(getattr(xgpt, name))
    assert name in xgpt.__all__


def test_all_99_options_and_those_read_by_getattr_have_a_fate():
    assert len(xgpt.FATES) >= 99 - 1
    for name, fate in xgpt.FATES.items():
        assert fate.ours if fate.kind == "taken" else fate.reason, name


# What an old option must be set to, beside itself, for ours to be built, and the value to try.
TRIED = {
    "use_GNN_from_attention": ("LlamaAttentionGIN", "gin"),
    "MLP_type": ("shallow_MLP", "shallow"),
    "gnn_logic": ("after_MLP", "after_mlp"),
    "gnn_mode": ("single", None),
    "per_head_ff": (True, True),
    "gnn_type": ("causal_gcn", "gcn"),
    "num_layers": (2, 2),
    "hidden_dim": (4, 4),
    "activation": ("prelu", "prelu"),
    "dropout": (0.3, 0.3),
    "use_layer_norm": (False, False),
    "gnn_residual": (False, False),
    "lambda_GNN": (0.7, 0.7),
    "lambda_GNN_initial": (0.2, 0.2),
    "GIN_use_MLP": (False, False),
    "GIN_use_norm": (True, "layer"),
    "GIN_hidden_dim_multiplier": (3, 3),
    "GIN_edge_weight_scaling": (False, False),
    "aggregators": (["mean"], ["mean"]),
    "scalers": (["identity"], ["identity"]),
    "norm_to_hidden_states": (True, True),
    "use_original_hidden_states": (True, "normed_input"),
    "adj_construction_method": ("threshold_any", "any"),
    "threshold_any_tau": (0.5, 0.5),
    "learnable_aggregate_activation": ("sigmoid", "sigmoid"),
    "adj_transform_hidden_dim": (16, 16),
    "continuous_transform_alpha": (0, None),
    "threshold": (0.2, 0.2),
    "zero_below_epsilon_threshold": (False, None),
    "epsilon_threshold": (0.7, 0.7),
    "remove_self_connections": (True, False),
    "use_distance_scaling": (True, "far"),
    "distance_weight_strength": (2.0, 2.0),
    "attention_GIN_MLP_multiplier": (3, 3),
    "use_sharpening": (True, 1.0),
    "initial_sharpening_value": (1.5, 1.5),
    "use_differential_attention": (True, True),
    "use_differential_attention_group_norm": (True, True),
    "attention_GIN_MLP_o_proj_at_end": (True, True),
    "attention_GIN_MLP_use_scoring_fnct": (True, "mlp"),
    "attention_GIN_MLP_scoring_hidden_dim": (64, 64),
    "attention_GIN_MLP_GIN_use_softmax": (False, "relu"),
    "attention_GIN_MLP_GIN_use_ReLU_instead_of_softmax": (False, "softmax"),
    "attention_GIN_MLP_GIN_softmax_temperature": (2.0, 2.0),
    "attention_GIN_MLP_GIN_threshold_mode": ("flowthreshold", "flow"),
    "attention_GIN_MLP_GIN_threshold_value": (0.3, 0.3),
    "attention_GIN_MLP_GIN_learnable_threshold": (True, True),
    "attention_GIN_MLP_GIN_binary_scale": (2.0, 2.0),
    "attention_GIN_MLP_GIN_top_k_fraction_of_sequence_length": (0.2, 0.2),
    "attention_GIN_MLP_GIN_sharp_softplus_beta": (5.0, 5.0),
    "num_latents_list": ([64, 16], [32, 128]),
    "max_position_embeddings": (1024, [16, 32, 128]),
    "num_latent_layers": (2, 2),
    "CG_Attention_use_skip": (False, False),
    "use_projection": (True, True),
    "mix_weights_initial": (0.25, 0.25),
    "dropout_rate": (0.2, 0.2),
    "tokens_per_latent": (16, [16]),
    "towers": (2, 2),
}
WITH = {
    "sparse": {"gnn_mode": "single", "gnn_type": "causal_gin"},
    "adjacency": {"gnn_mode": "single", "gnn_type": "causal_gin"},
    "placement": {"gnn_mode": "single", "gnn_type": "causal_gin"},
    "latent": {"use_GNN_from_attention": "CG_Attention"},
    "mlp": {},
}
MORE = {
    "per_head_ff": {"gnn_mode": "per_head"},
    "initial_sharpening_value": {"use_sharpening": True},
    "use_differential_attention_group_norm": {"use_differential_attention": True},
    "attention_GIN_MLP_GIN_learnable_threshold": {"attention_GIN_MLP_GIN_threshold_mode": "relu"},
}


@pytest.mark.parametrize("name", [name for name, fate in xgpt.FATES.items() if fate.kind == "taken"])
def test_what_is_taken_arrives_where_its_fate_says(name):
    value, expected = TRIED[name]
    head, _, field = xgpt.FATES[name].ours.partition(".")
    others = WITH.get(head, {"use_GNN_from_attention": "LlamaAttentionGIN"})
    config = xgpt.GNNConfig(**{**others, **MORE.get(name, {}), name: value})
    found = getattr(config, head)
    if name == "gnn_mode":
        assert found is not None
        return
    assert (getattr(found, field) if field else found) == expected


@pytest.mark.parametrize("name", [name for name, fate in xgpt.FATES.items() if fate.kind == "dropped"])
def test_what_is_dropped_is_accepted_and_logged_where_it_was_set(name, caplog):
    fate = xgpt.FATES[name]
    with caplog.at_level(logging.WARNING):
        assert xgpt.GNNConfig(**{name: fate.default}) == xgpt.GNNConfig()
        assert not caplog.records
        assert xgpt.GNNConfig(**{name: "something else"}) == xgpt.GNNConfig()
    assert f"`{name}`" in caplog.text
    assert fate.reason in caplog.text


def test_unknown_options_and_values_are_refused_by_name():
    with pytest.raises(ValueError, match="no option gnn_typ, hidden"):
        xgpt.GNNConfig(hidden=3, gnn_typ="causal_gin")
    with pytest.raises(ValueError, match="`MLP_type` must be one of standard_MLP, .*got 'gnn'"):
        xgpt.GNNConfig(MLP_type="gnn")
    with pytest.raises(ValueError, match="`gnn_type` must be one of causal_gin, .*'causal_gnn' names none"):
        xgpt.GNNConfig(gnn_mode="single")


def build(**old):
    torch.manual_seed(0)
    model = LlamaForCausalLMWithGNN(LlamaGNNConfig(**SIZES, gnn_config=xgpt.GNNConfig(**old)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model.eval()


GIN = {"use_GNN_from_attention": "LlamaAttentionGIN", "use_sharpening": True}
CASES = {
    "gin": GIN,
    "gin differential": {**GIN, "use_differential_attention": True},
    "gin scored": {**GIN, "attention_GIN_MLP_use_scoring_fnct": True, "attention_GIN_MLP_scoring_hidden_dim": 6},
    "pna": {"use_GNN_from_attention": "LlamaAttentionPNA"},
    "sparse": {"gnn_mode": "single", "gnn_type": "causal_gin", "hidden_dim": 4, "GIN_use_norm": True},
}
BACK = (
    (r"self_attn\.second_([qk])_proj", r"self_attn.\1_proj_2"),
    (r"self_attn\.sharpening$", "self_attn.sharpening_parameters.0"),
    (r"self_attn\.differential_lambda$", "self_attn.lambda_param.0"),
    (r"aggregate_up", "aggregator_mlp.0"),
    (r"aggregate_down", "aggregator_mlp.2"),
    (r"graph\.scale$", "trainable_scale"),
    (r"graph\.norm\.weight$", "gnn_norm.weight"),
    (r"graph\.network\.map_in", "gnn.input_projection"),
    (r"graph\.network\.map_out", "gnn.output_projection"),
    (r"graph\.network\.layers", "gnn.convs"),
    (r"update\.up\.", "linear1."),
    (r"update\.down\.", "linear2."),
    (r"update\.inner_norm\.", "norm."),
)
HEADS = {"up_weight": "mlp.0.weight", "up_bias": "mlp.0.bias", "gain": "mlp.2.weight"}
HEADS |= {"down_weight": "mlp.4.weight", "down_bias": "mlp.4.bias"}


def as_the_original_saves_it(model):
    """Our weights under the original's names and in its shapes: one small module for each head."""
    old = {}
    for name, weight in model.state_dict().items():
        layer, _, inner = name.partition(".self_attn.")
        leaf = inner.removeprefix("update.")
        if inner == "epsilon" or (inner.startswith("update.") and leaf in HEADS):
            for head, part in enumerate(weight):
                part = part.T if leaf.endswith("_weight") else part.reshape(-1)
                part = part.reshape(()) if inner == "epsilon" else part
                old[f"{layer}.self_attn.gin_layers.{head}.{HEADS.get(leaf, leaf)}"] = part
                if leaf == "gain":
                    old[f"{layer}.self_attn.gin_layers.{head}.normlayer.weight"] = part
        elif inner == "score_target.weight":
            other = model.state_dict()[f"{layer}.self_attn.score_source.weight"]
            old[f"{layer}.self_attn.mlp_scoring.0.weight"] = torch.cat([weight, other], dim=1)
        elif inner == "score_target.bias":
            old[f"{layer}.self_attn.mlp_scoring.0.bias"] = weight
        elif inner == "score_heads.weight":
            old[f"{layer}.self_attn.mlp_scoring.2.weight"] = weight
        elif inner != "score_source.weight":
            for ours, theirs in BACK:
                name = re.sub(ours, theirs, name)
            old[name] = weight.reshape(()) if weight.numel() == 1 else weight
    for layer in range(2):
        old[f"model.layers.{layer}.self_attn.residual_epsilon.0"] = torch.tensor(0.1)
    return old


@pytest.mark.parametrize("name", CASES)
def test_weights_of_the_original_fit_and_compute_the_same(name):
    model = build(**CASES[name])
    torch.manual_seed(5)
    other = LlamaForCausalLMWithGNN(model.config).eval()
    other.load_state_dict(xgpt.convert_state_dict(as_the_original_saves_it(model), other))
    ids = torch.randint(0, 31, (2, 7))
    assert torch.equal(other(ids).logits, model(ids).logits)


def test_unknown_missing_and_misshapen_weights_are_listed():
    model = build(**GIN)
    old = as_the_original_saves_it(model)
    old["model.layers.1.self_attn.gate.weight"] = torch.zeros(2)
    del old["model.layers.0.self_attn.q_proj.weight"]
    old["model.layers.0.self_attn.k_proj.weight"] = torch.zeros(2, 2)
    message = (
        r"unknown: model\.layers\.1\.self_attn\.gate\.weight; missing: model\.layers\.0\.self_attn\.q_proj\.weight; "
        r"of another shape: model\.layers\.0\.self_attn\.k_proj\.weight"
    )
    with pytest.raises(ValueError, match=message):
        xgpt.convert_state_dict(old, model)


def test_thresholds_are_reset_and_parameters_frozen_by_their_old_names():
    model = build(**GIN, attention_GIN_MLP_GIN_threshold_mode="relu", attention_GIN_MLP_GIN_learnable_threshold=True)
    assert len(xgpt.reset_threshold_parameters(model, 0.4)) == 2
    assert {round(r.value, 6) for r in xgpt.extract_gnn_parameters_with_labels(model) if "threshold" in r.kind} == {
        0.4
    }
    assert xgpt.freeze_except_select(model, ["threshold"])
    assert xgpt.count_trainable_parameters(model)[0] == 2
    assert len(xgpt.unfreeze_all(model)) == len(list(model.parameters()))


def test_the_table_in_the_docs_names_what_the_original_called_otherwise():
    page = (Path(__file__).parents[2] / "docs" / "graphs.md").read_text()
    for name in ("LlamaAttentionPNA_LM", "CG_Attention", "freeze_except_select", "train_tokenizer_from_scratch"):
        assert f"`{name}`" in page
