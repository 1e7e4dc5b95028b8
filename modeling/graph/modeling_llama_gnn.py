"""Llama with graph layers: trains, generates with a cache, is saved and loaded like any Llama.

Buehler 2025, "Graph-Aware Isomorphic Attention for Adaptive Dynamics in Transformers", arXiv 2501.02393.
"""

from math import log
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, LlamaForCausalLM, LlamaModel, LlamaPreTrainedModel
from transformers import initialization as init
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaRotaryEmbedding,
)
from transformers.utils.output_capturing import OutputRecorder

from ...configuration.configuration_gnn import MESSAGE_MLPS, GNNConfig, LlamaGNNConfig
from ..cpu_linear import with_fast_linears
from ..remote_code import SavesItsCode
from ..transformers_compat import cache_of, take_cache
from .attention_rows import ScoredPairs
from .cg_attention import CGAttentionInterpolate, cg_class
from .edge_storage import Edges
from .edge_transforms import EdgeTransform
from .external_graph import KEYWORD, ExternalGraph, JoinedEdges, hold_graph, refuse_to_generate, take_graph
from .gin_attention import (
    LlamaAttentionBesideGIN,
    LlamaAttentionGIN,
    LlamaAttentionGINDifferential,
    gin_class,
)
from .graph_mlp import make_mlp
from .lean_gradients import LeanRMSNorm
from .llama_heads import active_dropout, attention_of_any_width, join_heads, query_key_value
from .node_cache import NodeCacheLayer, node_cache_layer
from .per_head_mlp import PerHeadMLP
from .pna_edges import pna_class
from .sparse_graph_layers import SparseGraphUpdate
from .token_groups import TokenGroups


class LlamaAttentionWithScores(LlamaAttention):
    """The stock attention, which also gives the pairs it scored: messages run along them."""

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        connect: SparseGraphUpdate | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, ScoredPairs, Edges | None]:
        """Output and weights as in Llama, then the scored pairs.

        Given a graph network to `connect`, values are summed by the weights that its edges are made of, and the edges
        come last; there are no weights to see then.
        """
        query, key, value = query_key_value(self, hidden_states, position_embeddings, take_cache(kwargs))
        pairs = ScoredPairs(query, key, self.scaling, attention_mask)
        edges: Edges | None = None
        if connect is None:
            output, weights = attention_of_any_width(self, (query, key, value), attention_mask, self.scaling, kwargs)
        else:
            (output, edges), weights = connect.attend_with_edges(pairs, value, active_dropout(self)), None
        return self.o_proj(join_heads(output)), weights, pairs, edges


def attention_class(options: GNNConfig) -> type[nn.Module]:
    """The attention of a graph layer with these options."""
    if options.attention == "gin":
        return LlamaAttentionBesideGIN if options.base_attention else gin_class(options)
    if options.attention in ("pna", "pna_vector"):
        return pna_class(options)
    if options.latent is not None:
        return cg_class(options)
    reads_scores = options.sparse is not None or options.mlp in MESSAGE_MLPS
    return LlamaAttentionWithScores if reads_scores else LlamaAttention


