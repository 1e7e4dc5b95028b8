"""Tiny stock decoders with random weights, one for each family that a test asks for."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 40,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": None,
}
PARALLEL = ["cohere", "gpt_neox", "phi"]
"""Families whose feed-forward stands beside attention."""

ADAPTED = [
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "olmo2",
    "smollm3",
    "granite",
    "phi3",
    "gpt2",
    *PARALLEL,
]
"""Families that sparse-GIN is tested on."""

_TOKENS = {name: value for name, value in SIZES.items() if "token" in name or "vocab" in name}
_GPT2 = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128}
OF_FAMILY = {
    "gpt2": _GPT2 | dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0),
    "gemma": {"hidden_act": "gelu"},
    "gemma2": {"sliding_window": 8, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 3.0},
    "gemma3_text": {"sliding_window": 8},
    "granite": {"residual_multiplier": 0.5},
    "mistral": {"sliding_window": 8},
    "phi3": {"resid_pdrop": 0.0},
    "cohere": {"use_qk_norm": True},
}


def tiny_decoder(family: str = "llama", dtype: torch.dtype = torch.float64, **options: object) -> PreTrainedModel:
    """A stock decoder in eval mode, always the same, with norms and biases that are no identity."""
    torch.manual_seed(0)
    sizes = _TOKENS if family == "gpt2" else SIZES
    config = AutoConfig.for_model(family, **{**sizes, **OF_FAMILY.get(family, {}), **options})
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if "norm" in name or "ln_" in name or name.endswith("bias"):
            torch.nn.init.normal_(parameter, mean=0.5, std=0.2)
    return model.to(dtype).eval()
