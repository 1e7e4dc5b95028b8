"""Attention to the best keys that an index offers: candidates found without reading every key, then scored exactly.

What an index misses is not attended to. Everything else is as in exact search: the scores, the choice among the
candidates, the softmax over those kept, and the sum of their values.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ...retrieval.exact_search import gathered_sums, inner_products, largest
from .knn_attention import SCORES_BYTES, KeyChoice, Observer, cap_scores, choose_and_normalise

Search = Callable[[Tensor, int], Tensor]
"""`search(queries, count)`: ids (documents, heads, queries, count) of keys for queries (documents, heads, queries,
dim), -1 where fewer were found."""


def indexed_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    choice: KeyChoice,
    offered: tuple[Search, int],
    visible: Tensor | None = None,
    dropout: float = 0.0,
    observe: Observer | None = None,
) -> tuple[Tensor, Tensor]:
    """softmax(q K_I^T) V_I, with I the `keys_per_query` largest q . k_j among the keys that an index offers.

    An index that offers all keys gives `knn_attention`. The choice has no gradient; queries, keys and values have.

    Args:
        query: (documents, heads, count, dim), scaled already.
        keys, values: (documents, heads, source, dim), possibly in half precision; the same tensor may serve as both.
        choice: which keys are kept; sinks need not be offered.
        offered: the search of an index, and how many keys it offers to each query.
        visible: (documents, 1 or heads, 1 or count, source), False where a key must not be seen; None if all may.
        dropout: probability of dropping a weight.
        observe: shown what was kept and what share of the exact best keys it holds, for which all keys are scored.

    Returns:
        As `knn_attention`.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    (documents, heads, count, dim), source = query.shape, keys.shape[-2]
    per_query = max((offered[1] + choice.sinks) * dim, source if observe else 0)
    rows = max(1, SCORES_BYTES // (documents * heads * per_query * wide.itemsize))
    outputs, totals = [], []
    for start in range(0, count, rows):
        block = query[..., start : start + rows, :].to(wide)
        seen = visible
        if visible is not None:
            seen = visible if visible.shape[2] == 1 else visible[:, :, start : start + rows]
            seen = seen.expand(documents, heads, block.shape[2], source)
        ids = _candidates(offered, block, choice.sinks)
        weights, total, ids = _choose(block, keys, ids, choice, seen)
        if observe is not None:
            mass, recall = _compare(block, keys, choice, seen, total, ids)
            observe(start, weights, ids.clamp(min=0), mass, recall)
        outputs.append(gathered_sums(F.dropout(weights, dropout), ids.clamp(min=0), values))
        totals.append(total)
    return torch.cat(outputs, dim=2), torch.cat(totals, dim=2)


def _candidates(offered: tuple[Search, int], query: Tensor, sinks: int) -> Tensor:
    """Ids (documents, heads, count, sinks + offered): the sinks first, each key once, -1 for none."""
    search, count = offered
    found = search(query.detach(), count)
    if not sinks:
        return found
    always = torch.arange(sinks, device=found.device).expand(*found.shape[:-1], -1)
    return torch.cat([always, found.masked_fill(found < sinks, -1)], dim=-1)


def _choose(
    query: Tensor, keys: Tensor, ids: Tensor, choice: KeyChoice, visible: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights (..., kept) of the best candidates, their log-sum-exp (...), and their ids, -1 for none."""
    found = ids.clamp(min=0)
    seen = ids >= 0
    if visible is not None:
        seen = seen & visible.gather(-1, found)
    scores = (_gathered(keys, found).to(query.dtype) @ query.unsqueeze(-1)).squeeze(-1)
    scores = scores.masked_fill(~seen, -torch.inf)
    ids = ids.masked_fill(~seen, -1)
    weights, total, places = choose_and_normalise(scores, choice, may_be_empty=True)
    return weights, total, ids if places is None else ids.gather(-1, places)


def _gathered(vectors: Tensor, ids: Tensor) -> Tensor:
    """`vectors` (documents, heads, source, dim) at `ids` (documents, heads, count, kept), copied: (..., kept, dim)."""
    documents, heads, source, dim = vectors.shape
    starts = torch.arange(documents * heads, device=ids.device).view(documents, heads, 1, 1) * source
    return vectors.reshape(-1, dim)[ids + starts]


def _compare(
    query: Tensor, keys: Tensor, choice: KeyChoice, visible: Tensor | None, total: Tensor, ids: Tensor
) -> tuple[Tensor, Tensor]:
    """Against exact search: the share of the softmax over all keys that is kept, and that of the exact best keys."""
    scores = inner_products(query, keys.to(query.dtype))
    if visible is not None:
        scores = scores.masked_fill(~visible, -torch.inf)
    mass = (total - cap_scores(scores, choice.softcap).logsumexp(dim=-1)).exp().nan_to_num(1.0)
    return mass, _recall(scores, choice, ids)


def _recall(scores: Tensor, choice: KeyChoice, ids: Tensor) -> Tensor:
    """The share of the exact best keys that is kept (...); of keys that tie for the last place any will do."""
    ranking = scores.clone()
    sinks = ranking[..., : choice.sinks]
    sinks.masked_fill_(sinks > -torch.inf, torch.inf)
    wanted = (scores > -torch.inf).sum(-1).clamp(max=choice.keys_per_query)
    least = largest(ranking.detach(), choice.keys_per_query or 1)[0].amin(-1, keepdim=True)
    hits = (ids >= 0) & (ranking.gather(-1, ids.clamp(min=0)) >= least)
    return (hits.sum(-1) / wanted).nan_to_num(1.0)
