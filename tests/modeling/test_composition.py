"""Memory, retro-fit, sparse-GIN and LoRA on one decoder: any order of attaching, all at once, any order of removal."""

import copy
import random
from itertools import permutations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_decoders import tiny_decoder

import graft.registration  # noqa: F401  (PEFT knows our adapters then)
from graft.configuration.configuration_unlimiformer import UnlimiformerConfig
from graft.modeling.graph.sparse_gin_config import SparseGINConfig
from graft.modeling.retro.retrofit import RetroFit, retrofit
from graft.modeling.retro.retrofit_config import RetroFitConfig
from graft.modeling.unlimiformer.attach import unlimiform

MEMORY = UnlimiformerConfig(window=16, keys_per_query=6)
RETROFIT = {"chunk_size": 4, "neighbour_length": 6, "cross_attention_layers": [0, 2]}
GRAPH = {"rank": 4, "scale_last": 0.8, "scale_first": 0.4, "adjacency": {"threshold": 0.0, "cutoff": None}}
LORA = {"r": 2, "target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}


ABILITIES = ("memory", "retrofit", "graph", "lora")
ORDERS = random.Random(0).sample(list(permutations(ABILITIES)), 6)


def build(family):
    return tiny_decoder(family, **({"sliding_window": None} if family == "mistral" else {}))


def shake(parameters):
    """Random weights, the same whatever was made before: some begin at 0 and would not act."""
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=rng, dtype=torch.float64))


def random_ids(*shape, seed=0):
    return torch.randint(3, 61, shape, generator=torch.Generator().manual_seed(seed))


def neighbours_of(chunks):
    return random_ids(61, 2, 6, seed=7)[chunks.sum(-1) % 61]


class Grafted:
    """A decoder and what was put on it, by name, in the order asked for."""

    def __init__(self, family, order):
        self.model = build(family)
        self.before = self.picture()
        self.handles = {}
        for name in order:
            self.handles[name] = getattr(self, f"attach_{name}")()

    def picture(self):
        with torch.no_grad():
            logits = self.model(random_ids(2, 9)).logits
        weights = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        return logits, weights, copy.deepcopy(self.model.config.to_dict()), hooks_of(self.model)

    def attach_memory(self):
        return unlimiform(self.model, MEMORY)

    def attach_retrofit(self):
        handle = retrofit(self.model, RetroFitConfig(**RETROFIT))
        shake(handle.trainable_parameters())
        return handle

    def attach_lora(self):
        peft_model = get_peft_model(self.model, LoraConfig(**LORA))
        shake(parameter for name, parameter in self.model.named_parameters() if "lora" in name)
        return peft_model.eval()

    def attach_graph(self):
        peft_model = get_peft_model(self.model, SparseGINConfig(**GRAPH, task_type="CAUSAL_LM"), adapter_name="graph")
        shake(peft_model.base_model.sparse_gin.parameters())
        return peft_model.eval()

    def remove(self, name):
        handle = self.handles.pop(name)
        if name in ("lora", "graph"):
            handle.unload()
        else:
            handle.remove()

    def inputs(self, document, question):
        """What `generate` is given so that memory and retrieval both act."""
        memory = self.handles["memory"].remember(document)
        return self.handles["retrofit"].inputs(**memory.inputs(question), retriever=neighbours_of)


def hooks_of(model):
    return {
        name: (len(module._forward_pre_hooks), len(module._forward_hooks))
        for name, module in model.named_modules()
        if module._forward_pre_hooks or module._forward_hooks
    }


