"""A config that someone else wrote executes nothing: an implementation that names a repository of code is refused.

transformers fetches and runs such a repository as soon as a model is made from the config, whoever wrote it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedConfig

from graft.trainer.configuration_error import ConfigurationError


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


def _implementations(config: PreTrainedConfig) -> Iterator[str]:
    for name, value in vars(config).items():
        if name.endswith("_implementation_internal"):
            yield from map(str, value.values() if isinstance(value, dict) else [value])
        parts: Any = value.values() if isinstance(value, dict) else [value]
        for part in parts:
            if isinstance(part, PreTrainedConfig):
                yield from _implementations(part)
