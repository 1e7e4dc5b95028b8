"""Names and arguments of the original Unlimiformer (Bertsch et al. 2023, arXiv 2305.01625) onto ours.

`Unlimiformer.convert_model(model, layer_begin=6)` attaches a memory; what it returns remembers, generates and can be
removed. The original's defaults stay: as many keys as the window is long, half an overlap, and the first token of an
encoder-decoder reads the first window alone.
"""

from __future__ import annotations

import logging
from typing import Any

from transformers import PreTrainedModel

from graft.configuration.configuration_unlimiformer import UnlimiformerConfig
from graft.modeling.unlimiformer.attach import Unlimited, unlimiform
from graft.retrieval.datastore import Datastore
from graft.trainer.document_chunks import chunk_dataset

logger = logging.getLogger(__name__)

chunk_dataset_function = chunk_dataset
"""Beside `chunk_size` and `capture_raw_text` it wants the tokenizer, since it cuts texts and not tokens."""

DatastoreBatch = Datastore
"""One store holds one example; a memory of several documents is one object (`unlimited.remember(input_ids)`)."""

RENAMED = {
    "layer_begin": "first_layer",
    "layer_end": "last_layer",
    "unlimiformer_exclude": "exclude_window",
    "exclude_attention": "exclude_window",
    "unlimiformer_chunk_overlap": "overlap",
    "chunk_overlap": "overlap",
    "unlimiformer_chunk_size": "window",
    "model_encoder_max_len": "window",
}
"""Old arguments that are options under another name."""

DROPPED = {
    "test_unlimiformer": "attaching is the switch",
    "verbose": "use logging",
    "unlimiformer_verbose": "use logging",
    "tokenizer": "give it to `report.heatmap`",
    "save_heatmap": "use `with unlimited.record() as report`",
    "test_datastore": "a memory of all keys equals full attention, which our tests hold",
    "flat_index": "search is exact",
    "gpu_datastore": "the memory lies where the model is, and `memory.to(device)` moves it",
    "gpu_index": "search runs where the memory is",
    "datastore_device": "`memory.to(device)`",
    "index_devices": "`memory.to(device)`",
}
"""Old arguments without effect here, and why; a value is taken and logged."""

REFUSED = {
    "reconstruct_embeddings": "it reads vectors back from a lossy index, which no memory of ours has",
}
"""Old arguments that ask for what graft does not do; only a false value is taken."""

REGIMES = {
    (False, False): "standard",
    (True, False): "retrieval",
    (False, True): "random",
    (True, True): "alternating",
}
"""`training` for the values of `unlimiformer_training` and `random_unlimiformer_training`."""


def UnlimiformerArguments(**old: Any) -> UnlimiformerConfig:
    """Our options from the original's arguments.

    Raises:
        TypeError: an argument is none of the original's; names it.
        ValueError: it asks for what graft does not do, or is out of range.
    """
    trains = ("unlimiformer_training", "random_unlimiformer_training")
    known = {*RENAMED, *DROPPED, *REFUSED, *trains, "unlimiformer_head_num", "use_datastore"}
    if unknown := sorted(set(old) - known):
        raise TypeError(f"Unlimiformer has no argument {unknown}; it has {sorted(known)}.")
    if asked := sorted(name for name in REFUSED if old.get(name)):
        raise ValueError(f"`{asked[0]}`: {REFUSED[asked[0]]}.")
    for name in sorted(set(old) & set(DROPPED)):
        logger.info("`%s` does nothing here: %s.", name, DROPPED[name])
    options = {RENAMED[name]: value for name, value in old.items() if name in RENAMED and value is not None}
    if old.get("unlimiformer_head_num") is not None:
        options["heads"] = [old["unlimiformer_head_num"]]
    if "use_datastore" in old:
        options["store"] = "hidden" if old["use_datastore"] else "keys_values"
    options["training"] = REGIMES[bool(old.get(trains[0])), bool(old.get(trains[1]))]
    return UnlimiformerConfig(**options)


class Unlimiformer:
    """The original's entry point."""

    @staticmethod
    def convert_model(model: PreTrainedModel, **old: Any) -> Unlimited:
        """Attach a memory to `model`, with the original's arguments; returns what `unlimiform` does.

        The model is not replaced: call `generate` of what is returned with input of any length, and `remove()` it.

        Raises:
            TypeError, ValueError: as `UnlimiformerArguments` and `unlimiform` do.
        """
        config = UnlimiformerArguments(**old)
        if model.config.is_encoder_decoder:
            config.first_step = "window"  # as shipped
        elif config.store == "hidden":
            config.store = "keys_values"  # a decoder has no shared hidden states
        return unlimiform(model, config)
