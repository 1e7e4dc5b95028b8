"""Stage tokenize: documents to chunks of ids. A document begins with a chunk of its own; its last one is filled up.

Documents are read in their order and cut into shards of `shard_chunks` chunks. After each shard the manifest notes the
next document, and how many chunks of it are done, so an interrupted run goes on there and ends in the same bytes.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from .corpus import Corpus
from .corpus_lock import corpus_lock
from .disk_space import BYTES_PER_TOKEN, require_space
from .document_sources import Document, DocumentSource
from .manifest import SCRATCH, Manifest, described
from .tokenizers_of_corpora import BulkEncoder, TokenizerIdentity, identify, load_tokenizer

logger = logging.getLogger(__name__)

BATCH_CHARACTERS, BATCH_DOCUMENTS = 2**22, 1024
NAMES_OF_SKIPPED = 100


@dataclass(frozen=True)
class ChunkSettings:
    """How documents become chunks.

    Args:
        chunk_size: tokens of a chunk, the m of RETRO.
        shard_chunks: chunks per file, and the most that a kill costs.
        add_special_tokens: let the tokenizer put its own around each document.
        append_eos: end each document with the end token, if the tokenizer has one and did not.
        max_chunks: of the whole corpus; stop before the document that would exceed it.
    """

    chunk_size: int = 64
    shard_chunks: int = 2**14
    add_special_tokens: bool = True
    append_eos: bool = True
    max_chunks: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.chunk_size <= 65_535:
            raise ValueError(f"`chunk_size` must lie in 1 ... 65,535, got {self.chunk_size}.")
        for name in ("shard_chunks", "max_chunks"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")


def tokenize_corpus(
    source: DocumentSource,
    folder: str | Path,
    tokenizer: str | Path | PreTrainedTokenizerBase,
    settings: ChunkSettings | None = None,
    append: bool = False,
    overwrite: bool = False,
) -> Corpus:
    """Cut the documents of `source` into chunks and store them in `folder`; go on where an interrupted run stopped.

    Args:
        source: such as `TextFolder`; `open_source` finds the kind.
        folder: of the corpus, new or begun.
        tokenizer: itself, a folder, or a name. The corpus keeps a copy.
        settings: chunk size and such.
        append: add the documents to those of a finished corpus, in shards of their own. `max_chunks` may then be
            another than the corpus was begun with.
        overwrite: begin anew; everything made from the old chunks goes.

    Raises:
        ValueError: settings, tokenizer or source differ from the manifest's, or no document has text.
        OSError: the disk is too small.
        TimeoutError: another process writes the corpus.
    """
    settings = settings or ChunkSettings()
    tokenizer = load_tokenizer(tokenizer)
    identity = identify(tokenizer)
    with corpus_lock(folder):
        manifest = Manifest.new(folder) if overwrite else _manifest_of(folder)
        if _begin(manifest, _corpus_settings(settings, identity), source.fingerprint(), append):
            require_space(folder, source.num_bytes() / BYTES_PER_TOKEN * identity.dtype.itemsize)
            manifest.write()
            manifest.remove_leftovers()
            _store_tokenizer(manifest, tokenizer)
            _run(manifest, source, tokenizer, identity, settings)
            _finish(manifest, source)
        else:
            logger.info("%s: the documents are tokenized already (%d chunks)", folder, manifest.counts["chunks"])
        manifest.remove_leftovers()
    return Corpus(folder)


def _manifest_of(folder: str | Path) -> Manifest:
    try:
        return Manifest.read(folder)
    except FileNotFoundError:
        return Manifest.new(folder)


def _corpus_settings(settings: ChunkSettings, identity: TokenizerIdentity) -> dict[str, Any]:
    tokenizer = {"name": identity.name, "sha256": identity.sha256}
    ids = {"dtype": identity.dtype.name, "vocab_size": identity.vocab_size}
    ids |= {"pad_token_id": identity.pad_token_id, "eos_token_id": identity.eos_token_id}
    return {**asdict(settings), **ids, "tokenizer": tokenizer}


def _begin(manifest: Manifest, corpus: dict[str, Any], source: dict[str, Any], append: bool) -> bool:
    """Check what is there against what is asked for; whether anything is left to do."""
    stage = manifest.stages.get("tokenize")
    if stage is None:
        manifest.content["corpus"] = corpus
        manifest.content["counts"] = dict.fromkeys(("documents", "chunks", "tokens", "padding", "skipped", "empty"), 0)
        manifest.stages["tokenize"] = _running([source], [])
        return True
    if append:
        manifest.corpus["max_chunks"] = corpus["max_chunks"]
    _refuse_difference(manifest, corpus)
    if source == stage["sources"][-1]:
        return stage["status"] != "complete"
    if stage["status"] != "complete":
        raise ValueError(
            f"{manifest.folder} was begun with other documents: {_named(stage['sources'][-1])}, now given "
            f"{_named(source)}; finish it with those, or begin anew with --overwrite (overwrite=True)."
        )
    if changed := [known for known in stage["sources"] if known != source and _same_files(known, source)]:
        raise ValueError(
            f"{manifest.folder} holds {_named(changed[0])}, whose text has changed since: now it is {_named(source)}; "
            "begin anew with --overwrite (overwrite=True)."
        )
    if not append:
        raise ValueError(
            f"{manifest.folder} holds {' and '.join(map(_named, stage['sources']))}, now given {_named(source)}; add "
            "them with `graft-corpus append` (append=True), or begin anew with --overwrite (overwrite=True)."
        )
    if source in stage["sources"]:
        return False
    manifest.stages["tokenize"] = _running([*stage["sources"], source], stage["skipped"])
    for later in manifest.stages:
        if later != "tokenize":
            manifest.stages[later]["status"] = "running"
    return True


def _named(source: Mapping[str, Any]) -> str:
    """A source's fingerprint for people."""
    return f"{source['kind']} of {source['count']} ({described(source)})"


