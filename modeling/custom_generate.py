"""Writes a folder that `model.generate(..., custom_generate=folder)` runs where graft is not installed."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from ..atomic_files import new_folder, write_text
from .remote_code import flat_source

FUNCTIONS = {
    "memory": "graft.modeling.unlimiformer.generate_with_memory",
    "retrieval": "graft.modeling.retro.generate_with_retrieval",
}
"""What a folder can give to a stock model, and the module whose `generate` does it."""

_CARD = """---
library_name: transformers
tags:
- custom_generate
- graft
---

# {title}, written by graft

```python
model.generate(input_ids, custom_generate="REPOSITORY", trust_remote_code=True, max_new_tokens=50{example})
```

{description}

Nothing of the model is changed: what is attached for the call is removed at its end, also after an error. The code of
`custom_generate/` runs on your machine: read it, and pin the `revision` you read.
"""
_DESCRIPTIONS = {
    "memory": (
        "Memory for any model",
        ', memory={"keys_per_query": 64}',
        "Inputs of any length are read window by window into a memory, and attention takes from it the keys that "
        "score best for each query (Unlimiformer, arXiv 2305.01625). `memory` holds the options; `question_ids` is "
        "asked of a decoder behind its document.",
    ),
    "retrieval": (
        "Retrieval for the decoder that it was trained for",
        ', retrofit="REPOSITORY"',
        "Each completed chunk of tokens is looked up, and what is found is read by chunked cross-attention in some "
        "layers (RETRO-fitting, arXiv 2112.04426). `retrofit` is where the new weights lie, this folder; `retriever` "
        "is any callable from chunks of ids (rows, chunk_size) to ids (rows, neighbours, neighbour_length), by "
        "default BM25 over `passages.safetensors`, if that is here.",
    ),
}


def write_custom_generate(folder: str | Path, ability: str, files: Sequence[Path] = ()) -> Path:
    """Write `custom_generate/generate.py`, the code it needs, its requirements and a card; a new folder, or nothing.

    Args:
        files: copied beside the card, such as the weights of a retro-fit and its passages.

    Raises:
        ValueError: `ability` is none of FUNCTIONS; names them.
        FileExistsError: the folder exists.
    """
    if ability not in FUNCTIONS:
        raise ValueError(f"`ability` must be one of {sorted(FUNCTIONS)}, got {ability!r}.")
    module = FUNCTIONS[ability].rpartition(".")[2]
    title, example, description = _DESCRIPTIONS[ability]
    card = _CARD.format(title=title, example=example, description=description)
    with new_folder(folder) as unfinished:
        code = unfinished / "custom_generate"
        for name, text in flat_source(FUNCTIONS[ability]).items():
            write_text(code / f"{name}.py", text)
        write_text(code / "generate.py", f'from .{module} import generate\n\n__all__ = ["generate"]\n')
        write_text(code / "requirements.txt", "torch>=2.11\ntransformers>=5.17\n")
        write_text(unfinished / "README.md", card)
        for path in files:
            shutil.copyfile(path, unfinished / path.name)
    return Path(folder)
