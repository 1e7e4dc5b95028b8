"""Llama with a memory for good: reads inputs of any length, generates, saves and loads like any Llama."""

from transformers import LlamaForCausalLM

from ...configuration.configuration_unlimiformer import UnlimiformerLlamaConfig
from .long_prompts import ReadsLongPrompts


class UnlimiformerLlamaForCausalLM(ReadsLongPrompts, LlamaForCausalLM):
    """A LlamaForCausalLM that remembers all of a long input but its end. Loads stock Llama checkpoints unchanged."""

    config_class = UnlimiformerLlamaConfig
