"""A Llama and its sparse-GIN adapter as one model that needs neither PEFT nor hooks: LlamaForCausalLMWithGNN."""

from dataclasses import replace
from typing import Any

from transformers import LlamaForCausalLM

from ...configuration.configuration_gnn import LlamaGNNConfig
from .modeling_llama_gnn import LlamaForCausalLMWithGNN
from .sparse_gin_config import SparseGINConfig
from .sparse_gin_layer import SparseGINAdapter


def llama_with_adapter(
    base: LlamaForCausalLM, adapter: SparseGINAdapter, config: SparseGINConfig
) -> LlamaForCausalLMWithGNN:
    """Weights of both, copied; the result computes what the base computes with the adapter.

    Args:
        base: a stock Llama.
        adapter: of that base.
        config: of the adapter.

    Raises:
        ValueError: the base is no Llama, or the adapter's edges are not made of attention: a graph layer of a Llama
            has no other.
    """
    if type(base) is not LlamaForCausalLM:
        raise ValueError(
            f"a graph network is written into LlamaForCausalLM only, and the base is {type(base).__name__}."
        )
    if config.edge_mode != "causal":
        raise ValueError(
            f"a graph layer of a Llama makes its edges as `edge_mode='causal'` does, got {config.edge_mode!r}."
        )
    layers = None if config.layers_to_transform is None else sorted(config.layers_to_transform)
    options = replace(config.graph_options(), layers=layers)
    model: Any = LlamaForCausalLMWithGNN(LlamaGNNConfig(**base.config.to_dict(), gnn_config=options))
    weights = base.state_dict()
    for index, update in adapter.layers.items():
        weights |= {f"model.layers.{index}.graph.{name}": weight for name, weight in update.state_dict().items()}
    model.load_state_dict(weights)
    model.generation_config = base.generation_config
    written: LlamaForCausalLMWithGNN = model.to(base.dtype).train(base.training)
    return written
