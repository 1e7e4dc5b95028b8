"""Graphs that come with the rows of a run: given to the model in training, in evaluation and when it generates."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerState

from graft.modeling.graph.external_edges import ChunkGraph
from graft.trainer.abilities import Batch, Part, Read
from graft.trainer.graph_ability import PartOfTheModel
from graft.trainer.knowledge_graph_data import KnowledgeGraphs


class KnowledgeGraphAbility(PartOfTheModel):
    """Chunks of a row read earlier chunks of it; for models whose forward takes a `graph`."""

    columns: tuple[str, ...] = ("chunk_ids", "chunk_weights")
    subject = "graph"

    def __init__(self, graphs: KnowledgeGraphs) -> None:
        self.graphs = graphs

    def training_inputs(
        self, model: nn.Module, batch: Batch, state: TrainerState
    ) -> AbstractContextManager[dict[str, Any]]:
        """The batch with its graph as the model takes it."""
        return nullcontext(with_graph_of(batch))

    @contextmanager
    def evaluating(self, model: nn.Module, view: str | None) -> Iterator[Read | None]:
        """How batches with graphs are read; those of the view "without_graph" have none, and are read plainly."""
        yield None if view == "without_graph" else lambda batch: [_part(model, batch)]

    def card_section(self) -> str:
        """Where the graphs come from, what is read of them, and how to read the three losses."""
        options = self.graphs.options
        origin = (
            f"from chunks of {options.chunk_size} tokens, by the extractor `{options.extractor}`"
            if options.folder is None
            else f"by graft-knowledge-graph, `{options.folder}`"
        )
        known = "earlier chunks alone" if options.causal else "the whole document, also what is to be predicted"
        counts = "; ".join(
            f"{name}: {int(found['chunks'])} chunks of {int(found['documents'])} documents, "
            f"{100 * found['coverage']:.0f} % of those with earlier ones read one"
            for name, found in self.graphs.report.items()
        )
        return (
            "**Knowledge graph.** Each chunk of a document reads up to "
            f"{options.chunk_neighbours} earlier ones, whose entities are most like those of the chunk before it "
            f"(`own={options.own}` of its own past). The graphs were made {origin}; what a chunk reads follows from "
            f"{known}. {counts}. `context` is evaluated with the graph, `shuffled_graph` with as many edges to "
            "other chunks, `without_graph` with none: the graph is of use if the first loss is the lowest."
        )


def with_graph_of(batch: Mapping[str, Any]) -> dict[str, Any]:
    """`batch` with `graph` in the place of its chunk_ids and chunk_weights, if it has them."""
    kept = dict(batch)
    ids, weights = kept.pop("chunk_ids", None), kept.pop("chunk_weights", None)
    return kept if ids is None else kept | {"graph": ChunkGraph(ids, weights)}


def _part(model: Any, batch: Batch) -> Part:
    rows = torch.arange(len(batch["input_ids"]), device=batch["input_ids"].device)
    mask: Tensor = batch["attention_mask"]
    inputs = {"input_ids": batch["input_ids"], "attention_mask": mask, "use_cache": False}
    inputs["position_ids"] = (mask.cumsum(dim=1) - 1).clamp(min=0)  # left padding must not count
    prompts = {"input_ids": batch["input_ids"], "attention_mask": mask}
    if "prompt_ids" in batch:
        prompts = {"input_ids": batch["prompt_ids"], "attention_mask": batch["prompt_mask"]}
    if "chunk_ids" in batch:
        inputs["graph"] = ChunkGraph(batch["chunk_ids"], batch["chunk_weights"])
        if "prompt_chunk_ids" in batch:  # the graph of a generation lies in its cache
            prompts |= ChunkGraph(batch["prompt_chunk_ids"], batch["chunk_weights"]).inputs(model)
    return Part(rows, inputs, prompts, batch.get("labels"))
