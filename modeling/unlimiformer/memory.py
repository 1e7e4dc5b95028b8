"""A document as the model read it: a value that any number of questions, threads and generations share."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, MoEModelOutput

from ...configuration.configuration_unlimiformer import UnlimiformerConfig
from ..transformers_compat import cache_argument
from .families import (
    decoder_family,
    decoder_vocabulary,
    encoder_decoder_family,
    encoder_width,
    has_scaled_positions,
    memory_layers,
    model_shape,
    trained_positions,
)
from .key_index import KeyIndex, candidates_per_query, check_index, key_ranges, needs_index
from .keys_rule import keys_per_query, keys_rule
from .knn_attention import KeyChoice
from .layer_memory import IndexedLayerMemory, LayerMemory
from .memory_cache import DocumentRows, MemoryCacheLayer, PlaceholderLayer
from .memory_files import INDEX_FOLDER, read_memory_files, write_memory_files
from .positions import memory_positions
from .report import AttentionReport, current_report


@dataclass(frozen=True)
class Memory:
    """What `remember` returns. Nothing changes it; `inputs()` makes a fresh cache that shares its tensors.

    Args:
        config: the options it was made with.
        model_config: the config of the model that made it.
        window: tokens the model read at a time.
        fingerprint: of the weights that made it.
        input_ids: (documents, longest), right-padded.
        lengths: (documents,), real tokens of each document, on the CPU.
        documents: the stored document that each row of a batch asks.
        hidden: (documents, longest, hidden_size), the encoder's output, or None.
        keys, values: of each layer that holds some, (documents, key_value_heads, longest, head_dim).
        window_keys, window_values: what layers, heads or steps that read only the first window see of it.
        prefixes: first tokens of each document that stood in front of each of its windows; empty if none did.
        global_tokens: like `input_ids`, True for tokens that were read with global attention; None if none were.
        indexes: over "hidden" or "keys.3", ..., as `tensors()` names them; empty where search is exact.
        recall: share of the exact best keys that they found when they were built, None if it was not measured.
    """

    config: UnlimiformerConfig
    model_config: PreTrainedConfig
    window: int
    fingerprint: str
    input_ids: Tensor
    lengths: Tensor
    documents: tuple[int, ...]
    hidden: Tensor | None = None
    keys: dict[int, Tensor] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)
    window_keys: dict[int, Tensor] = field(default_factory=dict)
    window_values: dict[int, Tensor] = field(default_factory=dict)
    prefixes: tuple[int, ...] = ()
    global_tokens: Tensor | None = None
    indexes: dict[str, KeyIndex] = field(default_factory=dict)
    recall: float | None = None

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, row: int) -> "Memory":
        if not -len(self) <= row < len(self):
            raise IndexError(f"`row` must lie in [-{len(self)}, {len(self)}), got {row}.")
        return self.select([row])

    def __repr__(self) -> str:
        tokens = ", ".join(f"{int(self.lengths[document]):,}" for document in self.documents[:4])
        more = ", ..." if len(self) > 4 else ""
        return f"Memory({len(self)} documents of {tokens}{more} tokens, {self.nbytes / 2**20:,.1f} MB, {self.rule})"

    @property
    def rule(self) -> str:
        """ "exact" where every query sees every key, else "keys k of n", with the index that finds them, if any."""
        rule = keys_rule(self.config, self.window, int(self.lengths.max()))
        if self.indexes:
            rule += f", index {self.config.index}"
        return rule if self.recall is None else f"{rule}, recall {self.recall:.2f}"

    @property
    def nbytes(self) -> int:
        """Bytes of the stored vectors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors().values())

    @property
    def index_nbytes(self) -> int:
        """Bytes that indexes take beside the stored vectors."""
        return sum(index.nbytes for index in self.indexes.values())

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether the memory is read by cross-attention."""
        return bool(self.model_config.is_encoder_decoder)

    def tensors(self) -> dict[str, Tensor]:
        """The stored vectors by name: "hidden", "keys.3", ...; tokens lie along the last dimension but one."""
        named = {} if self.hidden is None else {"hidden": self.hidden}
        for name in ("keys", "values", "window_keys", "window_values"):
            named |= {f"{name}.{layer}": tensor for layer, tensor in getattr(self, name).items()}
        return named

    def with_tensors(self, named: dict[str, Tensor], **changes: Any) -> "Memory":
        """The same memory of other vectors, named as in `tensors()`, and with other fields; it has no index."""
        by_name: dict[str, Any] = {name: {} for name in ("keys", "values", "window_keys", "window_values")}
        for key, tensor in named.items():
            if key != "hidden":
                name, layer = key.split(".")
                by_name[name][int(layer)] = tensor
        unindexed: dict[str, Any] = {"indexes": {}, "recall": None}
        return replace(self, hidden=named.get("hidden"), **by_name, **{**unindexed, **changes})

    def select(self, rows: Sequence[int]) -> "Memory":
        """A memory whose batch rows ask these documents; repeating one copies nothing.

        Raises:
            ValueError: a row is out of range.
        """
        if not rows or not all(-len(self) <= row < len(self) for row in rows):
            raise ValueError(f"`rows` must name some of the {len(self)} documents, got {list(rows)}.")
        wanted = [self.documents[row] for row in rows]
        stored = sorted(set(wanted))
        if stored == list(range(len(self.lengths))):
            return replace(self, documents=tuple(wanted))
        first, last = stored[0], stored[-1] + 1
        kept = self.with_tensors({name: tensor[first:last] for name, tensor in self.tensors().items()})
        return replace(
            kept,
            input_ids=self.input_ids[first:last],
            lengths=self.lengths[first:last],
            documents=tuple(document - first for document in wanted),
            prefixes=self.prefixes[first:last],
            indexes={name: index.select(first, last) for name, index in self.indexes.items()},
            recall=self.recall,
            global_tokens=None if self.global_tokens is None else self.global_tokens[first:last],
        )

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "Memory":
        """The same memory on another device or in another floating-point dtype.

        Indexes stay on the CPU; over vectors that change they are built anew, and their recall is not measured.
        """
        before = self.tensors()
        named = {name: tensor.to(device=device, dtype=dtype) for name, tensor in before.items()}
        moved = self.with_tensors(named, input_ids=self.input_ids.to(device))
        if all(named[name].dtype == tensor.dtype for name, tensor in before.items()):
            return replace(moved, indexes=self.indexes, recall=self.recall)
        if not self.indexes:
            return moved
        rebuilt = moved.indexed()
        for name, index in rebuilt.indexes.items():
            index.search_as(self.indexes[name])
        return rebuilt

    def indexed(self, progress: bool = False) -> "Memory":
        """The same memory with the indexes that `config.index` asks for; none where a query keeps all keys anyway.

        Args:
            progress: show a bar.

        Raises:
            ImportError: faiss is missing.
            ValueError: `index_parameters` do not fit the keys.
        """
        if not needs_index(self.config, self.window, self.input_ids.shape[1]):
            return replace(self, indexes={}, recall=None)
        ranges = key_ranges(self.config, self.window, self.lengths.tolist())
        kept = keys_per_query(self.config, self.window) or 0
        named = self._searched()
        check_index(self.config, self.window, self.lengths.tolist(), next(iter(named.values())).shape[-1])
        bar = tqdm(named.items(), unit="layer", desc="indexing", disable=not progress)
        built = {name: KeyIndex.build(keys, ranges, self.config, kept) for name, keys in bar}
        return replace(self, indexes=built, recall=None)

    def _searched(self) -> dict[str, Tensor]:
        """What queries are compared with: (documents, key heads, source, dim) each, by its name in `tensors()`."""
        if self.hidden is not None:
            return {"hidden": self.hidden.unsqueeze(1)}
        return {f"keys.{layer}": keys for layer, keys in self.keys.items()}

    # What a model is given

    def inputs(
        self,
        question_ids: Tensor | None = None,
        question_mask: Tensor | None = None,
        record: AttentionReport | None = None,
        max_new_tokens: int = 0,
    ) -> dict[str, Any]:
        """What to give to `model(...)` or `model.generate(...)` so that it reads this memory; make it anew each time.

        Args:
            question_ids: (len(self), target); needed by a decoder, optional decoder prompt of an encoder-decoder.
            question_mask: like `question_ids`, 1 for real tokens; padding may stand on either side.
            record: filled with what is read; by default the report of the `record()` around this call, if any.
            max_new_tokens: tokens to be generated behind it, if it is to be checked that the model can place them.

        Raises:
            ValueError: as many questions as documents are needed, within the model's positions with their answers.
        """
        record = record or current_report()
        if record is not None:
            record.begin(self.input_ids, self.lengths)
        if question_ids is not None:
            self._check_question(question_ids, question_mask)
        self._check_room(1 if question_ids is None else question_ids.shape[1], max_new_tokens)
        if self.is_encoder_decoder:
            return self._cross_inputs(question_ids, question_mask, record)
        if question_ids is None:
            raise ValueError("`question_ids` is None: a decoder needs at least one token after its document.")
        return self._self_inputs(question_ids, question_mask, record)

    def _check_question(self, question_ids: Tensor, question_mask: Tensor | None) -> None:
        if question_ids.ndim != 2 or question_ids.shape[0] != len(self) or question_ids.shape[1] < 1:
            raise ValueError(
                f"`question_ids` must be ({len(self)}, tokens), one row for each of {len(self)} documents, got "
                f"{tuple(question_ids.shape)}. `memory.select([0, 0, 1])` repeats documents for several questions."
            )
        if question_mask is not None and question_mask.shape != question_ids.shape:
            raise ValueError(
                f"`question_mask` must have the shape of `question_ids`, {tuple(question_ids.shape)}, got "
                f"{tuple(question_mask.shape)}."
            )
        real = torch.ones_like(question_ids) if question_mask is None else question_mask
        vocabulary = decoder_vocabulary(self.model_config)
        wrong = real.bool() & ((question_ids < 0) | (question_ids >= vocabulary))
        if bool(wrong.any()):
            row, place = wrong.nonzero()[0].tolist()
            raise ValueError(
                f"`question_ids` holds {int(question_ids[row, place])} at position {place} of row {row}, outside the "
                f"vocabulary of {vocabulary}."
            )

    def room(self) -> int | None:
        """Positions that question and answer may take behind the memory, None where nothing limits them."""
        trained = trained_positions(self.model_config, "decoder")
        if trained is None or has_scaled_positions(self.model_config):
            return None
        return trained - (0 if self.is_encoder_decoder else max(map(self.positions_taken, self.documents)))

    def _check_room(self, question: int, new: int) -> None:
        room = self.room()
        # The last new token is never placed; `generate` may begin a decoder's prompt with a token of its own.
        placed = question + max(new - 1, 0) + (self.is_encoder_decoder and question > 1 and new > 0)
        if room is not None and placed > room:
            trained = trained_positions(self.model_config, "decoder") or 0
            taken = trained - room
            prompt = "the decoder's prompt" if self.is_encoder_decoder else "`question_ids`"
            asked = f"{prompt} has {question} tokens" + (f" and `max_new_tokens` is {new}" if new else "")
            raise ValueError(
                f"{asked} after {taken} positions of memory, and the model was trained on {trained}: ask for less"
                + (f", or set {self._room_option()}." if taken else ".")
            )

    def _room_option(self) -> str:
        """What would leave a decoder more room behind its memory."""
        is_table = decoder_family(self.model_config).positions == "table"
        return "a larger `reserve`" if is_table and self.config.window is None else "a smaller `window`"

    def _layer_memory(self, layer: int) -> LayerMemory | None:
        """What layer `layer` of the model reads."""
        window = None
        if layer in self.window_keys:
            lengths = self.lengths.clamp(max=self.window)
            keys, values = self.window_keys[layer], self.window_values[layer]
            window = LayerMemory(keys, values, _visible(lengths, keys), KeyChoice(), is_window=True)
        if layer not in memory_layers(self.config, self.model_config):
            return window
        if self.hidden is not None:
            keys = values = self.hidden.unsqueeze(1)
        else:
            keys, values = self.keys[layer], self.values[layer]
        excluded = self.window if self.config.exclude_window else 0
        read = (
            keys,
            values,
            _visible(self.lengths, keys, excluded),
            KeyChoice(keys_per_query(self.config, self.window), self.config.sinks),
            None if self.config.heads is None else tuple(self.config.heads),
            self.hidden is not None,
            window,
            self.config.first_step == "window",
        )
        index = self.indexes.get("hidden" if self.hidden is not None else f"keys.{layer}")
        if index is None:
            return LayerMemory(*read)
        return IndexedLayerMemory(*read, index=index, candidates=candidates_per_query(self.config, self.window))

    def _cross_inputs(
        self, prompt_ids: Tensor | None, prompt_mask: Tensor | None, record: AttentionReport | None
    ) -> dict[str, Any]:
        shape = model_shape(self.model_config)
        rows = DocumentRows(self.documents, len(self.lengths))
        some = self.hidden if self.hidden is not None else next(iter(self.keys.values()))
        placeholder = some.new_full((len(self), shape.key_heads, 1, shape.head_dim), torch.nan)
        cross = DynamicCache()
        for layer in range(shape.layers):
            memory = self._layer_memory(layer)
            cross.layers.append(MemoryCacheLayer(PlaceholderLayer(placeholder), layer, rows, memory, record=record))
        cache = EncoderDecoderCache(DynamicCache(config=self.model_config), cross)
        # One token of NaN stands for the encoder's output: its length makes the mask, and nothing may read it.
        states = placeholder.new_full((len(self), 1, encoder_width(self.model_config)), torch.nan)
        sparse = encoder_decoder_family(self.model_config).is_sparse
        inputs = {
            "encoder_outputs": (MoEModelOutput if sparse else BaseModelOutput)(last_hidden_state=states),
            "attention_mask": torch.ones(len(self), 1, dtype=torch.long, device=states.device),
            **cache_argument(cache),
        }
        if prompt_ids is not None:
            inputs["decoder_input_ids"] = prompt_ids
            if prompt_mask is not None:
                inputs["decoder_attention_mask"] = prompt_mask
        return inputs

    def _self_inputs(
        self, question_ids: Tensor, question_mask: Tensor | None, record: AttentionReport | None
    ) -> dict[str, Any]:
        taken = torch.tensor([self.positions_taken(document) for document in self.documents])
        shift = int(taken.max())
        rows = DocumentRows(self.documents, len(self.lengths))
        cache = DynamicCache(config=self.model_config)
        cache.layers = [
            MemoryCacheLayer(inner, layer, rows, self._layer_memory(layer), shift, record)
            for layer, inner in enumerate(cache.layers)
        ]
        device = question_ids.device
        real = torch.ones_like(question_ids) if question_mask is None else question_mask.to(question_ids.dtype)
        behind = (torch.arange(shift) >= shift - taken[:, None]).to(device, real.dtype)
        mask = torch.cat([behind, real], dim=1)
        inputs = {"input_ids": question_ids, "attention_mask": mask, **cache_argument(cache)}
        rows.is_padded = not bool(mask.all())
        if rows.is_padded:
            inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, shift:]
        return inputs

    def positions_taken(self, document: int) -> int:
        """Positions that a stored document takes in front of the local tokens of a decoder."""
        return memory_positions(int(self.lengths[document]), self.window, self.config.positions)[1]

    # On disk

    def save_pretrained(self, folder: str | Path, replace: bool = False) -> Path:
        """Write the memory to `folder`, whole or not at all: safetensors, indexes, a JSON description, checksums.

        Args:
            folder: new, or empty.
            replace: take the place of what is there, such as a shorter memory that this one grew from.

        Raises:
            FileExistsError: the folder holds something already and `replace` is false.
        """
        named = {**self.tensors(), "input_ids": self.input_ids, "lengths": self.lengths}
        if self.global_tokens is not None:
            named["global_tokens"] = self.global_tokens
        description = {
            "config": self.config.to_dict(),
            "model_type": self.model_config.model_type,
            "shape": model_shape(self.model_config)._asdict(),
            "window": self.window,
            "fingerprint": self.fingerprint,
            "documents": list(self.documents),
            "prefixes": list(self.prefixes),
            "is_indexed": bool(self.indexes),
            "recall": self.recall,
        }
        write_memory_files(Path(folder), named, description, self.indexes, replace)
        return Path(folder)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, model: PreTrainedModel, strict: bool = True, verify: bool = True
    ) -> "Memory":
        """Load a memory for `model`; its tensors are mapped from the file and never copied, only paged in when read.

        Its indexes, if it has some, are read whole, with checksums.

        Args:
            folder: written by `save_pretrained`.
            model: the model that will read it.
            strict: refuse a memory that other weights made.
            verify: compare checksums, which reads the file once; otherwise sizes only, and loading takes no time.

        Raises:
            ImportError: it has an index, and faiss is missing.
            ValueError: a file is missing, truncated or damaged (it is named), or other weights made the memory.
        """
        if hasattr(model, "get_base_model"):  # a PEFT model around it
            model = model.get_base_model()  # type: ignore[operator]
        description, named = read_memory_files(Path(folder), model, strict, verify)
        empty = cls(
            UnlimiformerConfig(**description["config"]),
            model.config,
            description["window"],
            description["fingerprint"],
            named.pop("input_ids"),
            named.pop("lengths"),
            tuple(description["documents"]),
            prefixes=tuple(description["prefixes"]),
            global_tokens=named.pop("global_tokens", None),
        )
        loaded = empty.with_tensors(named)
        if not description.get("is_indexed"):
            return loaded
        kept = keys_per_query(loaded.config, loaded.window) or 0
        ranges = key_ranges(loaded.config, loaded.window, loaded.lengths.tolist())
        indexes = {
            name: KeyIndex.load(Path(folder) / INDEX_FOLDER / name, ranges, keys.shape, loaded.config, kept)
            for name, keys in loaded._searched().items()
        }
        return replace(loaded, indexes=indexes, recall=description["recall"])


def _visible(lengths: Tensor, keys: Tensor, excluded: int = 0) -> Tensor | None:
    """(documents, source): real tokens, less the first `excluded` of documents longer than that; None if all."""
    source = keys.shape[2]
    places = torch.arange(source)
    visible = places < lengths[:, None]
    visible &= (places >= excluded) | (lengths[:, None] <= excluded)
    return None if bool(visible.all()) else visible.to(keys.device)
