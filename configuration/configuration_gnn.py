"""What a graph-aware Llama is: tokens are nodes, attention makes the edges, and messages run from earlier to later.

Buehler 2025, "Graph-Aware Isomorphic Attention for Adaptive Dynamics in Transformers", arXiv 2501.02393.
"""

# No `from __future__ import annotations` here: it would silently switch the strict type checks off.
from dataclasses import asdict, dataclass, field, fields
from difflib import get_close_matches
from math import inf, isfinite, log
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig

_LATENT = ("cg", "cg_interpolate")
_SLOPES_IN_T = (
    "relu",
    "silu",
    "softplus",
    "sharp_softplus",
    "sigmoid",
    "flow",
    "silu+binary",
    "silu_below_binary_above",
    "softplus_below_binary_above",
)

MESSAGE_MLPS = ("halfway_gin", "multi_hop", "multi_aggregation")
"""The values of `mlp` that read attention."""


@strict
@dataclass
class EdgeTransformConfig:
    """What becomes of an attention weight `a` of a visible pair before it weighs a message.

    Args:
        transform: "none" keeps `a`; "relu", "silu", "softplus" of (a - t); "sharp_softplus" is
            softplus(beta (a - t)) / beta; "sigmoid" is sigmoid(beta (a - t)); "flow" is sigmoid(5 a) times
            sigmoid(50 (a - t)); "binary" is [a > t]; "silu+binary" is silu(a - t) + s [a > t];
            "<f>_below_binary_above" is f(a - t) up to t and 1 above; "top_k" is 1 on the largest share of the row's
            visible keys; "scaled_topk" is 1 on the largest share of the strictly earlier ones, which may be none,
            where all weights below t count as equal.
        threshold: t, in [0, 1).
        steepness: beta.
        binary_weight: s.
        trains_threshold: whether t is a trainable number of each layer; for transforms that have a slope in t.
        fraction: of the visible keys that "top_k" keeps, at least one, and of the earlier ones that "scaled_topk"
            keeps; in (0, 1].
        straight_through: let the gradient pass hard selections as if `a` had been kept. Without it, "binary",
            "top_k" and "scaled_topk" teach queries and keys nothing.
    """

    transform: Literal[
        "none",
        "relu",
        "silu",
        "softplus",
        "sharp_softplus",
        "sigmoid",
        "flow",
        "binary",
        "silu+binary",
        "relu_below_binary_above",
        "silu_below_binary_above",
        "softplus_below_binary_above",
        "top_k",
        "scaled_topk",
    ] = "none"
    threshold: float | int = 0.2
    trains_threshold: bool = False
    steepness: float | int = 10.0
    binary_weight: float | int = 1.0
    fraction: float | int = 0.1
    straight_through: bool = False

    def validate_ranges(self) -> None:
        """Refuse numbers outside their range; the message names the field, its value and what is allowed."""
        if not 0 <= self.threshold < 1:
            raise ValueError(f"`threshold` must lie in [0, 1), got {self.threshold}.")
        if not 0 < self.fraction <= 1:
            raise ValueError(f"`fraction` must lie in (0, 1], got {self.fraction}.")
        _check_positive(self, "steepness", "binary_weight")

    def validate_threshold(self) -> None:
        """Refuse a trainable threshold that would never get a gradient."""
        if self.trains_threshold and self.transform not in _SLOPES_IN_T:
            raise ValueError(
                f"`trains_threshold` needs a `transform` with a slope in the threshold, "
                f"{', '.join(_SLOPES_IN_T)}; got {self.transform!r}."
            )


@strict
@dataclass
class AdjacencyConfig:
    """How the attention maps of all heads become one weighted graph, or one for each head.

    Args:
        combine: "mean" over heads; "sum", at most 1; "any", the largest over heads of
            sigmoid((a - threshold) / temperature); "learned", w2 . relu(W1 [a_1 ... a_H]). Where each head keeps its
            own graph, "mean" and "sum" are `a` itself, "any" the sigmoid, and "learned" has an output per head.
        temperature: of "any".
        learned_activation: behind "learned": "sigmoid", or a "softmax" over what the row sees.
        learned_width: of "learned", between its two maps.
        distance: "far" favours distant tokens by ((1 + |i - j|) / n_i)^s, where row i sees n_i tokens; "near" close
            ones by (1 + |i - j|)^-s; None leaves weights as they are.
        distance_strength: s.
        sharpness: alpha in sigmoid(alpha (a - threshold)), applied to the combined weight; None leaves it out.
        threshold: see above.
        cutoff: weights up to it are no edges; None keeps all.
        self_loops: whether a token reads itself.
        normalises_rows: divide each row by the root mean square of its visible part, times one trainable number.
    """

    combine: Literal["mean", "sum", "any", "learned"] = "sum"
    temperature: float | int = 0.1
    learned_activation: Literal["sigmoid", "softmax"] = "softmax"
    learned_width: int = 128
    distance: Literal["far", "near"] | None = None
    distance_strength: float | int = 1.0
    sharpness: float | int | None = 10.0
    threshold: float | int = 0.1
    cutoff: float | int | None = 0.6
    self_loops: bool = True
    normalises_rows: bool = False

    def validate_ranges(self) -> None:
        """Refuse numbers outside their range; the message names the field, its value and what is allowed."""
        _check_positive(self, "temperature", "sharpness", "distance_strength")
        _check_count(self, "learned_width")
        if not 0 <= self.threshold < 1:
            raise ValueError(f"`threshold` must lie in [0, 1), got {self.threshold}.")
        if self.cutoff is not None and not 0 <= self.cutoff < 1:
            raise ValueError(f"`cutoff` must lie in [0, 1) or be None, got {self.cutoff}.")

    def least_weight(self) -> float:
        """What the attention weight behind an edge exceeds: of a head ("any"), or combined. 0 or less is no limit."""
        if self.combine == "learned" or self.cutoff is None:
            return -inf
        least = float(self.cutoff)
        if self.sharpness is not None:
            least = self.threshold + _logit(least) / self.sharpness
        return least if self.combine != "any" else self.threshold + self.temperature * _logit(least)


