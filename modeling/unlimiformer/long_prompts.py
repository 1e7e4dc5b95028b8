"""What the permanent decoders share: `forward` and `generate` take prompts of any length."""

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..transformers_compat import cache_of, without_cache
from .attach import new_tokens
from .built_in_memory import BuiltInMemory
from .memory import Memory
from .read_documents import split_documents


class ReadsLongPrompts(BuiltInMemory, GenerationMixin):
    """Goes before a decoder in the bases: it remembers all of a long input but its end, and answers from the memory.

    The last `local_tokens` of an input stay in ordinary attention; what stands before them is read in windows and
    remembered, by the options in `config.unlimiformer_config`. Inputs no longer than that, and training, are the
    stock model's, bit for bit.
    """

    auto_classes = ("AutoModelForCausalLM",)

    def split(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, progress: bool = False
    ) -> tuple[Memory | None, Tensor, Tensor]:
        """A memory of all but the last `local_tokens` of each row, None if nothing stands before them; those, masked.

        Returns:
            The memory, the local tokens (batch, at most local_tokens), left-padded, and their mask.
        """
        return split_documents(self, self.config.unlimiformer_config, (input_ids, attention_mask), progress)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        memory: Memory | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """As the stock model's; in eval mode an input longer than `local_tokens` gives logits and loss of its end.

        Args:
            input_ids, attention_mask: (batch, source), of any length.
            labels: like `input_ids`, -100 on all tokens that are remembered.
            memory: documents remembered before, which `input_ids` follow.
            kwargs: as in the stock model. With a cache, embeddings or positions of your own the stock forward runs.

        Returns:
            Logits (batch, at most local_tokens, vocab_size) where a memory was made.

        Raises:
            ValueError: a label stands on a remembered token.
        """
        local = self.config.unlimiformer_config.local_tokens
        if input_ids is not None and cache_of(kwargs) is None:
            if memory is not None:
                return self._read(memory, input_ids, attention_mask, labels, kwargs)
            is_long = input_ids.shape[1] > local and (
                attention_mask is None or int(attention_mask.sum(1).max()) > local
            )
            if is_long and not self.training and kwargs.get("position_ids") is None:
                memory, question, mask = self.split(input_ids, attention_mask)
                if labels is not None:
                    labels = self._local_labels(labels, attention_mask, question.shape[1])
                assert memory is not None
                return self._read(memory, question, mask, labels, kwargs)
        return super().forward(input_ids, attention_mask=attention_mask, labels=labels, **kwargs)

    def _read(
        self,
        memory: Memory,
        question: Tensor,
        mask: Tensor | None,
        labels: Tensor | None,
        kwargs: dict[str, Any],
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Forward of `question` behind a memory, in a fresh cache."""
        given = {name: value for name, value in kwargs.items() if name not in ("cache", "past_key_values")}
        output = super().forward(**{**given, "labels": labels, **memory.inputs(question, mask)})
        return without_cache(output) if kwargs.get("use_cache") is False else output

    def _local_labels(self, labels: Tensor, attention_mask: Tensor | None, width: int) -> Tensor:
        """The labels of the last `width` real tokens of each row."""
        real = torch.ones_like(labels) if attention_mask is None else attention_mask
        ends = labels.shape[1] - real.flip(1).argmax(1)  # one past the last real token
        columns = ends[:, None] - width + torch.arange(width, device=labels.device)
        kept = labels.gather(1, columns.clamp(min=0)).masked_fill(columns < 0, -100)
        if int((labels != -100).sum()) != int((kept != -100).sum()):
            raise ValueError(
                f"`labels` stand on more than the last {width} tokens of a row (`local_tokens`): set the others to "
                "-100, remembered tokens get no loss."
            )
        return kept

    def generate(self, inputs: Tensor | None = None, **kwargs: Any) -> Any:
        """As `generate` of any model, for inputs of any length; the sequences returned begin with the whole input."""
        input_ids = kwargs.pop("input_ids", None) if inputs is None else inputs
        if input_ids is None or cache_of(kwargs) is not None or kwargs.get("memory") is not None:
            return super().generate(input_ids, **kwargs)
        memory, question, mask = None, None, None
        if input_ids.shape[1] > self.config.unlimiformer_config.local_tokens:
            memory, question, mask = self.split(input_ids, kwargs.get("attention_mask"))
        if memory is None or question is None:
            return super().generate(input_ids, **kwargs)
        kwargs.pop("attention_mask", None)
        given = memory.inputs(question, mask, max_new_tokens=new_tokens(self, kwargs))
        if kwargs.get("use_cache") is False:  # each step then makes a fresh cache from the memory
            generated = super().generate(question, attention_mask=mask, memory=memory, **kwargs)
        else:
            generated = super().generate(**given, **kwargs)
        return _with_whole_input(generated, input_ids, question.shape[1])


def _with_whole_input(generated: Any, input_ids: Tensor, local: int) -> Any:
    """Put the whole input in front of what was generated after its last `local` tokens."""
    sequences = generated if isinstance(generated, Tensor) else generated.sequences
    whole = input_ids.repeat_interleave(sequences.shape[0] // input_ids.shape[0], dim=0).to(sequences.device)
    sequences = torch.cat([whole, sequences[:, local:]], dim=1)
    if isinstance(generated, Tensor):
        return sequences
    generated.sequences = sequences
    return generated
