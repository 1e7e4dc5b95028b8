"""What sparse-GIN adds to a decoder: a graph network beside the attention of each layer, along that attention's edges.

A graph that is given with the input adds its edges, or is all there is. A step in the attention's chain sees queries
and keys, a pre-hook makes room for nodes in the cache, and a tap of the residual adds the update. The weights are
here, and nothing of a generation.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from ..attachment import Attachment, AttentionFunction, AttentionOutput, stands_before
from ..residual_tap import PLACES_IN_PARALLEL, ThreadSlot, tap_places, tap_residual, tappable_layers
from ..transformers_compat import cache_of
from .adjacency import OwnAdjacency
from .attention_rows import ScoredPairs
from .edge_storage import Edges
from .external_graph import KEYWORD, ExternalGraphHook, JoinedEdges
from .node_cache import NodeCacheLayer, node_cache_layer
from .sparse_gin_config import SparseGINConfig
from .sparse_graph_layers import SparseGraphUpdate

_EPS = 1e-6  # of the update's norm, beside a base that has no RMS norm
_READABLE = ("eager", "sdpa")


class SparseGINAdapter(nn.Module):
    """A SparseGraphUpdate for each decoder layer that has one, by its number.

    Args:
        config: of the adapter.
        model: its base; read, not kept.
        name: under which nodes lie in a cache, so that those of two adapters are not taken for each other.
    """

    def __init__(self, config: SparseGINConfig, model: PreTrainedModel, name: str) -> None:
        super().__init__()
        base: Any = model.config
        count = len(tappable_layers(model, in_parallel=True))
        is_parallel = base.model_type in PLACES_IN_PARALLEL and getattr(base, "use_parallel_residual", True)
        self.placement = "parallel" if is_parallel else "before_mlp"
        options, self.name = config.graph_options(), name
        width, heads, eps = base.hidden_size, base.num_attention_heads, getattr(base, "rms_norm_eps", _EPS)
        self.layers = nn.ModuleDict()
        for index in config.layers(count):
            update = SparseGraphUpdate(options, width, heads, index / max(1, count - 1), eps)
            if config.edge_mode == "self_only":
                update.adjacency = OwnAdjacency(options.adjacency, heads)
            self.layers[str(index)] = update
        self.trains_adjacency, self.shares_scores = config.trains_adjacency, config.shares_scores
        self.reads_attention = config.edge_mode != "external_only"

    def extra_repr(self) -> str:
        """Whether the MLP reads the update, or stands beside it."""
        return f"placement={self.placement!r}"


class AdapterNodes:
    """The nodes that one adapter keeps in a layer of a cache."""

    def __init__(self, layer: NodeCacheLayer, name: str) -> None:
        self.layer, self.name = layer, name

    def append_nodes(self, depth: int | str, nodes: Tensor) -> Tensor:
        """Take in new nodes of graph layer `depth`; return those of all tokens so far.

        Raises:
            RuntimeError: the cache holds tokens that the adapter has not seen.
        """
        together = self.layer.append_nodes(f"{self.name} {depth}", nodes)
        tokens = self.layer.get_seq_length()
        if together.shape[-2] != tokens:
            raise RuntimeError(
                f"The cache holds {tokens} tokens and adapter {self.name!r} has seen {together.shape[-2]} of them: it "
                "was filled by another adapter or by none. Give a fresh cache."
            )
        return together


class SparseGINReader:
    """The hooks of one decoder layer.

    Args:
        adapter: the weights.
        index: of the layer.
        is_active: whether the adapter is to be used now.
    """

    def __init__(self, adapter: SparseGINAdapter, index: int, is_active: Callable[[], bool]) -> None:
        self.adapter, self.index, self.is_active = adapter, index, is_active
        self.slot = ThreadSlot()

    def make_room(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Pre-hook of the attention: the cache's layer is wrapped before it takes in this call's keys."""
        cache = cache_of(kwargs)
        if isinstance(cache, Cache) and self.is_active():
            node_cache_layer(cache, self.index, may_slide=True)

    def read_attention(
        self,
        proceed: AttentionFunction,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **kwargs: Any,
    ) -> AttentionOutput:
        """Step of the attention: keep what it scores; what it computes is left to the rest of the chain.

        Where scores are shared and that rest is the base's own attention, it is answered here, and its graph kept.
        """
        if not (self.adapter.reads_attention and self.is_active()):
            return proceed(module, query, key, value, attention_mask, **kwargs)
        scaling = kwargs.get("scaling")
        scaling, softcap = query.shape[-1] ** -0.5 if scaling is None else scaling, kwargs.get("softcap")
        if self._may_answer(module, kwargs):
            pairs = ScoredPairs(query, key, scaling, attention_mask, softcap)
            dropout = kwargs.get("dropout", 0.0)
            read, edges = self._graph.attend_with_edges(pairs, value, dropout, self.adapter.trains_adjacency)
            self.slot.put(edges)
            return read.transpose(1, 2), None
        ends = (query, key) if self.adapter.trains_adjacency else (query.detach(), key.detach())
        self.slot.put(ScoredPairs(*ends, scaling, attention_mask, softcap))
        return proceed(module, query, key, value, attention_mask, **kwargs)

    def _may_answer(self, module: nn.Module, kwargs: dict[str, Any]) -> bool:
        """Whether attention is what `attend_with_edges` computes: a softmax over keys, whose sinks nobody gave."""
        if not self.adapter.shares_scores or kwargs.get("s_aux") is not None:
            return False
        return stands_before(module, self.read_attention, "sdpa")

    @property
    def _graph(self) -> SparseGraphUpdate:
        graph: Any = self.adapter.layers[str(self.index)]
        return graph

    def update(self, hidden: Tensor, keywords: dict[str, Any]) -> Tensor | None:
        """What the tap calls: lambda norm(GIN(t, A)) for t = h + a; see ResidualUpdate.

        Raises:
            RuntimeError: the attention ran without the chain that the adapter is part of.
        """
        if not self.is_active():
            return None
        graph = self._graph
        edges = JoinedEdges(self._attention_edges(), keywords.get(KEYWORD), hidden.shape[1])
        cache, nodes = cache_of(keywords), None
        if isinstance(cache, Cache):
            nodes = AdapterNodes(node_cache_layer(cache, self.index, may_slide=True), self.adapter.name)
        own = hidden.to(graph.scale.device, graph.scale.dtype)
        added: Tensor = graph(own, edges, nodes)
        return added.to(hidden.device, hidden.dtype)

    def _attention_edges(self) -> Edges | None:
        """The graph of this call's attention, None where none is read."""
        if not self.adapter.reads_attention:
            return None
        seen: ScoredPairs | Edges | None = self.slot.take()
        if seen is None:
            raise RuntimeError(
                f"The attention of layer {self.index} showed no queries and keys: it must call the attention function "
                "that its config names."
            )
        return self._graph.edges(seen) if isinstance(seen, ScoredPairs) else seen


