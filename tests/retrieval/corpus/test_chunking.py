import json
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis.strategies import integers, lists

from graft.retrieval.corpus.chunking import ChunkSettings, tokenize_corpus
from graft.retrieval.corpus.corpus import Corpus
from graft.retrieval.corpus.document_sources import (
    DatasetRows,
    Document,
    JSONLines,
    ParquetFiles,
    TextFolder,
    open_source,
)
from graft.retrieval.corpus.manifest import CorpusError
from graft.retrieval.corpus.tokenizers_of_corpora import identify


def words(rng, count):
    return " ".join(f"w{n}" for n in rng.integers(0, 200, count))


def stored_documents(corpus):
    """The ids of each document, read back from its chunks without the padding."""
    found = []
    for start, end, last in zip(corpus.documents[:-1], corpus.documents[1:], corpus.last_lengths, strict=True):
        ids = corpus.tokens.between(int(start), int(end)).reshape(-1).tolist()
        padding = ids[(end - start - 1) * corpus.chunk_size + int(last) :]
        assert padding == [corpus.pad_token_id] * len(padding)
        found.append(ids[: len(ids) - len(padding)])
    return found


@given(
    lengths=lists(integers(0, 40), min_size=1, max_size=12),
    chunk_size=integers(1, 9),
    shard_chunks=integers(1, 7),
    seed=integers(0, 2**31),
)
def test_every_token_of_every_document_is_stored_once_and_in_order(
    tmp_path_factory, tokenizer, lengths, chunk_size, shard_chunks, seed
):
    rng = np.random.default_rng(seed)
    texts = [words(rng, length) for length in lengths]
    rows = DatasetRows([{"text": text} for text in texts])
    folder = tmp_path_factory.mktemp("corpus")
    corpus = tokenize_corpus(rows, folder, tokenizer, ChunkSettings(chunk_size, shard_chunks))
    assert stored_documents(corpus) == [tokenizer(text)["input_ids"] for text in texts]
    assert [end - start for start, end in corpus.shards[:-1]] == [shard_chunks] * (len(corpus.shards) - 1)
    counts = corpus.manifest.counts
    assert counts["tokens"] + counts["padding"] == corpus.num_chunks * chunk_size
    assert corpus.document_names.to_pylist() == [f"row:{n}" for n in range(len(texts))]


def test_documents_without_any_token_are_counted_and_left_out(tmp_path, make_tokenizer):
    plain = make_tokenizer(9, adds_special=False)
    rows = DatasetRows([{"text": "w1"}, {"text": ""}, {"text": None}, {"text": "w2 w3"}])
    corpus = tokenize_corpus(rows, tmp_path, plain, ChunkSettings(4, append_eos=False))
    assert stored_documents(corpus) == [[5], [6, 7]]
    assert (corpus.manifest.counts["empty"], corpus.manifest.counts["skipped"]) == (1, 1)
    assert corpus.document_names.to_pylist() == ["row:0", "row:3"]


def test_the_end_token_is_added_only_where_it_is_missing(tmp_path, make_tokenizer):
    plain = make_tokenizer(9, adds_special=False)
    corpus = tokenize_corpus(DatasetRows([{"text": "w0"}, {"text": "w1 [SEP]"}]), tmp_path, plain, ChunkSettings(4))
    assert stored_documents(corpus) == [[4, 3], [5, 3]]


@pytest.mark.parametrize(("size", "dtype"), [(65_535, "uint16"), (65_536, "uint16"), (65_537, "uint32")])
def test_ids_take_two_bytes_up_to_a_vocabulary_of_65536(tmp_path, make_tokenizer, size, dtype):
    tokenizer = make_tokenizer(size - 4)
    assert identify(tokenizer).vocab_size == size
    corpus = tokenize_corpus(DatasetRows([{"text": f"w{size - 5}"}]), tmp_path, tokenizer, ChunkSettings(4))
    assert corpus.tokens.dtype == dtype
    assert stored_documents(corpus) == [[2, size - 1, 3]]


