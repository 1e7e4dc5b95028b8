"""Write a base and its adapter as one model, in a folder that needs neither the adapter nor PEFT.

An update of weights is folded into them; the graph network of sparse-GIN becomes part of a graph-aware Llama.
"""

from __future__ import annotations

import logging
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, PeftType, get_peft_model_state_dict
from peft.utils import load_peft_weights
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

import graft.registration  # noqa: F401  (our own classes and adapters load without consent to remote code)
from graft.atomic_files import new_folder
from graft.modeling.graph.llama_with_adapter import llama_with_adapter
from graft.modeling.graph.sparse_gin_config import PEFT_TYPE as SPARSE_GIN
from graft.modeling.retro.retrofit_config import PEFT_TYPE as RETROFIT
from graft.trainer.abilities import MEMORY_FILE
from graft.trainer.configuration_error import ConfigurationError
from graft.trainer.generation import tokenizer_of
from graft.trainer.kernel_repositories import refuse_kernel_repositories, warn_of_unpinned_code

logger = logging.getLogger(__name__)

MERGED = (PeftType.LORA, PeftType.ADALORA, PeftType.LOHA, PeftType.LOKR, PeftType.IA3, PeftType.OFT, PeftType.BOFT)
"""Methods of PEFT whose update is a change of weights."""


def merge_adapter(
    adapter: str,
    output: str | Path,
    base: str | None = None,
    dtype: str = "auto",
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> Path:
    """Write `adapter`'s base with the update in its weights, whole or not at all.

    Sums run in float32 and are rounded once to the base's dtype. Of a sparse-GIN adapter on a Llama,
    LlamaForCausalLMWithGNN is written, with its code.

    Args:
        adapter: folder or Hub id of a PEFT adapter.
        output: a new folder, which any `from_pretrained` loads; tokenizer and memory options come along.
        base: folder or id of the base, if it is not where the adapter says.
        dtype: of the weights written: "auto" is the base's.
        trust_remote_code: whether code that comes with the base may run.
        revision: commit, tag or branch of the adapter's id; the adapter names that of its base.

    Raises:
        ConfigurationError: adapter or base cannot be loaded, the method changes the computation and not the weights
            (a graph network beside any base but a Llama too), the base is quantised, or `output` exists.
    """
    output = Path(output)
    if output.exists():
        raise ConfigurationError(f"`output` {str(output)!r} exists; choose a new folder.")
    config = _mergeable_config(adapter, revision)
    source = base or config.base_model_name_or_path
    if not source:
        raise ConfigurationError(f"`adapter` {adapter!r} does not name its base: give `base`.")
    of_base = None if base else config.revision
    model, kept = _load_base(source, of_base, dtype, trust_remote_code)
    merged = _merged(model, (adapter, revision), source)
    with new_folder(output) as folder:
        merged.to(kept).save_pretrained(folder)
        _write_companions(folder, (adapter, revision), (source, of_base), trust_remote_code)
    logger.info("%s merged into %s: %s", adapter, source, output)
    return output


def _mergeable_config(adapter: str, revision: str | None) -> PeftConfig:
    if revision is not None and Path(adapter).exists():
        raise ConfigurationError(f"`revision` {revision!r} would do nothing: `adapter` {adapter!r} is a folder.")
    try:
        config: PeftConfig = PeftConfig.from_pretrained(adapter, revision=revision)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigurationError(f"`adapter` {adapter!r} cannot be loaded: {_one_line(error)}") from error
    if config.peft_type not in (*MERGED, SPARSE_GIN):
        mergeable = ", ".join([*(method.value for method in MERGED), f"{SPARSE_GIN} on a Llama"])
        raise ConfigurationError(f"{_beside_its_base(adapter, config)} Methods that can be merged: {mergeable}.")
    return config


def _beside_its_base(adapter: str, config: PeftConfig) -> str:
    """Why an adapter is not merged, and how it is used."""
    name = getattr(config.peft_type, "value", config.peft_type)
    first = "after `import graft.registration` " if name in (SPARSE_GIN, RETROFIT) else ""
    return (
        f"`adapter` {adapter!r} is of {name}, which changes what is computed and not the weights, so it cannot "
        f"be merged. Load it beside its base instead: {first}`PeftModel.from_pretrained(base, {adapter!r})`."
    )


def _load_base(source: str, revision: str | None, dtype: str, trust_remote_code: bool) -> tuple[Any, torch.dtype]:
    """The base in float32 or wider, and the dtype in which the result is kept."""
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(source, **options)
        refuse_kernel_repositories(config, source, trust_remote_code)
        warn_of_unpinned_code(config, source, revision, trust_remote_code)
        if getattr(config, "quantization_config", None) is not None:
            raise ConfigurationError(
                f"`base` {source!r} is quantised: a merge would round the update away. Load it dequantised, save "
                "that, and give its folder as `base`."
            )
        auto: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        model = auto.from_pretrained(source, dtype="auto", use_safetensors=True, **options)
    except (OSError, ValueError, KeyError, ImportError) as error:
        if isinstance(error, ConfigurationError):
            raise
        raise ConfigurationError(f"`base` {source!r} cannot be loaded: {_one_line(error)}") from error
    kept: torch.dtype = model.dtype if dtype == "auto" else getattr(torch, dtype)
    return model.to(torch.promote_types(model.dtype, torch.float32)), kept


def _merged(model: Any, of_adapter: tuple[str, str | None], source: str) -> Any:
    """The base with the update in its weights."""
    adapter, revision = of_adapter
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Found missing adapter keys")  # what we check next
            adapted: Any = PeftModel.from_pretrained(model, adapter, revision=revision)
        stored = load_peft_weights(adapter, device="cpu", revision=revision)
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigurationError(f"`adapter` {adapter!r} does not fit {source!r}: {_one_line(error)}") from error
    if wrong := sorted(stored.keys() ^ get_peft_model_state_dict(adapted).keys()):
        raise ConfigurationError(f"`adapter` {adapter!r} does not fit {source!r}: {wrong[0]} is missing or surplus.")
    name, tuner = str(adapted.active_adapter), adapted.base_model
    config: Any = adapted.peft_config[name]
    if config.peft_type != SPARSE_GIN:
        return adapted.merge_and_unload(safe_merge=True)
    try:
        return llama_with_adapter(model, tuner.kept.adapters[name], config)
    except ValueError as error:
        raise ConfigurationError(f"{_beside_its_base(adapter, config)} Merging it: {error}") from error


def _write_companions(
    folder: Path, adapter: tuple[str, str | None], base: tuple[str, str | None], trust_remote_code: bool
) -> None:
    """The tokenizer, the adapter's own before its base's, of their revisions, and the options of its memory."""
    try:
        tokenizer_of([adapter, base], trust_remote_code).save_pretrained(folder)
    except (OSError, ValueError, KeyError, TypeError):
        logger.info("Neither %s nor %s has a tokenizer.", adapter[0], base[0])
    if (Path(adapter[0]) / MEMORY_FILE).is_file():
        shutil.copyfile(Path(adapter[0]) / MEMORY_FILE, folder / MEMORY_FILE)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
