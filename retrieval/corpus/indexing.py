"""Stage index: an approximate index over the embeddings, with the recall it was measured to reach."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..datastore import Datastore
from ..engines.vector_engine import Metric, VectorEngine
from ..faiss_indexes import factory_string, new_index
from .corpus import Corpus
from .corpus_lock import corpus_lock
from .disk_space import require_space
from .index_choice import IndexChoice, least_probes
from .manifest import SCRATCH, CorpusError, Manifest
from .neighbour_search import exact_distances, exact_neighbours
from .stage import begin_stage, complete_stage

logger = logging.getLogger(__name__)

RECALL_SAMPLE, RECALL_AT, WANTED_RECALL = 1000, 4, 0.95
RESCORED = 4
"""Candidates per neighbour that are measured again with the stored vectors."""


def build_index(folder: str | Path, choice: IndexChoice, overwrite: bool = False, seed: int = 0) -> Corpus:
    """Train an index, add all embeddings, and choose how many lists to search by measuring recall.

    Args:
        folder: of an embedded corpus.
        choice: what `choose_index` gave; "exact" needs no index and is refused.
        overwrite: build again.
        seed: of the choice of training vectors and of the sample for recall.

    Raises:
        ValueError: `choice` is exact, asks for more lists than so many chunks can train or for what faiss does not
            know, or differs from the index there is.
        ImportError: faiss is not installed.
    """
    if choice.kind == "exact":
        raise ValueError("`choice` is exact: find_neighbours searches the embeddings themselves, without an index.")
    with corpus_lock(folder):
        corpus, manifest = Corpus(folder), Manifest.read(folder)
        manifest.require("embed")
        _check_choice(corpus, choice)
        settings = {"kind": choice.kind, "parameters": choice.parameters, "seed": seed}
        if not begin_stage(manifest, "index", settings, overwrite):
            logger.info("%s: stage index is complete already", folder)
            return corpus
        require_space(folder, choice.num_bytes)
        store = _filled(corpus, choice, seed)
        recall = _choose_probes(corpus, store, seed)
        _store_files(manifest, store)
        manifest.stages["index"] |= {"reason": choice.reason, "recall": recall}
        complete_stage(manifest, "index")
        manifest.remove_leftovers()
    logger.info("%s: %s, %s", folder, store, _recall_text(recall))
    return Corpus(folder)


def open_index(corpus: Corpus) -> Datastore:
    """The index of a corpus, checked byte for byte, its inverted lists mapped from the file.

    Raises:
        CorpusError: there is none, or documents were appended since.
    """
    corpus.manifest.require("index")
    store = Datastore.load(corpus.folder / "index", mapped=True)
    if len(store) != corpus.num_chunks:
        raise CorpusError(
            f"the index of {corpus.folder} has {len(store)} of {corpus.num_chunks} chunks; build it again."
        )
    return store


def send_embeddings(corpus: Corpus, engine: VectorEngine, metric: Metric = "l2") -> None:
    """Put all embeddings of a corpus into an engine, by chunk number; chunks without text are left out.

    Args:
        corpus: embedded.
        engine: what it holds under its name goes.
        metric: "inner_product" gives the same order for vectors of length 1.
    """
    corpus.manifest.require("embed")
    engine.create(corpus.embeddings.shape[1], metric)
    for start, block in corpus.embeddings.blocks(2**16):
        real = np.flatnonzero(block.any(1))
        engine.add(start + real, block[real].astype(np.float32))
    engine.flush()
    logger.info("%s: %d of %d chunks are in %s", corpus.folder, engine.count(), len(corpus), engine)


def indexed_neighbours(
    queries: np.ndarray, corpus: Corpus, store: Datastore, k: int, exclude: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """As `exact_neighbours`, but among what the index proposes; distances are exact, order is by (distance, number).

    Rows that come back with too few are searched again in twice as many lists, in the end in all.
    """
    ids = np.full((len(queries), k), -1, dtype=np.int64)
    distances = np.full((len(queries), k), np.inf)
    nlist = store.parameters.get("nlist")
    probes = store.parameters.get("nprobe", 1)
    pending = np.flatnonzero(queries.any(1))
    while len(pending):
        ranges = exclude[pending] if exclude is not None else None
        options = {"nprobe": min(probes, nlist)} if nlist else {}
        found, gaps = _candidates(queries[pending], corpus, store, k, ranges, options)
        ids[pending], distances[pending] = found, gaps
        if not nlist or probes >= nlist:
            break
        pending, probes = pending[found[:, -1] < 0], 2 * probes
    return ids, distances


def _candidates(
    queries: np.ndarray,
    corpus: Corpus,
    store: Datastore,
    k: int,
    exclude: np.ndarray | None,
    options: Mapping[str, int],
) -> tuple[np.ndarray, np.ndarray]:
    wanted = min(RESCORED * k, len(store))
    _, proposed = store.search(torch.from_numpy(queries).float(), wanted, exclude, **options)
    ids = proposed.numpy()
    gaps = exact_distances(queries, corpus.embeddings, ids)
    order = np.lexsort((np.where(ids < 0, len(store), ids), gaps))[:, :k]
    found, best = np.take_along_axis(ids, order, 1), np.take_along_axis(gaps, order, 1)
    missing = ((0, 0), (0, k - found.shape[1]))
    return np.pad(found, missing, constant_values=-1), np.pad(best, missing, constant_values=np.inf)


def _check_choice(corpus: Corpus, choice: IndexChoice) -> None:
    """Refuse what faiss could not train, before anything is noted in the manifest."""
    width = corpus.embeddings.shape[1]
    store = Datastore(width, choice.kind, "l2", **choice.parameters)
    num_vectors = min(choice.training_size or corpus.num_chunks, corpus.num_chunks)
    new_index(factory_string(choice.kind, width, num_vectors, store.parameters), width, "l2")


def _filled(corpus: Corpus, choice: IndexChoice, seed: int) -> Datastore:
    """Trained on a sample of the chunks, then all shards added in order."""
    store = Datastore(corpus.embeddings.shape[1], choice.kind, "l2", **choice.parameters)
    if choice.training_size:
        rows = np.random.default_rng(seed).permutation(corpus.num_chunks)[: choice.training_size]
        sample = corpus.embeddings.take(np.sort(rows))
        store.train(torch.from_numpy(sample).float(), seed)
    for _, block in corpus.embeddings.blocks(2**16):
        store.add(torch.from_numpy(block).float())
    return store


def _choose_probes(corpus: Corpus, store: Datastore, seed: int) -> dict[str, Any]:
    """Set the fewest lists that reach the recall wanted, and say what was reached."""
    rows = np.random.default_rng(seed + 1).permutation(corpus.num_chunks)[:RECALL_SAMPLE]
    rows.sort()
    queries, own = corpus.embeddings.take(rows), corpus.document_of(rows)
    exclude = np.stack([corpus.documents[own], corpus.documents[own + 1]], 1)
    truth, _ = exact_neighbours(queries, corpus.embeddings, RECALL_AT, exclude)
    recall = 0.0
    for probes in least_probes(store.parameters["nlist"]) if "nlist" in store.parameters else [None]:
        options = {"nprobe": probes} if probes is not None else {}
        found, _ = _candidates(queries, corpus, store, RECALL_AT, exclude, options)
        recall = _recall(truth, found)
        if probes is not None:
            store.parameters["nprobe"] = probes
        if recall >= WANTED_RECALL:
            break
    if recall < WANTED_RECALL:
        logger.warning("%s reaches recall %.3f, not %.2f, on %d chunks", store, recall, WANTED_RECALL, len(rows))
    return {"at": RECALL_AT, "value": round(recall, 4), "sample": len(rows), "nprobe": store.parameters.get("nprobe")}


def _recall(truth: np.ndarray, found: np.ndarray) -> float:
    hit = (truth[:, :, None] == found[:, None]).any(-1) & (truth >= 0)
    return float(hit.sum() / max((truth >= 0).sum(), 1))


def _recall_text(recall: Mapping[str, Any]) -> str:
    return f"recall@{recall['at']} {recall['value']} on {recall['sample']} chunks"


def _store_files(manifest: Manifest, store: Datastore) -> None:
    scratch = manifest.folder / SCRATCH
    store.save(scratch, replace=True)
    for path in sorted(scratch.iterdir()):
        manifest.store("index", f"index/{path.name}", partial(shutil.copyfile, path))
    manifest.write()
    shutil.rmtree(scratch)
