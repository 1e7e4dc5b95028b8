"""What generating from a saved model takes: the model and its tokenizer, checked options, a chat's frame."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import torch
from peft import PeftConfig
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

import graft.registration  # noqa: F401  (our own classes load without consent to remote code)
from graft.configuration.configuration_unlimiformer import UnlimiformerConfig
from graft.trainer.abilities import MEMORY_FILE
from graft.trainer.command_line import split_overrides, typed_value
from graft.trainer.configuration_error import ConfigurationError
from graft.trainer.kernel_repositories import refuse_kernel_repositories, warn_of_unpinned_code

ANSWER_TOKENS = 100
"""New tokens of an answer, at most, where neither the user nor the model's own generation config limits it."""
_MARK = "\N{OBJECT REPLACEMENT CHARACTER}document\N{OBJECT REPLACEMENT CHARACTER}"


def options_of(command_line: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options of the memory, `--memory.field value`, and fields of GenerationConfig, `--field value`.

    Raises:
        ValueError: something is no option.
    """
    memory: dict[str, Any] = {}
    generation: dict[str, Any] = {}
    hints = get_type_hints(UnlimiformerConfig)
    for option in split_overrides(command_line):
        name = option.path.removeprefix("memory.")
        if name != option.path:
            memory[name] = typed_value(option.values, hints.get(name, Any))
        else:
            generation[name] = typed_value(option.values, Any)
    return memory, generation


def check_generation(options: Mapping[str, Any]) -> None:
    """Refuse what is no field of `GenerationConfig`, or does not go together, before anything is loaded.

    Raises:
        ConfigurationError: with the message of `GenerationConfig`, or the name that it does not have.
    """
    known = vars(GenerationConfig())
    if unknown := sorted(set(options) - set(known)):
        nearest = " or ".join(difflib.get_close_matches(unknown[0], known, n=2, cutoff=0.7))
        hint = f"; did you mean {nearest}?" if nearest else "."
        raise ConfigurationError(f"Generation options: `GenerationConfig` has no {', '.join(unknown)}{hint}")
    try:
        GenerationConfig(**options).validate(strict=True)
    except TypeError as error:
        raise ConfigurationError(f"Generation options: a value is of the wrong type in {dict(options)}.") from error
    except ValueError as error:
        raise ConfigurationError(f"Generation options: {' '.join(str(error).split())}") from error


def with_limit(options: Mapping[str, Any], model: PreTrainedModel) -> dict[str, Any]:
    """`options` of a generation, with a limit where neither they nor the model's own generation config have one.

    It is `ANSWER_TOKENS`, or a quarter of few positions; transformers would stop behind 20 tokens.
    """
    own = model.generation_config
    limited = own.max_new_tokens is not None or own.max_length != GenerationConfig().max_length
    if limited or "max_new_tokens" in options or "max_length" in options:
        return dict(options)
    positions = getattr(model.config, "max_position_embeddings", None) or 4 * ANSWER_TOKENS
    return {"max_new_tokens": min(ANSWER_TOKENS, positions // 4), **options}


def load(name: str, trust_remote_code: bool = False) -> tuple[Any, PreTrainedTokenizerBase]:
    """The model in eval mode, on an accelerator if there is one, and its tokenizer.

    Raises:
        ConfigurationError: nothing can be loaded from `name`.
    """
    try:
        is_adapter = (Path(name) / "adapter_config.json").is_file()
        base = PeftConfig.from_pretrained(name).base_model_name_or_path if is_adapter else name
        config = AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code)
        refuse_kernel_repositories(config, str(base), trust_remote_code)
        warn_of_unpinned_code(config, str(base), None, trust_remote_code)
        auto: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        model = auto.from_pretrained(name, trust_remote_code=trust_remote_code, dtype="auto", use_safetensors=True)
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise ConfigurationError(f"`model` {name!r} cannot be loaded: {' '.join(str(error).split())}") from error
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), tokenizer


def memory_options(name: str, given: Mapping[str, Any]) -> UnlimiformerConfig:
    """The options in the folder's memory.json, under those given.

    Raises:
        ConfigurationError: an option is unknown or out of range.
    """
    saved = Path(name) / MEMORY_FILE
    options = json.loads(saved.read_text(encoding="utf-8")) if saved.is_file() else {}
    known = {field.name for field in fields(UnlimiformerConfig)}
    if unknown := sorted(set(given) - known):
        raise ConfigurationError(f"Memory options: there is no {unknown[0]!r}; there are {', '.join(sorted(known))}.")
    try:
        return UnlimiformerConfig(**{**options, **given})
    except Exception as error:  # a strict dataclass raises an error of its own, which is no ValueError
        raise ConfigurationError(f"Memory options: {' '.join(str(error.__cause__ or error).split())}") from error


def chat_frame(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """What the tokenizer's chat template writes before and after a user's message, up to where the answer begins."""
    message = [{"role": "user", "content": _MARK}]
    rendered = str(tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False))
    prefix, _, suffix = rendered.partition(_MARK)
    return prefix, suffix
