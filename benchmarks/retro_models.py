"""RETRO models of one shape for the benchmarks: ours, and the original from a path the user gives."""

import importlib.util
import sys
import types
from pathlib import Path

import torch

from graft.configuration.configuration_retro import RetroConfig
from graft.modeling.retro.modeling_retro import RetroForCausalLM

SHAPES = {
    "small": {"length": 512, "decoder": 256, "encoder": 256, "layers": 4, "encoder_layers": 2, "heads": 8, "head": 32},
    "medium": {
        "length": 1024,
        "decoder": 256,
        "encoder": 256,
        "layers": 6,
        "encoder_layers": 2,
        "heads": 8,
        "head": 32,
    },
    "seed": {
        "length": 2048,
        "decoder": 768,
        "encoder": 896,
        "layers": 12,
        "encoder_layers": 3,
        "heads": 8,
        "head": 64,
    },
}
VOCABULARY = 28996
CHUNK = 64
NEIGHBOURS = 2


def cross_attention_layers(shape: str) -> list[int]:
    """The original's (1, 3, 6, 9), counted from 0, as far as the shape has them."""
    return [layer for layer in (0, 2, 5, 8) if layer < SHAPES[shape]["layers"]]


def our_model(shape: str, dropout: float = 0.0, **changes) -> RetroForCausalLM:
    """Ours with random weights, as the original is configured."""
    sizes = SHAPES[shape]
    torch.manual_seed(0)
    options = {
        "vocab_size": VOCABULARY,
        "hidden_size": sizes["decoder"],
        "encoder_hidden_size": sizes["encoder"],
        "num_hidden_layers": sizes["layers"],
        "num_encoder_layers": sizes["encoder_layers"],
        "num_attention_heads": sizes["heads"],
        "head_dim": sizes["head"],
        "rotary_dim": 32,
        "chunk_size": CHUNK,
        "cross_attention_layers": cross_attention_layers(shape),
        "position_embedding": "rotary+learned",
        "max_position_embeddings": sizes["length"],
        "head_bias": True,
        "attention_dropout": dropout,
        "hidden_dropout": dropout,
        "eos_token_id": None,
    }
    return RetroForCausalLM(RetroConfig(**{**options, **changes}))


def original_model(path: Path, shape: str, dropout: float = 0.0) -> torch.nn.Module:
    """RETRO of lucidrains/RETRO-pytorch from `path`, the folder that holds retro_pytorch/ (and einops/ if need be)."""
    sys.path.append(str(path))
    package, retrieval = types.ModuleType("retro_pytorch"), types.ModuleType("retro_pytorch.retrieval")
    retrieval.BERT_VOCAB_SIZE = VOCABULARY  # the module itself pulls faiss, autofaiss and a download
    sys.modules |= {"retro_pytorch": package, "retro_pytorch.retrieval": retrieval}
    spec = importlib.util.spec_from_file_location("retro_original", path / "retro_pytorch" / "retro_pytorch.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sizes = SHAPES[shape]
    torch.manual_seed(0)
    return module.RETRO(
        num_tokens=VOCABULARY,
        max_seq_len=sizes["length"],
        enc_dim=sizes["encoder"],
        enc_depth=sizes["encoder_layers"],
        dec_dim=sizes["decoder"],
        dec_depth=sizes["layers"],
        dec_cross_attn_layers=tuple(layer + 1 for layer in cross_attention_layers(shape)),
        heads=sizes["heads"],
        dim_head=sizes["head"],
        dec_attn_dropout=dropout,
        dec_ff_dropout=dropout,
        chunk_size=CHUNK,
    )
