import copy
import shutil
import warnings
from functools import partial

import numpy as np
import pytest

from graft.retrieval.corpus.chunking import ChunkSettings
from graft.retrieval.corpus.corpus import Corpus
from graft.retrieval.corpus.document_sources import DatasetRows
from graft.retrieval.corpus.embedder import ChunkEmbedder, EmbedderSettings
from graft.retrieval.corpus.embedding import embed_corpus
from graft.retrieval.corpus.manifest import CorpusError, Manifest
from graft.retrieval.corpus.neighbours import find_neighbours, open_database
from graft.retrieval.corpus.packing import pack_sequences
from graft.retrieval.corpus.preparation import (
    PreparationSettings,
    append_documents,
    prepare_corpus,
    refresh_neighbours,
)
from graft.retrieval.corpus.retro_dataset import RetroDataset
from graft.retrieval.corpus.stage import stages_so_far
from graft.retrieval.corpus.tokenizers_of_corpora import load_tokenizer
from graft.retrieval.corpus.verification import verify_corpus


def own_ranges(corpus):
    own = corpus.document_of(np.arange(len(corpus)))
    return np.stack([corpus.documents[own], corpus.documents[own + 1]], 1)


def everything(rows):
    return rows.between(0, len(rows))


def test_stored_vectors_are_what_the_embedder_gives(corpus, embedder):
    for chunk in range(len(corpus)):
        ids = corpus.tokens.between(chunk, chunk + 1)[0].astype(np.int64)
        vector = embedder.embed_ids([ids[ids != corpus.pad_token_id]])[0].numpy()
        np.testing.assert_allclose(corpus.embeddings.between(chunk, chunk + 1)[0], vector, atol=2e-3)


def test_stored_neighbours_are_those_of_brute_force_without_the_own_document(corpus, naive_neighbours):
    vectors = everything(corpus.embeddings)
    ids, distances = naive_neighbours(vectors, vectors, 3, own_ranges(corpus))
    assert everything(corpus.neighbours).tolist() == ids
    np.testing.assert_array_equal(everything(corpus.distances), np.asarray(distances).astype(np.float16))
    assert (everything(corpus.neighbours) >= 0).all()
    assert corpus.neighbours.dtype == np.int32


def test_rows_end_with_missing_ones_only_where_other_documents_hold_too_few(tmp_path, build):
    with pytest.warns(UserWarning, match="fewer than `num_neighbours` 3: some rows end with -1"):
        corpus = build(tmp_path, ["w1 " * 30, "w2 w3"], until="neighbours")
    assert everything(corpus.neighbours)[:4].tolist() == [[4, -1, -1]] * 4
    assert set(everything(corpus.neighbours)[4].tolist()) < {0, 1, 2, 3}
    assert np.isinf(everything(corpus.distances)[:4, 1:]).all()


def test_more_neighbours_than_any_chunk_could_have_are_refused_and_nothing_changes(tmp_path, build, corpus, digests):
    ours = build(tmp_path / "ours", ["w1 w2 w3 " * 9, "w4 " * 20], until="neighbours")
    before = digests(ours.folder)
    most = len(ours) - 3  # the chunks of the shorter document have all others
    with pytest.raises(ValueError, match=f"`num_neighbours` must be at most {most}, .*for any chunk, got {most + 1}"):
        refresh_neighbours(ours.folder, most + 1)
    with pytest.raises(ValueError, match=f"at most {len(corpus)}, as many as {corpus.folder} has"):
        find_neighbours(ours.folder, len(corpus) + 1, database=corpus, overwrite=True)
    assert digests(ours.folder) == before
    with pytest.warns(UserWarning, match="some rows end with -1"):
        assert refresh_neighbours(ours.folder, most).neighbours.shape == (len(ours), most)


def test_of_missing_neighbours_is_warned_once(tmp_path, build, embedder):
    corpus = build(tmp_path / "corpus", ["w1 " * 90, "w2 w3"], until="tokenize", shard_chunks=2)
    assert len(corpus.shards) > 5
    settings = PreparationSettings(ChunkSettings(8, 2), 3, 16, workers=2)
    rows = DatasetRows([{"text": text} for text in ("w1 " * 90, "w2 w3")])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        prepare_corpus(rows, corpus.folder, corpus.tokenizer, embedder, settings)
    assert ["some rows end with -1" in str(warning.message) for warning in caught] == [True]


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        (["w1 " * 30], {}, "has one document, so no chunk of another could be found"),
        (["w1 " * 30, "w2 w3"], {"num_neighbours": 6}, "`num_neighbours` must be at most 4, .*, got 6"),
        (["w1 " * 30, "w2 w3"], {"index": "auto", "index_memory": 100}, r"at least \d+ bytes for 5 chunks, got 100"),
        (
            ["w1 " * 30, "w2 w3"],
            {"index": "ivf_flat"},
            "`index` for 5 vectors must be one of exact, hnsw, got 'ivf_fl",
        ),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_embedded(tmp_path, embedder, texts, options, message):
    settings = PreparationSettings(**{"chunks": ChunkSettings(8, 8), "num_neighbours": 1, **options})
    rows = DatasetRows([{"text": text} for text in texts])
    with pytest.raises(ValueError, match=message):
        prepare_corpus(rows, tmp_path, embedder.tokenizer, embedder, settings)
    assert stages_so_far(Manifest.read(tmp_path)) == {
        "tokenize": "complete",
        **dict.fromkeys(("embed", "index", "neighbours", "pack"), "not begun"),
    }


