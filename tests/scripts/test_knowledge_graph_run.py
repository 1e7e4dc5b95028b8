"""`graph.knowledge_graph` of scripts/run.py: graphs of documents in training, evaluation and generation of a run."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from stranger import run_program, snippet_of
from transformers import AutoModelForCausalLM, AutoTokenizer

import graft.registration  # noqa: F401
from graft import ChunkGraph
from graft.graphs.knowledge_graph.chunk_weights import chunk_weights
from graft.graphs.knowledge_graph.document_entities import read_documents
from graft.modeling.graph.external_edges import TokenEdges, expand_chunks
from graft.scripts.build_knowledge_graph import main as build_graph
from graft.scripts.run import main
from graft.trainer.config_file import read_configuration
from graft.trainer.training_run import RunFlags, build_trainer, prepare, training_arguments

pytest.importorskip("networkx")
pytest.importorskip("rapidfuzz")

NAMES = ("Ada Lovelace", "Charles Babbage", "George Boole", "Mary Somerville", "Augustus De Morgan")
GIN = {"adapter": {"type": "sparse_gin", "options": {"rank": 4, "scale_first": 0.5, "dropout": 0.0}}}
LLAMA = {"attention": "llama", "sparse": {"rank": 4, "scale_first": 0.5, "dropout": 0.0}}
MADE = {"extractor": "capitalised", "chunk_size": 8}
READERS = {"sparse_gin": (GIN, {}), "graph Llama": ({}, LLAMA)}
"""Other blocks of the run, and what the block `graph` says beside the knowledge graph."""


def story(number: int, sentences: int = 6) -> str:
    """Sentences about two people each; who is named when differs between documents."""
    pairs = [(NAMES[(number + step) % 5], NAMES[(2 * number + step * step) % 5]) for step in range(sentences)]
    return " ".join(f"In {number + step} then {one} met {other}." for step, (one, other) in enumerate(pairs))


def write_documents(folder: Path) -> None:
    for split, count, shift in (("train", 6, 0), ("validation", 4, 20), ("test", 2, 40)):
        rows = [
            {"name": f"{split} {n}", "body": story(shift + n, 4 + n % 3), "answer": f"So {NAMES[n % 5]} won."}
            for n in range(count)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def make_graph_run(make_run, tmp_path, write_short_run):
    """A function that writes model, documents and a configuration with these blocks changed."""

    def write(knowledge=None, graph=None, **changes) -> str:
        make_run("causal")
        write_documents(tmp_path)
        data = {name: str(tmp_path / f"{name}.jsonl") for name in ("train", "validation", "test")}
        data |= {"source_column": "body", "target_column": None, "id_column": "name"}
        data |= {"max_source_length": 32, "eval_max_source_length": 96, "scored_tokens": 24}
        blocks = {
            "model": {"task": "causal", "name": str(tmp_path / "model")},
            "data": data,
            "graph": {**(graph or {}), "knowledge_graph": MADE if knowledge is None else knowledge},
            "training": {"per_device_eval_batch_size": 3},
        }  # fmt: skip
        return write_short_run(blocks, changes)

    return write


def prepared_trainer(config: str, *options: str):
    configuration = read_configuration([config], options)
    prepared = prepare(configuration, training_arguments(configuration), RunFlags())
    return prepared, build_trainer(prepared, RunFlags())


def naive_graph(text: str, tokens: slice, document, tokenizer, neighbours: int = 4):
    """Of some tokens of a text, by loops: the chunk each is in, and what chunk reads what."""
    offsets = tokenizer(text, return_offsets_mapping=True, return_special_tokens_mask=True)
    places = list(zip(offsets["offset_mapping"], offsets["special_tokens_mask"], strict=True))[tokens]
    chunks, last = [], -1
    for (start, _), special in places:
        if not special:
            last = max(number for number, first in enumerate(document.starts) if first <= start)
        chunks.append(last)
    first = min(chunk for chunk in chunks if chunk >= 0)
    weights = chunk_weights(document.sentences, neighbours, first=first)[first : last + 1, first : last + 1]
    return [chunk - first if chunk >= 0 else -1 for chunk in chunks], weights


def naive_losses(model, ids, chunks, weights) -> torch.Tensor:
    """Losses of one unpadded row whose graph is written out token by token, in float64."""
    graph = ChunkGraph(torch.tensor([chunks]), torch.from_numpy(np.ascontiguousarray(weights))[None].double())
    dense = expand_chunks(graph)[0]
    edges = dense.nonzero()
    index = torch.cat([torch.zeros(len(edges), 1, dtype=torch.long), edges], dim=1)
    ids = torch.tensor([ids])
    with torch.no_grad():
        logits = model(input_ids=ids, graph=TokenEdges(index, dense[edges[:, 0], edges[:, 1]]), use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="none")


def loaded(out: Path, base: Path):
    """What the run saved, in float64."""
    if (out / "adapter_config.json").is_file():
        return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), out).double().eval()
    return AutoModelForCausalLM.from_pretrained(out).double().eval()


@pytest.mark.parametrize("reader", READERS)
def test_losses_of_a_run_are_those_of_graphs_written_out_by_hand(make_graph_run, tmp_path, reader):
    blocks, graph = READERS[reader]
    assert main([make_graph_run(graph=graph, **blocks)]) == 0
    out = tmp_path / "out"
    results = json.loads((out / "run.json").read_text())["results"]
    model, tokenizer = loaded(out, tmp_path / "model"), AutoTokenizer.from_pretrained(tmp_path / "model")
    documents = read_documents(out / "knowledge_graph" / "validation")
    losses, without = [], []
    for row in map(json.loads, (tmp_path / "validation.jsonl").read_text().splitlines()):
        ids = tokenizer(row["body"])["input_ids"][:96]
        chunks, weights = naive_graph(row["body"], slice(len(ids)), documents[row["name"]], tokenizer)
        losses.append(naive_losses(model, ids, chunks, weights)[-24:])
        without.append(naive_losses(model, ids, chunks, np.zeros_like(weights))[-24:])
    assert results["eval_context_loss"] == pytest.approx(float(torch.cat(losses).mean()), rel=2e-5)
    assert results["eval_without_graph_loss"] == pytest.approx(float(torch.cat(without).mean()), rel=2e-5)
    assert len({round(results[f"eval_{v}_loss"], 6) for v in ("context", "shuffled_graph", "without_graph")}) == 3


@pytest.mark.parametrize("reader", READERS)
def test_a_training_loss_is_that_of_its_rows_one_by_one_whatever_the_padding(make_graph_run, tmp_path, reader):
    blocks, graph = READERS[reader]
    config = make_graph_run(graph=graph, **blocks)
    prepared, trainer = prepared_trainer(config, "--data.pad_to_multiple_of", "7")
    model, tokenizer = trainer.model.double().train(), prepared.tokenizer
    texts = {row["name"]: row["body"] for row in map(json.loads, (tmp_path / "train.jsonl").read_text().splitlines())}
    documents = read_documents(tmp_path / "out" / "knowledge_graph" / "train")
    rows = [prepared.train[number] for number in range(len(prepared.train))]
    seen, expected = {}, []
    for row in rows:
        start = seen.get(row["id"], 0)
        seen[row["id"]] = start + len(row["input_ids"])
        tokens = slice(start, start + len(row["input_ids"]))
        chunks, weights = naive_graph(texts[row["id"]], tokens, documents[row["id"]], tokenizer)
        expected.append(naive_losses(model, row["input_ids"], chunks, weights))
    assert len(rows) > len(texts)  # some documents have several rows, the later ones with chunks out of sight
    for order in (range(len(rows)), reversed(range(len(rows)))):
        chosen = list(order)[:5]
        batch = trainer.data_collator([rows[number] for number in chosen])
        loss = trainer.compute_loss(model, batch).double()  # transformers takes logits to float32
        torch.testing.assert_close(
            loss, torch.cat([expected[number] for number in chosen]).mean(), atol=1e-6, rtol=1e-6
        )


def other_end(text):
    return text[:100] + " so Zoe Young met Yan Xu, "


@pytest.mark.parametrize("extractor", ["capitalised", "keyphrase"])
def test_no_token_knows_what_a_later_one_says(make_graph_run, tmp_path, extractor):
    """Change a document's end: the graphs and logits of every token before stay what they were, also at a border."""
    if extractor == "keyphrase":
        pytest.importorskip("yake")
    config = make_graph_run(MADE | {"extractor": extractor}, **GIN, data={"max_source_length": 96})
    logits, graphs, ids = [], [], []
    for name, change in (
        ("one", lambda text: text),
        ("other", other_end),
    ):
        rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
        (tmp_path / "changed.jsonl").write_text(json.dumps(rows[2] | {"body": change(rows[2]["body"])}) + "\n")
        changed = ["--data.train", str(tmp_path / "changed.jsonl"), "--training.output_dir", str(tmp_path / name)]
        _, trainer = prepared_trainer(config, *changed)
        batch = trainer.data_collator([trainer.train_dataset[0]])
        ids.append(batch["input_ids"][0])
        graphs.append((batch["chunk_ids"][0], batch["chunk_weights"][0]))
        with trainer.abilities[-1].training_inputs(trainer.model, batch, trainer.state) as inputs, torch.no_grad():
            logits.append(trainer.model.eval()(**inputs, use_cache=False).logits[0])
    shared = int((ids[0][: len(ids[1])] == ids[1][: len(ids[0])]).long().cumprod(0).sum())
    assert 24 < shared < min(map(len, ids))
    assert torch.equal(graphs[0][0][:shared], graphs[1][0][:shared])
    chunks = int(graphs[0][0][shared]) + 1
    assert torch.equal(graphs[0][1][:chunks, :chunks], graphs[1][1][:chunks, :chunks])
    assert graphs[0][1][:chunks, :chunks].tril(-1).any()
    torch.testing.assert_close(logits[0][:shared], logits[1][:shared], atol=1e-6, rtol=1e-6)
    assert not torch.equal(graphs[0][1][-1, :chunks], graphs[1][1][-1, :chunks])


