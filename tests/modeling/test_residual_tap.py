"""A tap reads h + a and adds to it as if the layer had been written that way, and leaves nothing behind."""

import itertools
import threading

import pytest
import torch
from tiny_decoders import SIZES, tiny_decoder
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from graft import UnlimiformerConfig, UnlimiformerLlamaConfig, UnlimiformerLlamaForCausalLM, unlimiform
from graft.modeling.attachment import Attachment
from graft.modeling.residual_tap import PLACES, tap_residual, tappable_layers
from graft.modeling.transformers_compat import CACHE_ARGUMENT

FAMILIES = sorted(set(PLACES) - {"graft_unlimiformer_llama"})
IDS = torch.randint(3, 61, (2, 12), generator=torch.Generator().manual_seed(0))


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(input_ids=ids).logits


def leftovers(model):
    """All that hooks and wrapped things leave on a model, by name."""
    return {
        name: (type(module), sorted(vars(module)), *(len(hooks) for hooks in hooks_of(module)))
        for name, module in model.named_modules()
    }


def hooks_of(module):
    return (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._forward_hooks_with_kwargs,
        module._forward_pre_hooks_with_kwargs,
    )


def naive_forward(family, layer, x, seen):
    """A layer's forward that adds x(h + a) between attention and feed-forward, written out by family."""

    def forward(hidden_states, *args, **kwargs):
        h = hidden_states
        if family == "gpt2":
            kwargs = {name: value for name, value in kwargs.items() if "encoder" not in name}
            kwargs |= {CACHE_ARGUMENT: args[0], "attention_mask": args[1]}
            a = layer.attn(layer.ln_1(h), **kwargs)[0]
            seen.append(h + a)
            h = h + a + x(h + a)
            return h + layer.mlp(layer.ln_2(h))
        if family in ("olmo2", "olmo3"):
            a = layer.post_attention_layernorm(layer.self_attn(hidden_states=h, **kwargs)[0])
            seen.append(h + a)
            h = h + a + x(h + a)
            return h + layer.post_feedforward_layernorm(layer.mlp(h))
        a = layer.self_attn(hidden_states=layer.input_layernorm(h), **kwargs)[0]
        if family in ("gemma2", "gemma3_text"):
            a = layer.post_attention_layernorm(a)
            seen.append(h + a)
            h = h + a + x(h + a)
            return h + layer.post_feedforward_layernorm(layer.mlp(layer.pre_feedforward_layernorm(h)))
        scale = 0.5 if family == "granite" else 1.0
        seen.append(h + scale * a)
        h = h + scale * a + x(h + scale * a)
        return h + scale * layer.mlp(layer.post_attention_layernorm(h))

    return forward


