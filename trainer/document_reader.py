"""One model that reads documents and answers questions about them, step by step: what a page to try it needs.

The attachment stays for as long as the reader lives; the memories belong to whoever asked for them, so several people
may read and ask at once.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

from graft.modeling.unlimiformer.attach import unlimiform
from graft.modeling.unlimiformer.memory import Memory
from graft.modeling.unlimiformer.report import AttentionReport, Passage
from graft.trainer.abilities import MEMORY_FILE, has_own_memory
from graft.trainer.collators import padding_id
from graft.trainer.configuration_error import ConfigurationError
from graft.trainer.generation import ANSWER_TOKENS, chat_frame, check_generation, load, memory_options
from graft.trainer.tokenisation import plain_ids, special_tokens_around

PIECES = 20
"""A document is read in at most so many pieces: each copies what is remembered already."""
READS = {"window": 1024, "overlap": 0.25, "keys_per_query": 256}
"""Options of the memory where neither the folder nor the user has any: small windows, so that one sees it read."""
LEAST_PIECE = 2
"""Windows of a piece, at least: the end of each piece is read twice."""


@dataclass(frozen=True)
class Reading:
    """How far a document has been read.

    Args:
        memory: of the tokens read so far; complete in the last of a document's readings.
        tokens: read so far.
        total: tokens of the document.
    """

    memory: Memory
    tokens: int
    total: int


@dataclass(frozen=True)
class Reply:
    """An answer as far as it goes; the last of a question's replies also says what was read for it.

    Args:
        text: of the answer so far.
        passages: the most read ones; empty until the answer is whole.
        page: HTML of what was read, over the text of the document; "" until the answer is whole.
    """

    text: str
    passages: list[Passage] = field(default_factory=list)
    page: str = ""


class DocumentReader:
    """A decoder with a memory, that tells how far it has read and streams its answers.

    Args:
        model: folder or id of a decoder, or of an adapter of one.
        memory: options laid over those in the folder's memory.json, or over `READS` where there is none.
        generation: fields of `GenerationConfig`, for every answer.
        trust_remote_code: the model's own code may run.

    Raises:
        ConfigurationError: the model cannot be loaded, is no decoder that memory serves, or an option is wrong.
    """

    def __init__(
        self,
        model: str,
        memory: Mapping[str, Any] | None = None,
        generation: Mapping[str, Any] | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        check_generation(generation or {})
        saved = (Path(model) / MEMORY_FILE).is_file()
        config = memory_options(model, {**({} if saved else READS), **(memory or {})})
        self.model, self.tokenizer = load(model, trust_remote_code)
        if self.model.config.is_encoder_decoder:
            raise ConfigurationError(
                f"`model` {model!r} is an encoder-decoder, which reads the question with its document: a reader asks "
                "many questions of one reading, and needs a decoder."
            )
        own = has_own_memory(self.model)
        if own and memory:
            raise ConfigurationError("The model has its own memory: options of another would do nothing.")
        try:
            self._reader: Any = self.model if own else unlimiform(self.model, config)
        except (TypeError, ValueError) as error:
            raise ConfigurationError(str(error)) from error
        options = {"max_new_tokens": ANSWER_TOKENS, "do_sample": False, **(generation or {})}
        self._generation = {"pad_token_id": padding_id(self.tokenizer), **options}
        chats = self.tokenizer.chat_template is not None
        self._prefix, self._suffix = chat_frame(self.tokenizer) if chats else ("", "")
        self._start = [] if chats else special_tokens_around(self.tokenizer)[0]

    def read(self, document: str) -> Iterator[Reading]:
        """Read a document piece by piece; the last memory is what reading it at once gives.

        Raises:
            ValueError: the document is empty, or its memory would be larger than `max_bytes`.
        """
        if not document.strip():
            raise ValueError("`document` is empty: give it some text.")
        (text,) = plain_ids(self.tokenizer, [self._prefix + document])
        ids = torch.tensor([[*self._start, *text]], dtype=torch.long, device=self.model.device)
        total = ids.shape[1]
        memory: Memory | None = None
        for part in ids.split(self._piece(total), dim=1):
            memory = self._reader.remember(part) if memory is None else self._reader.append(memory, part)
            yield Reading(memory, int(memory.lengths[0]), total)

    def ask(self, memory: Memory, question: str) -> Iterator[Reply]:
        """Answer from a memory, word by word; whoever stops listening stops the generation.

        Raises:
            ValueError: the question is empty, or too long for the model's positions.
        """
        if not question.strip():
            raise ValueError("`question` is empty: ask something.")
        (ids,) = plain_ids(self.tokenizer, [f"\n\n{question}{self._suffix}"])
        local = torch.tensor([ids], dtype=torch.long, device=self.model.device)
        report = AttentionReport()
        inputs = memory.inputs(local, record=report, max_new_tokens=self._generation["max_new_tokens"])
        text = ""
        for piece in _streamed(self.model, self.tokenizer, {**inputs, **self._generation}):
            text += piece
            yield Reply(text)
        passages = report.passages(self.tokenizer, since=len(ids) - 1)
        yield Reply(text.strip(), passages, _page(report, self.tokenizer, text.strip()))

    def _piece(self, total: int) -> int:
        """Tokens of a piece."""
        size = self._reader.estimate(total)
        window: int = size.tokens_read // size.windows
        return max(LEAST_PIECE * window, -(-total // PIECES))


class _Listening(StoppingCriteria):
    """Stops a generation that nobody listens to any more."""

    def __init__(self) -> None:
        self.stopped = threading.Event()

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self.stopped.is_set(), device=input_ids.device)


def _streamed(model: Any, tokenizer: PreTrainedTokenizerBase, arguments: Mapping[str, Any]) -> Iterator[str]:
    """The pieces of text that `model.generate(**arguments)` makes in a thread; its error is raised here."""
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    listening, errors = _Listening(), []

    def generate() -> None:
        try:
            with torch.no_grad():
                model.generate(**arguments, streamer=streamer, stopping_criteria=StoppingCriteriaList([listening]))
        except Exception as error:  # it belongs to whoever reads the stream
            errors.append(error)
            streamer.on_finalized_text("", stream_end=True)

    thread = threading.Thread(target=generate, daemon=True)
    thread.start()
    try:
        yield from streamer
    finally:
        listening.stopped.set()
        thread.join()
    if errors:
        raise errors[0]


def _page(report: AttentionReport, tokenizer: PreTrainedTokenizerBase, answer: str) -> str:
    """The report's own page, its picture inside."""
    with tempfile.TemporaryDirectory() as folder:
        return report.heatmap(tokenizer, Path(folder) / "read.html", answer=answer).read_text(encoding="utf-8")
