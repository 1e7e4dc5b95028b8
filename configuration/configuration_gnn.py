"""What a graph-aware Llama is: tokens are nodes, attention makes the edges, and messages run from earlier to later.

Buehler 2025, "Graph-Aware Isomorphic Attention for Adaptive Dynamics in Transformers", arXiv 2501.02393.
"""

# No `from __future__ import annotations` here: it would silently switch the strict type checks off.
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from math import isfinite
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig

from .graph_edges_config import AdjacencyConfig, EdgeTransformConfig
from .latent_config import LatentConfig
from .option_checks import check_default, check_positive, check_share, read_options
from .sparse_graph_config import SparseGraphConfig

_LATENT = ("cg", "cg_interpolate")

MESSAGE_MLPS = ("halfway_gin", "multi_hop", "multi_aggregation")
"""The values of `mlp` that read attention."""


@strict
@dataclass
class GNNConfig:
    """The graph layers of a Llama.

    Args:
        attention: "gin" sums neighbours' states and applies one MLP per head; "pna" reads mean, largest, smallest and
            variance of the neighbours' values; "pna_vector" takes whole vectors, by norm, for largest and smallest;
            "cg" reads latents of finished groups of tokens and the token's own group; "cg_interpolate" mixes the stock
            attention with the latents' attention; "llama" is the stock attention.
        layers: decoder layers that are graph layers, rising; None is all. The others are stock.
        mlp_ratio: width inside the MLP of "gin" and "pna" over the width of a head; of "multi_aggregation" over the
            width of a slice.
        mlp_dropout: inside the MLP of "gin".
        scores: what "gin" scores pairs by: "dot", queries and keys; "mlp", W2 silu(W1 [n_i; n_j]) for all heads.
        scoring_width: between W1 and W2.
        normalisation: "softmax" of the scores, or "relu" of them, which leaves pairs out and whose rows need not sum
            to 1.
        differential: weights are A1 - lambda A2 of two pairs of queries and keys (arXiv 2410.05258).
        differential_norm: RMS norm of what a head's neighbours send, times 1 minus the first lambda.
        base_attention: the layer keeps the stock attention, and adds the graph's part.
        scale: where the trainable factor of the graph's part begins, with `base_attention`; at 0 it is its base.
        sharpening: where the trainable factor on the scores of "gin" begins; None leaves it out.
        temperature: divides the scores of "gin".
        output_projection: whether "gin" mixes its heads at the end.
        residual_mean: "pna" adds its MLP to the mean of the values, and begins at 0: it starts as its base.
        aggregates: what the MLP of "pna" reads: "smallest" is [mean, largest, variance, smallest], "sum" is [sum,
            mean, largest, variance]; "auto" reads the sum where weights need not sum to 1, never with "pna_vector".
        edges: an EdgeTransformConfig or a dict of its fields: the edges of "gin" and "pna". None is the defaults.
        sparse: a SparseGraphConfig or a dict of its fields: a graph network beside "llama". None is no network.
        latent: a LatentConfig or a dict of its fields: the levels of "cg" and "cg_interpolate". None is the defaults.
        adjacency: an AdjacencyConfig or a dict of its fields: the edges of `sparse`. None is the defaults.
        placement: where the update of `sparse` enters: "before_mlp", "after_mlp", or "parallel" to the MLP.
        shares_scores: compute the attention of "llama" from the weights that the graph of `sparse` is made from,
            instead of scoring twice: less time where no fused kernel exists, rounded otherwise than the stock one.
        mlp: "standard" is the stock one; "linear" one map and an activation, "shallow" two maps around it; "none" is
            the norm alone, without a skip. Three send messages along the attention of "llama": "halfway_gin" between
            gate and output map, "multi_hop" over one, two and three steps for each head, "multi_aggregation" by
            several aggregators.
        mlp_message_scale: where the trainable weights of those messages begin, over 1 (1, 0.5, 0.1 of "multi_hop").
            With 0, "halfway_gin" begins as the stock MLP.
        block_bytes: largest block of attention weights held at a time where they must be written out.
    """

    attention: Literal["gin", "pna", "pna_vector", "cg", "cg_interpolate", "llama"] = "gin"
    layers: list[int] | None = None
    mlp_ratio: float | int = 0.5
    mlp_dropout: float | int = 0.1
    scores: Literal["dot", "mlp"] = "dot"
    scoring_width: int = 512
    normalisation: Literal["softmax", "relu"] = "softmax"
    differential: bool = False
    differential_norm: bool = False
    base_attention: bool = False
    scale: float | int = 0.0
    sharpening: float | int | None = 1.0
    temperature: float | int = 1.0
    output_projection: bool = False
    residual_mean: bool = False
    aggregates: Literal["auto", "smallest", "sum"] = "auto"
    edges: Any = None
    sparse: Any = None
    latent: Any = None
    adjacency: Any = None
    placement: Literal["before_mlp", "after_mlp", "parallel"] = "before_mlp"
    shares_scores: bool = False
    mlp: Literal["standard", "linear", "shallow", "none", "halfway_gin", "multi_hop", "multi_aggregation"] = "standard"
    mlp_message_scale: float | int = 1.0
    block_bytes: int = 64 * 2**20

    def __post_init__(self) -> None:
        self.edges = read_options(EdgeTransformConfig, "edges", {} if self.edges is None else self.edges)
        self.adjacency = read_options(AdjacencyConfig, "adjacency", {} if self.adjacency is None else self.adjacency)
        if self.latent is not None or self.attention in _LATENT:
            self.latent = read_options(LatentConfig, "latent", {} if self.latent is None else self.latent)
        if self.sparse is not None:
            self.sparse = read_options(SparseGraphConfig, "sparse", self.sparse)

    def validate_ranges(self) -> None:
        """Refuse numbers outside their range; the message names the field, its value and what is allowed."""
        check_positive(self, "mlp_ratio", "scoring_width", "sharpening", "temperature", "block_bytes")
        if not isfinite(self.scale):
            raise ValueError(f"`scale` must be finite, got {self.scale}.")
        check_share("mlp_dropout", self.mlp_dropout)
        layers = self.layers
        if layers is not None and (not layers or layers[0] < 0 or layers != sorted(set(layers))):
            raise ValueError(f"`layers` must name different layers from 0 on in rising order, got {self.layers}.")

    def validate_combination(self) -> None:
        """Refuse options that would not act together."""
        if self.sparse is not None and self.attention != "llama":
            raise ValueError(
                f"`sparse` reads the attention weights of `attention='llama'`, got `attention={self.attention!r}`."
            )
        if self.attention != "gin":
            check_default(self, "scores", "differential", "scale")
        if self.attention not in ("gin", *_LATENT):
            check_default(self, "base_attention")
        if self.attention in ("llama", *_LATENT):
            check_default(self, "normalisation", "aggregates")
        if self.latent is not None and self.attention not in _LATENT:
            raise ValueError(f"`latent` acts with `attention` 'cg' or 'cg_interpolate' only, got {self.attention!r}.")
        if self.scores == "mlp" and self.differential:
            raise ValueError("`differential` needs two pairs of queries and keys: `scores` must be 'dot', got 'mlp'.")
        if self.differential_norm and not self.differential:
            raise ValueError("`differential_norm` acts with `differential=True` only.")
        if self.scale and not self.base_attention:
            raise ValueError(f"`scale` acts with `base_attention=True` only, got {self.scale}.")
        if self.attention in ("llama", *_LATENT) and self.edges.transform != "none":
            raise ValueError(
                "`edges` acts in attention 'gin', 'pna' and 'pna_vector' only: `edges.transform` must be 'none' with "
                f"{self.attention!r}, got {self.edges.transform!r}."
            )

        self._validate_messages()

    def _validate_messages(self) -> None:
        if self.mlp in MESSAGE_MLPS and self.attention != "llama":
            raise ValueError(
                f"`mlp={self.mlp!r}` sends messages along `attention='llama'`, got `attention={self.attention!r}`."
            )
        if self.shares_scores and self.sparse is None:
            raise ValueError("`shares_scores` shares the scores with `sparse`, which is None.")
        if self.sparse is None:
            return
        if self.sparse.reads == "normed_input" and self.placement != "before_mlp":
            raise ValueError(
                "`sparse.reads='normed_input'` needs `placement='before_mlp'`: the other placements say what is read, "
                f"got {self.placement!r}."
            )
        if self.sparse.storage == "sparse" and self.adjacency.least_weight() <= 0:
            raise ValueError(
                "`storage='sparse'` of the graph network needs a bound on the edges of a row, and this `adjacency` "
                f"has none (`combine={self.adjacency.combine!r}`, `cutoff={self.adjacency.cutoff}`): use 'dense'."
            )

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON values."""
        return asdict(self)


@strict
class LlamaGNNConfig(LlamaConfig):
    """A LlamaConfig with `gnn_config`: a GNNConfig, a dict of its fields, None for the defaults."""

    model_type = "graft_llama_gnn"

    gnn_config: Any = None

    def __post_init__(self, **kwargs: Any) -> None:
        for name in kwargs:  # a PreTrainedConfig would keep it, and nobody read it
            if name != "gnn_config" and get_close_matches(name, ["gnn_config"], cutoff=0.8):
                raise ValueError(f"LlamaGNNConfig has no field `{name}`; did you mean `gnn_config`?")
        super().__post_init__(**kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "model_type":  # of the stock checkpoint that is being loaded; ours stays
            return
        # transformers sets what `from_pretrained` is given after the config was made, so this is where it is checked.
        if name == "gnn_config":
            value = read_options(GNNConfig, name, {} if value is None else value)
            _check_fits(value, self)
        super().__setattr__(name, value)

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """As of any config; a stock Llama's is no stranger, so it causes no warning."""
        found, unused = super().get_config_dict(*args, **kwargs)
        if found.get("model_type") == "llama":
            found["model_type"] = cls.model_type
        return found, unused

    def validate_gnn_config(self) -> None:
        """Refuse a head width or layers that the Llama does not have."""
        _check_fits(self.gnn_config, self)

    def to_dict(self) -> dict[str, Any]:
        output: dict[str, Any] = super().to_dict()
        if hasattr(output.get("gnn_config"), "to_dict"):
            output["gnn_config"] = output["gnn_config"].to_dict()
        return output