@strict
@dataclass
class SparseGraphConfig:
    """A graph network on the sparse graph that a layer's own attention makes; its output is added to the residual.

    Args:
        layer: "gin" sends the sum over edges through an MLP; "gcn" sends it through one linear map; "pna" reads
            several aggregators of its neighbours (arXiv 2004.05718); "recombination" averages earlier neighbours by a
            softmax over the edges (GAT, arXiv 1710.10903).
        rank: width of the nodes.
        num_layers: graph layers, each one message step.
        per_head: one network for each head, on its slice of the hidden state and its own graph, each of width `rank`.
        mixes_heads: with `per_head`, a square map of the joined outputs.
        mlp: whether "gin" has an MLP; one linear map otherwise.
        mlp_norm: in the MLP of "gin".
        mlp_ratio: width inside the MLP of "gin" over `rank`.
        one_plus: "gin" weighs the token itself with 1 + epsilon, as its paper does, and not with epsilon.
        weighted_edges: whether "gin", "gcn" and "pna" weigh edges; an edge counts 1 otherwise.
        normalises_degree: "gcn" divides by the sum of the row's weights.
        aggregators: of "pna", among "mean", "min", "max", "std".
        scalers: of "pna", each a factor for all aggregators: "identity"; "amplification", log(degree + 1) / delta;
            "attenuation", its inverse.
        log_degree: delta, the mean of log(degree + 1) in the training data; the default stands for 11 edges.
        towers: slices of the nodes that "pna" treats by themselves and then mixes.
        activation: in the MLP of "gin" and behind each graph layer. "prelu" has a trainable slope.
        dropout: behind each graph layer.
        residual: whether each graph layer adds its input.
        normalises: RMS norm of the update before it is scaled.
        matches_scale: give each token's update the root mean square of what the network read.
        reads: the network's input: the "residual" behind attention, or the "normed_input" of attention.
        storage: "dense" keeps a weight for each pair of tokens, "sparse" the edges of each row alone, of which there
            are so few that none is lost; "auto" chooses by length.
        scale_first, scale_last: where the trainable scale of the update begins, in the first and last decoder layer,
            and linearly in between. With both 0 the model begins as its base.
    """

    layer: Literal["gin", "gcn", "pna", "recombination"] = "gin"
    rank: int = 128
    num_layers: int = 1
    per_head: bool = False
    mixes_heads: bool = False
    mlp: bool = True
    mlp_norm: Literal["layer", "none"] = "layer"
    mlp_ratio: float | int = 1.0
    one_plus: bool = False
    weighted_edges: bool = True
    normalises_degree: bool = False
    aggregators: list[Literal["mean", "min", "max", "std"]] = field(
        default_factory=lambda: ["mean", "min", "max", "std"]
    )
    scalers: list[Literal["identity", "amplification", "attenuation"]] = field(
        default_factory=lambda: ["identity", "amplification", "attenuation"]
    )
    log_degree: float | int = 2.5
    towers: int = 1
    activation: Literal["relu", "gelu", "silu", "tanh", "prelu"] = "relu"
    dropout: float | int = 0.1
    residual: bool = True
    normalises: bool = True
    matches_scale: bool = False
    reads: Literal["residual", "normed_input"] = "residual"
    storage: Literal["auto", "dense", "sparse"] = "auto"
    scale_first: float | int = 0.0
    scale_last: float | int = 0.5

    def validate_ranges(self) -> None:
        """Refuse numbers outside their range; the message names the field, its value and what is allowed."""
        _check_count(self, "rank", "num_layers", "towers")
        _check_positive(self, "mlp_ratio", "log_degree")
        _check_share("dropout", self.dropout)
        for name in ("scale_first", "scale_last"):
            if not isfinite(getattr(self, name)):
                raise ValueError(f"`{name}` must be finite, got {getattr(self, name)}.")
        for name in ("aggregators", "scalers"):
            chosen = getattr(self, name)
            if not chosen or len(set(chosen)) < len(chosen):
                raise ValueError(f"`{name}` must name at least one, and each once, got {chosen}.")

    def validate_combination(self) -> None:
        """Refuse options that would not act together."""
        if self.mixes_heads and not self.per_head:
            raise ValueError("`mixes_heads` joins the networks of `per_head=True`, got `per_head=False`.")
        if self.layer == "pna" and self.rank % self.towers:
            raise ValueError(f"`rank` must be a multiple of `towers`, got {self.rank} and {self.towers}.")


