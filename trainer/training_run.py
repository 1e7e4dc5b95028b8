"""One run from its configuration to a finished folder: load, adapt, train, evaluate every view, predict, save, tell.

What a run writes lies in `training.output_dir`; an interrupted run goes on from its newest complete checkpoint.
"""

from __future__ import annotations

import logging
import math
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from transformers import (
    EarlyStoppingCallback,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    Seq2SeqTrainingArguments,
    TrainerCallback,
    set_seed,
)

from graft.trainer.abilities import Ability, MemoryAbility
from graft.trainer.arguments import LIKELIHOOD_VIEWS, RunConfiguration
from graft.trainer.block_rules import has_target
from graft.trainer.callbacks import GenerationSamples, LossCurve, Throughput, output_folder
from graft.trainer.checkpoints import check_output_dir
from graft.trainer.config_file import to_dict
from graft.trainer.configuration_error import ConfigurationError
from graft.trainer.corpus_rows import check_corpora, reader_of
from graft.trainer.data import load_splits, prepare_evaluation
from graft.trainer.document_chunks import keep_chunk_texts
from graft.trainer.graph_ability import GraphAbility, GraphPlots, train_graph, with_graph
from graft.trainer.graph_adapter import GraphAdapterAbility
from graft.trainer.knowledge_graph_ability import KnowledgeGraphAbility
from graft.trainer.knowledge_graph_data import KnowledgeGraphs
from graft.trainer.knowledge_graph_sources import check_reads_graphs, knowledge_graphs
from graft.trainer.loading import load_config, load_model, load_tokenizer, parameter_counts, with_adapter
from graft.trainer.metrics import TOKEN_METRICS, Metric, metric_named
from graft.trainer.own_adapters import own_adapter_config
from graft.trainer.packed_rows import check_reads_packed_rows
from graft.trainer.published_files import push_command
from graft.trainer.resuming import train_or_go_on
from graft.trainer.retrieval_ability import RetrievalAbility, RetroFitAbility
from graft.trainer.run_plan import plan_of
from graft.trainer.run_record import record_before, run_record, write_record
from graft.trainer.run_rows import (
    check_equal_rows,
    check_splits,
    evaluation_collator,
    lay_out,
    needed_splits,
    training_collator,
    training_texts,
)
from graft.trainer.streamed_rows import is_streamed
from graft.trainer.trackers import prepare_trackers
from graft.trainer.trainer import GraftSeq2SeqTrainer

logger = logging.getLogger(__name__)

DRY_ROWS = 8


@dataclass(frozen=True)
class RunFlags:
    """What is said on the command line and never in a file.

    Args:
        dry_run: load everything and eight rows of each split, return the plan, write nothing.
        fresh: the output folder must be empty.
        trust_remote_code: the model's own code may run.
        metrics: functions of (predictions, references) beside those of the configuration.
        command: the command line as typed, for the model card.
    """

    dry_run: bool = False
    fresh: bool = False
    trust_remote_code: bool = False
    metrics: Sequence[Metric] = ()
    command: str | None = None


@dataclass
class Prepared:
    """All a run needs before its first step."""

    configuration: RunConfiguration
    args: Seq2SeqTrainingArguments
    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase
    splits: dict[str, Any]
    train: Any
    during_training: dict[str, Any]
    rows: dict[str, dict[str, int]]
    model: Any
    graphs: KnowledgeGraphs | None