def test_a_graph_that_is_named_is_that_of_its_chunks(make_graph_run, tmp_path):
    """Chunks by sentences, made by graft-knowledge-graph over one file of all documents."""
    config = make_graph_run({"folder": str(tmp_path / "graph"), "chunk_neighbours": 2}, **GIN)
    rows = [line for name in ("train", "validation", "test") for line in (tmp_path / f"{name}.jsonl").open()]
    texts = [{"id": row["name"], "text": row["body"]} for row in map(json.loads, rows)]
    (tmp_path / "all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    options = ["--out", str(tmp_path / "graph"), "--extractor", "capitalised", "--chunk-characters", "60"]
    assert build_graph([str(tmp_path / "all.jsonl"), *options]) == 0
    prepared, _ = prepared_trainer(config)
    assert not (tmp_path / "out" / "knowledge_graph").exists()
    documents = read_documents(tmp_path / "graph")
    for row, text in zip(prepared.during_training["context"], texts[6:10], strict=True):
        chunks, weights = naive_graph(
            text["text"], slice(len(row["input_ids"])), documents[text["id"]], prepared.tokenizer, neighbours=2
        )
        assert row["chunk_ids"] == chunks
        assert [len(each) for each in row["chunk_weights"]] == list(range(1, len(weights) + 1))
        for number, each in enumerate(row["chunk_weights"]):
            np.testing.assert_allclose(each, weights[number, : number + 1], atol=1e-7)
    assert prepared.graphs.report["validation_context"]["documents"] == 4
    assert 0 < prepared.graphs.report["validation_context"]["coverage"] <= 1


def test_a_resumed_run_equals_one_that_was_not_stopped(make_graph_run, tmp_path, losses_of, interrupt):
    config = make_graph_run(**GIN, training={"gradient_accumulation_steps": 2})
    assert main([config]) == 0
    out = tmp_path / "out"
    whole, weights = losses_of(out), load_file(out / "adapter_model.safetensors")
    made = (out / "knowledge_graph" / "train" / "chunks.parquet").stat().st_mtime_ns
    interrupt(out)
    assert main(["--resume", str(out)]) == 0
    assert losses_of(out) == whole
    again = load_file(out / "adapter_model.safetensors")
    assert all(again[name].equal(weight) for name, weight in weights.items())
    assert (out / "knowledge_graph" / "train" / "chunks.parquet").stat().st_mtime_ns == made  # what stands is kept


def test_accumulated_gradients_are_those_of_a_large_batch(make_graph_run, tmp_path, losses_of):
    steady = {"optim": "sgd", "learning_rate": 0.1, "train_sampling_strategy": "sequential", "eval_strategy": "no"}
    steady |= {"do_train": True, "max_grad_norm": 0.0}
    config = make_graph_run(**GIN, training=steady)
    assert main([config, "--training.per_device_train_batch_size", "4"]) == 0
    small = ["--training.gradient_accumulation_steps", "4", "--training.per_device_train_batch_size", "1"]
    assert main([config, *small, "--training.output_dir", str(tmp_path / "small")]) == 0
    assert losses_of(tmp_path / "small") == pytest.approx(losses_of(tmp_path / "out"), abs=1e-4)
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("out", "small"))
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, atol=1e-5, rtol=1e-4, msg=name)