def _check_fits(options: Any, config: Any) -> None:
    """Raise ValueError unless graph layers with `options` can be built into a Llama with `config`."""
    width, heads = getattr(config, "hidden_size", None), getattr(config, "num_attention_heads", None)
    count = getattr(config, "num_hidden_layers", None)
    if width is None or heads is None or count is None:  # while the config itself is being filled
        return
    if options.attention == "gin" and width % heads:
        raise ValueError(
            "`attention='gin'` cuts the hidden state into heads: `hidden_size` must be a multiple of "
            f"`num_attention_heads`, got {width} and {heads}."
        )
    groups = getattr(config, "num_key_value_heads", None) or heads
    longest = getattr(config, "max_position_embeddings", None)
    if options.latent is not None and longest is not None and max(options.latent.tokens_per_latent) > longest:
        raise ValueError(
            "`tokens_per_latent` must not exceed `max_position_embeddings`, got "
            f"{options.latent.tokens_per_latent} and {longest}."
        )
    if options.latent is not None and width % groups:
        raise ValueError(
            "The cache keeps hidden states by key heads: `hidden_size` must be a multiple of `num_key_value_heads`, "
            f"got {width} and {groups}."
        )
    if options.scores == "mlp" and options.scoring_width % groups:
        raise ValueError(
            "The cache keeps what `scores='mlp'` makes of a token by key heads: `scoring_width` must be a multiple of "
            f"`num_key_value_heads`, got {options.scoring_width} and {groups}."
        )
    if width % heads and (options.mlp == "multi_hop" or (options.sparse is not None and options.sparse.per_head)):
        raise ValueError(
            "`mlp='multi_hop'` and `sparse.per_head` cut the hidden state into heads: `hidden_size` must be a "
            f"multiple of `num_attention_heads`, got {width} and {heads}."
        )
    inner = getattr(config, "intermediate_size", None)
    if inner is not None and inner % heads and options.mlp in ("halfway_gin", "multi_aggregation"):
        raise ValueError(
            f"`mlp={options.mlp!r}` cuts the MLP into heads: `intermediate_size` must be a multiple of "
            f"`num_attention_heads`, got {inner} and {heads}."
        )
    if options.layers is not None and options.layers[-1] >= count:
        raise ValueError(f"`layers` must name layers in [0, {count}), got {options.layers}.")
