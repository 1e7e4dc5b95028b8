"""How good generated texts and predicted tokens are: one function for each metric, all of them offline.

A metric of texts is `metric(predictions, references, **options) -> MetricResult`. Values of rouge, exact_match, f1,
bleu and chrf lie between 0 and 100. An empty prediction scores 0; an empty reference is an error: any score would
mislead.
"""

from __future__ import annotations

import inspect
import math
import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from importlib.util import find_spec
from typing import Any

import numpy as np
from nupunkt import sent_tokenize
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from graft.trainer.configuration_error import ConfigurationError


@dataclass(frozen=True)
class MetricResult:
    """Values of one metric over a set of texts.

    Args:
        mean: value name -> the value reported for the whole set (bleu and chrf: the corpus value, no mean).
        per_sample: value name -> one value for each prediction.
        signature: what the values depend on besides the texts: library, version, settings.
    """

    mean: dict[str, float]
    per_sample: dict[str, list[float]]
    signature: dict[str, str] = field(default_factory=dict)


Metric = Callable[[Sequence[str], Sequence[Sequence[str]]], MetricResult]


def check_references(references: Sequence[Sequence[str]], ids: Sequence[str] | None = None) -> None:
    """Refuse rows without a reference, or with an empty one.

    Raises:
        ValueError: names the row's id, or its number where there are no ids.
    """
    for row, texts in enumerate(references):
        if not texts or not all(text.strip() for text in texts):
            raise ValueError(f"The reference of row {row if ids is None else repr(ids[row])} is empty.")


def _averaged(per_sample: dict[str, list[float]], signature: dict[str, str] | None = None) -> MetricResult:
    mean = {name: float(np.mean(values)) if values else 0.0 for name, values in per_sample.items()}
    return MetricResult(mean, per_sample, signature or {})


@lru_cache(maxsize=4096)  # the same references come back at every evaluation
def _sentence_per_line(text: str) -> str:
    """ROUGE-Lsum compares sentences, which it finds at line ends only."""
    return "\n".join(str(sentence).strip() for sentence in sent_tokenize(text) if str(sentence).strip())


def rouge(predictions: Sequence[str], references: Sequence[Sequence[str]], stemmer: bool = True) -> MetricResult:
    """ROUGE-1, -2, -L, -Lsum (F-measure, x 100) and geometric_mean = (R1 R2 RL)^(1/3); the best reference counts.

    Lin 2004. The geometric mean is that of SCROLLS (Shaham et al. 2022), per sample; its RL is rougeL. The mean of the
    set is the geometric mean of the three means, as there.
    """
    check_references(references)
    names = ("rouge1", "rouge2", "rougeL", "rougeLsum")
    plain = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=stemmer)
    by_sentence = RougeScorer(["rougeLsum"], use_stemmer=stemmer)
    per_sample: dict[str, list[float]] = {name: [] for name in (*names, "geometric_mean")}
    for prediction, texts in zip(predictions, references, strict=True):
        scored = [
            plain.score(text, prediction) | by_sentence.score(_sentence_per_line(text), _sentence_per_line(prediction))
            for text in texts
        ]
        best = {name: max(100 * scores[name].fmeasure for scores in scored) for name in names}
        best["geometric_mean"] = (best["rouge1"] * best["rouge2"] * best["rougeL"]) ** (1 / 3)
        for name, value in best.items():
            per_sample[name].append(value)
    result = _averaged(per_sample, {"rouge": f"rouge_score, stemmer {stemmer}, sentences by nupunkt"})
    product = math.prod(result.mean[name] for name in ("rouge1", "rouge2", "rougeL"))
    return MetricResult(result.mean | {"geometric_mean": product ** (1 / 3)}, per_sample, result.signature)


