"""Latent attention equals loops over groups, levels, heads and tokens; cached in any pieces, padded, cropped."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache

from graft.configuration.configuration_gnn import LlamaGNNConfig
from graft.modeling.graph.cg_attention import CGAttentionInterpolate, cg_class
from graft.modeling.graph.group_grid import GroupGrid, padding_in_front


def build(sizes=(2, 3), heads=2, groups=1, head_dim=4, width=6, attention="cg", **more):
    torch.manual_seed(0)
    latent = {"tokens_per_latent": list(sizes), **more.pop("latent", {})}
    config = LlamaGNNConfig(
        hidden_size=width,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=head_dim,
        num_hidden_layers=1,
        gnn_config={"attention": attention, "latent": latent, **more},
    )
    config._attn_implementation = "sdpa"
    module = cg_class(config.gnn_config)(config, 0).double().eval()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return module


def inputs(module, batch, source, seed=1):
    generator = torch.Generator().manual_seed(seed)
    width = (module.levels if hasattr(module, "levels") else module.cg.levels)[0].norm.weight.shape[0]
    states = torch.randn(batch, source, width, generator=generator, dtype=torch.float64)
    return states, (torch.ones(1, source, 4).double(), torch.zeros(1, source, 4).double())  # no rotation of the base


def rotate(vector, position):
    half = len(vector) // 2
    angles = position * 10000.0 ** (-torch.arange(half) / half)
    cos, sin = angles.cos().repeat(2), angles.sin().repeat(2)
    return vector * cos.double() + torch.cat([-vector[half:], vector[:half]]) * sin.double()


def parts(vector, heads):
    return vector.view(heads, -1)


def soft(scores):
    return torch.softmax(torch.stack(scores), 0)


def weighted(weights, values):
    return sum(weight * value for weight, value in zip(weights, values, strict=True))


def norm(layer, x):
    return (x - x.mean()) / torch.sqrt(((x - x.mean()) ** 2).mean() + layer.eps) * layer.weight + layer.bias


def gelu(x):
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def latents_by_hand(level, n):
    """Latent c from tokens c t ... c t + t - 1, then the layers among latents; n (source, width)."""
    heads, d, latents = level.heads, level.head_dim, []
    cross = level.cross_attention
    for c in range(len(n) // level.size):
        query, joined = parts(cross.query.weight @ level.latent_query[0], heads), []
        tokens = n[c * level.size : (c + 1) * level.size]
        for h in range(heads):
            keys = [rotate(parts(cross.key.weight @ x, heads)[h], j) for j, x in enumerate(tokens)]
            values = [parts(cross.value.weight @ x, heads)[h] for x in tokens]
            joined.append(weighted(soft([query[h] @ key / math.sqrt(d) for key in keys]), values))
        latents.append(cross.output.weight @ torch.cat(joined) + cross.output.bias)
    for layer in level.layers:
        projected = [
            (layer.attention.projections.weight @ norm(layer.attention_norm, x)).view(3, heads, d) for x in latents
        ]
        found = []
        for c, latent in enumerate(latents):
            joined = []
            for h in range(heads):
                scores = [
                    rotate(projected[c][0, h], c) @ rotate(projected[o][1, h], o) / math.sqrt(d) for o in range(c + 1)
                ]
                joined.append(weighted(soft(scores), [projected[o][2, h] for o in range(c + 1)]))
            x = latent + layer.attention.output.weight @ torch.cat(joined) + layer.attention.output.bias
            inner = gelu(layer.up.weight @ norm(layer.mlp_norm, x) + layer.up.bias)
            found.append(x + layer.down.weight @ inner + layer.down.bias)
        latents = found
    return [norm(level.norm, x) for x in latents]


def read_by_hand(level, n):
    """Token i: one softmax over latents 0 ... ell(i) and the tokens of its own group up to itself."""
    heads, d, t, output = level.heads, level.head_dim, level.size, []
    latents = [(level.key_value.weight @ x).view(2, heads, d) for x in latents_by_hand(level, n)]
    tokens = [(level.key_value.weight @ x).view(2, heads, d) for x in n]
    for i in range(len(n)):
        joined = []
        for h in range(heads):
            query = rotate(parts(level.query.weight @ n[i], heads)[h], i % t)
            seen = [(rotate(latents[c][0, h], c), latents[c][1, h]) for c in range((i + 1) // t)]
            seen += [(rotate(tokens[j][0, h], j % t), tokens[j][1, h]) for j in range(i // t * t, i + 1)]
            joined.append(
                weighted(soft([query @ key / math.sqrt(d) for key, _ in seen]), [value for _, value in seen])
            )
        output.append(torch.cat(joined))
    return output


def base_by_hand(module, n):
    """Stock attention before its output map, and the values, by heads."""
    heads, d, output = module.config.num_attention_heads, module.head_dim, []
    q, k, v = ((n @ each.weight.T).unflatten(-1, (-1, d)) for each in (module.q_proj, module.k_proj, module.v_proj))
    k, v = (each.repeat_interleave(module.num_key_value_groups, 1) for each in (k, v))
    for i in range(len(n)):
        rows = [
            weighted(soft([q[i, h] @ k[j, h] / math.sqrt(d) for j in range(i + 1)]), v[: i + 1, h])
            for h in range(heads)
        ]
        output.append(torch.stack(rows))
    return output, v


def mixed_by_hand(module, level, mix, n):
    """mu SDPA + (1 - mu) times the up-sampled map of tokens x tokens, written out."""
    (attended, v), d, t = base_by_hand(module, n), level.head_dim, level.size
    pairs = [(level.map.weight @ x).view(2, level.heads, d) for x in latents_by_hand(level, n)]
    output = []
    for i in range(len(n)):
        last, rows = (i + 1) // t - 1, []
        for h in range(level.heads):
            if last < 0:
                rows.append(attended[i][h])
                continue
            query = rotate(pairs[last][0, h], last)
            shares = soft([query @ rotate(pairs[c][1, h], c) / math.sqrt(d) for c in range(last + 1)])
            token_map = [shares[j // t] / t if j // t <= last else torch.zeros(()) for j in range(i + 1)]
            assert sum(token_map).item() == pytest.approx(1)
            mu = torch.sigmoid(mix)
            rows.append(mu * attended[i][h] + (1 - mu) * weighted(token_map, v[: i + 1, h]))
        output.append(torch.cat(rows))
    return output


def summed(output, levels):
    """Per level, a list of tokens' vectors, to (source, width)."""
    maps = list(output.maps) if len(output.maps) > 1 else [output.maps[0]] * len(levels)
    return torch.stack([sum(m.weight @ x for m, x in zip(maps, at, strict=True)) for at in zip(*levels, strict=True)])


