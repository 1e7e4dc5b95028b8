"""`unlimiform(model, config)`: give a model people already have a memory, until it is taken away again."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from ...configuration.configuration_unlimiformer import UnlimiformerConfig
from ..attachment import Attachment, serves
from .attend import offer_memory
from .calibration import Calibration, calibrate, far_attention
from .families import encoder_decoder_family, memory_layers
from .given_documents import check_global
from .index_recall import indexed
from .keys_rule import keys_rule
from .memory import Memory
from .memory_attentions import memory_attentions
from .memory_size import MemorySize, documents_of, resolve_window
from .read_documents import append, remember, size_of, split_documents
from .report import AttentionReport, HeadPlace, recording
from .retrieval_heads import retrieval_heads
from .swapped_cross_attention import SwappedCrossAttention, add_causal_mask


def _spelt(layers: tuple[int, ...]) -> str:
    """The layers that hold memory, in words: a range where they follow each other, else each of them."""
    if layers == tuple(range(layers[0], layers[-1] + 1)):
        return f"layers {layers[0]} to {layers[-1]}"
    return f"layers {', '.join(map(str, layers))}"


class Unlimited(Attachment):
    """A model with a memory: remembers documents, generates from them; `remove()` or the end of a `with` undoes it."""

    def __init__(self, model: PreTrainedModel, config: UnlimiformerConfig) -> None:
        super().__init__()
        self.model = model
        self.config = config
        self.attentions, step = memory_attentions(model, config)
        self.window = resolve_window(model.config, config)
        if any(serves(module, step) or isinstance(module, SwappedCrossAttention) for module in self.attentions):
            raise RuntimeError("`model` has a memory already: `remove()` the other attachment first.")
        with self.installing():
            if model.config.is_encoder_decoder and encoder_decoder_family(model.config).lacks_causal_mask:
                self.before(model.get_decoder(), add_causal_mask)
            if model.config.is_encoder_decoder and encoder_decoder_family(model.config).swapped:
                self._swap_modules()
                return
            for attention in self.attentions:
                self.serve(attention, step, offer_memory)

    def _swap_modules(self) -> None:
        """Put a module of ours in place of each cross-attention until removal."""
        theirs = {id(attention) for attention in self.attentions}
        for name, module in list(self.model.named_modules()):
            if id(module) in theirs:
                parent, _, child = name.rpartition(".")
                owner = self.model.get_submodule(parent)
                self.on_removal(setattr, owner, child, module)
                setattr(owner, child, SwappedCrossAttention(module))

    def __repr__(self) -> str:
        state = "" if self.is_attached else ", removed"
        rule = keys_rule(self.config, self.window)
        rule += "" if self.config.index == "exact" else f", index {self.config.index}"
        layers = _spelt(memory_layers(self.config, self.model.config))
        return f"Unlimited({type(self.model).__name__}, {rule}, {layers}, window {self.window}{state})"

    def remember(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        progress: bool = False,
        prefix_ids: Tensor | None = None,
        prefix_mask: Tensor | None = None,
        global_attention_mask: Tensor | None = None,
    ) -> Memory:
        """Read documents once, in windows, without gradient.

        Args:
            input_ids: (documents, longest), left- or right-padded.
            attention_mask: like `input_ids`, 1 for real tokens.
            progress: show a bar.
            prefix_ids: (documents, tokens) that an encoder reads in front of every window, such as a question, so that
                it encodes all of the document in its light (Ivgi et al. 2022, SLED, arXiv 2208.00748); stored once.
            prefix_mask: like `prefix_ids`, 1 for real tokens.
            global_attention_mask: like `input_ids`, 1 for tokens that LED's encoder gives global attention in each
                window that holds them (Beltagy et al. 2020, arXiv 2004.05150); those of a prefix then have it in all.

        Raises:
            ValueError: an input that cannot be read, a document beyond the trained length under "true" positions, a
                memory of more than `max_bytes`, a prefix that leaves a window no room, or of a decoder, or global
                attention of a model that has none.
            RuntimeError: the attachment was removed.
        """
        self.check_attached()
        documents, prefix = (input_ids, attention_mask), (prefix_ids, prefix_mask)
        return remember(self.model, self.config, documents, progress, prefix, global_attention_mask)

    def append(
        self,
        memory: Memory,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        progress: bool = False,
        global_attention_mask: Tensor | None = None,
    ) -> Memory:
        """A memory of the same documents with more behind them, as if all had been remembered at once.

        Only windows that the new tokens change are read. `memory` stays as it is; it says how the result is read
        (`keys_per_query`, `sinks`, ...) and in which dtype it is kept.

        Args:
            memory: made by this model with these options, here or in another process.
            input_ids: (len(memory), longest), left- or right-padded.
            attention_mask: like `input_ids`, 1 for real tokens.
            progress: show a bar.
            global_attention_mask: of the tokens appended, as of `remember`.

        Raises:
            ValueError: other weights or options made the memory, or as `remember`.
            RuntimeError: the attachment was removed.
        """
        self.check_attached()
        documents = (input_ids, attention_mask)
        return append(self.model, memory, self.config, documents, progress, global_attention_mask)

    def indexed(
        self,
        memory: Memory,
        index: str,
        index_parameters: dict[str, int] | None = None,
        index_refine: int | None = None,
        index_recall: float | None = None,
        progress: bool = False,
    ) -> Memory:
        """The same memory, its keys searched another way; the options are those of UnlimiformerConfig.

        Args:
            memory: made by this model; no vector of it is copied.
            index: "exact" to take an index away.
            index_parameters, index_refine, index_recall: of the index.
            progress: show a bar.

        Raises:
            ImportError: faiss is missing.
            ValueError: an option is out of range, or does not fit the keys.
            RuntimeError: the attachment was removed.
        """
        self.check_attached()
        changes: dict[str, Any] = {
            "index": index,
            "index_parameters": index_parameters,
            "index_refine": index_refine,
            "index_recall": index_recall,
        }
        return indexed(self.model, replace(memory, config=replace(memory.config, **changes)), progress)

    def estimate(self, tokens: int | Sequence[int], prefix: int = 0) -> MemorySize:
        """Bytes of the memory of documents of so many tokens, and the windows to be read, `prefix` more in each."""
        return size_of(self.model, self.config, documents_of(tokens, prefix))

    def calibrate(self, memory: Memory, **options: Any) -> Calibration:
        """Choose how a decoder's memory is read by what best predicts the end of its documents, see `calibrate`.

        Args:
            memory: made by this model.
            options: candidates, local_tokens, tokens, margin.
        """
        self.check_attached()
        return calibrate(self.model, memory, **options)

    def far_attention(self, memory: Memory, question_ids: Tensor) -> Tensor:
        """(layers, heads): the share of its attention that each head gives to the memory, see `far_attention`."""
        self.check_attached()
        return far_attention(self.model, memory, question_ids)

    def retrieval_heads(self, memory: Memory, **options: Any) -> list[HeadPlace]:
        """The (layer, head) of a decoder that find what they are asked, the best first, see `retrieval_heads`.

        Args:
            memory: made by this model.
            options: count, probes, tokens.
        """
        self.check_attached()
        return retrieval_heads(self.model, memory, **options)

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        progress: bool = False,
        global_attention_mask: Tensor | None = None,
        **options: Any,
    ) -> Any:
        """Remember and generate in one call; options go to `model.generate`.

        Of a decoder's input the last `local_tokens` stay in ordinary attention and everything before them is
        remembered; an input no longer than that is generated from by the stock model.

        Returns:
            What `model.generate` returns; a decoder's sequences begin with their local tokens.
        """
        self.check_attached()
        if self.model.config.is_encoder_decoder:
            memory = self.remember(input_ids, attention_mask, progress, global_attention_mask=global_attention_mask)
            inputs = memory.inputs(max_new_tokens=new_tokens(self.model, options))
        else:
            check_global(self.model, global_attention_mask)
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


def unlimiform(model: PreTrainedModel, config: UnlimiformerConfig | None = None) -> Unlimited:
    """Let attention in `model` read a memory of documents of any length until the attachment is removed.

    Nothing of the model is replaced: an attention function is registered for the modules concerned, and the memory
    travels in the cache. A forward without a memory in its cache is the stock model's, bit for bit, in train and eval.

        with unlimiform(model, UnlimiformerConfig(keys_per_query=64)) as unlimited:
            memory = unlimited.remember(input_ids)
            answer = model.generate(**memory.inputs(question_ids), max_new_tokens=50)

    Args:
        model: with a language-modelling head, of a family in families.py: docs/memory.md lists them.
        config: the options, `UnlimiformerConfig()` by default.

    Raises:
        TypeError: the model is of no supported family.
        ValueError: an option does not fit the model.
        RuntimeError: the model has a memory already.
    """
    return Unlimited(model, config or UnlimiformerConfig())
