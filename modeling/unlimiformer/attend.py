"""The attention steps that read a memory: one for self-attention, one for cross-attention.

A hook hands each call what attention functions are not given: the layer of the cache that holds the memory.
Without a memory in the cache both steps proceed to the model's own attention, so it is the stock model, bit for bit.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import EncoderDecoderCache

from ..attachment import AttentionFunction, AttentionOutput
from ..transformers_compat import cache_of
from .families import projections
from .knn_attention import add_sink, local_attention, merge_attention
from .layer_memory import LayerMemory, with_softcap
from .memory_cache import MemoryCacheLayer, memory_layer
from .report import AttentionCall, QueryLayout


class OfferedMemory(NamedTuple):
    """What was found in the cache: the memory's layer, and the local position of the step's first token."""

    layer: MemoryCacheLayer
    first_step: int


def offer_memory(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]] | None:
    """Forward pre-hook of a served attention module: pass on the memory in its cache as `graft_memory`."""
    cache = cache_of(kwargs)
    layer, past = memory_layer(cache, module.layer_idx)  # type: ignore[arg-type]
    if layer is None:
        return None
    layer.offer()
    hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    if isinstance(cache, EncoderDecoderCache):  # cross-attention: self-attention has counted this step already
        past -= hidden.shape[1]
    else:
        past -= layer.shift
    return args, {**kwargs, "graft_memory": OfferedMemory(layer, past)}


def attend_to_memory(
    proceed: AttentionFunction,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    graft_memory: OfferedMemory | None = None,
    **kwargs: Any,
) -> AttentionOutput:
    """Self-attention over the local tokens and, in the same softmax, each query's best keys of the memory.

    Args:
        query: (batch, heads, target, head_dim); key, value: (batch, key_value_heads, local, head_dim).

    Returns:
        (batch, target, heads, head_dim) in the dtype of `query`, and no weights.
    """
    memory = None if graft_memory is None else graft_memory.layer.memory
    if graft_memory is None or memory is None:
        return proceed(module, query, key, value, attention_mask, **kwargs)
    scaled = query * kwargs["scaling"]
    dropout, softcap = kwargs.get("dropout") or 0.0, kwargs.get("softcap")
    local = local_attention(scaled, key, value, attention_mask, dropout, softcap)
    if kwargs.get("s_aux") is not None:  # gpt_oss: a learned logit of each head takes its share of the softmax
        local = add_sink(local, kwargs["s_aux"])
    remembered = _read(scaled, with_softcap(memory, softcap), graft_memory, dropout, local_total=local[1])
    return merge_attention(remembered, local).to(query.dtype).transpose(1, 2).contiguous(), None


def cross_attend_to_memory(
    proceed: AttentionFunction,
    module: nn.Module,
    query: Tensor,
    *encoder: Any,
    graft_memory: OfferedMemory | None = None,
    **kwargs: Any,
) -> AttentionOutput:
    """Cross-attention over the memory in place of `encoder`, the key, value and mask of the encoder's output.

    Returns:
        (batch, target, heads, head_dim) in the dtype of `query`, and weights only where the stock attention gave them.
    """
    if graft_memory is None:
        return proceed(module, query, *encoder, **kwargs)
    memory = graft_memory.layer.memory
    if memory is None:
        raise RuntimeError("a cross-attention layer of a memory's cache holds no memory.")
    if _is_stock_attention(memory, graft_memory):
        rows = graft_memory.layer.rows
        grid = rows.to_grid(query).transpose(1, 2).flatten(2, 3)  # (documents, heads, repeats x target, head_dim)
        keys, values = memory.keys.to(query.dtype), memory.values.to(query.dtype)
        if "position_bias" in kwargs:  # T5: zeros, but of the length of what stands for the memory in the cache
            kwargs["position_bias"] = grid.new_zeros(1, grid.shape[1], grid.shape[2], keys.shape[2])
        output, weights = proceed(module, grid, keys, values, None, **kwargs)
        # One row per document, in any order: the weights can be laid out like the rows. Else they are not given.
        weights = rows.from_grid(weights[:, None]) if weights is not None and grid.shape == query.shape else None
        return rows.from_grid(output.view(rows.count, -1, query.shape[2], *output.shape[2:])), weights
    scaled, dropout = query * kwargs["scaling"], kwargs.get("dropout") or 0.0
    memory = with_softcap(memory, kwargs.get("softcap"))
    output = _read_hidden(module, scaled, memory, graft_memory, dropout)
    window = memory.window
    if window is not None:
        first = _read(scaled, with_softcap(window, kwargs.get("softcap")), graft_memory, dropout)[0]
        output = torch.where(_reads_window(memory, graft_memory, query), first, output)
    return output.to(query.dtype).transpose(1, 2).contiguous(), None


def _is_stock_attention(memory: LayerMemory, offered: OfferedMemory) -> bool:
    """Whether every query sees every stored key: then the model's own kernel gives the answer, bit for bit."""
    return (
        not memory.is_hidden
        and memory.visible is None
        and memory.window is None
        and (offered.layer.record is None or memory.is_window)
        and memory.choice.keeps_all(memory.keys.shape[2])
    )


