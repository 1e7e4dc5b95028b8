"""Metrics equal their libraries' own calls and cases worked out by hand."""

import math

import numpy as np
import pytest
import sacrebleu
import torch
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from transformers import BertConfig, BertModel

from graft.trainer import metrics
from graft.trainer.configuration_error import ConfigurationError
from graft.trainer.metrics import METRIC_VALUES, METRICS, bits_per_byte, bootstrap_interval, metric_named, perplexity
from graft.trainer.tokenizer_training import train_tokenizer

PREDICTIONS = ["The cat sat on the mat. It slept.", "a dog", "", "Answer: 42 models"]
REFERENCES = [
    ["A cat was sitting on the mat. It was asleep."],
    ["the dog!", "two dogs"],
    ["something"],
    ["42 models", "many models were trained"],
]
OFFLINE = sorted(set(METRICS) - {"bert_score"})

words = st.lists(st.sampled_from(["cat", "the", "dogs", "42", "ran", "."]), min_size=1, max_size=8).map(" ".join)
meaningful = words.filter(lambda text: any(word not in ("the", ".") for word in text.split()))


@pytest.mark.parametrize("name", OFFLINE)
def test_values_are_the_announced_ones_with_one_per_sample(name):
    result = METRICS[name](PREDICTIONS, REFERENCES)
    assert tuple(result.mean) == METRIC_VALUES[name]
    assert {key: len(values) for key, values in result.per_sample.items()} == dict.fromkeys(METRIC_VALUES[name], 4)


def test_rouge_equals_the_library_with_the_best_reference():
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    result = metrics.rouge(PREDICTIONS, REFERENCES)
    for name in ("rouge1", "rouge2", "rougeL"):
        expected = [
            100 * max(scorer.score(text, prediction)[name].fmeasure for text in texts)
            for prediction, texts in zip(PREDICTIONS, REFERENCES, strict=True)
        ]
        assert result.per_sample[name] == pytest.approx(expected)
        assert result.mean[name] == pytest.approx(np.mean(expected))
    product = result.mean["rouge1"] * result.mean["rouge2"] * result.mean["rougeL"]
    assert result.mean["geometric_mean"] == pytest.approx(product ** (1 / 3))


def test_rouge_lsum_compares_sentence_by_sentence():
    prediction, reference = "Second comes first. One goes last.", "One goes last. Second comes first."
    result = metrics.rouge([prediction], [[reference]])
    assert result.mean["rougeLsum"] == pytest.approx(100)  # each sentence is found, in another order
    assert result.mean["rougeL"] < 100


def test_rouge_by_hand():
    result = metrics.rouge(["the cat sat"], [["the cat ran off"]])
    # Two of 3 and of 4 words in common; one of 2 and of 3 bigrams.
    assert result.mean["rouge1"] == pytest.approx(100 * 2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4))
    assert result.mean["rouge2"] == pytest.approx(100 * 2 * (1 / 2) * (1 / 3) / (1 / 2 + 1 / 3))


@pytest.mark.parametrize(
    ("prediction", "references", "exact", "f1"),
    [
        ("The Cat!", ["a cat"], 100, 100),
        ("cat sat", ["cat"], 0, 100 * 2 / 3),
        ("dog", ["cat", "dog"], 100, 100),
        ("", ["the"], 0, 0),
        ("a", ["the"], 100, 100),
        ("cat cat", ["cat dog"], 0, 50),
        ("x", ["y"], 0, 0),
    ],
)
def test_exact_match_and_f1_by_hand(prediction, references, exact, f1):
    assert metrics.exact_match([prediction], [references]).mean["exact_match"] == exact
    assert metrics.f1([prediction], [references]).mean["f1"] == pytest.approx(f1)


def test_bleu_and_chrf_equal_sacrebleu_for_corpus_and_sentence():
    predictions, references = PREDICTIONS[:2] + PREDICTIONS[3:], REFERENCES[:2] + REFERENCES[3:]
    streams = [[texts[0] for texts in references], [texts[1] if len(texts) > 1 else None for texts in references]]
    result = metrics.bleu(predictions, references)
    assert result.mean["bleu"] == sacrebleu.corpus_bleu(predictions, streams).score
    expected = [
        sacrebleu.sentence_bleu(prediction, texts).score
        for prediction, texts in zip(predictions, references, strict=True)
    ]
    assert result.per_sample["bleu"] == expected
    assert "version:" in result.signature["bleu"]
    plus = metrics.chrf(predictions, references, word_order=2)
    assert plus.mean["chrf"] == sacrebleu.corpus_chrf(predictions, streams, word_order=2).score


def test_lengths_by_hand():
    result = metrics.lengths(["one two three", ""], [["one two"], ["x"]])
    assert result.per_sample == {"characters": [13, 0], "words": [3, 0], "length_ratio": [1.5, 0]}


@pytest.mark.parametrize("name", OFFLINE)
def test_an_empty_prediction_scores_zero(name):
    result = METRICS[name]([""], [["a cat sat here"]])
    assert set(result.mean.values()) == {0}