def run(configuration: RunConfiguration, flags: RunFlags | None = None) -> dict[str, Any]:
    """Carry the run out and return its record, as run.json holds it; with `dry_run` only the plan.

    Raises:
        ConfigurationError: a user's mistake; nothing has been trained and the output folder holds no record of it.
    """
    flags = flags or RunFlags()
    args = training_arguments(configuration)
    if not flags.dry_run:
        check_output_dir(output_folder(args), to_dict(configuration), flags.fresh)
    prepared = prepare(configuration, args, flags)
    if flags.dry_run:
        return {"plan": plan_of(prepared)}
    trainer = build_trainer(prepared, flags)
    record = run_record(configuration, args, _flag_record(flags))
    record |= {"rows": prepared.rows, "parameters": parameter_counts(trainer.model)}
    record["model_revision"] = getattr(prepared.config, "_commit_hash", None) or configuration.model.revision
    before = record_before(args)
    write_record(args, record)
    started = time.time()
    try:
        finished = train_or_go_on(trainer, record, before)
        if finished:
            record["results"] = _evaluate(trainer, prepared) | _predict(trainer, prepared)
        if prepared.graphs is not None:
            record["knowledge_graph"] = prepared.graphs.report
        record |= {"status": "complete" if finished else "interrupted", "hours": (time.time() - started) / 3600}
        write_record(args, record)
        if finished and args.do_train:
            _publish(trainer, prepared, record, flags)
    finally:
        if args.world_size > 1:
            time.sleep(0.2)  # gloo threads let go of what they gathered with the GIL, which the end of the group holds
            trainer.accelerator.end_training()
    return record


