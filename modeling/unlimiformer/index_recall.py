"""A memory gets the index that its options ask for, and what it finds is measured on the memory's own documents."""

import logging
from dataclasses import replace

import torch
from transformers import PreTrainedModel

from ..attachment import device_of
from .key_index import wanted_recall
from .memory import Memory
from .report import AttentionReport

logger = logging.getLogger(__name__)


def indexed(model: PreTrainedModel, memory: Memory, progress: bool = False) -> Memory:
    """`memory.indexed()` with its recall, its search widened until that is what the options want.

    A search that reads all of its index and still misses too much is kept, with a warning. Where search is exact, the
    same memory.

    Args:
        model: whose attention is served, which made the memory.
        memory: of any model.
        progress: show a bar.
    """
    made = memory.indexed(progress)
    if not made.indexes:
        return made
    recall, wanted = index_recall(model, made), wanted_recall(made.config)
    while recall is not None and recall < wanted and any([index.widen() for index in made.indexes.values()]):
        recall = index_recall(model, made)
    if recall is not None and recall < wanted:
        logger.warning(
            "the index %r finds %.3f of the best keys, not the %.3f wanted, all of it searched: give another "
            "kind, or a larger `index_refine`.",
            made.config.index,
            recall,
            wanted,
        )
    return replace(made, recall=recall)


@torch.no_grad()
def index_recall(model: PreTrainedModel, memory: Memory, probes: int = 4, tokens: int = 16) -> float | None:
    """The share of the exact best keys that a memory's indexes find, mean over layers, heads, queries and documents.

    Stretches of each document are asked behind its memory, or given to an encoder-decoder as what was decoded so far:
    their queries are searched both ways. Costs `probes` forwards of `tokens` tokens, in which all keys are scored.

    Args:
        model: whose attention is served, which made the memory.
        memory: with indexes.
        probes: stretches of each document, at even distances.
        tokens: of each stretch, as far as documents and the model's positions reach.

    Returns:
        None where the model has no position left behind the memory.
    """
    rows = sorted(memory.documents.index(document) for document in set(memory.documents))
    alone = memory.select(rows)
    lengths = alone.lengths[list(alone.documents)]
    room = alone.room()
    count = min(tokens, int(lengths.min()), tokens if room is None else room)
    if count < 1:
        return None
    report, places = AttentionReport(), torch.arange(count)
    ids = alone.input_ids[list(alone.documents)].to(device_of(model))
    known = model.get_output_embeddings().weight.shape[0]
    for probe in range(probes):
        starts = ((probe + 0.5) * (lengths - count) / probes).long()
        asked = ids.gather(1, (starts[:, None] + places).to(ids.device)) % known  # FSMT decodes another vocabulary
        model(**alone.inputs(asked, record=report))
    return report.recall
