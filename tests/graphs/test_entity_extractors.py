"""What the extractors find, where, and what they say when something is missing."""

import re
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graft.graphs.knowledge_graph.entity_extractors import (
    CapitalisedExtractor,
    GazetteerExtractor,
    KeyphraseExtractor,
    extractor_by_name,
)
from graft.graphs.knowledge_graph.mentions import Mention, TextChunk, longest_first, place, sentence_spans
from graft.graphs.knowledge_graph.phrase_trie import PhraseTrie, words_of

TEXT = (
    "Mr. Vernon Dursley was the director of a firm called Grunnings. The firm made drills. Mrs. Dursley had a sister."
    "\n\n"
    "Nobody in Privet Drive knew the sister of Mrs. Dursley; Ünal Öz did."
)


def surfaces(extractor, text=TEXT):
    return [mention.surface for mention in extractor.extract(text)]


def naive_spans(phrases, text):
    """From each word on, the longest phrase whose words follow with nothing but white space between."""
    words, wanted = words_of(text), {tuple(word for *_, word in words_of(phrase)) for phrase in phrases} - {()}
    spans, at = [], 0
    while at < len(words):
        ends = [
            end
            for end in range(at + 1, len(words) + 1)
            if tuple(word for *_, word in words[at:end]) in wanted
            and all(not text[words[i][1] : words[i + 1][0]].strip() for i in range(at, end - 1))
        ]
        if ends:
            spans.append((words[at][0], words[max(ends) - 1][1]))
        at = max(ends, default=at + 1)
    return spans


@given(st.lists(st.text("ab ", max_size=5), max_size=6), st.text("abAB ,\n", max_size=40))
def test_the_trie_finds_what_a_loop_over_all_phrases_finds(phrases, text):
    assert list(PhraseTrie(phrases).spans(text)) == naive_spans(phrases, text)


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(1, 6)), max_size=8))
def test_of_overlapping_mentions_the_longest_stays(pairs):
    mentions = [Mention(start, start + length, "x" * length, "l") for start, length in pairs]
    kept = longest_first(mentions)
    assert all(left.end <= right.start for left, right in zip(kept, kept[1:], strict=False))
    for mention in mentions:
        rivals = [k for k in kept if k.start < mention.end and mention.start < k.end]
        assert rivals
        assert max(k.end - k.start for k in rivals) >= mention.end - mention.start or mention in kept


@given(st.text(max_size=300))
def test_spans_reproduce_their_text_whatever_it_is(text):
    found = CapitalisedExtractor().extract(text)
    assert all(text[m.start : m.end] == m.surface and m.surface.strip() for m in found)
    for placed in place(TextChunk("d", 0, text), found):
        assert placed.sentence_start <= placed.start < placed.end <= placed.sentence_end


def test_capitalised_words_are_names_except_one_that_opens_a_sentence():
    found = surfaces(CapitalisedExtractor())
    assert {"Vernon Dursley", "Grunnings", "Privet Drive", "Ünal Öz"} <= set(found)
    assert not {"The", "The firm", "Nobody"} & set(found)


def test_values_of_programs_and_common_words_that_stand_alone_are_no_names():
    text = "It is None or True. Whether it is Whether or not, Second World War and US count; so does Nanda, not NaN."
    assert surfaces(CapitalisedExtractor(), text) == ["Whether", "Whether", "Second World War", "US", "Nanda"]
    assert surfaces(CapitalisedExtractor({"whether", "second", "us"}), text) == ["Second World War", "US", "Nanda"]
    named = surfaces(KeyphraseExtractor(), text)
    assert {"Second World War", "US", "Nanda"} <= set(named)
    assert not {"none", "true", "nan", "whether"} & {name.casefold() for name in named}


def test_keyphrases_are_found_wherever_they_stand():
    text = "Graph attention networks read edges. We train graph attention networks. " * 3
    found = KeyphraseExtractor().extract(text)
    assert sum(mention.surface.casefold() == "graph attention networks" for mention in found) == 6
    assert all(text[mention.start : mention.end] == mention.surface for mention in found)
    assert KeyphraseExtractor().extract(" \n") == []


def test_a_gazetteer_finds_its_lines_with_their_labels(tmp_path):
    (tmp_path / "names.txt").write_text("# people\nvernon dursley\tperson\nDrive\nPrivet Drive\tplace\n\n")
    found = GazetteerExtractor(tmp_path / "names.txt").extract(TEXT)
    assert [(m.surface, m.label) for m in found] == [("Vernon Dursley", "person"), ("Privet Drive", "place")]
    (tmp_path / "empty.txt").write_text("# nothing\n")
    with pytest.raises(ValueError, match="lists no entity"):
        GazetteerExtractor(tmp_path / "empty.txt")


def test_each_mention_stands_in_the_sentence_that_holds_it():
    placed = place(TextChunk("d", 3, TEXT), CapitalisedExtractor().extract(TEXT))
    for mention in placed:
        assert mention.surface in TEXT[mention.sentence_start : mention.sentence_end]
        assert (mention.sentence_start, mention.sentence_end) == sentence_spans(TEXT)[mention.sentence]


@pytest.mark.parametrize("name", ["", "keyphrases", "spacy", "gazetteer:", "capitalised:x"])
def test_an_unknown_extractor_is_answered_with_those_there_are(name):
    with pytest.raises(ValueError, match=r"must be one of keyphrase.*gliner:MODEL"):
        extractor_by_name(name)


@pytest.mark.parametrize("language", ["xx", "EN", "english", "../en", "noLang", "??"])
def test_a_language_without_stop_words_is_refused_with_those_there_are(language):
    with pytest.raises(
        ValueError, match=rf"keyphrase:{re.escape(language)} .* no stop words; it has ar, .*, de, .*, zh\."
    ):
        extractor_by_name(f"keyphrase:{language}")


def test_stop_words_of_the_language_are_in_no_phrase():
    text = "Der Vertrag mit der Bahn und der Vertrag mit der Post sind zwei Dinge. " * 3
    phrases = {mention.surface for mention in extractor_by_name("keyphrase:de").extract(text)}
    assert "Vertrag" in {word for phrase in phrases for word in phrase.split()}
    assert not {"und", "sind", "mit"} & {
        word for phrase in phrases for word in (phrase.split()[0], phrase.split()[-1])
    }


def test_what_is_missing_is_named():
    with pytest.raises(ValueError, match="`labels` must name"):
        extractor_by_name("gliner:some/model")
    with pytest.raises(FileNotFoundError, match=r"absent\.txt"):
        extractor_by_name("gazetteer:absent.txt")


@pytest.mark.parametrize(
    ("library", "name", "words"),
    [
        ("yake", "keyphrase", "graft-transformers[knowledge-graph]"),
        ("spacy", "spacy:en_core_web_sm", "pip install spacy"),
        ("gliner", "gliner:a/b", "pip install gliner"),
    ],
)
def test_a_missing_library_is_one_error_that_says_how_to_get_it(library, name, words, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ImportError) as caught:
        extractor_by_name(name, ("person",))
    assert words in str(caught.value)


def test_a_missing_model_of_spacy_is_answered_with_its_makers_command():
    pytest.importorskip("spacy")
    with pytest.raises(OSError, match="no model 'en_nothing_sm' here.*python -m spacy download en_nothing_sm"):
        extractor_by_name("spacy:en_nothing_sm")


def test_the_room_needs_no_torch():
    program = "import sys, graft.graphs.knowledge_graph.corpus_graph as g; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
