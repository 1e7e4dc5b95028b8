"""From the blocks `model` and `adapter` to a tokenizer and a model that can be trained; every mistake is one error."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, TaskType, get_peft_model
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import graft.registration  # noqa: F401  (our own classes load without consent to remote code)
from graft.configuration.configuration_unlimiformer import UnlimiformerConfig
from graft.trainer.arguments import AdapterArguments, ModelArguments
from graft.trainer.configuration_error import ConfigurationError
from graft.trainer.kernel_repositories import refuse_kernel_repositories, warn_of_unpinned_code
from graft.trainer.own_adapters import with_own_adapter
from graft.trainer.tokenizer_training import TRAIN, trained_tokenizer
from graft.trainer.trainable_parameters import count_trainable_parameters

logger = logging.getLogger(__name__)

_AUTO_CLASSES: dict[str, Any] = {"seq2seq": AutoModelForSeq2SeqLM, "causal": AutoModelForCausalLM}
# Attention and MLP projections under the names that transformers' models give them; embeddings and heads are not here.
LORA_TARGETS = (
    *("q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "query_key_value", "qkv_proj", "c_attn", "c_proj"),
    *("gate_proj", "up_proj", "down_proj", "gate_up_proj", "fc1", "fc2", "c_fc", "dense_h_to_4h", "dense_4h_to_h"),
    *("q", "k", "v", "o", "wi", "wo", "wi_0", "wi_1"),
)


def load_config(
    model: ModelArguments, memory: UnlimiformerConfig | None = None, trust_remote_code: bool = False
) -> PreTrainedConfig:
    """The model's config with the overrides in it, and with `memory` where the config has room for it.

    Raises:
        ConfigurationError: nothing can be loaded, the config names code to run, an override names no field, or the
            architecture does another task.
    """
    source = model.config or model.name
    assert source is not None  # `ModelArguments` has checked it
    overrides = dict(model.config_overrides)
    is_type = source in CONFIG_MAPPING and not Path(source).exists()  # its defaults are meant, such as those of "bart"
    try:
        if is_type:
            config = CONFIG_MAPPING[source]()
        else:
            config = AutoConfig.from_pretrained(source, revision=model.revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise _unloadable("model.config" if model.config else "model.name", source, error) from error
    refuse_kernel_repositories(config, source, trust_remote_code)
    warn_of_unpinned_code(config, source, model.revision, trust_remote_code)
    _check_task(model.task, config, trust_remote_code)
    known = config.to_dict()
    for name in overrides:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
            hint = f"; did you mean {' or '.join(nearest)}?" if nearest else "."
            raise ConfigurationError(
                f"`model.config_overrides` has no field {name!r} in {type(config).__name__}{hint}"
            )
    if memory is not None and "unlimiformer_config" in known:
        overrides["unlimiformer_config"] = memory.to_dict()
    if not overrides:
        return config
    try:
        if is_type:  # what follows from other fields, such as head_dim, is to follow from the overrides
            return CONFIG_MAPPING[source](**overrides)
        return type(config).from_dict(known | overrides)
    except Exception as error:  # strict configs raise an error of their own, which is no ValueError
        raise ConfigurationError(f"`model.config_overrides`: {_one_line(error.__cause__ or error)}") from error


def _check_task(task: str, config: PreTrainedConfig, trust_remote_code: bool) -> None:
    remote = getattr(config, "auto_map", None) or {} if trust_remote_code else {}
    fitting = [
        name
        for name, auto in _AUTO_CLASSES.items()
        if auto.__name__ in remote or type(config) in auto._model_mapping
        if (name == "seq2seq") == bool(config.is_encoder_decoder)
    ]
    if task not in fitting:
        found = ", ".join(config.architectures or []) or type(config).__name__
        allowed = f"`model.task` may be {fitting[0]!r}" if fitting else "no `model.task` of graft fits it"
        raise ConfigurationError(f"`model.task` is {task!r}, but the architecture found is {found}: {allowed}.")


def load_tokenizer(
    model: ModelArguments,
    config: PreTrainedConfig,
    folder: Path,
    texts: Iterable[str],
    trust_remote_code: bool = False,
) -> PreTrainedTokenizerBase:
    """The tokenizer, which pads; one trained on `texts` and kept in `folder` if `model.tokenizer` is "train".

    Raises:
        ConfigurationError: it cannot be loaded, or has more tokens than the model has embeddings.
    """
    source = model.tokenizer or model.name
    assert source is not None
    if source == TRAIN:
        positions = getattr(config, "max_position_embeddings", None) or 2**31
        tokenizer = trained_tokenizer(folder, texts, config.vocab_size, positions)
    else:
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                source, revision=model.revision, trust_remote_code=trust_remote_code
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise _unloadable("model.tokenizer" if model.tokenizer else "model.name", source, error) from error
    if tokenizer.pad_token is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
        logger.info("The tokenizer has no padding token; batches are padded with %r.", tokenizer.eos_token)
    if len(tokenizer) > config.vocab_size:
        raise ConfigurationError(
            f"The tokenizer {source!r} has {len(tokenizer)} tokens, the model {config.vocab_size} embeddings: set "
            "`model.config_overrides.vocab_size`, or another `model.tokenizer`."
        )
    return tokenizer


def load_model(model: ModelArguments, config: PreTrainedConfig, trust_remote_code: bool = False) -> nn.Module:
    """The model with its weights, or with random ones if `model.from_config`.

    Raises:
        ConfigurationError: the weights cannot be loaded, or are no safetensors.
    """
    auto = _AUTO_CLASSES[model.task]
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if model.attn_implementation is not None:
        options["attn_implementation"] = model.attn_implementation
    try:
        if model.from_config:
            dtype = torch.float32 if model.dtype == "auto" else getattr(torch, model.dtype)
            return auto.from_config(config, dtype=dtype, **options)
        return auto.from_pretrained(
            model.name, config=config, revision=model.revision, dtype=model.dtype, use_safetensors=True, **options
        )
    except (OSError, ValueError, ImportError) as error:
        raise _unloadable("model.name" if model.name else "model.config", model.name or model.config, error) from error


def with_adapter(model: Any, adapter: AdapterArguments, arguments: ModelArguments) -> nn.Module:
    """The model with LoRA on its projections, or with weights of our own; only these are trained.

    Raises:
        ConfigurationError: the base has random weights nobody else has, or no linear layer has such a name.
    """
    if arguments.from_config:
        raise ConfigurationError(
            "The block `adapter` needs a base with weights, but `model.from_config` starts from random ones, which "
            "the saved adapter would lack."
        )
    if adapter.type != "lora":
        return with_own_adapter(model, adapter, arguments)
    lora = LoraConfig(
        task_type=TaskType.SEQ_2_SEQ_LM if arguments.task == "seq2seq" else TaskType.CAUSAL_LM,
        r=adapter.r,
        lora_alpha=adapter.alpha,  # type: ignore[arg-type]  # scaling is a division, any number does
        lora_dropout=float(adapter.dropout),
        target_modules=_lora_targets(model, adapter.target_modules),
        base_model_name_or_path=adapter.base_model or arguments.name,
        revision=arguments.revision,
    )
    try:
        adapted: Any = get_peft_model(model, lora)
    except ValueError as error:
        raise ConfigurationError(f"`adapter.target_modules`: {_one_line(error)}") from error
    adapted.peft_config["default"].base_model_name_or_path = adapter.base_model or arguments.name
    return adapted


def _lora_targets(model: nn.Module, wanted: str | list[str] | None) -> str | list[str]:
    if wanted is not None:
        return wanted
    own = getattr(model, "lora_target_modules", None)
    if own is not None:
        return list(own)
    linear = {name.rpartition(".")[2] for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    found = [name for name in LORA_TARGETS if name in linear]
    if not found:
        raise ConfigurationError(
            f"`adapter.target_modules` must be given for {type(model).__name__}; its linear layers are called "
            f"{', '.join(sorted(linear))}."
        )
    return found


def parameter_counts(model: Any) -> dict[str, int]:
    """How many parameters there are, and how many are trained."""
    trained, total = count_trainable_parameters(model)
    return {"total": total, "trained": trained}


def _unloadable(option: str, value: str | None, error: Exception) -> ConfigurationError:
    return ConfigurationError(f"`{option}` {value!r} cannot be loaded: {_one_line(error)}")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
