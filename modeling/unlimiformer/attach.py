"""`unlimiform(model, config)`: give a model people already have a memory, until it is taken away again."""

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...configuration.configuration_unlimiformer import UnlimiformerConfig
from ..attachment import Attachment, AttentionStep, device_of, serves
from .attend import attend_to_memory, cross_attend_to_memory, offer_memory
from .memory import Memory, has_scaled_positions, keys_rule, layer_range
from .remember import folds, real_tokens, remember_decoded, remember_encoded
from .report import AttentionReport, recording

ENCODER_DECODERS = (
    "bart",
    "blenderbot",
    "blenderbot-small",
    "m2m_100",
    "marian",
    "mbart",
    "pegasus",
    "graft_unlimiformer_bart",
)
Documents = tuple[Tensor, Tensor | None]
"""Ids (documents, longest), padded on either side, and their mask or None."""
DECODERS = ("llama", "mistral", "qwen2", "qwen3", "graft_unlimiformer_llama")


def memory_attentions(model: PreTrainedModel, config: UnlimiformerConfig) -> tuple[list[nn.Module], AttentionStep]:
    """The attention modules that will be served, one for each decoder layer, and the step that serves them.

    Raises:
        TypeError: the model is of no supported family; says why and lists those that are.
        ValueError: an option does not fit the model.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"`model` must be a transformers model, got {type(model).__name__}; of a PEFT model pass "
            "`model.get_base_model()`."
        )
    family = model.config.model_type
    step: AttentionStep
    if family in ENCODER_DECODERS and hasattr(model, "lm_head"):
        attentions = [layer.encoder_attn for layer in model.get_decoder().layers]
        heads, step = model.config.decoder_attention_heads, cross_attend_to_memory
        if config.store == "hidden" and not folds(attentions):
            raise ValueError(
                '`store` "hidden" folds plain linear projections, which an adapter has replaced: "keys_values" serves.'
            )
    elif family in DECODERS and hasattr(model, "lm_head"):
        attentions = [layer.self_attn for layer in getattr(model, model.base_model_prefix).layers]
        heads, step = model.config.num_attention_heads, attend_to_memory
        _check_decoder(model, config)
    else:
        raise TypeError(
            f"`model` is a {type(model).__name__} (model_type {family!r}), whose attention graft does not serve. "
            f"Supported, with a language-modelling head: {', '.join((*ENCODER_DECODERS, *DECODERS))}."
        )
    layer_range(config, len(attentions))
    if config.heads is not None and max(config.heads) >= heads:
        raise ValueError(f"`heads` must lie in [0, {heads}) for this model, got {config.heads}.")
    return attentions, step


def _check_decoder(model: PreTrainedModel, config: UnlimiformerConfig) -> None:
    types = getattr(model.config, "layer_types", None)
    if types is None:
        sliding = getattr(model.config, "sliding_window", None) is not None
        types = ["sliding_attention" if sliding else "full_attention"] * model.config.num_hidden_layers
    if any(kind != "full_attention" for kind in types):
        raise ValueError(
            f"`model` has layers of type {sorted(set(types))}: memory needs full attention in all of them. Where a "
            "model was trained with it, load it with `sliding_window=None`."
        )
    if config.store == "hidden":
        raise ValueError('`store` "hidden" needs an encoder; a decoder keeps "keys_values".')
    if config.first_step == "window":
        raise ValueError(
            '`first_step` "window" needs an encoder; a decoder reads its "memory" from the first step on.'
        )
    rope = getattr(model.config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") in ("dynamic", "longrope"):
        raise ValueError(
            f"`model` changes its rotary frequencies with the length of its input (rope_type {rope['rope_type']!r}), "
            "so remembered keys cannot be moved."
        )


def resolve_window(model: PreTrainedModel, config: UnlimiformerConfig) -> int:
    """Tokens the model reads at a time: `window`, or what it was trained on; a decoder keeps half for what follows.

    Raises:
        ValueError: the window is longer than the positions of the model.
    """
    trained = model.config.max_position_embeddings
    if config.window is None:
        window = trained if model.config.is_encoder_decoder else max(1, trained // 2)
    else:
        window = config.window
    if window > trained and not has_scaled_positions(model.config):
        raise ValueError(f"`window` must be at most the model's {trained} positions, got {window}.")
    if config.keys_per_query == "window" and config.sinks > window:
        raise ValueError(f"`sinks` must lie in [0, `window`], got {config.sinks} of {window}.")
    return window


class Unlimited(Attachment):
    """A model with a memory: remembers documents, generates from them; `remove()` or the end of a `with` undoes it."""

    def __init__(self, model: PreTrainedModel, config: UnlimiformerConfig) -> None:
        super().__init__()
        self.model = model
        self.config = config
        self.attentions, step = memory_attentions(model, config)
        self.window = resolve_window(model, config)
        if any(serves(attention, step) for attention in self.attentions):
            raise RuntimeError("`model` has a memory already: `remove()` the other attachment first.")
        with self.installing():
            for attention in self.attentions:
                self.serve(attention, step, offer_memory)

    def __repr__(self) -> str:
        first, last = layer_range(self.config, len(self.attentions))
        state = "" if self.is_attached else ", removed"
        rule = keys_rule(self.config, self.window)
        layers = f"layers {first} to {last - 1}, window {self.window}"
        return f"Unlimited({type(self.model).__name__}, {rule}, {layers}{state})"

    def remember(self, input_ids: Tensor, attention_mask: Tensor | None = None, progress: bool = False) -> Memory:
        """Read documents once, in windows, without gradient.

        Args:
            input_ids: (documents, longest), left- or right-padded.
            attention_mask: like `input_ids`, 1 for real tokens.
            progress: show a bar.

        Raises:
            ValueError: an input that cannot be read, or a document beyond the trained length under "true" positions.
            RuntimeError: the attachment was removed.
        """
        self.check_attached()
        return remember(self.model, self.config, (input_ids, attention_mask), progress)

    def generate(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, progress: bool = False, **options: Any
    ) -> Any:
        """Remember and generate in one call; options go to `model.generate`.

        Of a decoder's input the last `local_tokens` stay in ordinary attention and everything before them is
        remembered; an input no longer than that is generated from by the stock model.

        Returns:
            What `model.generate` returns; a decoder's sequences begin with their local tokens.
        """
        self.check_attached()
        if self.model.config.is_encoder_decoder:
            memory = self.remember(input_ids, attention_mask, progress)
            inputs = memory.inputs(max_new_tokens=new_tokens(self.model, options))
        else:
            inputs = self.split(input_ids, attention_mask, progress, new_tokens(self.model, options))
        return self.model.generate(**inputs, **options)  # type: ignore[operator]

    def split(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        progress: bool = False,
        max_new_tokens: int = 0,
    ) -> dict[str, Any]:
        """Inputs for a decoder: the last `local_tokens` of each row, behind a memory of all before them."""
        self.check_attached()
        documents = (input_ids, attention_mask)
        memory, local, mask = split_documents(self.model, self.config, documents, progress)
        if memory is None:
            return {"input_ids": local, "attention_mask": mask}
        return memory.inputs(local, mask, max_new_tokens=max_new_tokens)

    def record(self) -> AbstractContextManager[AttentionReport]:
        """Give one report to every cache this thread makes inside the `with`."""
        self.check_attached()
        return recording()


def new_tokens(model: PreTrainedModel, options: dict[str, Any]) -> int:
    """The `max_new_tokens` that `model.generate(**options)` will go by, 0 if it goes by another limit."""
    generation = options.get("generation_config") or model.generation_config
    return options.get("max_new_tokens", generation.max_new_tokens) or 0


def remember(
    model: PreTrainedModel, config: UnlimiformerConfig, documents: Documents, progress: bool = False
) -> Memory:
    """Read documents with a model whose attention is served."""
    window = resolve_window(model, config)
    real = real_tokens(*documents, model.config.vocab_size)
    if model.config.is_encoder_decoder:
        return remember_encoded(model, memory_attentions(model, config)[0], config, window, real, progress)
    trained = model.config.max_position_embeddings
    if config.positions == "true" and int(real[1].max()) > trained and not has_scaled_positions(model.config):
        raise ValueError(
            f'`positions` "true" places {int(real[1].max())} tokens, and the model was trained on {trained}: '
            'use "squeeze" or "origin".'
        )
    return remember_decoded(model, config, window, real, progress)


def split_documents(
    model: PreTrainedModel, config: UnlimiformerConfig, documents: Documents, progress: bool = False
) -> tuple[Memory | None, Tensor, Tensor]:
    """Split each row of a decoder's input into a memory and the last `local_tokens`.

    Returns:
        The memory, None if no row is longer than `local_tokens`; the local tokens (rows, at most local_tokens),
        left-padded, and their mask.

    Raises:
        ValueError: some rows are longer than `local_tokens` and some are not.
    """
    ids, lengths = real_tokens(*documents, model.config.vocab_size)
    local = lengths.clamp(max=config.local_tokens)
    before = lengths - local
    device = device_of(model)
    ids = ids.to(device)
    width = int(local.max())
    columns = torch.arange(width) + (lengths - width)[:, None]
    mask = (torch.arange(width) >= (width - local)[:, None]).to(device, torch.long)
    question = ids.gather(1, columns.clamp(min=0).to(device)) * mask
    if int(before.max()) == 0:
        return None, question, mask
    if int(before.min()) == 0:
        raise ValueError(
            f"`input_ids` holds a document of {int(lengths.min())} tokens, no longer than `local_tokens` "
            f"{config.local_tokens}, beside one of {int(lengths.max())}: give them in separate calls."
        )
    longest = int(before.max())
    kept = (torch.arange(longest) < before[:, None]).to(device, torch.long)
    return remember(model, config, (ids[:, :longest], kept), progress), question, mask


def unlimiform(model: PreTrainedModel, config: UnlimiformerConfig | None = None) -> Unlimited:
    """Let attention in `model` read a memory of documents of any length until the attachment is removed.

    Nothing of the model is replaced: an attention function is registered for the modules concerned, and the memory
    travels in the cache. A forward without a memory in its cache is the stock model's, bit for bit, in train and eval.

        with unlimiform(model, UnlimiformerConfig(keys_per_query=64)) as unlimited:
            memory = unlimited.remember(input_ids)
            answer = model.generate(**memory.inputs(question_ids), max_new_tokens=50)

    Args:
        model: an encoder-decoder of the BART family, or a decoder of the Llama architecture.
        config: the options, `UnlimiformerConfig()` by default.

    Raises:
        TypeError: the model is of no supported family.
        ValueError: an option does not fit the model.
        RuntimeError: the model has a memory already.
    """
    return Unlimited(model, config or UnlimiformerConfig())
