"""What generating from a saved model takes: the model and its tokenizer, checked options, a chat's frame."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, cast, get_type_hints

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
from transformers.utils.hub import cached_file
from transformers.utils.peft_utils import find_adapter_config_file

import graft.registration  # noqa: F401  (our own classes load without consent to remote code)
from graft.configuration.configuration_unlimiformer import UnlimiformerConfig
from graft.trainer.abilities import MEMORY_FILE
from graft.trainer.command_line import split_overrides, typed_value
from graft.trainer.configuration_error import ConfigurationError
from graft.trainer.kernel_repositories import (
    refuse_kernel_repositories,
    warn_of_unpinned_code,
    warn_of_unpinned_tokenizer,
)

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


def load(
    name: str, trust_remote_code: bool = False, revision: str | None = None
) -> tuple[Any, PreTrainedTokenizerBase]:
    """The model in eval mode, on an accelerator if there is one, and its tokenizer.

    Args:
        name: folder or id of a model or of an adapter, whose config says which revision of its base it is for.
        revision: commit, tag or branch of the id; code that no commit pins warns.

    Raises:
        ConfigurationError: nothing can be loaded from `name`, or a folder is given a revision.
    """
    if revision is not None and Path(name).exists():
        raise ConfigurationError(f"`revision` {revision!r} would do nothing: {name!r} is a folder.")
    whole = (Path(name) / "config.json").is_file()  # an adapter saved beside its base loads with it
    try:
        adapter = None if whole else find_adapter_config_file(name, revision=revision)
        base, of_base = name, revision
        if adapter is not None:
            described = PeftConfig.from_pretrained(name, revision=revision)
            base, of_base = str(described.base_model_name_or_path), described.revision
        options: dict[str, Any] = {"revision": of_base, "trust_remote_code": trust_remote_code}
        config = AutoConfig.from_pretrained(base, **options)
        refuse_kernel_repositories(config, base, trust_remote_code)
        warn_of_unpinned_code(config, base, of_base, trust_remote_code)
        auto: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        model = auto.from_pretrained(base, dtype="auto", use_safetensors=True, **options)
        if adapter is not None:
            model.load_adapter(name, adapter_kwargs={"revision": revision})
        tokenizer = tokenizer_of([(name, revision), (base, of_base)], trust_remote_code)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise ConfigurationError(f"`model` {name!r} cannot be loaded: {' '.join(str(error).split())}") from error
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), tokenizer


def tokenizer_of(places: Sequence[tuple[str, str | None]], trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """The tokenizer of the first (name, revision) that has one; its code warns where no commit pins it.

    Raises:
        OSError, ValueError, KeyError, TypeError: none has one; that of the last.
    """
    for name, revision in places[:-1]:
        try:
            return _tokenizer(name, revision, trust_remote_code)
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return _tokenizer(*places[-1], trust_remote_code)


def _tokenizer(name: str, revision: str | None, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    warn_of_unpinned_tokenizer(tokenizer, name, revision)
    return cast(PreTrainedTokenizerBase, tokenizer)


def memory_options(name: str, given: Mapping[str, Any], revision: str | None = None) -> UnlimiformerConfig:
    """The options in the memory.json of a folder or repository, under those given.

    Raises:
        ConfigurationError: an option is unknown or out of range.
    """
    saved = Path(name) / MEMORY_FILE
    if not Path(name).exists():  # an id: the file is downloaded, or there is none
        saved = Path(_downloaded(name, MEMORY_FILE, revision) or saved)
    options = json.loads(saved.read_text(encoding="utf-8")) if saved.is_file() else {}
    known = {field.name for field in fields(UnlimiformerConfig)}
    if unknown := sorted(set(given) - known):
        raise ConfigurationError(f"Memory options: there is no {unknown[0]!r}; there are {', '.join(sorted(known))}.")
    try:
        return UnlimiformerConfig(**{**options, **given})
    except Exception as error:  # a strict dataclass raises an error of its own, which is no ValueError
        raise ConfigurationError(f"Memory options: {' '.join(str(error.__cause__ or error).split())}") from error


def _downloaded(name: str, file: str, revision: str | None) -> str | None:
    try:
        return cached_file(name, file, revision=revision, _raise_exceptions_for_missing_entries=False)
    except OSError:  # there is no such repository, or no network: loading the model says which
        return None


def chat_frame(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """What the tokenizer's chat template writes before and after a user's message, up to where the answer begins."""
    message = [{"role": "user", "content": _MARK}]
    rendered = str(tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False))
    prefix, _, suffix = rendered.partition(_MARK)
    return prefix, suffix
