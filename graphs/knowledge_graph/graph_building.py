"""From placed mentions to a networkx graph: nodes are entities, edges say what stands together and where."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from graft.graphs.knowledge_graph.entity_names import LEAST_RATIO, EntityMerger, Merge
from graft.graphs.knowledge_graph.entity_relations import EntitySentence, Relation, co_occurrences
from graft.graphs.knowledge_graph.mentions import PlacedMention
from graft.graphs.knowledge_graph.verb_relations import VerbLink, VerbRelation, verb_relations

if TYPE_CHECKING:
    import networkx


@dataclass(frozen=True)
class GraphSettings:
    """Which edges and nodes are kept.

    Args:
        window: sentences within which entities stand together; 1 is one sentence.
        min_weight: least count of an edge.
        min_npmi: least normalised mutual information of an edge.
        min_verb_weight: least count of an edge that a verb names; a sentence says it once, so 1 is enough by default.
        max_nodes: the nodes of highest PageRank that are kept; None is all.
        least_ratio: similarity from which names merge, 0 to 100.
        aliases: surface -> name, over all other rules.
    """

    window: int = 1
    min_weight: int = 2
    min_npmi: float = 0.0
    min_verb_weight: int = 1
    max_nodes: int | None = None
    least_ratio: float = LEAST_RATIO
    aliases: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, least in (("window", 1), ("min_weight", 1), ("min_verb_weight", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"`{name}` must be at least {least}, got {getattr(self, name)}.")
        if not -1 <= self.min_npmi <= 1:
            raise ValueError(f"`min_npmi` must be within -1 and 1, got {self.min_npmi}.")
        if self.max_nodes is not None and self.max_nodes < 1:
            raise ValueError(f"`max_nodes` must be at least 1 or None, got {self.max_nodes}.")


@dataclass(frozen=True)
class KnowledgeGraph:
    """A graph with what it was made from.

    Args:
        graph: MultiDiGraph; node: name, label, count, aliases {surface: count}, chunks; edge: relation, weight,
            chunks, example (document, chunk, start, end of a sentence). The edges "co_occurs" have nearness and npmi
            and no direction; those named by a verb lead from who acts, and have its span in the example's chunk, verb.
        mentions: all mentions, in order.
        entities: of each mention, its node.
        merges: which names became one, and by which rule.
    """

    graph: networkx.MultiDiGraph
    mentions: Sequence[PlacedMention]
    entities: Sequence[int]
    merges: Sequence[Merge]


def build_graph(
    mentions: Iterable[PlacedMention], settings: GraphSettings | None = None, links: Iterable[VerbLink] = ()
) -> KnowledgeGraph:
    """Merge names, relate entities, drop weak edges. The same mentions give the same graph in the same order.

    Args:
        mentions: of all texts.
        settings: which edges and nodes are kept.
        links: verbs between these mentions, see `verb_links`.
    """
    import networkx

    settings = settings or GraphSettings()
    mentions = list(mentions)
    merger = EntityMerger(settings.aliases, settings.least_ratio)
    entities = [merger.entity(mention.surface, mention.document) for mention in mentions]
    relations = [
        relation
        for relation in co_occurrences(_sentences(mentions, entities), settings.window)
        if relation.weight >= settings.min_weight and relation.npmi >= settings.min_npmi
    ]
    graph = networkx.MultiDiGraph()
    _add_nodes(graph, mentions, entities, merger)
    for relation in relations:
        graph.add_edge(relation.source, relation.target, key="co_occurs", **_attributes(relation))
    for verb in verb_relations(links, mentions, entities):
        if verb.weight >= settings.min_verb_weight:
            graph.add_edge(verb.source, verb.target, key=verb.relation, **_verb_attributes(verb))
    if settings.max_nodes is not None and len(graph) > settings.max_nodes:
        kept = set(top_nodes(graph, settings.max_nodes))
        graph.remove_nodes_from([node for node in list(graph) if node not in kept])
    return KnowledgeGraph(graph, mentions, entities, merger.merges)


def _sentences(mentions: Sequence[PlacedMention], entities: Sequence[int]) -> list[EntitySentence]:
    members: dict[tuple[str, int, int], list[int]] = defaultdict(list)
    spans: dict[tuple[str, int, int], tuple[int, int]] = {}
    for mention, entity in zip(mentions, entities, strict=True):
        place = (mention.document, mention.chunk, mention.sentence)
        members[place].append(entity)
        start, end = spans.get(place, (mention.sentence_start, mention.sentence_end))
        spans[place] = (start, max(end, mention.sentence_end))
    return [EntitySentence(*place, *spans[place], frozenset(found)) for place, found in members.items()]


def _add_nodes(
    graph: networkx.MultiDiGraph, mentions: Sequence[PlacedMention], entities: Sequence[int], merger: EntityMerger
) -> None:
    counts = Counter(entities)
    labels: dict[int, Counter[str]] = defaultdict(Counter)
    chunks: dict[int, dict[tuple[str, int], None]] = defaultdict(dict)  # a dict keeps the order
    for mention, entity in zip(mentions, entities, strict=True):
        labels[entity][mention.label] += 1
        chunks[entity][mention.document, mention.chunk] = None
    for entity in sorted(counts):
        label = min(labels[entity].items(), key=lambda item: (-item[1], item[0]))[0]
        graph.add_node(
            entity,
            name=merger.name(entity),
            label=label,
            count=counts[entity],
            aliases=merger.surfaces(entity),
            chunks=[list(place) for place in chunks[entity]],
        )


def _attributes(relation: Relation) -> dict[str, object]:
    return {
        "relation": "co_occurs",
        "weight": relation.weight,
        "nearness": round(relation.nearness, 9),
        "npmi": round(relation.npmi, 9),
        "chunks": [list(place) for place in relation.chunks],
        "example": list(relation.example),
    }


def _verb_attributes(relation: VerbRelation) -> dict[str, object]:
    return {
        "relation": relation.relation,
        "weight": relation.weight,
        "chunks": [list(place) for place in relation.chunks],
        "example": list(relation.example),
        "verb": list(relation.verb),
    }


def page_rank(graph: networkx.MultiDiGraph, damping: float = 0.85, steps: int = 60) -> dict[int, float]:
    """PageRank over edges of both directions by weight (Brin and Page, 1998), by power iteration; it sums to 1."""
    nodes = list(graph)
    position = {node: index for index, node in enumerate(nodes)}
    ends = [(position[s], position[t], data["weight"]) for s, t, data in graph.edges(data=True)]
    source, target = (np.array([end[side] for end in ends], dtype=np.intp) for side in (0, 1))
    weight = np.array([end[2] for end in ends], dtype=np.float64)
    strength = np.bincount(source, weight, len(nodes)) + np.bincount(target, weight, len(nodes))
    rank = np.full(len(nodes), 1 / max(len(nodes), 1))
    share: NDArray[np.float64] = np.divide(1.0, strength, out=np.zeros(len(nodes)), where=strength > 0)
    for _ in range(steps):
        given = rank * share
        moved = np.bincount(target, weight * given[source], len(nodes))
        moved += np.bincount(source, weight * given[target], len(nodes))
        lost = rank[strength == 0].sum()
        rank = (1 - damping + damping * lost) / max(len(nodes), 1) + damping * moved
    return dict(zip(nodes, rank.tolist(), strict=True))


def top_nodes(graph: networkx.MultiDiGraph, count: int) -> list[int]:
    """The `count` nodes of highest PageRank, highest first, of equal ones the older."""
    ranks = page_rank(graph)
    return sorted(ranks, key=lambda node: (-round(ranks[node], 12), node))[:count]