@pytest.mark.parametrize("order", ORDERS, ids=" ".join)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_removed_in_any_order_the_base_is_what_it_was_bit_for_bit(family, order):
    for last in ORDERS:
        grafted = Grafted(family, order)
        for name in last:
            grafted.remove(name)
        logits, weights, config, hooks = grafted.picture()
        assert torch.equal(logits, grafted.before[0])
        assert weights.keys() == grafted.before[1].keys()
        assert all(torch.equal(weights[name], grafted.before[1][name]) for name in weights)
        assert config == grafted.before[2]
        assert hooks == grafted.before[3] == {}


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral"])
def test_the_order_of_attaching_changes_no_logit_and_each_one_acts(family):
    document, question = random_ids(2, 40, seed=1), random_ids(2, 9, seed=2)
    found = {True: [], False: []}  # of the two that write to the residual, the later one reads what the first wrote
    for order in ORDERS:
        grafted = Grafted(family, order)
        with torch.no_grad():
            logits = grafted.model(**grafted.inputs(document, question)).logits
        found[order.index("retrofit") < order.index("graph")].append(logits)
    for same in found.values():
        assert len(same) > 1
        for each in same[1:]:
            torch.testing.assert_close(each, same[0], rtol=1e-10, atol=1e-10)
    with torch.no_grad():
        grafted.handles["lora"].base_model.disable_adapter_layers()
        without_lora = grafted.model(**grafted.inputs(document, question)).logits
        grafted.handles["lora"].base_model.enable_adapter_layers()
        grafted.handles["graph"].base_model.disable_adapter_layers()
        without_graph = grafted.model(**grafted.inputs(document, question)).logits
        grafted.handles["graph"].base_model.enable_adapter_layers()
        memory = grafted.handles["memory"].remember(document)
        without_retrieval = grafted.model(**memory.inputs(question)).logits
        retrieving = grafted.handles["retrofit"].inputs(question, None, neighbours_of)
        without_memory = grafted.model(**retrieving).logits
    for logits in (without_lora, without_graph, without_retrieval, without_memory):
        assert not any(torch.allclose(logits, other) for same in found.values() for other in same)


@pytest.mark.parametrize("way", [{}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}])
def test_generation_with_all_of_them_gives_what_one_pass_over_its_tokens_prefers(way):
    grafted = Grafted("llama", ["retrofit", "graph", "memory", "lora"])
    document, question = random_ids(2, 40, seed=1), random_ids(2, 9, seed=2)
    torch.manual_seed(0)
    options = {"max_new_tokens": 10, "output_scores": True, "return_dict_in_generate": True, "do_sample": False, **way}
    # A row that ends with padding counts as finished, and its chunk is not looked up.
    out = grafted.model.generate(**grafted.inputs(document, question), **options, suppress_tokens=[1])
    rows = len(out.sequences) // 2
    memory = grafted.handles["memory"].remember(document).select([row for row in (0, 1) for _ in range(rows)])
    with torch.no_grad():
        given = memory.inputs(out.sequences)
        logits = grafted.model(**grafted.handles["retrofit"].inputs(**given, retriever=neighbours_of)).logits
    if "num_beams" in way:  # scores of beams are sums over other beams too: compare the winner's own
        likely = logits.log_softmax(-1)[:, 8:-1].gather(-1, out.sequences[:, 9:, None])[..., 0]
        torch.testing.assert_close(out.sequences_scores.double(), likely.mean(-1), rtol=1e-6, atol=1e-6)
        return
    for step, scores in enumerate(out.scores):
        kept = scores.isfinite()  # sampling keeps the likeliest 50
        torch.testing.assert_close(scores[kept].double(), logits[:, 8 + step][kept], rtol=1e-5, atol=1e-5)


def test_one_training_step_reaches_the_adapters_and_nothing_else():
    grafted = Grafted("llama", ["lora", "memory", "retrofit", "graph"])
    for name, parameter in grafted.model.named_parameters():
        parameter.requires_grad_("lora" in name)  # `retrofit` froze them: both are to be trained
    grafted.handles["graph"].base_model.sparse_gin.requires_grad_(True)
    ids = random_ids(2, 13, seed=3)
    retrieved = neighbours_of(ids[:, :12].unflatten(1, (3, 4)).flatten(0, 1)).unflatten(0, (2, 3))
    grafted.model.train()(ids, labels=ids, retrieved=retrieved).loss.backward()
    trained = dict(grafted.handles["retrofit"].adapter.named_parameters())
    trained |= dict(grafted.handles["graph"].base_model.sparse_gin.named_parameters())
    trained |= {name: parameter for name, parameter in grafted.model.named_parameters() if "lora" in name}
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in trained.values())
    frozen = [p for name, p in grafted.model.named_parameters() if "lora" not in name]
    assert all(parameter.grad is None for parameter in frozen)


