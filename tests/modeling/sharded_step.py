"""One training step of each kind of model, sharded by FSDP2 over the gloo processes that torchrun starts.

Run by test_sharded_training.py. Prints one JSON object: by kind, the parameters without a gradient, the largest
difference of a gradient from that of one process with the whole batch, and of the loss.
"""

import json

import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from graft.configuration.configuration_gnn import LlamaGNNConfig
from graft.configuration.configuration_retro import RetroConfig
from graft.modeling.graph.modeling_llama_gnn import LlamaForCausalLMWithGNN
from graft.modeling.retro.modeling_retro import RetroForCausalLM

HEADS = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA = {**HEADS, "intermediate_size": 24, "max_position_embeddings": 64}
RETRO = {"encoder_hidden_size": 12, "num_encoder_layers": 1, "cross_attention_layers": [1], "chunk_size": 4}
SPARSE = {"rank": 4, "dropout": 0.0, "scale_first": 0.3}
GRAPHS = {
    "gin": {"mlp_dropout": 0.0},
    "gin on relu edges": {"mlp_dropout": 0.0, "edges": {"transform": "relu", "threshold": 0.02}},
    "differential beside the base": {"mlp_dropout": 0.0, "differential": True, "base_attention": True, "scale": 0.3},
    "pna": {"attention": "pna"},
    "sparse": {"attention": "llama", "sparse": SPARSE},
    "halfway": {"attention": "llama", "mlp": "halfway_gin"},
}


def build(kind: str) -> torch.nn.Module:
    torch.manual_seed(0)
    if kind == "retro":
        return RetroForCausalLM(RetroConfig(**HEADS, **RETRO)).double()
    return LlamaForCausalLMWithGNN(LlamaGNNConfig(**LLAMA, gnn_config=GRAPHS[kind])).double()


def step(model: torch.nn.Module, kind: str, rows: slice) -> torch.Tensor:
    ids = torch.randint(3, 50, (4, 13), generator=torch.Generator().manual_seed(0))[rows]
    neighbours = torch.randint(3, 50, (4, 3, 2, 6), generator=torch.Generator().manual_seed(1))[rows]
    loss = model(input_ids=ids, labels=ids, **({"retrieved": neighbours} if kind == "retro" else {})).loss
    loss.backward()
    return loss.detach()


def compare(kind: str, rank: int, world: int) -> dict:
    whole, sharded = build(kind), build(kind)
    expected = step(whole, kind, slice(0, 4))
    mesh = init_device_mesh("cpu", (world,))
    for module in sharded.modules():
        if type(module).__name__ in sharded._no_split_modules:
            fully_shard(module, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    share = 4 // world
    loss = step(sharded, kind, slice(rank * share, (rank + 1) * share))
    distributed.all_reduce(loss)
    without, worst = [], 0.0
    for (name, ours), theirs in zip(sharded.named_parameters(), whole.parameters(), strict=True):
        if ours.grad is None:
            without.append(name)
        else:
            worst = max(worst, float((ours.grad.full_tensor() - theirs.grad).abs().max()))
    return {"without": without, "gradient": worst, "loss": abs(float(loss / world - expected))}


def main() -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    rank, world = distributed.get_rank(), distributed.get_world_size()
    found = {kind: compare(kind, rank, world) for kind in ["retro", *GRAPHS]}
    if rank == 0:
        print(json.dumps({"world": world, "found": found}))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
