"""The blocks of a run's configuration: what each option means, its type and its range.

One dataclass for each block whose options are ours. `training` holds the stock fields of `Seq2SeqTrainingArguments`
and early stopping, `generation` those of `GenerationConfig`, `memory` is an `UnlimiformerConfig`, `graph` a
`GNNConfig` with one more field. `config_file.py` reads files and command lines into a `RunConfiguration`;
`block_rules.py` and `retrieval_rules.py` check what no block can check alone.
"""

# No `from __future__ import annotations` here: it would silently switch the strict type checks off.
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from huggingface_hub.dataclasses import strict

from graft.configuration.configuration_gnn import GNNConfig
from graft.configuration.configuration_unlimiformer import UnlimiformerConfig
from graft.configuration.option_checks import read_options
from graft.trainer.knowledge_graph_arguments import KnowledgeGraphArguments

Task = Literal["seq2seq", "causal"]
View = Literal[
    "full", "truncated", "context", "chunked", "retrieved", "without", "random", "without_graph", "shuffled_graph"
]
LIKELIHOOD_VIEWS: tuple[View, ...] = ("chunked",)
"""Views in which the target's likelihood is all there is: it belongs to the document, so a chunk generates nothing."""
TrainView = Literal["truncated", "chunked", "oracle", "oracle_and_truncated"]


def _at_least(values: dict[str, Any], smallest: int) -> None:
    for name, value in values.items():
        if value is not None and value < smallest:
            raise ValueError(f"`{name}` must be at least {smallest}, got {value}.")


@strict
@dataclass
class ModelArguments:
    """Which model runs.

    Args:
        task: "seq2seq" (`AutoModelForSeq2SeqLM`) or "causal" (`AutoModelForCausalLM`).
        name: a model's folder or Hub id. May be left out only with `from_config`, `config` and `tokenizer`.
        from_config: start from random weights instead of `name`'s.
        config: folder, file or id of the config, if it is not `name`'s.
        tokenizer: folder or id of the tokenizer, if it is not `name`'s.
        config_overrides: fields of the model's config to replace.
        revision: commit, tag or branch of a Hub id, for the weights and the tokenizer.
        dtype: what the weights are loaded in; "auto" leaves them as saved.
        attn_implementation: the base model's attention, None for transformers' choice.
    """

    task: Task
    name: str | None = None
    from_config: bool = False
    config: str | None = None
    tokenizer: str | None = None
    config_overrides: dict[str, Any] = field(default_factory=dict)
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    attn_implementation: str | None = None

    def validate_names(self) -> None:
        """A name is needed unless everything that would come from it is given."""
        if self.name is None and not (self.from_config and self.config and self.tokenizer):
            raise ValueError(
                "`name` must be a model's folder or id; it may be left out only if `from_config` is true and both "
                "`config` and `tokenizer` are given."
            )


