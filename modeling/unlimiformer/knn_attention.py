"""Attention to the best-matching keys of a memory, and its union with ordinary attention, as functions on tensors.

Queries are laid out by document, (documents, heads, count, head_dim), where `count` holds all that asks one document
under one key head: the heads of a group, the beams or questions, the target tokens. So a memory is read once for all.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ...retrieval.exact_search import gathered_sums, inner_products, largest, weighted_sums

SCORES_BYTES = 256 * 2**20
"""Most bytes of scores held at a time; more queries are processed in blocks."""

Observer = Callable[..., None]
"""`observe(first_query, weights, ids, mass)` sees each block: its weights (documents, heads, count, kept), the ids
they belong to (None: all keys in order) and the share of the softmax over all keys that was kept (..., count). Where
an index chose, a fifth argument is the share of the exact best keys that is among them (..., count)."""


@dataclass(frozen=True)
class KeyChoice:
    """Which keys of a memory a query may keep, and how their scores count.

    Args:
        keys_per_query: at most so many, None for all.
        sinks: the first keys of each document, kept whatever their score.
        softcap: c of c tanh(s / c), through which the kept scores pass; it changes no order, so keys are ranked
            without it. None for no cap.
    """

    keys_per_query: int | None = None
    sinks: int = 0
    softcap: float | None = None

    def keeps_all(self, source: int) -> bool:
        """Whether every one of `source` keys is kept, so that attention is exact."""
        return self.keys_per_query is None or self.keys_per_query >= source


def best_keys(scores: Tensor, choice: KeyChoice) -> tuple[Tensor, Tensor]:
    """Scores and ids of the kept keys, each (..., kept), unsorted; exactly `keys_per_query`, also on ties."""
    kept = scores.shape[-1] if choice.keys_per_query is None else choice.keys_per_query
    if not choice.sinks:
        return largest(scores, kept)
    ranking = scores.clone()
    sinks = ranking[..., : choice.sinks]
    sinks.masked_fill_(sinks > -torch.inf, torch.inf)  # those that may be seen rank first
    ids = largest(ranking.detach(), kept)[1]
    return scores.gather(-1, ids), ids


def cap_scores(scores: Tensor, softcap: float | None) -> Tensor:
    """c tanh(s / c), as in Gemma 2 (arXiv 2408.00118, section 2); -inf stays."""
    if softcap is None:
        return scores
    return (softcap * (scores / softcap).tanh()).masked_fill(scores == -torch.inf, -torch.inf)


def normalise(scores: Tensor, may_be_empty: bool = True) -> tuple[Tensor, Tensor]:
    """Softmax weights and log-sum-exp of `scores` over the last axis.

    The latter is max s - log(max p), which spares a second pass of exponentials. `may_be_empty`: some row may be all
    -inf, and then gets zeros and -inf.
    """
    highest = scores.amax(dim=-1, keepdim=True)
    if not may_be_empty:
        weights = scores.softmax(dim=-1)
        return weights, (highest - weights.amax(dim=-1, keepdim=True).log()).squeeze(-1)
    empty = highest == -torch.inf
    if scores.requires_grad:  # the softmax of nothing is NaN, and so would be its gradient, masked or not
        scores, highest = scores.masked_fill(empty, 0.0), highest.masked_fill(empty, 0.0)
    weights = scores.softmax(dim=-1)
    largest_weight = weights.masked_fill(empty, 1.0).amax(dim=-1, keepdim=True)
    total = (highest - largest_weight.log()).masked_fill(empty, -torch.inf)
    return weights.masked_fill(empty, 0.0), total.squeeze(-1)


def knn_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    choice: KeyChoice,
    visible: Tensor | None = None,
    dropout: float = 0.0,
    observe: Observer | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend to the best keys of each query: softmax(q K_I^T) V_I, with I the `keys_per_query` largest q . k_j.

    Bertsch et al. 2023, section 3.2. Values of kept keys are gathered where they are few, else all are multiplied.

    Args:
        query: (documents, heads, count, dim), scaled already.
        keys, values: (documents, heads, source, dim), possibly in half precision; the same tensor may serve as both.
        choice: which keys are kept.
        visible: (documents, 1 or heads, 1 or count, source), False where a key must not be seen; None if all may.
        dropout: probability of dropping a weight.
        observe: shown what was kept, see `Observer`.

    Returns:
        The output (documents, heads, count, dim) and the log-sum-exp of the kept scores (documents, heads, count),
        both float32 or wider. A query that sees no key gets zeros and -inf.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    documents, heads, count, _ = query.shape
    rows = max(1, SCORES_BYTES // (documents * heads * keys.shape[-2] * wide.itemsize))
    if count <= rows:
        return _attend(query, keys, values, choice, visible, dropout, partial(observe, 0) if observe else None)
    learns = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, keys, values))
    outputs, totals = [], []
    for start in range(0, count, rows):
        block = query[..., start : start + rows, :]
        seen = visible if visible is None or visible.shape[2] == 1 else visible[:, :, start : start + rows]
        if learns and observe is None:  # the scores of a block are made again in the backward pass
            made = checkpoint(_attend, block, keys, values, choice, seen, dropout, use_reentrant=False)
        else:
            made = _attend(block, keys, values, choice, seen, dropout, partial(observe, start) if observe else None)
        outputs.append(made[0])
        totals.append(made[1])
    return torch.cat(outputs, dim=2), torch.cat(totals, dim=2)


def _attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    choice: KeyChoice,
    visible: Tensor | None,
    dropout: float,
    observe: Callable[[Tensor, Tensor | None, Tensor], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """`knn_attention` of so few queries that their scores may be held at once."""
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = inner_products(query.to(_scored_in(keys, wide)), keys).to(wide)
    if visible is not None:
        scores = scores.masked_fill(~visible, -torch.inf)
    weights, total, ids = choose_and_normalise(scores, choice, visible is not None)
    if observe is not None:
        whole = cap_scores(scores, choice.softcap).logsumexp(dim=-1)
        observe(weights, ids, (total - whole).exp().nan_to_num(1.0))
    return _sum_values(F.dropout(weights, dropout), ids, values), total


def _scored_in(keys: Tensor, wide: torch.dtype) -> torch.dtype:
    """Half-precision keys on an accelerator are scored natively, with a float32 accumulator; elsewhere widened."""
    return keys.dtype if keys.device.type != "cpu" else wide


def choose_and_normalise(
    scores: Tensor, choice: KeyChoice, may_be_empty: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Weights (..., kept) of the kept keys, their log-sum-exp (...), and their ids, None if all are kept in order."""
    if choice.keeps_all(scores.shape[-1]):
        return *normalise(cap_scores(scores, choice.softcap), may_be_empty), None
    best, ids = best_keys(scores, choice)
    return *normalise(cap_scores(best, choice.softcap), may_be_empty), ids


