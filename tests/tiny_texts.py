"""What tests of training with memory share: a tiny tokenizer, token ids, and the sizes of models that read them."""

import torch

from graft.trainer.tokenizer_training import train_tokenizer

TOKENIZER = train_tokenizer(["some words of a text"], vocab_size=300, model_max_length=64)
BART = {
    "vocab_size": 300,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "max_position_embeddings": 32,
    "dropout": 0.0,
}
LLAMA = {
    "vocab_size": 300,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "pad_token_id": 1,
    "eos_token_id": 2,
}


def ids(seed: int, length: int) -> list[int]:
    """Token ids without the special ones."""
    return torch.randint(5, 300, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
