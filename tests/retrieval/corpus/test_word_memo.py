import pytest
from hypothesis import given
from hypothesis.strategies import booleans, characters, lists, sampled_from, text
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from graft.retrieval.corpus import tokenizers_of_corpora, word_memo
from graft.retrieval.corpus.tokenizers_of_corpora import BulkEncoder, encode_batch

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
LETTERS = "abcdeXYZ019"
PIECES = [*LETTERS, *(f"##{letter}" for letter in LETTERS), "abc", "##cde", "##XY", *"!_[](){}.,'\"-~@`"]


def word_piece(lowercase=True, template="[CLS] $A [SEP]", added=()):
    vocabulary = {piece: number for number, piece in enumerate([*SPECIAL, *PIECES])}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=9))
    backend.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(template, special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    backend.add_special_tokens(SPECIAL)
    backend.add_tokens(list(added))
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", sep_token="[SEP]")


plain = text(characters(max_codepoint=127), max_size=30) | text(sampled_from("abcXYZ01_,( \n"), max_size=12)
any_text = plain | text(sampled_from("aábc Éb.\u00a0\u0085\u0301中 x[SEP]\n\n\n"), max_size=16)
texts_of_all_kinds = lists(
    any_text | sampled_from(["abc [SEP] d", "abc\x00de", "abcabcabcabc d", "[sep]", "a\x0bb\x1fc"]), max_size=4
)


@given(texts=texts_of_all_kinds, lowercase=booleans(), special=booleans())
def test_ids_are_those_of_the_tokenizer(texts, lowercase, special):
    tokenizer = word_piece(lowercase)
    encoder = BulkEncoder(tokenizer, special)
    for _ in range(2):  # words unknown, words known
        got = [ids.tolist() for ids in encoder(texts)]
        assert got == [ids.tolist() for ids in encode_batch(tokenizer, texts, special)]


def test_the_tokenizer_is_asked_for_the_lines_that_are_not_ascii_and_for_what_only_it_can_cut():
    memo = word_memo.word_memo(word_piece().backend_tokenizer, True)
    asked = AskedBackend(memo._backend)
    memo._backend = asked
    memo.encode_batch(["abc, (ABC)\n d_e\ná\né\nc", "d [SEP]", "[sep]", "a\x00b", "a\x0cb", "e"])
    assert asked.texts == ["á\né", "d [SEP]", "[sep]", "a\x00b", "a\x0cb"]
    assert {"abc", ",", "(", "d", "_", "c", "e"} <= set(memo)


class AskedBackend:
    def __init__(self, backend):
        self.backend = backend

    def encode_batch_fast(self, texts, **options):
        self.texts = texts
        return self.backend.encode_batch_fast(texts, **options)


def test_a_full_memo_begins_anew(monkeypatch):
    monkeypatch.setattr(word_memo, "MOST_WORDS", 2)
    memo = word_memo.word_memo(word_piece().backend_tokenizer, False)
    expected = word_piece().backend_tokenizer.encode("a b c d e a b", add_special_tokens=False).ids
    assert memo.encode_batch(["a b c d e a b"])[0].tolist() == expected
    assert len(memo) <= 2


@pytest.mark.parametrize(
    "tokenizer",
    [
        word_piece(template="[CLS] $A $A [SEP]"),
        word_piece(added=[AddedToken("two words")]),
        word_piece(added=[AddedToken("é", normalized=True)]),
    ],
    ids=["text twice", "white space", "accent"],
)
def test_tokenizers_whose_text_cannot_be_split_so_are_not_served(tokenizer):
    assert word_memo.word_memo(tokenizer.backend_tokenizer, True) is None


def test_tokenizers_of_other_kinds_are_not_served(tokenizer):
    assert word_memo.word_memo(tokenizer.backend_tokenizer, True) is None


def test_many_cores_leave_the_work_to_the_threads_of_the_library(monkeypatch):
    monkeypatch.setattr(tokenizers_of_corpora, "default_workers", lambda: 64)
    assert BulkEncoder(word_piece(), True).memo is None