@pytest.mark.parametrize("name", sorted(METRICS))
@pytest.mark.parametrize("bad", [[], [" "], ["fine", ""]])
def test_an_empty_reference_is_refused_with_its_row(name, bad):
    with pytest.raises(ValueError, match="The reference of row 1 is empty"):
        METRICS[name](["x", "y"], [["fine"], bad])


def test_an_empty_reference_is_named_by_its_id():
    with pytest.raises(ValueError, match="The reference of row 'page-7' is empty"):
        metrics.check_references([["fine"], [""]], ["page-1", "page-7"])


@given(text=meaningful)
def test_a_perfect_prediction_has_full_marks(text):
    assert metrics.exact_match([text], [[text]]).mean["exact_match"] == 100
    assert metrics.f1([text], [[text]]).mean["f1"] == pytest.approx(100)
    assert metrics.chrf([text], [[text]]).mean["chrf"] == pytest.approx(100)


@given(prediction=words, reference=words, other=words)
def test_another_reference_never_lowers_the_best(prediction, reference, other):
    for name in ("exact_match", "f1", "rouge"):
        one, two = METRICS[name]([prediction], [[reference]]), METRICS[name]([prediction], [[reference, other]])
        for value in METRIC_VALUES[name][:4]:  # not the geometric mean, which mixes references
            assert two.mean[value] >= one.mean[value] - 1e-9


def test_perplexity_and_bits_per_byte_of_a_fair_coin():
    nats = 8 * math.log(2)  # eight tokens, one bit each
    assert perplexity(nats, 8) == pytest.approx(2)
    assert bits_per_byte(nats, 4) == pytest.approx(2)
    assert perplexity(1e6, 1) == math.inf


@pytest.mark.parametrize(("measure", "name"), [(perplexity, "num_tokens"), (bits_per_byte, "num_bytes")])
def test_nothing_scored_is_an_error_and_no_nan(measure, name):
    with pytest.raises(ValueError, match=f"`{name}` must be at least 1, got 0"):
        measure(1.0, 0)


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=20), st.integers(0, 5))
def test_the_interval_is_seeded_and_lies_within_the_values(values, seed):
    low, high = bootstrap_interval(values, seed=seed, resamples=100)
    assert (low, high) == bootstrap_interval(values, seed=seed, resamples=100)
    assert min(values) - 1e-9 <= low <= high <= max(values) + 1e-9


def test_the_interval_holds_the_mean_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    samples = rng.normal(size=(200, 40))
    intervals = [bootstrap_interval(list(sample), resamples=300, level=0.9) for sample in samples]
    covered = np.mean([low <= 0 <= high for low, high in intervals])
    assert 0.82 < covered < 0.96


def test_an_interval_of_nothing_is_refused():
    with pytest.raises(ValueError, match="`per_sample` must hold at least one value"):
        bootstrap_interval([])
    with pytest.raises(ValueError, match="`level` must lie in"):
        bootstrap_interval([1.0], level=1)


def test_a_metric_is_found_by_name_with_its_options():
    plain, plus = metric_named("chrf"), metric_named({"name": "chrf", "word_order": 2})
    assert plain(PREDICTIONS, REFERENCES) == metrics.chrf(PREDICTIONS, REFERENCES)
    assert plus(PREDICTIONS, REFERENCES) == metrics.chrf(PREDICTIONS, REFERENCES, word_order=2)


def test_unknown_names_and_options_list_what_there_is():
    with pytest.raises(
        ConfigurationError, match="`metrics` has no 'meteor'; there are bert_score, bits_per_byte, bleu"
    ):
        metric_named("meteor")
    with pytest.raises(ConfigurationError, match=r"rouge has no option 'stem'; it has \['stemmer'\]"):
        metric_named({"name": "rouge", "stem": True})


def test_bert_score_equals_the_package_with_the_best_reference_of_each_value(tmp_path):
    package = pytest.importorskip("bert_score")
    tokenizer = train_tokenizer([text for texts in REFERENCES for text in texts] * 3, 300, 64)
    torch.manual_seed(0)
    sizes = {"vocab_size": 300, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
    BertModel(BertConfig(**sizes, num_hidden_layers=2, max_position_embeddings=64)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    options = {"model_type": str(tmp_path), "num_layers": 2}
    result = metrics.bert_score(PREDICTIONS[:2], REFERENCES[:2], str(tmp_path), 2)
    for place, value in enumerate(METRIC_VALUES["bert_score"]):
        expected = [
            100 * max(float(package.score([prediction], [text], **options)[place]) for text in texts)
            for prediction, texts in zip(PREDICTIONS, REFERENCES[:2], strict=False)
        ]
        assert result.per_sample[value] == pytest.approx(expected, abs=1e-3)


def test_bert_score_says_what_it_needs():
    with pytest.raises(ConfigurationError, match="bert_score"):
        metrics.bert_score(["x"], [["y"]])
