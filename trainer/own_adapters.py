"""PEFT methods of our own in a run: the options of the block `adapter` as a config, a base with the new weights."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from peft import PeftConfig, get_peft_model
from torch import nn

from graft.modeling.graph.sparse_gin_config import SparseGINConfig
from graft.modeling.retro.retrofit_config import RetroFitConfig
from graft.trainer.arguments import AdapterArguments, ModelArguments
from graft.trainer.configuration_error import ConfigurationError

_CONFIGS: dict[str, Any] = {"sparse_gin": SparseGINConfig, "retrofit": RetroFitConfig}


def adapter_options(config_class: Any) -> set[str]:
    """Names of what a method's config adds to any PEFT config."""
    return {each.name for each in fields(config_class)} - {each.name for each in fields(PeftConfig)}


def own_adapter_config(adapter: AdapterArguments) -> Any:
    """The options of the block `adapter` as a PEFT config for a causal model.

    Raises:
        ConfigurationError: an option that the method's config does not have, or a value that it refuses.
    """
    config_class = _CONFIGS[adapter.type]
    known = adapter_options(config_class)
    if unknown := sorted(set(adapter.options) - known):
        allowed = ", ".join(sorted(known))
        raise ConfigurationError(f"`adapter.options` has no {unknown[0]!r}; {adapter.type!r} takes {allowed}.")
    try:
        return config_class(task_type="CAUSAL_LM", **adapter.options)
    except (StrictDataclassError, ValueError, TypeError) as error:
        raise ConfigurationError(f"`adapter.options`: {' '.join(str(error.__cause__ or error).split())}") from error


def with_own_adapter(model: Any, adapter: AdapterArguments, arguments: ModelArguments) -> nn.Module:
    """`model` with the new weights that `adapter` names; only these are trained.

    Raises:
        ConfigurationError: the options are wrong, or the model has no place for such weights.
    """
    config = own_adapter_config(adapter)
    try:
        adapted: nn.Module = get_peft_model(model, config)
    except (StrictDataclassError, ValueError, TypeError) as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise ConfigurationError(f"`adapter.type` {adapter.type!r}: {reason}") from error
    config.base_model_name_or_path = adapter.base_model or arguments.name
    config.revision = arguments.revision
    return adapted
