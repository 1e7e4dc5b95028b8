"""Queries and keys of Llama by heads, and its attention with values of any width."""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from transformers import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaAttention, eager_attention_forward

from .attention_rows import AttentionRows, ScoredPairs
from .lean_gradients import rotated


def split_heads(states: Tensor, width: int) -> Tensor:
    """(batch, source, heads * width) to (batch, heads, source, width)."""
    return states.unflatten(-1, (-1, width)).transpose(1, 2)


def join_heads(states: Tensor) -> Tensor:
    """(batch, heads, source, width) to (batch, source, heads * width)."""
    return states.transpose(1, 2).flatten(2)


def rotated_heads(queries: Tensor, keys: Tensor, width: int, table: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Projected queries and keys (batch, source, heads * width), by heads and rotated by cosine and sine."""
    return rotated(split_heads(queries, width), split_heads(keys, width), *table)


def query_key_value(
    module: LlamaAttention, hidden_states: Tensor, table: tuple[Tensor, Tensor], cache: Cache | None
) -> tuple[Tensor, Tensor, Tensor]:
    """What a stock attention attends with: queries of the new tokens, keys and values of all tokens so far.

    Args:
        hidden_states: (batch, target, hidden_size), normed.
        table: cosine and sine of the positions.
        cache: takes in the new keys and values.

    Returns:
        (batch, heads, target, head_dim) and two of (batch, key_value_heads, source, head_dim).
    """
    queries, keys = module.q_proj(hidden_states), module.k_proj(hidden_states)
    query, key = rotated_heads(queries, keys, module.head_dim, table)
    value = split_heads(module.v_proj(hidden_states), module.head_dim)
    if cache is not None:
        key, value = cache.update(key, value, module.layer_idx)
    return query, key, value


def active_dropout(module: nn.Module) -> float:
    """Share of the attention weights that `module` drops now."""
    return float(module.attention_dropout or 0) if module.training else 0.0  # type: ignore[arg-type]


def attention_of_any_width(
    module: nn.Module,
    states: tuple[Tensor, Tensor, Tensor],
    mask: Tensor | None,
    scaling: float,
    arguments: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """The configured attention of query and key with values of another width.

    Fused attention on a CPU falls back to a slow form where widths differ (2,048 tokens: 233 ms against 68), so the
    narrower ones are filled up with zeros. With wide values it then multiplies as many zeros: rows are written out
    instead where all of them may be held at once (PNA, 1,024 tokens, with backward: 160 ms against 130).

    Args:
        module: has `config`, `is_causal`, `attention_dropout` and `num_key_value_groups`.
        states: query, key, value (batch, heads, ., width).
        arguments: handed on to the attention.

    Returns:
        (batch, heads, target, width of the values), and the weights if the implementation gives them.
    """
    query, key, value = states
    config: Any = module.config
    name, dropout = config._attn_implementation, active_dropout(module)
    narrow, wide = query.shape[-1], value.shape[-1]
    if wide > narrow:
        pairs, budget = ScoredPairs(query, key, scaling, None), config.gnn_config.block_bytes
        if mask is None and name == "sdpa" and query.is_cpu and pairs.sizes[0] * pairs.bytes_of_row <= budget:
            return AttentionRows(pairs).read(value, dropout, budget), None
        query, key = (functional.pad(part, (0, wide - narrow)) for part in (query, key))
    elif narrow > wide:
        value = functional.pad(value, (0, narrow - wide))
    attention = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention_forward)
    output, weights = attention(module, query, key, value, mask, dropout=dropout, scaling=scaling, **arguments)
    return output.transpose(1, 2)[..., :wide], weights