def _normalised_words(text: str) -> list[str]:
    """Lower case without punctuation and articles, as SQuAD compares answers (Rajpurkar et al. 2016)."""
    text = text.lower().translate(str.maketrans("", "", string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def exact_match(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> MetricResult:
    """100 where a prediction equals a reference but for case, articles and punctuation, else 0."""
    check_references(references)
    values = [
        100.0
        * (bool(prediction.strip()) and any(_normalised_words(prediction) == _normalised_words(t) for t in texts))
        for prediction, texts in zip(predictions, references, strict=True)
    ]
    return _averaged({"exact_match": values})


def _token_f1(prediction: str, reference: str) -> float:
    predicted, wanted = _normalised_words(prediction), _normalised_words(reference)
    if not predicted or not wanted:  # an answer of articles only; equal means right, as in SQuAD 2.0
        return float(bool(prediction.strip()) and predicted == wanted)
    common = (Counter(predicted) & Counter(wanted)).total()
    return 2 * common / (len(predicted) + len(wanted))


def f1(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> MetricResult:
    """Harmonic mean of precision and recall of words, x 100, compared as in `exact_match`; best reference."""
    check_references(references)
    pairs = zip(predictions, references, strict=True)
    return _averaged({"f1": [100 * max(_token_f1(prediction, t) for t in texts) for prediction, texts in pairs]})


def _sacrebleu(
    name: str, corpus: BLEU | CHRF, sentence: BLEU | CHRF, texts: tuple[Sequence[str], Sequence[Sequence[str]]]
) -> MetricResult:
    predictions, references = texts
    check_references(references)
    if not predictions:
        return MetricResult({name: 0.0}, {name: []}, {})
    longest = max(map(len, references))
    # sacrebleu wants one list for each reference number; rows with fewer references have None there.
    streams: list[Any] = [[texts[i] if i < len(texts) else None for texts in references] for i in range(longest)]
    value = corpus.corpus_score(list(predictions), streams).score
    pairs = zip(predictions, references, strict=True)
    values = [sentence.sentence_score(prediction, list(texts)).score for prediction, texts in pairs]
    return MetricResult({name: value}, {name: values}, {name: str(corpus.get_signature())})


def bleu(predictions: Sequence[str], references: Sequence[Sequence[str]], lowercase: bool = False) -> MetricResult:
    """Corpus BLEU (Papineni et al. 2002) by sacrebleu; per sample: sentence BLEU with effective order."""
    corpus, sentence = BLEU(lowercase=lowercase), BLEU(lowercase=lowercase, effective_order=True)
    return _sacrebleu("bleu", corpus, sentence, (predictions, references))


def chrf(predictions: Sequence[str], references: Sequence[Sequence[str]], word_order: int = 0) -> MetricResult:
    """Corpus chrF (Popović 2015) by sacrebleu, chrF++ with `word_order` 2; per sample: sentence chrF."""
    return _sacrebleu("chrf", CHRF(word_order=word_order), CHRF(word_order=word_order), (predictions, references))


def lengths(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> MetricResult:
    """Characters and words of the predictions, and their words relative to those of the first reference."""
    check_references(references)
    words = [float(len(prediction.split())) for prediction in predictions]
    ratios = [count / len(texts[0].split()) for count, texts in zip(words, references, strict=True)]
    characters = [float(len(prediction)) for prediction in predictions]
    return _averaged({"characters": characters, "words": words, "length_ratio": ratios})


def bert_score(
    predictions: Sequence[str], references: Sequence[Sequence[str]], model: str = "", num_layers: int = 0
) -> MetricResult:
    """BERTScore precision, recall and F1, x 100 (Zhang et al. 2020), by the package of that name.

    Args:
        model: folder of an encoder on this machine.
        num_layers: the layer whose states are compared; the package knows it for models of the Hub only.

    Raises:
        ConfigurationError: the package is absent, or `model` or `num_layers` is not given.
    """
    check_references(references)
    if find_spec("bert_score") is None:
        raise ConfigurationError("The metric bert_score needs a package: pip install 'graft-transformers[metrics]'.")
    if not model or num_layers < 1:
        raise ConfigurationError(
            'The metric bert_score must be given as {"name": "bert_score", "model": FOLDER, "num_layers": N}, got '
            f"model {model!r}, num_layers {num_layers}."
        )
    from bert_score import score

    # Of several references the package takes the best of each value, which may be of different ones.
    values = score(list(predictions), [list(t) for t in references], model_type=model, num_layers=num_layers)
    empty = [not prediction.strip() for prediction in predictions]
    per_sample = {
        f"bert_score_{name}": [0.0 if none else 100 * float(v) for v, none in zip(column, empty, strict=True)]
        for name, column in zip(("precision", "recall", "f1"), values, strict=True)
    }
    return _averaged(per_sample, {"bert_score": f"{model} layer {num_layers}"})


METRICS: dict[str, Callable[..., MetricResult]] = {
    "bert_score": bert_score,
    "bleu": bleu,
    "chrf": chrf,
    "exact_match": exact_match,
    "f1": f1,
    "lengths": lengths,
    "rouge": rouge,
}

METRIC_VALUES: dict[str, tuple[str, ...]] = {
    "bert_score": ("bert_score_precision", "bert_score_recall", "bert_score_f1"),
    "bleu": ("bleu",),
    "chrf": ("chrf",),
    "exact_match": ("exact_match",),
    "f1": ("f1",),
    "lengths": ("characters", "words", "length_ratio"),
    "rouge": ("rouge1", "rouge2", "rougeL", "rougeLsum", "geometric_mean"),
}
"""The names in `MetricResult.mean` of each metric, known before anything runs."""

TOKEN_METRICS = ("perplexity", "bits_per_byte")
"""Computed from likelihoods, without generated texts."""


def metric_named(metric: str | Mapping[str, Any]) -> Metric:
    """The function for a name, or for {"name": ..., option: value}.

    Raises:
        ConfigurationError: lists the names, or the options of that metric.
    """
    options = dict(metric) if isinstance(metric, Mapping) else {"name": metric}
    name = options.pop("name", None)
    if name not in METRICS:
        known = ", ".join(sorted([*METRICS, *TOKEN_METRICS]))
        hint = " (rougeL is a value of rouge)" if str(name).startswith("rouge") else ""
        raise ConfigurationError(f"`metrics` has no {name!r}{hint}; there are {known}.")
    allowed = list(inspect.signature(METRICS[name]).parameters)[2:]
    if unknown := sorted(set(options) - set(allowed)):
        raise ConfigurationError(f"The metric {name} has no option {unknown[0]!r}; it has {allowed or 'none'}.")
    return partial(METRICS[name], **options)


def perplexity(negative_log_likelihood: float, num_tokens: int) -> float:
    """exp(NLL / tokens), where NLL is the sum over all scored tokens in nats; infinite where floats end."""
    if num_tokens < 1:
        raise ValueError(f"`num_tokens` must be at least 1, got {num_tokens}: nothing was scored.")
    mean = negative_log_likelihood / num_tokens
    return math.exp(mean) if mean < 709 else math.inf


def bits_per_byte(negative_log_likelihood: float, num_bytes: int) -> float:
    """NLL in bits for each byte of the scored text in UTF-8; comparable between tokenizers, unlike perplexity."""
    if num_bytes < 1:
        raise ValueError(f"`num_bytes` must be at least 1, got {num_bytes}: nothing was scored.")
    return negative_log_likelihood / math.log(2) / num_bytes


def bootstrap_interval(
    per_sample: Sequence[float], seed: int = 0, resamples: int = 1000, level: float = 0.95
) -> tuple[float, float]:
    """Percentile interval of the mean from seeded draws with replacement (Efron 1979)."""
    if not per_sample:
        raise ValueError("`per_sample` must hold at least one value, got none.")
    if not 0 < level < 1:
        raise ValueError(f"`level` must lie in (0, 1), got {level}.")
    values = np.asarray(per_sample, dtype=np.float64)
    rng = np.random.default_rng(seed)
    means = np.array([values[rng.integers(len(values), size=len(values))].mean() for _ in range(resamples)])
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