@strict
@dataclass
class DataArguments:
    """Which rows are read, and what is kept of them.

    Args:
        train, validation, test: files of a split: a path, a glob or a list of them; JSON, JSONL, CSV, Parquet or text.
            With the block `retrieval`: the folder of a prepared corpus (`graft-build-database`).
        dataset: instead of files, a folder or Hub id that `datasets.load_dataset` reads.
        config, data_dir, revision: of `dataset`.
        streaming: training rows are read and tokenised while the run goes on, so they need not fit on the disk; the
            run takes `training.max_steps` steps. Rows to evaluate are loaded as ever.
        shuffle_buffer: rows of a stream from which the next ones are drawn; None is 1,000.
        splits: our name of a split -> its name in `dataset`, where they differ.
        source_column, target_column, prefix_column, id_column: columns; None means there is none. A target may be a
            list of references: the first one trains, all of them score. Without an id the row number is used.
        train_on_all_references: a training row with several references becomes a row for each of them.
        messages_column: a column of chat messages instead of source and target; the last message of the assistant is
            the target, the chat template makes the prompt. Causal only.
        source_prefix: fixed text before every source.
        source_suffix: fixed text after every source; no truncation removes it.
        max_source_length: tokens kept of a training source, prefixes and special tokens included; None for as many as
            the model was trained on. In causal text without a target: tokens of a training block.
        eval_max_source_length: the same for evaluation; None for the whole document.
        max_prefix_length: tokens kept of the row's prefix, None for all.
        max_target_length, eval_max_target_length: tokens kept of a target, its special tokens included;
            `eval_max_target_length` None takes `max_target_length`.
        pad_to_multiple_of: batches are padded to a multiple of it.
        max_train_samples, max_eval_samples, max_test_samples: rows kept of a split, None for all.
        sample_seed: None keeps the first rows; a number draws them with that seed.
        test_slice: [start, end] of the test set, as in Python; end may be null.
        merge_duplicates: rows with equal id become one with several references (validation and test only).
        eval_during_training: part of the validation rows used while training: a number of rows, or a share below 1.
        train_view: "truncated" trains on the first `max_source_length` tokens, "chunked" on all of a document, cut
            into rows that each learn its target, "oracle" on the sentences that share most with the target, as many
            as fit `max_source_length`, "oracle_and_truncated" on both.
        chunk_size: tokens of a chunked row, prefix and special tokens included; None for as many as the model was
            trained on.
        chunk_overlap: tokens of the source that a chunk shares with the one before.
        min_chunk_tokens: a last chunk with fewer tokens of the source is left out, unless it is the only one.
        capture_raw_text: write the chunks' texts to `chunks.parquet`, for `graft-knowledge-graph`.
        packing: training rows of a decoder share rows of as many tokens as one may have, so that less is padding.
        eval_views: how the evaluated documents are read: "full" with memory, "truncated" as the base model sees them,
            "context" whole and without memory, "chunked" in rows as the training view's, for the likelihood of the
            target alone: nothing is generated. None: "full" if there is a memory, else "truncated". With the block
            `retrieval`: "retrieved", "without" and "random" neighbours; None is all three. With
            `graph.knowledge_graph`: "without_graph" and "shuffled_graph" read as "context" does, which reads the
            graph; None is these three.
        scored_tokens: causal text without a target: how many last tokens of a document are scored.
        on_too_long: what happens to sources longer than the limit: "truncate", "skip" or "error".
        on_empty_target: what happens to rows without a target text: "error" or "skip".
        num_proc: processes that tokenise.
        overwrite_cache: tokenise again, even if the result is in the cache of `datasets`.
    """

    train: str | list[str] | None = None
    validation: str | list[str] | None = None
    test: str | list[str] | None = None
    dataset: str | None = None
    config: str | None = None
    data_dir: str | None = None
    revision: str | None = None
    streaming: bool = False
    shuffle_buffer: int | None = None
    splits: dict[str, str] = field(default_factory=dict)
    source_column: str = "source"
    target_column: str | None = "target"
    prefix_column: str | None = None
    id_column: str | None = None
    train_on_all_references: bool = False
    messages_column: str | None = None
    source_prefix: str = ""
    source_suffix: str = ""
    max_source_length: int | None = None
    eval_max_source_length: int | None = None
    max_prefix_length: int | None = None
    max_target_length: int = 128
    eval_max_target_length: int | None = None
    pad_to_multiple_of: int | None = None
    max_train_samples: int | None = None
    max_eval_samples: int | None = None
    max_test_samples: int | None = None
    sample_seed: int | None = None
    test_slice: list[int | None] | None = None
    merge_duplicates: bool = True
    eval_during_training: int | float | None = None
    train_view: TrainView = "truncated"
    chunk_size: int | None = None
    chunk_overlap: int = 0
    min_chunk_tokens: int = 10
    capture_raw_text: bool = False
    packing: bool = False
    eval_views: list[View] | None = None
    scored_tokens: int = 512
    on_too_long: Literal["truncate", "skip", "error"] = "truncate"
    on_empty_target: Literal["error", "skip"] = "error"
    num_proc: int | None = None
    overwrite_cache: bool = False

    def validate_ranges(self) -> None:
        """Refuse numbers outside their range; the message names the field, its value and what is allowed."""
        lengths = ("max_source_length", "eval_max_source_length", "max_target_length", "eval_max_target_length")
        counts = ("max_train_samples", "max_eval_samples", "max_test_samples")
        others = ("pad_to_multiple_of", "scored_tokens", "num_proc", "chunk_size", "shuffle_buffer")
        _at_least({name: getattr(self, name) for name in (*lengths, *counts, *others)}, 1)
        _at_least({n: getattr(self, n) for n in ("max_prefix_length", "chunk_overlap", "min_chunk_tokens")}, 0)
        share = self.eval_during_training
        if share is not None and (share <= 0 or (share > 1 and share != int(share))):
            raise ValueError(
                f"`eval_during_training` must be a number of rows or a share between 0 and 1, got {share}."
            )
        if self.test_slice is not None and len(self.test_slice) != 2:
            raise ValueError(f"`test_slice` must be [start, end], got {self.test_slice}.")
        if self.eval_views is not None and (not self.eval_views or len(set(self.eval_views)) < len(self.eval_views)):
            raise ValueError(f"`eval_views` must name different views, or be null, got {self.eval_views}.")

    def validate_origin(self) -> None:
        """Rows come from files or from a dataset; a dataset's options need one."""
        if self.dataset is not None and (self.train or self.validation or self.test):
            raise ValueError("`dataset` and the files `train`, `validation`, `test` exclude each other.")
        if self.dataset is None and (given := [n for n in ("config", "data_dir", "revision") if getattr(self, n)]):
            raise ValueError(f"`{given[0]}` belongs to `dataset`, which is not given.")
        if unknown := sorted(set(self.splits) - {"train", "validation", "test"}):
            raise ValueError(f"`splits` maps train, validation and test to names in `dataset`, got {unknown}.")


