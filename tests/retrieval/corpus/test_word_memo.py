import pytest
from hypothesis import given
from hypothesis.strategies import booleans, characters, lists, sampled_from, text
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from graft.retrieval.corpus import tokenizers_of_corpora, word_memo
from graft.retrieval.corpus.ascii_cutting import SPLITS, ascii_cutting
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


SENTENCES = [
    "It's 1234 words, and they'll be cut; I've counted (twice)...\n",
    "def f(x):\n    return x[0] + 17\n\n\n# Übung: naïve café — 中文\n",
    "THEY'RE  tabs\tand\r\nline ends,\n \n  don't you see?  \n",
]
LLAMA3, QWEN2 = SPLITS
ONE_DIGIT, DIGITS = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.Digits(individual_digits=False)


def byte_level(*steps, normalizer=None, added=(), template=None, dropout=None, **options):
    """Byte-level BPE of 400 tokens; a step is a pre-tokenizer or the expression of a split."""
    isolated = [pre_tokenizers.Split(Regex(s), "isolated") if isinstance(s, str) else s for s in steps]
    with_regex = not any(isinstance(step, str) for step in steps)
    last = pre_tokenizers.ByteLevel(**{"add_prefix_space": False, "use_regex": with_regex, **options})
    backend = Tokenizer(models.BPE(dropout=dropout))
    backend.normalizer = normalizer
    backend.pre_tokenizer = pre_tokenizers.Sequence([*isolated, last]) if isolated else last
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        SENTENCES * 3, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    if template:
        backend.post_processor = processors.TemplateProcessing(template, special_tokens=[("!", 0)])
    backend.add_special_tokens(["<|endoftext|>"])
    backend.add_tokens(list(added))
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<|endoftext|>", eos_token="<|endoftext|>")


BYTE_LEVEL = {
    "gpt2": byte_level(),
    "one digit": byte_level(ONE_DIGIT),
    "digits": byte_level(DIGITS),
    "llama3": byte_level(LLAMA3, template="! $A"),
    "qwen2": byte_level(QWEN2, normalizer=normalizers.NFC(), added=["<think>"]),
    "digits of llama3": byte_level(ONE_DIGIT, LLAMA3, added=[AddedToken("<mask>", lstrip=True, rstrip=True)]),
}

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


AWKWARD = "abIt's'LL'Ve19  \n\n\r\t\x0b\x1c\x7f;.(-<|é中\u0301\u212a\u00a0\u0085\u2028 "
awkward = text(sampled_from(AWKWARD), max_size=24)
of_bytes = lists(
    text(max_size=20)
    | plain
    | awkward
    | lists(sampled_from([*SENTENCES, "<|endoftext|>", "<THINK>", " <mask>\n", "é", "x\n"]), max_size=4).map("".join),
    max_size=4,
)


@pytest.mark.parametrize("kind", BYTE_LEVEL)
@given(texts=of_bytes, special=booleans())
def test_ids_are_those_of_the_tokenizer_of_bytes(kind, texts, special):
    tokenizer = BYTE_LEVEL[kind]
    encoder = BulkEncoder(tokenizer, special)
    assert encoder.memo is not None
    for _ in range(2):
        got = [ids.tolist() for ids in encoder(texts)]
        assert got == [ids.tolist() for ids in encode_batch(tokenizer, texts, special)]


@pytest.mark.parametrize("kind", BYTE_LEVEL)
@given(text=plain | text(sampled_from("aZ's'RE09  \n\r\t\x0b\x1c;.(_"), max_size=24))
def test_words_are_those_of_the_pre_tokenizer(kind, text):
    backend = BYTE_LEVEL[kind].backend_tokenizer
    cutting = ascii_cutting(backend)
    words = [word.translate(cutting.spelling) for word in cutting.words(text)]
    assert words == [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)]


@pytest.mark.parametrize("kind", BYTE_LEVEL)
def test_only_lines_that_are_not_ascii_are_left_to_the_tokenizer_of_bytes(kind):
    memo = word_memo.word_memo(BYTE_LEVEL[kind].backend_tokenizer, True)
    memo._backend = AskedBackend(memo._backend)
    memo.encode_batch(["".join(SENTENCES), "no\n<|endoftext|>"])
    middle, whole = memo._backend.texts
    assert "".join(SENTENCES).count(middle) == 1
    assert "中文" in middle
    assert "counted" not in middle
    assert "see" not in middle
    assert whole == "no\n<|endoftext|>"


def test_long_words_are_not_kept():
    memo = word_memo.word_memo(BYTE_LEVEL["gpt2"].backend_tokenizer, False)
    expected = BYTE_LEVEL["gpt2"].backend_tokenizer.encode(99 * "ab", add_special_tokens=False).ids
    assert memo.encode_batch([99 * "ab"])[0].tolist() == expected
    assert 99 * "ab" not in memo


def test_the_tokenizer_is_asked_for_the_lines_that_are_not_ascii_and_for_what_only_it_can_cut():
    memo = word_memo.word_memo(word_piece().backend_tokenizer, True)
    asked = AskedBackend(memo._backend)
    memo._backend = asked
    memo.encode_batch(["abc, (ABC)\n d_e\ná\né\nc", "d [SEP]", "[sep]", "a\x00b", "a\x0cb", "e"])
    assert asked.texts == ["\ná\né", "d [SEP]", "[sep]", "a\x00b", "a\x0cb"]
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
        byte_level(add_prefix_space=True),
        byte_level(use_regex=False),
        byte_level(r"\p{L}+|\P{L}+"),
        byte_level(DIGITS, ONE_DIGIT),
        byte_level(LLAMA3, use_regex=True),
        byte_level(normalizer=normalizers.NFKC()),
        byte_level(normalizer=normalizers.NFC(), added=[AddedToken("<mask>", lstrip=True)]),
        byte_level(added=["  "]),
        byte_level(dropout=0.1),
    ],
    ids=lambda _: "",
)
def test_tokenizers_whose_text_cannot_be_split_so_are_not_served(tokenizer):
    assert word_memo.word_memo(tokenizer.backend_tokenizer, True) is None


def test_tokenizers_of_other_kinds_are_not_served(tokenizer):
    assert word_memo.word_memo(tokenizer.backend_tokenizer, True) is None


def test_many_cores_leave_the_work_to_the_threads_of_the_library(monkeypatch):
    monkeypatch.setattr(tokenizers_of_corpora, "default_workers", lambda: 64)
    assert BulkEncoder(word_piece(), True).memo is None
