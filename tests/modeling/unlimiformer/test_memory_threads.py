"""Threads may read different memories through one model at once: a generation's state lies in its cache alone."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch

from graft.configuration.configuration_unlimiformer import UnlimiformerConfig
from graft.modeling.unlimiformer.attach import unlimiform

THREADS = 2


def answers_in_turn_and_at_once(tiny, family, rounds, mode_changes=False):
    """Tokens of `rounds` generations by each of two threads, first one after the other, then at once."""
    model = tiny.model(family)
    handle = unlimiform(model, UnlimiformerConfig(window=16, keys_per_query=4, store="auto"))
    memories = [handle.remember(tiny.ids(2, length, seed=length)) for length in (45, 33)]
    question = tiny.ids(2, 4, seed=7)
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "num_beams": 2, "do_sample": False}

    def answer(memory):
        asked = () if model.config.is_encoder_decoder else (question,)
        return model.generate(**memory.inputs(*asked), **options)

    in_turn = [answer(memory) for memory in memories]
    start = Barrier(THREADS)

    def work(number):
        start.wait()
        found = []
        for i in range(rounds):
            if mode_changes:
                model.train() if i % 2 else model.eval()
            found.append(answer(memories[number]))
        return found

    with ThreadPoolExecutor(THREADS) as pool:
        at_once = list(pool.map(work, range(THREADS)))
    handle.remove()
    return in_turn, at_once


@pytest.mark.parametrize("rounds", [4, pytest.param(100, marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", ["bart", "llama"])
def test_two_threads_with_different_memories_answer_as_one_after_the_other(tiny, family, rounds):
    in_turn, at_once = answers_in_turn_and_at_once(tiny, family, rounds)
    assert not torch.equal(*in_turn)
    for expected, found in zip(in_turn, at_once, strict=True):
        assert all(torch.equal(each, expected) for each in found)


@pytest.mark.parametrize("family", ["bart", "llama"])
def test_train_and_eval_in_between_change_no_answer(tiny, family):
    in_turn, at_once = answers_in_turn_and_at_once(tiny, family, 4, mode_changes=True)
    for expected, found in zip(in_turn, at_once, strict=True):
        assert all(torch.equal(each, expected) for each in found)


def test_two_threads_may_remember_at_once(tiny):
    model = tiny.model("llama")
    documents = [tiny.ids(2, length, seed=length) for length in (60, 70)]
    with unlimiform(model, UnlimiformerConfig(window=16)) as handle:
        expected = [handle.remember(ids) for ids in documents]
        with ThreadPoolExecutor(THREADS) as pool:
            found = list(pool.map(handle.remember, documents * 3))
    for i, memory in enumerate(found):
        for name, tensor in memory.tensors().items():
            assert torch.equal(tensor, expected[i % 2].tensors()[name])


def test_a_report_of_one_thread_notes_nothing_of_another(tiny):
    model = tiny.model("llama")
    with unlimiform(model, UnlimiformerConfig(window=16, keys_per_query=4)) as handle:
        memory, question = handle.remember(tiny.ids(1, 45)), tiny.ids(1, 4)
        start = Barrier(THREADS)

        def recorded(length):
            with handle.record() as report:
                start.wait()
                model.generate(**memory.inputs(question), max_new_tokens=length, min_new_tokens=length)
            return report.steps

        with ThreadPoolExecutor(THREADS) as pool:
            steps = list(pool.map(recorded, (3, 6)))
    assert steps == [list(range(4 + 2)), list(range(4 + 5))]