def _reads_window(memory: LayerMemory, offered: OfferedMemory, query: Tensor) -> Tensor:
    """(1, heads, target, 1): True where a head or a step reads the first window instead of the memory."""
    steps = torch.arange(query.shape[2], device=query.device) + offered.first_step
    by_step = (steps == 0) & memory.window_first
    by_head = torch.zeros(query.shape[1], dtype=torch.bool, device=query.device)
    if memory.heads is not None:
        by_head = torch.ones_like(by_head)
        by_head[list(memory.heads)] = False
    return (by_head[:, None] | by_step)[None, :, :, None]


def _read_hidden(
    module: nn.Module, query: Tensor, memory: LayerMemory, offered: OfferedMemory, dropout: float
) -> Tensor:
    """Read a memory of hidden states by folding the projections (memory.md 1.3): softmax((W_k^T q) X^T) X W_v^T + b_v.

    q . (W_k x + b_k) = (W_k^T q) . x + a constant of the query, which neither the ranking nor the softmax sees.
    """
    if not memory.is_hidden:
        return _read(query, memory, offered, dropout)[0]
    to_key: Any
    to_value: Any
    _, to_key, to_value, _ = projections(module)
    head_dim = query.shape[3]
    key_weight = to_key.weight.unflatten(0, (-1, head_dim))
    groups = key_weight.shape[0]
    by_group = query.unflatten(1, (groups, -1))  # (batch, groups, heads of a group, target, head_dim)
    folded = torch.einsum("bgrtd,gdm->bgrtm", by_group, key_weight).flatten(1, 2)
    summed = _read(folded, memory, offered, dropout)[0].to(query.dtype).unflatten(1, (groups, -1))
    value_weight = to_value.weight.unflatten(0, (groups, -1))
    output = torch.einsum("bgrtm,gdm->bgrtd", summed, value_weight)
    if to_value.bias is not None:
        output = output + to_value.bias.view(groups, 1, 1, -1)
    if to_key.bias is not None and torch.is_grad_enabled():
        # Its gradient is zero; without one DistributedDataParallel would wait for it.
        output = output + 0.0 * to_key.bias.sum()
    return output.flatten(1, 2)


def _read(
    query: Tensor, memory: LayerMemory, offered: OfferedMemory, dropout: float, local_total: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Lay `query` out by document, attend to the memory, and lay the answer out by row again.

    Args:
        query: (batch, heads, target, dim), scaled.
        local_total: (batch, heads, target), log-sum-exp over local tokens, for the report.

    Returns:
        Output (batch, heads, target, dim) and log-sum-exp (batch, heads, target).
    """
    layer, rows = offered.layer, offered.layer.rows
    heads, target = query.shape[1:3]
    key_heads = memory.keys.shape[1]
    grid = rows.to_grid(query)
    layout = QueryLayout(heads // key_heads, grid.shape[1], target)

    def by_document(
        rows_of_heads: Tensor,
    ) -> Tensor:  # (documents, repeats, heads, ...) -> (documents, key heads, count, ...)
        split = rows_of_heads.unflatten(2, (key_heads, layout.groups))
        return split.permute(0, 2, 3, 1, *range(4, split.ndim)).flatten(2, 4)

    def by_row(counted: Tensor) -> Tensor:
        split = counted.unflatten(2, (layout.groups, layout.repeats, target))
        return rows.from_grid(split.permute(0, 3, 1, 2, *range(4, split.ndim)).flatten(2, 3))

    blocks: list[tuple[Any, ...]] = []
    record = None if memory.is_window else layer.record
    observe = None if record is None else lambda *block: blocks.append(block)
    output, total = memory.attend(by_document(grid), _visible(memory, layout), dropout, observe)
    if record is not None:
        share = None
        if local_total is not None:
            share = (total - by_document(rows.to_grid(local_total))).sigmoid()
        call = AttentionCall(layer.index, offered.first_step, layout, memory.heads, memory.window_first)
        record.add(call, blocks, share)
    return by_row(output), by_row(total)


def _visible(memory: LayerMemory, layout: QueryLayout) -> Tensor | None:
    """(documents, 1 or key heads, 1 or count, source): which keys each query may see; None for all."""
    visible = None if memory.visible is None else memory.visible[:, None, None, :]
    if memory.heads is None or memory.window is not None:
        return visible
    key_heads, source = memory.keys.shape[1:3]
    reads = torch.zeros(key_heads * layout.groups, dtype=torch.bool, device=memory.keys.device)
    reads[list(memory.heads)] = True
    by_query = reads.view(1, key_heads, layout.groups, 1, 1).expand(-1, -1, -1, layout.repeats * layout.target, -1)
    by_query = by_query.reshape(1, key_heads, -1, 1)
    return by_query.expand(-1, -1, -1, source) if visible is None else by_query & visible
