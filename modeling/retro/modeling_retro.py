"""RETRO as a transformers model: a decoder whose chunks read neighbours, with cache, generation and the loss.

Borgeaud et al. 2021, "Improving Language Models by Retrieving from Trillions of Tokens", arXiv 2112.04426.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import TransformersKwargs, can_return_tuple
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from ...configuration.configuration_retro import RetroConfig
from ..cpu_linear import Linear
from ..remote_code import SavesItsCode
from ..transformers_compat import cache_argument, cache_of
from .attention_weights import RectifiedAttention, SoftmaxAttention
from .blocked_cross_entropy import blocked_cross_entropy
from .chunked_cross_attention import ChunkedCrossAttention
from .neighbour_encoder import NeighbourEncoder
from .normalisation import GatedRMSNorm, deepnorm_constants, make_norm, make_residual
from .partial_rotary import Rotary
from .projections import HeadProjection, InnerProjection, OutputProjection, make_feed_forward
from .retrieval_cache import RetrievalCacheLayer, retrieval_layers
from .retrieval_pass import (
    EncodeNeighbours,
    RetrievalPass,
    begin_pass,
    check_retrieved,
    grid_without_cache,
    is_packed,
    leading_padding,
)
from .retriever import Retriever, check_retriever, retrieve_completed
from .self_attention import CausalSelfAttention

_ARGUMENTS = ("input_ids", "attention_mask", "position_ids", "retrieved", "use_cache")
_PASSED_ALONG = {"cache", "past_key_values", "return_dict", *TransformersKwargs.__optional_keys__}


class RetroDecoderLayer(GradientCheckpointingLayer):
    """Self-attention, chunked cross-attention in some layers, feed-forward."""

    def __init__(self, config: RetroConfig, layer_idx: int) -> None:
        super().__init__()
        width = config.hidden_size
        self.causal_attention = CausalSelfAttention(config, layer_idx)
        self.self_residual = make_residual(config, width, of_encoder=False)
        self.reads_neighbours = layer_idx in config.cross_attention_layers
        if self.reads_neighbours:
            self.cross_attention = ChunkedCrossAttention(config)
            self.cross_residual = make_residual(config, width, of_encoder=False)
        self.feed_forward = make_feed_forward(config, of_encoder=False)
        self.feed_forward_residual = make_residual(config, width, of_encoder=False)

    def forward(
        self,
        hidden: Tensor,
        encoded: Tensor | None,
        mask: Tensor | None,
        table: Rotary,
        reading: RetrievalPass,
        encode: EncodeNeighbours | None,
        cache: Cache | None = None,
        layer_cache: RetrievalCacheLayer | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """One layer.

        Args:
            hidden: (batch, new, hidden_size).
            encoded: (batch, chunks, neighbours, neighbour_length, hidden_size), or None if not encoded yet.
            mask: for self-attention, as transformers makes it.
            table: rotary table of the tokens' positions.
            reading: what this forward pass knows of retrieval.
            encode: given to the first layer with cross-attention.
            cache, layer_cache: of the generation; `layer_cache` is this layer's part for retrieval.

        Returns:
            The same two, the neighbours encoded from the first layer with cross-attention on.
        """
        hidden = self.self_residual(hidden, partial(self.causal_attention, table=table, mask=mask, cache=cache))
        if self.reads_neighbours:
            if encode is not None:
                encoded = reading.encode(hidden, encode)
            if reading.reads_nothing:
                hidden = self.cross_residual.without(hidden)
            else:
                cross = partial(self.cross_attention, reading=reading, encoded=encoded, layer_cache=layer_cache)
                hidden = self.cross_residual(hidden, cross)
        return self.feed_forward_residual(hidden, partial(self.feed_forward)), encoded


class RetroPreTrainedModel(PreTrainedModel):
    """How RETRO's weights begin, and what transformers may do with it."""

    config_class = RetroConfig
    config: RetroConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["RetroDecoderLayer", "NeighbourEncoderLayer"]
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_record_outputs = {
        "hidden_states": OutputRecorder(RetroDecoderLayer, index=0),
        "attentions": [
            OutputRecorder(SoftmaxAttention, index=1, layer_name="causal_attention.attention"),
            OutputRecorder(RectifiedAttention, index=1, layer_name="causal_attention.attention"),
        ],
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """N(0, 0.02), outputs to the residual smaller by sqrt(2 layers); or the rule of DeepNorm."""
        config = self.config
        gain = getattr(module, "deepnorm_gain", None)
        if gain is not None and isinstance(module, HeadProjection):
            _initialise_heads(module, gain)
        elif gain is not None and isinstance(module, InnerProjection | OutputProjection):
            init.xavier_normal_(module.weight, gain=gain)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, OutputProjection):
            init.normal_(module.weight, std=config.initializer_range / (2 * config.num_hidden_layers) ** 0.5)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, ChunkedCrossAttention):
            init.normal_(module.null_key, std=config.initializer_range)
            init.normal_(module.null_value, std=config.initializer_range)
        elif isinstance(module, GatedRMSNorm):
            init.ones_(module.weight)
            init.ones_(module.gate)
        else:
            super()._init_weights(module)


