import pytest
from hypothesis import given, settings
from hypothesis.strategies import text

from graft.trainer.tokenizer_training import train_tokenizer, trained_tokenizer

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
