"""The document also imports from `retro_pytorch`; that name can be lent to this package."""

import importlib.util
import sys
from importlib import import_module

ALIAS = "retro_pytorch"


def install_retro_alias() -> bool:
    """Let `retro_pytorch` and `retro_pytorch.retrieval` mean this package, unless the real one is there.

    Returns:
        Whether the names mean this package now.
    """
    package = import_module(__package__ or "diablogpt_pytorch")
    there = sys.modules.get(ALIAS)
    if there is None and importlib.util.find_spec(ALIAS) is None:
        sys.modules[ALIAS] = package
        sys.modules[f"{ALIAS}.retrieval"] = import_module(f"{package.__name__}.retrieval")
    return sys.modules.get(ALIAS) is package
