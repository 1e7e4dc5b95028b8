"""What `graph.knowledge_graph` demands of the other options: named documents, rows of several chunks, a reader."""

from __future__ import annotations

from graft.configuration.configuration_gnn import GNNConfig
from graft.trainer.arguments import GraphArguments, RunConfiguration, View
from graft.trainer.configuration_error import ConfigurationError

GRAPH_VIEWS: tuple[View, ...] = ("context", "shuffled_graph", "without_graph")
"""Evaluation with the graph of each document, with its edges dealt to other chunks, and with none."""


def check_knowledge_graph(configuration: RunConfiguration) -> None:
    """Refuse what contradicts a knowledge graph, and its views without one.

    Raises:
        ConfigurationError: the first contradiction, with both options and the way out.
    """
    if configuration.knowledge_graph is None or configuration.graph is None:
        if own := [view for view in configuration.data.eval_views or [] if view in GRAPH_VIEWS[1:]]:
            raise ConfigurationError(
                f"`data.eval_views` holds {own[0]!r}, which compares with a knowledge graph, but there is none: add "
                "`graph.knowledge_graph` (`{}` takes the defaults), or use 'truncated' or 'context'."
            )
        return
    _check_reader(configuration, configuration.graph)
    _check_rows(configuration)


def _check_reader(configuration: RunConfiguration, graph: GraphArguments) -> None:
    adapter = configuration.adapter
    if adapter is None:
        return
    if adapter.type != "sparse_gin":
        raise ConfigurationError(
            f"`adapter.type` {adapter.type!r} reads no `graph.knowledge_graph`: 'sparse_gin' does, and graph layers "
            "with `graph.sparse`, without a block `adapter`."
        )
    if graph.train is not None or graph.gnn_options() != GNNConfig().to_dict():
        raise ConfigurationError(
            "`adapter.type` 'sparse_gin' keeps the layers of its base: beside it the block `graph` holds "
            "`knowledge_graph` alone; options of the network are in `adapter.options`."
        )


def _check_rows(configuration: RunConfiguration) -> None:
    data = configuration.data
    if data.id_column is None:
        raise ConfigurationError(
            "`graph.knowledge_graph` finds a row's document by its name, but `data.id_column` is null: name a column."
        )
    if data.messages_column is not None:
        raise ConfigurationError(
            f"`graph.knowledge_graph` is of texts, but `data.messages_column` {data.messages_column!r} holds chats: "
            "use `data.source_column`."
        )
    if data.train_view != "truncated":
        raise ConfigurationError(
            f"`data.train_view` {data.train_view!r} does not go with `graph.knowledge_graph`: chunks of a document "
            "read each other within one row, as it stands in its text. Use 'truncated'."
        )
    if "chunked" in (data.eval_views or []):
        raise ConfigurationError(
            "`data.eval_views` holds 'chunked', whose rows are single chunks, which have nothing to read in "
            "`graph.knowledge_graph`: use 'context' or 'truncated'."
        )
