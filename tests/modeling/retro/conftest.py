"""Tiny stock decoders of the families that can be retro-fitted, and retrievers without a corpus."""

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from graft.modeling.retro.retrofit import retrofit
from graft.modeling.retro.retrofit_config import RetroFitConfig

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
    "eos_token_id": 2,
}
OF_FAMILY = {
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128}
    | dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0),
    "mistral": {"sliding_window": 8},
    "gemma2": {"sliding_window": 8, "query_pre_attn_scalar": 8},
    "gemma3_text": {"sliding_window": 8},
}


def build_decoder(family, dtype=torch.float64, **options):
    """A stock decoder in eval mode, with norms that are no identity."""
    torch.manual_seed(0)
    given = {name: value for name, value in SIZES.items() if family != "gpt2" or "token" in name or "voc" in name}
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(family, **{**given, **OF_FAMILY.get(family, {}), **options})
    )
    for name, parameter in model.named_parameters():
        if "norm" in name or "ln_" in name:
            torch.nn.init.normal_(parameter, mean=0.5, std=0.2)
    return model.to(dtype).eval()


def shake(parameters, seed=1):
    """Make all new weights random, those that begin at 0 too."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=rng, dtype=torch.float64) + (parameter == 1))


def fit(family, config=None, **options):
    """A decoder, its retro-fit with random weights, chunks of 4, neighbours of up to 6 tokens."""
    model = build_decoder(family, **options)
    handle = retrofit(model, config or RetroFitConfig(chunk_size=4, neighbour_length=6, cross_attention_layers=[0, 2]))
    shake(handle.trainable_parameters())
    return model, handle


def random_ids(*shape, seed=0):
    """Token ids without the special ones."""
    return torch.randint(3, 61, shape, generator=torch.Generator().manual_seed(seed))


class TableRetriever:
    """Neighbours by the sum of a chunk's ids; counts its calls and the chunks it was asked for."""

    def __init__(self, neighbours=2, length=6):
        self.table = random_ids(61, neighbours, length, seed=7)
        self.table[::3, -1, 3:] = 1  # some are short
        self.table[::5, 0] = 1  # some are missing
        self.calls, self.rows = 0, 0

    def __call__(self, chunks):
        self.calls += 1
        self.rows += len(chunks)
        return self.table[chunks.sum(1) % 61]

    def retrieved(self, ids, chunk_size=4):
        """(batch, chunks, neighbours, length) of all complete chunks of unpadded rows."""
        count = ids.shape[1] // chunk_size
        chunks = ids[:, : count * chunk_size].reshape(-1, chunk_size)
        return self.table[chunks.sum(1) % 61].unflatten(0, (len(ids), count))


@pytest.fixture
def decoders():
    """The functions above, for test files cannot import from here."""
    return SimpleNamespace(build=build_decoder, fit=fit, shake=shake, ids=random_ids, Retriever=TableRetriever)