def test_a_disk_that_is_too_small_is_named_before_each_stage(tmp_path, build, embedder, monkeypatch):
    texts, settings = ["w1 " * 30, "w2 w3"], PreparationSettings(ChunkSettings(8, 8), 1, 16, workers=1)
    rows = DatasetRows([{"text": text} for text in texts])
    usage = shutil.disk_usage
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10})())
    with pytest.raises(OSError, match=r"needs about 340 bytes, its disk has 10 bytes left"):
        prepare_corpus(rows, tmp_path / "new", embedder.tokenizer, embedder, settings)
    assert not (tmp_path / "new").exists()
    monkeypatch.setattr("shutil.disk_usage", usage)
    corpus = build(tmp_path / "corpus", texts, until="tokenize")
    stages = [partial(embed_corpus, corpus.folder, embedder), partial(find_neighbours, corpus.folder, 1)]
    for stage in stages:
        with monkeypatch.context() as patch:
            patch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10})())
            with pytest.raises(OSError, match=r"needs about \d+ bytes, its disk has 10 bytes left"):
                stage(workers=1)
        assert len(stage(workers=1)) == 5  # what was refused goes on where there is space


def test_a_single_document_has_no_neighbours_at_all(tmp_path, build):
    with pytest.raises(ValueError, match="has one document, so no chunk of another could be found; give `database`"):
        build(tmp_path, ["w1 " * 30], until="neighbours")


def test_neighbours_may_lie_in_another_corpus(tmp_path, build, corpus, naive_neighbours):
    ours = build(tmp_path / "ours", ["w1 w2 w3 " * 9], until="embed")
    ours = find_neighbours(ours.folder, 4, database=corpus, workers=1)
    vectors = everything(ours.embeddings)
    ids, _ = naive_neighbours(vectors, everything(corpus.embeddings), 4, [(0, 0)] * len(ours))
    assert everything(ours.neighbours).tolist() == ids
    assert open_database(ours).folder == corpus.folder
    rows = RetroDataset(pack_sequences(ours.folder, 16), num_neighbours=1)
    expected = corpus.passages(np.asarray(ids[0][:1]), 16)[0]
    assert rows[0]["retrieved"][0, 0].tolist() == expected.tolist()
    with pytest.raises(CorpusError, match="has changed since the neighbours of"):
        RetroDataset(Corpus(ours.folder), database=build(tmp_path / "other", ["w1", "w2"], until="embed"))


def test_corpora_that_do_not_fit_each_other_are_refused(tmp_path, build, corpus, encoder_folder):
    ours = build(tmp_path / "ours", ["w1 w2 w3 " * 9], until="embed", chunk_size=4)
    with pytest.raises(ValueError, match="has chunks of 8 tokens, .* of 4"):
        find_neighbours(ours.folder, 4, database=corpus)
    embed_corpus(ours.folder, ChunkEmbedder(encoder_folder, settings=EmbedderSettings("cls")), overwrite=True)
    with pytest.raises(ValueError, match="was embedded with"):
        find_neighbours(ours.folder, 4, database=corpus)


@pytest.mark.parametrize(
    ("pooling", "chunk_size", "vocabulary", "reason"),
    [("cls", 8, 0, "was embedded with"), ("mean", 4, 0, "has chunks of 8 tokens"), ("mean", 8, 1, "was cut with")],
)
def test_a_database_that_does_not_fit_is_refused_before_any_document_is_read(
    tmp_path, corpus, encoder_folder, pooling, chunk_size, vocabulary, reason
):
    embedder = ChunkEmbedder(encoder_folder, settings=EmbedderSettings(pooling))
    tokenizer = copy.deepcopy(corpus.tokenizer)
    tokenizer.add_tokens([f"new{n}" for n in range(vocabulary)])
    settings = PreparationSettings(ChunkSettings(chunk_size), 2, 16, workers=1)
    with pytest.raises(ValueError, match=reason):
        prepare_corpus(NeverRead(), tmp_path / "new", tokenizer, embedder, settings, database=corpus)
    assert not (tmp_path / "new").exists()


class NeverRead:
    """A source whose documents nobody may ask for."""


