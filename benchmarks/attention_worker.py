"""One attention layer in a process of its own, measured: gin_attention.py and pna_attention.py ask it.

Runs under any transformers from 4.46 on, since the original's environment starts it too; so it imports graft and the
original only where their system is asked for. The same seed gives all systems the same weights and inputs.
"""

import argparse
import sys

import torch
from served_calls import answers, passes, serve, without_scatter
from transformers import LlamaConfig


def sizes(arguments: argparse.Namespace) -> dict[str, object]:
    """Of the Llama whose layer is timed."""
    return {
        "hidden_size": arguments.width,
        "num_attention_heads": arguments.heads,
        "num_key_value_heads": arguments.groups,
        "head_dim": arguments.width // arguments.heads,
        "num_hidden_layers": 1,
        "max_position_embeddings": arguments.tokens,
    }


def drawn(arguments: argparse.Namespace) -> dict[str, torch.Tensor]:
    """Weights of a GIN layer by what they are, and the input."""
    rng = torch.Generator().manual_seed(0)
    d, heads = arguments.width // arguments.heads, arguments.heads
    inner = max(1, int(arguments.mlp_ratio * d))
    shapes = {
        "query": (heads * d, arguments.width),
        "key": (arguments.groups * d, arguments.width),
        "up": (heads, d, inner),
        "up_bias": (heads, 1, inner),
        "down": (heads, inner, d),
        "down_bias": (heads, 1, d),
        "epsilon": (heads, 1, 1),
    }
    tensors = {name: torch.randn(shape, generator=rng) * 0.05 for name, shape in shapes.items()}
    tensors["states"] = torch.randn(arguments.batch, arguments.tokens, arguments.width, generator=rng)
    return tensors


@torch.no_grad()
def fill_ours(module, given: dict[str, torch.Tensor]) -> None:
    module.q_proj.weight.copy_(given["query"])
    module.k_proj.weight.copy_(given["key"])
    module.epsilon.copy_(given["epsilon"])
    module.update.up_weight.copy_(given["up"])
    module.update.up_bias.copy_(given["up_bias"])
    module.update.down_weight.copy_(given["down"])
    module.update.down_bias.copy_(given["down_bias"])


@torch.no_grad()
def fill_original(module, given: dict[str, torch.Tensor]) -> None:
    module.q_proj.weight.copy_(given["query"])
    module.k_proj.weight.copy_(given["key"])
    for head, layer in enumerate(module.gin_layers):
        layer.epsilon.copy_(given["epsilon"][head, 0, 0])
        layer.mlp[0].weight.copy_(given["up"][head].T)
        layer.mlp[0].bias.copy_(given["up_bias"][head, 0])
        layer.mlp[4].weight.copy_(given["down"][head].T)
        layer.mlp[4].bias.copy_(given["down_bias"][head, 0])


def make_ours(arguments: argparse.Namespace, given: dict[str, torch.Tensor]):
    """Ours; "kept" writes all rows of weights out, without a fused call, and keeps them for the backward pass."""
    from graft.configuration.configuration_gnn import LlamaGNNConfig
    from graft.modeling.graph.modeling_llama_gnn import attention_class

    options = {"attention": arguments.attention, "edges": {"transform": arguments.transform}}
    options["mlp_ratio"] = arguments.mlp_ratio
    if arguments.system == "kept":
        options["block_bytes"] = 2**50
    config = LlamaGNNConfig(**sizes(arguments), gnn_config=options)
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    module = attention_class(config.gnn_config)(config, 0).eval()
    if arguments.attention == "gin":
        fill_ours(module, given)
    if arguments.system == "kept" and arguments.attention == "gin":
        module.is_fused = False
    return lambda states, table: module(states, table)[0], list(module.parameters())


def make_sdpa(arguments: argparse.Namespace, given: dict[str, torch.Tensor]):
    """The stock attention of the same width."""
    from transformers.models.llama.modeling_llama import LlamaAttention

    config = LlamaConfig(**sizes(arguments))
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    module = LlamaAttention(config, 0).eval()
    return lambda states, table: module(states, table, None)[0], list(module.parameters())


def make_original(arguments: argparse.Namespace, given: dict[str, torch.Tensor]):
    """The original's layer, from a checkout."""
    without_scatter()
    sys.path.insert(0, str(arguments.original))
    from xgpt import Attention_GNN
    from xgpt.gnn_config import GNNConfig

    config = LlamaConfig(**sizes(arguments))
    ratio = arguments.mlp_ratio
    ratio = int(ratio) if ratio == int(ratio) else ratio  # its vector form takes whole numbers only
    config.gnn_config = GNNConfig(
        attention_GIN_MLP_multiplier=ratio,
        attention_GIN_MLP_o_proj_at_end=False,
        attention_GIN_MLP_use_scoring_fnct=False,
        attention_GIN_MLP_GIN_use_softmax=True,
        attention_GIN_MLP_GIN_use_ReLU_instead_of_softmax=False,
        attention_GIN_MLP_GIN_threshold_mode=arguments.transform,
        plot_for_debugging=False,
    )
    names = {"gin": "LlamaAttentionGIN", "pna": "LlamaAttentionPNA", "pna_vector": "LlamaAttentionPNA_LM"}
    torch.manual_seed(0)
    module = getattr(Attention_GNN, names[arguments.attention])(config, layer_idx=0).eval()
    if arguments.attention == "gin":
        fill_original(module, given)
    hidden = torch.full((arguments.tokens, arguments.tokens), torch.finfo(torch.float32).min).triu(1)
    mask = hidden[None, None].expand(arguments.batch, 1, -1, -1)
    parameters = [parameter for parameter in module.parameters()]
    return lambda states, table: module(states, attention_mask=mask, position_embeddings=table)[0], parameters


MAKERS = {"ours": make_ours, "kept": make_ours, "sdpa": make_sdpa, "original": make_original}


def position_table(arguments: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor]:
    width = arguments.width // arguments.heads
    angles = torch.arange(arguments.tokens)[:, None] * 10000.0 ** (-torch.arange(0, width, 2) / width)
    angles = torch.cat([angles, angles], dim=-1)[None]
    return angles.cos(), angles.sin()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--system", choices=sorted(MAKERS), required=True)
    parser.add_argument("--attention", choices=["gin", "pna", "pna_vector"], default="gin")
    parser.add_argument("--transform", default="none")
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--width", type=int, default=560)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--groups", type=int, default=8)
    parser.add_argument("--mlp-ratio", type=float, default=0.5)
    parser.add_argument("--original")
    arguments = parser.parse_args()
    channel, given = answers(), drawn(arguments)
    call, parameters = MAKERS[arguments.system](arguments, given)
    states, table = given["states"].requires_grad_(), position_table(arguments)

    def both() -> None:
        torch.autograd.grad(call(states, table).square().mean(), [states, *parameters], allow_unused=True)

    calls = passes(lambda: call(states, table), both)
    return serve(channel, calls, calls["fwd"]()[:, -1, :8].flatten().tolist())


if __name__ == "__main__":
    sys.exit(main())
