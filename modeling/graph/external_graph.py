"""How a graph from elsewhere reaches the layers of a model: as a keyword of one pass, or in a generation's cache.

A pre-hook of the model takes `graph` out of its keywords, or finds it in the cache, and puts what this pass reads into
a keyword that every attention is given. Nothing of it stays on the model.
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel

from ..cache_layers import CacheLayerWrapper, innermost, wrappers_of
from ..transformers_compat import CACHE_ARGUMENT, cache_argument, cache_of, take_cache
from .edge_storage import Edges
from .llama_heads import join_heads, split_heads

KEYWORD = "graft_external_graph"
"""The keyword of the model in which a forward pass carries what its rows read."""


class Messages(Protocol):
    """What the rows of one pass read along a graph."""

    def messages(self, nodes: Tensor) -> Tensor:
        """Of nodes (batch, source, width) of all tokens so far: (batch, target, width)."""


@dataclass(frozen=True, eq=False)
class PassShape:
    """Which tokens a pass has.

    Args:
        rows: (batch,), the row of the graph for each row of the batch: beams share one.
        mask: (batch, source), 1 for real tokens, or None.
        past: tokens before this pass.
        new: tokens of this pass.
    """

    rows: Tensor
    mask: Tensor | None
    past: int
    new: int

    @property
    def source(self) -> int:
        """All tokens so far."""
        return self.past + self.new


class ExternalGraph(ABC):
    """A graph over the tokens of a batch."""

    batch: Any

    @abstractmethod
    def to(self, device: torch.device) -> Self:
        """The same graph there."""

    @abstractmethod
    def check_length(self, length: int) -> None:
        """Raise ValueError if the graph is not one of `length` tokens."""

    @abstractmethod
    def over(self, shape: PassShape) -> Messages:
        """What the rows of a pass read."""

    def inputs(self, model: nn.Module, cache: Cache | None = None) -> dict[str, Any]:
        """What `generate` needs to read this graph, made anew for each generation: a cache that holds it.

            model.generate(input_ids, **graph.inputs(model), max_new_tokens=50)

        Args:
            model: one with a sparse-GIN adapter, or a LlamaForCausalLMWithGNN whose `sparse` network adds up edges.
            cache: one to use, fresh or of earlier tokens; by default a new dynamic one.

        Raises:
            ValueError: nothing in `model` reads graphs.
        """
        reader = next(graph_readers(model), None)
        if reader is None:
            raise ValueError("`model` reads no graph: give it an adapter with `SparseGINConfig` first.")
        config: Any = model.config
        cache = DynamicCache(config=config) if cache is None else cache
        reader.hold_graph(cache, self)
        return cache_argument(cache)


class GraphReader(Protocol):
    """What reads graphs in a model: one of its modules, or a pre-hook of one."""

    def hold_graph(self, cache: Cache, graph: ExternalGraph) -> None:
        """Let `cache` hold `graph` where this reader looks for it: a saved folder has its own copy of this file."""


def graph_readers(model: nn.Module) -> Iterator[GraphReader]:
    """All readers in `model`."""
    for module in model.modules():
        for each in (module, *module._forward_pre_hooks.values()):
            if callable(getattr(each, "hold_graph", None)):
                yield each  # type: ignore[misc]


class GraphCacheLayer(CacheLayerWrapper):
    """A cache layer that holds the graph of its generation, and which row of it each row of the batch reads."""

    def __init__(self, inner: Any, graph: ExternalGraph) -> None:
        super().__init__(inner)
        self.graph = graph
        self.rows: Tensor | None = None

    def rows_of(self, batch: int) -> Tensor:
        """(batch,) rows of the graph. At first, `generate` repeats each row for beams or answers.

        Raises:
            ValueError: the batch is no multiple of the graph's.
        """
        if self.rows is None:
            if batch % self.graph.batch:
                raise ValueError(f"`graph` has {self.graph.batch} rows, the input has {batch}: they must be as many.")
            self.rows = torch.arange(self.graph.batch).repeat_interleave(batch // self.graph.batch)
        return self.rows

    def _select(self, indices: Tensor) -> None:
        if self.rows is not None:
            self.rows = self.rows[indices.to(self.rows.device)]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.rows = None if self.rows is None else self.rows.repeat_interleave(repeats)

    def reset(self) -> None:
        super().reset()
        self.rows = None


def held_graph(cache: Any) -> GraphCacheLayer | None:
    """The layer of `cache` that holds a graph, if one does."""
    for layer in getattr(cache, "layers", ())[:1]:
        return next((wrapper for wrapper in wrappers_of(layer) if isinstance(wrapper, GraphCacheLayer)), None)
    return None


def hold_graph(cache: Cache, graph: ExternalGraph) -> GraphCacheLayer:
    """Let `cache` hold `graph`, in place of any that it held."""
    if not cache.layers and cache.layer_class_to_replicate is not None:
        cache.layers.append(cache.layer_class_to_replicate())
    held = held_graph(cache)
    if held is None:
        held = GraphCacheLayer(cache.layers[0], graph)
        cache.layers[0] = held
    held.graph, held.rows = graph, None
    return held


@dataclass(frozen=True, eq=False)
class JoinedEdges:
    """The edges of attention, if any, and those of a graph over all tokens, where attention may see the last alone."""

    attention: Edges | None
    external: Messages | None
    target: int

    def sum(self, sources: Tensor) -> Tensor:
        """sum_j (w_ij + e_ij) z_j of sources z (batch, source, width), with heads behind `batch` if there are."""
        parts = [] if self.external is None else [_messages_to_heads(self.external, sources)]
        if self.attention is not None:
            edges = self.attention
            parts.append(edges.sum(sources[..., sources.shape[-2] - edges.source :, :]))
        if not parts:
            return sources.new_zeros(*sources.shape[:-2], self.target, sources.shape[-1])
        return parts[0] if len(parts) == 1 else parts[0] + parts[1]


def _messages_to_heads(external: Messages, sources: Tensor) -> Tensor:
    """All heads read one graph, so that they are one width to it."""
    if sources.dim() == 3:
        return external.messages(sources)
    return split_heads(external.messages(join_heads(sources)), sources.shape[-1])


class ExternalGraphHook:
    """The pre-hook of a model: `graph`, given or held by the cache, becomes what this pass reads.

    Args:
        model: whose arguments these are; read, not kept.
        is_active: whether the adapter that reads graphs is to be used now.
    """

    def __init__(self, model: PreTrainedModel, is_active: Callable[[], bool]) -> None:
        self.is_active = is_active
        self.names = [name for name in inspect.signature(type(model).forward).parameters if name != "self"]

    def __call__(
        self, model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Return new arguments of the model, or None to leave them.

        Raises:
            TypeError, ValueError: `graph` is none, or not one of this input.
        """
        if not self.is_active():
            return None
        return args, take_graph(model, dict(zip(self.names, args, strict=False)), kwargs)

    def hold_graph(self, cache: Cache, graph: ExternalGraph) -> None:
        """As GraphReader's."""
        hold_graph(cache, graph)