def test_every_kind_of_source_gives_the_same_chunks(tmp_path, tokenizer):
    rng = np.random.default_rng(0)
    texts = [words(rng, length) for length in (3, 30, 9, 1)]
    (tmp_path / "texts").mkdir()
    for number, text in enumerate(texts):
        (tmp_path / "texts" / f"{number}.txt").write_text(text)
    (tmp_path / "a.jsonl").write_text("\n\n".join(json.dumps({"text": text}) for text in texts))
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet", row_group_size=3)
    sources = {
        "folder": open_source(tmp_path / "texts"),
        "jsonl": open_source(tmp_path / "a.jsonl"),
        "parquet": open_source(tmp_path / "a.parquet"),
        "rows": DatasetRows([{"text": text} for text in texts]),
        "datasets": DatasetRows(Dataset.from_dict({"text": texts})),
    }
    made = {
        name: tokenize_corpus(source, tmp_path / name, tokenizer, ChunkSettings(8, 4))
        for name, source in sources.items()
    }
    for name, corpus in made.items():
        assert stored_documents(corpus) == stored_documents(made["folder"]), name
        assert sources[name].num_bytes() > 50
        for start in range(5):
            rest = [document.text for document in sources[name].documents(start)]
            assert rest == texts[start:], (name, start)
    assert made["jsonl"].document_names.to_pylist() == ["a.jsonl:1", "a.jsonl:3", "a.jsonl:5", "a.jsonl:7"]
    assert made["parquet"].document_names.to_pylist() == [f"a.parquet:{n}" for n in range(4)]


def test_one_file_of_text_is_one_document(tmp_path, tokenizer):
    (tmp_path / "texts").mkdir()
    for name in ("[a].txt", "a.txt"):
        (tmp_path / "texts" / name).write_text("w1 w2")
    corpus = tokenize_corpus(open_source(tmp_path / "texts" / "[a].txt"), tmp_path / "corpus", tokenizer)
    assert corpus.document_names.to_pylist() == ["[a].txt"]
    assert stored_documents(corpus) == [[2, 5, 6, 3]]


def source_of(kind, folder, texts):
    """The same names and sizes whatever the texts, if their lengths are the same."""
    if kind == "rows":
        return DatasetRows([{"text": text} for text in texts])
    if kind == "folder":
        folder.mkdir(exist_ok=True)
        for number, text in enumerate(texts):
            (folder / f"{number}.txt").write_text(text)
            os.utime(folder / f"{number}.txt", (0, 0))
        return open_source(folder)
    path = folder.with_suffix(f".{kind}")
    if kind == "jsonl":
        path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    else:
        pq.write_table(pa.table({"text": texts}), path, compression="none")
    return open_source(path)


@pytest.mark.parametrize("kind", ["folder", "jsonl", "parquet", "rows"])
def test_a_text_changed_without_changing_size_or_time_is_noticed(tmp_path, tokenizer, kind):
    folder = tmp_path / "source"
    corpus = tokenize_corpus(source_of(kind, folder, ["w1 w2", "w3"]), tmp_path / "corpus", tokenizer)
    before = corpus.manifest.content
    for append in (False, True) if kind != "rows" else (False,):  # rows have no names; others may be appended
        reason = "whose text has changed since" if kind != "rows" else "now given rows of 2"
        with pytest.raises(ValueError, match=rf"holds {kind} of \d \(sha256 .*{reason}.*--overwrite"):
            tokenize_corpus(source_of(kind, folder, ["w1 w9", "w3"]), corpus.folder, tokenizer, append=append)
    again = tokenize_corpus(source_of(kind, folder, ["w1 w2", "w3"]), corpus.folder, tokenizer)
    assert again.manifest.content == before


def test_an_interrupted_run_does_not_go_on_with_other_text(tmp_path, tokenizer):
    source = source_of("folder", tmp_path / "source", ["w1 w2", "w3"])
    with pytest.raises(Interrupted):
        tokenize_corpus(BreakingSource(source, 1), tmp_path / "corpus", tokenizer)
    changed = source_of("folder", tmp_path / "source", ["w1 w2", "w4"])
    with pytest.raises(ValueError, match=r"was begun with other documents: folder of 2 \(sha256 \w{12}\), now given"):
        tokenize_corpus(changed, tmp_path / "corpus", tokenizer)


