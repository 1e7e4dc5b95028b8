"""Memory that is lent again never lies under a tensor that somebody still has."""

import copy
import pickle

import torch
from hypothesis import given
from hypothesis import strategies as st

from graft.retrieval.corpus.reused_memory import ReusedMemory

STEPS = st.lists(st.tuples(st.integers(1, 40), st.integers(0, 5)), max_size=40)


@given(STEPS, st.integers(0, 1000))
def test_what_is_held_keeps_its_numbers_whatever_is_lent_afterwards(steps, most):
    memory, held = ReusedMemory(most), []
    for number, (count, forgotten) in enumerate(steps):
        lent = memory.lend(count)
        assert (lent.shape, lent.dtype) == ((count,), torch.int64)
        lent.fill_(number)
        held.append((number, lent[count // 2 :].unbind()[-1]))  # a view of a view is enough
        del held[:forgotten]
        assert all((view == value).all() for value, view in held)


def test_only_so_many_bytes_are_kept():
    memory = ReusedMemory(800)
    held = [memory.lend(25) for _ in range(6)]  # 200 bytes each
    held.clear()
    assert len(memory._free) == 4
    memory.lend(101)
    assert not memory._free


def test_a_block_comes_back_when_the_last_view_goes_and_not_before():
    memory = ReusedMemory()
    lent = memory.lend(100)
    place, views = lent.data_ptr(), [lent[:10], lent.view(10, 10).numpy()]
    del lent
    assert memory.lend(100).data_ptr() != place
    views.pop(0)
    assert memory.lend(100).data_ptr() != place
    views.clear()
    assert place in {memory._block(100).ctypes.data for _ in range(2)}


def test_a_block_much_too_large_is_not_lent():
    memory = ReusedMemory()
    memory.lend(1000)
    assert len(memory._block(400)) == 400


def test_a_copy_has_memory_of_its_own():
    memory = ReusedMemory(500)
    memory.lend(10)
    for other in (pickle.loads(pickle.dumps(memory)), copy.deepcopy(memory)):
        assert (other.most, len(other._free)) == (500, 0)
