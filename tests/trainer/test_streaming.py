"""A stream of training rows gives the rows and batches that the same files give when they are loaded whole."""

import itertools
import json

import pytest
import torch
from datasets import Dataset, DatasetDict
from transformers import BartConfig, BartForConditionalGeneration, LlamaConfig, LlamaForCausalLM

from graft.trainer.config_file import from_dict
from graft.trainer.configuration_error import ConfigurationError
from graft.trainer.data import load_splits, prepare_training
from graft.trainer.streamed_rows import is_streamed
from graft.trainer.training_run import RunFlags, build_trainer, prepare, training_arguments

NOUNS = ("cat", "dog", "model")
ROWS = [
    {
        "name": f"row {n}",
        "text": " ".join(
            f"The {NOUNS[(n + i) % 3]} number {i} reads a long text, then answers." for i in range(1 + n % 5)
        ),
        "answer": f"cat {n}",
        "several": [f"cat {n}", f"dog {n}"],
        "question": f"who reads text {n}?" if n % 2 else "",
    }
    for n in range(70)  # more than one batch of a map
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizers):
    folder = tmp_path_factory.mktemp("streams")
    for number, rows in enumerate((ROWS[:30], ROWS[30:])):
        (folder / f"train-{number}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[:4]))
    sizes = {"vocab_size": 320, "max_position_embeddings": 64}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    bart = BartConfig(**sizes, **heads, d_model=16, encoder_layers=1, decoder_layers=1)
    llama = LlamaConfig(**sizes, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    torch.manual_seed(0)
    for name, model in (("bart", BartForConditionalGeneration(bart)), ("llama", LlamaForCausalLM(llama))):
        model.save_pretrained(folder / name)
        tokenizers["byte_level"].save_pretrained(folder / name)
    return folder


def blocks_of(folder, output, streaming, causal=False, training=(), **data):
    named = {"train": str(folder / "train-*.jsonl"), "validation": str(folder / "validation.jsonl")}
    named |= {"source_column": "text", "target_column": "answer", "id_column": "name", "max_target_length": 8}
    model = {"task": "causal", "name": str(folder / "llama")} if causal else {}
    stock = {"output_dir": str(output), "max_steps": 4, "use_cpu": True, "per_device_train_batch_size": 7}
    stock |= {"train_sampling_strategy": "sequential", "disable_tqdm": True, "report_to": "none"}
    return {
        "model": model or {"task": "seq2seq", "name": str(folder / "bart")},
        "data": named | {"streaming": streaming} | data,
        "training": stock | dict(training),
    }


KINDS = {
    # what the block `data` says, whether the model is causal
    "seq2seq": ({}, False),
    "cut": ({"max_source_length": 12}, False),
    "left out where too long": ({"max_source_length": 40, "on_too_long": "skip"}, False),
    "each reference": ({"target_column": "several", "train_on_all_references": True}, False),
    "prefixes": ({"prefix_column": "question", "source_prefix": "Read: "}, False),
    "chunked": ({"train_view": "chunked", "chunk_size": 24, "chunk_overlap": 3}, False),
    "oracle": ({"train_view": "oracle", "max_source_length": 30}, False),
    "first rows": ({"max_train_samples": 33}, False),
    "prompts": ({}, True),
    "text": ({"target_column": None, "max_source_length": 20}, True),
    "chunked text": ({"target_column": None, "train_view": "chunked", "chunk_size": 24}, True),
    "packed": ({"packing": True}, True),
    "packed text": ({"target_column": None, "packing": True}, True),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_has_the_rows_of_the_loaded_files(folder, tmp_path, tokenizers, kind):
    options, causal = KINDS[kind]
    prepared = []
    for streaming in (False, True):
        configuration = from_dict(blocks_of(folder, tmp_path, streaming, causal, **options))
        rows = load_splits(configuration.data)["train"]
        prepared.append(prepare_training(rows, tokenizers["byte_level"], configuration, 64))
    assert [is_streamed(rows) for rows in prepared] == [False, True]
    assert list(prepared[1]) == prepared[0].to_list()
    assert list(prepared[1]) == prepared[0].to_list(), "a second pass gives the same"


def test_a_data_set_on_disk_and_its_files_stream_alike(folder, tmp_path, tokenizers):
    saved = {"train": Dataset.from_list(ROWS), "validation": Dataset.from_list(ROWS[:4])}
    DatasetDict(saved).save_to_disk(str(tmp_path / "saved"))
    rows = []
    for data in ({"dataset": str(tmp_path / "saved")}, {"dataset": str(folder)}):
        configuration = from_dict(blocks_of(folder, tmp_path / "out", True, train=None, validation=None, **data))
        splits = load_splits(configuration.data)
        assert is_streamed(splits["train"])
        assert splits["validation"].to_list() == ROWS[:4], "rows to evaluate are loaded"
        rows.append(list(prepare_training(splits["train"], tokenizers["byte_level"], configuration, 64)))
    assert rows[0] == rows[1]
    assert len(rows[0]) == len(ROWS)


def batches_of(blocks, count):
    configuration = from_dict(blocks)
    trainer = build_trainer(prepare(configuration, training_arguments(configuration), RunFlags()), RunFlags())
    loader = trainer.get_train_dataloader()
    passes = itertools.chain.from_iterable(itertools.repeat(loader))  # an epoch after another, as `train` does
    return list(itertools.islice(passes, count))


def test_a_stream_in_order_gives_the_same_batches_over_three_passes(folder, tmp_path):
    loaded, streamed = (batches_of(blocks_of(folder, tmp_path, streaming), 30) for streaming in (False, True))
    for one, other in zip(loaded, streamed, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


def labels_of(batches):
    return [tuple(row[row != -100].tolist()) for batch in batches for row in batch["labels"]]


def test_a_shuffled_stream_gives_every_row_of_a_pass_once_in_an_order_that_the_seed_sets(folder, tmp_path):
    random = {"train_sampling_strategy": "random"}
    orders = {}
    for name, seed in (("one", 1), ("again", 1), ("other", 2)):
        training = random | {"data_seed": seed}
        # A buffer of a whole pass, and one more that begins: what is drawn first is from the first pass alone.
        blocks = blocks_of(folder, tmp_path, True, training=training, shuffle_buffer=70)
        orders[name] = labels_of(batches_of(blocks, 5))
    straight = labels_of(batches_of(blocks_of(folder, tmp_path, True), 10))
    assert orders["one"] == orders["again"]
    assert orders["one"] != orders["other"]
    assert len(set(orders["one"])) == 35
    assert set(orders["one"]) < set(straight)
    assert orders["one"] != straight[:35]


REFUSED = {
    # what the blocks say, what the error names
    "no steps": ({}, {"max_steps": -1}, "needs `training.max_steps`"),
    "by length": ({}, {"train_sampling_strategy": "group_by_length"}, "'group_by_length', which needs the lengths"),
    "epochs": ({}, {"save_strategy": "epoch"}, "`training.save_strategy` 'epoch'"),
    "drawn rows": ({"max_train_samples": 3, "sample_seed": 1}, {}, "`data.sample_seed`"),
    "captured": ({"capture_raw_text": True, "train_view": "chunked"}, {}, "`data.capture_raw_text`"),
    "two views": ({"train_view": "oracle_and_truncated"}, {}, "'oracle_and_truncated'"),
    "error": ({"on_too_long": "error"}, {}, "`data.on_too_long` 'error'"),
    "dispatched": ({}, {"accelerator_config": {"dispatch_batches": True}}, "dispatch_batches"),
    "a file": ({}, {"accelerator_config": "accelerate.json"}, "'accelerate.json'"),
    "nothing to train on": ({"train": None}, {}, "name `data.train`"),
    "no shuffling": ({"shuffle_buffer": 5}, {}, "`data.shuffle_buffer` would do nothing"),
    "no stream": ({"streaming": False, "shuffle_buffer": 5}, {}, "`data.shuffle_buffer` would do nothing"),
    "empty buffer": ({"shuffle_buffer": 0}, {}, "shuffle_buffer` must be at least 1, got 0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_stream_cannot_do_is_refused_by_name(folder, tmp_path, case):
    data, training, message = REFUSED[case]
    with pytest.raises(ConfigurationError, match=message):
        from_dict(blocks_of(folder, tmp_path, **{"streaming": True, "training": training} | data))


def test_retrieval_is_refused(folder, tmp_path):
    blocks = blocks_of(
        folder, tmp_path, True, causal=True, target_column="target", source_column="source", id_column=None
    )
    with pytest.raises(ConfigurationError, match="`data.streaming` would do nothing: with the block `retrieval`"):
        from_dict(blocks | {"retrieval": {}})


def test_mistakes_in_a_streamed_file_are_named(folder, tmp_path, tokenizers):
    def prepared(**data):
        configuration = from_dict(blocks_of(folder, tmp_path, True, **data))
        return prepare_training(load_splits(configuration.data)["train"], tokenizers["byte_level"], configuration, 64)

    with pytest.raises(
        ConfigurationError, match=r"The split train has no column 'summary'; it has name, text, answer"
    ):
        prepared(target_column="summary")
    with pytest.raises(ConfigurationError, match="leaves no|must exceed"):
        prepared(max_source_length=2)
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ConfigurationError):
        prepared(train=str(tmp_path / "empty.jsonl"))
    (tmp_path / "broken.jsonl").write_text("{no json\n")
    with pytest.raises(ConfigurationError, match="`data.train` cannot be read as json"):
        prepared(train=str(tmp_path / "broken.jsonl"))
    (tmp_path / "holes.jsonl").write_text("".join(json.dumps({**row, "answer": ""}) + "\n" for row in ROWS[:3]))
    with pytest.raises(ConfigurationError, match="Row 0 .id 'row 0'. of the split train has an empty target"):
        prepared(train=str(tmp_path / "holes.jsonl"))
    with pytest.raises(ConfigurationError, match="No row of the split train is left"):
        prepared(train=str(tmp_path / "holes.jsonl"), on_empty_target="skip")


def test_a_knowledge_graph_is_refused(folder, tmp_path):
    blocks = blocks_of(folder, tmp_path, True, causal=True)
    with pytest.raises(ConfigurationError, match="`data.streaming` does not go with `graph.knowledge_graph`"):
        from_dict(blocks | {"graph": {"knowledge_graph": {}}})
