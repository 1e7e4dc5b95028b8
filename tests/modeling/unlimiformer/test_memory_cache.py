"""The memory's cache layers follow every operation of a cache, and rows find their documents through all of them."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis.strategies import data, integers, lists
from transformers import DynamicCache, EncoderDecoderCache
from transformers.cache_utils import DynamicLayer

from graft.modeling.cache_layers import CacheLayerWrapper
from graft.modeling.unlimiformer.memory_cache import DocumentRows, MemoryCacheLayer, PlaceholderLayer, memory_layer

SEEDS = integers(0, 2**32 - 1)


def documents_of(rows, batch):
    return list(rows.expect(batch))


@given(given=lists(integers(0, 3), min_size=1, max_size=6), repeats=integers(1, 3))
def test_each_given_row_is_repeated_in_place(given, repeats):
    rows = DocumentRows(given, 4)
    expected = [document for document in given for _ in range(repeats)]
    assert documents_of(rows, len(given) * repeats) == expected


@given(given=lists(integers(0, 2), min_size=1, max_size=6), repeats=integers(1, 3))
def test_the_grid_holds_each_row_under_its_document_and_gives_it_back(given, repeats):
    rows = DocumentRows(given, 3)
    batch = torch.arange(len(given) * repeats).view(-1, 1).expand(-1, 2)
    grid = rows.to_grid(batch)
    assert grid.shape[0] == 3
    assert grid.shape[2:] == (2,)
    for row, document in enumerate(documents_of(rows, len(batch))):
        assert row in grid[document, :, 0].tolist()
    assert torch.equal(rows.from_grid(grid), batch)


@given(given=lists(integers(0, 2), min_size=1, max_size=5), case=data())
def test_rows_follow_any_selection_and_lay_the_grid_anew(given, case):
    rows = DocumentRows(given, 3)
    documents = documents_of(rows, len(given))
    rows.from_grid(rows.to_grid(torch.arange(len(given))))  # a layout is kept from here on
    chosen = case.draw(lists(integers(0, len(given) - 1), min_size=1, max_size=8))
    rows.take(chosen)
    assert documents_of(rows, len(chosen)) == [documents[i] for i in chosen]
    batch = torch.arange(len(chosen))
    assert torch.equal(rows.from_grid(rows.to_grid(batch)), batch)


def test_a_batch_that_is_no_multiple_of_the_rows_is_refused_with_both_numbers():
    with pytest.raises(ValueError, match=r"batch of 5 rows.*made for 2 rows.*select"):
        DocumentRows([0, 1], 2).expect(5)


def test_a_batch_that_changes_within_a_generation_is_refused_with_both_numbers():
    rows = DocumentRows([0, 1], 2)
    rows.expect(4)
    with pytest.raises(ValueError, match=r"batch of 2 rows.*has 4 rows"):
        rows.expect(2)


def local_layer(batch=3, length=4, seed=0):
    layer = DynamicLayer()
    rng = torch.Generator().manual_seed(seed)
    layer.update(*torch.randn(2, batch, 2, length, 5, generator=rng))
    return layer


def wrapped_pair(shift=7, count=3):
    """A plain layer and a memory layer around an equal one."""
    rows = DocumentRows(range(count), count)
    rows.expect(count)
    return local_layer(count), MemoryCacheLayer(local_layer(count), 0, rows, None, shift=shift)


def assert_same_tensors(wrapped, plain):
    for found, expected in ((wrapped.keys, plain.keys), (wrapped.values, plain.values)):
        assert (found is None) == (expected is None)
        assert expected is None or torch.equal(found, expected)


OPERATIONS = {
    "update": lambda layer: layer.update(*torch.ones(2, layer.keys.shape[0], 2, 1, 5)),
    "crop": lambda layer: layer.crop(-2),
    "reorder_cache": lambda layer: layer.reorder_cache(torch.tensor([2, 0, 0])),
    "batch_repeat_interleave": lambda layer: layer.batch_repeat_interleave(2),
    "batch_select_indices": lambda layer: layer.batch_select_indices(torch.tensor([2, 1])),
    "batch_select_indices by mask": lambda layer: layer.batch_select_indices(torch.tensor([True, False, True])),
    "offload": lambda layer: layer.offload(),
    "prefetch": lambda layer: layer.prefetch(),
    "reset": lambda layer: layer.reset(),
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_wrapped_layer_undergoes_every_operation(operation):
    plain, wrapped = wrapped_pair()
    OPERATIONS[operation](plain)
    OPERATIONS[operation](wrapped)
    assert_same_tensors(wrapped, plain)
    assert wrapped.get_seq_length() == 7 + plain.get_seq_length()


@pytest.mark.parametrize(("first", "second"), list(itertools.product(list(OPERATIONS)[:5], repeat=2)))
def test_two_operations_in_a_row_leave_the_wrapped_layer_as_a_plain_one(first, second):
    plain, wrapped = wrapped_pair()
    if first == "batch_select_indices" and second in ("reorder_cache", "batch_select_indices"):
        pytest.skip("two rows are left, and the second operation names three")
    for operation in (first, second):
        OPERATIONS[operation](plain)
        OPERATIONS[operation](wrapped)
    assert_same_tensors(wrapped, plain)


ROWS_AFTER = {
    "reorder_cache": [2, 0, 0],
    "batch_repeat_interleave": [0, 0, 1, 1, 2, 2],
    "batch_select_indices": [2, 1],
    "batch_select_indices by mask": [0, 2],
    "reset": [0, 1, 2],
}


@pytest.mark.parametrize("operation", ROWS_AFTER)
def test_rows_change_once_for_a_cache_of_several_layers(operation):
    rows = DocumentRows(range(3), 3)
    rows.expect(3)
    layers = [MemoryCacheLayer(local_layer(), i, rows, None) for i in range(3)]
    for layer in layers:
        OPERATIONS[operation](layer)
    assert documents_of(rows, len(ROWS_AFTER[operation])) == ROWS_AFTER[operation]


@pytest.mark.parametrize(
    "operation", ["batch_repeat_interleave", "batch_select_indices", "batch_select_indices by mask"]
)
def test_rows_follow_an_operation_before_the_first_forward(operation):
    rows = DocumentRows([2, 0, 1], 3)
    given = torch.tensor([2, 0, 1])
    layer = MemoryCacheLayer(local_layer(), 0, rows, None)
    OPERATIONS[operation](layer)
    expected = given[ROWS_AFTER[operation]].tolist()
    assert documents_of(rows, len(expected)) == expected


def test_mask_sizes_start_behind_the_memory():
    plain, wrapped = wrapped_pair(shift=7)
    length, offset = plain.get_mask_sizes(2)
    assert wrapped.get_mask_sizes(2) == (length, offset + 7)


@pytest.mark.parametrize(
    "name",
    ["is_initialized", "is_compileable", "is_sliding", "is_croppable", "supports_early_init", "device", "dtype"],
)
def test_wrappers_answer_for_the_layer_they_found(name):
    plain, wrapped = wrapped_pair()
    if not hasattr(plain, name):
        pytest.skip("this transformers has no such attribute")
    assert getattr(wrapped, name) == getattr(plain, name)


def test_wrappers_give_the_length_limit_under_both_names():
    plain, wrapped = wrapped_pair()
    name = "get_max_length" if hasattr(plain, "get_max_length") else "get_max_cache_shape"
    assert wrapped.get_max_length() == wrapped.get_max_cache_shape() == getattr(plain, name)()


def test_keys_and_values_set_on_a_wrapper_are_those_of_the_layer_inside():
    _, wrapped = wrapped_pair()
    new = torch.zeros(3, 2, 1, 5)
    wrapped.keys = wrapped.values = new
    assert wrapped.inner.keys is new
    assert wrapped.inner.values is new


class AnotherWingsLayer(CacheLayerWrapper):
    """As a second wing would wrap: a tensor of its own, everything else delegated."""


@pytest.mark.parametrize("order", list(itertools.permutations(["memory", "other", "third"])))
def test_the_memory_layer_is_found_under_and_over_other_wrappers(order):
    rows = DocumentRows([0], 1)
    layer, memory = local_layer(), None
    for wing in order:
        if wing == "memory":
            layer = memory = MemoryCacheLayer(layer, 0, rows, None, shift=7)
        else:
            layer = AnotherWingsLayer(layer)
    cache = DynamicCache()
    cache.layers.append(layer)
    found, length = memory_layer(cache, 0)
    assert found is memory
    assert length == 7 + 4


def test_no_memory_layer_is_found_in_a_stock_cache_or_past_its_end():
    cache = DynamicCache()
    assert memory_layer(None, 0)[0] is None
    assert memory_layer(cache, 0)[0] is None
    cache.layers.append(AnotherWingsLayer(local_layer()))
    assert memory_layer(cache, 0)[0] is None


@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_placeholder_of_cross_attention_never_changes(operation):
    placeholder = PlaceholderLayer(torch.full((3, 2, 1, 5), torch.nan))
    before = placeholder.keys
    if operation not in ("offload", "prefetch"):
        OPERATIONS[operation](placeholder)
    assert placeholder.keys is before


def test_an_encoder_decoder_cache_crops_its_self_attention_only():
    rows = DocumentRows(range(3), 3)
    placeholder = PlaceholderLayer(torch.full((3, 2, 1, 5), torch.nan))
    cross, own = DynamicCache(), DynamicCache()
    cross.layers.append(MemoryCacheLayer(placeholder, 0, rows, None))
    cache = EncoderDecoderCache(own, cross)
    own.update(*torch.randn(2, 3, 2, 6, 5), 0)
    cache.crop(-2)
    assert own.get_seq_length() == 4
    assert cross.layers[0].keys.shape[2] == 1
    assert bool(cross.layers[0].keys.isnan().all())
