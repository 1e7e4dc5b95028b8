"""Which attention heads find: asked with a stretch of the document, they look at the place where it stands.

A few heads of a decoder do; the others draw the mean over all to places that have little to do with a question (Wu et
al. 2024, "Retrieval Head Mechanistically Explains Long-Context Factuality", arXiv 2404.15574). They are told apart on
the document itself, without labels: stretches of it are asked behind its memory.
"""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..attachment import device_of
from .families import memory_layers, model_shape
from .memory import Memory
from .report import AttentionReport, HeadPlace

NEAR = 64
"""Tokens on either side of a stretch that count as its place: they speak of the same thing."""


@torch.no_grad()
def found_attention(model: PreTrainedModel, memory: Memory, probes: int = 12, tokens: int = 12) -> Tensor:
    """The share of attention that falls on the place of what is asked, median over probes: (layers, heads) in [0, 1].

    Zero where a layer or head reads no memory. Costs `probes` forwards of `tokens` tokens behind the memory.

    Args:
        model: a decoder whose attention is served, which made the memory.
        memory: its first row's document is asked about itself.
        probes: stretches, at even distances.
        tokens: of each stretch.

    Raises:
        TypeError: `memory` is of an encoder-decoder.
        ValueError: the document is too short for as many stretches.
    """
    if memory.is_encoder_decoder:
        raise TypeError("`memory` is of an encoder-decoder: what its heads find is what its decoder writes.")
    alone, length = memory.select([0]), int(memory.lengths[memory.documents[0]])
    if probes < 1 or tokens < 1 or length < probes * tokens:
        raise ValueError(
            f"`probes` {probes} stretches of `tokens` {tokens} must lie in the document of {length} tokens, at least "
            "one of each."
        )
    shape = model_shape(memory.model_config)
    shares = torch.zeros(probes, shape.layers, shape.heads)
    for probe in range(probes):
        start = min(int((probe + 0.5) * length / probes), length - tokens)
        report = AttentionReport()
        asked = alone.input_ids[:, start : start + tokens].to(device_of(model))
        getattr(model, model.base_model_prefix)(**alone.inputs(asked, record=report))
        for layer, of_heads in report.attention_to(start - NEAR, start + tokens + NEAR).items():
            shares[probe, layer] = of_heads
    return shares.median(0).values


def retrieval_heads(
    model: PreTrainedModel, memory: Memory, count: int = 2, probes: int = 12, tokens: int = 12
) -> list[HeadPlace]:
    """The `count` heads that find best, as (layer, head), the best first: for `report.passages(heads=...)`.

    Args:
        model, memory, probes, tokens: as of `found_attention`.
        count: how many.

    Raises:
        TypeError, ValueError: as `found_attention`.
    """
    shares = found_attention(model, memory, probes, tokens)
    reading = memory.config.heads or range(shares.shape[1])
    places = [(layer, head) for layer in memory_layers(memory.config, memory.model_config) for head in reading]
    return sorted(places, key=lambda place: -float(shares[place]))[:count]
