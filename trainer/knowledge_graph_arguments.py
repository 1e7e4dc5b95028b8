"""The options of `graph.knowledge_graph`: where the graphs between chunks come from, and what of them is read."""

# No `from __future__ import annotations` here: it would silently switch the strict type checks off.
from dataclasses import dataclass
from math import isfinite

from huggingface_hub.dataclasses import strict

from graft.configuration.option_checks import check_count

_NOT_SO = (("capitalised", True), ("gazetteer", False))  # one takes no argument, the other needs one


@strict
@dataclass
class KnowledgeGraphArguments:
    """Graphs between the chunks of each document, which the model reads beside its own edges.

    Args:
        folder: what graft-knowledge-graph wrote about the documents of all splits, or {"train": folder, ...}. None:
            the run makes a graph of each split from chunks of its documents, in `output_dir`/knowledge_graph.
        extractor: without a folder, what finds entities: "keyphrase", "keyphrase:LANGUAGE", "capitalised" or
            "gazetteer:FILE".
        chunk_size: without a folder, tokens of a chunk.
        chunk_neighbours: earlier chunks that a chunk reads, those that share most with the one before it.
        own: what a chunk reads of its own past.
        causal: what a chunk reads follows from earlier chunks alone. Otherwise from all of the document, also from
            what is to be predicted: for experiments.
    """

    folder: str | dict[str, str] | None = None
    extractor: str = "keyphrase"
    chunk_size: int = 128
    chunk_neighbours: int = 4
    own: float | int = 1.0
    causal: bool = True

    def validate_ranges(self) -> None:
        """Refuse numbers outside their range; the message names the field, its value and what is allowed."""
        check_count(self, "chunk_size", "chunk_neighbours")
        if not (isfinite(self.own) and self.own >= 0):
            raise ValueError(f"`own` must be finite and at least 0, got {self.own}.")

    def validate_origin(self) -> None:
        """Refuse what would not act with a folder, and extractors that load models."""
        if isinstance(self.folder, dict) and (unknown := sorted(set(self.folder) - {"train", "validation", "test"})):
            raise ValueError(f"`folder` maps train, validation and test to folders, got {unknown}.")
        if self.folder is not None and (self.extractor, self.chunk_size) != ("keyphrase", 128):
            raise ValueError(
                f"`extractor` and `chunk_size` would do nothing: the chunks and entities are those of `folder` "
                f"{self.folder!r}."
            )
        kind, _, argument = self.extractor.partition(":")
        if kind not in ("keyphrase", "capitalised", "gazetteer") or (kind, bool(argument)) in _NOT_SO:
            raise ValueError(
                f"`extractor` must be 'keyphrase', 'keyphrase:LANGUAGE', 'capitalised' or 'gazetteer:FILE', got "
                f"{self.extractor!r}; with another one, make the graph with graft-knowledge-graph, name its `folder`."
            )