def metric_of_ones_own(name: str) -> Metric:
    """The function that `--metric module:function` names; importing it runs its module.

    Raises:
        ConfigurationError: there is no such module or function.
    """
    module, _, function = name.partition(":")
    try:
        metric: Metric = getattr(import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigurationError(f"`--metric` must be MODULE:FUNCTION, got {name!r}: {error}.") from error
    return metric


# Before the first step -----------------------------------------------------------------------------------------------


def training_arguments(configuration: RunConfiguration) -> Seq2SeqTrainingArguments:
    """The stock arguments, with graft's defaults where the block `training` says nothing.

    Splits that are named are used: without `do_train`, `do_eval` and `do_predict` each follows from its split.
    """
    given = dict(configuration.training)
    data = configuration.data
    switches = {"do_train": data.train, "do_eval": data.validation, "do_predict": data.test}
    if not any(given.get(switch) for switch in switches):
        given |= {switch: bool(files or data.dataset) for switch, files in switches.items()}
    given.setdefault("include_num_input_tokens_seen", "non_padding")
    given.setdefault("logging_steps", 10)
    given.setdefault("run_name", Path(given["output_dir"]).name)
    if data.streaming:  # batches of a stream differ in length, so one process cannot hand them out
        given["accelerator_config"] = {**(given.get("accelerator_config") or {}), "dispatch_batches": False}
    try:
        args = Seq2SeqTrainingArguments(**given)
    except (ValueError, TypeError, ImportError) as error:
        raise ConfigurationError(f"Block `training`: {' '.join(str(error).split())}") from error
    shards = args.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
    if shards and args.device.type == "cpu":  # accelerate would copy the model to each process and say nothing
        raise ConfigurationError(
            "`training.fsdp`, or a file of accelerate with FSDP, shards over GPUs only, and this process has none: "
            "leave it out; processes of a CPU each hold the whole model."
        )
    prepare_trackers([args.report_to] if isinstance(args.report_to, str) else args.report_to or [])
    return args


def prepare(configuration: RunConfiguration, args: Seq2SeqTrainingArguments, flags: RunFlags) -> Prepared:
    """Load config, data, tokenizer and model, and lay the rows out; the order in which mistakes are cheapest."""
    set_seed(args.seed)
    config = load_config(configuration.model, configuration.memory, flags.trust_remote_code)
    if configuration.graph_layers is not None:
        config = with_graph(config, configuration.graph_layers)
    check_reads_graphs(configuration, config)
    _check_lengths(configuration, config)
    with args.main_process_first(desc="loading the splits"):
        splits = load_splits(configuration.data, configuration.retrieval)
    if flags.dry_run:
        splits = {name: _few(rows) for name, rows in splits.items()}
    check_splits(args, splits)
    with tempfile.TemporaryDirectory() as temporary, args.main_process_first(desc="tokenising"):
        folder = Path(temporary if flags.dry_run else output_folder(args)) / "tokenizer"
        texts = training_texts(configuration, splits)
        tokenizer = load_tokenizer(configuration.model, config, folder, texts, flags.trust_remote_code)
        if configuration.retrieval is not None:
            check_corpora(splits, tokenizer, config, reader_of(configuration, config))
        graphed = {name: rows for name, rows in splits.items() if name in needed_splits(args)}
        graphs = knowledge_graphs(configuration, graphed, tokenizer, folder.parent / "knowledge_graph")
        train, during_training, rows = lay_out(configuration, args, splits, tokenizer, config, graphs)
        if train is not None and configuration.data.capture_raw_text:
            writes = not flags.dry_run and args.process_index == 0
            train = keep_chunk_texts(train, folder.parent / "chunks.parquet" if writes else None)
    check_equal_rows(args, [*([train] if train is not None else []), *during_training.values()])
    set_seed(args.seed)  # what was drawn so far depends on caches; weights must not
    model: Any = load_model(configuration.model, config, flags.trust_remote_code)
    if configuration.data.packing:
        check_reads_packed_rows(model)
    if configuration.graph_layers is not None:
        train_graph(model, configuration.graph_layers)
    if configuration.adapter is not None:
        model = with_adapter(model, configuration.adapter, configuration.model)
    if getattr(args, "activation_checkpointing", getattr(args, "gradient_checkpointing", False)):
        model.enable_input_require_grads()
    return Prepared(configuration, args, config, tokenizer, splits, train, during_training, rows, model, graphs)


def _few(rows: Any) -> Any:
    return rows.take(DRY_ROWS) if is_streamed(rows) else rows.select(range(min(DRY_ROWS, len(rows))))


def _check_lengths(configuration: RunConfiguration, config: PreTrainedConfig) -> None:
    """Learned positions end; past them an embedding fails in the middle of a run."""
    positions = getattr(config, "max_position_embeddings", None)
    if not config.is_encoder_decoder or positions is None:
        return
    data = configuration.data
    lengths = {name: getattr(data, name) for name in ("max_source_length", "max_target_length")}
    lengths["eval_max_target_length"] = data.eval_max_target_length
    given = {f"data.{name}": length for name, length in lengths.items()}
    given["generation.max_new_tokens"] = configuration.generation.get("max_new_tokens")
    for name, length in given.items():
        if length is not None and length > positions:
            raise ConfigurationError(f"`{name}` must be at most the model's {positions} positions, got {length}.")


def build_trainer(prepared: Prepared, flags: RunFlags) -> GraftSeq2SeqTrainer:
    """The Trainer of the run, with its abilities, metrics, collators and callbacks."""
    configuration, tokenizer = prepared.configuration, prepared.tokenizer
    metrics = [metric_named(metric) for metric in configuration.metrics if metric not in TOKEN_METRICS]
    abilities: list[Ability] = [] if configuration.memory is None else [MemoryAbility(configuration.memory)]
    callbacks: list[TrainerCallback] = [Throughput(), LossCurve(), GenerationSamples()]
    adapter, retrieval = configuration.adapter, configuration.retrieval
    if retrieval is not None and adapter is not None and adapter.type == "retrofit":
        abilities.append(RetroFitAbility(retrieval, own_adapter_config(adapter)))
    elif retrieval is not None:
        abilities.append(RetrievalAbility(retrieval))
    if configuration.graph_layers is not None:
        abilities.append(GraphAbility(configuration.graph_layers, prepared.config))
        callbacks.append(GraphPlots())
    if adapter is not None and adapter.type == "sparse_gin":
        abilities.append(GraphAdapterAbility(own_adapter_config(adapter)))
    if prepared.graphs is not None:
        abilities.append(KnowledgeGraphAbility(prepared.graphs))
    if configuration.early_stopping_patience is not None:
        patience, threshold = configuration.early_stopping_patience, configuration.early_stopping_threshold
        callbacks.append(EarlyStoppingCallback(patience, threshold))
    return GraftSeq2SeqTrainer(
        prepared.model,
        prepared.args,
        data_collator=training_collator(configuration, tokenizer),
        eval_collator=evaluation_collator(configuration, tokenizer),
        train_dataset=prepared.train,
        eval_dataset=prepared.during_training or None,
        processing_class=tokenizer,
        callbacks=callbacks,
        abilities=abilities,
        metrics=[*metrics, *flags.metrics],
        generation=_generation(configuration, tokenizer),
    )


def _generation(configuration: RunConfiguration, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The block `generation`; unless it says otherwise, as many new tokens as a target may have."""
    if not has_target(configuration):
        return {}
    given = dict(configuration.generation)
    if "max_length" not in given:
        data = configuration.data
        given.setdefault("max_new_tokens", data.eval_max_target_length or data.max_target_length)
    if tokenizer.pad_token_id is not None:
        given.setdefault("pad_token_id", tokenizer.pad_token_id)
    return given


# The run itself ------------------------------------------------------------------------------------------------------


def _evaluate(trainer: GraftSeq2SeqTrainer, prepared: Prepared) -> dict[str, float]:
    """Every view of all validation rows, with the best weights if the run keeps them."""
    if not prepared.args.do_eval:
        return {}
    rows = prepared.splits["validation"]
    positions = getattr(prepared.config, "max_position_embeddings", None)
    views = {}
    for view in prepared.configuration.data.eval_views or []:
        with prepared.args.main_process_first(desc="tokenising"):
            views[view] = prepare_evaluation(
                rows, prepared.tokenizer, prepared.configuration, view, positions, graphs=prepared.graphs
            )
    metrics = trainer.evaluate(views)
    for view in views:
        logger.info("Worst and best of %s:\n%s", view, trainer.evaluations[f"eval_{view}"].extremes())
    return _scores(metrics)


def _predict(trainer: GraftSeq2SeqTrainer, prepared: Prepared) -> dict[str, float]:
    """The test rows in the first view that generates; targets, where there are some, are scored."""
    if not prepared.args.do_predict:
        return {}
    views = prepared.configuration.data.eval_views or []
    view = next((each for each in views if each not in LIKELIHOOD_VIEWS), "truncated")
    positions = getattr(prepared.config, "max_position_embeddings", None)
    with prepared.args.main_process_first(desc="tokenising"):
        rows = prepare_evaluation(
            *(prepared.splits["test"], prepared.tokenizer, prepared.configuration, view, positions, "test"),
            graphs=prepared.graphs,
        )
    return _scores(trainer.predict(rows, view=view).metrics or {})


def _publish(trainer: GraftSeq2SeqTrainer, prepared: Prepared, record: dict[str, Any], flags: RunFlags) -> None:
    """Write the model card; push if the run asks for it, and leave a complete folder if that fails."""
    trainer.card = _card(prepared, record, flags)
    trainer.create_model_card()
    if not prepared.args.push_to_hub:
        return
    try:
        trainer.push_to_hub()
    except Exception as error:  # no network, no right, a lost upload have no common class; the folder is whole
        command = push_command(output_folder(trainer.args), str(trainer.hub_model_id))
        logger.error("Pushing failed (%s). Push later: %s", " ".join(str(error).split()), command)


def _card(prepared: Prepared, record: Mapping[str, Any], flags: RunFlags) -> dict[str, Any]:
    """What the card tells beyond what the Trainer knows."""
    configuration, data = prepared.configuration, prepared.configuration.data
    run_table = {
        "hardware": "{name} ({device}), {processes} process(es)".format_map(record["hardware"]),
        "hours": f"{record['hours']:.3g}",
        "steps": str(record["training"]["steps"]),
        "effective batch size": str(record["effective_batch_size"]),
        "training tokens seen": f"{record['training']['tokens_seen']:,}",
        "seed": str(record["seed"]),
        "versions": ", ".join(f"{name} {number}" for name, number in record["versions"].items()),
    }
    base = None if configuration.model.from_config else configuration.model.name
    if configuration.adapter is not None and configuration.adapter.base_model:
        base = configuration.adapter.base_model
    card = {"base_model": base, "command": flags.command, "run": run_table}
    return card | ({"datasets": [data.dataset]} if data.dataset and not Path(data.dataset).exists() else {})


def _flag_record(flags: RunFlags) -> dict[str, Any]:
    names = [f"{function.__module__}:{getattr(function, '__name__', function)}" for function in flags.metrics]
    return {"trust_remote_code": flags.trust_remote_code, "metrics": names, "command": flags.command}


def _scores(metrics: Mapping[str, float]) -> dict[str, float]:
    """Finite values, without speeds and counters: seconds of each row are in the prediction files."""
    others = ("_runtime", "_per_second", "epoch", "num_input_tokens_seen", "_preparation_time")
    return {name: value for name, value in metrics.items() if not name.endswith(others) and math.isfinite(value)}
