"""Programs for a process that cannot import graft, as one of somebody who only has a saved folder."""

import subprocess
import sys


def snippet_of(card: str) -> str:
    """The first Python block of a model card."""
    return card.partition("```python\n")[2].partition("```")[0]


def run_program(program: str) -> None:
    """Run it in a process of its own; fails with what it wrote to stderr."""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


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
