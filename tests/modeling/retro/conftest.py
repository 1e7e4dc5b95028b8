"""Tiny stock decoders of the families that can be retro-fitted, and retrievers without a corpus."""

from types import SimpleNamespace

import pytest
import torch
from tiny_decoders import tiny_decoder

from graft.modeling.retro.retrofit import retrofit
from graft.modeling.retro.retrofit_config import RetroFitConfig


def build_decoder(family, dtype=torch.float64, **options):
    """A tiny decoder that may end a text."""
    return tiny_decoder(family, dtype, **{"eos_token_id": 2, **options})


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
