"""A sparse-GIN adapter in a run: a graph network beside the attention of a frozen decoder, its words in the card."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from peft import PeftConfig, get_peft_model
from torch import nn

from graft.modeling.graph.sparse_gin_config import SparseGINConfig
from graft.trainer.arguments import AdapterArguments, ModelArguments
from graft.trainer.configuration_error import ConfigurationError
from graft.trainer.graph_ability import PartOfTheModel, changed_settings

OPTIONS = {each.name for each in fields(SparseGINConfig)} - {each.name for each in fields(PeftConfig)}
"""Names of what SparseGINConfig adds to any PEFT config."""


def graph_adapter_config(adapter: AdapterArguments) -> SparseGINConfig:
    """The options of the block `adapter` as a PEFT config for a causal model.

    Raises:
        ConfigurationError: an option that SparseGINConfig does not have, or a value that it refuses.
    """
    if unknown := sorted(set(adapter.options) - OPTIONS):
        allowed = ", ".join(sorted(OPTIONS))
        raise ConfigurationError(f"`adapter.options` has no {unknown[0]!r}; 'sparse_gin' takes {allowed}.")
    try:
        return SparseGINConfig(task_type="CAUSAL_LM", **adapter.options)
    except (StrictDataclassError, ValueError, TypeError) as error:
        raise ConfigurationError(f"`adapter.options`: {' '.join(str(error.__cause__ or error).split())}") from error


def with_graph_adapter(model: Any, adapter: AdapterArguments, arguments: ModelArguments) -> nn.Module:
    """`model` with a graph network in its decoder layers; only these networks are trained.

    Raises:
        ConfigurationError: the options are wrong, or the model's layers have no place for a network.
    """
    config = graph_adapter_config(adapter)
    try:
        adapted: nn.Module = get_peft_model(model, config)
    except (ValueError, TypeError) as error:
        raise ConfigurationError(f"`adapter.type` 'sparse_gin': {' '.join(str(error).split())}") from error
    config.base_model_name_or_path = adapter.base_model or arguments.name
    config.revision = arguments.revision
    return adapted


class GraphAdapterAbility(PartOfTheModel):
    """Graph networks beside the attention of a frozen base."""

    subject = "graph"

    def __init__(self, config: SparseGINConfig) -> None:
        self.options = {name: value for name, value in config.to_dict().items() if name in OPTIONS}

    def card_section(self) -> str:
        """What the adapter adds, and the options that are not the defaults."""
        settings = changed_settings(self.options, SparseGINConfig().to_dict())
        return (
            "**Graph adapter (sparse GIN).** Behind the attention of the frozen base a graph network passes messages "
            f"along edges made of that attention (arXiv 2501.02393). Settings: {settings}."
        )
