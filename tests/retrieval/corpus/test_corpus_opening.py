import json
import os
import re
import shutil
import stat
import subprocess
import sys

import numpy as np
import pytest

from graft.retrieval.corpus.chunking import ChunkSettings, tokenize_corpus
from graft.retrieval.corpus.corpus import SMALL_FILES, Corpus
from graft.retrieval.corpus.corpus_lock import corpus_lock
from graft.retrieval.corpus.corpus_retriever import CorpusRetriever
from graft.retrieval.corpus.document_sources import DatasetRows
from graft.retrieval.corpus.inspection import inspect_text
from graft.retrieval.corpus.manifest import CorpusError, Manifest
from graft.retrieval.corpus.retro_dataset import RetroDataset
from graft.retrieval.corpus.verification import verify_corpus


@pytest.fixture
def copy(corpus, tmp_path):
    return shutil.copytree(corpus.folder, tmp_path / "copy")


def read_all(folder, embedder):
    corpus = Corpus(folder)
    rows = RetroDataset(corpus)
    for row in (rows[index] for index in range(len(rows))):
        CorpusRetriever(corpus, embedder)(row["input_ids"].view(-1, 8))
    inspect_text(corpus, [0, 5])
    assert verify_corpus(folder, embedder=embedder) == []


def test_reading_changes_no_file_and_no_time(copy, embedder):
    def state():
        return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in [copy, *copy.rglob("*")]}

    before = state()
    read_all(copy, embedder)
    assert state() == before


WATCHED: list[str] = []  # folders; an audit hook cannot be taken out again, so it looks here
WRITTEN: list[tuple[str, str]] = []