def test_files_come_in_the_order_of_their_names_as_bytes(tmp_path):
    for name in ("b.txt", "B.txt", "a/z.txt", "é.txt", "a.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    assert TextFolder(tmp_path).names == ["B.txt", "a.txt", "a/z.txt", "b.txt", "é.txt"]


class Interrupted(Exception):
    pass


class BreakingSource:
    """Its documents end in an exception before number `at`, once."""

    def __init__(self, source, at):
        self.source, self.at = source, at

    def documents(self, start=0):
        for number, document in enumerate(self.source.documents(start), start):
            if number == self.at:
                raise Interrupted
            yield document

    def fingerprint(self):
        return self.source.fingerprint()

    def num_bytes(self):
        return self.source.num_bytes()


@given(lengths=lists(integers(0, 60), min_size=2, max_size=10), shard_chunks=integers(1, 5), data=integers(0, 2**31))
def test_an_interrupted_run_goes_on_to_the_same_bytes(
    tmp_path_factory, tokenizer, digests, monkeypatch, lengths, shard_chunks, data
):
    monkeypatch.setattr("graft.retrieval.corpus.chunking.BATCH_DOCUMENTS", 1)
    rng = np.random.default_rng(data)
    texts = [words(rng, length) if length % 7 else None for length in lengths]
    texts[0] = "w1"
    source, settings = DatasetRows([{"text": text} for text in texts]), ChunkSettings(4, shard_chunks)
    whole, broken = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("broken")
    tokenize_corpus(source, whole, tokenizer, settings)
    for at in sorted(rng.integers(0, len(texts), 3)):
        with pytest.raises(Interrupted):
            tokenize_corpus(BreakingSource(source, at), broken, tokenizer, settings)
        with pytest.raises(CorpusError, match="'tokenize' was interrupted; run it"):
            Corpus(broken)
    tokenize_corpus(source, broken, tokenizer, settings)
    assert digests(broken) == digests(whole)


def test_appended_documents_follow_in_shards_of_their_own(tmp_path, tokenizer, digests):
    rng = np.random.default_rng(0)
    texts = [words(rng, length) for length in (3, 30, 9, 1, 25)]
    first, second = (DatasetRows([{"text": t} for t in part]) for part in (texts[:3], texts[3:]))
    settings = ChunkSettings(8, 4)
    before = tokenize_corpus(first, tmp_path, tokenizer, settings)
    kept = digests(tmp_path / "tokens")
    after = tokenize_corpus(second, tmp_path, tokenizer, settings, append=True)
    assert stored_documents(after) == [tokenizer(text)["input_ids"] for text in texts]
    assert kept.items() <= digests(tmp_path / "tokens").items()
    assert after.shards[: len(before.shards)] == before.shards
    assert (after.document_of(np.arange(len(after))) == np.repeat(np.arange(5), np.diff(after.documents))).all()
    again = digests(tmp_path)
    tokenize_corpus(second, tmp_path, tokenizer, settings, append=True)
    assert digests(tmp_path) == again


def test_a_finished_run_is_left_alone(tmp_path, tokenizer, text_folder, caplog):
    tokenize_corpus(TextFolder(text_folder), tmp_path, tokenizer)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    with caplog.at_level("INFO"):
        tokenize_corpus(TextFolder(text_folder), tmp_path, tokenizer)
    assert "tokenized already" in caplog.text
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == times


def test_what_differs_from_the_manifest_is_refused_with_both_values(tmp_path, tokenizer, make_tokenizer, text_folder):
    source = TextFolder(text_folder)
    tokenize_corpus(source, tmp_path, tokenizer, ChunkSettings(8))
    with pytest.raises(ValueError, match="`chunk_size` is 4, but .* was made with 8; .*overwrite=True"):
        tokenize_corpus(source, tmp_path, tokenizer, ChunkSettings(4))
    with pytest.raises(ValueError, match="`tokenizer` is .*but .* was made with .*overwrite=True"):
        tokenize_corpus(source, tmp_path, make_tokenizer(200, adds_special=False), ChunkSettings(8))
    with pytest.raises(ValueError, match="graft-corpus append.*append=True.*overwrite=True"):
        tokenize_corpus(DatasetRows([{"text": "w1"}]), tmp_path, tokenizer, ChunkSettings(8))
    anew = tokenize_corpus(source, tmp_path, tokenizer, ChunkSettings(4), overwrite=True)
    assert anew.chunk_size == 4


def test_overwriting_leaves_nothing_of_what_was_there(tmp_path, build, digests):
    texts = ["w1 w2 w3 " * n for n in range(1, 9)]
    build(tmp_path / "a", texts)
    build(tmp_path / "b", texts[:4], until="tokenize", shard_chunks=4)
    corpus = Corpus(tmp_path / "a")
    rows = DatasetRows([{"text": text} for text in texts[:4]])
    tokenize_corpus(rows, corpus.folder, corpus.tokenizer, ChunkSettings(8, 4), overwrite=True)
    ours, theirs = digests(tmp_path / "a"), digests(tmp_path / "b")
    assert ours.keys() == theirs.keys()
    assert ours["tokens/00000.bin"] == theirs["tokens/00000.bin"]


def test_a_cap_stops_before_the_document_that_exceeds_it(tmp_path, tokenizer, caplog):
    rows = DatasetRows([{"text": "w1 " * 6}, {"text": "w2 " * 14}, {"text": "w3 " * 6}])
    corpus = tokenize_corpus(rows, tmp_path, tokenizer, ChunkSettings(8, max_chunks=2))
    assert corpus.num_chunks == 1
    assert "`max_chunks` 2 reached: row:1 and what follows" in caplog.text
    assert corpus.manifest.stages["tokenize"]["cap"] == {"max_chunks": 2, "first_left_out": "row:1"}


def test_undecodable_files_raise_or_are_replaced_or_skipped(tmp_path, tokenizer):
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "bad.txt").write_bytes(b"w1 \xff w2")
    (texts / "good.txt").write_text("w3")
    with pytest.raises(UnicodeDecodeError, match=r"bad\.txt at byte 3; errors=.replace. or .skip. goes on"):
        tokenize_corpus(TextFolder(texts), tmp_path / "strict", tokenizer)
    replaced = tokenize_corpus(TextFolder(texts, errors="replace"), tmp_path / "replace", tokenizer)
    assert stored_documents(replaced) == [[2, 5, 1, 6, 3], [2, 7, 3]]
    skipped = tokenize_corpus(TextFolder(texts, errors="skip"), tmp_path / "skip", tokenizer)
    assert stored_documents(skipped) == [[2, 7, 3]]
    assert skipped.manifest.stages["tokenize"]["skipped"] == ["bad.txt"]
    assert skipped.manifest.counts["skipped"] == 1


