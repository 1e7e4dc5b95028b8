"""A `generate` that lends a stock model a memory for one call: what `custom_generate` folders run."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from ...configuration.configuration_unlimiformer import UnlimiformerConfig
from .attach import unlimiform


def generate(
    model: PreTrainedModel,
    inputs: Tensor | None = None,
    memory: Mapping[str, Any] | None = None,
    question_ids: Tensor | None = None,
    question_mask: Tensor | None = None,
    **options: Any,
) -> Any:
    """Read input of any length into a memory, generate from it, and leave the model as it was.

        model.generate(input_ids, custom_generate=folder, trust_remote_code=True, memory={"keys_per_query": 64})

    Args:
        model: any that `unlimiform` serves.
        inputs: (documents, longest), or `input_ids`; with `attention_mask` if lengths differ.
        memory: fields of UnlimiformerConfig.
        question_ids: (documents, target) asked of a decoder behind its documents; without it the last `local_tokens`
            of each document stay in ordinary attention. Of an encoder-decoder: the decoder's prompt.
        question_mask: like `question_ids`, 1 for real tokens.
        options: as of any `generate`.

    Raises:
        TypeError, ValueError: neither `inputs` nor `input_ids` is given, or as `unlimiform` and `remember` do.
    """
    options = {name: value for name, value in options.items() if value is not None}
    ids = inputs if inputs is not None else options.pop("input_ids", None)
    if ids is None:
        raise ValueError("`input_ids` must be given: a memory is made of tokens.")
    mask = options.pop("attention_mask", None)
    with unlimiform(model, UnlimiformerConfig(**(memory or {}))) as unlimited:
        if question_ids is None:
            return unlimited.generate(ids, mask, **options)
        remembered = unlimited.remember(ids, mask)
        return model.generate(**remembered.inputs(question_ids, question_mask), **options)  # type: ignore[operator]
