"""Llama with a memory for good: reads inputs of any length, generates, saves and loads like any Llama."""

from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

from ...configuration.configuration_unlimiformer import UnlimiformerLlamaConfig
from ..attachment import serve
from ..remote_code import SavesItsCode
from ..transformers_compat import cache_of, take_cache
from .attach import memory_attentions, remember, split_inputs
from .attend import offer_memory
from .memory import Memory


class UnlimiformerLlamaForCausalLM(SavesItsCode, LlamaForCausalLM):
    """A LlamaForCausalLM that remembers all of a long input but its end, and answers from the memory.

    The last `local_tokens` of an input stay in ordinary attention; what stands before them is read in windows and
    remembered, by the options in `config.unlimiformer_config`. Inputs no longer than that, and training, are the
    stock model's, bit for bit. Loads stock Llama checkpoints unchanged.
    """

    config_class = UnlimiformerLlamaConfig
    auto_classes = ("AutoModelForCausalLM",)

    def __init__(self, config: UnlimiformerLlamaConfig) -> None:
        super().__init__(config)
        attentions, step = memory_attentions(self, config.unlimiformer_config)
        for attention in attentions:
            serve(attention, step)
            attention.register_forward_pre_hook(offer_memory, with_kwargs=True)

    def remember(self, input_ids: Tensor, attention_mask: Tensor | None = None, progress: bool = False) -> Memory:
        """Read documents (documents, longest) of any length once; any number of questions may be asked of them."""
        options = self.config.unlimiformer_config
        attentions, _ = memory_attentions(self, options)
        return remember(self, attentions, options, (input_ids, attention_mask), progress)

    def split(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> dict[str, Any]:
        """Inputs for the last `local_tokens` of each row, left-padded, behind a memory of all before them."""
        options = self.config.unlimiformer_config
        attentions, _ = memory_attentions(self, options)
        return split_inputs(self, attentions, options, (input_ids, attention_mask))

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """As Llama's forward; in eval mode, an input longer than `local_tokens` gives logits and loss of its end only.

        Args:
            input_ids, attention_mask: (batch, source), of any length.
            labels: like `input_ids`, -100 on all tokens that are remembered.
            kwargs: as in Llama. With a cache, embeddings or positions of your own the stock forward runs.

        Returns:
            Logits (batch, at most local_tokens, vocab_size) where a memory was made.

        Raises:
            ValueError: a label stands on a remembered token.
        """
        local = self.config.unlimiformer_config.local_tokens
        is_plain = input_ids is not None and cache_of(kwargs) is None and kwargs.get("position_ids") is None
        if self.training or not is_plain or input_ids.shape[1] <= local:  # type: ignore[union-attr]
            return super().forward(input_ids, attention_mask=attention_mask, labels=labels, **kwargs)
        assert input_ids is not None
        inputs = self.split(input_ids, attention_mask)
        if labels is not None:
            inputs["labels"] = self._local_labels(labels, attention_mask, inputs["input_ids"].shape[1])
        take_cache(kwargs)
        return super().forward(**{**kwargs, **inputs})

    def _local_labels(self, labels: Tensor, attention_mask: Tensor | None, width: int) -> Tensor:
        """The labels of the last `width` real tokens of each row."""
        real = torch.ones_like(labels) if attention_mask is None else attention_mask
        ends = labels.shape[1] - real.flip(1).argmax(1)  # one past the last real token
        columns = (ends[:, None] - width + torch.arange(width, device=labels.device)).clamp(min=0)
        kept = labels.gather(1, columns)
        if int((labels != -100).sum()) != int((kept != -100).sum()):
            raise ValueError(
                f"`labels` stand on more than the last {width} tokens of a row (`local_tokens`): set the others to "
                "-100, remembered tokens get no loss."
            )
        return kept

    def generate(self, inputs: Tensor | None = None, **kwargs: Any) -> Any:
        """As `generate` of any model, for inputs of any length; the sequences returned begin with the whole input."""
        input_ids = kwargs.pop("input_ids", None) if inputs is None else inputs
        options = self.config.unlimiformer_config
        is_plain = input_ids is not None and cache_of(kwargs) is None and kwargs.get("use_cache") is not False
        if not is_plain or input_ids.shape[1] <= options.local_tokens:
            return super().generate(input_ids, **kwargs)
        given = self.split(input_ids, kwargs.pop("attention_mask", None))
        generated = super().generate(**given, **kwargs)
        return _with_whole_input(generated, input_ids, given["input_ids"].shape[1])


def _with_whole_input(generated: Any, input_ids: Tensor, local: int) -> Any:
    """Put the whole input in front of what was generated after its last `local` tokens."""
    sequences = generated if isinstance(generated, Tensor) else generated.sequences
    whole = input_ids.repeat_interleave(sequences.shape[0] // input_ids.shape[0], dim=0).to(sequences.device)
    sequences = torch.cat([whole, sequences[:, local:]], dim=1)
    if isinstance(generated, Tensor):
        return sequences
    generated.sequences = sequences
    return generated
