"""Chosen sentences equal a loop that scores every choice anew, keep their order and fit the window."""

from collections import Counter

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from graft.trainer.configuration_error import ConfigurationError
from graft.trainer.data import prepare_training
from graft.trainer.oracle_sentences import choose_sentences

WORDS = st.lists(st.sampled_from("abcde"), min_size=0, max_size=6)
SENTENCES = [
    "The committee met on a Monday.",
    "Nobody had read the letter.",
    "Spending on bridges rose by nine percent.",
    "Lunch was served at noon.",
    "The report asks for new rules on bridges.",
    "Everybody went home.",
]
TARGET = "Spending on bridges rose; the report asks for new rules."


def naive_f1(words, target, size):
    """F1 of runs of `size` words, those of `words` counted within each sentence."""
    ours = Counter(tuple(s[i : i + size]) for s in words for i in range(len(s) - size + 1))
    theirs = Counter(tuple(target[i : i + size]) for i in range(len(target) - size + 1))
    total = ours.total() + theirs.total()
    return 2 * (ours & theirs).total() / total if total else 0.0


def naive_choice(sentences, target, costs, budget):
    chosen = []
    while True:
        best = None
        for number, cost in enumerate(costs):
            if number in chosen or cost > budget:
                continue
            words = [sentences[each] for each in [*chosen, number]]
            by_word = naive_f1(words, target, 1)
            score = (by_word * naive_f1(words, target, 2), by_word)
            if best is None or score > best[0]:
                best = (score, number)
        if best is None:
            return sorted(chosen)
        chosen.append(best[1])
        budget -= costs[best[1]]


@settings(max_examples=60)
@given(st.lists(st.tuples(WORDS, st.integers(1, 5)), min_size=1, max_size=7), WORDS, st.integers(0, 15))
def test_chosen_sentences_equal_those_of_a_loop_that_scores_all_anew(sentences, target, budget):
    words, costs = [list(w) for w, _ in sentences], [cost for _, cost in sentences]
    assert choose_sentences(words, target, costs, budget) == naive_choice(words, target, costs, budget)


def test_pairs_of_words_decide_before_words_do():
    target = ["a", "b", "c", "d"]
    assert choose_sentences([["d", "c", "b", "a"], ["a", "b"]], target, [1, 1], 1) == [1]
    assert choose_sentences([["x"], ["d", "a"], ["a", "d"]], target, [1, 1, 1], 1) == [1]


def training_rows(byte_tokenizer, configure, text, target=TARGET, **options):
    raw = Dataset.from_list([{"source": text, "target": target}])
    return prepare_training(raw, byte_tokenizer, configure(train_view="oracle", **options), 512)


def read(byte_tokenizer, rows):
    return byte_tokenizer.decode(rows[0]["input_ids"], skip_special_tokens=True).strip()


def test_a_short_window_holds_the_sentences_of_the_target_in_their_order(byte_tokenizer, configure):
    wanted = f"{SENTENCES[2]} {SENTENCES[4]}"
    limit = len(byte_tokenizer(wanted).input_ids) + 2
    rows = training_rows(byte_tokenizer, configure, " ".join(SENTENCES), max_source_length=limit)
    assert read(byte_tokenizer, rows) == wanted
    assert rows[0]["length"] <= limit


@pytest.mark.parametrize("task", ["seq2seq", "causal"])
def test_a_source_that_fits_stays_as_it_is(byte_tokenizer, configure, task):
    text = "The  cat sat.\n\nThe dog ran!"
    rows = training_rows(byte_tokenizer, configure, text, "no word of it", task=task, max_target_length=12)
    assert read(byte_tokenizer, rows).startswith(text)


def test_a_source_of_one_endless_sentence_is_cut_and_never_empty(byte_tokenizer, configure):
    rows = training_rows(byte_tokenizer, configure, "word " * 200, "nothing shared", max_source_length=20)
    assert rows[0]["length"] == 20
    assert rows[0]["truncated"]


def test_prefix_and_suffix_take_room_from_the_sentences(byte_tokenizer, configure):
    options = {"max_source_length": 100, "source_prefix": "Summarise: ", "source_suffix": " Summary:"}
    text = read(byte_tokenizer, training_rows(byte_tokenizer, configure, " ".join(SENTENCES), **options))
    assert text.startswith("Summarise:")
    assert text.endswith("Summary:")
    kept = text.removeprefix("Summarise: ").removesuffix("Summary:").strip()
    assert kept == " ".join(sentence for sentence in SENTENCES if sentence in kept)
    assert 0 < len(kept) < len(" ".join(SENTENCES))


def test_both_views_train_on_twice_the_rows(byte_tokenizer, configure):
    raw = Dataset.from_list([{"source": " ".join(SENTENCES) * 3, "target": TARGET}])
    views = {
        view: prepare_training(raw, byte_tokenizer, configure(train_view=view, max_source_length=100), 512)
        for view in ("oracle", "truncated", "oracle_and_truncated")
    }
    assert [row["input_ids"] for row in views["oracle_and_truncated"]] == [
        views["oracle"][0]["input_ids"],
        views["truncated"][0]["input_ids"],
    ]
    assert views["oracle"][0]["input_ids"] != views["truncated"][0]["input_ids"]
    assert views["oracle"][0]["labels"] == views["truncated"][0]["labels"]


def test_what_the_oracle_cannot_compare_is_refused(byte_tokenizer, configure):
    with pytest.raises(ConfigurationError, match="compares sentences of `data.source_column` with a target"):
        configure("causal", train_view="oracle", target_column=None)
    with pytest.raises(ConfigurationError, match="`data.on_too_long` 'skip' would do nothing"):
        configure(train_view="oracle_and_truncated", on_too_long="skip")
    raw = Dataset.from_list([{"source": "a cat", "target": "b"}])
    with pytest.raises(ConfigurationError, match="needs `data.max_source_length`"):
        prepare_training(raw, byte_tokenizer, configure(train_view="oracle"), None)
