"""Tiny models with random weights, one of each family that memory serves."""

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from graft.modeling.transformers_compat import defect_of
from graft.modeling.unlimiformer.families import attention_modules, dispatches

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
_T5 = {"d_kv": 6, "d_ff": 40, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 4, "dropout_rate": 0.0}
_T5 |= {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 20}
_EXPERTS = {"num_local_experts": 2, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
_T5GEMMA = {
    "vocab_size": 61,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
_T5GEMMA |= {
    "intermediate_size": 40,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "attention_dropout": 0.0,
}
_T5GEMMA |= {"query_pre_attn_scalar": 8, "attn_logit_softcapping": 3.0, "sliding_window": 64, "dropout_rate": 0.0}
ENCODER_DECODERS = {  # what the config of each family needs besides ENCODER_DECODER
    **dict.fromkeys(("bart", "blenderbot", "blenderbot-small", "mbart", "pegasus", "m2m_100", "plbart", "mvp"), {}),
    "marian": {"decoder_vocab_size": 61},
    "bigbird_pegasus": {"attention_type": "block_sparse", "block_size": 2, "num_random_blocks": 1},
    "pegasus_x": {"num_global_tokens": 2, "block_size": 4},
    "nllb-moe": {"num_experts": 2, "encoder_sparse_step": 2, "decoder_sparse_step": 2, "expert_capacity": 64},
    "t5": _T5,
    "umt5": _T5,
    "mt5": _T5,
    "longt5": {**_T5, "local_radius": 4, "global_block_size": 4, "encoder_attention_type": "transient-global"},
    "switch_transformers": {**_T5, "num_experts": 2, "expert_capacity": 64, "num_sparse_encoder_layers": 1},
    "t5gemma": {"encoder": {**_T5GEMMA, "hidden_size": 24}, "decoder": {**_T5GEMMA, "hidden_size": 32}},
    "led": {"max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 64, "attention_window": 4},
    "fsmt": {"langs": ["en", "de"], "src_vocab_size": 61, "tgt_vocab_size": 61},
}
_HALF = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}}
_GPT = {"n_positions": 128, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_inner": 40}
_GPT |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
_MIXED = {"layer_types": ["full_attention", "sliding_attention", "full_attention"], "sliding_window": 8}
DECODERS = {  # what the config of each family needs besides DECODER
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {"use_sliding_window": False},
    "qwen3": {"use_sliding_window": False},
    "mixtral": {"sliding_window": None, **_EXPERTS},
    "qwen2_moe": {"use_sliding_window": False, "shared_expert_intermediate_size": 16, **_EXPERTS},
    "qwen3_moe": {"use_sliding_window": False, **_EXPERTS},
    "ministral": _MIXED,
    "arcee": {},
    "seed_oss": {},
    "gemma": {},
    "gemma2": {**_MIXED, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 3.0},
    "gemma3_text": {**_MIXED, "query_pre_attn_scalar": 8},
    "phi": {**_HALF, "qk_layernorm": True, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
    "phi3": {"sliding_window": None, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
    "stablelm": {**_HALF, "qk_layernorm": True},
    "nemotron": _HALF,
    "starcoder2": {"sliding_window": None, "residual_dropout": 0.0, "embedding_dropout": 0.0},
    "olmo": {},
    "olmo2": {},
    "olmo3": _MIXED,
    "granite": {"attention_multiplier": 0.7},
    "gpt_oss": {**_MIXED, **_EXPERTS},
    "cohere": {},
    "cohere2": _MIXED,
    "glm": _HALF,
    "glm4": _HALF,
    "helium": {},
    "ernie4_5": {},
    "exaone4": _MIXED,
    "smollm3": {"no_rope_layers": [1, 0, 1], "use_sliding_window": False},
    "gpt_neox": {**_HALF, "attention_bias": True, "hidden_dropout": 0.0},
    "gptj": {**_GPT, "rotary_dim": 4},
    "codegen": {**_GPT, "rotary_dim": 4},
    "gpt2": _GPT,
    "gpt_bigcode": _GPT,
    "opt": {"ffn_dim": 40, "word_embed_proj_dim": 32, "dropout": 0.0},
    "biogpt": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
}


def build_model(family, seed=0, dtype=torch.float32, **options):
    """A model of `family` in eval mode; `options` go to its config. Biases are random, so that none goes unnoticed."""
    torch.manual_seed(seed)
    is_decoder = family in DECODERS
    sizes = DECODER | DECODERS[family] if is_decoder else ENCODER_DECODER | ENCODER_DECODERS[family]
    config = AutoConfig.for_model(family, **{**sizes, **options})
    model = (AutoModelForCausalLM if is_decoder else AutoModelForSeq2SeqLM).from_config(config)
    if "num_experts" in vars(config) or "num_local_experts" in vars(config):
        model.set_experts_implementation("eager")  # the others have no float64
    if family in ("gemma2", "t5gemma"):
        model.set_attn_implementation("eager")  # before 5.24, sdpa leaves out that scores are capped
    if family in ("gptj", "codegen") and not all(map(dispatches, attention_modules(model))):
        pytest.skip("refused: this transformers computes the attention of the family by itself")
    if defect_of(family, model) and family == "umt5":
        model = AutoModelForSeq2SeqLM.from_config(config, attn_implementation="eager")  # as the refusal advises
    if defect_of(family, model):
        pytest.skip(f"refused: {defect_of(family, model)}")
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
        elif "norm" in name:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.1)
    return model.to(dtype).eval()


def build_permanent(family, ours, memory, dtype=torch.float32):
    """A stock model of `family`, and one of our permanent class `ours` of its weights, with options of memory."""
    stock = build_model(family, dtype=dtype)
    sizes = {k: v for k, v in stock.config.to_dict().items() if k not in ("model_type", "architectures")}
    model = ours(ours.config_class(**sizes, unlimiformer_config=memory)).to(dtype).eval()
    model.load_state_dict(stock.state_dict())
    return stock, model


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


@pytest.fixture(scope="session")
def tiny():
    """The functions above, for test files cannot import from here."""
    return SimpleNamespace(
        model=build_model,
        permanent=build_permanent,
        ids=random_ids,
        pad=pad,
        kept=naive_kept,
        decoders=DECODERS,
        encoder_decoders=ENCODER_DECODERS,
    )
