"""What a query cost model reads, and how large it is.

Hilprecht and Binnig 2022, "Zero-Shot Cost Models for Out-of-the-box Learned Cost Prediction", arXiv 2201.00561.
"""

# No `from __future__ import annotations` here: it would silently switch the strict type checks off.
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

PLAN_OPERATORS = (
    *("scan", "index_scan", "other_scan", "hash_join", "merge_join", "loop_join", "hash_build"),
    *("hash_aggregate", "perfect_aggregate", "sorted_aggregate", "plain_aggregate", "projection", "filter"),
    *("sort", "top_n", "limit", "union", "window", "materialise", "other"),
)
JOIN_TYPES = ("inner", "outer", "semi", "anti", "other_join")
COLUMN_KINDS = ("integer", "float", "text", "date", "boolean", "other_type")
COMPARISONS = ("equal", "unequal", "range", "like", "in_list", "null_test", "and", "or", "not", "call")

# Each kind of node and the names of its features, in order. Counts and cardinalities stand as log10(1 + count).
NODE_FEATURES: dict[str, tuple[str, ...]] = {
    "operator": (
        *PLAN_OPERATORS,
        *JOIN_TYPES,
        *("rows", "children_rows", "largest_child_rows", "smallest_child_rows", "row_bytes"),
        *("outputs", "groups", "aggregates", "sort_keys", "predicates", "children"),
        *("key_values", "computations"),
    ),
    "table": ("known", "rows", "columns"),
    "column": (*COLUMN_KINDS, "distinct", "null_share"),
    "predicate": (*COMPARISONS, "text_literals", "number_literals"),
}
NODE_TYPES = tuple(NODE_FEATURES)
# How a node is read by its parent: the first input of an operator, its other inputs, what describes it.
EDGE_SLOTS = ("first_input", "other_input", "description")


@strict
class QueryGraphConfig(PreTrainedConfig):
    """Sizes of a QueryGraphForCostEstimation.

    Args:
        feature_sizes: features of each kind of node (operator, table, column, predicate); None is what
            `QueryPlanGraph` gives. Saved with the model, so that a graph of another kind is refused.
        hidden_size: width of nodes and of every network.
        dropout: inside the networks.
        initializer_range: standard deviation of new weights; None is 1 / sqrt(inputs) of each matrix.
    """

    model_type = "graft_query_graph"

    feature_sizes: list[int] | tuple[int, ...] | None = None
    hidden_size: int = 64
    dropout: float | int = 0.0
    initializer_range: float | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.feature_sizes is None:
            self.feature_sizes = [len(names) for names in NODE_FEATURES.values()]
        self.feature_sizes = list(self.feature_sizes)
        super().__post_init__(**kwargs)

    def validate_query_graph(self) -> None:
        """Refuse sizes that make no model; the message names the field, its value and what is allowed."""
        sizes = list(self.feature_sizes or ())
        if len(sizes) != len(NODE_TYPES) or any(size < 1 for size in sizes):
            raise ValueError(f"`feature_sizes` must be a size above 0 for each of {NODE_TYPES}, got {sizes}.")
        if self.hidden_size < 1:
            raise ValueError(f"`hidden_size` must be at least 1, got {self.hidden_size}.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"`dropout` must lie in [0, 1), got {self.dropout}.")
        if self.initializer_range is not None and self.initializer_range <= 0:
            raise ValueError(f"`initializer_range` must be above 0 or None, got {self.initializer_range}.")
