"""Remembered keys are moved to their place by one rotation, which equals rotating them there in the first place."""

import cmath

import pytest
import torch
from hypothesis import given
from hypothesis.strategies import integers, sampled_from

from graft.modeling.unlimiformer.positions import Rotation, memory_positions, rotate

SEEDS = integers(0, 2**32 - 1)
PAIRINGS = sampled_from(["halves", "neighbours"])
CLOSE = {"rtol": 1e-9, "atol": 1e-9}


def naive_rotate(key, position, frequencies, pairing):
    """Each pair of dimensions as a complex number times exp(i position frequency)."""
    half = len(frequencies)
    turned = key.clone()
    for i in range(half):
        a, b = (i, i + half) if pairing == "halves" else (2 * i, 2 * i + 1)
        number = complex(key[a], key[b]) * cmath.exp(1j * position * float(frequencies[i]))
        turned[a], turned[b] = number.real, number.imag
    return turned


def random_keys(seed, source, head_dim, half):
    rng = torch.Generator().manual_seed(seed)
    keys = torch.randn(2, source, head_dim, dtype=torch.float64, generator=rng)
    return keys, torch.rand(half, dtype=torch.float64, generator=rng), rng


@given(seed=SEEDS, source=integers(1, 6), half=integers(1, 3), rest=integers(0, 3), pairing=PAIRINGS)
def test_rotate_equals_the_direct_rotation_at_the_target(seed, source, half, rest, pairing):
    keys, frequencies, rng = random_keys(seed, source, 2 * half + rest, half)
    left_at = torch.randint(0, 1000, (source,), generator=rng)
    targets = torch.randint(0, 1000, (source,), generator=rng)
    as_left = torch.stack(
        [
            torch.stack([naive_rotate(k, int(p), frequencies, pairing) for k, p in zip(row, left_at, strict=True)])
            for row in keys
        ]
    )
    direct = torch.stack(
        [
            torch.stack([naive_rotate(k, int(p), frequencies, pairing) for k, p in zip(row, targets, strict=True)])
            for row in keys
        ]
    )
    torch.testing.assert_close(rotate(as_left, targets - left_at, Rotation(frequencies, pairing)), direct, **CLOSE)


@given(seed=SEEDS, source=integers(1, 6), first=integers(-500, 500), second=integers(-500, 500))
def test_two_rotations_equal_one_by_their_sum(seed, source, first, second):
    keys, frequencies, _ = random_keys(seed, source, 6, 3)
    a, b = torch.full((source,), first), torch.full((source,), second)
    twice = rotate(rotate(keys, a, Rotation(frequencies)), b, Rotation(frequencies))
    torch.testing.assert_close(twice, rotate(keys, a + b, Rotation(frequencies)), rtol=1e-9, atol=1e-9)


@given(seed=SEEDS, source=integers(1, 6))
def test_dimensions_past_the_rotated_ones_stay(seed, source):
    keys, frequencies, rng = random_keys(seed, source, 9, 2)
    offsets = torch.randint(-99, 99, (source,), generator=rng)
    moved = rotate(keys, offsets, Rotation(frequencies))
    assert torch.equal(moved[..., 4:], keys[..., 4:])
    torch.testing.assert_close(moved[..., :4], rotate(keys[..., :4], offsets, Rotation(frequencies)))


@given(seed=SEEDS, dtype=sampled_from([torch.float16, torch.bfloat16, torch.float32]))
def test_rotate_keeps_the_dtype_and_rounds_once(seed, dtype):
    keys, frequencies, rng = random_keys(seed, 5, 6, 3)
    keys, offsets = keys.to(dtype), torch.randint(0, 99, (5,), generator=rng)
    moved = rotate(keys, offsets, Rotation(frequencies.float()))
    exact = rotate(keys.double(), offsets, Rotation(frequencies.float().double()))
    assert moved.dtype == dtype
    in_float32 = 4 * torch.finfo(torch.float32).eps * float(keys.abs().max())
    rounded = torch.finfo(dtype).eps / 2 * exact.abs() if dtype != torch.float32 else 0
    assert ((moved.double() - exact).abs() <= rounded + in_float32).all()


def test_far_rotations_are_as_precise_as_near_ones():
    """The angle of 100,000 positions in float32 would be wrong in the second digit of the fraction."""
    keys = torch.tensor([[1.0, 0.0]])
    moved = rotate(keys, torch.tensor([100_003]), Rotation(torch.tensor([1.0])))
    expected = cmath.exp(1j * 100_003)
    torch.testing.assert_close(moved, torch.tensor([[expected.real, expected.imag]]), rtol=1e-6, atol=1e-6)


@given(length=integers(1, 200), window=integers(1, 50))
def test_squeeze_maps_a_long_document_onto_one_window_and_leaves_a_short_one(length, window):
    positions, taken = memory_positions(length, window, "squeeze")
    expected = [p * window // length if length > window else p for p in range(length)]
    assert positions.tolist() == expected
    assert taken == min(length, window)
    assert max(expected) < taken


@given(length=integers(1, 200), window=integers(1, 50))
def test_true_positions_leave_each_token_where_it_was(length, window):
    positions, taken = memory_positions(length, window, "true")
    assert positions.tolist() == list(range(length))
    assert taken == length


@given(length=integers(1, 200), window=integers(1, 50))
def test_origin_puts_all_keys_at_zero_behind_one_window(length, window):
    positions, taken = memory_positions(length, window, "origin")
    assert positions.tolist() == [0] * length
    assert taken == min(length, window)


@pytest.mark.parametrize("rule", ["squeeze", "true", "origin"])
def test_positions_are_whole_numbers(rule):
    assert memory_positions(10, 4, rule)[0].dtype == torch.int64