class ImplementationCheck:
    """The pre-hook of a model whose attention is read: other masks do not say which pairs are visible.

    Args:
        is_active: whether the adapter is to be used now.
    """

    def __init__(self, is_active: Callable[[], bool]) -> None:
        self.is_active = is_active

    def __call__(self, model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raise ValueError unless the model runs with an implementation whose masks can be read."""
        implementation = model.config._attn_implementation
        if self.is_active() and implementation not in _READABLE:
            raise ValueError(
                f"`attn_implementation` must be one of {', '.join(map(repr, _READABLE))} where sparse-GIN reads "
                f"attention, got {implementation!r}: change it with `model.set_attn_implementation`."
            )


def install_sparse_gin(
    attachment: Attachment, model: PreTrainedModel, adapter: SparseGINAdapter, is_active: Callable[[], bool]
) -> None:
    """Let `adapter` read and write the layers of `model` until `attachment` is removed.

    Raises:
        TypeError, ValueError: the model's attention or residual cannot be reached, see `tap_places`.
    """
    places, layers = tap_places(model, in_parallel=True), tappable_layers(model, in_parallel=True)
    if adapter.reads_attention:
        attachment.before(model, ImplementationCheck(is_active))
    for name in adapter.layers:
        index = int(name)
        reader = SparseGINReader(adapter, index, is_active)
        attention = getattr(layers[index], places.attention)
        attachment.serve(attention, reader.read_attention, reader.make_room, watches=True)
        tap_residual(attachment, model, index, reader.update, in_parallel=True)
    attachment.before(model, ExternalGraphHook(model, is_active))
