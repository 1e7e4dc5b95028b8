import numpy as np
import pytest
from hypothesis import given
from hypothesis.strategies import integers, lists

from graft.retrieval.corpus.packing import packed_rows

LENGTHS = lists(integers(1, 12), min_size=1, max_size=10)


@given(lengths=LENGTHS, chunks_per_row=integers(1, 6))
@pytest.mark.parametrize("pack", ["multi", "document"])
def test_rows_hold_every_chunk_once_and_in_order(lengths, chunks_per_row, pack):
    documents = np.cumsum([0, *lengths])
    rows = packed_rows(documents, chunks_per_row, pack)
    assert [chunk for start, count in rows for chunk in range(start, start + count)] == list(range(documents[-1]))
    assert (rows[:, 1] <= chunks_per_row).all()
    assert rows.dtype == np.int64


@given(lengths=LENGTHS, chunks_per_row=integers(1, 6))
def test_rows_of_many_documents_are_full_but_the_last(lengths, chunks_per_row):
    rows = packed_rows(np.cumsum([0, *lengths]), chunks_per_row)
    assert (rows[:-1, 1] == chunks_per_row).all()


@given(lengths=LENGTHS, chunks_per_row=integers(1, 6))
def test_rows_of_one_document_do_not_reach_into_the_next(lengths, chunks_per_row):
    documents = np.cumsum([0, *lengths])
    expected = [
        [start, min(chunks_per_row, end - start)]
        for begin, end in zip(documents[:-1], documents[1:], strict=True)
        for start in range(begin, end, chunks_per_row)
    ]
    assert packed_rows(documents, chunks_per_row, "document").tolist() == expected


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match='`pack` must be "multi" or "document", got \'best\''):
        packed_rows(np.array([0, 3]), 2, "best")
