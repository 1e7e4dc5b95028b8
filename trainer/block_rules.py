"""What the blocks of a configuration demand of each other; checked before anything is loaded."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from huggingface_hub import get_token
from transformers import GenerationConfig

from graft.configuration.configuration_unlimiformer import UnlimiformerConfig
from graft.trainer.arguments import LIKELIHOOD_VIEWS, RunConfiguration, View
from graft.trainer.configuration_error import ConfigurationError
from graft.trainer.knowledge_graph_rules import GRAPH_VIEWS, check_knowledge_graph
from graft.trainer.metrics import METRIC_VALUES, TOKEN_METRICS, metric_named
from graft.trainer.own_adapters import own_adapter_config
from graft.trainer.retrieval_ability import VIEWS
from graft.trainer.retrieval_rules import check_retrieval
from graft.trainer.streaming_rules import check_streaming


def resolve_views(configuration: RunConfiguration) -> None:
    """Put the default of `data.eval_views` in its place: with neighbours, graphs or a memory, to tell what it does."""
    if configuration.data.eval_views is None:
        views: tuple[View, ...] = ("truncated",) if configuration.memory is None else ("full",)
        views = views if configuration.knowledge_graph is None else GRAPH_VIEWS
        configuration.data.eval_views = list(views if configuration.retrieval is None else VIEWS)


def has_target(configuration: RunConfiguration) -> bool:
    """Whether rows have a target text, or the run reads text for its own sake (causal language modelling)."""
    data = configuration.data
    return configuration.retrieval is None and (data.messages_column is not None or data.target_column is not None)


def text_metrics(configuration: RunConfiguration) -> list[str]:
    """Names of the metrics that score generated texts."""
    names = [metric if isinstance(metric, str) else str(metric.get("name")) for metric in configuration.metrics]
    return [name for name in names if name not in TOKEN_METRICS]


def available_metric_names(configuration: RunConfiguration) -> list[str]:
    """What an evaluation of this run will report, such as "eval_full_rougeL", for `metric_for_best_model`."""
    likely = ["loss", "perplexity"] + ([] if has_target(configuration) else ["bits_per_byte"])
    of_texts = [value for name in text_metrics(configuration) for value in METRIC_VALUES[name]]
    return [
        f"eval_{view}_{value}"
        for view in configuration.data.eval_views or []
        for value in (likely if view in LIKELIHOOD_VIEWS else [*likely, *of_texts])
    ]


def check_blocks(configuration: RunConfiguration) -> None:
    """Refuse blocks that contradict each other, or that would do nothing.

    Raises:
        ConfigurationError: the first contradiction, with both options and the way out.
    """
    for rule in (
        _check_training_needs,
        check_retrieval,
        check_streaming,
        _check_data,
        _check_chunks,
        _check_oracle,
        _check_packing,
        _check_memory,
        check_knowledge_graph,
        _check_graph,
        _check_adapter,
        _check_generation,
        _check_metrics,
        _check_best_model,
        _check_hub,
    ):
        rule(configuration)


def _check_training_needs(configuration: RunConfiguration) -> None:
    training, data = configuration.training, configuration.data
    if not training.get("output_dir"):
        raise ConfigurationError("`training.output_dir` is missing: the folder that receives all a run writes.")
    if data.dataset is None:
        needs = {"do_train": "train", "do_eval": "validation", "do_predict": "test"}
        for switch, split in needs.items():
            if training.get(switch) and not getattr(data, split):
                raise ConfigurationError(
                    f"`training.{switch}` is true but there is no `data.{split}`: name its files."
                )
        if training.get("eval_strategy", "no") != "no" and not data.validation:
            raise ConfigurationError(
                f"`training.eval_strategy` is {training['eval_strategy']!r} but there are no rows to evaluate: add "
                "`data.validation`, or set the strategy to 'no'."
            )
        if not (data.train or data.validation or data.test):
            raise ConfigurationError(
                "The block `data` names no rows: give `data.train`, `data.validation`, `data.test` or `data.dataset`."
            )
    if training.get("fsdp") and int(os.environ.get("WORLD_SIZE", "1")) < 2:
        raise ConfigurationError(
            f"`training.fsdp` is {training['fsdp']!r} with one process, which has nothing to shard: start several "
            "with `torchrun --nproc_per_node N scripts/run.py ...`, or leave it out."
        )


def _check_data(configuration: RunConfiguration) -> None:
    model, data = configuration.model, configuration.data
    if model.task == "seq2seq" and data.messages_column is not None:
        raise ConfigurationError("`data.messages_column` is for `model.task` 'causal', got 'seq2seq'.")
    if model.task == "seq2seq" and data.target_column is None:
        raise ConfigurationError("`data.target_column` is null, but `model.task` 'seq2seq' has nothing to learn then.")
    if data.train_on_all_references and (data.target_column is None or data.messages_column is not None):
        raise ConfigurationError(
            "`data.train_on_all_references` would do nothing: it is for a `data.target_column` of lists of texts."
        )
    if data.train_on_all_references and data.capture_raw_text:
        raise ConfigurationError(
            "`data.train_on_all_references` and `data.capture_raw_text` exclude each other: each text would be "
            "written once for each of its references."
        )
    fixed = ("source_prefix", "source_suffix", "prefix_column")
    if not has_target(configuration) and (given := [name for name in fixed if getattr(data, name)]):
        raise ConfigurationError(f"`data.{given[0]}` is for rows with a target, but `data.target_column` is null.")
    if model.attn_implementation is not None and "/" in model.attn_implementation:
        raise ConfigurationError(
            f"`model.attn_implementation` {model.attn_implementation!r} names a repository of code and is refused: a "
            "configuration executes nothing. Use 'eager', 'sdpa' or 'flash_attention_2'."
        )


def _check_chunks(configuration: RunConfiguration) -> None:
    data = configuration.data
    trains, evaluates = data.train_view == "chunked", "chunked" in (data.eval_views or [])
    if trains and data.max_source_length is not None:
        raise ConfigurationError(
            "`data.max_source_length` cuts sources off, but `data.train_view` 'chunked' trains on all of each: "
            "set `data.chunk_size` instead."
        )
    if data.messages_column is not None and (trains or evaluates):
        name = "train_view" if trains else "eval_views"
        raise ConfigurationError(f"`data.{name}` 'chunked' cuts texts, not chats: leave `data.messages_column` out.")
    if evaluates and data.target_column is None:
        raise ConfigurationError(
            "`data.eval_views` 'chunked' scores the target behind each chunk, but `data.target_column` is null: text "
            "is scored in the views 'truncated', 'full' and 'context'."
        )
    defaults = {"chunk_size": None, "chunk_overlap": 0, "min_chunk_tokens": 10, "capture_raw_text": False}
    acting = {"capture_raw_text": trains}
    for name, default in defaults.items():
        if getattr(data, name) != default and not acting.get(name, trains or evaluates):
            raise ConfigurationError(
                f"`data.{name}` would do nothing: it is for `data.train_view` 'chunked', got {data.train_view!r}."
            )


def _check_oracle(configuration: RunConfiguration) -> None:
    data = configuration.data
    if not data.train_view.startswith("oracle"):
        return
    if data.messages_column is not None or data.target_column is None:
        raise ConfigurationError(
            f"`data.train_view` {data.train_view!r} compares sentences of `data.source_column` with a target: give "
            "`data.target_column`, and leave `data.messages_column` out."
        )
    if data.on_too_long != "truncate":
        raise ConfigurationError(
            f"`data.on_too_long` {data.on_too_long!r} would do nothing: `data.train_view` {data.train_view!r} leaves "
            "out sentences of a source that is too long."
        )


def _check_packing(configuration: RunConfiguration) -> None:
    if not configuration.data.packing:
        return
    adapter, memory = configuration.adapter, configuration.memory
    reasons = {
        f"`model.task` {configuration.model.task!r}: it is for 'causal'": configuration.model.task != "causal",
        "the block `graph`: edges would join rows that only share a row": configuration.graph is not None,
        "`adapter.type` 'sparse_gin', for the same reason": adapter is not None and adapter.type == "sparse_gin",
        "a `memory.training` other than 'standard': each row has a memory of its own": memory is not None
        and memory.training != "standard",
        "`data.capture_raw_text`: a packed row is no chunk": configuration.data.capture_raw_text,
        "`training.use_cache`: with a cache rows are not told apart": bool(configuration.training.get("use_cache")),
    }
    if excluded := [reason for reason, holds in reasons.items() if holds]:
        raise ConfigurationError(f"`data.packing` does not go with {excluded[0]}.")


def _check_memory(configuration: RunConfiguration) -> None:
    if configuration.memory is None and "full" in (configuration.data.eval_views or []):
        raise ConfigurationError(
            "`data.eval_views` holds 'full', which reads documents with memory, but there is no block `memory`: add "
            "it (`{}` takes the defaults), or use 'truncated' or 'context'."
        )
    if configuration.memory is not None:
        _check_training_with_memory(configuration, configuration.memory)


def _check_training_with_memory(configuration: RunConfiguration, memory: UnlimiformerConfig) -> None:
    if memory.memory_gradient and (memory.training == "standard" or configuration.model.task != "causal"):
        raise ConfigurationError(
            "`memory.memory_gradient` would do nothing: it is for `model.task` 'causal' and a `memory.training` other "
            "than 'standard'; an encoder always learns."
        )
    if memory.training != "standard" and configuration.training.get("gradient_checkpointing"):
        raise ConfigurationError(
            f"`memory.training` {memory.training!r} and `training.gradient_checkpointing` exclude each other: it "
            "takes the cache, and the memory in it, from the layers. An encoder's windows are checkpointed anyway."
        )


def _check_graph(configuration: RunConfiguration) -> None:
    if configuration.graph is None:
        return
    if configuration.model.task != "causal":
        raise ConfigurationError(
            f"The block `graph` makes a Llama graph-aware: `model.task` must be 'causal', got "
            f"{configuration.model.task!r}."
        )
    if configuration.memory is not None:
        raise ConfigurationError(
            "The blocks `graph` and `memory` exclude each other: a memory serves stock attention, which graph layers "
            "replace; leave one out."
        )
    if configuration.adapter is not None and configuration.knowledge_graph is None:
        raise ConfigurationError(
            "The blocks `graph` and `adapter` exclude each other: new graph layers would be missing from the saved "
            "adapter; name what trains in `graph.train` instead."
        )


def _check_adapter(configuration: RunConfiguration) -> None:
    adapter = configuration.adapter
    if adapter is None or adapter.type == "lora":
        return
    if configuration.model.task != "causal":
        raise ConfigurationError(
            f"`adapter.type` {adapter.type!r} is for `model.task` 'causal', got {configuration.model.task!r}."
        )
    if adapter.type == "retrofit" and configuration.retrieval is None:
        raise ConfigurationError(
            "`adapter.type` 'retrofit' learns to read neighbours, but there is no block `retrieval`: add it (`{}` "
            "takes the defaults), with prepared corpora as `data.train` and `data.validation`."
        )
    own_adapter_config(adapter)


def _check_generation(configuration: RunConfiguration) -> None:
    generates = bool(configuration.training.get("predict_with_generate"))
    if generates and not has_target(configuration):
        raise ConfigurationError(
            "`training.predict_with_generate` is true, but rows without a target (`data.target_column` null) are "
            "scored by likelihood only."
        )
    if configuration.generation and not generates:
        raise ConfigurationError(
            "The block `generation` would do nothing: set `training.predict_with_generate` to true, or leave it out."
        )
    try:
        GenerationConfig(**configuration.generation).validate(strict=True)
    except (ValueError, TypeError) as error:
        first = str(error).partition("\nIf you're using a pretrained model")[0]  # that advice is for folders
        raise ConfigurationError(f"Block `generation`: {' '.join(first.split())}") from error


def _check_metrics(configuration: RunConfiguration) -> None:
    for metric in configuration.metrics:
        if metric not in TOKEN_METRICS:
            metric_named(metric)
    if (texts := text_metrics(configuration)) and not configuration.training.get("predict_with_generate"):
        raise ConfigurationError(
            f"`metrics` holds {texts[0]!r}, which scores generated texts: set `training.predict_with_generate` to "
            "true."
        )
    if "bits_per_byte" in configuration.metrics and has_target(configuration):
        raise ConfigurationError("`metrics` holds 'bits_per_byte', which is for text without a target only.")


def _check_best_model(configuration: RunConfiguration) -> None:
    training = configuration.training
    best, metric = training.get("load_best_model_at_end"), training.get("metric_for_best_model")
    if configuration.early_stopping_patience is not None:
        if not best:
            raise ConfigurationError(
                "`training.early_stopping_patience` needs `training.load_best_model_at_end` to be true."
            )
        if configuration.early_stopping_patience < 1:
            raise ConfigurationError(
                f"`training.early_stopping_patience` must be at least 1, got {configuration.early_stopping_patience}."
            )
    if best and training.get("eval_strategy", "no") == "no":
        raise ConfigurationError(
            "`training.load_best_model_at_end` needs `training.eval_strategy` 'steps' or 'epoch', got 'no'."
        )
    names = available_metric_names(configuration)
    if best and metric is None:
        raise ConfigurationError(
            f"`training.load_best_model_at_end` needs `training.metric_for_best_model`, one of {', '.join(names)}."
        )
    if metric is not None and metric not in names:
        raise ConfigurationError(
            f"`training.metric_for_best_model` must be one of {', '.join(names)}, got {metric!r}."
        )


def _check_hub(configuration: RunConfiguration) -> None:
    training = configuration.training
    strategy = training.get("hub_strategy")
    if strategy in ("checkpoint", "all_checkpoints"):
        raise ConfigurationError(
            f"`training.hub_strategy` {strategy!r} is refused: it would publish the optimizer's pickles; use "
            "'every_save' or 'end'."
        )
    if not training.get("push_to_hub"):
        return
    if get_token() is None:
        raise ConfigurationError("`training.push_to_hub` needs a token: run `hf auth login`, or set HF_TOKEN.")
    base = configuration.adapter and (configuration.adapter.base_model or configuration.model.name)
    if base and Path(base).exists() and Path(base).resolve().is_relative_to(Path(tempfile.gettempdir()).resolve()):
        raise ConfigurationError(
            f"The adapter would name {base!r} as its base, a temporary folder nobody else has: set "
            "`adapter.base_model` to the id of the base."
        )
