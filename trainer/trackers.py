"""Where a run is reported besides its own files: trackers of transformers, asked for by `training.report_to`."""

from __future__ import annotations

import logging
import netrc
import os
from collections.abc import Sequence
from importlib.util import find_spec

from graft.trainer.configuration_error import ConfigurationError

logger = logging.getLogger(__name__)

TRACKERS = ("tensorboard", "trackio", "wandb")  # those that work without an account
_WANDB_HOST = "api.wandb.ai"


def prepare_trackers(names: Sequence[str]) -> None:
    """Refuse a tracker that is not installed, and keep wandb on this machine where nobody has logged in.

    Raises:
        ConfigurationError: names the package to install.
    """
    for name in names:
        if name in TRACKERS and find_spec(name) is None:
            raise ConfigurationError(f"`training.report_to` names {name!r}, which is not here: pip install {name}.")
    if "wandb" in names and "WANDB_MODE" not in os.environ and not _has_wandb_key():
        os.environ["WANDB_MODE"] = "offline"  # its own question for a login would stop the run
        logger.info("There is no key for wandb: the run is kept in WANDB_DIR, for `wandb sync` later.")


def _has_wandb_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(_WANDB_HOST) is not None
    except (OSError, netrc.NetrcParseError):
        return False
