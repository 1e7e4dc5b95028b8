"""Coarse-grained attention with one level against the stock attention layer with sdpa, in turn, by length.

python benchmarks/cg_attention.py --tokens 1024 4096 8192

One layer alone, its maps with it, random weights and states, forward and with backward. Refuses to time a layer in
which a later token changes an earlier one. A ratio is stock / ours of the same round: above 1, ours is faster.
"""

import argparse
import statistics
import sys
from functools import partial

import torch
from measuring import in_turn, keep, machine, ratio
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

from graft import LlamaGNNConfig
from graft.modeling.graph.cg_attention import CGAttention


def layers(width: int, group: int) -> tuple[LlamaGNNConfig, dict[str, torch.nn.Module]]:
    torch.manual_seed(0)
    options = {"attention": "cg", "latent": {"tokens_per_latent": [group]}}
    sizes = {"hidden_size": width, "num_attention_heads": 8, "max_position_embeddings": 65536}
    config = LlamaGNNConfig(**sizes, gnn_config=options)
    config._attn_implementation = "sdpa"
    return config, {"stock": LlamaAttention(config, 0), "cg": CGAttention(config, 0)}


def forward(module: torch.nn.Module, states: torch.Tensor, table: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return module(states, position_embeddings=table, attention_mask=None)[0]


def both(module: torch.nn.Module, states: torch.Tensor, table: tuple[torch.Tensor, torch.Tensor]) -> None:
    module(states, position_embeddings=table, attention_mask=None)[0].sum().backward()


def check(module: torch.nn.Module, states: torch.Tensor, table: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Refuse to time what is wrong."""
    half, other = states.shape[1] // 2, states.detach().clone()
    other[:, half:] += 1
    one, two = (forward(module, given, table)[:, :half] for given in (states, other))
    if not torch.allclose(one, two, atol=1e-5):
        raise RuntimeError("a later token changed an earlier one")


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", nargs="+", type=int, default=[1024, 4096, 8192])
    parser.add_argument("--group", type=int, default=64, help="tokens of a latent")
    parser.add_argument("--width", type=int, default=560)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args(argv)
    about = machine()
    print(about)
    config, modules = layers(arguments.width, arguments.group)
    rotary, rows = LlamaRotaryEmbedding(config), []
    for tokens in arguments.tokens:
        states = torch.randn(1, tokens, arguments.width, requires_grad=True)
        given = states, rotary(states, torch.arange(tokens)[None])
        check(modules["cg"], *given)
        row: dict[str, object] = {"tokens": tokens, "group": arguments.group}
        for name, call in (("fwd", forward), ("fwd+bwd", both)):
            calls = {system: partial(call, module, *given) for system, module in modules.items()}
            times = in_turn(calls, arguments.rounds)
            row |= {f"{system} {name} ms": round(1e3 * statistics.median(taken), 2) for system, taken in times.items()}
            row[f"{name}: stock / cg"] = ratio(times["stock"], times["cg"])
        rows.append(row)
        print(row, flush=True)
    print("kept in", keep("cg_attention", vars(arguments), rows, about))
    return 0


if __name__ == "__main__":
    sys.exit(main())
