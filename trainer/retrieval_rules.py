"""What the block `retrieval` demands of the others: prepared corpora as rows, views of its own, a causal model."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from graft.trainer.arguments import DataArguments, RunConfiguration
from graft.trainer.configuration_error import ConfigurationError
from graft.trainer.retrieval_ability import VIEWS
from graft.trainer.tokenizer_training import TRAIN

_FOLDERS = ("train", "validation", "test")
_OF_CORPORA = (
    *_FOLDERS,
    *("max_train_samples", "max_eval_samples", "max_test_samples", "sample_seed", "test_slice"),
    *("eval_during_training", "eval_views"),
)
"""Fields of the block `data` that mean something for rows of a corpus."""


def check_retrieval(configuration: RunConfiguration) -> None:
    """Refuse what contradicts the block `retrieval`, and its views without it.

    Raises:
        ConfigurationError: the first contradiction, with both options and the way out.
    """
    views = configuration.data.eval_views or []
    if configuration.retrieval is None:
        if own := [view for view in views if view in VIEWS]:
            raise ConfigurationError(
                f"`data.eval_views` holds {own[0]!r}, which is of the block `retrieval`, but there is none: add it "
                "(`{}` takes the defaults), or use 'full', 'truncated' or 'context'."
            )
        return
    if other := [view for view in views if view not in VIEWS]:
        raise ConfigurationError(
            f"`data.eval_views` holds {other[0]!r}, but rows with neighbours are evaluated as {', '.join(VIEWS)}."
        )
    _check_other_blocks(configuration)
    _check_rows(configuration.data)


def _check_other_blocks(configuration: RunConfiguration) -> None:
    model = configuration.model
    if model.task != "causal":
        raise ConfigurationError(f"The block `retrieval` needs `model.task` 'causal', got {model.task!r}.")
    if model.tokenizer == TRAIN:
        raise ConfigurationError(
            "`model.tokenizer` 'train' would make another tokenizer than the one that cut the corpora: name the "
            "folder `tokenizer` inside of `data.train`."
        )
    for block in ("memory", "graph"):
        if getattr(configuration, block) is not None:
            raise ConfigurationError(
                f"The blocks `retrieval` and `{block}` exclude each other in a run: rows with neighbours hold no "
                "whole documents, and graph layers replace what reads neighbours; leave one out."
            )


def _check_rows(data: DataArguments) -> None:
    for each in fields(DataArguments):
        default: Any = each.default_factory() if callable(each.default_factory) else each.default
        if each.name not in _OF_CORPORA and getattr(data, each.name) != default:
            raise ConfigurationError(
                f"`data.{each.name}` would do nothing: with the block `retrieval` rows come from prepared corpora, "
                "whose folders are `data.train`, `data.validation` and `data.test`."
            )
    for split in _FOLDERS:
        folder = getattr(data, split)
        if folder and (not isinstance(folder, str) or not (Path(folder) / "manifest.json").is_file()):
            raise ConfigurationError(
                f"`data.{split}` must be the folder of a prepared corpus where there is a block `retrieval`, got "
                f"{folder!r}: make one with graft-build-database."
            )
