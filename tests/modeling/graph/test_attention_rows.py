"""Attention written out in blocks of rows, and values of any width, against a softmax of all pairs."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from graft.configuration.configuration_gnn import LlamaGNNConfig
from graft.modeling.graph.attention_rows import AttentionRows, ScoredPairs
from graft.modeling.graph.llama_heads import attention_of_any_width


def naive(query, key, value, scaling):
    """softmax(scaling q k^T) v, a head and a row at a time; a single row reads all keys, of several row i i + 1."""
    groups = query.shape[1] // key.shape[1]
    output = torch.zeros(*query.shape[:3], value.shape[-1], dtype=query.dtype)
    for batch in range(query.shape[0]):
        for head in range(query.shape[1]):
            for row in range(query.shape[2]):
                seen = key.shape[2] if query.shape[2] == 1 else row + 1
                scores = scaling * key[batch, head // groups, :seen] @ query[batch, head, row]
                output[batch, head, row] = scores.softmax(-1) @ value[batch, head // groups, :seen]
    return output


def drawn(sizes, widths, groups=1, source=None):
    """Query, key and value in float64, with gradient."""
    batch, heads, target = sizes
    keys = (batch, heads // groups, source or target)
    shapes = [(*sizes, widths[0]), (*keys, widths[0]), (*keys, widths[1])]
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


class Attention(nn.Module):
    """What `attention_of_any_width` reads of a module."""

    def __init__(self, name, block_bytes, groups):
        super().__init__()
        self.config = LlamaGNNConfig(gnn_config={"block_bytes": block_bytes})
        self.config._attn_implementation = name
        self.is_causal, self.attention_dropout, self.num_key_value_groups = True, 0.0, groups


@given(st.integers(1, 2), st.sampled_from([1, 2]), st.integers(1, 150), st.integers(1, 2**16))
def test_rows_in_blocks_of_any_size_read_what_attention_reads(batch, groups, target, block_bytes):
    states = drawn((batch, 2, target), (4, 6), groups)
    read = AttentionRows(ScoredPairs(*states[:2], 0.7, None)).read(states[2], 0.0, block_bytes)
    expected = naive(*states, 0.7)
    torch.testing.assert_close(read, expected, atol=1e-12, rtol=1e-10)
    gradients = (torch.autograd.grad(each.sin().sum(), states) for each in (read, expected))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("widths", [(4, 9), (4, 4), (9, 4)])
@pytest.mark.parametrize("block_bytes", [1, 2**20])
@pytest.mark.parametrize(("target", "source"), [(7, 7), (1, 5)])
@pytest.mark.parametrize("name", ["sdpa", "eager"])
def test_values_of_any_width_are_read_fused_or_written_out(name, target, source, block_bytes, widths):
    states = drawn((2, 4, target), widths, 2, source)
    mask = None if name == "sdpa" else torch.full((target, source), -torch.inf).triu(1)[None, None].double()
    if target == 1 and mask is not None:
        mask = torch.zeros_like(mask)
    module = Attention(name, block_bytes, 2)
    output, weights = attention_of_any_width(module, tuple(states), mask, 0.7, {})
    expected = naive(*states, 0.7)
    off = {"atol": 1e-10, "rtol": 1e-8} if name == "sdpa" else {"atol": 1e-5, "rtol": 1e-5}  # its softmax is float32
    torch.testing.assert_close(output, expected, **off)
    assert (weights is None) == (name == "sdpa")
    gradients = (torch.autograd.grad(each.sin().sum(), states) for each in (output, expected))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, **off)


def test_dropped_weights_keep_what_is_read_on_average():
    torch.manual_seed(0)
    query, key, value = drawn((1, 1, 3), (2, 5))
    rows = AttentionRows(ScoredPairs(query, key, 0.7, None))
    with torch.no_grad():
        mean = torch.stack([rows.read(value, 0.5, 2**20) for _ in range(4000)]).mean(0)
        torch.testing.assert_close(mean, rows.read(value, 0.0, 2**20), atol=0.15, rtol=0)
        assert not torch.equal(rows.read(value, 0.5, 2**20), rows.read(value, 0.5, 2**20))
