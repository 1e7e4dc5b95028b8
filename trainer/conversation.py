"""A saved model reads documents and answers questions about them: what scripts/generate.py does, as a class.

A decoder remembers the prefix and the documents once; each question and the suffix stay apart, in ordinary attention,
so they are never what a long document pushes out. An encoder-decoder reads the documents again for each question,
which stands in front of every window.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from transformers import TextStreamer

from graft.atomic_files import new_folder, write_json
from graft.configuration.configuration_unlimiformer import UnlimiformerConfig
from graft.modeling.unlimiformer.attach import unlimiform
from graft.modeling.unlimiformer.memory import Memory
from graft.modeling.unlimiformer.memory_files import DESCRIPTION_FILE
from graft.modeling.unlimiformer.report import AttentionReport, HeadPlace, Passage
from graft.modeling.unlimiformer.retrieval_heads import retrieval_heads
from graft.trainer.abilities import has_own_memory
from graft.trainer.collators import padding_id
from graft.trainer.configuration_error import ConfigurationError
from graft.trainer.generation import chat_frame, check_generation, load, memory_options, with_limit
from graft.trainer.named_texts import NamedText
from graft.trainer.tokenisation import plain_ids, special_tokens_around

logger = logging.getLogger(__name__)

DOCUMENTS_FILE = "documents.json"
"""Beside a saved memory: where each document lies in it, and the suffix of its questions."""
STRETCHES, STRETCH = 12, 12
"""Of a document, asked about itself, to tell which heads find; and the tokens of each."""


@dataclass(frozen=True)
class Request:
    """A model and how it is to read and answer.

    Args:
        model: a folder or id: any model, an adapter, or a folder that a run has written.
        prefix, suffix: texts around documents and question, such as a chat's marks.
        chat: take prefix and suffix from the tokenizer's chat template.
        memory: options laid over those in the folder's memory.json; None for no memory at all.
        saved: folder of a memory to load in place of reading; its options and suffix are those it was made with.
        generation: fields of `GenerationConfig`.
        trust_remote_code: the model's own code may run.
        revision: commit, tag or branch of the model's or adapter's id; an adapter names that of its base.
        sources: passages to be quoted with each answer.
        source_heads: so many heads of a decoder that find what they are asked say which; 0 for all heads.
        streams: write answers to standard output while they are made.
    """

    model: str
    prefix: str = ""
    suffix: str = ""
    chat: bool = False
    memory: Mapping[str, Any] | None = field(default_factory=dict)
    saved: Path | None = None
    generation: Mapping[str, Any] = field(default_factory=dict)
    trust_remote_code: bool = False
    revision: str | None = None
    sources: int = 0
    source_heads: int = 2
    streams: bool = False


@dataclass(frozen=True)
class Place:
    """A document and where it lies among the tokens that were read, [start, end)."""

    name: str
    start: int
    end: int


@dataclass(frozen=True)
class Source:
    """A stretch of a document, in the document's own tokens, and the share of the attention that fell on it."""

    document: str
    start: int
    end: int
    share: float
    text: str


@dataclass(frozen=True)
class Answer:
    """The generated text, and the passages most read for it if they were asked for."""

    text: str
    sources: list[Source] = field(default_factory=list)


