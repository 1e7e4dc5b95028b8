"""Writes a folder that `model.generate(..., custom_generate=folder)` runs where graft is not installed."""

from pathlib import Path

from ..atomic_files import new_folder, write_text
from .remote_code import flat_source

FUNCTIONS = {"memory": "graft.modeling.unlimiformer.generate_with_memory"}
"""What a folder can give to a stock model, and the module whose `generate` does it."""

_CARD = """---
library_name: transformers
tags:
- custom_generate
- graft
---

# {ability} for any model, written by graft

```python
model.generate(input_ids, custom_generate="REPOSITORY", trust_remote_code=True, max_new_tokens=50{example})
```

{description}

Nothing of the model is changed: what is attached for the call is removed at its end, also after an error. The code of
`custom_generate/` runs on your machine: read it, and pin the `revision` you read.
"""
_DESCRIPTIONS = {
    "memory": (
        ', memory={"keys_per_query": 64}',
        "Inputs of any length are read window by window into a memory, and attention takes from it the keys that "
        "score best for each query (Unlimiformer, arXiv 2305.01625). `memory` holds the options; `question_ids` is "
        "asked of a decoder behind its document.",
    )
}


def write_custom_generate(folder: str | Path, ability: str) -> Path:
    """Write `custom_generate/generate.py`, the code it needs, its requirements and a card; a new folder, or nothing.

    Raises:
        ValueError: `ability` is none of FUNCTIONS; names them.
        FileExistsError: the folder exists.
    """
    if ability not in FUNCTIONS:
        raise ValueError(f"`ability` must be one of {sorted(FUNCTIONS)}, got {ability!r}.")
    module = FUNCTIONS[ability].rpartition(".")[2]
    example, description = _DESCRIPTIONS[ability]
    card = _CARD.format(ability=ability.capitalize(), example=example, description=description)
    with new_folder(folder) as unfinished:
        code = unfinished / "custom_generate"
        for name, text in flat_source(FUNCTIONS[ability]).items():
            write_text(code / f"{name}.py", text)
        write_text(code / "generate.py", f'from .{module} import generate\n\n__all__ = ["generate"]\n')
        write_text(code / "requirements.txt", "torch>=2.11\ntransformers>=5.17\n")
        write_text(unfinished / "README.md", card)
    return Path(folder)