@strict
@dataclass
class AdapterArguments:
    """A small set of trained weights on a frozen base.

    Args:
        type: "lora" (Hu et al. 2021, arXiv 2106.09685); or of a causal model: "sparse_gin", a graph network beside its
            attention (arXiv 2501.02393), or "retrofit", cross-attention to retrieved neighbours (arXiv 2112.04426).
        options: fields of SparseGINConfig or RetroFitConfig. The next four are of "lora".
        r: rank.
        alpha: the update is scaled by alpha / r.
        dropout: on the input of the update, in [0, 1).
        target_modules: names of the linear layers, "all-linear", or None for attention and MLP projections.
        base_model: what the saved adapter names as its base, if it is not `model.name`.
    """

    type: Literal["lora", "sparse_gin", "retrofit"] = "lora"
    options: dict[str, Any] = field(default_factory=dict)
    r: int = 8
    alpha: int | float = 16
    dropout: float | int = 0.0
    target_modules: str | list[str] | None = None
    base_model: str | None = None

    def validate_ranges(self) -> None:
        """Refuse numbers outside their range; the message names the field, its value and what is allowed."""
        _at_least({"r": self.r}, 1)
        if self.alpha <= 0:
            raise ValueError(f"`alpha` must be above 0, got {self.alpha}.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"`dropout` must lie in [0, 1), got {self.dropout}.")

    def validate_type(self) -> None:
        """Refuse options of another type, which would do nothing."""
        if self.type == "lora":
            if self.options:
                raise ValueError(
                    f"`options` are of `type` 'sparse_gin' or 'retrofit', got {self.options} with 'lora'."
                )
            return
        defaults = {"r": 8, "alpha": 16, "dropout": 0.0, "target_modules": None}
        if given := [name for name, default in defaults.items() if getattr(self, name) != default]:
            raise ValueError(
                f"`{given[0]}` is of `type` 'lora'; {self.type!r} takes its fields in `options`. A run trains one "
                "adapter: for both, train the LoRA, fold it with `graft-merge`, and train the other on what it wrote."
            )


@strict
@dataclass
class GraphArguments(GNNConfig):
    """The graph layers of a Llama: every field of GNNConfig, which parameters train, and the graphs that are given.

    Args:
        train: patterns; only parameters in whose names one is found train, such as ["graph"]. None is all.
        knowledge_graph: KnowledgeGraphArguments, or a dict of its fields ({} takes the defaults). With `adapter.type`
            "sparse_gin" it stands alone: the adapter reads the graph, and the model keeps its layers.
    """

    train: list[str] | None = None
    knowledge_graph: Any = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.knowledge_graph is not None:
            self.knowledge_graph = read_options(KnowledgeGraphArguments, "knowledge_graph", self.knowledge_graph)

    def gnn_options(self) -> dict[str, Any]:
        """The fields of GNNConfig, as JSON values."""
        values = self.to_dict()
        return {each.name: values[each.name] for each in fields(GNNConfig)}


@strict
@dataclass
class RetrievalArguments:
    """What a model reads of the neighbours that a prepared corpus holds for each chunk of its rows.

    Args:
        num_neighbours: per chunk, at most as many as the corpus stores.
        neighbour_length: tokens of a neighbour; None is two chunks, the neighbour and its continuation.
    """

    num_neighbours: int = 2
    neighbour_length: int | None = None

    def validate_ranges(self) -> None:
        """Refuse numbers outside their range; the message names the field, its value and what is allowed."""
        _at_least({"num_neighbours": self.num_neighbours, "neighbour_length": self.neighbour_length}, 1)


@dataclass
class RunConfiguration:
    """All blocks of a run, checked on their own and against each other.

    Args:
        training: fields of `Seq2SeqTrainingArguments` by their stock names, without the two below.
        early_stopping_patience, early_stopping_threshold: of the block `training`; patience None stops nothing early.
        memory, retrieval, graph, adapter: None where the block is absent: no memory, texts instead of prepared
            corpora, the model's own layers, full weights.
        generation: fields of `GenerationConfig`.
        metrics: names, or {"name": ..., option: value}.
    """

    model: ModelArguments
    data: DataArguments
    training: dict[str, Any]
    memory: UnlimiformerConfig | None = None
    retrieval: RetrievalArguments | None = None
    graph: GraphArguments | None = None
    adapter: AdapterArguments | None = None
    generation: dict[str, Any] = field(default_factory=dict)
    metrics: list[str | dict[str, Any]] = field(default_factory=list)
    early_stopping_patience: int | None = None
    early_stopping_threshold: float = 0.0

    @property
    def knowledge_graph(self) -> KnowledgeGraphArguments | None:
        """What the block `graph` says about graphs that are given, if anything."""
        return None if self.graph is None else self.graph.knowledge_graph

    @property
    def graph_layers(self) -> GraphArguments | None:
        """The block `graph` where it makes graph layers; beside an adapter it only gives a graph."""
        return self.graph if self.adapter is None else None
