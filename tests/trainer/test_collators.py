"""Batches pad on the side their use needs, and padding changes nothing."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from graft.trainer.collators import (
    CausalEvaluationCollator,
    CausalTrainingCollator,
    Seq2SeqCollator,
    pad,
    padding_id,
)

id_lists = st.lists(st.lists(st.integers(5, 99), max_size=7), min_size=1, max_size=4)


@given(rows=id_lists, side=st.sampled_from(["left", "right"]), multiple=st.none() | st.integers(1, 8))
def test_padding_keeps_every_row_and_fills_one_side(rows, side, multiple):
    padded = pad(rows, -1, side, multiple)
    assert padded.dtype == torch.long
    longest = max(map(len, rows))
    assert padded.shape[1] >= longest
    if multiple:
        assert padded.shape[1] % multiple == 0
        assert padded.shape[1] < longest + multiple
    for ids, row in zip(rows, padded.tolist(), strict=True):
        free = [-1] * (padded.shape[1] - len(ids))
        assert row == (free + ids if side == "left" else ids + free)


def test_seq2seq_batches_are_right_padded_to_the_multiple(byte_tokenizer):
    rows = [
        {"input_ids": [0, 9, 8, 2], "attention_mask": [1] * 4, "labels": [0, 2], "length": 4, "id": "a"},
        {"input_ids": [0, 2], "attention_mask": [1] * 2, "labels": [0, 7, 2], "length": 2, "id": "b"},
    ]
    batch = Seq2SeqCollator(byte_tokenizer, 3)(rows)
    assert batch["input_ids"].tolist() == [[0, 9, 8, 2, 1, 1], [0, 2, 1, 1, 1, 1]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0]]
    assert batch["labels"].tolist() == [[0, 2, -100], [0, 7, 2]]
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    assert "labels" not in Seq2SeqCollator(byte_tokenizer)([{"input_ids": [0, 2]}])


def test_causal_training_batches_are_right_padded_without_loss_on_padding(byte_tokenizer):
    rows = [{"input_ids": [9, 8, 2], "labels": [-100, 8, 2]}, {"input_ids": [9], "labels": [9]}]
    batch = CausalTrainingCollator(byte_tokenizer)(rows)
    assert batch["input_ids"].tolist() == [[9, 8, 2], [9, 1, 1]]
    assert batch["labels"].tolist() == [[-100, 8, 2], [9, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


def test_causal_evaluation_batches_are_left_padded_in_every_part(byte_tokenizer):
    rows = [
        {"input_ids": [9, 8, 2], "labels": [-100, 8, 2], "prompt_ids": [9], "memory_ids": []},
        {"input_ids": [7, 2], "labels": [-100, 2], "prompt_ids": [7], "memory_ids": [5, 6]},
    ]
    batch = CausalEvaluationCollator(byte_tokenizer)(rows)
    assert batch["input_ids"].tolist() == [[9, 8, 2], [1, 7, 2]]
    assert batch["labels"].tolist() == [[-100, 8, 2], [-100, -100, 2]]
    assert batch["prompt_ids"].tolist() == [[9], [7]]
    assert batch["memory_ids"].tolist() == [[1, 1], [5, 6]]
    assert batch["memory_mask"].tolist() == [[0, 0], [1, 1]]
    plain = CausalEvaluationCollator(byte_tokenizer)([{"input_ids": [7, 2]}])
    assert set(plain) == {"input_ids", "attention_mask"}


def test_without_memory_in_any_row_the_memory_is_empty_and_not_absent(byte_tokenizer):
    batch = CausalEvaluationCollator(byte_tokenizer)([{"input_ids": [7, 2], "memory_ids": []}])
    assert batch["memory_ids"].shape == batch["memory_mask"].shape == (1, 0)


def test_a_tokenizer_without_a_padding_token_pads_with_its_end_or_zero(tokenizers):
    assert padding_id(tokenizers["byte_level"]) == 1
    assert padding_id(tokenizers["word_piece"]) == 0

    class Bare:
        pad_token_id, eos_token_id = None, 4

    assert padding_id(Bare()) == 4
    Bare.eos_token_id = None
    assert padding_id(Bare()) == 0


@pytest.mark.parametrize("collator", [CausalTrainingCollator, CausalEvaluationCollator])
def test_a_row_has_the_same_loss_alone_and_in_a_batch(byte_tokenizer, collator):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=100,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        pad_token_id=1,
    )
    model = LlamaForCausalLM(config).double().eval()
    rows = [
        {"input_ids": torch.randint(5, 100, (n,)).tolist(), "labels": [-100] * (n - 2) + [6, 7]} for n in (3, 9, 6)
    ]
    together = collator(byte_tokenizer)(rows)
    alone = [collator(byte_tokenizer)([row]) for row in rows]
    with torch.no_grad():
        losses = [model(**batch).loss for batch in alone]
        torch.testing.assert_close(model(**together).loss, torch.stack(losses).mean())
