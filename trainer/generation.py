"""A saved model reads one document and answers: what scripts/generate.py does, as a function.

A decoder remembers the prefix and the document; the question and the suffix stay apart, in ordinary attention, so they
are never what a long document pushes out. An encoder-decoder reads all of it as one source, the question first.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field, replace
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
    PreTrainedTokenizerBase,
    TextStreamer,
)

import graft.registration  # noqa: F401  (our own classes load without consent to remote code)
from graft.configuration.configuration_unlimiformer import UnlimiformerConfig
from graft.modeling.unlimiformer.attach import unlimiform
from graft.modeling.unlimiformer.memory import Memory
from graft.modeling.unlimiformer.report import Passage, recording
from graft.trainer.abilities import MEMORY_FILE, has_own_memory
from graft.trainer.collators import padding_id
from graft.trainer.command_line import split_overrides, typed_value
from graft.trainer.configuration_error import ConfigurationError
from graft.trainer.kernel_repositories import refuse_kernel_repositories
from graft.trainer.tokenisation import plain_ids, special_tokens_around

logger = logging.getLogger(__name__)

_MARK = "\N{OBJECT REPLACEMENT CHARACTER}document\N{OBJECT REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class Request:
    """What to generate from.

    Args:
        model: a folder or id: any model, an adapter, or a folder that a run has written.
        document: the text that is read; of any length if there is a memory.
        prefix, suffix: texts around document and question, such as a chat's marks.
        question: asked after the document.
        chat: take prefix and suffix from the tokenizer's chat template.
        memory: options laid over those in the folder's memory.json; None for no memory at all.
        generation: fields of `GenerationConfig`.
        trust_remote_code: the model's own code may run.
        report: where to write the page of what was read, or None.
        streams: write the text to standard output while it is made.
    """

    model: str
    document: str
    prefix: str = ""
    suffix: str = ""
    question: str = ""
    chat: bool = False
    memory: Mapping[str, Any] | None = field(default_factory=dict)
    generation: Mapping[str, Any] = field(default_factory=dict)
    trust_remote_code: bool = False
    report: Path | None = None
    streams: bool = False


@dataclass(frozen=True)
class Answer:
    """The generated text, how many tokens were read for it, and the passages most read if they were recorded."""

    text: str
    source_tokens: int
    passages: list[Passage]


def answer(request: Request) -> Answer:
    """Load the model, read the document, generate; the attached memory is removed again.

    Raises:
        ConfigurationError: the model cannot be loaded, has no attention that memory serves, or an option is wrong.
    """
    check_generation(request.generation)
    model, tokenizer = load(request.model, request.trust_remote_code)
    request = _with_chat(request, tokenizer) if request.chat else request
    options = {"pad_token_id": padding_id(tokenizer), **request.generation}
    if request.streams and options.get("num_beams", 1) == 1:
        options["streamer"] = TextStreamer(
            tokenizer, skip_prompt=not model.config.is_encoder_decoder, skip_special_tokens=True
        )
    if request.memory is None:
        if request.report is not None:
            raise ConfigurationError("`--report` shows what was read of the memory, and `--no-memory` leaves it out.")
        inputs, source_tokens = _plain_inputs(request, model, tokenizer)
        return Answer(_generated(model, tokenizer, inputs, options), source_tokens, [])
    return _with_memory(request, model, tokenizer, options)


def text_of(prompt: str) -> str:
    """The document that `--prompt` names or is: a file, standard input for "-", or the text itself."""
    if prompt == "-":
        return sys.stdin.read()
    try:
        is_file = Path(prompt).is_file()
    except (OSError, ValueError):  # too long for a name, or with a zero in it
        is_file = False
    return Path(prompt).read_text(encoding="utf-8") if is_file else prompt


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
    if unknown := sorted(set(options) - set(vars(GenerationConfig()))):
        raise ConfigurationError(f"Generation options: `GenerationConfig` has no {', '.join(unknown)}.")
    try:
        GenerationConfig(**options).validate(strict=True)
    except (ValueError, TypeError) as error:
        raise ConfigurationError(f"Generation options: {' '.join(str(error).split())}") from error


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
    try:
        return UnlimiformerConfig(**{**options, **given})
    except Exception as error:  # a strict dataclass raises an error of its own, which is no ValueError
        raise ConfigurationError(f"Memory options: {' '.join(str(error.__cause__ or error).split())}") from error


def _with_memory(
    request: Request, model: Any, tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any]
) -> Answer:
    config = memory_options(request.model, request.memory or {})
    if has_own_memory(model) and request.memory:
        raise ConfigurationError("The model has its own memory: `--memory.*` options would do nothing.")
    with ExitStack() as stack:
        try:
            own = has_own_memory(model)
            reader: Any = stack.enter_context(nullcontext(model) if own else unlimiform(model, config))
        except (TypeError, ValueError) as error:
            raise ConfigurationError(f"{error} `--no-memory` generates without one.") from error
        report = stack.enter_context(recording()) if request.report is not None else None
        if model.config.is_encoder_decoder:
            ids = _source_ids(request, model, tokenizer, _whole(request, encoder=True))
            inputs = _remembered(reader, ids).inputs()
        else:
            local_tokens = model.config.unlimiformer_config.local_tokens if own else config.local_tokens
            ids, local = _split(request, model, tokenizer, local_tokens)
            inputs = _remembered(reader, ids).inputs(local) if ids.shape[1] else _unpadded(local)
        text = _generated(model, tokenizer, inputs, options)
    if report is None or not report.steps:
        return Answer(text, ids.shape[1], [])
    assert request.report is not None
    report.heatmap(tokenizer, request.report, answer=text)
    return Answer(text, ids.shape[1], report.passages(tokenizer))


def _remembered(reader: Any, ids: torch.Tensor) -> Memory:
    """Say what reading will cost, then read."""
    logger.info("Remembering %s tokens: %s.", f"{ids.shape[1]:,}", reader.estimate(ids.shape[1]))
    memory: Memory = reader.remember(ids)
    return memory


def _unpadded(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _split(
    request: Request, model: Any, tokenizer: PreTrainedTokenizerBase, local_tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids that are remembered and ids that stay local: question and suffix, or else the document's last tokens."""
    ids = _source_ids(request, model, tokenizer, request.prefix + request.document)
    apart = _question(request) + request.suffix
    if not apart:
        return ids[:, :-local_tokens], ids[:, -local_tokens:]
    return ids, torch.tensor(plain_ids(tokenizer, [apart]), dtype=torch.long, device=model.device)


