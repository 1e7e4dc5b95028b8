"""What a memory will cost is known exactly before anything is read, and a budget refuses it then."""

import pytest
import torch
from hypothesis import given
from hypothesis.strategies import integers, lists

import graft
from graft.configuration.configuration_unlimiformer import UnlimiformerConfig
from graft.modeling.unlimiformer.attach import unlimiform
from graft.modeling.unlimiformer.memory_size import estimate_memory

WINDOW = 16
OPTIONS = [
    {},
    {"overlap": 0.25, "memory_dtype": "bfloat16"},
    {"first_layer": 1, "last_layer": -1},
]
WITHOUT_GROUPS = ("gpt2", "gptj", "codegen", "gpt_neox", "opt", "biogpt")  # their configs have no such field
ENCODER_OPTIONS = [{"store": "keys_values"}, {"store": "keys_values", "heads": [1]}, {"first_step": "window"}]


def read_by(model, call):
    """What `call` returns, and the shapes of what the encoder or the decoder's body was given meanwhile."""
    shapes = []
    body = model.get_encoder() if model.config.is_encoder_decoder else getattr(model, model.base_model_prefix)
    hook = body.register_forward_pre_hook(
        lambda _, args, given: shapes.append(tuple(given["input_ids"].shape)), with_kwargs=True
    )
    result = call()
    hook.remove()
    return result, shapes


def check(tiny, family, options, lengths, dtype=torch.float32):
    sizes = {"num_key_value_heads": None} if family in WITHOUT_GROUPS else {}
    model, config = tiny.model(family, dtype=dtype, **sizes), UnlimiformerConfig(window=WINDOW, **options)
    rows = [tiny.ids(n, seed=n) for n in lengths]
    with unlimiform(model, config) as handle:
        memory, shapes = read_by(model, lambda: handle.remember(*tiny.pad(rows, "right")))
        found = handle.estimate(lengths)
    assert found.nbytes == sum(tensor.nbytes for tensor in memory.tensors().values()) == memory.nbytes
    assert found.windows == sum(count for count, _ in shapes)
    assert found.tokens_read == sum(count * length for count, length in shapes)
    assert estimate_memory(model.config, lengths, config, dtype) == found


@pytest.mark.parametrize("options", [*OPTIONS, *ENCODER_OPTIONS])
@pytest.mark.parametrize("family", ["bart", "t5gemma", "t5", "led"])
def test_the_estimate_of_an_encoder_decoder_is_exact(tiny, family, options):
    check(tiny, family, options, [45, 7, 30])


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_bigcode", "phi"])
def test_the_estimate_of_a_decoder_is_exact(tiny, family, options):
    check(tiny, family, options, [45, 7, 30])


def test_the_estimate_is_exact_for_every_family(tiny):
    for family in (*tiny.decoders, *tiny.encoder_decoders):
        if family not in ("gptj", "codegen"):  # refused by older transformers
            check(tiny, family, {}, [20])


def test_the_estimate_follows_the_dtype_of_the_model(tiny):
    check(tiny, "bart", {"heads": [0]}, [40], torch.float64)
    check(tiny, "llama", {}, [40], torch.float64)


@given(lengths=lists(integers(1, 60), min_size=1, max_size=3))
def test_the_estimate_is_exact_for_any_lengths(tiny, lengths):
    check(tiny, "bart", {"first_layer": 2}, lengths)


def test_one_document_may_be_given_as_a_number_and_defaults_serve(tiny):
    config = tiny.model("llama").config
    assert graft.estimate_memory(config, 300) == estimate_memory(config, [300], UnlimiformerConfig())


@pytest.mark.parametrize("tokens", [0, [], [4, -1]])
def test_documents_without_tokens_are_refused(tiny, tokens):
    with pytest.raises(ValueError, match="`tokens` must be the length of each document"):
        estimate_memory(tiny.model("llama").config, tokens)


@pytest.mark.parametrize(
    ("family", "options", "said"),
    [
        ("bart", {}, ["`memory_dtype`"]),
        ("bart", {"store": "keys_values", "memory_dtype": "float16"}, ["`store`", "`first_layer`"]),
        ("llama", {}, ["`memory_dtype`", "`first_layer`"]),
    ],
)
def test_a_memory_above_the_budget_is_refused_before_anything_is_read(tiny, family, options, said):
    model = tiny.model(family)
    size = estimate_memory(model.config, 100, UnlimiformerConfig(window=WINDOW, **options)).nbytes
    tokens = tiny.ids(1, 100)
    with unlimiform(model, UnlimiformerConfig(window=WINDOW, max_bytes=size, **options)) as handle:
        assert handle.remember(tokens).nbytes == size
        memory = handle.remember(tokens[:, :90])
        with pytest.raises(ValueError, match="`max_bytes`"):
            handle.append(memory, tokens[:, :11])

    def refused():
        with (
            unlimiform(model, UnlimiformerConfig(window=WINDOW, max_bytes=size - 1, **options)) as handle,
            pytest.raises(ValueError, match="`max_bytes`") as error,
        ):
            handle.remember(tokens)
        return str(error.value)

    message, shapes = read_by(model, refused)
    assert shapes == []
    assert f"{size:,}" in message
    assert f"{size - 1:,}" in message
    for name in ("`first_layer`", "`store`", "`memory_dtype`"):
        assert (name in message) == (name in said)