def test_a_graph_is_read_while_it_generates_and_the_card_says_which(make_graph_run, tmp_path):
    answers = {"target_column": "answer", "source_prefix": "Who won? ", "source_suffix": " Answer:"}
    answers |= {"max_target_length": 12, "max_source_length": None, "eval_views": ["context", "without_graph"]}
    generating = {"predict_with_generate": True}
    config = make_graph_run(**GIN, data=answers, training=generating, generation={"max_new_tokens": 6})
    assert main([config]) == 0
    out = tmp_path / "out"
    record = json.loads((out / "run.json").read_text())
    assert {"train_truncated", "validation_context", "test_context"} <= set(record["knowledge_graph"])
    predictions = [json.loads(line) for line in (out / "predictions" / "test.jsonl").open()]
    assert [row["id"] for row in predictions] == ["test 0", "test 1"]
    model, tokenizer = loaded(out, tmp_path / "model"), AutoTokenizer.from_pretrained(out)
    documents = read_documents(out / "knowledge_graph" / "test")
    for row, line in zip(map(json.loads, (tmp_path / "test.jsonl").open()), predictions, strict=True):
        parts = [tokenizer(t, add_special_tokens=False)["input_ids"] for t in ("Who won? ", row["body"], " Answer:")]
        before = tokenizer("", add_special_tokens=True)["input_ids"][:1]
        chunks, weights = naive_graph(row["body"], slice(0, len(parts[1]) + 1), documents[row["name"]], tokenizer)
        assert chunks[0] == -1
        ids = [*before, *parts[0], *parts[1], *parts[2]]
        places = [-1] * (1 + len(parts[0])) + chunks[1:]
        places += [places[-1]] * len(parts[2])
        for _ in range(6):  # greedily, each token by a pass over all; generated ones are in the last chunk
            graph = ChunkGraph(torch.tensor([places]), torch.from_numpy(weights)[None].double())
            with torch.no_grad():
                token = int(model(torch.tensor([ids]), graph=graph, use_cache=False).logits[0, -1].argmax())
            ids, places = [*ids, token], [*places, places[-1]]
            if token == tokenizer.eos_token_id:
                break
        answer = ids[len(ids) - len(places) + len(before) + sum(map(len, parts)) :]
        assert line["prediction"] == tokenizer.decode(answer, skip_special_tokens=True).strip()
    card = (out / "README.md").read_text()
    assert "**Knowledge graph.**" in card
    assert "from chunks of 8 tokens, by the extractor `capitalised`" in card
    assert card.count("2501.02393") == 2  # in the words about the adapter, and cited once
    run_program(snippet_of(card))