def by_loops(module, n):
    """One sequence (source, width)."""
    if isinstance(module, CGAttentionInterpolate):
        levels = [mixed_by_hand(module, *each, n) for each in zip(module.levels, module.mix, strict=True)]
        if module.output is None:
            found = torch.stack([module.o_proj.weight @ (sum(at) / len(at)) for at in zip(*levels, strict=True)])
        else:
            found = summed(module.output, levels)
        if module.keeps_base and module.output is not None:
            found = found + torch.stack([module.o_proj.weight @ x.flatten() for x in base_by_hand(module, n)[0]])
        return found + n if module.skip else found
    cg = getattr(module, "cg", module)
    found = summed(cg.output, [read_by_hand(level, n) for level in cg.levels])
    if cg is not module:
        found = found + torch.stack([module.o_proj.weight @ x.flatten() for x in base_by_hand(module, n)[0]])
    return found + n if cg.skip else found


VARIANTS = {
    "cg": {},
    "two layers, skip, one map": {"latent": {"num_layers": 2, "skip": True, "projects": False}},
    "beside": {"base_attention": True},
    "interpolate": {"attention": "cg_interpolate", "latent": {"projects": False}},
    "interpolate, two layers, maps": {"attention": "cg_interpolate", "latent": {"num_layers": 2, "skip": True}},
    "interpolate, beside": {"attention": "cg_interpolate", "base_attention": True},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_module_equals_a_loop_and_so_do_its_gradients(variant):
    module = build(**VARIANTS[variant])
    states, table = inputs(module, 2, 7)
    found, _ = module(states, table)
    expected = torch.stack([by_loops(module, n) for n in states])
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-9)
    parameters = list(module.parameters())
    fast = torch.autograd.grad(found.square().sum(), parameters)
    slow = torch.autograd.grad(expected.square().sum(), parameters)
    for one, other in zip(fast, slow, strict=True):
        torch.testing.assert_close(one, other, atol=1e-8, rtol=1e-7)


