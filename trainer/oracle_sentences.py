"""The sentences of a source that tell most of its target: what the training view "oracle" reads.

Bertsch et al. 2023 (arXiv 2305.01625) train on such sentences to see what choosing them well would be worth. Greedy:
the next sentence is the one with which those chosen so far have the highest F1 of words times F1 of pairs of words.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from nupunkt import sent_spans
from rouge_score.tokenizers import DefaultTokenizer
from transformers import PreTrainedTokenizerBase

from graft.trainer.tokenisation import Batch, TokenSettings, joined_sources, plain_ids


@cache
def _stemming() -> DefaultTokenizer:
    return DefaultTokenizer(use_stemmer=True)


class _Overlap:
    """How many terms of the target the chosen sentences have, and would have with each other sentence.

    Args:
        sentences, target: terms, words or pairs of words; a term counts as often as the target has it at most.
    """

    def __init__(self, sentences: Sequence[Sequence[object]], target: Sequence[object]) -> None:
        wanted = Counter(target)
        column = {term: number for number, term in enumerate(wanted)}
        self.wanted = np.array(list(wanted.values()), dtype=np.int64)
        self.counts = np.zeros((len(sentences), len(column)), dtype=np.int64)
        for row, terms in enumerate(sentences):
            for term in terms:
                if term in column:
                    self.counts[row, column[term]] += 1
        self.sizes = np.array([len(terms) for terms in sentences], dtype=np.int64)
        self.chosen, self.size = np.zeros(len(column), dtype=np.int64), 0

    def scores(self) -> NDArray[np.float64]:
        """F1, were each sentence added to the chosen ones."""
        shared = np.minimum(self.chosen + self.counts, self.wanted).sum(axis=1)
        return 2 * shared / np.maximum(self.size + self.sizes + self.wanted.sum(), 1)

    def add(self, sentence: int) -> None:
        """Choose it."""
        self.chosen += self.counts[sentence]
        self.size += int(self.sizes[sentence])


def choose_sentences(
    sentences: Sequence[Sequence[str]], target: Sequence[str], costs: Sequence[int], budget: int
) -> list[int]:
    """Numbers of the sentences to keep, in their own order, at most `budget` in `costs` together.

    Sentences are added while one fits. Equal products (all are 0 while no pair of words is shared) are decided by the
    F1 of words, then by which comes first.

    Args:
        sentences: words of each sentence. Pairs of words lie within a sentence.
        target: words of the target.
        costs: tokens of each sentence.
    """
    words = _Overlap(sentences, target)
    pairs = _Overlap([list(pairwise(terms)) for terms in sentences], list(pairwise(target)))
    left, price = np.ones(len(sentences), dtype=bool), np.asarray(costs)
    chosen: list[int] = []
    while len(candidates := np.flatnonzero(left & (price <= budget))):
        by_word = words.scores()[candidates]
        product = by_word * pairs.scores()[candidates]
        best = int(candidates[np.lexsort((-candidates, by_word, product))[-1]])
        for overlap in (words, pairs):
            overlap.add(best)
        left[best] = False
        budget -= int(price[best])
        chosen.append(best)
    return sorted(chosen)


def oracle_sources(batch: Batch, tokenizer: PreTrainedTokenizerBase, settings: TokenSettings) -> Batch:
    """The batch with each source cut down to the sentences that `choose_sentences` keeps of it.

    A source that fits `settings.source_limit`, prefixes, suffix and special tokens included, stays as it is; one whose
    sentences are all longer than that keeps its first, for the tokeniser to cut. New is the column `sentences_left`.
    """
    assert settings.source_limit is not None
    without = batch | {"source": [""] * len(batch["source"])}
    around, _ = joined_sources(without, tokenizer, replace(settings, source_limit=None), end=True)
    sources, left_out = [], []
    for source, target, (fixed, _) in zip(batch["source"], batch["target"], around, strict=True):
        texts = [source[start:end] for start, end in sent_spans(source)]
        words = [_stemming().tokenize(text) for text in texts]
        costs = [len(ids) for ids in plain_ids(tokenizer, texts)]
        room = settings.source_limit - len(fixed)
        kept = choose_sentences(words, _stemming().tokenize(target), costs, room) or [0]
        sources.append("".join(texts[number] for number in kept))
        left_out.append(len(texts) - len(kept))
    return {"source": sources, "sentences_left": left_out}
