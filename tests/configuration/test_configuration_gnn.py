"""Options of graph layers are checked by name, value and range, and survive being saved."""

import json
from copy import deepcopy

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import LlamaConfig

from graft.configuration.configuration_gnn import GNNConfig, LlamaGNNConfig
from graft.configuration.graph_edges_config import AdjacencyConfig, EdgeTransformConfig
from graft.configuration.latent_config import LatentConfig
from graft.configuration.sparse_graph_config import SparseGraphConfig

REFUSED = (ValueError, TypeError, StrictDataclassError)
SIZES = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 40}

OUT_OF_RANGE = [
    (EdgeTransformConfig, {"threshold": -0.1}, r"`threshold` must lie in \[0, 1\), got -0.1"),
    (EdgeTransformConfig, {"threshold": 1}, r"`threshold` must lie in \[0, 1\), got 1"),
    (EdgeTransformConfig, {"fraction": 0}, r"`fraction` must lie in \(0, 1\], got 0"),
    (EdgeTransformConfig, {"fraction": 1.5}, r"`fraction` must lie in \(0, 1\], got 1.5"),
    (EdgeTransformConfig, {"steepness": 0}, "`steepness` must be above 0 and finite, got 0"),
    (AdjacencyConfig, {"threshold": -0.1}, r"`threshold` must lie in \[0, 1\), got -0.1"),
    (AdjacencyConfig, {"distance_strength": 0}, "`distance_strength` must be above 0 and finite, got 0"),
    (AdjacencyConfig, {"learned_width": 0}, "`learned_width` must be at least 1, got 0"),
    (AdjacencyConfig, {"temperature": float("nan")}, "`temperature` must be above 0 and finite, got nan"),
    (AdjacencyConfig, {"cutoff": 1.0}, r"`cutoff` must lie in \[0, 1\) or be None, got 1.0"),
    (AdjacencyConfig, {"temperature": 0}, "`temperature` must be above 0 and finite, got 0"),
    (AdjacencyConfig, {"sharpness": -1.0}, "`sharpness` must be above 0 and finite, got -1.0"),
    (LatentConfig, {"tokens_per_latent": [1]}, r"`tokens_per_latent` must name different sizes .* got \[1\]"),
    (LatentConfig, {"tokens_per_latent": []}, r"`tokens_per_latent` must name different sizes .* got \[\]"),
    (LatentConfig, {"tokens_per_latent": [4, 4]}, r"`tokens_per_latent` must name different sizes .* got \[4, 4\]"),
    (LatentConfig, {"num_layers": 0}, "`num_layers` must be at least 1, got 0"),
    (LatentConfig, {"mix": 1}, r"`mix` must lie in \(0, 1\), got 1"),
    (SparseGraphConfig, {"rank": 0}, "`rank` must be at least 1, got 0"),
    (SparseGraphConfig, {"num_layers": 0}, "`num_layers` must be at least 1, got 0"),
    (SparseGraphConfig, {"dropout": 1}, r"`dropout` must lie in \[0, 1\), got 1"),
    (SparseGraphConfig, {"scale_last": float("nan")}, "`scale_last` must be finite, got nan"),
    (GNNConfig, {"temperature": 0.0}, "`temperature` must be above 0 and finite, got 0.0"),
    (GNNConfig, {"mlp_ratio": -1}, "`mlp_ratio` must be above 0 and finite, got -1"),
    (GNNConfig, {"mlp_dropout": 1.0}, r"`mlp_dropout` must lie in \[0, 1\), got 1.0"),
    (GNNConfig, {"scoring_width": 0}, "`scoring_width` must be above 0 and finite, got 0"),
    (GNNConfig, {"base_attention": True, "scale": float("inf")}, "`scale` must be finite, got inf"),
    (GNNConfig, {"scale": 0.5}, "`scale` acts with `base_attention=True` only, got 0.5"),
    (GNNConfig, {"differential_norm": True}, "`differential_norm` acts with `differential=True` only"),
    (GNNConfig, {"differential": True, "scores": "mlp"}, "`scores` must be 'dot', got 'mlp'"),
    (GNNConfig, {"latent": {}}, "`latent` acts with `attention` 'cg' or 'cg_interpolate' only, got 'gin'"),
    (GNNConfig, {"attention": "pna", "base_attention": True}, "`base_attention` is not read by `attention='pna'`"),
    (GNNConfig, {"attention": "llama", "normalisation": "relu"}, "`normalisation` is not read by `attention='llama'`"),
    (GNNConfig, {"attention": "pna", "differential": True}, "`differential` is not read by .*must be False, got True"),
    (GNNConfig, {"block_bytes": 0}, "`block_bytes` must be above 0 and finite, got 0"),
    (GNNConfig, {"layers": []}, r"`layers` must name different layers from 0 on in rising order, got \[\]"),
    (GNNConfig, {"layers": [1, 0]}, r"`layers` must name different layers .* got \[1, 0\]"),
    (GNNConfig, {"layers": [1, 1]}, r"`layers` must name different layers .* got \[1, 1\]"),
    (GNNConfig, {"layers": [-1]}, r"`layers` must name different layers .* got \[-1\]"),
    (GNNConfig, {"layers": [-2, 0]}, r"`layers` must name different layers .* got \[-2, 0\]"),
]


