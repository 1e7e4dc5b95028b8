"""BM25 over token ids equals a loop over tokens, and finds nothing where nothing is shared."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis.strategies import integers

from graft.modeling.retro.passage_retriever import PassageRetriever, read_passages, write_passages

PAD = 0


def naive_scores(passages, chunk_size, query):
    documents = [[token for token in row[:chunk_size] if token != PAD] for row in passages]
    mean = sum(map(len, documents)) / len(documents)
    scores = []
    for words in documents:
        score = 0.0
        for token in set(query):
            having = sum(token in others for others in documents)
            often = words.count(token)
            rarity = math.log(1 + (len(documents) - having + 0.5) / (having + 0.5))
            score += rarity * often / (often + 1.5 * (1 - 0.75 + 0.75 * len(words) / mean)) if often else 0.0
        scores.append(score)
    return scores


@given(seed=integers(0, 2**32 - 1), count=integers(1, 9), rows=integers(1, 3), wanted=integers(1, 4))
def test_neighbours_are_those_that_a_loop_over_tokens_scores_best(seed, count, rows, wanted):
    rng = torch.Generator().manual_seed(seed)
    passages = torch.randint(1, 12, (count, 7), generator=rng)
    passages[-1, 3:] = PAD
    queries = torch.randint(1, 20, (rows, 4), generator=rng)  # some ids are in no passage
    found = PassageRetriever(passages, 4, PAD, wanted)(queries)
    assert found.shape == (rows, min(wanted, count), 7)
    for query, neighbours in zip(queries.tolist(), found, strict=True):
        scores = naive_scores(passages.tolist(), 4, query)
        kept = sorted(scores, reverse=True)[: len(neighbours)]
        for best, neighbour in zip(kept, neighbours, strict=True):
            if best == 0:
                assert (neighbour == PAD).all()
            else:
                alike = [number for number, row in enumerate(passages) if torch.equal(row, neighbour)]
                assert any(scores[number] == pytest.approx(best, rel=1e-5) for number in alike)


def test_what_follows_a_chunk_and_padding_are_no_words():
    passages = torch.tensor([[5, 6, 9, 9], [7, 8, 5, 6], [7, PAD, 9, PAD]])
    retriever = PassageRetriever(passages, 2, PAD, num_neighbours=1)
    assert retriever(torch.tensor([[9, 9], [6, PAD]])).tolist() == [[[PAD] * 4], [[5, 6, 9, 9]]]


def test_a_file_gives_the_retriever_back_with_the_padding_that_the_model_has(tmp_path):
    path = write_passages(tmp_path, torch.tensor([[5, 6, 9, 3], [7, 3, 3, 3]]), 2, pad_token_id=3)
    assert [file.name for file in tmp_path.iterdir()] == ["passages.safetensors"]
    found = read_passages(path, pad_token_id=1, num_neighbours=2)(torch.tensor([[5, 5]]))
    assert found.tolist() == [[[5, 6, 9, 1], [1, 1, 1, 1]]]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((torch.zeros(0, 4), 2, 0), r"`passages` must be \(passages, neighbour_length\), got \(0, 4\)"),
        ((torch.zeros(3), 2, 0), r"got \(3,\)"),
        ((torch.ones(3, 4), 0, 0), "`chunk_size` must be at least 1, got 0"),
        ((torch.ones(3, 4), 2, 0, 0), "`num_neighbours` must be at least 1, got 0"),
    ],
)
def test_what_holds_no_passages_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        PassageRetriever(*given)
