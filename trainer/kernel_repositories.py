"""A config that someone else wrote executes nothing: an implementation that names a repository of code is refused.

transformers fetches and runs such a repository as soon as a model is made from the config, whoever wrote it.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from graft.trainer.configuration_error import ConfigurationError

logger = logging.getLogger(__name__)


def refuse_kernel_repositories(config: PreTrainedConfig, source: str, trust_remote_code: bool) -> None:
    """Raise unless every implementation that `config`, or a config inside it, names comes with transformers.

    Args:
        config: as it was loaded, before a model is made from it.
        source: where from, for the message.
        trust_remote_code: whether the user consented to code that comes with the model.

    Raises:
        ConfigurationError: names the implementation and the way out.
    """
    if trust_remote_code:
        return
    for name in _implementations(config):
        if "/" in name:
            raise ConfigurationError(
                f"The config of {source!r} names the implementation {name!r}, a repository whose code would run: read "
                "it and pass --trust-remote-code, or take the name out of config.json."
            )


def warn_of_unpinned_code(
    config: PreTrainedConfig, source: str, revision: str | None, trust_remote_code: bool
) -> None:
    """Log a warning if the repository `source` brings code that may run, and no commit says which code that is."""
    if trust_remote_code and getattr(config, "auto_map", None):
        _warn_unless_pinned(source, revision, getattr(config, "_commit_hash", None) or "a commit")


def warn_of_unpinned_tokenizer(tokenizer: Any, source: str, revision: str | None) -> None:
    """The same of a tokenizer whose code the repository `source` brought."""
    if type(tokenizer).__module__.startswith("transformers_modules"):
        _warn_unless_pinned(source, revision, "a commit")


def _warn_unless_pinned(source: str, revision: str | None, commit: str) -> None:
    if Path(source).exists() or re.fullmatch("[0-9a-f]{40}", revision or ""):
        return
    logger.warning(
        "The code of %s is that of %s, and may be another after its next push: read it and pin the revision %s.",
        source,
        revision or "its main branch",
        commit,
    )


def _implementations(config: PreTrainedConfig) -> Iterator[str]:
    for name, value in vars(config).items():
        if name.endswith("_implementation_internal"):
            yield from map(str, value.values() if isinstance(value, dict) else [value])
        parts: Any = value.values() if isinstance(value, dict) else [value]
        for part in parts:
            if isinstance(part, PreTrainedConfig):
                yield from _implementations(part)
