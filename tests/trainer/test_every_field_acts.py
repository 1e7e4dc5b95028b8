"""Every field of a run's configuration, changed alone, changes what the run does: its rows, weights, figures or error.

What is observed: the prepared rows, the parameters before and after one step, every operation of a step and of an
evaluation with its shapes, the figures, and the files. Two observations of one configuration are equal.
"""

import hashlib
import itertools
import json
from collections import Counter
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BartConfig, BartForConditionalGeneration, GPT2Config, LlamaConfig

from graft.configuration.configuration_gnn import (
    AdjacencyConfig,
    EdgeTransformConfig,
    LatentConfig,
    SparseGraphConfig,
)
from graft.configuration.configuration_unlimiformer import UnlimiformerConfig
from graft.graphs.knowledge_graph.chunk_sources import chunks_of_text
from graft.graphs.knowledge_graph.corpus_graph import build_knowledge_graph
from graft.graphs.knowledge_graph.mention_shards import ExtractorChoice
from graft.trainer import data as data_module
from graft.trainer import loading, splits
from graft.trainer.arguments import AdapterArguments, DataArguments, GraphArguments, ModelArguments, RunConfiguration
from graft.trainer.callbacks import LossCurve
from graft.trainer.config_file import from_dict
from graft.trainer.configuration_error import ConfigurationError
from graft.trainer.data import prepare_evaluation
from graft.trainer.graph_ability import train_graph, with_graph
from graft.trainer.knowledge_graph_arguments import KnowledgeGraphArguments
from graft.trainer.loading import load_config, load_model, load_tokenizer
from graft.trainer.streamed_rows import is_streamed
from graft.trainer.training_run import RunFlags, build_trainer, prepare, training_arguments

SENTENCE = "The {} number {} reads a long text, then answers."


def rows_of(split, count):
    return [
        {
            "name": f"{split}-{max(n - 1, 0)}",  # the first two share an id
            "source": " ".join([SENTENCE.format(noun, n) for noun in ("cat", "dog", "model")][: 1 + n % 3]),
            "other": f"another {split} text {n}",
            "target": f"cat {n} reads, then answers",
            "short": f"dog {n}",
            "several": [f"cat {n}", f"dog {n}"],
            "question": f"who reads text {n}?",
            "messages": [{"role": "user", "content": f"who {n}"}, {"role": "assistant", "content": f"cat {n}"}],
        }
        for n in range(count)
    ]


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_files(folder):
    for split, count in (("train", 6), ("validation", 4), ("test", 3)):
        write_rows(folder / f"{split}.jsonl", rows_of(split, count))
        write_rows(folder / f"other-{split}.jsonl", rows_of(f"other-{split}", count))
        for named in ("named", "renamed", "renamed/inside"):
            write_rows(folder / named / f"{split}.jsonl", rows_of(named, count))
    write_rows(folder / "holes.jsonl", [*rows_of("holes", 2), {**rows_of("holes", 1)[0], "target": ""}])
    card = "".join(f"- config_name: {each}\n  data_files: {each}.jsonl\n" for each in ("train", "other-train"))
    (folder / "named" / "README.md").write_text(f"---\nconfigs:\n{card}---\n")
    write_rows(folder / "named" / "other-train.jsonl", rows_of("other", 3))