def _same_files(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two fingerprints differ in what the files hold, if in anything."""
    return "names" in one and {**one, "sha256": ""} == {**other, "sha256": ""}


def _running(sources: list[dict[str, Any]], skipped: list[str]) -> dict[str, Any]:
    return {"status": "running", "sources": sources, "skipped": skipped, "next_document": 0, "chunks_of_it": 0}


def _refuse_difference(manifest: Manifest, asked: dict[str, Any]) -> None:
    for name, value in asked.items():
        there: Any = manifest.corpus.get(name)
        by_name_too = name != "tokenizer"  # what that is called does not matter
        if there != value if by_name_too else there["sha256"] != value["sha256"]:
            raise ValueError(
                f"`{name}` is {described(value)}, but {manifest.folder} was made with {described(there)}; use that, "
                "or begin anew with --overwrite (overwrite=True)."
            )


def _store_tokenizer(manifest: Manifest, tokenizer: PreTrainedTokenizerBase) -> None:
    """Keep a copy, so that a corpus can be read as text wherever it is taken."""
    if any(name.startswith("tokenizer/") for name in manifest.files):
        return
    scratch = manifest.folder / SCRATCH
    tokenizer.save_pretrained(scratch)
    for path in sorted(scratch.rglob("*")):
        if path.is_file():
            name = f"tokenizer/{path.relative_to(scratch).as_posix()}"
            manifest.store("tokenize", name, partial(shutil.copyfile, path))
    manifest.write()
    shutil.rmtree(scratch)


def _run(
    manifest: Manifest,
    source: DocumentSource,
    tokenizer: PreTrainedTokenizerBase,
    identity: TokenizerIdentity,
    settings: ChunkSettings,
) -> None:
    stage = manifest.stages["tokenize"]
    first, done = stage["next_document"], stage["chunks_of_it"]
    end = identity.eos_token_id if settings.append_eos else None
    goes_on_at = first
    with tqdm(desc="tokenize", unit="chunk", unit_scale=True, disable=None) as progress:
        writer = _ShardWriter(manifest, identity, settings, progress)
        for number, (document, ids) in enumerate(_tokenized(source.documents(first), tokenizer, settings), first):
            if ids is None:
                writer.skip(document.name)
            elif not writer.add(number, document.name, _ended(ids, end), done if number == first else 0):
                break
            goes_on_at = number + 1
        writer.flush(goes_on_at, 0)


def _tokenized(
    documents: Iterator[Document], tokenizer: PreTrainedTokenizerBase, settings: ChunkSettings
) -> Iterator[tuple[Document, np.ndarray | None]]:
    encode = BulkEncoder(tokenizer, settings.add_special_tokens)
    for batch in _batches(documents):
        texts = [document.text for document in batch if document.text is not None]
        ids = iter(encode(texts))
        for document in batch:
            yield document, document.ids if document.text is None else next(ids)


def _batches(documents: Iterator[Document]) -> Iterator[Sequence[Document]]:
    """Documents together until they are many or long, so that the tokenizer's threads all have work."""
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text or "")
        if characters >= BATCH_CHARACTERS or len(batch) >= BATCH_DOCUMENTS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _ended(ids: np.ndarray, end: int | None) -> np.ndarray:
    if end is None or not len(ids) or ids[-1] == end:
        return ids
    return np.append(ids, end)


