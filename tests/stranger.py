"""Programs for a process that cannot import graft, as one of somebody who only has a saved folder."""


def program_without(*packages: str) -> str:
    """The beginning of a program to which `packages`, such as "graft", are not installed; torch runs one thread."""
    return f"""
import sys


class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {packages!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)


sys.meta_path.insert(0, Hidden())
import torch

torch.set_num_threads(1)
"""
