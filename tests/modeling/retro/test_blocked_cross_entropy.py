import pytest
import torch

from graft.modeling.retro.blocked_cross_entropy import blocked_cross_entropy


def head(tokens: int, has_bias: bool, dtype=torch.float64):
    rng = torch.Generator().manual_seed(0)
    hidden, weight, bias = (
        torch.randn(*shape, generator=rng, dtype=dtype, requires_grad=True) for shape in ((tokens, 5), (11, 5), (11,))
    )
    targets = torch.randint(0, 11, (tokens,), generator=rng)
    targets[::3] = -100
    return hidden, weight, bias if has_bias else None, targets


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("block", [1, 4, 100])
def test_loss_and_gradients_are_those_of_all_logits_at_once(has_bias, block):
    hidden, weight, bias, targets = head(17, has_bias)
    given = [tensor for tensor in (hidden, weight, bias) if tensor is not None]
    expected = torch.nn.functional.cross_entropy(torch.nn.functional.linear(hidden, weight, bias), targets)
    loss = blocked_cross_entropy(hidden, weight, bias, targets, block=block)
    torch.testing.assert_close(loss, expected)
    for ours, theirs in zip(
        torch.autograd.grad(3 * loss, given), torch.autograd.grad(3 * expected, given), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_a_given_count_divides_the_sum():
    hidden, weight, bias, targets = head(9, True)
    by_count = blocked_cross_entropy(hidden, weight, bias, targets, count=torch.tensor(4))
    torch.testing.assert_close(
        by_count * 4, blocked_cross_entropy(hidden, weight, bias, targets) * (targets >= 0).sum()
    )


def test_without_scored_tokens_loss_and_gradients_are_zero():
    hidden, weight, bias, targets = head(6, True)
    loss = blocked_cross_entropy(hidden, weight, bias, torch.full_like(targets, -100))
    loss.backward()
    assert loss == 0
    assert not weight.grad.any()
    assert not hidden.grad.any()


def test_half_precision_sums_its_blocks_in_single():
    hidden, weight, bias, targets = head(600, True, torch.bfloat16)
    loss = blocked_cross_entropy(hidden, weight, bias, targets, block=8)
    loss.backward()
    wide = [tensor.detach().float().requires_grad_() for tensor in (hidden, weight, bias)]
    expected = blocked_cross_entropy(*wide, targets)
    expected.backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(weight.grad.float(), wide[1].grad, rtol=3e-2, atol=3e-3)