@strict
@dataclass
class LatentConfig:
    """Latents that stand for groups of tokens, on one or more scales.

    Args:
        tokens_per_latent: size of the groups, a level for each.
        num_layers: of attention among a level's latents. With "cg_interpolate" the last is an attention map only.
        skip: whether the attention's input is added to its output.
        projects: whether each level has its own output map; otherwise all share one.
        mix: share of the stock attention in "cg_interpolate" at the beginning; trainable, one number per level.
    """

    tokens_per_latent: list[int] = field(default_factory=lambda: [32, 64, 256])
    num_layers: int = 1
    skip: bool = False
    projects: bool = True
    mix: float | int = 0.5

    def validate_ranges(self) -> None:
        """Refuse numbers outside their range; the message names the field, its value and what is allowed."""
        sizes = self.tokens_per_latent
        if not sizes or min(sizes) < 2 or len(set(sizes)) != len(sizes):
            raise ValueError(f"`tokens_per_latent` must name different sizes of at least 2, got {sizes}.")
        if self.num_layers < 1:
            raise ValueError(f"`num_layers` must be at least 1, got {self.num_layers}.")
        if not 0 < self.mix < 1:
            raise ValueError(f"`mix` must lie in (0, 1), got {self.mix}.")


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
        self.edges = _read(EdgeTransformConfig, "edges", {} if self.edges is None else self.edges)
        self.adjacency = _read(AdjacencyConfig, "adjacency", {} if self.adjacency is None else self.adjacency)
        if self.latent is not None or self.attention in _LATENT:
            self.latent = _read(LatentConfig, "latent", {} if self.latent is None else self.latent)
        if self.sparse is not None:
            self.sparse = _read(SparseGraphConfig, "sparse", self.sparse)

    def validate_ranges(self) -> None:
        """Refuse numbers outside their range; the message names the field, its value and what is allowed."""
        _check_positive(self, "mlp_ratio", "scoring_width", "sharpening", "temperature", "block_bytes")
        if not isfinite(self.scale):
            raise ValueError(f"`scale` must be finite, got {self.scale}.")
        _check_share("mlp_dropout", self.mlp_dropout)
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
            _check_default(self, "scores", "differential", "scale")
        if self.attention not in ("gin", *_LATENT):
            _check_default(self, "base_attention")
        if self.attention in ("llama", *_LATENT):
            _check_default(self, "normalisation", "aggregates")
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
                "`sparse.storage='sparse'` needs a bound on the edges of a row, and this `adjacency` has none "
                f"(`combine={self.adjacency.combine!r}`, `cutoff={self.adjacency.cutoff}`): use 'dense'."
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
            value = _read(GNNConfig, name, {} if value is None else value)
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


def _read(of_class: type, name: str, options: Any) -> Any:
    """Options of `of_class`, from themselves or from a dict of its fields."""
    if isinstance(options, dict):
        known = {each.name for each in fields(of_class)}
        if unknown := sorted(set(options) - known):
            raise ValueError(f"`{name}` has no field {unknown}; it has {sorted(known)}.")
        return of_class(**options)
    if type(options).__name__ != of_class.__name__:  # the class may be a saved folder's own copy
        raise ValueError(
            f"`{name}` must be of {of_class.__name__}, a dict of its fields or None, got {type(options).__name__}."
        )
    return options


def _check_positive(options: Any, *names: str) -> None:
    """Raise ValueError unless each of these fields is None, or a finite number above 0."""
    for name in names:
        value = getattr(options, name)
        if value is not None and not (isfinite(value) and value > 0):
            raise ValueError(f"`{name}` must be above 0 and finite, got {value}.")


def _check_default(options: Any, *names: str) -> None:
    """Raise ValueError where a field was set that the chosen attention does not read."""
    for one in fields(options):
        if one.name in names and getattr(options, one.name) != one.default:
            raise ValueError(
                f"`{one.name}` is not read by `attention={options.attention!r}`: it must be {one.default!r}, got "
                f"{getattr(options, one.name)!r}."
            )


def _check_share(name: str, value: float) -> None:
    if not 0 <= value < 1:
        raise ValueError(f"`{name}` must lie in [0, 1), got {value}.")


def _check_count(options: Any, *names: str) -> None:
    """Raise ValueError unless each of these fields is at least 1."""
    for name in names:
        if getattr(options, name) < 1:
            raise ValueError(f"`{name}` must be at least 1, got {getattr(options, name)}.")


def _logit(share: float) -> float:
    """Where the sigmoid takes the value `share`."""
    return -inf if share <= 0 else inf if share >= 1 else log(share / (1 - share))