@given(st.integers(0, 99), st.integers(2, 5), st.integers(1, 9), st.sampled_from(["cg", "interpolate"]))
def test_any_sizes_equal_the_loop(seed, size, source, variant):
    module = build([size], **VARIANTS[variant])
    states, table = inputs(module, 1, source, seed)
    with torch.no_grad():
        found = module(states, table)[0][0]
        torch.testing.assert_close(found, by_loops(module, states[0]), atol=1e-10, rtol=1e-9)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_has_a_gradient_also_where_no_group_is_complete(variant):
    module = build([4, 5], **VARIANTS[variant])
    states, table = inputs(module, 1, 3)
    module(states, table)[0].sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


@pytest.mark.parametrize("variant", ["cg", "interpolate", "interpolate, two layers, maps"])
def test_the_module_passes_gradcheck(variant):
    module = build([2], **VARIANTS[variant])
    states, table = inputs(module, 1, 5)
    assert torch.autograd.gradcheck(lambda s: module(s, table)[0], (states.requires_grad_(),))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_token_reaches_far_ones_through_latents_only(variant):
    """Between groups nothing but latents carries a message where attention itself sends none."""
    module = build([3], **VARIANTS[variant])
    states, table = inputs(module, 1, 9)
    other = states.clone()
    other[0, 1] += 1
    with torch.no_grad():
        if hasattr(module, "q_proj") and not isinstance(module, CGAttentionInterpolate):
            module.v_proj.weight.zero_()
        change = (module(states, table)[0] - module(other, table)[0])[0].abs().amax(-1)
    assert (change[2:] > 1e-6).all()
    assert change[0] == 0


def masked(padding, source, rows):
    """The mask of these rows for padding in front, as sdpa takes it."""
    real = torch.arange(source) >= torch.tensor(padding)[:, None]
    visible = torch.ones(source, source, dtype=torch.bool).tril() & real[:, None]
    return (visible | torch.eye(source, dtype=torch.bool))[:, None, rows]


@pytest.mark.parametrize("variant", VARIANTS)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=5), st.integers(0, 4), st.integers(0, 4), st.data())
def test_pieces_crops_and_padding_give_what_each_row_gives_alone(variant, pieces, one, other, data):
    module, source = build(**VARIANTS[variant]), sum(pieces)
    padding = [min(one, source - 1), min(other, source - 1)]
    states, table = inputs(module, 2, source)
    cache, at, found = DynamicCache(), 0, []
    with torch.no_grad():
        for piece in pieces:
            gone = data.draw(st.integers(0, 4))
            junk = torch.randn(2, gone, states.shape[-1], dtype=torch.float64)
            total = at + piece + gone
            mask = masked(padding, total, slice(at, total))
            cut = (table[0][:, :1].expand(1, piece + gone, -1), table[1][:, :1].expand(1, piece + gone, -1))
            given_states = torch.cat([states[:, at : at + piece], junk], 1)
            read, _ = module(given_states, cut, mask, past_key_values=cache)
            found.append(read[:, :piece])
            if gone:
                cache.crop(-gone)
            at += piece
        found = torch.cat(found, 1)
        assert found.isfinite().all()
        for row, hidden in enumerate(padding):
            alone, _ = module(states[row : row + 1, hidden:], tuple(each[:, hidden:] for each in table))
            torch.testing.assert_close(found[row, hidden:], alone[0], atol=1e-10, rtol=1e-9)