class LlamaDecoderLayerWithGNN(LlamaDecoderLayer):
    """A decoder layer whose attention is a graph layer, or the edges that a network or an MLP sends messages along."""

    def __init__(self, config: LlamaGNNConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.options, self.layer_idx = config.gnn_config, layer_idx
        self.input_layernorm = LeanRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = LeanRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = make_mlp(config)  # type: ignore[assignment]
        self.graph = None
        if self.options.sparse is not None:
            way = layer_idx / max(1, config.num_hidden_layers - 1)
            heads, width = config.num_attention_heads, config.hidden_size
            self.graph = SparseGraphUpdate(self.options, width, heads, way, config.rms_norm_eps)
        self.reads_scores = self.graph is not None or self.options.mlp in MESSAGE_MLPS
        self.self_attn = attention_class(self.options)(config, layer_idx)  # type: ignore[assignment]

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        """(batch, target, hidden_size) to the same; arguments as in the stock layer."""
        cache = cache_of(kwargs) if self.reads_scores else None
        cache_layer = None if cache is None else node_cache_layer(cache, self.layer_idx)
        normed = self.input_layernorm(hidden_states)
        if self.options.shares_scores:
            kwargs["connect"] = self.graph
        attended, _, *seen = self.self_attn(hidden_states=normed, attention_mask=attention_mask, **kwargs)
        hidden_states = hidden_states + attended
        pairs: Any = seen[0] if seen else None
        if self.graph is None:
            return self._fed(hidden_states, self.post_attention_layernorm(hidden_states), pairs, cache_layer)
        edges = self.graph.edges(pairs) if seen[1] is None else seen[1]
        if (external := kwargs.get(KEYWORD)) is not None:
            edges = JoinedEdges(edges, external, hidden_states.shape[1])
        if self.options.placement == "before_mlp":
            states = normed if self.options.sparse.reads == "normed_input" else hidden_states
            hidden_states = hidden_states + self.graph(states, edges, cache_layer)
            return self._fed(hidden_states, self.post_attention_layernorm(hidden_states), pairs, cache_layer)
        normed = self.post_attention_layernorm(hidden_states)
        hidden_states = self._fed(hidden_states, normed, pairs, cache_layer)
        states = normed if self.options.placement == "parallel" else hidden_states
        return hidden_states + self.graph(states, edges, cache_layer)

    def _fed(
        self, hidden_states: Tensor, normed: Tensor, pairs: ScoredPairs | None, cache_layer: NodeCacheLayer | None
    ) -> Tensor:
        """The residual behind the MLP; without one, the norm is all there is."""
        if self.options.mlp in MESSAGE_MLPS:
            return hidden_states + self.mlp(normed, pairs, cache_layer)
        update = self.mlp(normed)
        return update if self.options.mlp == "none" else hidden_states + update


class LlamaGNNPreTrainedModel(LlamaPreTrainedModel):
    """How the weights of graph layers begin, and what transformers may do with the models."""

    config_class = LlamaGNNConfig
    _no_split_modules = ["LlamaDecoderLayer", "LlamaDecoderLayerWithGNN"]
    _supports_flash_attn = False  # its masks do not say which pairs are visible
    _supports_flex_attn = False
    _can_record_outputs = {
        "hidden_states": LlamaDecoderLayer,
        "attentions": [OutputRecorder(LlamaAttention, index=1), OutputRecorder(LlamaAttentionGIN, index=1)],
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Every parameter that is no part of a stock module is set here: weights are built without memory."""
        if isinstance(module, PerHeadMLP):
            for weight in (module.up_weight, module.down_weight):
                init.normal_(weight, std=self.config.initializer_range)
            for bias in (module.up_bias, module.down_bias):
                init.zeros_(bias)
            init.ones_(module.gain)
        elif isinstance(module, LlamaAttentionGIN):
            init.zeros_(module.epsilon)
            if module.sharpening is not None:
                init.constant_(module.sharpening, float(module.options.sharpening))
            if isinstance(module, LlamaAttentionGINDifferential):
                init.constant_(module.differential_lambda, module.first_lambda)
        elif isinstance(module, LlamaAttentionBesideGIN):
            init.constant_(module.graph_scale, module.first_scale)
        elif isinstance(module, TokenGroups):
            init.normal_(module.latent_query, std=self.config.initializer_range)
        elif isinstance(module, CGAttentionInterpolate):
            init.constant_(module.mix, log(module.first_mix / (1 - module.first_mix)))
        elif isinstance(module, EdgeTransform):
            if module.threshold is not None:
                init.constant_(module.threshold, float(module.options.threshold))
        elif callable(initialise := getattr(module, "initialise", None)):
            initialise(self.config.initializer_range)
        elif getattr(module, "starts_at_zero", False):
            for parameter in module.parameters():
                init.zeros_(parameter)
        else:
            super()._init_weights(module)


class LlamaModelWithGNN(LlamaGNNPreTrainedModel, LlamaModel):
    """LlamaModel in which the layers that `config.gnn_config` names are graph layers."""

    def __init__(self, config: LlamaGNNConfig) -> None:
        super(LlamaModel, self).__init__(config)  # not LlamaModel's own: it would build stock layers
        self.padding_idx, self.vocab_size = config.pad_token_id, config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        graph_layers = config.gnn_config.layers
        self.layers = nn.ModuleList(
            LlamaDecoderLayerWithGNN(config, index)
            if graph_layers is None or index in graph_layers
            else LlamaDecoderLayer(config, index)
            for index in range(config.num_hidden_layers)
        )
        self.norm = LeanRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        """As LlamaModel's; `graph`, an ExternalGraph, is one more keyword: its edges are added to those of `sparse`.

        Raises:
            ValueError: the padding of a row lies between its tokens, where largest values are taken or groups counted;
                with latent attention, documents are packed into one row; `graph` is not one of this input, or the
                model reads none.
            TypeError: `graph` is none.
        """
        options = self.config.gnn_config
        kwargs = take_graph(self, {"input_ids": input_ids, "attention_mask": attention_mask}, kwargs)
        if KEYWORD in kwargs:
            refuse_graph(options)
        refuses_holes = options.attention == "pna" or options.mlp == "multi_aggregation" or options.latent is not None
        if refuses_holes and not torch.compiler.is_compiling():
            _refuse_holes(attention_mask)
            if options.latent is not None:
                _refuse_packed(attention_mask, kwargs.get("position_ids"))
        return super().forward(input_ids, attention_mask=attention_mask, **kwargs)

    def hold_graph(self, cache: Cache, graph: ExternalGraph) -> None:
        """As GraphReader's.

        Raises:
            ValueError: the model reads no graph.
        """
        refuse_graph(self.config.gnn_config)
        hold_graph(cache, graph)


class LlamaForCausalLMWithGNN(SavesItsCode, LlamaGNNPreTrainedModel, LlamaForCausalLM):
    """LlamaForCausalLM with graph layers, as `config.gnn_config` says.

    `from_pretrained("any Llama", gnn_config=GNNConfig(...))` takes over all weights that fit; those that are new or
    left over are named in a warning.
    """

    auto_classes = ("AutoModelForCausalLM",)
    lora_target_modules = (  # of Llama, of PNA and of the sparse network; a name that a variant lacks is passed over
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        *("aggregate_up", "aggregate_down", "map_in", "map_out", "up", "down"),
    )

    def __init__(self, config: LlamaGNNConfig) -> None:
        super(LlamaForCausalLM, self).__init__(config)
        self.model = LlamaModelWithGNN(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
        with_fast_linears(self)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As any model's.

        Raises:
            ValueError: `graph` is given; it has to travel in the cache.
        """
        refuse_to_generate(kwargs)
        return super().generate(*args, **kwargs)


def refuse_graph(options: GNNConfig) -> None:
    """Raise ValueError unless a graph from elsewhere can be added to the edges of a model with `options`."""
    sparse = options.sparse
    if sparse is None:
        raise ValueError("`graph` is read by the network of `gnn_config.sparse`, which is None.")
    if sparse.layer not in ("gin", "gcn"):
        raise ValueError(
            f"`graph` is added to sums over edges: `sparse.layer` must be 'gin' or 'gcn', got {sparse.layer!r}."
        )
    if sparse.normalises_degree or not sparse.weighted_edges:
        raise ValueError(
            "`graph` is added to weighted sums: it needs `sparse.normalises_degree=False` and "
            f"`sparse.weighted_edges=True`, got {sparse.normalises_degree} and {sparse.weighted_edges}."
        )


def _refuse_holes(attention_mask: Tensor | None) -> None:
    """Raise ValueError where tokens of a (batch, source) mask begin a second time."""
    if attention_mask is None or attention_mask.dim() != 2:
        return
    mask = attention_mask.bool()
    begins = mask & ~nn.functional.pad(mask, (1, 0))[:, :-1]
    second = begins & (begins.cumsum(1) > 1)
    if second.any():
        row, position = second.nonzero()[0].tolist()
        raise ValueError(
            "`attention_mask` may hide tokens in front of a row and behind it, not between: row "
            f"{row} begins again at position {position}."
        )


def _refuse_packed(attention_mask: Tensor | None, position_ids: Tensor | None) -> None:
    """Raise ValueError where positions begin again in a row: latents would be made across documents."""
    if attention_mask is not None and attention_mask.dim() != 2:
        raise ValueError(
            "Latent attention counts real tokens: `attention_mask` must be (batch, source), got "
            f"{tuple(attention_mask.shape)}."
        )
    if attention_mask is None and position_ids is not None and (position_ids.diff(dim=-1) != 1).any():
        raise ValueError(
            "Latent attention cannot read several documents packed into one row: `position_ids` must rise by 1. Give "
            "each document a row of its own."
        )