def _sum_values(weights: Tensor, ids: Tensor | None, values: Tensor) -> Tensor:
    if ids is None:
        return weighted_sums(weights, values)
    count, source = weights.shape[-2], values.shape[-2]
    if count * ids.shape[-1] <= 2 * source:  # measured crossover: benchmarks/memory_attention.py
        return gathered_sums(weights, ids, values)
    dense = weights.new_zeros(*weights.shape[:-1], source).scatter(-1, ids, weights)
    return weighted_sums(dense, values)


def local_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float = 0.0,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Ordinary causal attention that also returns its log-sum-exp, so that it can be merged with another part.

    Args:
        query: (batch, heads, target, head_dim), scaled already.
        key, value: (batch, key_value_heads, source, head_dim); the last `target` keys are the queries' own tokens.
        mask: (batch, 1 or heads, target, source), boolean with True to see or additive; (batch, longer than source)
            with 1 for real tokens; None for causal.
        dropout: probability of dropping a weight.
        softcap: see `KeyChoice`.

    Returns:
        Output (batch, heads, target, head_dim) and log-sum-exp (batch, heads, target), float32 or wider.
    """
    batch, heads, target, head_dim = query.shape
    groups, source = key.shape[1], key.shape[2]
    wide = torch.promote_types(query.dtype, torch.float32)
    by_group = query.reshape(batch, groups, heads // groups * target, head_dim)
    scores = (by_group @ key.transpose(-1, -2)).to(wide).view(batch, heads, target, source)
    scores = cap_scores(scores, softcap)
    if mask is None or mask.ndim == 2:
        causal = torch.ones(target, source, dtype=torch.bool, device=query.device).tril(source - target)
        mask = causal if mask is None else causal & mask[:, None, None, -source:].bool()
    scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    weights, total = normalise(scores)
    weights = F.dropout(weights, dropout).to(value.dtype)
    output = weights.view(batch, groups, -1, source) @ value
    return output.view(batch, heads, target, -1).to(wide), total


def add_sink(part: tuple[Tensor, Tensor], logit: Tensor) -> tuple[Tensor, Tensor]:
    """Let a learned logit join the softmax of a part with nothing to give: the weights of the keys shrink.

    Args:
        part: output (batch, heads, target, head_dim) and log-sum-exp (batch, heads, target).
        logit: (heads,).
    """
    output, total = part
    joint = torch.logaddexp(total, logit.to(total.dtype)[None, :, None])
    return output * (total - joint).exp().unsqueeze(-1), joint


def merge_attention(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> Tensor:
    """One softmax over the union of two disjoint sets of keys, from the outputs and log-sum-exps over each.

    Args:
        first, second: output (..., head_dim) and log-sum-exp (...).

    Returns:
        (..., head_dim); zeros where neither part sees a key.
    """
    largest = torch.maximum(first[1], second[1]).clamp(min=torch.finfo(first[1].dtype).min)
    shares = [(total - largest).exp().unsqueeze(-1) for _, total in (first, second)]
    whole = (shares[0] + shares[1]).clamp(min=torch.finfo(largest.dtype).tiny)
    return (shares[0] * first[0] + shares[1] * second[0]) / whole
