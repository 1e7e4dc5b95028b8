"""Rows of a run that come from prepared corpora, each chunk with the neighbours that were found for it."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from torch.utils.data import Dataset
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from graft.retrieval.corpus.corpus import Corpus
from graft.retrieval.corpus.retro_dataset import RetroDataset
from graft.retrieval.corpus.tokenizers_of_corpora import tokenizer_hash
from graft.trainer.arguments import DataArguments, RetrievalArguments, RunConfiguration
from graft.trainer.configuration_error import ConfigurationError
from graft.trainer.own_adapters import own_adapter_config

logger = logging.getLogger(__name__)


class CorpusRows(Dataset[Any]):
    """Rows of a RetroDataset, chosen and named as those of a `datasets.Dataset` are.

    A row is called "<document>:<first chunk>" after what it begins with; "truncated" is never true, since packing cuts
    documents without losing any of their tokens.

    Args:
        data: items with input_ids, labels, position_ids and retrieved.
        indices: which rows of `data`, in this order; None for all.
    """

    def __init__(self, data: RetroDataset, indices: Sequence[int] | None = None) -> None:
        self.data = data
        self.indices = list(range(len(data)) if indices is None else indices)

    @property
    def column_names(self) -> list[str]:
        """Columns that can be asked for by name."""
        return ["id", "truncated"]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, key: int | str) -> Any:
        """A row, or the column of that name."""
        if isinstance(key, str):
            return self._names(self.indices) if key == "id" else [False] * len(self)
        chosen = self.indices[key]
        return {**self.data[chosen], "id": self._names([chosen])[0]}

    def __getitems__(self, places: Sequence[int]) -> list[Any]:
        """The rows of a batch, gathered together."""
        return self.data.__getitems__([self.indices[place] for place in places])

    def select(self, places: Iterable[int]) -> CorpusRows:
        """The rows at these places, in this order."""
        return CorpusRows(self.data, [self.indices[place] for place in places])

    def _names(self, indices: Sequence[int]) -> list[str]:
        corpus = self.data.corpus
        chunks = corpus.sequences[indices, 0]
        documents = corpus.document_of(chunks)
        names = corpus.document_names.take(documents).to_pylist()
        firsts = chunks - corpus.documents[documents]
        return [f"{name}:{first}" for name, first in zip(names, firsts, strict=True)]


def load_corpora(data: DataArguments, retrieval: RetrievalArguments) -> dict[str, CorpusRows]:
    """The splits whose folders `data` names.

    Raises:
        ConfigurationError: a folder holds no finished corpus, or fewer or shorter neighbours than asked for.
    """
    splits = {}
    for split in ("train", "validation", "test"):
        folder = getattr(data, split)
        if not folder:
            continue
        try:
            rows = RetroDataset(Corpus(folder), retrieval.num_neighbours, retrieval.neighbour_length)
        except (OSError, ValueError) as error:
            message = str(error).replace("`num_neighbours`", "`retrieval.num_neighbours`")
            raise ConfigurationError(f"`data.{split}` {folder!r} cannot be read as a corpus: {message}") from error
        logger.info("%s: %d rows of %s, whose neighbours are in %s", split, len(rows), rows.corpus, rows.database)
        splits[split] = CorpusRows(rows)
    return splits


def reader_of(configuration: RunConfiguration, config: PreTrainedConfig) -> Any:
    """What has the `chunk_size` and the `pad_token_id` that the run's model reads neighbours with.

    Raises:
        ConfigurationError: the model reads none, or the options of a retro-fit do not fit it.
    """
    if configuration.adapter is not None and configuration.adapter.type == "retrofit":
        try:
            return own_adapter_config(configuration.adapter).retro_config(config)
        except (StrictDataclassError, ValueError, AttributeError) as error:
            raise ConfigurationError(
                f"`adapter.options`: {' '.join(str(error.__cause__ or error).split())}"
            ) from error
    if not hasattr(config, "chunk_size") or not hasattr(config, "cross_attention_layers"):
        raise ConfigurationError(
            f"The block `retrieval` needs a model that reads neighbours, such as 'graft_retro', but the model is a "
            f"{config.model_type}: use another, or let it learn to with `adapter.type` 'retrofit'."
        )
    return config


def check_corpora(
    splits: Mapping[str, CorpusRows], tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, reader: Any
) -> None:
    """Refuse rows that the model cannot read, or would misread.

    Args:
        tokenizer: of the model.
        config: of the model.
        reader: has the `chunk_size` and `pad_token_id` that neighbours are read with.

    Raises:
        ConfigurationError: other chunks, other tokens, another padding token, or longer rows than the model has
            positions for.
    """
    positions = getattr(config, "max_position_embeddings", None)
    if getattr(config, "position_embedding", None) == "rotary":
        positions = None  # RETRO's rotary positions have no end
    for split, rows in splits.items():
        corpus, length = rows.data.corpus, rows.data.sequence_length
        theirs, ours = corpus.manifest.corpus["tokenizer"]["sha256"], tokenizer_hash(tokenizer)
        if theirs != ours:
            raise ConfigurationError(
                f"`data.{split}` was cut into tokens by another tokenizer than the model's (SHA-256 {theirs[:12]}, "
                f"not {ours[:12]}): set `model.tokenizer` to {str(corpus.folder / 'tokenizer')!r}, or prepare the "
                "corpus with the model's (--tokenizer)."
            )
        try:
            rows.data.check_model(reader.chunk_size, config.vocab_size)
        except ValueError as error:
            raise ConfigurationError(f"`data.{split}`: {error}") from error
        if reader.pad_token_id != corpus.pad_token_id:
            raise ConfigurationError(
                f"`pad_token_id` of the model is {reader.pad_token_id}, but {corpus.folder} fills short neighbours "
                f"with {corpus.pad_token_id}, which would be read as text; they must be equal."
            )
        if positions is not None and length > positions:
            raise ConfigurationError(
                f"`data.{split}` has rows of {length} tokens, more than the model's {positions} positions: prepare "
                "the corpus with a smaller --sequence-length."
            )