OPERATIONS = {
    "reorder": (lambda cache: cache.reorder_cache(torch.tensor([1, 0])), [1, 0]),
    "select": (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
    "repeat": (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1]),
    "offload": (lambda cache: [cache.layers[0].offload(), cache.layers[0].prefetch()], [0, 1]),
}


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("variant", ["cg", "beside", "interpolate"])
def test_latents_follow_every_operation_on_the_cache(variant, operation):
    module, (act, rows) = build(**VARIANTS[variant]), OPERATIONS[operation]
    states, table = inputs(module, 2, 9)
    cache = DynamicCache()
    with torch.no_grad():
        whole, _ = module(states, table)
        module(states[:, :7], tuple(each[:, :7] for each in table), past_key_values=cache)
        act(cache)
        mask = torch.ones(len(rows), 1, 2, 9, dtype=torch.bool).tril(7)
        read, _ = module(states[rows][:, 7:], tuple(each[:, 7:] for each in table), mask, past_key_values=cache)
        torch.testing.assert_close(read, whole[rows][:, 7:], atol=1e-12, rtol=1e-10)
        cache.reset()
        again, _ = module(states, table, past_key_values=cache if not cache.get_seq_length() else DynamicCache())
        torch.testing.assert_close(again, whole, atol=1e-12, rtol=1e-10)


def test_a_cache_with_tokens_of_unknown_latents_is_refused():
    module, cache = build(), DynamicCache()
    cache.update(torch.zeros(1, 1, 3, 6), torch.zeros(1, 1, 3, 6), 0)
    states, table = inputs(module, 1, 2)
    with pytest.raises(RuntimeError, match="holds 3 tokens of which this model knows no latents"):
        module(states, table, past_key_values=cache)


def test_no_tensor_of_tokens_times_tokens_is_made():
    module = build([16]).float()
    states, table = inputs(module, 1, 512)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                largest = max(largest, result.numel())
            return result

    with Watch(), torch.no_grad():
        module(states.float(), tuple(each.float() for each in table))
    assert largest <= 2 * 512 * (512 // 16 + 16)  # heads x tokens x (latents + group)


paddings = st.lists(st.integers(0, 5), min_size=1, max_size=3)


@given(paddings, st.booleans(), st.integers(0, 7), st.integers(1, 7), st.integers(2, 4))
def test_the_grid_says_where_new_tokens_lie(padding, stays_on_device, past, new, size):
    """Also where padding is not read on the host: then there may be more groups, never fewer."""
    grid = GroupGrid(size, past, new, torch.tensor(padding) if stays_on_device else padding, torch.device("cpu"))
    rows = torch.arange(past + new).double()[None, :, None].expand(len(padding), -1, -1)
    groups, back = grid.touched_tokens(rows), grid.new_tokens(grid.touched_tokens(rows).flatten(1, 2))
    fresh = grid.fresh_tokens(rows)
    assert groups.shape[1:3] == (grid.touched, size)
    assert fresh.shape[1:3] == (grid.fresh, size)
    for row, hidden in enumerate(padding):
        first = max(past - hidden, 0) // size
        assert first <= grid.known
        assert max(past - hidden, 0) % size <= grid.open
        for place in range(past, past + new):
            real = place - hidden
            if real >= 0:
                assert groups[row, real // size - first, real % size].item() == place
                assert back[row, place - past].item() == place
        complete = range(first, max(past + new - hidden, 0) // size)
        assert len(complete) <= grid.fresh
        for index, group in enumerate(complete):
            assert fresh[row, index, :, 0].tolist() == [hidden + group * size + j for j in range(size)]


@given(st.integers(0, 9), st.integers(1, 9), st.integers(2, 4))
def test_a_grid_that_does_not_know_its_padding_has_no_more_groups_than_some_row_needs(past, new, size):
    device = torch.device("cpu")
    grid = GroupGrid(size, past, new, torch.zeros(1, dtype=torch.long), device)
    each = [GroupGrid(size, past, new, [hidden], device) for hidden in range(past + 1)]
    assert grid.known == max(one.known for one in each)
    assert grid.open == max(one.open for one in each)
    assert grid.fresh == max(one.fresh for one in each)
    assert grid.touched == max(one.touched for one in each)


def test_padding_is_counted_up_to_the_first_key_that_the_last_row_reads():
    assert padding_in_front(None, 3, 5) == [0]
    assert padding_in_front(masked([2, 0], 5, slice(3, 5)), 2, 5) == [2, 0]
    assert padding_in_front(masked([0, 0], 5, slice(3, 5)), 2, 5) == [0]
