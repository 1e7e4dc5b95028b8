import pytest
import torch
from torch import nn

from graft.trainer.trainable_parameters import count_trainable_parameters, train_all_but, train_only


def build():
    model = nn.ModuleDict({"embed": nn.Embedding(3, 2), "graph": nn.Linear(2, 2), "head": nn.Linear(2, 3, bias=False)})
    model["head"].weight = model["embed"].weight  # tied
    return model


def trained(model):
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def test_exactly_what_matches_trains():
    model = build()
    assert train_only(model, ["graph"]) == trained(model) == ["graph.weight", "graph.bias"]
    assert count_trainable_parameters(model) == (6, 12)
    assert train_only(model, [r"bias$", "embed"]) == trained(model) == ["embed.weight", "graph.bias"]


def test_exactly_what_matches_is_frozen():
    model = build()
    assert train_all_but(model, ["embed"]) == trained(model) == ["graph.weight", "graph.bias"]
    assert train_all_but(model, []) == trained(model) == ["embed.weight", "graph.weight", "graph.bias"]
    assert count_trainable_parameters(model) == (12, 12)


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["graph", "gnn"], "'gnn', which is in no parameter's name; names are made of bias, embed, graph, weight"),
        ([], r"at least one pattern, got \[\]"),
        ("graph", "a list of at least one pattern, got 'graph'"),
        (["("], "must hold regular expressions, got '\\('"),
    ],
)
def test_a_pattern_that_matches_nothing_is_refused_and_nothing_changes(patterns, message):
    model = build()
    train_only(model, ["bias"])
    with pytest.raises(ValueError, match=message):
        train_only(model, patterns)
    if patterns != []:
        with pytest.raises(ValueError, match=message):
            train_all_but(model, patterns)
    assert trained(model) == ["graph.bias"]
    assert torch.is_grad_enabled()
