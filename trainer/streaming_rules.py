"""What a stream of training rows cannot do, refused by name before anything is read."""

from __future__ import annotations

from graft.trainer.arguments import RunConfiguration
from graft.trainer.configuration_error import ConfigurationError


def check_streaming(configuration: RunConfiguration) -> None:
    """Refuse what needs a number of rows, all rows at once, or an end of them.

    Raises:
        ConfigurationError: `data.streaming` and the option that it does not go with, or what it needs.
    """
    data, training = configuration.data, configuration.training
    strategy = training.get("train_sampling_strategy", "random")
    if data.shuffle_buffer is not None and (not data.streaming or strategy != "random"):
        raise ConfigurationError(
            "`data.shuffle_buffer` would do nothing: it is for `data.streaming` with `training."
            f"train_sampling_strategy` 'random', got {data.streaming} and {strategy!r}."
        )
    if not data.streaming:
        return
    if data.dataset is None and not data.train:
        raise ConfigurationError("`data.streaming` would do nothing: it is for training rows; name `data.train`.")
    if int(training.get("max_steps", -1)) <= 0:
        raise ConfigurationError(
            "`data.streaming` needs `training.max_steps`: a stream does not say how many rows it has, so no number of "
            f"epochs ends the run; got {training.get('max_steps', -1)}."
        )
    if strategy not in ("random", "sequential"):
        raise ConfigurationError(
            f"`data.streaming` does not go with `training.train_sampling_strategy` {strategy!r}, which needs the "
            "lengths of all rows; it may be 'random' (from a buffer of `data.shuffle_buffer` rows) or 'sequential'."
        )
    ends = ("eval_strategy", "save_strategy", "logging_strategy")
    if at_end := [name for name in ends if str(training.get(name)) == "epoch"]:
        raise ConfigurationError(
            f"`data.streaming` does not go with `training.{at_end[0]}` 'epoch': a stream has none; use 'steps'."
        )
    accelerator = training.get("accelerator_config")
    if isinstance(accelerator, str):
        raise ConfigurationError(
            "`data.streaming` needs the fields of `training.accelerator_config` themselves, got the file "
            f"{accelerator!r}."
        )
    if accelerator is not None and accelerator.get("dispatch_batches"):
        raise ConfigurationError(
            "`data.streaming` does not go with `training.accelerator_config.dispatch_batches` true, which needs "
            "batches of one length; each process reads the stream and takes its own."
        )
    graph = configuration.graph
    needs_all = {
        "`graph.knowledge_graph`, which is made of all documents": graph is not None
        and graph.knowledge_graph is not None,
        "`data.max_train_samples` with a `data.sample_seed`: without it, the first rows are taken": data.sample_seed
        is not None
        and data.max_train_samples is not None,
        "`data.capture_raw_text`: the texts are written before the run begins": data.capture_raw_text,
        "`data.train_view` 'oracle_and_truncated': the second half would begin where the stream ends": data.train_view
        == "oracle_and_truncated",
        "`data.on_too_long` 'error', which reads all rows first; it may be 'truncate' or 'skip'": data.on_too_long
        == "error",
    }
    if excluded := [reason for reason, holds in needs_all.items() if holds]:
        raise ConfigurationError(f"`data.streaming` does not go with {excluded[0]}.")
