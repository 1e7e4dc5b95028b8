import pytest
from hypothesis import given, settings
from hypothesis.strategies import text
from transformers import AutoTokenizer

from graft.trainer.tokenizer_training import (
    SpecialTokens,
    plot_token_lengths,
    train_byte_level_tokenizer,
    train_tokenizer,
    trained_tokenizer,
)

TEXTS = ["a tokenizer learns pairs of bytes", "pairs of pairs of bytes become tokens"] * 5
TOKENIZER = train_tokenizer(TEXTS, vocab_size=300, model_max_length=32)


@settings(deadline=None)
@given(text())
def test_every_text_comes_back(written):
    ids = TOKENIZER(written)["input_ids"]
    assert (ids[0], ids[-1]) == (TOKENIZER.bos_token_id, TOKENIZER.eos_token_id)
    assert TOKENIZER.decode(ids[1:-1], clean_up_tokenization_spaces=False) == written


def test_special_ids_are_those_of_bart():
    assert [TOKENIZER.bos_token_id, TOKENIZER.pad_token_id, TOKENIZER.eos_token_id] == [0, 1, 2]
    assert len(TOKENIZER) <= 300


def test_a_trained_tokenizer_is_reused(tmp_path):
    first = trained_tokenizer(tmp_path / "tokenizer", TEXTS, 300, 32)
    second = trained_tokenizer(tmp_path / "tokenizer", ["something else"], 300, 32)
    assert first.get_vocab() == second.get_vocab() == TOKENIZER.get_vocab()


def test_a_vocabulary_without_room_for_the_bytes_is_refused():
    with pytest.raises(ValueError, match="vocab_size.*at least 261.*got 200"):
        train_tokenizer(TEXTS, vocab_size=200, model_max_length=32)


@settings(deadline=None)
@given(text())
def test_a_tokenizer_with_llamas_names_gives_every_text_back(written):
    ids = LLAMA(written)["input_ids"]
    assert ids[0] == LLAMA.bos_token_id
    assert LLAMA.decode(ids[1:], clean_up_tokenization_spaces=False) == written


LLAMA = train_byte_level_tokenizer(TEXTS, 300, SpecialTokens(extra=("<graph>",)))


def test_special_tokens_have_their_names_and_the_folder_loads(tmp_path):
    LLAMA.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert [loaded.bos_token, loaded.eos_token] == ["<|begin_of_text|>", "<|eot_id|>"]
    assert [loaded.pad_token_id, loaded.unk_token_id, loaded.mask_token_id] == [1, 3, 4]
    assert loaded("a <graph> b")["input_ids"] == LLAMA("a <graph> b")["input_ids"]
    assert 5 in loaded("a <graph> b")["input_ids"]
    assert len(loaded) <= 300


@pytest.mark.parametrize(
    ("texts", "vocab_size", "special", "message"),
    [
        (TEXTS, 261, SpecialTokens(extra=("<graph>",)), "vocab_size.*at least 262.*got 261"),
        (TEXTS, 300, SpecialTokens(pad="<|eot_id|>"), r"must differ, got '<\|eot_id\|>' more than once"),
        ([], 300, None, "`texts` must hold at least one text"),
        (["", ""], 300, None, "`texts` must hold at least one text"),
    ],
)
def test_what_no_tokenizer_can_be_trained_from_is_refused(texts, vocab_size, special, message):
    with pytest.raises(ValueError, match=message):
        train_byte_level_tokenizer(texts, vocab_size, special)


def test_token_lengths_are_counted_and_drawn(tmp_path, monkeypatch):
    import graft.trainer.tokenizer_training as module

    path = plot_token_lengths(TEXTS, TOKENIZER, tmp_path / "lengths.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    seen = {}
    monkeypatch.setattr(module, "line_plot_png", lambda series, path, *rest: seen.update(series))
    plot_token_lengths(["a", "a", "abc", "a b c d e f"], TOKENIZER, tmp_path / "lengths.png", bins=4)
    lengths = [len(ids) for ids in TOKENIZER(["a", "a", "abc", "a b c d e f"])["input_ids"]]
    width = -(-(max(lengths) + 1) // 4)
    expected = [sum(start <= n < start + width for n in lengths) for start in range(0, max(lengths) + 1, width)]
    assert seen["texts"][1] == expected
    with pytest.raises(ValueError, match="`texts` must not be empty"):
        plot_token_lengths([], TOKENIZER, tmp_path / "lengths.png")