def test_rows_that_cannot_be_read_are_skipped_counted_and_named(tmp_path, tokenizer, caplog):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "w1"}\n{"text": "\xff"}\n{"text": 3}\n{"text": "w2"}\n')
    with pytest.raises(UnicodeDecodeError, match=r"a\.jsonl, line 2 at byte 10"):
        tokenize_corpus(JSONLines(tmp_path / "a.jsonl"), tmp_path / "strict", tokenizer)
    lines = JSONLines(tmp_path / "a.jsonl", errors="skip")
    skipped = tokenize_corpus(lines, tmp_path / "skip", tokenizer)
    assert stored_documents(skipped) == [[2, 5, 3], [2, 6, 3]]
    assert skipped.manifest.counts["skipped"] == 2
    assert skipped.manifest.stages["tokenize"]["skipped"] == ["a.jsonl:2", "a.jsonl:3"]
    assert "skipped a.jsonl:2" in caplog.text


def test_wrong_input_is_refused_by_name(tmp_path, tokenizer, make_tokenizer):
    with pytest.raises(FileNotFoundError, match=r"no file in `folder` .* matches `glob` '\*\.md'"):
        TextFolder(tmp_path, "*.md")
    with pytest.raises(FileNotFoundError, match="`path` .*absent does not exist"):
        open_source(tmp_path / "absent")
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(ValueError, match=r"must be a folder, a \.txt, \.md, \.jsonl or \.parquet file, got .*a\.csv"):
        open_source(tmp_path / "a.csv")
    with pytest.raises(ValueError, match="`errors` must be one of .*'ignore'"):
        TextFolder(tmp_path, "*.csv", errors="ignore")
    (tmp_path / "a.jsonl").write_text('{"text": "w1"}\n{"body": "w2"}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: expected a JSON object with a text under 'text'"):
        list(JSONLines(tmp_path / "a.jsonl").documents())
    lines = JSONLines(tmp_path / "a.jsonl", errors="skip").documents()
    assert list(lines) == [Document("a.jsonl:1", "w1"), Document("a.jsonl:2", None)]
    (tmp_path / "a.parquet").write_bytes(b"PAR?")
    with pytest.raises(ValueError, match=r"a\.parquet is not a Parquet file"):
        ParquetFiles(tmp_path / "a.parquet")
    pq.write_table(pa.table({"body": ["x"]}), tmp_path / "b.parquet")
    with pytest.raises(ValueError, match=r"has columns \['body'\], `text_field` 'text' is none of them"):
        ParquetFiles(tmp_path / "b.parquet")
    with pytest.raises(ValueError, match=r"`chunk_size` must lie in 1 \.\.\. 65,535, got 0"):
        ChunkSettings(0)
    with pytest.raises(ValueError, match="`shard_chunks` must be at least 1, got 0"):
        ChunkSettings(8, 0)
    nothing = DatasetRows([{"text": ""}])
    plain = make_tokenizer(9, adds_special=False)
    with pytest.raises(ValueError, match="no document of `source` .* has any text"):
        tokenize_corpus(nothing, tmp_path / "corpus", plain)


def test_a_disk_that_is_too_small_is_named_before_work_starts(tmp_path, tokenizer, text_folder, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10})())
    with pytest.raises(OSError, match="needs about .*, its disk has 10 bytes left"):
        tokenize_corpus(TextFolder(text_folder), tmp_path / "corpus", tokenizer)
    assert not list((tmp_path / "corpus").rglob("*"))
