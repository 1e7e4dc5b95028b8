"""oneDNN's linear map has torch's values and gradients, also of the second order; the maker of a CPU is read."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from graft import cpu
from graft.cpu import onednn_linear

needs_onednn = pytest.mark.skipif(not cpu.HAS_ONEDNN, reason="this torch has no oneDNN")
NAMES = ("x", "weight", "bias")


def random_case(seed, shape, inputs=5, outputs=7):
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(*size, generator=rng) for size in ((*shape, inputs), (outputs, inputs), (outputs,))]


@needs_onednn
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    shape=st.sampled_from([(1,), (6,), (2, 3), (2, 1, 4)]),
    learn=st.sets(st.sampled_from(NAMES)),
    has_bias=st.booleans(),
)
def test_values_and_gradients_are_torchs_whatever_learns(seed, shape, learn, has_bias):
    tensors = random_case(seed, shape)[: 3 if has_bias else 2]
    for name, tensor in zip(NAMES, tensors, strict=False):
        tensor.requires_grad_(name in learn)
    learning = [tensor for tensor in tensors if tensor.requires_grad]
    found = []
    for function in (onednn_linear, functional.linear):
        made = function(*tensors)
        assert made.requires_grad == bool(learning)
        gradients = torch.autograd.grad(made.sin().sum(), learning) if learning else ()
        found.append((made.detach(), *gradients))
    for ours, torchs in zip(*found, strict=True):
        torch.testing.assert_close(ours, torchs, rtol=1e-5, atol=1e-5)


@needs_onednn
@pytest.mark.parametrize("frozen", [NAMES[0], NAMES[1]])
def test_a_frozen_tensor_makes_the_other_be_forgotten(frozen):
    x, weight, bias = random_case(0, (6,))
    x.requires_grad_(frozen != "x")
    weight.requires_grad_(frozen != "weight")
    kept = onednn_linear(x, weight, bias).grad_fn.saved_tensors
    assert [tensor is not None for tensor in kept] == [weight.requires_grad, x.requires_grad]


@needs_onednn
def test_gradients_of_gradients_are_torchs():
    tensors = [tensor.requires_grad_() for tensor in random_case(1, (2, 3))]
    found = []
    for function in (onednn_linear, functional.linear):
        first = torch.autograd.grad(function(*tensors).sin().sum(), tensors, create_graph=True)
        found.append(torch.autograd.grad(sum(part.square().sum() for part in first), tensors))
    for ours, torchs in zip(*found, strict=True):
        torch.testing.assert_close(ours, torchs, rtol=1e-4, atol=1e-4)


@needs_onednn
def test_transforms_of_functions_go_through_it():
    x, weight, bias = random_case(2, (4, 3))

    def loss(function):
        return lambda weight, row: function(row, weight, bias).square().sum()

    found = [
        torch.func.vmap(torch.func.grad(loss(function)), in_dims=(None, 0))(weight, x)
        for function in (onednn_linear, functional.linear)
    ]
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


@needs_onednn
def test_it_may_be_checkpointed():
    tensors = [tensor.requires_grad_() for tensor in random_case(3, (6,))]
    whole = torch.autograd.grad(onednn_linear(*tensors).sin().sum(), tensors)
    made = torch.utils.checkpoint.checkpoint(onednn_linear, *tensors, use_reentrant=False)
    for ours, again in zip(whole, torch.autograd.grad(made.sin().sum(), tensors), strict=True):
        assert torch.equal(ours, again)


@pytest.mark.parametrize(
    ("capability", "listed", "maker"),
    [
        ("AVX2", "vendor_id\t: AuthenticAMD\n", None),
        ("AVX512", "processor\t: 0\nvendor_id\t: AuthenticAMD\n", "AMD"),
        ("AVX512", "processor\t: 0\nvendor_id\t: GenuineIntel\n", "Intel"),
        ("AVX512", None, "Intel"),
    ],
)
def test_who_made_the_processor_is_read_where_it_has_avx512(capability, listed, maker, monkeypatch, tmp_path):
    if listed is not None:
        (tmp_path / "cpuinfo").write_text(listed)
    monkeypatch.setattr(cpu, "PROCESSORS", tmp_path / "cpuinfo")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert cpu._avx512_maker() == maker
