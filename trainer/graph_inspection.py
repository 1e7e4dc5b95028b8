"""From a saved model and a text to a page of its graphs and a JSON of their numbers."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from graft.atomic_files import write_json
from graft.modeling.graph.graph_parameters import graph_parameters
from graft.modeling.graph.graph_recorder import GraphRecorder
from graft.trainer.generation import load


def inspect_graph(
    model_name: str, text: str, output: Path, max_tokens: int = 128, trust_remote_code: bool = False
) -> dict[str, Any]:
    """Read `text` once and write `output` (HTML), its pictures, and a JSON beside it.

    Args:
        model_name: folder or Hub id.
        max_tokens: of the text that are read.

    Returns:
        What the JSON holds: model, tokens, `statistics` and `parameters` by layer, `edges` by layer as (j, i, weight)
        of each edge j -> i; and `page`.

    Raises:
        ValueError: the text is empty, the model cannot be loaded, or has no decoder layers.
    """
    if max_tokens < 1:
        raise ValueError(f"`max_tokens` must be at least 1, got {max_tokens}.")
    model, tokenizer = load(model_name, trust_remote_code)
    ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=max_tokens).input_ids.to(model.device)
    if not text.strip() or not ids.shape[1]:
        raise ValueError("The text must hold at least one token, got none.")
    with torch.no_grad(), GraphRecorder(model) as recorder:
        model(ids, use_cache=False)
    page = recorder.page(output, tokenizer)
    found = {
        "model": model_name,
        "tokens": recorder.tokens(tokenizer),
        "statistics": recorder.statistics(),
        "parameters": [asdict(row) for row in graph_parameters(model)],
        "edges": {str(layer): recorder.edges(layer) for layer in recorder.layers},
    }
    write_json(page.with_suffix(".json"), found)
    return {**found, "page": str(page)}