class Conversation:
    """Documents that a model has read, and answers about them; at the end of the `with` the model is as it was.

    Raises:
        ConfigurationError: the model cannot be loaded, has no attention that memory serves, or an option is wrong.
    """

    def __init__(self, request: Request) -> None:
        check_generation(request.generation)
        config = _checked_options(request)
        self.model, self.tokenizer = load(request.model, request.trust_remote_code, request.revision)
        self._request = request
        self._generation = with_limit(request.generation, self.model)
        self._prefix, self._suffix = self._frame(request)
        self._documents: Sequence[NamedText] = ()
        self._read: _Read | None = None  # of all documents, without a question
        self._heads: list[HeadPlace] | None = None
        self._reader: Any = None
        self._stack = ExitStack()
        if config is None:
            return
        own = has_own_memory(self.model)
        if own and request.memory:
            raise ConfigurationError("The model has its own memory: `--memory.*` options would do nothing.")
        self._local_tokens = (self.model.config.unlimiformer_config if own else config).local_tokens
        try:
            self._reader = self._stack.enter_context(
                nullcontext(self.model) if own else unlimiform(self.model, config)
            )
        except (TypeError, ValueError) as error:
            raise ConfigurationError(f"{error} `--no-memory` generates without one.") from error

    def __enter__(self) -> Conversation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether a question is read with its documents; such a model also answers without any."""
        return bool(self.model.config.is_encoder_decoder)

    @property
    def streams(self) -> bool:
        """Whether answers are written while they are made: beams know theirs at the end only."""
        return self._request.streams and self._request.generation.get("num_beams", 1) == 1

    # Reading

    def give(self, documents: Sequence[NamedText]) -> None:
        """Take documents to be read, one behind the other; they are read when they are needed first."""
        self._documents = documents

    def load(self) -> None:
        """Take the memory in the folder `request.saved` in place of documents.

        Raises:
            ValueError: it is not whole, or other weights made it.
        """
        assert self._request.saved is not None
        folder = self._request.saved
        memory = Memory.from_pretrained(folder, self.model).to(self.model.device)
        places = [Place(str(folder), 0, int(memory.lengths[0]))]
        if (folder / DOCUMENTS_FILE).is_file():  # else `save_pretrained` alone has written it
            written = json.loads((folder / DOCUMENTS_FILE).read_text(encoding="utf-8"))
            places, self._suffix = [Place(**place) for place in written["documents"]], written["suffix"]
        self._read = _Read(memory, places)

    def save(self, folder: Path) -> None:
        """Read what was given, if that is not done yet, and write the memory to a new folder, whole or not at all."""
        read = self._all_read()
        with new_folder(folder) as new:
            read.memory.save_pretrained(new)
            write_json(new / DOCUMENTS_FILE, {"documents": list(map(asdict, read.places)), "suffix": self._suffix})

    def _all_read(self) -> _Read:
        if self._read is None:
            ids, places = self._tokens(self._prefix)
            self._read = _Read(self._remembered(ids), places)
        return self._read

    def _remembered(self, ids: Tensor, prefix: Tensor | None = None) -> Memory:
        """Say what reading will cost, then read."""
        tokens, repeated = ids.shape[1], 0 if prefix is None else prefix.shape[1]
        logger.info("Remembering %s tokens: %s.", f"{tokens:,}", self._reader.estimate(tokens, repeated))
        memory: Memory = self._reader.remember(ids, prefix_ids=prefix, progress=True)
        return memory

    # Answering

    def ask(self, question: str = "", page: Path | None = None) -> Answer:
        """Answer a question; without one, a decoder goes on with the text and an encoder-decoder answers to it.

        Args:
            question: asked after the documents.
            page: where to write HTML of what was read.

        Raises:
            ValueError: the question has no room behind the memory, or a saved memory cannot take it.
        """
        if self._reader is None:
            return Answer(self._generated(self._plain_inputs(question)))
        read, local = self._read_for(question)
        if read is None:
            assert local is not None
            return Answer(self._generated(_unpadded(local)))
        report = AttentionReport() if self._request.sources or page else None
        new = self._generation.get("max_new_tokens", 0)
        text = self._generated(read.memory.inputs(local, record=report, max_new_tokens=new))
        if report is None or not report.steps:
            return Answer(text)
        heads = self._heads_that_find(read.memory)
        if page is not None:
            report.heatmap(self.tokenizer, page, answer=text, heads=heads)
        since = 0 if local is None or heads else local.shape[1] - 1  # heads that find are led by the question
        passages = report.passages(self.tokenizer, count=self._request.sources, since=since, heads=heads)
        return Answer(text, [self._source(passage, read) for passage in passages])

    def _heads_that_find(self, memory: Memory) -> list[HeadPlace] | None:
        """Those whose reading is quoted, told apart once; None for all, as in a document too short to ask them."""
        count = self._request.source_heads
        if self.is_encoder_decoder or not count or int(memory.lengths[0]) < STRETCHES * STRETCH:
            return None
        if self._heads is None:
            self._heads = retrieval_heads(self.model, memory, count, STRETCHES, STRETCH)
        return self._heads

    def _read_for(self, question: str) -> tuple[_Read | None, Tensor | None]:
        """What has been read to answer a question, None if nothing is remembered, and a decoder's local tokens."""
        if self.is_encoder_decoder:
            return (self._read_with(question) if question else self._all_read()), None
        if apart := _behind(question) + self._suffix:
            return self._all_read(), self._ids(apart)
        ids, places = self._tokens(self._prefix)
        before, local = ids[:, : -self._local_tokens], ids[:, -self._local_tokens :]
        return (_Read(self._remembered(before), places) if before.shape[1] else None), local

    def _read_with(self, question: str) -> _Read:
        """The documents, the question in front of every window of them."""
        asked = self._ids(f"{self._prefix}{question}\n\n", self._special_tokens()[0])
        ids, places = self._tokens("", begins=False)
        shift = asked.shape[1]
        moved = [replace(place, start=place.start + shift, end=place.end + shift) for place in places]
        return _Read(self._remembered(ids, asked), moved)

    def _plain_inputs(self, question: str) -> dict[str, Tensor]:
        if self.is_encoder_decoder:  # where everything is one source, the question stands first
            ids, _ = self._tokens(self._prefix + (f"{question}\n\n" if question else ""))
        else:
            ids, _ = self._tokens(self._prefix)
            apart = _behind(question) + self._suffix
            ids = torch.cat([ids, self._ids(apart)], dim=1) if apart else ids
        positions = getattr(self.model.config, "max_position_embeddings", None)
        if positions is not None and ids.shape[1] > positions:
            raise ConfigurationError(
                f"The text has {ids.shape[1]} tokens, the model {positions} positions: use the memory."
            )
        return _unpadded(ids)

    def _generated(self, inputs: Mapping[str, Any]) -> str:
        options = {"pad_token_id": padding_id(self.tokenizer), **self._generation}
        if self.streams:
            skips = not self.is_encoder_decoder
            options["streamer"] = TextStreamer(self.tokenizer, skip_prompt=skips, skip_special_tokens=True)
        with torch.no_grad():
            sequences = self.model.generate(**inputs, **options)
        prompt = 0 if self.is_encoder_decoder else inputs["input_ids"].shape[1]
        return str(self.tokenizer.decode(sequences[0, prompt:], skip_special_tokens=True)).strip()

    def _source(self, passage: Passage, read: _Read) -> Source:
        """A passage within the document that most of it lies in."""
        place = max(read.places, key=lambda place: min(place.end, passage.end) - max(place.start, passage.start))
        start, end = max(passage.start, place.start), min(passage.end, place.end)
        text = str(self.tokenizer.decode(read.memory.input_ids[0, start:end].tolist()))
        return Source(place.name, start - place.start, end - place.start, passage.share, text)

    # Tokens

    def _frame(self, request: Request) -> tuple[str, str]:
        if not request.chat:
            return request.prefix, request.suffix
        if self.tokenizer.chat_template is None:
            raise ConfigurationError(f"`--chat` needs a chat template; the tokenizer of {request.model!r} has none.")
        prefix, suffix = chat_frame(self.tokenizer)
        return prefix + request.prefix, request.suffix + suffix

    def _special_tokens(self) -> tuple[list[int], list[int]]:
        """Those that start and end a sequence; a chat's frame has them already."""
        return ([], []) if self._request.chat else special_tokens_around(self.tokenizer)

    def _tokens(self, lead: str, begins: bool = True) -> tuple[Tensor, list[Place]]:
        """Ids (1, tokens) of `lead` and all documents, an encoder's with suffix and end, and where documents lie.

        Raises:
            ConfigurationError: there are no documents, but a saved memory.
        """
        if not self._documents:
            raise ConfigurationError(
                "A saved memory does not hold the documents to be read again: ask a question of a decoder, and none "
                "of an encoder-decoder, which reads it with the documents."
            )
        before, after = self._special_tokens()
        texts = [lead + self._documents[0].text, *(f"\n\n{document.text}" for document in self._documents[1:])]
        if self.is_encoder_decoder:
            texts[-1] += self._suffix
        ids = list(before) if begins else []
        start, places = len(ids) + len(plain_ids(self.tokenizer, [lead])[0]), []
        for document, piece in zip(self._documents, plain_ids(self.tokenizer, texts), strict=True):
            ids += piece
            places.append(Place(document.name, start, len(ids)))
            start = len(ids)
        ids += after if self.is_encoder_decoder else []
        return torch.tensor([ids], dtype=torch.long, device=self.model.device), places

    def _ids(self, text: str, before: Sequence[int] = ()) -> Tensor:
        ids = [*before, *plain_ids(self.tokenizer, [text])[0]]
        return torch.tensor([ids], dtype=torch.long, device=self.model.device)


@dataclass(frozen=True)
class _Read:
    """A memory and where the documents lie in it."""

    memory: Memory
    places: list[Place]


def _checked_options(request: Request) -> UnlimiformerConfig | None:
    """The memory's options, None for no memory; what does not go together is refused before anything is loaded."""
    if request.memory is None:
        if request.saved is not None:
            raise ConfigurationError("`--load-memory` brings a memory, and `--no-memory` leaves it out.")
        return None
    if request.saved is None:
        return memory_options(request.model, request.memory, request.revision)
    if request.memory or request.prefix or request.suffix or request.chat:
        raise ConfigurationError(
            "`--load-memory` brings the options, prefix and suffix that the memory was made with: leave out "
            "`--memory.*`, `--prefix`, `--suffix` and `--chat`."
        )
    try:
        description = json.loads((request.saved / DESCRIPTION_FILE).read_text(encoding="utf-8"))
        return UnlimiformerConfig(**description["config"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigurationError(f"`--load-memory` {str(request.saved)!r} holds no memory: {error}") from error


def _behind(question: str) -> str:
    return f"\n\n{question}" if question else ""


def _unpadded(ids: Tensor) -> dict[str, Tensor]:
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
