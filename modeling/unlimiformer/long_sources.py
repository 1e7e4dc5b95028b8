"""What the permanent encoder-decoders share: `forward` and `generate` take sources of any length."""

from typing import Any

from torch import Tensor
from transformers import GenerationMixin
from transformers.modeling_outputs import Seq2SeqLMOutput

from ..transformers_compat import cache_of, take_cache, without_cache
from .attach import new_tokens
from .built_in_memory import BuiltInMemory
from .memory import Memory
from .memory_size import resolve_window
from .remember import first_window

_REFUSED = {
    "cache_implementation": "the memory lies in a cache of its own",
    "guidance_scale": "what it is compared with has no document",
    "assistant_model": "it has not read the document; `prompt_lookup_num_tokens` needs no other model",
}
"""Options of `generate` that do not go with a memory, and why."""


class ReadsLongSources(BuiltInMemory, GenerationMixin):
    """Goes before an encoder-decoder in the bases: its decoder reads the whole of a long input.

    In eval mode `forward` and `generate` remember `input_ids` of any length, by the options in
    `config.unlimiformer_config`, and answer from the memory. In train mode the model sees the first window, which is
    the paper's standard training.
    """

    auto_classes = ("AutoModelForSeq2SeqLM",)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: Any = None,
        labels: Tensor | None = None,
        memory: Memory | None = None,
        **kwargs: Any,
    ) -> Seq2SeqLMOutput | tuple[Any, ...]:
        """As the stock model's forward, with `input_ids` (batch, source) of any length.

        Args:
            input_ids, attention_mask: the documents; in train mode their first window is used.
            memory: read these documents instead, in any mode.
            decoder_input_ids, decoder_attention_mask, encoder_outputs, labels, kwargs: as in the stock model.
        """
        stock = {"decoder_input_ids": decoder_input_ids, "decoder_attention_mask": decoder_attention_mask}
        if memory is None and encoder_outputs is None and input_ids is not None and cache_of(kwargs) is None:
            if self.training:
                window = resolve_window(self.config, self.config.unlimiformer_config)
                input_ids, attention_mask = first_window(input_ids, attention_mask, window)
            else:
                memory = self.remember(input_ids, attention_mask)
        if memory is not None and cache_of(kwargs) is None:
            take_cache(kwargs)
            output = super().forward(labels=labels, **stock, **{**kwargs, **memory.inputs()})
            return without_cache(output) if kwargs.get("use_cache") is False else output
        return super().forward(
            input_ids,
            attention_mask=attention_mask,
            encoder_outputs=encoder_outputs,
            labels=labels,
            **stock,
            **kwargs,
        )

    def generate(self, inputs: Tensor | None = None, **kwargs: Any) -> Any:
        """As `generate` of any model, for inputs of any length; `memory=` asks documents remembered before.

        Raises:
            ValueError: an option that does not go with a memory; names it.
        """
        input_ids = kwargs.pop("input_ids", None) if inputs is None else inputs
        memory = kwargs.pop("memory", None)
        if memory is None and (input_ids is None or kwargs.get("encoder_outputs") is not None):
            return super().generate(input_ids, **kwargs)
        _refuse_options(kwargs, kwargs.get("generation_config") or self.generation_config)
        if memory is None:
            memory = self.remember(input_ids, kwargs.pop("attention_mask", None))
        given = memory.inputs(max_new_tokens=new_tokens(self, kwargs))
        if kwargs.get("use_cache") is False:  # each step then makes a fresh cache from the memory
            given = {"encoder_outputs": given["encoder_outputs"], "attention_mask": given["attention_mask"]}
            return super().generate(memory=memory, **given, **kwargs)
        return super().generate(**given, **kwargs)


def _refuse_options(options: dict[str, Any], defaults: Any) -> None:
    for name, reason in _REFUSED.items():
        if options.get(name, getattr(defaults, name, None)) is not None:
            raise ValueError(f"`{name}` does not go with the memory of an encoder-decoder: {reason}. Leave it out.")
