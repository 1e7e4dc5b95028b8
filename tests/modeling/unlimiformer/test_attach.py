"""Attaching refuses what it cannot serve before anything is touched, and removal gives the model back bit for bit."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForSpeechSeq2Seq,
)

from graft.configuration.configuration_unlimiformer import UnlimiformerConfig
from graft.modeling import attachment
from graft.modeling.unlimiformer.attach import unlimiform

WINDOW, LENGTH = 16, 45
FAMILIES = ["bart", "mbart", "llama", "qwen3"]
SOME = {"window": WINDOW, "keys_per_query": 4}


def asked(model, tiny, memory):
    """Inputs that ask `memory` a question, of either kind of model."""
    question = tiny.ids(len(memory), 5, seed=9)
    if model.config.is_encoder_decoder:
        return {**memory.inputs(), "decoder_input_ids": question}
    return memory.inputs(question)


def stock_inputs(model, tiny):
    inputs = {"input_ids": tiny.ids(2, 12)}
    return {**inputs, "decoder_input_ids": tiny.ids(2, 5)} if model.config.is_encoder_decoder else inputs


def everything(model, tiny):
    """All that removal must bring back, by name: values, and identities where objects must be the same."""
    with torch.no_grad():
        logits = model(**stock_inputs(model, tiny)).logits
    modules = dict(model.named_modules())
    return {
        "state": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "parameters": {name: id(parameter) for name, parameter in model.named_parameters()},
        "config": copy.deepcopy(model.config.to_dict()),
        "implementation": model.config._attn_implementation,
        "generation config": model.generation_config.to_dict(),
        "classes": {name: type(module) for name, module in modules.items()},
        "modules": {name: id(module) for name, module in modules.items()},
        "configs": {name: id(module.config) for name, module in modules.items() if hasattr(module, "config")},
        "attributes": {name: sorted(vars(module)) for name, module in modules.items()},
        "hooks": {
            name: [list(getattr(module, kind)) for kind in vars(module) if kind.endswith("_hooks")]
            for name, module in modules.items()
        },
        "training": {name: module.training for name, module in modules.items()},
        "logits": logits,
    }


def assert_restored(model, tiny, before):
    after = everything(model, tiny)
    for name in before.keys() - {"state", "logits"}:
        assert after[name] == before[name], name
    assert before["state"].keys() == after["state"].keys()
    assert all(torch.equal(tensor, after["state"][name]) for name, tensor in before["state"].items())
    assert torch.equal(before["logits"], after["logits"])


@pytest.mark.parametrize("family", FAMILIES)
def test_remove_gives_the_model_back_bit_for_bit(tiny, family):
    model = tiny.model(family)
    before = everything(model, tiny)
    handle = unlimiform(model, UnlimiformerConfig(**SOME))
    model.generate(**asked(model, tiny, handle.remember(tiny.ids(2, LENGTH))), max_new_tokens=3)
    handle.remove()
    assert_restored(model, tiny, before)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_end_of_a_with_gives_the_model_back_bit_for_bit(tiny, family):
    model = tiny.model(family)
    before = everything(model, tiny)
    with unlimiform(model, UnlimiformerConfig(**SOME)) as handle:
        handle.remember(tiny.ids(2, LENGTH))
    assert_restored(model, tiny, before)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_exception_inside_a_with_gives_the_model_back_and_goes_on(tiny, family):
    model = tiny.model(family)
    before = everything(model, tiny)
    with pytest.raises(KeyError, match="mine"), unlimiform(model, UnlimiformerConfig(**SOME)):
        raise KeyError("mine")
    assert_restored(model, tiny, before)


@pytest.mark.parametrize("family", FAMILIES)
def test_installing_that_fails_half_way_gives_the_model_back(tiny, family, monkeypatch):
    model = tiny.model(family)
    before = everything(model, tiny)
    real, served = attachment.serve, []

    def failing(module, step, watches=False):
        if len(served) == 1:
            raise OSError("the second module refuses")
        served.append(module)
        return real(module, step, watches)

    monkeypatch.setattr(attachment, "serve", failing)
    with pytest.raises(OSError, match="the second module refuses"):
        unlimiform(model, UnlimiformerConfig(**SOME))
    assert len(served) == 1
    assert_restored(model, tiny, before)


@pytest.mark.parametrize("family", FAMILIES)
def test_attaching_again_after_removal_reads_as_the_first_time(tiny, family):
    model = tiny.model(family)
    before, logits = everything(model, tiny), []
    for _ in range(2):
        with torch.no_grad(), unlimiform(model, UnlimiformerConfig(**SOME)) as handle:
            logits.append(model(**asked(model, tiny, handle.remember(tiny.ids(2, LENGTH)))).logits)
    assert torch.equal(*logits)
    assert_restored(model, tiny, before)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("training", [True, False])
def test_a_forward_without_memory_is_the_stock_models_bit_for_bit_while_attached(tiny, family, training):
    model = tiny.model(family).train(training)
    inputs = stock_inputs(model, tiny)
    stock = model(**inputs, labels=inputs.get("decoder_input_ids", inputs["input_ids"]))
    stock.loss.backward()
    gradients = {
        name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
    }
    model.zero_grad()
    with unlimiform(model, UnlimiformerConfig(**SOME)):
        found = model(**inputs, labels=inputs.get("decoder_input_ids", inputs["input_ids"]))
        found.loss.backward()
    assert torch.equal(found.logits, stock.logits)
    assert all(torch.equal(dict(model.named_parameters())[name].grad, grad) for name, grad in gradients.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_train_and_eval_change_nothing_that_is_installed(tiny, family):
    model = tiny.model(family)
    with torch.no_grad(), unlimiform(model, UnlimiformerConfig(**SOME)) as handle:
        memory = handle.remember(tiny.ids(2, LENGTH))
        logits = [model.train(mode)(**asked(model, tiny, memory)).logits for mode in (False, True, False)]
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])


def test_a_second_handle_is_refused_and_leaves_the_first_at_work(tiny):
    model = tiny.model("bart")
    with torch.no_grad(), unlimiform(model, UnlimiformerConfig(**SOME)) as handle:
        memory = handle.remember(tiny.ids(2, LENGTH))
        expected = model(**asked(model, tiny, memory)).logits
        with pytest.raises(RuntimeError, match=r"`model` has a memory already.*remove"):
            unlimiform(model, UnlimiformerConfig(**SOME))
        assert torch.equal(model(**asked(model, tiny, memory)).logits, expected)


def test_a_removed_handle_refuses_use_and_says_so(tiny):
    model = tiny.model("llama")
    handle = unlimiform(model, UnlimiformerConfig(**SOME))
    handle.remove()
    for use in (handle.remember, handle.generate, handle.split, lambda ids: handle.record()):
        with pytest.raises(RuntimeError, match="removed"):
            use(tiny.ids(1, LENGTH))
    with pytest.raises(RuntimeError, match="removed"), handle:
        pass
    assert "removed" in repr(handle)


@pytest.mark.parametrize("family", ["bart", "t5", "t5gemma", "led", "fsmt", "llama", "gpt2"])
def test_a_memory_given_to_a_model_without_handle_is_refused_and_does_not_answer_from_thin_air(tiny, family):
    model = tiny.model(family)
    with torch.no_grad(), unlimiform(model, UnlimiformerConfig(**SOME)) as handle:
        memory = handle.remember(tiny.ids(2, LENGTH))
        begun = asked(model, tiny, memory)
        model(**begun)
    for inputs in (asked(model, tiny, memory), begun):  # afresh, and in the middle of a generation
        with pytest.raises(RuntimeError, match=r"this cache holds a memory and the model cannot read it.*unlimiform"):
            model(**inputs)


def test_removing_twice_does_nothing(tiny):
    model = tiny.model("bart")
    before = everything(model, tiny)
    handle = unlimiform(model, UnlimiformerConfig(**SOME))
    handle.remove()
    other = unlimiform(model, UnlimiformerConfig(**SOME))
    handle.remove()
    with torch.no_grad():
        assert model(**asked(model, tiny, other.remember(tiny.ids(2, LENGTH)))).logits.isfinite().all()
    other.remove()
    assert_restored(model, tiny, before)


@pytest.mark.parametrize("family", ["bart", "llama"])
def test_a_model_that_shares_modules_with_an_attached_one_is_refused_and_then_served(tiny, family):
    model = tiny.model(family)
    twin = copy.copy(model)
    twin._modules = dict(model._modules)
    before = everything(model, tiny)
    with unlimiform(model, UnlimiformerConfig(**SOME)), pytest.raises(RuntimeError, match="has a memory already"):
        unlimiform(twin, UnlimiformerConfig(**SOME))
    with torch.no_grad(), unlimiform(twin, UnlimiformerConfig(**SOME)) as handle:
        assert twin(**asked(twin, tiny, handle.remember(tiny.ids(2, LENGTH)))).logits.isfinite().all()
    assert_restored(model, tiny, before)


@pytest.mark.parametrize("order", ["ours first", "theirs first"])
@pytest.mark.parametrize("later", ["ours", "theirs"])
@pytest.mark.parametrize("family", ["bart", "llama"])
def test_steps_of_two_wings_work_together_and_leave_in_any_order(tiny, family, order, later):
    model = tiny.model(family)
    before = everything(model, tiny)
    with torch.no_grad(), unlimiform(model, UnlimiformerConfig(**SOME)) as handle:
        expected = model(**asked(model, tiny, handle.remember(tiny.ids(2, LENGTH)))).logits

    def doubled(proceed, module, query, key, value, attention_mask, **kwargs):
        output, weights = proceed(module, query, key, value, attention_mask, **kwargs)
        calls.append(module)
        return output, weights

    calls, removals = [], {}

    def attach(which):
        if which == "theirs":
            layer = model.get_decoder().layers[1]
            module = layer.encoder_attn if family == "bart" else layer.self_attn
            removals["theirs"] = attachment.serve(module, doubled)
        else:
            removals["ours"] = unlimiform(model, UnlimiformerConfig(**SOME))

    for which in ("ours", "theirs") if order == "ours first" else ("theirs", "ours"):
        attach(which)
    with torch.no_grad():
        found = model(**asked(model, tiny, removals["ours"].remember(tiny.ids(2, LENGTH)))).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    remove = {"ours": lambda: removals["ours"].remove(), "theirs": lambda: removals["theirs"]()}
    remove["theirs" if later == "ours" else "ours"]()
    remove[later]()
    assert_restored(model, tiny, before)


@pytest.mark.parametrize("family", FAMILIES)
def test_set_attn_implementation_acts_while_attached_and_stays_after(tiny, family):
    model, eager = tiny.model(family), tiny.model(family)
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        expected = eager(**stock_inputs(model, tiny), output_attentions=True)
        with unlimiform(model, UnlimiformerConfig(**SOME)) as handle:
            model.set_attn_implementation("eager")
            found = model(**stock_inputs(model, tiny), output_attentions=True)
            assert model(**asked(model, tiny, handle.remember(tiny.ids(2, LENGTH)))).logits.isfinite().all()
        after = model(**stock_inputs(model, tiny), output_attentions=True)
    name = "cross_attentions" if eager.config.is_encoder_decoder else "attentions"
    for output in (found, after):
        assert torch.equal(output.logits, expected.logits)
        for weights, wanted in zip(output[name], expected[name], strict=True):
            assert torch.equal(weights, wanted)
    assert all(module.config is model.config for module in model.modules() if hasattr(module, "config"))


def test_a_model_saved_while_attached_is_the_model_saved_before(tiny, tmp_path):
    for family in ("bart", "llama"):
        model = tiny.model(family)
        model.save_pretrained(tmp_path / f"{family}-before")
        with unlimiform(model, UnlimiformerConfig(**SOME)):
            model.save_pretrained(tmp_path / f"{family}-while")
        for path in (tmp_path / f"{family}-before").iterdir():
            assert path.read_bytes() == (tmp_path / f"{family}-while" / path.name).read_bytes(), path.name


@pytest.mark.parametrize("family", ["bart", "llama"])
def test_a_deep_copy_of_an_attached_model_reads_by_itself(tiny, family):
    model = tiny.model(family)
    with torch.no_grad(), unlimiform(model, UnlimiformerConfig(**SOME)) as handle:
        memory = handle.remember(tiny.ids(2, LENGTH))
        twin = copy.deepcopy(model)
        expected = model(**asked(model, tiny, memory)).logits
        handle.remove()
        assert torch.equal(twin(**asked(twin, tiny, memory)).logits, expected)


# Refusals


def refused(model, tiny, message, error=ValueError, **options):
    """Attaching with `options` is refused with `message`, and the model is untouched."""
    before = everything(model, tiny)
    with pytest.raises(error, match=message):
        unlimiform(model, UnlimiformerConfig(**options))
    assert_restored(model, tiny, before)


def test_a_window_longer_than_the_models_positions_is_refused_with_both_numbers(tiny):
    refused(tiny.model("bart"), tiny, r"`window` must be at most the model's 64 positions, got 65", window=65)
    refused(tiny.model("llama"), tiny, r"`window` must be at most the model's 128 positions, got 129", window=129)


def test_a_longer_window_is_served_where_rotary_positions_are_scaled(tiny):
    rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    with unlimiform(tiny.model("llama", rope_parameters=rope), UnlimiformerConfig(window=200)) as handle:
        assert len(handle.remember(tiny.ids(1, 210))) == 1


@pytest.mark.parametrize(
    ("first", "last"), [(2, 2), (2, 1), (3, None), (0, 4), (-4, None), (0, -3), (1, -2), (0, 40), (40, None)]
)
@pytest.mark.parametrize("family", ["bart", "llama"])
def test_layers_that_are_none_or_outside_the_model_are_refused_with_the_range(tiny, family, first, last):
    message = rf"`first_layer` {first} and `last_layer` {last} must pick some of the 3 decoder layers: -3 <= first"
    refused(tiny.model(family), tiny, message, first_layer=first, last_layer=last)


@pytest.mark.parametrize("family", ["bart", "llama"])
def test_heads_the_model_lacks_are_refused_with_the_range(tiny, family):
    refused(tiny.model(family), tiny, r"`heads` must lie in \[0, 4\) for this model, got \[1, 99\]", heads=[1, 99])


def test_a_decoder_refuses_what_needs_an_encoder(tiny):
    refused(tiny.model("llama"), tiny, r'`store` "hidden" needs an encoder', store="hidden")
    refused(tiny.model("llama"), tiny, r'`first_step` "window" needs an encoder', first_step="window")


def test_a_model_of_sliding_layers_only_is_refused_with_their_types(tiny):
    mistral = tiny.model("mistral", sliding_window=16)
    refused(mistral, tiny, r"of type \['sliding_attention', 'sliding_attention'.*sliding_window=None")


def test_rotary_embeddings_that_change_with_the_length_are_refused_by_name(tiny):
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = tiny.model("llama", rope_parameters=rope)
    with pytest.raises(ValueError, match=r"rope_type 'dynamic'"):
        unlimiform(model, UnlimiformerConfig())


SMALL = {"vocab_size": 61, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
UNSUPPORTED = {
    "bloom": (AutoModelForCausalLM, {"n_layer": 2, "n_head": 2}),
    "whisper": (AutoModelForSpeechSeq2Seq, {"d_model": 24, "encoder_layers": 1, "decoder_layers": 1}),
}


@pytest.mark.parametrize("family", UNSUPPORTED)
def test_unsupported_families_are_refused_with_the_class_and_those_supported(family):
    auto, options = UNSUPPORTED[family]
    model = auto.from_config(AutoConfig.for_model(family, **SMALL, **options))
    before = dict(model.named_modules())
    with pytest.raises(TypeError, match=rf"{type(model).__name__}.*'{family}'.*bart, .*m2m_100.*llama, .*qwen3"):
        unlimiform(model, UnlimiformerConfig())
    assert not any(hasattr(module, "graft_attention_chain") for module in before.values())


def test_a_model_without_language_modelling_head_is_refused(tiny):
    config = tiny.model("bart").config
    model = AutoModelForSequenceClassification.from_config(config)
    with pytest.raises(TypeError, match="BartForSequenceClassification.*language-modelling head"):
        unlimiform(model, UnlimiformerConfig())


def test_what_is_no_transformers_model_is_refused_by_its_class():
    with pytest.raises(TypeError, match="`model` must be a transformers model, got Linear"):
        unlimiform(torch.nn.Linear(2, 2), UnlimiformerConfig())


def test_a_peft_model_is_refused_with_the_way_to_its_base(tiny):
    peft_model = get_peft_model(tiny.model("llama"), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(TypeError, match=r"get_base_model\(\)"):
        unlimiform(peft_model, UnlimiformerConfig())


# Documents


@pytest.fixture(params=["bart", "llama"])
def handle(request, tiny):
    with unlimiform(tiny.model(request.param), UnlimiformerConfig(**SOME)) as handle:
        yield handle


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (5,), (1, 2, 3)])
def test_input_ids_that_are_no_batch_of_tokens_are_refused_with_their_shape(handle, shape):
    numbers = r"\(" + r", ".join(map(str, shape))
    with pytest.raises(ValueError, match=rf"`input_ids` must be \(documents, tokens\).*got {numbers}"):
        handle.remember(torch.zeros(shape, dtype=torch.long))


def test_a_mask_without_a_token_is_refused_with_the_document(handle, tiny):
    mask = torch.tensor([[1, 1, 1], [0, 0, 0], [1, 1, 0]])
    with pytest.raises(ValueError, match="`attention_mask` leaves document 1 no token"):
        handle.remember(tiny.ids(3, 3), mask)


def test_a_mask_with_a_hole_is_refused_with_its_place(handle, tiny):
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 1]])
    with pytest.raises(ValueError, match="`attention_mask` has a hole in document 1 near position 1"):
        handle.remember(tiny.ids(2, 4), mask)


def test_a_mask_of_another_shape_is_refused_with_both(handle, tiny):
    with pytest.raises(
        ValueError, match=r"`attention_mask` must have the shape of `input_ids`, \(2, 4\), got \(2, 3\)"
    ):
        handle.remember(tiny.ids(2, 4), torch.ones(2, 3))


@pytest.mark.parametrize("wrong", [61, 10_000, -1, -100])
def test_ids_outside_the_vocabulary_are_refused_with_the_first_place(handle, tiny, wrong):
    ids = tiny.ids(2, LENGTH)
    ids[1, 7] = ids[1, 30] = wrong
    with pytest.raises(ValueError, match=rf"`input_ids` holds {wrong} at position 7 of document 1.*vocabulary of 61"):
        handle.remember(ids)


def test_ids_under_padding_may_be_anything(handle, tiny):
    ids, mask = tiny.pad([tiny.ids(LENGTH), tiny.ids(9)], "right", filler=-100)
    assert handle.remember(ids, mask).lengths.tolist() == [LENGTH, 9]


def test_states_that_are_not_finite_are_refused_with_their_window(handle, tiny):
    embedding = handle.model.get_input_embeddings().weight
    with torch.no_grad():
        embedding[60] = torch.inf
    ids = tiny.ids(2, LENGTH)
    ids[ids == 60] = 5
    ids[1, 44] = 60
    with pytest.raises(ValueError, match=r"tokens \[29, 45\) of document 1 are not finite in torch.float32.*bfloat16"):
        handle.remember(ids)


def test_true_positions_past_the_trained_length_are_refused_with_both_numbers(tiny):
    with unlimiform(tiny.model("llama"), UnlimiformerConfig(window=WINDOW, positions="true")) as handle:
        handle.remember(tiny.ids(1, 128))
        with pytest.raises(ValueError, match=r'`positions` "true" places 129 tokens.*trained on 128.*"squeeze"'):
            handle.remember(tiny.ids(1, 129))


def test_default_window_is_all_of_an_encoders_positions_and_half_of_a_decoders(tiny):
    for family, window in (("bart", 64), ("llama", 64)):
        with unlimiform(tiny.model(family)) as handle:
            assert handle.window == window


@pytest.mark.parametrize(("keys_per_query", "said"), [(None, "exact"), (7, "keys 7 of n"), ("window", "keys 16 of n")])
def test_repr_of_a_handle_says_which_keys_and_layers_are_read(tiny, keys_per_query, said):
    with unlimiform(tiny.model("llama"), UnlimiformerConfig(window=WINDOW, keys_per_query=keys_per_query)) as handle:
        assert repr(handle) == f"Unlimited(LlamaForCausalLM, {said}, layers 0 to 2, window 16)"


@pytest.mark.parametrize(("first", "last"), [(1, None), (0, 2), (-1, None)])
def test_repr_of_a_handle_names_the_layers_that_read(tiny, first, last):
    with unlimiform(tiny.model("llama"), UnlimiformerConfig(first_layer=first, last_layer=last)) as handle:
        assert f"layers {first % 3} to {(last or 3) - 1}," in repr(handle)


@pytest.mark.parametrize("options", [{"heads": [0]}, {"exclude_window": True}])
def test_repr_of_a_handle_claims_no_exactness_where_some_keys_are_hidden_from_some_queries(tiny, options):
    with unlimiform(tiny.model("llama"), UnlimiformerConfig(window=WINDOW, keys_per_query=None, **options)) as handle:
        assert "exact" not in repr(handle)


# PEFT


def with_adapter(tiny, family, targets):
    """A PEFT model whose adapter changes its answers."""
    peft_model = get_peft_model(tiny.model(family), LoraConfig(r=4, target_modules=targets))
    torch.manual_seed(1)
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return peft_model.eval()


@pytest.mark.parametrize("targets", [["q_proj"], ["k_proj", "v_proj"], ["q_proj", "k_proj", "v_proj", "out_proj"]])
def test_logits_behind_a_memory_respect_an_adapter_as_merged_weights(tiny, targets):
    peft_model = with_adapter(tiny, "bart", targets)
    merged = copy.deepcopy(peft_model).merge_and_unload()
    config, logits = UnlimiformerConfig(**SOME), []
    for model, base in ((merged, merged), (peft_model, peft_model.get_base_model())):
        with torch.no_grad(), unlimiform(base, config) as handle:
            memory = handle.remember(tiny.ids(2, LENGTH))
            logits.append(model(**memory.inputs(), decoder_input_ids=tiny.ids(2, 5, seed=9)).logits)
    assert (memory.hidden is None) == ("k_proj" in targets)
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=1e-4)


def test_a_decoders_logits_behind_a_memory_respect_an_adapter_as_merged_weights(tiny):
    peft_model = with_adapter(tiny, "llama", ["q_proj", "k_proj", "v_proj", "gate_proj"])
    merged = copy.deepcopy(peft_model).merge_and_unload()
    logits, tokens = [], []
    for model, base in ((merged, merged), (peft_model, peft_model.get_base_model())):
        with torch.no_grad(), unlimiform(base, UnlimiformerConfig(**SOME)) as handle:
            memory = handle.remember(tiny.ids(2, LENGTH))
            logits.append(model(**memory.inputs(tiny.ids(2, 5, seed=9))).logits)
            tokens.append(model.generate(**memory.inputs(tiny.ids(2, 5, seed=9)), max_new_tokens=5))
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=1e-4)
    assert torch.equal(*tokens)


def test_hidden_states_are_refused_where_an_adapter_changes_keys_or_values(tiny):
    base = with_adapter(tiny, "bart", ["v_proj"]).get_base_model()
    with pytest.raises(ValueError, match=r'`store` "hidden" folds plain linear projections.*"keys_values" serves'):
        unlimiform(base, UnlimiformerConfig(store="hidden"))


def test_an_adapter_saved_while_attached_is_the_one_saved_before(tiny):
    peft_model = with_adapter(tiny, "llama", ["q_proj", "v_proj"])
    before = get_peft_model_state_dict(peft_model)
    with unlimiform(peft_model.get_base_model(), UnlimiformerConfig(**SOME)):
        while_attached = get_peft_model_state_dict(peft_model)
    assert before.keys() == while_attached.keys()
    assert all(torch.equal(tensor, while_attached[name]) for name, tensor in before.items())


def test_an_adapter_added_while_attached_trains_and_the_model_is_given_back(tiny):
    model = tiny.model("llama")
    before = everything(model, tiny)
    with unlimiform(model, UnlimiformerConfig(**SOME)) as handle:
        peft_model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
        peft_model(input_ids=tiny.ids(1, 8), labels=tiny.ids(1, 8)).loss.backward()
        with torch.no_grad():
            assert peft_model(**asked(model, tiny, handle.remember(tiny.ids(2, LENGTH)))).logits.isfinite().all()
    for parameter in peft_model.unload().parameters():
        parameter.requires_grad_(True)
    after = everything(model, tiny)
    assert all(torch.equal(tensor, after["state"][name]) for name, tensor in before["state"].items())
    assert torch.equal(after["logits"], before["logits"])
    assert after["configs"] == before["configs"]
