"""A `generate` that lends a stock decoder a retro-fit for one call: what `custom_generate` folders run."""

from dataclasses import fields
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from torch import Tensor
from transformers import PreTrainedModel

from ..attachment import Attachment
from ..transformers_compat import take_cache
from .passage_retriever import PASSAGES_FILE, read_passages
from .retriever import Retriever
from .retrofit_adapter import RetroFitAdapter, make_adapter
from .retrofit_files import CONFIG_FILE, WEIGHTS_FILE, load_weights, read_options
from .retrofit_hook import has_retrieval, install_retrieval
from .retrofit_inputs import retrieval_inputs
from .retrofit_options import RetroFitOptions


def generate(
    model: PreTrainedModel,
    inputs: Tensor | None = None,
    retrofit: str | Path | None = None,
    retriever: Retriever | None = None,
    num_neighbours: int = 2,
    revision: str | None = None,
    **options: Any,
) -> Any:
    """Read the neighbours of each completed chunk while generating, and leave the model as it was.

        model.generate(input_ids, custom_generate=folder, trust_remote_code=True, retrofit=folder)

    Args:
        model: a decoder that `retrofit` serves, the one whose retro-fit it is.
        inputs: (batch, prompt), or `input_ids`; left-padded with `attention_mask` if lengths differ.
        retrofit: folder or Hub id of a retro-fit's options and weights, such as the exported folder itself. Read anew
            in each call.
        retriever: any callable from chunks (rows, chunk_size) to ids (rows, neighbours, neighbour_length); by default
            BM25 over the passages beside the weights.
        num_neighbours: passages per chunk where there is no `retriever`.
        revision: commit of `retrofit` on the Hub.
        options: as of any `generate`.

    Raises:
        TypeError: `model` cannot be retro-fitted, or `retriever` is not callable.
        ValueError: an argument is missing, the files are not of this model's retro-fit, or there are no passages.
        RuntimeError: the model has retrieval already.
    """
    options = {name: value for name, value in options.items() if value is not None}
    ids = inputs if inputs is not None else options.pop("input_ids", None)
    if ids is None or retrofit is None:
        raise ValueError("`input_ids` and `retrofit`, the folder or Hub id of the new weights, must be given.")
    if has_retrieval(model):
        raise RuntimeError("`model` has retrieval already: `remove()` it first.")
    folder = _local(retrofit, revision)
    adapter = _read_adapter(model, folder)
    if retriever is None:
        if not (folder / PASSAGES_FILE).is_file():
            raise ValueError(f"`retriever` must be given: {folder} holds no {PASSAGES_FILE}.")
        retriever = read_passages(folder / PASSAGES_FILE, adapter.config.pad_token_id, num_neighbours)
    others = {"past_key_values": take_cache(options)}
    if "position_ids" in options:
        others["position_ids"] = options.pop("position_ids")
    prepared = retrieval_inputs(model, adapter, (ids, options.pop("attention_mask", None)), retriever, others)
    with Attachment() as attachment, attachment.installing():
        install_retrieval(attachment, model, adapter, lambda: True)
        return model.generate(**prepared, **options)  # type: ignore[operator]


def _local(retrofit: str | Path, revision: str | None) -> Path:
    """The folder itself, or where the three files of a repository have been downloaded to."""
    if Path(retrofit).is_dir():
        return Path(retrofit)
    wanted = [CONFIG_FILE, WEIGHTS_FILE, PASSAGES_FILE]
    return Path(snapshot_download(str(retrofit), revision=revision, allow_patterns=wanted))


def _read_adapter(model: PreTrainedModel, folder: Path) -> RetroFitAdapter:
    """The new weights; PEFT's own fields of the options say nothing here."""
    known = {field.name for field in fields(RetroFitOptions)}
    options = {name: value for name, value in read_options(folder).items() if name in known}
    adapter = make_adapter(model, RetroFitOptions(**options))
    load_weights(adapter, folder)
    return adapter.eval()
