"""The numbers of graph layers are found by name, drawn and set."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from graft.configuration.configuration_gnn import LlamaGNNConfig
from graft.modeling.graph.graph_parameters import (
    GraphParameter,
    graph_parameters,
    plot_graph_parameters,
    set_parameters,
)
from graft.modeling.graph.modeling_llama_gnn import LlamaForCausalLMWithGNN

SIZES = {"vocab_size": 11, "hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 8}


def build(options):
    torch.manual_seed(0)
    return LlamaForCausalLMWithGNN(LlamaGNNConfig(**SIZES, gnn_config=options))


def test_parameters_of_gin_attention_come_by_layer_and_head():
    model = build({"edges": {"transform": "relu", "trains_threshold": True}, "sharpening": 1.5})
    with torch.no_grad():
        model.model.layers[1].self_attn.epsilon.copy_(torch.tensor([0.25, 0.5]).view(2, 1, 1))
    rows = graph_parameters(model)
    assert [row.layer for row in rows] == [0] * 4 + [1] * 4 + [2] * 4
    assert {(row.kind, row.head, round(row.value, 6)) for row in rows if row.layer == 1} == {
        ("attention epsilon", 0, 0.25),
        ("attention epsilon", 1, 0.5),
        ("attention sharpening", None, 1.5),
        ("attention threshold", None, 0.2),
    }


def test_parameters_of_networks_and_of_mlps_say_where_they_stand():
    network = build({"attention": "llama", "sparse": {"rank": 3, "num_layers": 2, "scale_first": 0.1}})
    assert [(row.layer, row.kind, row.head) for row in graph_parameters(network)][:3] == [
        (0, "graph scale", None),
        (0, "graph layer 0 epsilon", None),
        (0, "graph layer 1 epsilon", None),
    ]
    scales = [row.value for row in graph_parameters(network) if row.kind == "graph scale"]
    assert scales == pytest.approx([0.1, 0.3, 0.5])
    hops = build({"attention": "llama", "mlp": "multi_hop"})
    assert [row.kind for row in graph_parameters(hops) if row.layer == 2 and row.head == 0] == [
        "mlp epsilon",
        "mlp hop_weights 0",
        "mlp hop_weights 1",
        "mlp hop_weights 2",
    ]


def test_a_plain_model_has_none_and_nothing_is_drawn(tmp_path):
    rows = graph_parameters(LlamaForCausalLM(LlamaConfig(**SIZES)))
    assert rows == []
    with pytest.raises(ValueError, match="`rows` must hold at least one"):
        plot_graph_parameters(rows, tmp_path / "plot.png")


def test_heads_are_drawn_as_mean_and_range(tmp_path, monkeypatch):
    import graft.modeling.graph.graph_parameters as module

    seen = {}
    monkeypatch.setattr(module, "line_plot_png", lambda series, path, *rest: seen.update(series) or path)
    rows = [GraphParameter(layer, "epsilon", head, layer + 10.0 * head) for layer in (0, 1) for head in (0, 1)]
    plot_graph_parameters([*rows, GraphParameter(1, "scale", None, 0.5)], tmp_path / "plot.png")
    assert seen == {
        "epsilon, mean over heads": ([0, 1], [5.0, 6.0]),
        "epsilon, largest": ([0, 1], [10.0, 11.0]),
        "epsilon, smallest": ([0, 1], [0.0, 1.0]),
        "scale": ([1], [0.5]),
    }


def test_parameters_are_drawn(tmp_path):
    path = plot_graph_parameters(graph_parameters(build({})), tmp_path / "plot.png")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_parameters_are_set_by_name_in_place():
    model = build({"edges": {"transform": "relu", "trains_threshold": True}})
    held = model.model.layers[0].self_attn.edges.threshold
    assert len(set_parameters(model, "threshold", 0.35)) == 3
    assert held.item() == pytest.approx(0.35)
    assert held.requires_grad
    changed = [row.value for row in graph_parameters(model) if row.kind.endswith("threshold")]
    assert changed == pytest.approx([0.35] * 3)
    assert all(row.value == 0 for row in graph_parameters(model) if row.kind == "attention epsilon")
    with pytest.raises(ValueError, match=r"`name` must be one of .*epsilon, sharpening, threshold.*got 'thresholds'"):
        set_parameters(model, "thresholds", 0.1)
    with pytest.raises(ValueError, match="`value` must be finite, got nan"):
        set_parameters(model, "threshold", float("nan"))