def _initialise_heads(module: HeadProjection, gain: float) -> None:
    """Xavier-normal weights for each set of heads, with `gain` on the values (arXiv 2203.00555, figure 2)."""
    if getattr(module.weight, "_is_hf_initialized", False):  # was loaded; its parts would not know
        return
    sets = module.sets
    *rotated, values = module.weight.split([count * sets.head_dim for count in (*sets.rotated, sets.values)])
    for weight in rotated:
        init.xavier_normal_(weight)
    if sets.values:
        init.xavier_normal_(values, gain=gain)


class RetroModel(RetroPreTrainedModel):
    """Embedding, encoder of neighbours and decoder, without the output head."""

    def __init__(self, config: RetroConfig) -> None:
        super().__init__(config)
        width = config.encoder_width
        self.embed_tokens = nn.Embedding(config.vocab_size, width)
        self.embed_positions = (
            nn.Embedding(config.max_position_embeddings, width) if "learned" in config.position_embedding else None
        )
        self.input_projection = Linear(width, config.hidden_size) if width != config.hidden_size else nn.Identity()
        self.encoder = NeighbourEncoder(config)
        self.layers = nn.ModuleList(RetroDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = make_norm(config, config.hidden_size) if config.residual == "prenorm" else nn.Identity()
        self.gradient_checkpointing = False
        if config.residual == "deepnorm":
            for part, of_encoder in ((self.encoder, True), (self.layers, False)):
                for module in part.modules():  # read by `_init_weights`, which sees one module at a time
                    module.deepnorm_gain = deepnorm_constants(config, of_encoder)[1]  # type: ignore[assignment]
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embed_tokens = value  # type: ignore[assignment]

    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        retrieved: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states of the tokens.

        Args:
            input_ids: (batch, new).
            attention_mask: (batch, past + new), 0 at padding; padding in front of a row shifts its chunks.
            position_ids: (batch, new). Without a mask and a cache, they tell packed documents apart: each starts at 0,
                at a chunk boundary.
            retrieved: (batch, chunks, neighbours, neighbour_length) ids, one set for each chunk that this pass
                completes, `pad_token_id` where a neighbour is short or missing; None for no retrieval at all.
            use_cache: whether to return a cache; None is the config's choice. Not while training with checkpoints.
            kwargs: `cache` (before transformers 5.24: `past_key_values`) of the generation so far.

        Returns:
            last_hidden_state (batch, new, hidden_size), normed, and the cache.

        Raises:
            TypeError, ValueError: `retrieved` does not fit the chunks completed, documents start inside a chunk, a
                position lies beyond learned ones, or an argument is unknown.
        """
        given = {name for name, value in kwargs.items() if value is not None}  # PEFT hands all it knows on, as None
        if unknown := sorted(given - _PASSED_ALONG):
            raise TypeError(f"RetroModel.forward has no argument {unknown}; did you mean one of {_ARGUMENTS}?")
        if input_ids is None:
            raise ValueError("`input_ids` must be given: chunks are made of tokens.")
        cache = cache_of(kwargs)
        if not (cache is None and is_packed(attention_mask, position_ids)):
            cache = self._begin_cache(cache, use_cache)
        past = 0 if cache is None else int(cache.get_seq_length())
        layer_caches = self._retrieval_layers(cache)
        reading = begin_pass(self.config, input_ids, (attention_mask, position_ids), retrieved, layer_caches)
        if position_ids is None:
            position_ids = self._positions(input_ids, attention_mask, past)
        hidden = self._embed(input_ids, position_ids)
        mask = create_causal_mask(self.config, hidden, attention_mask, cache, position_ids=position_ids)
        table = reading.token_table(position_ids, hidden)
        encoded: Tensor | None = None
        first = self.config.cross_attention_layers[0]
        for index, layer in enumerate(self.layers):
            encode = self.encode_neighbours if index == first else None
            layer_cache = None if layer_caches is None else layer_caches.get(index)
            hidden, encoded = layer(hidden, encoded, mask, table, reading, encode, cache, layer_cache)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden), **cache_argument(cache))

    def encode_neighbours(self, neighbours: Tensor, visible: Tensor | None, chunks: Tensor) -> Tensor:
        """Embed and encode neighbours; see NeighbourEncoder."""
        return self.encoder(self.embed_tokens(neighbours), visible, chunks)

    def retrieval_chunk(self, cache: Cache | None) -> Any:
        """Where the generation of `cache` stands among chunks; None without a cache."""
        layers = self._retrieval_layers(cache)
        return None if layers is None else next(iter(layers.values())).chunk

    def _begin_cache(self, cache: Cache | None, use_cache: bool | None) -> Cache | None:
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            return None
        wants = self.config.use_cache if use_cache is None else use_cache
        return DynamicCache(config=self.config) if cache is None and wants and not self.training else cache

    def _retrieval_layers(self, cache: Cache | None) -> dict[int, RetrievalCacheLayer] | None:
        if cache is None:
            return None
        return retrieval_layers(cache, self.config.cross_attention_layers, self.config.chunk_size)

    def _positions(self, input_ids: Tensor, attention_mask: Tensor | None, past: int) -> Tensor:
        """(batch or 1, new): each row counts its own tokens."""
        new = input_ids.shape[1]
        positions = torch.arange(past, past + new, device=input_ids.device)[None]
        padding = leading_padding(attention_mask, None, past + new)
        return positions if padding is None else (positions - padding[:, None].to(positions.device)).clamp(min=0)

    def _embed(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        embedded = self.embed_tokens(input_ids)
        if self.embed_positions is not None:
            limit = self.config.max_position_embeddings
            if int(position_ids.max()) >= limit:
                raise ValueError(
                    f"`input_ids` reach position {int(position_ids.max())}, but learned positions end at "
                    f"`max_position_embeddings` {limit} (`position_embedding='rotary'` has no limit)."
                )
            embedded = embedded + self.embed_positions(position_ids)
        return self.input_projection(embedded)


class RetroForCausalLM(SavesItsCode, RetroPreTrainedModel, GenerationMixin):
    """RETRO with a language-modelling head: a loss by blocks, and `generate(retriever=...)`."""

    auto_classes = ("AutoModelForCausalLM",)
    lora_target_modules = ("query_key_value", "query", "key_value", "output", "up", "down")  # all but ids to vectors
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: RetroConfig) -> None:
        super().__init__(config)
        self.model = RetroModel(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=config.head_bias)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        retrieved: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits, or the loss.

        Args:
            input_ids, attention_mask, position_ids, retrieved: as in RetroModel.
            labels: (batch, new) like `input_ids`, -100 where nothing is scored; each token is predicted by the one
                before it. While training, logits are not kept and not returned.
            logits_to_keep: how many of the last tokens get logits, 0 for all, or which.
            cache, past_key_values: of the generation so far, under the name of transformers 5.24 or that before it.
            kwargs: `use_cache`, `output_hidden_states`, `output_attentions`, and `num_items_in_batch`,
                which the loss is divided by instead of the scored tokens.

        Returns:
            loss, logits (batch, tokens, vocab_size) and the cache.
        """
        count = kwargs.pop("num_items_in_batch", None)
        logits, loss = None, None
        kwargs["cache"] = past_key_values if cache is None else cache
        inputs = {"attention_mask": attention_mask, "position_ids": position_ids, "retrieved": retrieved}
        if labels is not None and self.training and input_ids is not None and kwargs["cache"] is None:
            output = self.model(input_ids[:, :-1], **self._without_last(inputs, input_ids), **kwargs)
            loss = self._loss(output.last_hidden_state, labels[:, 1:], count)
        else:
            output = self.model(input_ids, **inputs, **kwargs)
            hidden = output.last_hidden_state
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden[:, kept])
            if labels is not None:
                loss = self._loss(hidden[:, :-1], labels[:, 1:], count)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
            **cache_argument(cache_of(dict(output))),
        )

    def _without_last(self, inputs: dict[str, Tensor | None], input_ids: Tensor) -> dict[str, Tensor | None]:
        """Leave out the last token, which predicts nothing that is scored, and the neighbours only it would read."""
        mask, positions, retrieved = inputs.values()
        if retrieved is not None:
            m, shorter = self.config.chunk_size, (_all_but_last(mask), _all_but_last(positions))
            whole = grid_without_cache(m, input_ids, (mask, positions)).closed
            check_retrieved(retrieved, input_ids.shape[0], whole, self.config)
            retrieved = retrieved[:, : grid_without_cache(m, input_ids[:, :-1], shorter).closed]
        return {
            "attention_mask": _all_but_last(mask),
            "position_ids": _all_but_last(positions),
            "retrieved": retrieved,
        }

    def _loss(self, hidden: Tensor, targets: Tensor, count: Tensor | int | None) -> Tensor:
        """Cross-entropy of (batch, tokens, hidden_size) against (batch, tokens)."""
        targets = targets.to(hidden.device).flatten()
        return blocked_cross_entropy(hidden.flatten(0, 1), self.lm_head.weight, self.lm_head.bias, targets, count)

    def generate(self, inputs: Tensor | None = None, retriever: Retriever | None = None, **kwargs: Any) -> Any:
        """As `generate` of any model, reading the neighbours that `retriever` finds for each chunk.

        Args:
            inputs: (batch, prompt), left-padded if prompts differ in length, with their `attention_mask`.
            retriever: asked once per step for all rows whose chunk is complete and whose neighbours a later token will
                read; None generates without retrieval.
            kwargs: as in transformers, for every decoding mode.

        Raises:
            TypeError: `retriever` is not callable.
            ValueError: the retriever failed, or returned ids of a wrong shape or beyond the vocabulary.
        """
        check_retriever(retriever)
        if retriever is not None:
            kwargs["retriever"] = retriever
        return super().generate(inputs, **kwargs)

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, *args: Any, retriever: Retriever | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
        for name in ("tokenizer", "assistant_tokenizer"):  # of stop strings and assistants, handed on to every model
            inputs.pop(name, None)
        if retriever is not None:
            masks = kwargs.get("attention_mask"), inputs.get("position_ids")
            chunk = self.model.retrieval_chunk(cache_of(inputs))
            inputs["retrieved"] = retrieve_completed(retriever, self.config, inputs["input_ids"], masks, chunk)
        return inputs


def _all_but_last(tokens: Tensor | None) -> Tensor | None:
    return None if tokens is None else tokens[:, :-1]
