"""Each transform is its formula on visible pairs, and 0 elsewhere; selections say what gradient they have."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graft.configuration.graph_edges_config import EdgeTransformConfig
from graft.modeling.graph.edge_transforms import EdgeTransform, edge_weights, top_k_of_row


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def silu(x):
    return x * sigmoid(x)


def softplus(x):
    return math.log1p(math.exp(x))


def relu(x):
    return max(0.0, x)


T, BETA, S = 0.25, 7.0, 0.6
FORMULAS = {
    "none": lambda a: a,
    "relu": lambda a: relu(a - T),
    "silu": lambda a: silu(a - T),
    "softplus": lambda a: softplus(a - T),
    "sharp_softplus": lambda a: softplus(BETA * (a - T)) / BETA,
    "sigmoid": lambda a: sigmoid(BETA * (a - T)),
    "flow": lambda a: sigmoid(5 * a) * sigmoid(50 * (a - T)),
    "binary": lambda a: float(a > T),
    "silu+binary": lambda a: silu(a - T) + S * (a > T),
    "relu_below_binary_above": lambda a: 1.0 if a > T else relu(a - T),
    "silu_below_binary_above": lambda a: 1.0 if a > T else silu(a - T),
    "softplus_below_binary_above": lambda a: 1.0 if a > T else softplus(a - T),
}
HARD = ["binary", "top_k", "scaled_topk"]


def options(transform, **more):
    return EdgeTransformConfig(transform=transform, threshold=T, steepness=BETA, binary_weight=S, **more)


def causal_weights(seed, heads=2, length=6):
    rng = torch.Generator().manual_seed(seed)
    visible = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
    scores = 2 * torch.randn(1, heads, length, length, generator=rng, dtype=torch.float64)
    return scores.masked_fill(~visible, -torch.inf).softmax(-1), visible


@pytest.mark.parametrize("transform", FORMULAS)
@given(st.integers(0, 1000))
def test_a_transform_is_its_formula_pair_by_pair_and_makes_no_future_edge(transform, seed):
    weights, visible = causal_weights(seed)
    found = edge_weights(weights, visible, options(transform))
    for h, i, j in torch.cartesian_prod(*map(torch.arange, weights.shape[1:])).tolist():
        expected = FORMULAS[transform](weights[0, h, i, j].item()) if j <= i else 0.0
        assert found[0, h, i, j].item() == pytest.approx(expected, abs=1e-12)


def test_every_transform_of_the_config_is_tested():
    allowed = EdgeTransformConfig.__annotations__["transform"].__args__
    assert set(allowed) == {*FORMULAS, "top_k", "scaled_topk"}


@given(st.integers(0, 1000), st.sampled_from([0.1, 0.3, 0.5, 1.0, 1 / 3]))
def test_top_k_keeps_the_largest_share_of_what_each_row_sees(seed, fraction):
    weights, visible = causal_weights(seed)
    kept = top_k_of_row(weights, visible, fraction)
    for h in range(2):
        for i in range(6):
            count = max(1, math.ceil(round(fraction * (i + 1), 6)))
            largest = sorted(range(i + 1), key=lambda j: -weights[0, h, i, j].item())[:count]  # noqa: B023
            assert kept[0, h, i].nonzero().flatten().tolist() == sorted(largest)


@given(st.integers(0, 1000), st.sampled_from([0.1, 0.3, 0.5, 1.0]))
def test_scaled_topk_keeps_a_share_of_the_strictly_earlier_of_which_the_small_ones_are_alike(seed, fraction):
    weights, visible = causal_weights(seed)
    found = edge_weights(weights, visible, options("scaled_topk", fraction=fraction))
    for h in range(2):
        for i in range(6):
            order = sorted(range(i), key=lambda j: -(weights[0, h, i, j] * (weights[0, h, i, j] >= T)).item())  # noqa: B023
            kept = sorted(order[: math.ceil(round(fraction * i, 6))])
            assert found[0, h, i].nonzero().flatten().tolist() == kept
    assert set(found.unique().tolist()) <= {0.0, 1.0}


def test_a_trained_threshold_takes_the_place_of_the_given_one_and_gets_a_gradient():
    weights, visible = causal_weights(3)
    transform = EdgeTransform(options("silu", trains_threshold=True)).double()
    assert torch.equal(transform(weights, visible), edge_weights(weights, visible, options("silu")))
    with torch.no_grad():
        transform.threshold.fill_(0.4)
    found = transform(weights, visible)
    assert found[0, 0, 5, 2].item() == pytest.approx(silu(weights[0, 0, 5, 2].item() - 0.4))
    found.sum().backward()
    assert transform.threshold.grad.item() != 0


@pytest.mark.parametrize("transform", ["none", "binary", "top_k", "scaled_topk", "relu_below_binary_above"])
def test_a_trainable_threshold_without_a_slope_is_refused(transform):
    with pytest.raises(Exception, match="`trains_threshold` needs a `transform` with a slope"):
        options(transform, trains_threshold=True)


def test_later_tokens_do_not_change_what_top_k_keeps():
    weights, visible = causal_weights(0, length=9)
    whole = top_k_of_row(weights, visible, 0.4)
    part = top_k_of_row(weights[..., :5, :5], visible[..., :5, :5], 0.4)
    assert torch.equal(whole[..., :5, :5], part)


def test_of_equal_weights_top_k_keeps_the_earlier():
    visible = torch.ones(1, 1, 4, dtype=torch.bool)
    assert top_k_of_row(torch.full((1, 1, 4), 0.25), visible, 0.5).tolist() == [[[True, True, False, False]]]


@pytest.mark.parametrize("transform", HARD)
def test_a_hard_selection_has_gradient_zero_or_straight_through_one(transform):
    weights, visible = causal_weights(1)
    for straight_through in (False, True):
        given_weights = weights.clone().requires_grad_()
        edge_weights(
            given_weights, visible, options(transform, fraction=0.3, straight_through=straight_through)
        ).sum().backward()
        assert torch.equal(given_weights.grad, visible.expand_as(weights).double() * straight_through)


@pytest.mark.parametrize("transform", ["silu", "softplus", "sharp_softplus", "sigmoid", "flow"])
def test_smooth_transforms_pass_gradcheck(transform):
    weights, visible = causal_weights(2)
    assert torch.autograd.gradcheck(
        lambda a: edge_weights(a, visible, options(transform)), weights.clone().requires_grad_()
    )
