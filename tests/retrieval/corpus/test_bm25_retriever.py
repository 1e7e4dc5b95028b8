import math
from collections import Counter

import numpy as np
import pytest
import torch

pytest.importorskip("bm25s", reason="the extra graft-transformers[bm25] is not installed")

from graft.retrieval.corpus.bm25_retriever import BM25Retriever


def naive_scores(query, texts, k1=1.5, b=0.75):
    """BM25 as Lucene has it: each word of the query once per time it stands there."""
    documents = [text.split() for text in texts]
    average = sum(map(len, documents)) / len(documents)
    scores = []
    for words in documents:
        counts, score = Counter(words), 0.0
        for word in query.split():
            holding = sum(word in other for other in documents)
            if holding:
                rarity = math.log(1 + (len(documents) - holding + 0.5) / (holding + 0.5))
                length = 1 - b + b * len(words) / average
                score += rarity * counts[word] / (counts[word] + k1 * length)
        scores.append(score)
    return np.asarray(scores)


def test_scores_equal_the_formula_and_ties_go_to_the_smaller_number(corpus):
    texts = corpus.texts(np.arange(len(corpus)))
    asked = [1, 4, 9, 30]
    ids, scores = BM25Retriever(corpus, 3).search(torch.from_numpy(corpus.tokens.take(np.asarray(asked)).astype(int)))
    for row, chunk in enumerate(asked):
        expected = naive_scores(texts[chunk], texts)
        best = [i for i in np.argsort(-expected, kind="stable")[:3] if expected[i] > 0]
        np.testing.assert_allclose(scores[row, : len(best)], expected[best], rtol=1e-4)
        assert ids[row, 0] == chunk


def test_excluded_documents_and_chunks_without_a_shared_word_are_not_found(tmp_path, build):
    corpus = build(tmp_path, ["w10 w11", "w10 w12", "w13 w14"], until="tokenize")
    retriever = BM25Retriever(corpus, 2, exclude_documents=["row:0"])
    chunks = torch.from_numpy(corpus.tokens.between(0, 1).astype(np.int64))
    ids, scores = retriever.search(chunks)
    assert ids.tolist() == [[1, -1]]
    assert scores[0, 1] == 0
    found = retriever(chunks)
    assert found.shape == (1, 2, 16)
    assert found[0, 0, :8].tolist() == corpus.tokens.between(1, 2)[0].tolist()
    assert (found[0, 1] == corpus.pad_token_id).all()
    assert "1 chunks excluded" in repr(retriever)
    with pytest.raises(ValueError, match="`num_neighbours` must be at least 1, got 0"):
        BM25Retriever(corpus, 0)
