import math

import pytest
import torch
from hypothesis import given
from hypothesis.strategies import integers

from graft.trainer.token_losses import IGNORED, bucket_means, scored_tail, to_the_left, token_losses


def naive_losses(logits, labels, shifted):
    kept, rows = logits.shape[1], []
    for row, row_labels in zip(logits, labels.tolist(), strict=True):
        first = len(row_labels) - kept
        found = []
        for position, label in enumerate(row_labels):
            source = position - first - (1 if shifted else 0)
            if label != IGNORED and source >= 0:
                found.append(-float(row[source].log_softmax(-1)[label]))
        rows.append(found)
    return rows


@given(seed=integers(0, 2**31), length=integers(2, 7), cut=integers(0, 5), shifted=integers(0, 1))
def test_token_losses_equal_a_loop_over_tokens(seed, length, cut, shifted):
    rng = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 5, (3, length), generator=rng)
    labels[torch.rand(3, length, generator=rng) < 0.4] = IGNORED
    kept = max(1, length - cut)
    labels[:, : length - kept + shifted] = IGNORED
    logits = torch.randn(3, kept, 5, generator=rng)
    losses = token_losses(logits, labels, bool(shifted))
    for row, expected in zip(losses, naive_losses(logits, labels, bool(shifted)), strict=True):
        assert row[row != IGNORED].tolist() == pytest.approx(expected, abs=1e-5)
        assert (row[len(expected) :] == IGNORED).all()


def test_labels_without_logits_are_an_error():
    with pytest.raises(ValueError, match="last 2 positions; 2 labelled tokens"):
        token_losses(torch.zeros(1, 2, 5), torch.zeros(1, 4, dtype=torch.long), shifted=False)


def test_scored_tail_keeps_the_logit_before_the_first_label_and_no_more():
    labels = torch.full((2, 9), IGNORED)
    labels[0, 6:] = 1
    labels[1, 7:8] = 1
    assert scored_tail(labels) == 4
    assert scored_tail(torch.full((1, 4), IGNORED)) == 1
    assert scored_tail(torch.ones(1, 4, dtype=torch.long)) == 4


def test_to_the_left_keeps_the_order():
    rows = torch.tensor([[-100.0, 3.0, -100.0, 1.0], [-100.0] * 4])
    assert to_the_left(rows).tolist() == [[3.0, 1.0], [-100.0, -100.0]]


def test_bucket_means_weigh_tokens():
    losses = torch.tensor([[1.0, 2.0, 3.0], [5.0, -100.0, -100.0]])
    means = bucket_means(losses, 2)
    assert means == {"loss_0_1": pytest.approx(8 / 3), "loss_2_2": 3.0}
    assert not math.isnan(sum(means.values()))
