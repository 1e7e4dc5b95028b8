"""T5 with a memory for good: reads inputs of any length, trains, generates, saves and loads like any T5."""

from transformers import T5ForConditionalGeneration

from ...configuration.configuration_unlimiformer import UnlimiformerT5Config
from .long_sources import ReadsLongSources


class UnlimiformerT5ForConditionalGeneration(ReadsLongSources, T5ForConditionalGeneration):
    """A T5ForConditionalGeneration whose decoder reads the whole of a long input; loads stock T5 checkpoints.

    T5 has no table of positions to take a window from: it is 512 tokens, or `unlimiformer_config.window`.
    """

    config_class = UnlimiformerT5Config