def _plain_inputs(
    request: Request, model: Any, tokenizer: PreTrainedTokenizerBase
) -> tuple[dict[str, torch.Tensor], int]:
    ids = _source_ids(request, model, tokenizer, _whole(request, model.config.is_encoder_decoder))
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and ids.shape[1] > positions:
        raise ConfigurationError(
            f"The text has {ids.shape[1]} tokens, the model {positions} positions: use the memory."
        )
    return _unpadded(ids), ids.shape[1]


def _whole(request: Request, encoder: bool) -> str:
    if encoder:  # where everything is one source, the question stands first, as in training with a prefix
        asked = f"{request.question}\n\n" if request.question else ""
        return request.prefix + asked + request.document + request.suffix
    return request.prefix + request.document + _question(request) + request.suffix


def _question(request: Request) -> str:
    return f"\n\n{request.question}" if request.question else ""


def _source_ids(request: Request, model: Any, tokenizer: PreTrainedTokenizerBase, text: str) -> torch.Tensor:
    """(1, tokens), with the special tokens that start a sequence; those that end one are for encoders only."""
    before, after = ([], []) if request.chat else special_tokens_around(tokenizer)
    end = after if model.config.is_encoder_decoder else []
    return torch.tensor([[*before, *plain_ids(tokenizer, [text])[0], *end]], dtype=torch.long, device=model.device)


def _generated(
    model: Any, tokenizer: PreTrainedTokenizerBase, inputs: Mapping[str, Any], options: Mapping[str, Any]
) -> str:
    with torch.no_grad():
        sequences = model.generate(**inputs, **options)
    prompt = 0 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
    return str(tokenizer.decode(sequences[0, prompt:], skip_special_tokens=True)).strip()


def chat_frame(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """What the tokenizer's chat template writes before and after a user's message, up to where the answer begins."""
    message = [{"role": "user", "content": _MARK}]
    rendered = str(tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False))
    prefix, _, suffix = rendered.partition(_MARK)
    return prefix, suffix


def _with_chat(request: Request, tokenizer: PreTrainedTokenizerBase) -> Request:
    """Prefix and suffix as the chat template writes them around a user's message.

    Raises:
        ConfigurationError: the tokenizer has no chat template.
    """
    if tokenizer.chat_template is None:
        raise ConfigurationError(f"`--chat` needs a chat template, and the tokenizer of {request.model!r} has none.")
    prefix, suffix = chat_frame(tokenizer)
    return replace(request, prefix=prefix + request.prefix, suffix=request.suffix + suffix)