def test_adapters_trained_between_evaluations_with_memory_leave_the_base_bit_for_bit():
    grafted = Grafted("llama", ["memory", "lora", "retrofit", "graph"])
    document, question = random_ids(2, 40, seed=1), random_ids(2, 9, seed=2)
    networks = (grafted.handles["retrofit"].adapter, grafted.handles["graph"].base_model.sparse_gin)
    lora = [parameter for name, parameter in grafted.model.named_parameters() if "lora" in name]
    trained = [*lora, *(parameter for network in networks for parameter in network.parameters())]
    for parameter in trained:
        parameter.requires_grad_(True)
    ids = random_ids(2, 13, seed=3)
    retrieved = neighbours_of(ids[:, :12].unflatten(1, (3, 4)).flatten(0, 1)).unflatten(0, (2, 3))
    optimizer = torch.optim.Adam(trained, lr=1e-2)
    losses, evaluated = [], []
    for _ in range(3):
        grafted.model.eval()
        with torch.no_grad():
            given = grafted.inputs(document, question)
            evaluated.append(grafted.model(**given).logits)
            losses.append(float(grafted.model(ids, labels=ids, retrieved=retrieved).loss))
        grafted.model.train()
        for _ in range(5):
            grafted.model(ids, labels=ids, retrieved=retrieved).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert losses[0] > losses[1] > losses[2]
    assert not torch.equal(evaluated[0], evaluated[1])
    assert not torch.equal(evaluated[1], evaluated[2])
    grafted.model.eval()
    for name in ("retrofit", "memory", "graph", "lora"):
        grafted.remove(name)
    logits, weights, _, hooks = grafted.picture()
    assert torch.equal(logits, grafted.before[0])
    assert all(torch.equal(weights[name], before) for name, before in grafted.before[1].items())
    assert hooks == {}


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_adapters_saved_alone_and_loaded_together_give_the_logits_of_those_attached_together(family, tmp_path):
    document, question = random_ids(2, 40, seed=1), random_ids(2, 9, seed=2)
    together = Grafted(family, ["lora", "graph", "retrofit", "memory"])
    for name, attach in (("lora", "default"), ("graph", "graph"), ("retrofit", None)):
        alone = Grafted(family, [name])
        alone.handles[name].save_pretrained(tmp_path / name)
        assert (tmp_path / name / (attach if attach == "graph" else "") / "adapter_model.safetensors").is_file()
    loaded = Grafted(family, [])
    PeftModel.from_pretrained(loaded.model, tmp_path / "lora")
    PeftModel.from_pretrained(loaded.model, tmp_path / "graph" / "graph", adapter_name="graph")
    loaded.handles["retrofit"] = RetroFit.from_pretrained(loaded.model, tmp_path / "retrofit")
    loaded.handles["memory"] = loaded.attach_memory()
    with torch.no_grad():
        expected = together.model(**together.inputs(document, question)).logits
        found = loaded.model.eval()(**loaded.inputs(document, question)).logits
        base = build(family)(question).logits
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(found, base, atol=1e-2)


@pytest.mark.parametrize("name", ["memory", "retrofit"])
def test_an_ability_that_is_there_is_refused_a_second_time_and_nothing_changes(name):
    grafted = Grafted("llama", ABILITIES)
    document, question = random_ids(2, 40, seed=1), random_ids(2, 9, seed=2)
    with torch.no_grad():
        before = grafted.model(**grafted.inputs(document, question)).logits
        with pytest.raises(RuntimeError, match="already"):
            getattr(grafted, f"attach_{name}")()
        assert torch.equal(grafted.model(**grafted.inputs(document, question)).logits, before)


def test_two_adapters_under_one_name_are_refused_by_that_name():
    grafted = Grafted("llama", ["lora"])
    with pytest.raises(ValueError, match="`adapter_name` 'default' is used by another adapter"):
        get_peft_model(grafted.model, SparseGINConfig(**GRAPH, task_type="CAUSAL_LM"))