def curved(hidden):
    """Something no layer computes by itself; it depends on every number of the stream."""
    return hidden.roll(1, -1).tanh() * 0.5


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tap_sees_h_plus_a_and_adds_to_it_as_a_layer_written_that_way(family):
    model, attachment, seen, naive_seen = tiny_decoder(family), Attachment(), [], []

    def update(hidden, keywords):
        seen.append(hidden)
        return curved(hidden)

    for index in (0, 2):
        tap_residual(attachment, model, index, update)
    found = logits(model)
    attachment.remove()
    layers = tappable_layers(model)
    for index in (0, 2):
        layers[index].forward = naive_forward(family, layers[index], curved, naive_seen)
    expected = logits(model)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    for ours, naive in zip(seen, naive_seen, strict=True):
        torch.testing.assert_close(ours, naive, rtol=1e-11, atol=1e-11)
    assert not torch.allclose(found, logits(tiny_decoder(family)), atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adding_nothing_and_adding_zero_change_no_bit(family, dtype):
    model = tiny_decoder(family, dtype)
    before = logits(model)
    for update in (lambda hidden, keywords: None, lambda hidden, keywords: torch.zeros_like(hidden)):
        with Attachment() as attachment:
            for index in range(3):
                tap_residual(attachment, model, index, update)
            assert torch.equal(logits(model), before)


@pytest.mark.parametrize("family", FAMILIES)
def test_removal_leaves_no_hook_no_attribute_and_the_same_bits(family):
    model = tiny_decoder(family)
    before, found = logits(model), leftovers(model)
    attachment = Attachment()
    for index in (0, 1, 1, 2):
        tap_residual(attachment, model, index, lambda hidden, keywords: curved(hidden))
    assert not torch.equal(logits(model), before)
    attachment.remove()
    assert leftovers(model) == found
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_keyword_of_the_model_reaches_the_tap_with_the_cache(family):
    model, attachment, seen, mark = tiny_decoder(family), Attachment(), [], object()
    tap_residual(attachment, model, 1, lambda hidden, keywords: seen.append(keywords))
    with torch.no_grad():
        output = model(input_ids=IDS, graft_mark=mark, use_cache=True)
    assert seen[0]["graft_mark"] is mark
    name = "cache" if "cache" in output else "past_key_values"
    assert seen[0][name] is output[name]


@pytest.mark.parametrize("family", ["llama", "gemma2", "olmo2", "gpt2", "granite"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients(family, reentrant):
    model = tiny_decoder(family).train()
    weight = torch.nn.Parameter(torch.full((32,), 0.3, dtype=torch.float64))
    attachment, gradients = Attachment(), []
    for index in range(3):
        tap_residual(attachment, model, index, lambda hidden, keywords: curved(hidden * weight))
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model.zero_grad()
        weight.grad = None
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        gradients.append([weight.grad, *(parameter.grad.clone() for parameter in model.parameters())])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("family", ["llama", "gemma2", "olmo2", "gpt2"])
def test_threads_see_their_own_stream(family):
    model, attachment = tiny_decoder(family), Attachment()
    for index in range(3):
        tap_residual(attachment, model, index, lambda hidden, keywords: curved(hidden))
    inputs = [IDS.roll(shift, 1)[:, : 6 + shift] for shift in range(4)]
    expected = [logits(model, ids) for ids in inputs]
    found = [[] for _ in inputs]
    start = threading.Barrier(len(inputs))

    def work(number):
        start.wait()
        for _ in range(15):
            found[number].append(logits(model, inputs[number]))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for each, wanted in zip(found, expected, strict=True):
        assert len(each) == 15
        assert all(torch.equal(one, wanted) for one in each)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_two_taps_and_a_memory_leave_in_any_order(order):
    model = tiny_decoder("llama")
    before, found = logits(model), leftovers(model)

    def tap(factor):
        attachment = Attachment()
        tap_residual(attachment, model, 1, lambda hidden, keywords: factor * curved(hidden))
        return attachment

    makers = (
        lambda: tap(1.0),
        lambda: unlimiform(model, UnlimiformerConfig(keys_per_query=None, window=8)),
        lambda: tap(-0.5),
    )
    alone = {}
    for left in ((0,), (1,), (2,), (0, 1), (0, 2), (1, 2)):
        attachments = [makers[i]() for i in left]
        alone[left] = logits(model)
        for attachment in attachments:
            attachment.remove()
    attachments, left = [make() for make in makers], {0, 1, 2}
    for i in order:
        attachments[i].remove()
        left.discard(i)
        assert torch.equal(logits(model), alone[tuple(sorted(left))] if left else before)
    assert leftovers(model) == found


def test_our_own_llama_is_tapped_as_the_stock_one():
    stock = tiny_decoder("llama")
    ours = UnlimiformerLlamaForCausalLM(UnlimiformerLlamaConfig(**SIZES)).to(torch.float64).eval()
    ours.load_state_dict(stock.state_dict())
    found = []
    for model in (stock, ours):
        tap_residual(Attachment(), model, 1, lambda hidden, keywords: curved(hidden))
        found.append(logits(model))
    assert torch.equal(*found)


def test_a_later_tap_sees_what_an_earlier_one_added():
    model, attachment, seen = tiny_decoder("llama"), Attachment(), []

    def see(hidden, keywords):
        seen.append(hidden)

    tap_residual(attachment, model, 1, see)
    tap_residual(attachment, model, 1, lambda hidden, keywords: torch.ones_like(hidden))
    tap_residual(attachment, model, 1, see)
    logits(model)
    torch.testing.assert_close(seen[1], seen[0] + 1)


def test_an_error_in_a_layer_leaves_nothing_wrong_behind():
    model, attachment = tiny_decoder("llama"), Attachment()
    tap_residual(attachment, model, 1, lambda hidden, keywords: curved(hidden))
    expected = logits(model)

    def fail(module, args, kwargs):
        raise ArithmeticError("in attention")

    hook = model.model.layers[1].self_attn.register_forward_pre_hook(fail, with_kwargs=True)
    with pytest.raises(ArithmeticError, match="in attention"):
        logits(model)
    hook.remove()
    assert torch.equal(logits(model), expected)


def test_compiling_the_whole_graph_works():
    model, attachment = tiny_decoder("llama", torch.float32), Attachment()
    tap_residual(attachment, model, 1, lambda hidden, keywords: curved(hidden))
    expected = logits(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        found = compiled(input_ids=IDS, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "options", "reason"),
    [
        ("gptj", {"n_embd": 32, "n_layer": 1, "n_head": 4, "rotary_dim": 4}, "in parallel"),
        ("gpt_neox", {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}, "in parallel"),
        ("mamba", {"hidden_size": 32, "num_hidden_layers": 1}, "not placed and tested"),
    ],
)
def test_a_family_without_a_place_is_refused_with_those_that_have_one(family, options, reason):
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, vocab_size=61, **options))
    with pytest.raises(ValueError, match=rf"model_type '{family}'\), .*{reason}.*gemma2, .*olmo2"):
        tap_residual(Attachment(), model, 0, lambda hidden, keywords: None)


def test_an_encoder_decoder_and_a_plain_module_are_refused():
    config = AutoConfig.for_model("t5", vocab_size=61, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    with pytest.raises(ValueError, match=r"'t5'\), an encoder-decoder.*llama"):
        tappable_layers(AutoModelForSeq2SeqLM.from_config(config))
    with pytest.raises(TypeError, match="must be a transformers model, got Linear"):
        tappable_layers(torch.nn.Linear(2, 2))
