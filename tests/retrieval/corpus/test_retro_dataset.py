import pickle
import shutil

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from graft.retrieval.corpus.corpus import Corpus
from graft.retrieval.corpus.packing import pack_sequences
from graft.retrieval.corpus.retro_collator import DataCollatorForRetro
from graft.retrieval.corpus.retro_dataset import RetroDataset


def naive_passage(corpus, chunk, length):
    """Token by token: the chunk, then its document's next ones; padding beyond the document."""
    if chunk < 0:
        return [0] * length
    _, end = corpus.document_range(int(corpus.document_of(np.asarray([chunk]))[0]))
    ids = []
    for at in range(chunk, chunk + -(-length // corpus.chunk_size)):
        ids += corpus.tokens.between(at, at + 1)[0].tolist() if at < end else [0] * corpus.chunk_size
    return ids[:length]


def naive_row(corpus, start, count, length, neighbours, neighbour_length):
    size = corpus.chunk_size
    row = {"input_ids": [], "labels": [], "position_ids": [], "document_offsets": [], "retrieved": []}
    position = 0
    for chunk in range(start, start + count):
        document = int(corpus.document_of(np.asarray([chunk]))[0])
        first, end = corpus.document_range(document)
        if chunk in (first, start):
            row["document_offsets"].append(len(row["input_ids"]))
            position = 0
        real = int(corpus.last_lengths[document]) if chunk == end - 1 else size
        for offset, token in enumerate(corpus.tokens.between(chunk, chunk + 1)[0].tolist()):
            begins = offset == 0 and chunk in (first, start)
            row["input_ids"].append(token)
            row["labels"].append(-100 if begins or offset >= real else token)
            row["position_ids"].append(position)
            position += 1
        unread = chunk in (end - 1, start + count - 1)
        found = [-1] * neighbours if unread else corpus.neighbours.between(chunk, chunk + 1)[0, :neighbours]
        row["retrieved"].append([naive_passage(corpus, int(i), neighbour_length) for i in found])
    while len(row["input_ids"]) < length:
        row["input_ids"].append(0)
        row["labels"].append(-100)
        row["position_ids"].append(position)
        position += 1
    row["retrieved"] += [[[0] * neighbour_length] * neighbours] * (length // size - count)
    return row


@pytest.mark.parametrize("pack", ["multi", "document"])
@pytest.mark.parametrize(("neighbours", "length"), [(2, 16), (3, 8), (1, 5), (2, 21)])
def test_rows_equal_those_gathered_token_by_token(tmp_path, build, corpus, pack, neighbours, length):
    shutil.copytree(corpus.folder, tmp_path / "copy")
    packed = pack_sequences(tmp_path / "copy", 40, pack)
    rows = RetroDataset(packed, neighbours, length)
    assert len(rows) == len(packed.sequences)
    for index, (start, count) in enumerate(packed.sequences.tolist()):
        row = rows[index]
        assert {tensor.dtype for tensor in row.values()} == {torch.int64}
        expected = naive_row(packed, start, count, 40, neighbours, length)
        assert {name: tensor.tolist() for name, tensor in row.items()} == expected


def test_rows_gathered_together_are_those_gathered_alone(corpus):
    for legacy in (False, True):
        rows = RetroDataset(corpus, legacy=legacy)
        asked = [2, 0, len(rows) - 1, 2]
        for together, index in zip(rows.__getitems__(asked), asked, strict=True):
            alone = rows[index]
            pairs = zip(together, alone, strict=True) if legacy else ((together[k], alone[k]) for k in alone)
            assert all(torch.equal(ours, theirs) for ours, theirs in pairs)


def test_labels_hold_every_token_that_can_be_predicted_once(corpus):
    rows = RetroDataset(corpus)
    labelled = torch.cat([row["labels"] for row in rows])
    pieces = sum(len(row["document_offsets"]) for row in rows)
    assert (labelled != -100).sum() == corpus.manifest.counts["tokens"] - pieces


def test_continuations_stay_inside_their_document(corpus):
    for document in range(corpus.num_documents):
        first, end = corpus.document_range(document)
        chunks = np.arange(first, end)
        passages = corpus.passages(chunks, 3 * corpus.chunk_size)
        own = corpus.tokens.between(first, end).reshape(-1).tolist() + [0] * 2 * corpus.chunk_size
        for index, passage in enumerate(passages.tolist()):
            assert passage == own[index * corpus.chunk_size :][: 3 * corpus.chunk_size]


def test_legacy_items_have_the_next_token_and_all_neighbours(corpus):
    for index, (ids, retrieved) in enumerate(RetroDataset(corpus, legacy=True)):
        start, count = corpus.sequences[index].tolist()
        assert (ids.shape, retrieved.shape) == ((33,), (4, 2, 16))
        chunks = corpus.tokens.between(start, start + count).reshape(-1).tolist()
        end = start + count
        follows = end not in corpus.documents.tolist()
        after = [int(corpus.tokens.between(end, end + 1)[0, 0])] if follows else []
        assert ids.tolist() == chunks + after + [0] * (33 - len(chunks) - len(after))
        expected = [[naive_passage(corpus, i, 16) for i in row[:2]] for row in corpus.neighbours.between(start, end)]
        assert retrieved[:count].tolist() == expected


def test_worker_processes_give_what_one_process_gives(corpus):
    rows = RetroDataset(corpus)
    assert len(pickle.dumps(rows)) < 2000  # the maps are opened again, not sent
    collate = DataCollatorForRetro(corpus.pad_token_id)
    alone = list(DataLoader(rows, batch_size=3, collate_fn=collate))
    shared = DataLoader(rows, batch_size=3, collate_fn=collate, num_workers=2, multiprocessing_context="spawn")
    for ours, theirs in zip(shared, alone, strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_collator_fills_shorter_rows_up_at_the_end():
    def row(chunks):
        ids = torch.arange(1, 4 * chunks + 1)
        return {"input_ids": ids, "labels": ids, "position_ids": ids - 1, "retrieved": torch.ones(chunks, 2, 8).long()}

    batch = DataCollatorForRetro(9)([row(1), row(3)])
    assert batch["input_ids"][0].tolist() == [1, 2, 3, 4] + [9] * 8
    assert batch["labels"][0].tolist() == [1, 2, 3, 4] + [-100] * 8
    assert batch["position_ids"][0].tolist() == list(range(12))
    assert batch["retrieved"].shape == (2, 3, 2, 8)
    assert (batch["retrieved"][0, 1:] == 9).all()
    assert batch["input_ids"][1].tolist() == list(range(1, 13))


def test_numbers_out_of_range_are_refused(corpus, tmp_path, build):
    with pytest.raises(ValueError, match=r"`num_neighbours` must lie in 1 \.\.\. 3, .* got 4"):
        RetroDataset(corpus, 4)
    with pytest.raises(ValueError, match="`neighbour_length` must be at least 1, got 0"):
        RetroDataset(corpus, 2, 0)
    with pytest.raises(IndexError, match="the data set has"):
        RetroDataset(corpus)[len(RetroDataset(corpus))]
    unpacked = build(tmp_path, ["w1", "w2", "w3", "w4"], until="neighbours")
    with pytest.raises(ValueError, match="stage 'pack' has not run"):
        RetroDataset(Corpus(unpacked.folder))


def test_a_model_that_cannot_read_the_rows_is_told_why(corpus):
    rows = RetroDataset(corpus)
    rows.check_model(corpus.chunk_size, corpus.vocab_size)
    with pytest.raises(ValueError, match=r"`chunk_size` of the model is 4, .* is cut into chunks of 8 tokens"):
        rows.check_model(4, corpus.vocab_size)
    with pytest.raises(
        ValueError, match=r"`vocab_size` of the model is 203, .* ids up to 203; it must be at least 204"
    ):
        rows.check_model(8, 203)
