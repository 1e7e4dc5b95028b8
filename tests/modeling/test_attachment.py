"""Steps of several wings share one chain per attention module, and whoever leaves last gives the module back."""

import itertools
import threading

import pytest
import torch
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM

from graft.modeling.attachment import IMPLEMENTATION, Attachment, serve, serves

IDS = torch.tensor([[5, 6, 7, 8]])


@pytest.fixture
def model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=61, **sizes)).eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def noting(name, calls):
    def step(proceed, module, query, key, value, attention_mask, **kwargs):
        calls.append(name)
        return proceed(module, query, key, value, attention_mask, **kwargs)

    return step


def scaling(factor):
    def step(proceed, module, query, key, value, attention_mask, **kwargs):
        output, weights = proceed(module, query, key, value, attention_mask, **kwargs)
        return factor * output, weights

    return step


def test_a_step_that_proceeds_leaves_the_logits_bit_for_bit(model):
    before, calls = logits(model), []
    serve(model.model.layers[0].self_attn, noting("a", calls))
    assert torch.equal(logits(model), before)
    assert calls == ["a"]


def test_only_the_served_module_runs_the_chain_and_the_models_config_is_untouched(model):
    config = model.config.to_dict()
    first, second = (layer.self_attn for layer in model.model.layers)
    serve(first, noting("a", []))
    assert first.config._attn_implementation == IMPLEMENTATION
    assert second.config is model.config
    assert model.config.to_dict() == config
    assert model.config._attn_implementation != IMPLEMENTATION


def test_the_step_served_last_sees_the_attention_first(model):
    calls = []
    for name in "abc":
        serve(model.model.layers[0].self_attn, noting(name, calls))
    logits(model)
    assert calls == ["c", "b", "a"]


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_steps_leave_in_any_order_and_the_rest_goes_on_working(model, order):
    module, config, before = model.model.layers[0].self_attn, model.model.layers[0].self_attn.config, logits(model)
    attributes, expected = sorted(vars(module)), {}
    steps = [scaling(factor) for factor in (2.0, 3.0, 5.0)]
    for left in ({0, 1}, {0, 2}, {1, 2}, {0}, {1}, {2}):
        removals = [serve(module, steps[i]) for i in sorted(left)]
        expected[frozenset(left)] = logits(model)
        for remove in removals:
            remove()
    removals, left = [serve(module, step) for step in steps], {0, 1, 2}
    for i in order:
        removals[i]()
        left.discard(i)
        assert torch.equal(logits(model), expected[frozenset(left)] if left else before)
    assert module.config is config
    assert sorted(vars(module)) == attributes


def test_one_step_served_twice_is_taken_out_once_at_a_time(model):
    module, calls = model.model.layers[0].self_attn, []
    step = noting("a", calls)
    first, second = serve(module, step), serve(module, step)
    first()
    assert serves(module, step)
    logits(model)
    assert calls == ["a"]
    second()
    assert not serves(module, step)


def test_a_module_that_does_not_dispatch_is_refused_by_its_class():
    with pytest.raises(TypeError, match=r"Linear has no config.*ALL_ATTENTION_FUNCTIONS"):
        serve(torch.nn.Linear(2, 2), noting("a", []))


def test_the_implementation_chosen_while_served_comes_last(model):
    calls = []

    def own(module, query, key, value, attention_mask, **kwargs):
        calls.append("own")
        return torch.zeros_like(query).transpose(1, 2), None

    AttentionInterface.register("test_attachment_own", own)
    serve(model.model.layers[0].self_attn, noting("a", calls))
    model.set_attn_implementation("test_attachment_own")
    logits(model)
    assert calls == ["a", "own", "own"]


def test_eager_attention_gives_its_weights_through_the_chain(model):
    model.set_attn_implementation("eager")
    with torch.no_grad():
        expected = model(input_ids=IDS, output_attentions=True).attentions
        for layer in model.model.layers:
            serve(layer.self_attn, noting("a", []))
        found = model(input_ids=IDS, output_attentions=True).attentions
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_gradients_pass_through_the_chain_bit_for_bit(model):
    gradients = []
    for served in (False, True):
        if served:
            serve(model.model.layers[0].self_attn, noting("a", []))
        model.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_an_attachment_takes_its_steps_and_hooks_with_it(model):
    module, before, calls = model.model.layers[0].self_attn, logits(model), []
    attachment = Attachment()
    attachment.serve(module, scaling(0.0), hook=lambda m, args, kwargs: calls.append("hook"))
    assert not torch.equal(logits(model), before)
    assert calls == ["hook"]
    attachment.remove()
    assert torch.equal(logits(model), before)
    assert calls == ["hook"]
    assert not module._forward_pre_hooks
    assert not attachment.is_attached


def test_installing_that_fails_undoes_what_was_installed(model):
    first, second = (layer.self_attn for layer in model.model.layers)
    attachment = Attachment()
    with pytest.raises(TypeError, match="has no config"), attachment.installing():  # noqa: PT012
        attachment.serve(first, scaling(0.0), hook=lambda m, args, kwargs: None)
        attachment.serve(torch.nn.Linear(2, 2), scaling(0.0))
    assert first.config is second.config
    assert not first._forward_pre_hooks


def test_a_users_hooks_on_a_served_module_survive_removal(model):
    module, calls = model.model.layers[0].self_attn, []
    module.register_forward_pre_hook(lambda m, args: calls.append("mine"))
    attachment = Attachment()
    attachment.serve(module, noting("a", []), hook=lambda m, args, kwargs: None)
    module.register_forward_hook(lambda m, args, output: calls.append("mine too"))
    attachment.remove()
    logits(model)
    assert calls == ["mine", "mine too"]


def test_an_exception_in_a_step_reaches_the_caller_and_breaks_no_chain(model):
    before = logits(model)

    def failing(proceed, *args, **kwargs):
        raise ArithmeticError("in a step")

    remove = serve(model.model.layers[1].self_attn, failing)
    with pytest.raises(ArithmeticError, match="in a step"):
        logits(model)
    remove()
    assert torch.equal(logits(model), before)


def test_a_removed_attachment_refuses_to_be_entered():
    attachment = Attachment()
    attachment.remove()
    with pytest.raises(RuntimeError, match="removed"), attachment:
        pass


def test_threads_run_one_chain_at_once(model):
    before, found = logits(model), []
    serve(model.model.layers[0].self_attn, noting("a", []))
    threads = [threading.Thread(target=lambda: found.append(logits(model))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(each, before) for each in found)
    assert len(found) == 4
