"""Rows that share a row are read and learnt as they are alone."""

import itertools

import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from tiny_decoders import tiny_decoder
from transformers import BloomConfig, BloomForCausalLM

from graft.trainer.collators import CausalPackedCollator, CausalTrainingCollator
from graft.trainer.configuration_error import ConfigurationError
from graft.trainer.data import prepare_training
from graft.trainer.packed_rows import check_reads_packed_rows, packed_rows, packed_together
from graft.trainer.tokenisation import IGNORED

FAMILIES = ("llama", "gpt2", "qwen3", "mistral", "phi3")


@given(st.lists(st.integers(1, 20), max_size=30), st.integers(20, 40))
def test_every_row_is_packed_once_in_order_and_no_two_packed_rows_would_fit_in_one(lengths, size):
    shared = packed_together(lengths, size)
    assert sorted(itertools.chain(*shared)) == list(range(len(lengths)))
    assert shared == sorted(sorted(rows) for rows in shared)
    filled = [sum(lengths[row] for row in rows) for rows in shared]
    assert all(count <= size for count in filled)
    assert all(one + other > size for one, other in itertools.combinations(filled, 2))


def test_the_fullest_row_with_room_is_taken():
    assert packed_together([6, 3, 7, 2], 10) == [[0, 3], [1, 2]]


def test_a_row_longer_than_the_packed_one_is_refused():
    with pytest.raises(ValueError, match="Row 1 has 9 tokens, more than the 8"):
        packed_together([3, 9], 8)


def rows_of(lengths, vocabulary=61):
    rng = torch.Generator().manual_seed(0)
    rows = []
    for number, length in enumerate(lengths):
        ids = torch.randint(3, vocabulary, (length,), generator=rng).tolist()
        cut = number % 3
        rows.append({"input_ids": ids, "labels": [IGNORED] * cut + ids[cut:], "id": str(number), "truncated": False})
    return rows


def packed(rows, size):
    columns = packed_rows({name: [row[name] for row in rows] for name in rows[0]}, size)
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def summed_loss_and_gradient(model, batch):
    labels = batch.pop("labels")
    logits = model(**batch, use_cache=False).logits[:, :-1].flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum", ignore_index=IGNORED)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return loss.detach(), torch.cat([gradient.flatten() for gradient in gradients])


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_rows_have_the_loss_and_the_gradients_they_have_alone(family, byte_tokenizer):
    model, rows = tiny_decoder(family), rows_of([5, 1, 9, 3, 12, 2, 7])
    alone = [summed_loss_and_gradient(model, CausalTrainingCollator(byte_tokenizer)([row])) for row in rows]
    loss, gradient = (torch.stack(values).sum(dim=0) for values in zip(*alone, strict=True))
    batch = CausalPackedCollator(byte_tokenizer, 8)(packed(rows, 15))
    assert batch["input_ids"].shape == (3, 16)
    torch.testing.assert_close(summed_loss_and_gradient(model, batch), (loss, gradient), rtol=1e-6, atol=1e-6)


def test_models_that_tell_packed_rows_apart_are_served_and_others_refused():
    for family in FAMILIES:
        model = tiny_decoder(family).train()
        check_reads_packed_rows(model)
        assert model.training
    bloom = BloomForCausalLM(BloomConfig(vocab_size=40, hidden_size=16, n_layer=1, n_head=2))
    with pytest.raises(ConfigurationError, match="BloomForCausalLM does not tell rows apart"):
        check_reads_packed_rows(bloom)

    class Positionless(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weights = torch.nn.Embedding(40, 40)

        def forward(self, input_ids, use_cache):
            return {"logits": self.weights(input_ids)}

    with pytest.raises(ConfigurationError, match="Positionless takes no position ids"):
        check_reads_packed_rows(Positionless())


@pytest.mark.parametrize(("target", "view"), [("target", "truncated"), (None, "truncated"), ("target", "chunked")])
def test_packing_keeps_every_token_and_label_of_the_rows(byte_tokenizer, configure, target, view):
    raw = Dataset.from_list([{"source": f"cat {i} reads. " * (1 + i % 4), "target": f"dog {i}"} for i in range(9)])
    options = {"target_column": target, "train_view": view, "max_target_length": 16}
    plain = prepare_training(raw, byte_tokenizer, configure("causal", **options), 128)
    rows = prepare_training(raw, byte_tokenizer, configure("causal", packing=True, **options), 128)
    assert len(rows) < len(plain)
    assert max(rows["length"]) <= 128
    assert sum(rows["length"]) == sum(plain["length"])
    assert sorted(pieces_of(rows)) == sorted(list(ids) for ids in plain["input_ids"])
    learnt = sum(label != IGNORED for row in rows for label in row["labels"])
    assert learnt == sum(label != IGNORED for row in plain for label in row["labels"][1:])


def pieces_of(rows):
    for row in rows:
        starts = [place for place, position in enumerate(row["position_ids"]) if position == 0] + [row["length"]]
        yield from (row["input_ids"][start:end] for start, end in itertools.pairwise(starts))


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("seq2seq", {}, "`data.packing` does not go with `model.task` 'seq2seq'"),
        ("causal", {"train_view": "chunked", "capture_raw_text": True}, "`data.capture_raw_text`"),
    ],
)
def test_what_packing_does_not_go_with_is_refused(configure, task, options, message):
    with pytest.raises(ConfigurationError, match=message):
        configure(task, packing=True, **options)


def test_a_memory_of_each_row_is_not_packed(configure):
    with pytest.raises(ConfigurationError, match="each row has a memory of its own"):
        configure("causal", memory={"training": "retrieval"}, packing=True)
    assert configure("causal", memory={}, packing=True).data.packing