def note_writing(event, arguments):
    if not WATCHED or event not in ("open", "os.rename", "os.remove", "os.mkdir", "os.truncate", "os.chmod"):
        return
    path = str(arguments[0])
    reads = event == "open" and not (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    if not reads and any(path.startswith(folder) for folder in WATCHED):
        WRITTEN.append((event, path))


def test_reading_opens_nothing_for_writing(copy, embedder):
    # As root, which tests often are, a folder without write permission refuses nothing; so all calls are watched.
    sys.addaudithook(note_writing)
    WATCHED.append(str(copy))
    try:
        read_all(copy, embedder)
        assert WRITTEN == []
        (copy / "mine").touch()
        assert WRITTEN  # the watch works
    finally:
        WATCHED.clear()


def test_a_folder_may_be_read_only(copy, embedder):
    paths = [*copy.rglob("*"), copy]
    for path in paths:
        path.chmod(stat.S_IMODE(path.stat().st_mode) & ~0o222)
    try:
        read_all(copy, embedder)
        assert all(not stat.S_IMODE(path.stat().st_mode) & 0o222 for path in paths)
    finally:
        for path in paths:
            path.chmod(stat.S_IMODE(path.stat().st_mode) | 0o200)


def test_writing_into_what_was_read_reaches_no_file(copy):
    corpus = Corpus(copy)
    corpus.embeddings.between(0, 2)[:] = 7
    corpus.neighbours.between(0, 2)[:] = 7
    with pytest.raises(ValueError, match="read-only"):
        corpus.tokens.between(0, 2)[:] = 7
    assert verify_corpus(copy) == []


def listed_files(folder):
    return sorted(Manifest.read(folder).files)


def test_every_corrupted_byte_is_found_and_the_stage_named(copy):
    rng = np.random.default_rng(0)
    for name in listed_files(copy):
        content = (copy / name).read_bytes()
        changed = bytearray(content)
        changed[rng.integers(len(content))] ^= 1
        (copy / name).write_bytes(changed)
        stage = Manifest.read(copy).files[name]["stage"]
        with pytest.raises(CorpusError, match=f"is damaged, .*run stage '{stage}' again"):
            Corpus(copy, verify=True)
        assert [name in fault and stage in fault for fault in verify_corpus(copy)] == [True]
        if name in SMALL_FILES:
            with pytest.raises(CorpusError, match="is damaged"):
                Corpus(copy)
        (copy / name).write_bytes(content)


def test_every_truncated_or_missing_file_is_found_by_opening(copy):
    for name in listed_files(copy):
        content = (copy / name).read_bytes()
        (copy / name).write_bytes(content[:-1])
        with pytest.raises(CorpusError, match=f"has {len(content) - 1} bytes, the manifest says {len(content)}"):
            Corpus(copy)
        assert len(verify_corpus(copy, fast=True)) == 1
        (copy / name).unlink()
        with pytest.raises(CorpusError, match="is missing; run stage"):
            Corpus(copy)
        (copy / name).write_bytes(content)
    assert verify_corpus(copy) == []


def rewritten(folder, change):
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_a_manifest_that_is_damaged_foreign_or_newer_is_refused(copy, tmp_path):
    original = (copy / "manifest.json").read_text()
    cases = {
        "is not JSON": original[: len(original) // 2],
        "is not the manifest of a corpus": '{"details": {}, "files": {}}',
        "is damaged: its content does not have the checksum": original.replace('"chunks": ', '"chunks": 1'),
        "has format 2, this version of graft reads up to 1: upgrade": original.replace('"format": 1', '"format": 2'),
        "has format 3, .*, or build the corpus again from stage 'tokenize'": '{"format": 3, "shards": []}',
    }
    for message, text in cases.items():
        assert text != original
        (copy / "manifest.json").write_text(text)
        with pytest.raises(CorpusError, match=message):
            Corpus(copy)
        assert [bool(re.search(message, fault)) for fault in verify_corpus(copy)] == [True]
    (copy / "manifest.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no manifest\.json: it is no corpus"):
        Corpus(copy)
    with pytest.raises(FileNotFoundError, match=r"has no manifest\.json"):
        Corpus(tmp_path / "absent")


def test_a_manifest_that_points_outside_its_folder_is_refused(copy, tmp_path):
    manifest = Manifest.read(copy)
    (tmp_path / "outside").write_text("x")
    manifest.files["../outside"] = {"stage": "embed", "bytes": 1, "sha256": ""}
    manifest.write()
    with pytest.raises(CorpusError, match=r"lists '\.\./outside', which lies outside its folder"):
        Corpus(copy)


def test_wrong_neighbours_and_vectors_with_right_checksums_are_found(copy, embedder):
    corpus = Corpus(copy)
    manifest = Manifest.read(copy)
    ids = corpus.neighbours.between(0, 8).copy()
    ids[4, 0] = 4
    manifest.store("neighbours", "neighbours/00000.ids.npy", ids)
    vectors = corpus.embeddings.between(8, 16).copy()
    manifest.store("embed", "embeddings/00001.npy", vectors[::-1].copy())
    manifest.write()
    assert Corpus(copy, verify=True)
    faults = verify_corpus(copy, embedder=embedder)
    assert any("neighbours of chunks 0 ... 7: some lie in the chunk's own document" in fault for fault in faults)
    assert any("sampled chunks are not what the embedder gives" in fault for fault in faults)


def test_leftovers_are_ignored_and_removed_by_the_next_run(copy, build, digests):
    before = digests(copy)
    names = ["tokens/00099.bin", "embeddings/.00000.npy.abc.tmp", ".manifest.json.abc.tmp", "index/old.faiss"]
    for name in [*names, "..scratch.abc.tmp/.index.faiss.abc.tmp"]:
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).write_text("half")
    (copy / "mine.html").write_text("a page of the user's")
    assert verify_corpus(copy) == []
    corpus = Corpus(copy)
    names = ("chunk_size", "shard_chunks")
    settings = ChunkSettings(**{name: corpus.manifest.corpus[name] for name in names})
    source = type("Same", (), {"fingerprint": lambda _: corpus.manifest.stages["tokenize"]["sources"][0]})()
    tokenize_corpus(source, copy, corpus.tokenizer, settings)
    assert digests(copy).keys() - before.keys() == {"mine.html"}


def test_a_second_writer_is_told_who_is_at_work(tmp_path, tokenizer):
    program = f"""
import time
from graft.retrieval.corpus.corpus_lock import corpus_lock
with corpus_lock({str(tmp_path)!r}):
    print('held', flush=True)
    time.sleep(60)
"""
    holder = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(TimeoutError, match=f"is being written by process {holder.pid} on "):
            tokenize_corpus(DatasetRows([{"text": "w1"}]), tmp_path, tokenizer)
    finally:
        holder.kill()
        holder.wait()
    tokenize_corpus(DatasetRows([{"text": "w1"}]), tmp_path, tokenizer)
    assert not (tmp_path / ".lock").exists()


def test_a_lock_can_be_waited_for_and_is_not_held_twice(tmp_path):
    told = pytest.raises(TimeoutError, match=f"process {os.getpid()} on")
    with corpus_lock(tmp_path), told, corpus_lock(tmp_path, timeout=0.1):
        pass
    with corpus_lock(tmp_path):
        assert (tmp_path / ".lock").exists()
