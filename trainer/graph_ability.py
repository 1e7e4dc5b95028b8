"""A graph-aware Llama in a run: its config and which of its parameters train, its plots, its words in the card."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PreTrainedConfig, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from graft.configuration.configuration_gnn import GNNConfig, LlamaGNNConfig
from graft.configuration.option_checks import with_path
from graft.modeling.graph.graph_parameters import graph_parameters, plot_graph_parameters
from graft.trainer.abilities import Read
from graft.trainer.arguments import GraphArguments
from graft.trainer.callbacks import output_folder
from graft.trainer.configuration_error import ConfigurationError
from graft.trainer.trainable_parameters import train_only

PLOT_FILE = "graph_parameters.png"


def with_graph(config: PreTrainedConfig, graph: GraphArguments) -> PreTrainedConfig:
    """A Llama's config with the block's graph layers in it.

    Raises:
        ConfigurationError: the model is no Llama, has other graph layers already, or has no room for these.
    """
    if config.model_type == LlamaGNNConfig.model_type:
        if graph.gnn_options() not in (GNNConfig().to_dict(), config.gnn_config.to_dict()):
            raise ConfigurationError(
                "The block `graph` names other graph layers than the model has: leave its options away, except for "
                "`graph.train`; the layers of a trained model stay what they are."
            )
        return config
    if config.model_type != "llama":
        raise ConfigurationError(
            f"The block `graph` makes a Llama graph-aware, but the model is a {config.model_type}."
        )
    values = {name: value for name, value in config.to_dict().items() if name not in ("model_type", "architectures")}
    try:
        return LlamaGNNConfig(**{**values, "gnn_config": graph.gnn_options()})
    except (StrictDataclassError, ValueError) as error:
        raise ConfigurationError(" ".join(with_path("graph", GraphArguments, error).split())) from error


def train_graph(model: nn.Module, graph: GraphArguments) -> None:
    """Let only the parameters that `graph.train` names train.

    Raises:
        ConfigurationError: a pattern matches nothing.
    """
    if graph.train is None:
        return
    try:
        train_only(model, graph.train)
    except ValueError as error:
        raise ConfigurationError(f"`graph.train`: {error}") from error


class PartOfTheModel:
    """An ability with which nothing is to be attached: batches are read plainly, and the model saves it."""

    columns: tuple[str, ...] = ()

    def training_kwargs(self, state: TrainerState) -> dict[str, Any]:
        """Nothing."""
        return {}

    def evaluating(self, model: nn.Module, view: str | None) -> AbstractContextManager[Read | None]:
        """Plainly."""
        return nullcontext()

    def save(self, folder: Path) -> None:
        """Nothing: options are in the config of the model or of its adapter."""


class GraphAbility(PartOfTheModel):
    """Graph layers."""

    subject = "graph"

    def __init__(self, graph: GraphArguments, config: PreTrainedConfig) -> None:
        self.graph, self.options = graph, config.gnn_config.to_dict()

    def card_section(self) -> str:
        """What graph layers do, and the options that are not the defaults."""
        settings = changed_settings(self.options, GNNConfig().to_dict())
        trained = "all parameters" if self.graph.train is None else f"those matching `{self.graph.train}`"
        return (
            "**Graphs.** Attention makes a weighted graph of the tokens, along which messages run from earlier to "
            f"later ones (arXiv 2501.02393). Settings: {settings}. Trained: {trained}."
        )


def changed_settings(options: dict[str, Any], defaults: dict[str, Any]) -> str:
    """The options that differ from the defaults, for a card."""
    return ", ".join(f"`{name}={value!r}`" for name, value in _changed(options, defaults).items()) or "the defaults"


def _changed(options: dict[str, Any], defaults: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted name -> value of the options that differ from the defaults."""
    changed: dict[str, Any] = {}
    for name, value in options.items():
        default = defaults.get(name)
        if isinstance(value, dict) and isinstance(default, dict):
            changed |= _changed(value, default, f"{prefix}{name}.")
        elif value != default:
            changed[prefix + name] = value
    return changed


class GraphPlots(TrainerCallback):
    """`graph_parameters.png`: epsilon, sharpening, lambda and the like over the layers, redrawn at evaluations."""

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Redraw the picture."""
        if state.is_world_process_zero and (rows := graph_parameters(kwargs["model"])):
            plot_graph_parameters(rows, output_folder(args) / PLOT_FILE, f"Graph parameters, step {state.global_step}")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Redraw the picture."""
        self.on_evaluate(args, state, control, **kwargs)
