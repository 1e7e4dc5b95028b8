"""BART with a memory for good: reads inputs of any length, trains, generates, saves and loads like any BART."""

from transformers import BartForConditionalGeneration

from ...configuration.configuration_unlimiformer import UnlimiformerBartConfig
from .long_sources import ReadsLongSources


class UnlimiformerBart(ReadsLongSources, BartForConditionalGeneration):
    """A BartForConditionalGeneration whose decoder reads the whole of a long input (Bertsch et al. 2023).

    Loads stock BART checkpoints and the original's published ones unchanged.
    """

    config_class = UnlimiformerBartConfig