@pytest.mark.parametrize(("of_class", "options", "message"), OUT_OF_RANGE)
def test_numbers_out_of_range_are_refused_with_name_value_and_range(of_class, options, message):
    with pytest.raises(REFUSED, match=message):
        of_class(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"attention": "gat"},
        {"placement": "MLP"},
        {"mlp_ratio": "half"},
        {"layers": "all"},
        {"output_projection": 1.5},
    ],
)
def test_other_types_and_choices_are_refused_with_field_and_value(options):
    ((field, value),) = options.items()
    with pytest.raises(REFUSED, match=rf"(?s)'{field}'.*{value}"):
        GNNConfig(**options)


@pytest.mark.parametrize(
    "of_class", [GNNConfig, AdjacencyConfig, EdgeTransformConfig, LatentConfig, SparseGraphConfig]
)
def test_a_misspelt_field_is_refused_by_its_name(of_class):
    with pytest.raises(TypeError, match="'atention'"):
        of_class(atention="gin")


@pytest.mark.parametrize("attention", ["gin", "pna", "pna_vector", "cg", "cg_interpolate"])
def test_a_network_beside_attention_that_shows_no_weights_is_refused(attention):
    message = f"`sparse` reads the attention weights of `attention='llama'`, got `attention='{attention}'`"
    with pytest.raises(REFUSED, match=message):
        GNNConfig(attention=attention, sparse={})


@pytest.mark.parametrize("part", ["edges", "adjacency", "sparse"])
def test_a_part_refuses_unknown_fields_and_other_types(part):
    options = {"attention": "llama", part: {"treshold": 0.1}}
    with pytest.raises(REFUSED, match=rf"`{part}\.treshold` is unknown;.* `{part}` has "):
        GNNConfig(**options)
    with pytest.raises(REFUSED, match=f"`{part}` must be of .*, got str"):
        GNNConfig(**{**options, part: "mean"})


@pytest.mark.parametrize(
    ("part", "options", "message"),
    [
        ("sparse", {"rank": 0}, "`PATH.rank` must be at least 1, got 0"),
        ("sparse", {"rank": "8"}, "`PATH.rank` expected int, got str"),
        ("sparse", {"layer": "gat"}, "`PATH.layer` expected one of .*'gin'.*, got gat"),
        ("sparse", {"mixes_heads": True}, "`PATH.mixes_heads` joins the networks of `PATH.per_head=True`"),
        ("adjacency", {"treshold": 0.1}, "`PATH.treshold` is unknown; did you mean `PATH.threshold`"),
        ("latent", {"mix": 1}, "`PATH.mix` must lie in"),
    ],
)
def test_a_refused_option_of_a_part_is_named_with_its_whole_path(part, options, message):
    attention = "cg" if part == "latent" else "llama"
    with pytest.raises(REFUSED, match="^" + message.replace("PATH", part)):
        GNNConfig(attention=attention, **{part: options})
    with pytest.raises(REFUSED, match="^" + message.replace("PATH", f"gnn_config.{part}")):
        LlamaGNNConfig(**SIZES, gnn_config={"attention": attention, part: options})


def test_options_that_would_not_act_together_are_refused():
    with pytest.raises(REFUSED, match="`edges` acts in attention 'gin', .* got 'relu'"):
        GNNConfig(attention="cg", edges={"transform": "relu"})


def test_whole_numbers_are_taken_where_a_float_is_declared():
    assert GNNConfig(temperature=2, edges={"threshold": 0}).temperature == 2


def test_a_model_config_refuses_what_its_llama_cannot_have():
    with pytest.raises(REFUSED, match="`hidden_size` must be a multiple of `num_attention_heads`, got 30 and 4"):
        LlamaGNNConfig(**{**SIZES, "hidden_size": 30, "head_dim": 8}, gnn_config={})
    with pytest.raises(REFUSED, match=r"`layers` must name layers in \[0, 2\), got \[0, 2\]"):
        LlamaGNNConfig(**SIZES, gnn_config={"layers": [0, 2]})
    with pytest.raises(REFUSED, match=r"`gnn_config\.atention` is unknown; did you mean `gnn_config\.attention`"):
        LlamaGNNConfig(**SIZES, gnn_config={"atention": "gin"})
    with pytest.raises(REFUSED, match="has no field `gnn_confg`; did you mean `gnn_config`"):
        LlamaGNNConfig(**SIZES, gnn_confg={"attention": "gin"})
    with pytest.raises(REFUSED, match=r"must not exceed `max_position_embeddings`, got \[32, 64, 256\] and 100"):
        LlamaGNNConfig(**SIZES, max_position_embeddings=100, gnn_config={"attention": "cg"})
    sizes = {**SIZES, "num_attention_heads": 4, "num_key_value_heads": 2}
    with pytest.raises(REFUSED, match="multiple of `num_key_value_heads`, got 7 and 2"):
        LlamaGNNConfig(**sizes, gnn_config={"scores": "mlp", "scoring_width": 7})
    config = LlamaGNNConfig(**SIZES)
    with pytest.raises(REFUSED, match=r"`layers` must name layers in \[0, 2\), got \[5\]"):
        config.gnn_config = {"layers": [5]}


