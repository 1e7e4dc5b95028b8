"""A sparse-GIN adapter in a run: its words in the card."""

from __future__ import annotations

from graft.modeling.graph.sparse_gin_config import SparseGINConfig
from graft.trainer.graph_ability import PartOfTheModel, changed_settings
from graft.trainer.own_adapters import adapter_options


class GraphAdapterAbility(PartOfTheModel):
    """Graph networks beside the attention of a frozen base."""

    subject = "graph"

    def __init__(self, config: SparseGINConfig) -> None:
        known = adapter_options(SparseGINConfig)
        self.options = {name: value for name, value in config.to_dict().items() if name in known}

    def card_section(self) -> str:
        """What the adapter adds, and the options that are not the defaults."""
        settings = changed_settings(self.options, SparseGINConfig().to_dict())
        return (
            "**Graph adapter (sparse GIN).** Behind the attention of the frozen base a graph network passes messages "
            f"along edges made of that attention (arXiv 2501.02393). Settings: {settings}."
        )
