"""What a retro-fit adds to a frozen decoder: an encoder of neighbours, and cross-attention to them in some layers.

The weights are here, and nothing of a generation: a forward pass carries its `ForwardRetrieval` in a keyword that the
model hands to the attention of each layer, from where the residual tap hands it back here.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...configuration.configuration_retro import RetroConfig
from ..residual_tap import tappable_layers
from .chunked_cross_attention import ChunkedCrossAttention
from .neighbour_encoder import NeighbourEncoder
from .normalisation import GatedRMSNorm, make_norm
from .projections import OutputProjection, make_dropout
from .retrieval_cache import RetrievalCacheLayer
from .retrieval_pass import RetrievalPass
from .retrofit_options import RetroFitOptions

KEYWORD = "graft_retrieval"
"""The keyword of the model in which a forward pass carries its ForwardRetrieval."""


class RetroFitLayer(nn.Module):
    """dropout(CCA(norm(h))): what one decoder layer adds to its residual stream."""

    def __init__(self, config: RetroConfig) -> None:
        super().__init__()
        self.norm = make_norm(config, config.hidden_size)
        self.cross_attention = ChunkedCrossAttention(config)
        self.dropout = make_dropout(config.residual_dropout)

    def forward(
        self, hidden: Tensor, reading: RetrievalPass, encoded: Tensor | None, layer_cache: RetrievalCacheLayer | None
    ) -> Tensor:
        """(batch, new, hidden_size) to the same; arguments as in ChunkedCrossAttention."""
        read: Tensor = self.cross_attention(self.norm(hidden), reading, encoded, layer_cache)
        return self.dropout(read)


class RetroFitAdapter(nn.Module):
    """All new weights of a retro-fitted model. Cross-attention outputs begin at 0, so training begins at the base."""

    def __init__(self, config: RetroConfig) -> None:
        super().__init__()
        self.config = config
        width = config.encoder_width
        self.embedding_projection: nn.Module = (
            nn.Identity() if width == config.hidden_size else nn.Linear(config.hidden_size, width, bias=False)
        )
        self.encoder = NeighbourEncoder(config)
        self.layers = nn.ModuleDict({str(index): RetroFitLayer(config) for index in config.cross_attention_layers})
        self.apply(self._init_weights)
        for layer in self.layers.values():
            nn.init.zeros_(layer.cross_attention.output.weight)  # type: ignore[union-attr, arg-type]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """N(0, initializer_range), outputs to the encoder's residual stream smaller by sqrt(2 layers)."""
        std = self.config.initializer_range
        if isinstance(module, nn.Linear):
            scale = (2 * self.config.num_encoder_layers) ** -0.5 if isinstance(module, OutputProjection) else 1.0
            nn.init.normal_(module.weight, std=std * scale)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, ChunkedCrossAttention):
            nn.init.normal_(module.null_key, std=std)
            nn.init.normal_(module.null_value, std=std)
        elif isinstance(module, GatedRMSNorm):
            nn.init.ones_(module.gate)

    def read(self, index: int, hidden: Tensor, keywords: dict[str, Any]) -> Tensor | None:
        """What the tap of decoder layer `index` calls; see ResidualUpdate."""
        retrieval = keywords.get(KEYWORD)
        if not isinstance(retrieval, ForwardRetrieval) or retrieval.adapter is not self:
            return None
        return retrieval.read(index, hidden)


def make_adapter(model: PreTrainedModel, config: RetroFitOptions) -> RetroFitAdapter:
    """New weights for a decoder, on its device, in float32 or wider.

    Raises:
        TypeError, ValueError: the model's family cannot be retro-fitted; those that can are listed.
        ValueError, StrictDataclassError: the options do not fit the model.
    """
    tappable_layers(model)
    weight = model.get_input_embeddings().weight
    adapter = RetroFitAdapter(config.retro_config(model.config))
    adapter.to(torch.promote_types(weight.dtype, torch.float32))  # type: ignore[arg-type]
    is_empty = adapter.encoder.output.weight.is_meta  # as PEFT wants it just before it loads weights
    return adapter if is_empty else adapter.to(weight.device)  # type: ignore[arg-type]


class ForwardRetrieval:
    """One forward pass of a retro-fitted model: what it reads, and the neighbours once they are encoded.

    Args:
        adapter: whose weights it uses.
        embedding: the base's token embedding.
        reading: where its tokens lie among chunks, and the neighbours it was given.
        layers: retrieval layers of its cache, None without one.
    """

    def __init__(
        self,
        adapter: RetroFitAdapter,
        embedding: nn.Module,
        reading: RetrievalPass,
        layers: Mapping[int, RetrievalCacheLayer] | None,
    ) -> None:
        self.adapter, self.embedding, self.reading, self.layers = adapter, embedding, reading, layers
        self.encoded: Tensor | None = None
        self._has_gradient = torch.is_grad_enabled()

    def read(self, index: int, hidden: Tensor) -> Tensor | None:
        """What decoder layer `index` adds to its residual stream.

        The first layer encodes the neighbours, also when gradient checkpointing computes it again: its encoder then
        runs twice, as the rest of the layer does.

        Args:
            hidden: (batch, new, hidden_size).

        Returns:
            The same shape, dtype and device; None if no token of this pass reads anything.

        Raises:
            ValueError: the layer runs under reentrant checkpointing, which would lose the encoder's gradient.
        """
        if self._has_gradient and not torch.is_grad_enabled():
            raise ValueError(
                "`use_reentrant` of gradient checkpointing must be False for a retro-fitted model: neighbours are "
                "encoded in one layer and read in others, and reentrant checkpointing would lose their gradient."
            )
        weight = self.adapter.encoder.output.weight
        own = hidden.to(weight.device, weight.dtype)
        if index == self.adapter.config.cross_attention_layers[0]:
            self.encoded = self.reading.encode(own, self._encode)
        if self.reading.reads_nothing:
            return None
        layer_cache = None if self.layers is None else self.layers[index]
        added: Tensor = self.adapter.layers[str(index)](own, self.reading, self.encoded, layer_cache)
        return added.to(hidden.device, hidden.dtype)

    def _encode(self, neighbours: Tensor, visible: Tensor | None, chunks: Tensor) -> Tensor:
        embedded = self.embedding(neighbours).to(chunks.device, chunks.dtype)
        encoded: Tensor = self.adapter.encoder(self.adapter.embedding_projection(embedded), visible, chunks)
        return encoded
