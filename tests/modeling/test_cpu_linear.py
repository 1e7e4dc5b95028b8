"""The product of few rows and of many gives what a loop over them gives, whatever their number, layout and dtype."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_decoders import tiny_decoder

from graft.cpu import HAS_ONEDNN
from graft.modeling import cpu_linear
from graft.modeling.cpu_linear import BLOCKS, FEW, Linear, decode_faster, linear


@pytest.fixture(autouse=True)
def _small_weights_count(monkeypatch):
    monkeypatch.setattr(cpu_linear, "LARGE", 0)
    monkeypatch.setattr(cpu_linear, "LARGE_FOR_ONEDNN", 0)


@pytest.fixture(params=[False, pytest.param(True, marks=pytest.mark.skipif(not HAS_ONEDNN, reason="no oneDNN"))])
def with_onednn(request, monkeypatch):
    monkeypatch.setattr(cpu_linear, "ONEDNN_IS_FASTER", request.param)
    return request.param


def naive_linear(x, weight, bias):
    rows = x.double().reshape(-1, x.shape[-1])
    products = torch.stack([torch.stack([(row * out).sum() for out in weight.double()]) for row in rows])
    products = products if bias is None else products + bias.double()
    return products.reshape(*x.shape[:-1], len(weight))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 10**6),
    shape=st.sampled_from([(1,), (1, 1), (2, 1), (1, 3), (2, 2), (1, 1, 1), (1, 5), (2, 3, 4), (17,)]),
    inputs=st.integers(1, 9),
    outputs=st.integers(1, 13),
    has_bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_it_equals_a_loop_over_rows_and_outputs(with_onednn, seed, shape, inputs, outputs, has_bias, dtype):
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, inputs, generator=rng, dtype=dtype)
    weight = torch.randn(outputs, inputs, generator=rng, dtype=dtype)
    bias = torch.randn(outputs, generator=rng, dtype=dtype) if has_bias else None
    with torch.no_grad():
        given = linear(x, weight, bias)
    assert given.shape == (*shape, outputs)
    assert given.dtype == dtype
    assert given.is_contiguous()
    torch.testing.assert_close(given.double(), naive_linear(x, weight, bias), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 2, FEW, FEW + 1])
def test_rows_and_weights_may_be_views_of_any_layout(with_onednn, rows):
    rng = torch.Generator().manual_seed(rows)
    wide = torch.randn(rows, 12, generator=rng)
    weight = torch.randn(5, 4 * BLOCKS[0], generator=rng).t()  # outputs lie apart
    held = torch.randn(4 * BLOCKS[0] + 3, 5, generator=rng)[3:]  # behind other rows
    for x in (wide[:, 7:], wide[:, ::2][:, :5], torch.randn(5, rows, generator=rng).t()):
        for matrix in (weight, held):
            with torch.no_grad():
                given = linear(x, matrix)
            torch.testing.assert_close(given.double(), naive_linear(x, matrix, None), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(1,), (5,), (2, 3)])
def test_the_module_has_torchs_gradients_and_is_torchs_under_autocast(with_onednn, shape):
    ours, torchs = Linear(6, 8), torch.nn.Linear(6, 8)
    torchs.load_state_dict(ours.state_dict())
    x = torch.randn(*shape, 6, requires_grad=True)
    gradients = [
        torch.autograd.grad(module(x).square().sum(), [x, module.weight, module.bias]) for module in (ours, torchs)
    ]
    torch.testing.assert_close(*gradients)
    with torch.no_grad():
        without = ours(x)
    assert torch.equal(ours(x), without)  # recording gradients changes no number
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert ours(x).dtype == torch.bfloat16
        assert torch.equal(ours(x), torchs(x))


def test_no_rows_give_none():
    with torch.no_grad():
        assert linear(torch.zeros(0, 6), torch.ones(8, 6)).shape == (0, 8)
        assert torch.equal(linear(torch.zeros(2, 0), torch.ones(8, 0)), torch.zeros(2, 8))


@pytest.mark.parametrize("family", ["llama", "phi", "gpt2"])
def test_a_model_decodes_the_same_text_and_is_what_it_was_afterwards(with_onednn, family):
    model = tiny_decoder(family, torch.float32)
    ids = torch.arange(3, 9)[None]
    options = {"max_new_tokens": 8, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    stock, whole = model.generate(ids, **options), model(ids).logits
    kinds = [type(module) for module in model.modules()]
    names = [name for name, _ in model.named_parameters()]
    with decode_faster(model) as handle, torch.no_grad():
        faster = model.generate(ids, **options)
        assert Linear in map(type, model.modules())
        assert [name for name, _ in model.named_parameters()] == names
    assert not handle.is_attached
    assert torch.equal(faster.sequences, stock.sequences)
    torch.testing.assert_close(torch.stack(faster.logits), torch.stack(stock.logits), rtol=1e-4, atol=1e-5)
    assert [type(module) for module in model.modules()] == kinds
    assert torch.equal(model(ids).logits, whole)


def test_other_kinds_of_linear_maps_keep_their_own_way():
    class Quantised(torch.nn.Linear):
        pass

    model = torch.nn.Sequential(torch.nn.Linear(4, 4), Quantised(4, 4))
    handle = decode_faster(model)
    assert [type(module) for module in model] == [Linear, Quantised]
    again = decode_faster(model)  # finds nothing left to do, so it takes nothing away
    again.remove()
    assert type(model[0]) is Linear
    handle.remove()
    handle.remove()
    assert [type(module) for module in model] == [torch.nn.Linear, Quantised]


@pytest.mark.parametrize("rows", range(1, FEW + 2))
def test_few_rows_meet_blocks_of_the_weight_and_more_do_not(rows, monkeypatch):
    seen, bmm = [], torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda *given: seen.append(given[0].shape) or bmm(*given))
    linear(torch.randn(rows, 6), torch.randn(2 * BLOCKS[0], 6))
    assert seen == ([(BLOCKS[0], 2, 6)] if rows <= FEW else [])


@pytest.mark.skipif(not HAS_ONEDNN, reason="no oneDNN")
@pytest.mark.parametrize(
    ("rows", "inputs", "dtype", "goes_there"),
    [
        (1, 12, torch.float32, False),
        (1, 13, torch.float32, True),
        (3, 4, torch.float32, False),
        (3, 5, torch.float32, True),
        (FEW + 1, 2, torch.float32, True),
        (FEW + 1, 2, torch.float64, False),
    ],
)
def test_many_numbers_go_to_onednn_where_that_is_faster(rows, inputs, dtype, goes_there, monkeypatch):
    seen, ours = [], cpu_linear.onednn_linear
    monkeypatch.setattr(cpu_linear, "ONEDNN_IS_FASTER", True)
    monkeypatch.setattr(cpu_linear, "SHORT", 12)
    monkeypatch.setattr(cpu_linear, "onednn_linear", lambda *given: seen.append(len(given[0])) or ours(*given))
    x, weight = torch.randn(rows, inputs, dtype=dtype), torch.randn(8, inputs, dtype=dtype)
    torch.testing.assert_close(linear(x, weight), torch.nn.functional.linear(x, weight), rtol=1e-5, atol=1e-5)
    assert seen == [rows] * goes_there
    monkeypatch.setattr(cpu_linear, "LARGE_FOR_ONEDNN", 8 * inputs + 1)
    linear(x, weight)
    assert seen == [rows] * goes_there


def test_a_weight_of_a_kind_of_its_own_is_asked_for_the_product_as_torch_asks_it():
    class Quantised(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            if function in (torch.bmm, torch.Tensor.view):
                raise NotImplementedError(function)
            return super().__torch_function__(function, types, args, kwargs or {})

    x, weight = torch.randn(1, 6), torch.randn(8, 6)
    assert torch.equal(linear(x, weight.as_subclass(Quantised)), torch.nn.functional.linear(x, weight))


def test_small_weights_are_left_to_torch(monkeypatch):
    monkeypatch.setattr(cpu_linear, "LARGE", 6 * 8 + 1)
    monkeypatch.setattr(torch, "bmm", lambda *_: pytest.fail("a small weight was cut into blocks"))
    x, weight = torch.randn(1, 6), torch.randn(8, 6)
    assert torch.equal(linear(x, weight), torch.nn.functional.linear(x, weight))
