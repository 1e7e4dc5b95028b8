"""Cross-attention for families that compute their own softmax: a module of ours stands in place of theirs."""

from typing import Any

import torch
from torch import Tensor, nn

from ..attachment import AttentionOutput
from ..transformers_compat import cache_of
from .attend import OfferedMemory, cross_attend_to_memory
from .families import projections
from .memory_cache import memory_layer


class SwappedCrossAttention(nn.Module):
    """Reads the memory of a cache with the projections of the module it stands for; without one, calls that module.

    It shares the sub-modules of `original`, under their names, so that state dicts and adapters see no difference.

    Args:
        original: the cross-attention of LED, MVP or FSMT.
    """

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self._modules = original._modules
        object.__setattr__(self, "original", original)  # no sub-module: its parameters would count twice
        self.training = original.training

    def __getattr__(self, name: str) -> Any:
        """What layers ask of their cross-attention besides calling it is the original's."""
        if name == "original":  # absent while being deep-copied
            raise AttributeError(name)
        return getattr(self.original, name)

    def train(self, mode: bool = True) -> "SwappedCrossAttention":
        """Set the mode of both."""
        self.original.train(mode)
        return super().train(mode)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the forward of the module it stands for."""
        cache = cache_of(kwargs)
        layer, past = memory_layer(cache, self.original.layer_idx)
        original: Any = self.original
        if layer is None:
            return original(*args, **kwargs)
        time_first = "query" in kwargs  # FSMT: (target, batch, hidden)
        hidden = kwargs["query"].transpose(0, 1) if time_first else kwargs.get("hidden_states", *args[:1])
        to_query, _, _, to_output = projections(original)
        query = to_query(hidden).unflatten(-1, (original.num_heads, -1)).transpose(1, 2)
        offered = OfferedMemory(layer, past - hidden.shape[1])
        dropout = original.dropout if self.training else 0.0
        scaling = query.shape[-1] ** -0.5
        output, weights = cross_attend_to_memory(
            plain_attention, original, query, None, None, None, graft_memory=offered, scaling=scaling, dropout=dropout
        )
        output = to_output(output.flatten(2))
        output = output.transpose(0, 1) if time_first else output
        weights = weights if kwargs.get("output_attentions") else None
        return (output, weights, cache) if type(original).__name__.startswith("LED") else (output, weights)


def add_causal_mask(
    decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]] | None:
    """Forward pre-hook of FSMT's decoder: behind a memory, no token sees those that follow it.

    FSMT makes its causal mask from `input_ids` and without a cache only, so that several answer tokens at once, as in
    a loss or a prompt, would see each other.
    """
    cache = cache_of(kwargs)
    if memory_layer(cache, 0)[0] is None or kwargs.get("decoder_causal_mask") is not None:
        return None
    given: Tensor = kwargs["inputs_embeds"] if args[0] is None else args[0]
    target, past = given.shape[1], cache.get_seq_length()
    mask = args[1].new_full((target, past + target), -torch.inf).triu(past + 1)
    return args, {**kwargs, "decoder_causal_mask": mask}


def plain_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> AttentionOutput:
    """softmax(scaling q K^T) V in the order of operations of these families.

    Args:
        query: (batch, heads, target, head_dim); key, value: (batch, heads, source, head_dim); all keys are seen.

    Returns:
        (batch, target, heads, head_dim) and the weights (batch, heads, target, source).
    """
    flat = (tensor.flatten(0, 1) for tensor in (query * scaling, key, value))
    queries, keys, values = flat
    weights = torch.bmm(queries, keys.transpose(1, 2)).softmax(-1)
    output = torch.bmm(nn.functional.dropout(weights, dropout), values)
    return output.unflatten(0, query.shape[:2]).transpose(1, 2), weights.unflatten(0, query.shape[:2])