def take_graph(model: PreTrainedModel, named: dict[str, Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """`kwargs` with what this pass reads under KEYWORD, in the place of `graph` there or of the graph in the cache.

    Args:
        named: other arguments of the model, by name.
        kwargs: its keywords; not changed.

    Raises:
        TypeError, ValueError: `graph` is none, or not one of this input.
    """
    kwargs = dict(kwargs)
    graph = kwargs.pop("graph", None)
    if graph is not None and not all(hasattr(graph, part) for part in ("batch", "check_length", "over")):
        raise TypeError(f"`graph` must be a TokenEdges or a ChunkGraph, got {type(graph).__name__}.")
    given = named | kwargs
    if graph is not None or held_graph(cache_of(given)) is not None:
        kwargs[KEYWORD] = _begin(model, graph, given, kwargs)
    return kwargs


def refuse_to_generate(kwargs: dict[str, Any]) -> None:
    """Raise ValueError if `graph` is among the keywords of `generate`."""
    if "graph" in kwargs:
        raise ValueError("`generate` takes no `graph`, which has to be in the cache: pass **graph.inputs(model).")


def _begin(
    model: PreTrainedModel, graph: ExternalGraph | None, given: dict[str, Any], kwargs: dict[str, Any]
) -> Messages:
    """What the rows of this pass read, of the graph given or else of the one held."""
    tokens = given["inputs_embeds"] if given.get("input_ids") is None else given["input_ids"]
    cache, (batch, new) = cache_of(given), tokens.shape[:2]
    past = 0 if cache is None or not cache.layers else innermost(cache.layers[0]).get_seq_length()
    held: Any = held_graph(cache)
    if graph is not None:
        if graph.batch != batch:
            raise ValueError(f"`graph` has {graph.batch} rows, the input has {batch}: they must be as many.")
        graph.check_length(past + new)
        if cache is None and _wants_cache(model, given):
            take_cache(kwargs)
            cache = kwargs[CACHE_ARGUMENT] = DynamicCache(config=model.config)
        held = None if cache is None else hold_graph(cache, graph)
    rows = torch.arange(batch) if held is None else held.rows_of(batch)
    mask = _local_mask(given.get("attention_mask"), past + new)
    graph = (held.graph if graph is None else graph).to(tokens.device)
    return graph.over(PassShape(rows.to(tokens.device), mask, past, new))


def _wants_cache(model: PreTrainedModel, given: dict[str, Any]) -> bool:
    """Whether the model would make a cache, which then has to hold the graph; while training none is of use."""
    use_cache = given.get("use_cache")
    return not model.training and bool(model.config.use_cache if use_cache is None else use_cache)


def _local_mask(mask: Any, source: int) -> Tensor | None:
    """The columns of a two-dimensional mask that stand for tokens, without those of a memory in front of them."""
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape[1] < source:
        return None
    return mask[:, mask.shape[1] - source :]