@pytest.mark.parametrize("load", [ChunkEmbedder, load_tokenizer])
def test_what_cannot_be_loaded_is_named(load, tmp_path):
    with pytest.raises(ValueError, match=f"`(embedder|tokenizer)` '{tmp_path}/absent' cannot be loaded"):
        load(tmp_path / "absent")


def test_the_number_of_workers_changes_no_byte(tmp_path, build, embedder, digests):
    texts = [" ".join(f"w{(n * n + d) % 200}" for n in range(40)) for d in range(12)]
    for workers in (1, 2, 3):
        folder = tmp_path / str(workers)
        build(folder, texts, until="tokenize", shard_chunks=50)
        embed_corpus(folder, embedder, workers)
        find_neighbours(folder, 3, workers=workers)
    assert digests(tmp_path / "1") == digests(tmp_path / "2") == digests(tmp_path / "3")


def test_finished_stages_are_left_alone_and_say_so(tmp_path, build, embedder, caplog):
    build(tmp_path, ["w1 w2", "w3", "w4", "w5"])
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    with caplog.at_level("INFO"):
        embed_corpus(tmp_path, embedder)
        find_neighbours(tmp_path, 3)
        pack_sequences(tmp_path, 32)
    assert [stage for stage in ("embed", "neighbours", "pack") if f"{stage} is complete already" in caplog.text] == [
        "embed",
        "neighbours",
        "pack",
    ]
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == times


def test_another_embedder_is_refused_with_both_names(tmp_path, build, encoder_folder, embedder):
    build(tmp_path, ["w1 w2", "w3", "w4", "w5"])
    other = ChunkEmbedder(encoder_folder, settings=EmbedderSettings("cls"))
    with pytest.raises(ValueError, match="`pooling` is 'cls', but stage 'embed' .* was run with 'mean'; .*overwrite"):
        embed_corpus(tmp_path, other)
    changed = ChunkEmbedder(encoder_folder)
    changed.model.embeddings.word_embeddings.weight.data[7] += 1
    with pytest.raises(ValueError, match=r"`embedder` is /.* sha256 \w{12}, but .* was run with /.* sha256 \w"):
        embed_corpus(tmp_path, changed)
    corpus = embed_corpus(tmp_path, changed, overwrite=True)
    assert not corpus.manifest.files_of("neighbours")
    assert not list((tmp_path / "neighbours").iterdir())
    with pytest.raises(CorpusError, match="stage 'neighbours' has not run"):
        corpus.neighbours  # noqa: B018


def test_stages_in_the_wrong_order_are_refused(tmp_path, build, embedder):
    with pytest.raises(FileNotFoundError, match=r"has no manifest\.json"):
        embed_corpus(tmp_path, embedder)
    build(tmp_path, ["w1 w2", "w3"], until="tokenize")
    with pytest.raises(CorpusError, match="stage 'embed' has not run; run it"):
        find_neighbours(tmp_path)
    with pytest.raises(ValueError, match="`num_neighbours` must be at least 1, got 0"):
        find_neighbours(tmp_path, 0)
    with pytest.raises(ValueError, match="`sequence_length` must be a multiple of the corpus's chunk_size 8, got 12"):
        pack_sequences(tmp_path, 12)


def test_append_has_a_limit_of_its_own(tmp_path, build, embedder, caplog):
    texts = [" ".join(f"w{n * d % 200}" for n in range(5)) for d in range(1, 8)]  # of one chunk each
    build(tmp_path, texts[:4], max_chunks=4)
    more = DatasetRows([{"text": text} for text in texts[4:6]])
    assert len(append_documents(more, tmp_path, embedder, workers=1, max_chunks=5)) == 5
    assert "`max_chunks` 5 reached: row:1 and what follows" in caplog.text
    caplog.clear()
    assert len(append_documents(DatasetRows([{"text": texts[6]}]), tmp_path, embedder, workers=1)) == 6
    assert "reached" not in caplog.text
    assert verify_corpus(tmp_path) == []


def test_appended_documents_are_embedded_searched_and_packed(tmp_path, build, naive_neighbours, embedder):
    texts = [" ".join(f"w{(7 * n * d + d) % 200}" for n in range(5 * d)) for d in range(1, 8)]
    before = build(tmp_path, texts[:4])
    old = everything(before.neighbours)
    after = append_documents(DatasetRows([{"text": t} for t in texts[4:]]), tmp_path, embedder, workers=1)
    vectors = everything(after.embeddings)
    ids, _ = naive_neighbours(vectors, vectors, 3, own_ranges(after))
    assert (everything(after.neighbours)[: len(old)] == old).all()
    assert everything(after.neighbours)[len(old) :].tolist() == ids[len(old) :]
    assert after.sequences[:, 1].sum() == len(after)
    assert everything(refresh_neighbours(tmp_path).neighbours).tolist() == ids