def test_a_config_is_the_same_after_saving_copying_and_loading(tmp_path):
    options = {"attention": "llama", "sparse": {"rank": 7}, "adjacency": {"combine": "mean"}, "layers": [1]}
    config = LlamaGNNConfig(**SIZES, gnn_config=options)
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["model_type"] == "graft_llama_gnn"
    assert written["gnn_config"]["sparse"]["rank"] == 7
    for other in (LlamaGNNConfig.from_pretrained(tmp_path), deepcopy(config), LlamaGNNConfig(**config.to_dict())):
        assert other.gnn_config == config.gnn_config == GNNConfig(**options)
        assert other.to_dict() == config.to_dict()


def test_a_stock_llama_config_is_taken_over_without_a_warning(tmp_path, caplog):
    LlamaConfig(**SIZES).save_pretrained(tmp_path)
    config = LlamaGNNConfig.from_pretrained(tmp_path, gnn_config={"attention": "pna"})
    assert (config.model_type, config.hidden_size, config.gnn_config.attention) == ("graft_llama_gnn", 32, "pna")
    assert not caplog.records


@pytest.mark.parametrize("layer", ["cheb", "gat", None])
def test_graph_layers_that_are_not_built_are_refused_by_name(layer):
    with pytest.raises(REFUSED, match="layer"):
        SparseGraphConfig(layer=layer)


LLAMA = {"attention": "llama"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mlp": "multi_hop"}, "`mlp='multi_hop'` sends messages along `attention='llama'`, got `attention='gin'`"),
        ({**LLAMA, "shares_scores": True}, "`shares_scores` shares the scores with `sparse`, which is None"),
        (
            {**LLAMA, "sparse": {"reads": "normed_input"}, "placement": "parallel"},
            "`sparse.reads='normed_input'` needs `placement='before_mlp'`.* got 'parallel'",
        ),
        (
            {**LLAMA, "sparse": {"storage": "sparse"}, "adjacency": {"combine": "learned"}},
            "`storage='sparse'` of the graph network needs a bound .*'learned'.*: use 'dense'",
        ),
        (
            {**LLAMA, "sparse": {"storage": "sparse"}, "adjacency": {"cutoff": 0.1, "threshold": 0.0}},
            "`storage='sparse'` of the graph network needs a bound .*cutoff=0.1",
        ),
        (
            {**LLAMA, "sparse": {"storage": "sparse"}, "adjacency": {"combine": "any", "cutoff": 0.1}},
            "`storage='sparse'` of the graph network needs a bound .*'any'.*cutoff=0.1.*: use 'dense'",
        ),
        (
            {**LLAMA, "sparse": {"mixes_heads": True}},
            "`sparse.mixes_heads` joins the networks of `sparse.per_head=True`",
        ),
        (
            {**LLAMA, "sparse": {"layer": "pna", "rank": 9, "towers": 2}},
            "`sparse.rank` must be a multiple of `sparse.towers`, got 9 and 2",
        ),
        (
            {**LLAMA, "sparse": {"aggregators": []}},
            r"`sparse.aggregators` must name at least one, and each once, got \[\]",
        ),
        (
            {**LLAMA, "sparse": {"scalers": ["identity", "identity"]}},
            "`sparse.scalers` must name at least one, and each once",
        ),
    ],
)
def test_graph_parts_that_would_not_act_are_refused(options, message):
    with pytest.raises(REFUSED, match=message):
        GNNConfig(**options)


@pytest.mark.parametrize(
    ("sizes", "options", "message"),
    [
        ({"intermediate_size": 42}, {"mlp": "halfway_gin"}, "`intermediate_size` must be a multiple .* got 42 and 4"),
        ({"intermediate_size": 42}, {"mlp": "multi_aggregation"}, "`intermediate_size` must .* got 42 and 4"),
        ({"hidden_size": 30, "head_dim": 8}, {"mlp": "multi_hop"}, "`hidden_size` must be a multiple .* got 30 and 4"),
        ({"hidden_size": 30, "head_dim": 8}, {"sparse": {"per_head": True}}, "`hidden_size` must .* got 30 and 4"),
    ],
)
def test_widths_that_heads_do_not_divide_are_refused(sizes, options, message):
    with pytest.raises(REFUSED, match=message):
        LlamaGNNConfig(**{**SIZES, **sizes}, gnn_config={**LLAMA, **options})
