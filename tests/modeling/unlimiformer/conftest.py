"""Tiny models with random weights, one of each family that memory serves."""

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

ENCODER_DECODER = {
    "vocab_size": 61,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 40,
    "max_position_embeddings": 64,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "encoder_layerdrop": 0.0,
    "decoder_layerdrop": 0.0,
    "init_std": 0.3,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
    "forced_bos_token_id": None,
}
DECODER = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 40,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
OF_FAMILY = {
    "marian": {"decoder_vocab_size": 61},
    "mistral": {"sliding_window": None},
    "qwen2": {"use_sliding_window": False},
    "qwen3": {"use_sliding_window": False},
}
DECODERS = ("llama", "mistral", "qwen2", "qwen3")


def build_model(family, seed=0, dtype=torch.float32, **options):
    """A model of `family` in eval mode; `options` go to its config. Biases are random, so that none goes unnoticed."""
    torch.manual_seed(seed)
    is_decoder = family in DECODERS
    config = AutoConfig.for_model(
        family, **{**(DECODER if is_decoder else ENCODER_DECODER), **OF_FAMILY.get(family, {}), **options}
    )
    model = (AutoModelForCausalLM if is_decoder else AutoModelForSeq2SeqLM).from_config(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
        elif "norm" in name:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.1)
    return model.to(dtype).eval()


def random_ids(*shape, seed=0):
    """Token ids without the special ones."""
    return torch.randint(3, 61, shape, generator=torch.Generator().manual_seed(seed))


def pad(rows, side, filler=1):
    """Stack token rows of different lengths: ids and mask, padded with `filler` on one side."""
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), filler)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[i, place], mask[i, place] = row, 1
    return ids, mask


def naive_kept(length, window, overlap, causal):
    """(start, end, keep_start, keep_end) of each window: it keeps all from where the one before stopped, to its end
    less, in an encoder, the margin."""
    margin = int(window * overlap / 2)
    stride = window - 2 * margin
    if length <= window:
        return [(0, length, 0, length)]
    starts = []
    while len(starts) * stride + window < length:
        starts.append(len(starts) * stride)
    windows, done = [], 0
    for start in starts:
        stop = start + window - (0 if causal else margin)
        windows.append((start, start + window, done, stop))
        done = stop
    return [*windows, (length - window, length, done, length)]


@pytest.fixture
def tiny():
    """The functions above, for test files cannot import from here."""
    return SimpleNamespace(model=build_model, ids=random_ids, pad=pad, kept=naive_kept)