def test_the_plan_shows_what_chunks_read_and_writes_nothing(make_graph_run, tmp_path, capsys):
    assert main([make_graph_run(**GIN), "--dry-run"]) == 0
    plan = capsys.readouterr().out
    assert "views      context, shuffled_graph, without_graph" in plan
    assert "chunk 0 (8 tokens) reads no earlier one" in plan
    assert re.search(r"chunk \d \(\d tokens\) reads \d \(\d\.\d\d\)", plan)
    assert "extractor='capitalised'" in plan
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--graph.knowledge_graph.chunk_sise", "4"], "`graph.knowledge_graph.chunk_sise` is unknown; did you mean"),
        (["--graph.knowledge_graph.chunk_size", "0"], "`graph.knowledge_graph.chunk_size` must be at least 1, got 0"),
        (["--graph.knowledge_graph.own", "-1"], "knowledge_graph.own` must be finite and at least 0, got -1"),
        (["--graph.knowledge_graph.causal", "perhaps"], "knowledge_graph.causal.*bool"),
        (["--graph.knowledge_graph.extractor", "spacy:en"], "extractor` must be 'keyphrase'.*got 'spacy:en'"),
        (["--graph.knowledge_graph.folder", "somewhere"], "chunk_size` would do nothing.*'somewhere'"),
        (["--graph.knowledge_graph.folder", '{"tran": "x"}'], r"maps train, validation and test.*\['tran'\]"),
        (["--graph.attention", "pna"], "'sparse_gin' keeps the layers of its base"),
        (["--no-adapter", "--adapter.type", "lora"], "`adapter.type` 'lora' reads no"),
        (["--no-graph", "--data.eval_views", "shuffled_graph"], "holds 'shuffled_graph'.*add `graph.knowledge_graph`"),
        (["--data.id_column", "null"], "`data.id_column` is null: name a column"),
        (["--data.messages_column", "chat"], "`data.messages_column` 'chat' holds chats"),
        (["--data.train_view", "chunked", "--data.max_source_length", "null"], "`data.train_view` 'chunked' does not"),
        (["--data.target_column", "answer", "--data.eval_views", "chunked"], "holds 'chunked', whose rows are single"),
        (["--data.packing", "true"], "`data.packing` does not go with the block `graph`"),
        (["--memory.window", "32"], "`graph` and `memory` exclude"),
        (["--model.task", "seq2seq", "--data.target_column", "answer"], "`model.task` must be 'causal'"),
        (["--graph.knowledge_graph.extractor", "gazetteer:absent.txt"], "`graph.knowledge_graph`.*absent.txt"),
        (["--graph.knowledge_graph.extractor", "keyphrase:xx"], "`graph.knowledge_graph`.*xx"),
    ],
)
def test_mistakes_are_one_line(make_graph_run, tmp_path, capsys, options, message):
    assert main([make_graph_run(**GIN), *options]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(message, said), said
    assert not (tmp_path / "out" / "run.json").exists()


@pytest.mark.parametrize(
    ("graph", "message"),
    [
        ({"mlp_ratio": 0.5}, "no reader: .*`gnn_config.sparse`, which is None. Set `graph.attention` 'llama'"),
        ({**LLAMA, "sparse": {"rank": 4, "layer": "pna"}}, "no reader: .*must be 'gin' or 'gcn', got 'pna'"),
    ],
)
def test_a_model_that_reads_no_graph_is_refused_before_a_text_is_read(
    make_graph_run, tmp_path, capsys, graph, message
):
    assert main([make_graph_run(graph=graph)]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(message, said), said
    assert not (tmp_path / "out").exists()


def test_a_graph_of_other_documents_is_refused(make_graph_run, tmp_path, capsys):
    folder = tmp_path / "graph"
    config = make_graph_run({"folder": {"train": str(folder), "validation": str(folder)}}, **GIN)

    def refused(*options: str) -> str:
        assert main([config, *options]) == 2
        assert not (tmp_path / "out" / "run.json").exists()
        return capsys.readouterr().err.strip().splitlines()[-1]

    assert re.search(r"folder` '.*graph': .* has no chunks.parquet: make it with graft-knowledge-graph", refused())
    options = ["--text-field", "body", "--extractor", "capitalised", "--out", str(folder)]
    assert build_graph([str(tmp_path / "train.jsonl"), *options]) == 0
    assert re.search("of other documents: it knows no 'train 0' of the split train, but '0', '1', '2'", refused())
    rows = [json.loads(line) for name in ("train", "validation") for line in (tmp_path / f"{name}.jsonl").open()]
    for changed in (False, True):
        lines = [{"id": row["name"], "text": row["body"] + " And?" * changed} for row in rows]
        (tmp_path / "all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
        assert build_graph([str(tmp_path / "all.jsonl"), "--extractor", "capitalised", "--out", str(folder)]) == 0
        if changed:
            assert re.search("its chunk 0 of 'train 0' does not stand in the text that the split train", refused())
        else:
            assert main([config, "--dry-run"]) == 2  # there is a test split, which the run predicts
            assert "names no folder for the split test" in capsys.readouterr().err
            assert main([config, "--data.test", "null", "--dry-run"]) == 0
    twice = [json.dumps(row | {"name": "one"}) + "\n" for row in rows[:2]]
    (tmp_path / "train.jsonl").write_text("".join(twice))
    assert "Two texts of the split train are called 'one' in `data.id_column` 'name'" in refused()
