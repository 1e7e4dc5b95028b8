"""One language model in a process of its own, measured: graph_models.py and graph_decoding.py ask it.

Runs under any transformers from 4.46 on, since the original's environment starts it too; so it imports graft and the
original only where their system is asked for. One set of the original's options makes both: ours by graft.compat.xgpt.
"""

import argparse
import json
import sys

import torch
from safetensors.torch import load_file, save_file
from served_calls import answers, passes, serve, without_scatter
from transformers import LlamaConfig, LlamaForCausalLM

GIN = {
    "use_GNN_from_attention": "LlamaAttentionGIN",
    "attention_GIN_MLP_multiplier": 0.5,
    "attention_GIN_MLP_GIN_use_ReLU_instead_of_softmax": False,
    "use_sharpening": True,
}
SPARSE = {
    "num_layers": 1,
    "activation": "prelu",
    "dropout": 0.0,
    "lambda_GNN_initial": 0.0,
    "lambda_GNN": 0.5,
    "hidden_dim": 155,
    "gnn_type": "causal_gin",
    "gnn_mode": "single",
    "GIN_hidden_dim_multiplier": 1,
    "adj_construction_method": "sum",
    "threshold": 0.1,
    "epsilon_threshold": 0.6,
    "gnn_residual": False,
}
VARIANTS = {
    "gin": GIN,
    "gin relu": GIN | {"attention_GIN_MLP_GIN_threshold_mode": "relu"},
    "pna": {"use_GNN_from_attention": "LlamaAttentionPNA", "attention_GIN_MLP_multiplier": 1},
    "pna_vector": {"use_GNN_from_attention": "LlamaAttentionPNA_LM", "attention_GIN_MLP_multiplier": 1},
    "cg": {"use_GNN_from_attention": "CG_Attention"},
    "sparse": SPARSE,
    "sparse one pass": SPARSE,
    "sparse per head": SPARSE | {"gnn_mode": "per_head", "hidden_dim": 16},
}
# The original trains the network alone, beside a frozen base.
IS_ADAPTER = ("sparse", "sparse one pass", "sparse per head")


def sizes(arguments: argparse.Namespace) -> dict[str, object]:
    """Of the README's models: GIN from scratch, and a small one beside which a sparse network trains."""
    if arguments.sizes is not None:
        return json.loads(arguments.sizes)
    adapter = arguments.variant in IS_ADAPTER
    width, layers, inner, heads = (512, 8, 1408, 8) if adapter else (560, 6, 512, 8)
    return {
        "vocab_size": 1000,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": arguments.layers or layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 4 if adapter else heads,
        "head_dim": width // heads,
        "max_position_embeddings": arguments.tokens + 1,
        "initializer_range": 0.1,  # sharper attention than at the start of training: rows have edges to keep
    }


def make_ours(arguments: argparse.Namespace):
    from graft import LlamaForCausalLMWithGNN, LlamaGNNConfig
    from graft.compat.xgpt import GNNConfig

    options = VARIANTS[arguments.variant] | {"max_position_embeddings": arguments.tokens}
    graph = GNNConfig(**options)
    graph.shares_scores = arguments.variant == "sparse one pass"
    return LlamaForCausalLMWithGNN(LlamaGNNConfig(**sizes(arguments), gnn_config=graph))


def make_stock(arguments: argparse.Namespace):
    config = LlamaConfig(**sizes(arguments))
    config._attn_implementation = arguments.system
    return LlamaForCausalLM(config)


def make_original(arguments: argparse.Namespace):
    """The original, from a checkout."""
    without_scatter()
    sys.path.insert(0, arguments.original)
    from xgpt import GNNConfig, LlamaForCausalLMWithGNN

    config = LlamaConfig(**sizes(arguments), attn_implementation="eager")
    config.gnn_config = GNNConfig(**VARIANTS[arguments.variant] | {"max_position_embeddings": arguments.tokens})
    return LlamaForCausalLMWithGNN(config)


MAKERS = {"ours": make_ours, "eager": make_stock, "sdpa": make_stock, "original": make_original}


def take_weights(model, arguments: argparse.Namespace) -> None:
    """The first system of a case writes its weights to --weights, ours reads them under its own names."""
    if arguments.weights is None:
        return
    if arguments.system == "original":
        save_file({name: weight.clone() for name, weight in model.state_dict().items()}, arguments.weights)
    elif arguments.system == "ours":
        from graft.compat.xgpt import convert_state_dict

        model.load_state_dict(convert_state_dict(load_file(arguments.weights), model))


def freeze_base(model, arguments: argparse.Namespace) -> None:
    """Only what the graph adds trains; the backward pass of a stock model reaches its embeddings' output."""
    if arguments.variant not in IS_ADAPTER:
        return
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("graph" in name or "gnn" in name or "trainable_scale" in name)
    if arguments.system in ("eager", "sdpa"):
        model.enable_input_require_grads()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--system", choices=sorted(MAKERS), required=True)
    parser.add_argument("--variant", choices=list(VARIANTS), required=True)
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--layers", type=int, default=0, help="0: as many as the README's model has")
    parser.add_argument("--sizes", help="those of LlamaConfig as JSON, in the place of the README's")
    parser.add_argument("--weights", help="file that the original writes and ours reads")
    parser.add_argument("--original", help="folder that holds the original's package xgpt")
    arguments = parser.parse_args()
    channel = answers()
    torch.manual_seed(0)
    model = MAKERS[arguments.system](arguments).eval()
    take_weights(model, arguments)
    freeze_base(model, arguments)
    rng = torch.Generator().manual_seed(1)
    ids = torch.randint(1000, (arguments.batch, arguments.tokens), generator=rng)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}

    def both() -> None:
        model(**given, labels=ids).loss.backward()
        model.zero_grad()

    calls = passes(lambda: model(**given).logits, both)
    return serve(channel, calls, calls["fwd"]()[:, -1, :8].flatten().tolist())


if __name__ == "__main__":
    sys.exit(main())
