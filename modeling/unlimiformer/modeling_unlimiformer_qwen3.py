"""Qwen3 with a memory for good: reads inputs of any length, generates, saves and loads like any Qwen3."""

from transformers import Qwen3ForCausalLM

from ...configuration.configuration_unlimiformer import UnlimiformerQwen3Config
from .long_prompts import ReadsLongPrompts


class UnlimiformerQwen3ForCausalLM(ReadsLongPrompts, Qwen3ForCausalLM):
    """A Qwen3ForCausalLM that remembers all of a long input but its end. Loads stock Qwen3 checkpoints unchanged."""

    config_class = UnlimiformerQwen3Config