@dataclass
class _ShardWriter:
    """Collects chunks until a shard is full, and notes the documents that begin in it."""

    manifest: Manifest
    identity: TokenizerIdentity
    settings: ChunkSettings
    progress: Any
    pieces: list[np.ndarray] = field(default_factory=list)
    records: list[tuple[str, int, int]] = field(default_factory=list)
    held: int = 0

    def skip(self, name: str) -> None:
        logger.warning("skipped %s: it could not be decoded", name)
        self.manifest.counts["skipped"] += 1
        names = self.manifest.stages["tokenize"]["skipped"]
        if len(names) < NAMES_OF_SKIPPED:
            names.append(name)

    def add(self, number: int, name: str, ids: np.ndarray, done: int) -> bool:
        """Take a document, of which `done` chunks are stored already; False if it would exceed the cap."""
        size, counts = self.settings.chunk_size, self.manifest.counts
        if not len(ids):
            counts["empty"] += 1
            return True
        total = -(-len(ids) // size)
        if not done and not self._fits(total, name):
            return False
        chunks = np.full((total, size), self.identity.pad_token_id, dtype=self.identity.dtype)
        chunks.reshape(-1)[: len(ids)] = ids
        if not done:
            self.records.append((name, counts["chunks"] + self.held, len(ids) - (total - 1) * size))
            counts["documents"] += 1
            counts["tokens"] += len(ids)
            counts["padding"] += total * size - len(ids)
        while done < total:
            taken = min(total - done, self.settings.shard_chunks - self.held)
            self.pieces.append(chunks[done : done + taken])
            self.held, done = self.held + taken, done + taken
            if self.held == self.settings.shard_chunks:
                self.flush(*((number, done) if done < total else (number + 1, 0)))
        return True

    def _fits(self, total: int, name: str) -> bool:
        cap = self.settings.max_chunks
        if cap is None or self.manifest.counts["chunks"] + self.held + total <= cap:
            return True
        logger.warning("`max_chunks` %d reached: %s and what follows are left out", cap, name)
        self.manifest.stages["tokenize"]["cap"] = {"max_chunks": cap, "first_left_out": name}
        return False

    def flush(self, next_document: int, chunks_of_it: int) -> None:
        """Store the shard and where to go on."""
        stage = self.manifest.stages["tokenize"]
        if self.held:
            number = len(self.manifest.files_of("tokenize", ".bin"))
            chunks = np.concatenate(self.pieces)
            self.manifest.store("tokenize", f"tokens/{number:05d}.bin", chunks, raw=True)
            if self.records:
                table = _documents_table(self.records)
                self.manifest.store("tokenize", f"tokens/{number:05d}.documents.arrow", _arrow_writer(table))
            self.manifest.counts["chunks"] += self.held
            self.progress.update(self.held)
        stage |= {"next_document": next_document, "chunks_of_it": chunks_of_it}
        self.pieces, self.records, self.held = [], [], 0
        self.manifest.write()


def _documents_table(records: Sequence[tuple[str, int, int]]) -> pa.Table:
    names = [name.encode("utf-8", "surrogateescape").decode("utf-8", "replace") for name, _, _ in records]
    columns = {"first_chunk": [first for _, first, _ in records], "last_length": [last for _, _, last in records]}
    return pa.table({"name": pa.array(names, pa.string()), **columns})


def _arrow_writer(table: pa.Table) -> Any:
    def write(path: Path) -> None:
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)

    return write


def _finish(manifest: Manifest, source: DocumentSource) -> None:
    """Join the notes on documents into three files, always from all shards, and call the stage complete."""
    if not manifest.counts["chunks"]:
        raise ValueError(f"no document of `source` {_named(source.fingerprint())} has any text: nothing to store.")
    pieces = [_read_arrow(manifest.folder / n) for n in manifest.files_of("tokenize", ".documents.arrow")]
    firsts = [piece["first_chunk"].to_numpy() for piece in pieces]
    lasts = [piece["last_length"].to_numpy() for piece in pieces]
    names = [piece.select(["name"]) for piece in pieces]
    ends = np.asarray([manifest.counts["chunks"]])
    manifest.store("tokenize", "documents.npy", np.concatenate([*firsts, ends]).astype(np.int64))
    manifest.store("tokenize", "last_lengths.npy", np.concatenate(lasts).astype(np.uint16))
    manifest.store("tokenize", "document_names.arrow", _arrow_writer(pa.concat_tables(names).combine_chunks()))
    stage = manifest.stages["tokenize"]
    stage["status"] = "complete"
    del stage["next_document"], stage["chunks_of_it"]
    manifest.write()
    counts = manifest.counts
    logger.info("%s: %d documents, %d chunks", manifest.folder, counts["documents"], counts["chunks"])


def _read_arrow(path: Path) -> pa.Table:
    with pa.OSFile(str(path), "rb") as source:
        return pa.ipc.open_file(source).read_all()