BART = {"vocab_size": 320, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "max_position_embeddings": 32}
BART |= {f"{part}_attention_heads": 2 for part in ("encoder", "decoder")}
BART |= {f"{part}_ffn_dim": 16 for part in ("encoder", "decoder")}
LLAMA = {"vocab_size": 320, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
LLAMA |= {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64, "eos_token_id": 2}


def write_models(folder, tokenizer):
    configs = {
        "bart": BartConfig(**BART, dropout=0.0),
        "bart-two": BartConfig(**BART, dropout=0.0),
        "llama": LlamaConfig(**LLAMA),
        "gpt2": GPT2Config(vocab_size=320, n_embd=16, n_layer=2, n_head=2, n_positions=64, attn_pdrop=0.0),
    }
    for seed, (name, config) in enumerate(configs.items()):
        torch.manual_seed(seed)
        auto = loading._AUTO_CLASSES["seq2seq" if name.startswith("bart") else "causal"]
        auto.from_config(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    BartForConditionalGeneration(BartConfig(**BART, activation_function="relu")).save_pretrained(folder / "relu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizers):
    folder = tmp_path_factory.mktemp("fields")
    write_files(folder)
    tokenizer = tokenizers["byte_level"]
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    write_models(folder, tokenizer)
    tokenizer.chat_template = None
    tokenizers["unigram"].save_pretrained(folder / "unigram")
    return folder


@pytest.fixture(autouse=True)
def no_collection(monkeypatch):
    """Accelerate collects garbage in every training: a second each, in a process with as many objects as this one."""
    monkeypatch.setattr("accelerate.utils.memory.clear_device_cache", lambda *args, **options: None)


class Operations(TorchDispatchMode):
    """Counts every operation with the shape and dtype of its first result."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        first = result[0] if isinstance(result, tuple | list) and result else result
        facts = (tuple(first.shape), str(first.dtype)) if isinstance(first, torch.Tensor) else ()
        self.seen[(str(function), *facts)] += 1
        return result


def weights_of(model):
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {parameter.dtype} {parameter.requires_grad}".encode())
        digest.update(parameter.detach().float().numpy().tobytes())
    return digest.hexdigest()


def blocks_of(folder, output, causal=False, **changes):
    data = {split: str(folder / f"{split}.jsonl") for split in ("train", "validation", "test")}
    data |= {"id_column": "name", "max_target_length": 12, "eval_views": ["truncated"]}
    training = {"output_dir": str(output), "max_steps": 1, "use_cpu": True, "save_strategy": "no", "optim": "sgd"}
    training |= {"learning_rate": 0.5, "per_device_train_batch_size": 2, "disable_tqdm": True, "report_to": "none"}
    training |= {"train_sampling_strategy": "sequential", "do_train": True, "do_eval": True}
    model = {"task": "causal", "name": "llama"} if causal else {"task": "seq2seq", "name": "bart"}
    blocks = {"model": model, "data": data, "training": training}
    for block, options in changes.items():
        kept = blocks.get(block, {})
        blocks[block] = options if isinstance(options, list) else {**kept, **options}
    for name in ("name", "config", "tokenizer"):
        if (value := blocks["model"].get(name)) is not None:
            blocks["model"] = {**blocks["model"], name: str(folder / value)}
    for name in ("train", "validation", "test", "dataset"):
        if (value := blocks["data"].get(name)) is not None:
            blocks["data"] = {**blocks["data"], name: str(folder / value)}
    return blocks


def train_rows(prepared):
    if is_streamed(prepared.train):
        return ["streamed", *itertools.islice(prepared.train, 6)]
    return prepared.train.to_list()


def observe_rows(configuration, prepared):
    """What was laid out, how it is padded, and what the model is."""
    trainer = build_trainer(prepared, RunFlags())
    seen = {
        "train": train_rows(prepared),
        "meanwhile": {name: rows.to_list() for name, rows in prepared.during_training.items()},
        "batch": {
            name: tuple(t.shape)
            for name, t in trainer.data_collator(list(itertools.islice(prepared.train, 2))).items()
        },
        "model": (weights_of(prepared.model), prepared.model.config._attn_implementation),
        "files": sorted(path.name for path in Path(prepared.args.output_dir).rglob("*") if path.is_file()),
    }
    if "test" in prepared.splits:
        view, positions = configuration.data.eval_views[0], prepared.config.max_position_embeddings
        given = (prepared.splits["test"], prepared.tokenizer, configuration, view, positions)
        seen["test"] = prepare_evaluation(*given, split="test").to_list()
    return seen


def observe_step(configuration, prepared):
    """As above, and what one step and one evaluation did."""
    seen = observe_rows(configuration, prepared)
    trainer = build_trainer(prepared, RunFlags())
    trainer.remove_callback(LossCurve)  # drawing would take most of the time
    with Operations() as operations:
        trainer.train()
        figures = trainer.evaluate()
    unsteady = ("_runtime", "_per_second", "_time")
    adapters = {name: str(config) for name, config in getattr(trainer.model, "peft_config", {}).items()}
    lines = [row for each in trainer.evaluations.values() for row in each.lines()]
    return seen | {
        "figures": {name: value for name, value in figures.items() if not name.endswith(unsteady)},
        "operations": operations.seen,
        "after": weights_of(trainer.model),
        "steps": trainer.state.global_step,
        "lines": [{**line, "seconds": None} for line in lines],
        "adapters": adapters,
    }


def observe(blocks, how):
    """What a run of these blocks does, or the error that it ends in."""
    try:
        configuration = from_dict(blocks)
        args = training_arguments(configuration)
        return how(configuration, prepare(configuration, args, RunFlags()))
    except ConfigurationError as error:
        return str(error)
    except ValueError as error:
        if not any(name in str(error) for name in ("max_bytes", "index_parameters")):
            raise
        return str(error)


def differs(folder, tmp_path, base, block, changes, how, **kind):
    """Whether a run of `base` does something else with `changes` in `block`; `base` itself is no error."""
    before = blocks_of(folder, tmp_path / "before", **kind, **base)
    changed = {**base, block: changes if isinstance(changes, list) else {**base.get(block, {}), **changes}}
    after = blocks_of(folder, tmp_path / "after", **kind, **changed)
    first = observe_once(json.dumps([before, how.__name__]).replace(str(tmp_path), "out"), before, how)
    assert not isinstance(first, str), first
    return observe(after, how) != first


OBSERVED = {}


def observe_once(key, blocks, how):
    """What was observed of the same blocks before, but for their output folder, is not run again."""
    if key not in OBSERVED:
        OBSERVED[key] = observe(blocks, how)
    return OBSERVED[key]


CHUNKED = {"train_view": "chunked", "chunk_size": 24}
NAMED = {"train": None, "validation": None, "test": None, "dataset": "named"}
DATA = {
    # field: (what else the block says, the changed value, whether the model is causal)
    "train": ({}, "other-train.jsonl"),
    "validation": ({}, "other-validation.jsonl"),
    "test": ({}, "other-test.jsonl"),
    "dataset": ({**NAMED, "dataset": "renamed"}, "renamed/inside"),
    "config": ({**NAMED, "config": "train", "splits": {"validation": "train"}}, "other-train"),
    "data_dir": ({**NAMED, "dataset": "renamed"}, "inside"),
    "streaming": ({}, True),
    "shuffle_buffer": ({"streaming": True}, 2),
    "splits": ({**NAMED, "dataset": "renamed"}, {"validation": "test"}),
    "source_column": ({}, "other"),
    "target_column": ({}, "short"),
    "prefix_column": ({}, "question"),
    "id_column": ({}, None),
    "messages_column": ({}, "messages", True),
    "train_on_all_references": ({"target_column": "several"}, True),
    "source_prefix": ({}, "Read: "),
    "source_suffix": ({}, " Answer:"),
    "max_source_length": ({}, 8),
    "eval_max_source_length": ({}, 8),
    "max_prefix_length": ({"prefix_column": "question"}, 2),
    "max_target_length": ({}, 4),
    "eval_max_target_length": ({}, 4),
    "pad_to_multiple_of": ({}, 9),
    "max_train_samples": ({}, 3),
    "max_eval_samples": ({}, 3),
    "max_test_samples": ({}, 2),
    "sample_seed": ({"max_train_samples": 3}, 1),
    "test_slice": ({}, [1, None]),
    "merge_duplicates": ({}, False),
    "eval_during_training": ({}, 1),
    "train_view": ({}, "oracle"),
    "chunk_size": (CHUNKED, 16),
    "chunk_overlap": (CHUNKED, 4),
    "min_chunk_tokens": ({**CHUNKED, "min_chunk_tokens": 0}, 20),
    "capture_raw_text": (CHUNKED, True),
    "packing": ({}, True, True),
    "eval_views": ({}, ["context"]),
    "scored_tokens": ({"target_column": None}, 3, True),
    "on_too_long": ({"eval_max_source_length": 20}, "skip"),
    "on_empty_target": ({}, "skip"),
}
BY_SPY = {"revision", "num_proc", "overwrite_cache"}


def test_two_observations_of_one_run_are_equal(folder, tmp_path):
    for kind, memory in ((False, {"training": "random", "window": 16}), (True, {})):
        runs = [blocks_of(folder, tmp_path / f"{kind}{n}", causal=kind, memory=memory) for n in range(2)]
        assert observe(runs[0], observe_step) == observe(runs[1], observe_step)


def test_every_field_is_looked_at():
    assert DATA.keys() | BY_SPY == {each.name for each in fields(DataArguments)}
    assert MODEL.keys() | {"revision"} == {each.name for each in fields(ModelArguments)}
    assert ADAPTER.keys() == {each.name for each in fields(AdapterArguments)}
    assert MEMORY.keys() == {each.name for each in fields(UnlimiformerConfig)}
    blocks = {
        "model",
        "data",
        "memory",
        "retrieval",
        "graph",
        "adapter",
    }  # retrieval: tests/scripts/test_retrieval_run.py
    assert RUN.keys() | blocks == {each.name for each in fields(RunConfiguration)}
    inner = {"edges": EdgeTransformConfig, "sparse": SparseGraphConfig}
    inner |= {"adjacency": AdjacencyConfig, "latent": LatentConfig}
    of_graph = {each.name for each in fields(GraphArguments)} - inner.keys() - {"knowledge_graph"}
    of_graph |= {f"{name}.{each.name}" for name, owner in inner.items() for each in fields(owner)}
    assert GRAPH.keys() == of_graph
    assert KNOWLEDGE_GRAPH.keys() == {each.name for each in fields(KnowledgeGraphArguments)}


@pytest.mark.parametrize("field", DATA)
def test_a_field_of_data_acts(folder, tmp_path, field):
    options, value, *causal = DATA[field]
    if field == "on_empty_target":  # without it, such a row is an error
        runs = [
            observe(blocks_of(folder, tmp_path, data={"train": "holes.jsonl", **changes}), observe_rows)
            for changes in ({}, {field: value})
        ]
        assert "empty target" in runs[0]
        assert len(runs[1]["train"]) == 2
        return
    base = {"data": options}
    if field == "shuffle_buffer":
        base["training"] = {"train_sampling_strategy": "random"}
    assert differs(folder, tmp_path, base, "data", {field: value}, observe_rows, causal=bool(causal))


@pytest.mark.parametrize("field", ["num_proc", "overwrite_cache"])
def test_a_field_of_mapping_acts(folder, tmp_path, field, monkeypatch):
    given = []
    original = data_module.Dataset.map
    known = {"num_proc": "num_proc", "overwrite_cache": "load_from_cache_file"}[field]

    def map_and_tell(rows, *args, **options):
        given.append(options.get(known))
        return original(rows, *args, **options | {"num_proc": None})

    monkeypatch.setattr(data_module.Dataset, "map", map_and_tell)
    write_rows(folder / "many.jsonl", [row for n in range(12) for row in rows_of(f"many-{n}", 6)])
    value = {"num_proc": 2, "overwrite_cache": True}[field]
    for changes in ({}, {field: value}):
        observe(blocks_of(folder, tmp_path / "run", data={"train": "many.jsonl", **changes}), observe_rows)
        given.append("|")
    first, second = given[: given.index("|")], given[given.index("|") + 1 : -1]
    assert first != second


def test_revisions_reach_what_loads(folder, tmp_path, monkeypatch):
    asked = {}

    def stop(*args, **options):
        asked["data"] = options["revision"]
        raise OSError("asked")

    monkeypatch.setattr(splits, "load_dataset", stop)
    blocks = blocks_of(folder, tmp_path, data=NAMED | {"revision": "abc"})
    assert "asked" in observe(blocks, observe_rows)
    model = from_dict(blocks_of(folder, tmp_path, model={"revision": "def"})).model
    for name in ("AutoConfig", "AutoTokenizer"):
        original = getattr(loading, name).from_pretrained
        monkeypatch.setattr(
            getattr(loading, name),
            "from_pretrained",
            lambda *args, _name=name, _original=original, **options: (
                asked.update({_name: options["revision"]}) or _original(*args, **options)
            ),
        )
    auto = loading._AUTO_CLASSES["seq2seq"]
    original = auto.from_pretrained

    def load(*args, **options):
        asked["weights"] = options["revision"]
        return original(*args, **options)

    monkeypatch.setattr(auto, "from_pretrained", load)
    config = load_config(model)
    load_tokenizer(model, config, tmp_path, [])
    load_model(model, config)
    assert asked == {"data": "abc", "AutoConfig": "def", "AutoTokenizer": "def", "weights": "def"}


MODEL = {
    "task": ({}, "causal"),
    "name": ({}, "bart-two"),
    "from_config": ({}, True),
    "config": ({"from_config": True}, "relu"),
    "tokenizer": ({}, "unigram"),
    "config_overrides": ({}, {"scale_embedding": True}),
    "dtype": ({}, "bfloat16"),
    "attn_implementation": ({}, "eager"),
}


@pytest.mark.parametrize("field", MODEL)
def test_a_field_of_model_acts(folder, tmp_path, field):
    options, value = MODEL[field]
    how = observe_step if field in ("config", "config_overrides") else observe_rows
    assert differs(folder, tmp_path, {"model": options}, "model", {field: value}, how)


ADAPTER = {
    "type": ({}, "sparse_gin"),
    "options": ({"type": "sparse_gin"}, {"rank": 4}),
    "r": ({}, 2),
    "alpha": ({}, 3),
    "dropout": ({}, 0.5),
    "target_modules": ({}, ["q_proj"]),
    "base_model": ({}, "someone/base"),
}


@pytest.mark.slow
@pytest.mark.parametrize("field", ADAPTER)
def test_a_field_of_adapter_acts(folder, tmp_path, field):
    options, value = ADAPTER[field]
    base = {"adapter": options, "training": {"eval_strategy": "no"}}
    assert differs(folder, tmp_path, base, "adapter", {field: value}, observe_step, causal=True)


FULL = {"eval_views": ["full"], "max_target_length": 12}
MEMORY = {
    # field: (what else the block says, the changed value, the model)
    "keys_per_query": ({}, 2, "bart"),
    "window": ({}, 16, "bart"),
    "overlap": ({"window": 16}, 0.25, "bart"),
    "store": ({}, "keys_values", "bart"),
    "first_layer": ({}, 1, "bart"),
    "last_layer": ({}, 1, "bart"),
    "heads": ({}, [1], "bart"),
    "exclude_window": ({}, True, "bart"),
    "first_step": ({}, "window", "bart"),
    "positions": ({}, "origin", "llama"),
    "local_tokens": ({"local_tokens": 8}, 16, "llama"),
    "sinks": ({"keys_per_query": 3}, 2, "llama"),
    "reserve": ({"reserve": 40}, 50, "gpt2"),
    "memory_dtype": ({}, "bfloat16", "bart"),
    "windows_per_batch": ({"window": 16}, 1, "bart"),
    "max_bytes": ({}, 10, "bart"),
    "index": ({"keys_per_query": 3}, "flat", "bart"),
    "index_parameters": ({"keys_per_query": 3, "index": "hnsw"}, {"probes": 1}, "bart"),  # refused when it is read
    "index_recall": ({"keys_per_query": 3, "index": "flat"}, 0.9, "bart"),  # refused: "flat" always reads all
    "index_refine": ({"keys_per_query": 3, "index": "flat"}, 2, "bart"),
    "training": ({"window": 16}, "retrieval", "bart"),
    "memory_gradient": ({"training": "retrieval", "window": 16}, True, "llama"),
}


@pytest.mark.slow
@pytest.mark.parametrize("field", MEMORY)
def test_a_field_of_memory_acts(folder, tmp_path, field):
    options, value, model = MEMORY[field]
    causal = model != "bart"
    local = {"local_tokens": 8, "window": 24} if model == "llama" else {"local_tokens": 8} if causal else {}
    base = {"memory": {**local, **options}, "data": FULL, "model": {"name": model}}
    assert differs(folder, tmp_path, base, "memory", {field: value}, observe_step, causal=causal)


GENERATES = {"predict_with_generate": True}
STOPS = {"max_steps": 3, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
STOPS |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_truncated_loss", "learning_rate": 0.01}
RUN = {
    "training": ({}, {"learning_rate": 0.1}),
    "generation": ({"training": GENERATES}, {"min_new_tokens": 6, "max_new_tokens": 6}),
    "metrics": ({"training": GENERATES, "generation": {"max_new_tokens": 3}}, ["f1"]),
    "early_stopping_patience": ({"training": STOPS}, 1),
    "early_stopping_threshold": ({"training": STOPS | {"early_stopping_patience": 1}}, 9.0),
}


@pytest.mark.slow
@pytest.mark.parametrize("field", RUN)
def test_a_block_of_the_run_acts(folder, tmp_path, field):
    base, value = RUN[field]
    block = "training" if field.startswith("early") else field
    if field == "early_stopping_patience":  # 1 alone would change nothing while the loss falls
        base = {"training": base["training"] | {"early_stopping_threshold": 9.0}}
    changes = {field: value} if field.startswith("early") else value
    assert differs(folder, tmp_path, base, block, changes, observe_step)


GIN, PNA, STOCK = ({"attention": kind} for kind in ("gin", "pna", "llama"))
CG = {"attention": "cg", "latent.tokens_per_latent": [4, 8]}
RELU = {"attention": "gin", "edges.transform": "relu"}
NETWORK = {**STOCK, "sparse.rank": 4, "sparse.scale_first": 0.5, "adjacency.cutoff": 0.5}
GCN, AGGREGATES, HEADS = ({**NETWORK, "sparse.layer": "gcn"}, {**NETWORK, "sparse.layer": "pna"}, {**NETWORK})
HEADS["sparse.per_head"] = True
GRAPH = {
    # field: (what else the block says, the changed value)
    "train": (GIN, ["mlp"]),
    "attention": (GIN, "pna"),
    "layers": (GIN, [1]),
    "mlp_ratio": (GIN, 1.0),
    "mlp_dropout": (GIN, 0.4),
    "scores": (GIN, "mlp"),
    "scoring_width": ({**GIN, "scores": "mlp"}, 8),
    "normalisation": (GIN, "relu"),
    "differential": (GIN, True),
    "differential_norm": ({**GIN, "differential": True}, True),
    "base_attention": (GIN, True),
    "scale": ({**GIN, "base_attention": True}, 0.5),
    "sharpening": (GIN, None),
    "temperature": (GIN, 2.0),
    "output_projection": (GIN, True),
    "residual_mean": (PNA, True),
    "aggregates": (PNA, "sum"),
    "placement": (NETWORK, "parallel"),
    "shares_scores": (NETWORK, True),
    "mlp": (STOCK, "halfway_gin"),
    "mlp_message_scale": ({**STOCK, "mlp": "halfway_gin"}, 0.5),
    "block_bytes": ({**GIN, "edges.transform": "relu"}, 256),
    "edges.transform": (GIN, "relu"),
    "edges.threshold": (RELU, 0.01),
    "edges.trains_threshold": (RELU, True),
    "edges.steepness": ({**GIN, "edges.transform": "sigmoid"}, 2.0),
    "edges.binary_weight": ({**GIN, "edges.transform": "silu+binary", "edges.threshold": 0.01}, 3.0),
    "edges.fraction": ({**GIN, "edges.transform": "top_k"}, 0.5),
    "edges.straight_through": ({**GIN, "edges.transform": "top_k"}, True),
    "latent.tokens_per_latent": (CG, [2, 3]),
    "latent.num_layers": (CG, 2),
    "latent.skip": (CG, True),
    "latent.projects": (CG, False),
    "latent.mix": ({**CG, "attention": "cg_interpolate"}, 0.2),
    "adjacency.combine": (NETWORK, "any"),
    "adjacency.temperature": ({**NETWORK, "adjacency.combine": "any"}, 0.5),
    "adjacency.learned_activation": ({**NETWORK, "adjacency.combine": "learned"}, "sigmoid"),
    "adjacency.learned_width": ({**NETWORK, "adjacency.combine": "learned"}, 8),
    "adjacency.distance": (NETWORK, "near"),
    "adjacency.distance_strength": ({**NETWORK, "adjacency.distance": "near"}, 2.0),
    "adjacency.sharpness": (NETWORK, 3.0),
    "adjacency.threshold": (NETWORK, 0.2),
    "adjacency.cutoff": (NETWORK, None),
    "adjacency.self_loops": (NETWORK, False),
    "adjacency.normalises_rows": (NETWORK, True),
    "sparse.layer": (NETWORK, "gcn"),
    "sparse.rank": (NETWORK, 8),
    "sparse.num_layers": (NETWORK, 2),
    "sparse.per_head": (NETWORK, True),
    "sparse.mixes_heads": (HEADS, True),
    "sparse.mlp": (NETWORK, False),
    "sparse.mlp_norm": (NETWORK, "none"),
    "sparse.mlp_ratio": (NETWORK, 2.0),
    "sparse.one_plus": (NETWORK, True),
    "sparse.weighted_edges": (NETWORK, False),
    "sparse.normalises_degree": (GCN, True),
    "sparse.aggregators": (AGGREGATES, ["mean"]),
    "sparse.scalers": (AGGREGATES, ["identity"]),
    "sparse.log_degree": (AGGREGATES, 1.0),
    "sparse.towers": (AGGREGATES, 2),
    "sparse.activation": (NETWORK, "gelu"),
    "sparse.dropout": (NETWORK, 0.4),
    "sparse.residual": (NETWORK, False),
    "sparse.normalises": (NETWORK, False),
    "sparse.matches_scale": (NETWORK, True),
    "sparse.reads": (NETWORK, "normed_input"),
    "sparse.storage": (NETWORK, "sparse"),
    "sparse.scale_first": (NETWORK, 1.0),
    "sparse.scale_last": (NETWORK, 1.0),
}


NAMED_ENTITIES = {"extractor": "gazetteer:names.txt", "chunk_size": 6}
KNOWLEDGE_GRAPH = {
    # field: (what else it says, the changed value)
    "folder": ({}, "entities"),
    "extractor": (NAMED_ENTITIES, "gazetteer:other-names.txt"),
    "chunk_size": (NAMED_ENTITIES, 8),
    "chunk_neighbours": (NAMED_ENTITIES, 1),
    "own": (NAMED_ENTITIES, 0.5),
    "causal": (NAMED_ENTITIES, False),
}


def write_names_and_graph(folder):
    (folder / "names.txt").write_text("cat\ndog\nmodel\nnumber\ntext\n")
    (folder / "other-names.txt").write_text("answers\nreads\n")
    rows = [row for split, n in (("train", 6), ("validation", 4)) for row in rows_of(split, n)]
    texts = [chunk for row in rows for chunk in chunks_of_text(row["other"], row["source"], 50)]
    build_knowledge_graph(texts, folder / "entities", ExtractorChoice("capitalised"))


@pytest.mark.parametrize("field", KNOWLEDGE_GRAPH)
def test_a_field_of_the_knowledge_graph_acts(folder, tmp_path, field):
    pytest.importorskip("networkx")
    if not (folder / "entities").exists():
        write_names_and_graph(folder)
    options, value = KNOWLEDGE_GRAPH[field]

    def there(given):
        paths = {"extractor": "gazetteer:" + str(folder / str(given.get("extractor")).removeprefix("gazetteer:"))}
        paths["folder"] = str(folder / str(given.get("folder")))
        return given | {name: paths[name] for name in given.keys() & paths.keys()}

    data = {"id_column": "other", "target_column": None, "test": None, "scored_tokens": 8, "eval_views": ["context"]}
    base = {"data": data, "graph": {**nested(NETWORK), "knowledge_graph": there(options)}}
    assert differs(
        folder,
        tmp_path,
        base,
        "graph",
        {"knowledge_graph": there({**options, field: value})},
        observe_rows,
        causal=True,
    )


def nested(options):
    """{"edges.transform": "relu"} as {"edges": {"transform": "relu"}}."""
    blocks = {}
    for name, value in options.items():
        block, _, field = name.rpartition(".")
        if block:
            blocks.setdefault(block, {})[field] = value
        else:
            blocks[field] = value
    return blocks


def observe_graph(folder, options):
    """Parameters, loss, gradients and operations of one forward and backward of a Llama with these graph layers."""
    blocks = blocks_of(folder, folder / "out", causal=True, graph=nested(options), model={"from_config": True})
    configuration = from_dict(blocks)
    torch.manual_seed(0)
    config = with_graph(load_config(configuration.model), configuration.graph)
    model = load_model(configuration.model, config).train()
    train_graph(model, configuration.graph)
    ids = torch.randint(3, 300, (2, 9), generator=torch.Generator().manual_seed(1))
    with Operations() as operations:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
    gradients = [None if p.grad is None else p.grad.flatten().tolist() for p in model.parameters()]
    return weights_of(model), loss.item(), gradients, operations.seen


@pytest.mark.parametrize("field", GRAPH)
def test_a_field_of_graph_acts(folder, field):
    options, value = GRAPH[field]
    assert observe_graph(folder, {**options, field: value}) != observe_graph(folder, options)
