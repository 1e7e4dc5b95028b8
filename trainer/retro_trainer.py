"""Training of models that read neighbours: three losses tell whether they do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from graft.trainer.retrieval_ability import VIEWS, RetrievalAbility
from graft.trainer.trainer import GraftTrainer


class RetroTrainer(GraftTrainer):
    """`GraftTrainer` with retrieval: evaluates rows in the three `VIEWS`, and decays matrices alone.

    Args:
        args: as in GraftTrainer; a data set given as `eval_dataset` is evaluated in every view.

    Raises:
        ValueError: a data set says by its `check_model` that the model cannot read its rows.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        rows = kwargs.get("eval_dataset")
        if rows is not None and not isinstance(rows, Mapping):
            kwargs["eval_dataset"] = dict.fromkeys(VIEWS, rows)
        kwargs["abilities"] = [*kwargs.get("abilities", ()), RetrievalAbility()]
        super().__init__(*args, **kwargs)
        evaluated = self.eval_dataset.values() if isinstance(self.eval_dataset, Mapping) else ()
        config: Any = getattr(self.model, "config", None)
        for data in (self.train_dataset, *evaluated):
            if hasattr(data, "check_model") and hasattr(config, "chunk_size"):
                data.check_model(config.chunk_size, config.vocab_size)
