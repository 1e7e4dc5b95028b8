"""Look inside graph layers while they run: edges, statistics, pictures. Without a recorder nothing is kept."""

import threading
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..transformers_compat import cache_of
from .attention_graphs import AttentionGraph, CallOfAttention, graph_of_call, rows_of_edges
from .edge_storage import Edges
from .external_graph import JoinedEdges
from .graph_pages import draw_adjacency, write_graph_page
from .graph_parameters import graph_parameters
from .recorded_graph import CallGraph, GraphSums, join_rows


class GraphRecorder:
    """Within its `with`, all that this thread's forwards of a model do with their graphs is recorded.

    ```python
    with GraphRecorder(model) as recorder:
        model(**tokenizer(text, return_tensors="pt"))
    recorder.page("graph.html", tokenizer)
    ```

    The graph of a layer is what its messages run along: of `sparse`, the network's edges; of "gin" and "pna", the
    transformed weights of each head; of stock attention, also in layers that are not graph layers, the softmax.
    Latent attention has no graph over pairs of tokens and is left out, as is a graph that was given with the input. A
    generation is recorded like a forward: rows of later calls follow those before, a call without earlier tokens
    begins a new sequence. Recording makes each attention's weights once more; dropout has no part in them.

    Args:
        model: a LlamaForCausalLMWithGNN, a LlamaModelWithGNN, or a plain Llama to compare with.
        rows: places of the tokens whose rows are kept for pictures and edges; None for all, () for statistics only.
        per_head: keep each head's graph, where heads have their own, and not their mean.
        block_bytes: largest block of weights held while recording.
    """

    def __init__(
        self,
        model: nn.Module,
        rows: Iterable[int] | None = None,
        per_head: bool = False,
        block_bytes: int = 64 * 2**20,
    ) -> None:
        self.model, self.per_head, self.block_bytes = model, per_head, block_bytes
        self.wanted = None if rows is None else torch.tensor(sorted(set(rows)), dtype=torch.long)
        self.input_ids: Tensor | None = None
        self.kinds: dict[int, str] = {}
        self._thresholds: dict[int, float] = {}
        self._calls: dict[int, dict[int, CallGraph]] = {}  # layer -> number of the call -> its graph
        self._call, self._sequence_begin = 0, 0
        self._attention_mask: Tensor | None = None
        self.heads = int(model.config.num_attention_heads)  # type: ignore[union-attr, arg-type]
        self.batch = 0
        self._pending: dict[int, AttentionGraph | None] = {}
        self._hooks = ExitStack()
        self._thread: int | None = None

    def __enter__(self) -> Self:
        """Hook the model's layers.

        Raises:
            ValueError: the model has no decoder layers with attention.
            RuntimeError: this recorder is in use.
        """
        if self._thread is not None:
            raise RuntimeError("This GraphRecorder is recording already; make another for another thread.")
        model: Any = self.model
        decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
        layers = [layer for layer in getattr(decoder, "layers", []) if hasattr(layer, "self_attn")]
        if not layers:
            raise ValueError(f"`model` must be a decoder like Llama's, got a {type(self.model).__name__}.")
        self._thread = threading.get_ident()
        self._hook(decoder.register_forward_pre_hook(self._begin, with_kwargs=True))
        for layer in layers:
            index, graph = int(layer.self_attn.layer_idx), getattr(layer, "graph", None)
            self.kinds[index] = _kind_of(layer)
            if (threshold := _fixed_threshold(layer)) is not None:
                self._thresholds[index] = threshold
            self._hook(layer.self_attn.register_forward_hook(self._attended, with_kwargs=True))
            if graph is not None:
                self._hook(graph.register_forward_pre_hook(partial(self._connected, index)))
        return self

    def _hook(self, handle: Any) -> None:
        self._hooks.callback(handle.remove)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hooks.close()
        self._thread = None
        self._pending.clear()

    # While the model runs --------------------------------------------------------------------------------------------

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note the tokens of a call, and whether they go on with those before."""
        if threading.get_ident() != self._thread:
            return
        ids = kwargs.get("input_ids", args[0] if args else None)
        mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
        self._attention_mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
        cache = cache_of(kwargs)
        earlier = 0 if cache is None else int(cache.get_seq_length())
        self._call += 1
        if earlier == 0:
            self._sequence_begin, self.input_ids = self._call, None
        if ids is not None:
            ids = ids.detach().cpu()
            known = self.input_ids
            is_continued = known is not None and known.shape[0] == ids.shape[0] and known.shape[1] >= earlier
            self.input_ids = torch.cat([known[:, :earlier], ids], dim=1) if is_continued else ids  # type: ignore[index]

    @torch.no_grad()
    def _attended(self, attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Record the attention's own graph, or leave its weights for the network that makes another of them."""
        if threading.get_ident() != self._thread:
            return
        index, cache = int(attention.layer_idx), cache_of(kwargs)
        call = CallOfAttention(
            kwargs["hidden_states"] if "hidden_states" in kwargs else args[0],
            kwargs["position_embeddings"],
            kwargs.get("attention_mask"),
            None if cache is None else cache.layers[index],
        )
        self.batch = call.states.shape[0]
        graph = graph_of_call(attention, call)
        if self.kinds[index] == "sparse":
            self._pending[index] = graph
        elif graph is not None:
            self._record(index, graph, None, call.states.device)

    @torch.no_grad()
    def _connected(self, index: int, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Record the edges that a graph network is given."""
        if threading.get_ident() == self._thread and (graph := self._pending.pop(index, None)) is not None:
            edges = args[1].attention if isinstance(args[1], JoinedEdges) else args[1]
            self._record(index, graph, edges, args[0].device)

    def _record(self, index: int, graph: AttentionGraph, edges: Edges | None, device: torch.device) -> None:
        """Take in the rows of one layer's call, a block at a time; made again for gradients, it is written again."""
        (target, source), found = graph.sizes, CallGraph()
        batch = self.batch
        size = max(1, self.block_bytes // (8 * batch * self.heads * source))
        for start in range(0, target, size):
            rows = range(start, min(start + size, target))
            weights, own_graph, visible = graph.rows(rows, device)
            if edges is not None:
                own_graph = rows_of_edges(edges, rows, source)[..., : weights.shape[-1]]
            places = torch.arange(rows.start, rows.stop, device=device) + source - target
            found.sums.add(weights, own_graph, visible, places, self._real(places, batch))
            self._keep(found, own_graph, places, source)
        self._calls.setdefault(index, {})[self._call] = found

    def _real(self, places: Tensor, batch: int) -> Tensor:
        mask = self._attention_mask
        if mask is None:
            return torch.ones(batch, len(places), dtype=torch.bool, device=places.device)
        return mask.to(places.device).bool()[:, places]

    def _keep(self, found: CallGraph, graph: Tensor, places: Tensor, source: int) -> None:
        chosen = slice(None) if self.wanted is None else torch.isin(places, self.wanted.to(places.device))
        part = graph[:, :, chosen]
        if part.shape[2]:
            part = part if self.per_head else part.mean(1, keepdim=True)
            found.keep(places[chosen], nn.functional.pad(part, (0, source - part.shape[-1])))

    # Afterwards ------------------------------------------------------------------------------------------------------

    @property
    def layers(self) -> list[int]:
        """The layers that were recorded."""
        return sorted(self._calls)

    def statistics(self) -> list[dict[str, Any]]:
        """Of each layer, over all rows of real tokens of all calls.

        `edges_per_row` and `most_edges`; `density`, edges of visible pairs; `self_loop_share` of all weight;
        `mass_kept`, the share of attention that lies on edges. Means over heads where each has its graph. Then the
        layer's own parameters as `graph_parameters` names them, means over heads, and fixed thresholds.
        """
        found = []
        for layer in self.layers:
            sums = GraphSums()
            for call in self._calls[layer].values():
                sums = sums.plus(call.sums)
            found.append({"layer": layer, "kind": self.kinds[layer], **sums.means(), **self._numbers(layer)})
        return found

    def _numbers(self, layer: int) -> dict[str, float]:
        by_kind: dict[str, list[float]] = {}
        for row in graph_parameters(self.model):
            if row.layer == layer:
                by_kind.setdefault(row.kind, []).append(row.value)
        fixed = {} if layer not in self._thresholds else {"threshold": self._thresholds[layer]}
        return fixed | {kind: sum(values) / len(values) for kind, values in by_kind.items()}

    def adjacency(self, layer: int, item: int = 0, head: int = 0) -> Tensor:
        """The recorded rows of one text's graph, sparse (tokens, tokens): [i, j] weighs the edge j -> i.

        Args:
            layer: decoder layer.
            item: which text of the batch.
            head: with `per_head`, whose graph.

        Raises:
            ValueError: nothing was recorded of that layer, item or head.
        """
        calls = [call for number, call in self._calls.get(layer, {}).items() if number >= self._sequence_begin]
        blocks = [block for call in calls for block in call.blocks]
        if not blocks:
            raise ValueError(f"`layer` {layer} has no recorded rows; layers {self.layers} were recorded.")
        for name, value, count in (("item", item, blocks[-1].shape[0]), ("head", head, blocks[-1].shape[1])):
            if not 0 <= value < count:
                raise ValueError(f"`{name}` must lie in [0, {count}), got {value}.")
        return join_rows(calls, item, head)

    def edges(self, layer: int, item: int = 0, head: int = 0) -> list[tuple[int, int, float]]:
        """(j, i, weight) of each edge j -> i, as `networkx.DiGraph().add_weighted_edges_from` takes them."""
        graph = self.adjacency(layer, item, head)
        target, source = graph.indices().tolist()
        return list(zip(source, target, graph.values().tolist(), strict=True))

    def tokens(self, tokenizer: Any, item: int = 0) -> list[str]:
        """The recorded tokens of one text, as pieces of text.

        Raises:
            ValueError: no token ids were recorded.
        """
        if self.input_ids is None:
            raise ValueError("No token ids were recorded: call the model with `input_ids` inside of the `with`.")
        return [tokenizer.decode([token]) for token in self.input_ids[item].tolist()]

    def heat_map(self, layer: int, path: str | Path, tokens: Sequence[str] = (), item: int = 0, head: int = 0) -> Path:
        """Draw one layer's graph as a PNG: rows read columns. `tokens` label both."""
        title = f"Layer {layer}, {self.kinds[layer]}" + (f", head {head}" if self.per_head else "")
        return draw_adjacency(self.adjacency(layer, item, head), path, tokens, title)

    def page(self, path: str | Path, tokenizer: Any = None, item: int = 0) -> Path:
        """Write an HTML page, and its pictures beside it: statistics, parameters by layer, each layer's graph.

        Args:
            path: of the page.
            tokenizer: names the tokens; without one, they are numbered.
            item: which text of the batch.
        """
        tokens = [] if tokenizer is None else self.tokens(tokenizer, item)
        graphs = {layer: (self.kinds[layer], self.adjacency(layer, item)) for layer in self.layers}
        return write_graph_page(path, graphs, self.statistics(), graph_parameters(self.model), tokens)


def _kind_of(layer: Any) -> str:
    """What a decoder layer's graph is of: "llama", "gin", ..., or "sparse" for a network's."""
    options = getattr(layer, "options", None)
    if options is None:
        return "llama"
    return "sparse" if getattr(layer, "graph", None) is not None else str(options.attention)


def _fixed_threshold(layer: Any) -> float | None:
    """The threshold of a layer's graph where it is an option; trained ones are parameters."""
    options = getattr(layer, "options", None)
    if options is None:
        return None
    if getattr(layer, "graph", None) is not None:
        return float(options.adjacency.threshold)
    acts = options.edges.transform not in ("none", "top_k") and not options.edges.trains_threshold
    return float(options.edges.threshold) if acts else None
