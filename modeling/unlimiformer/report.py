"""What a generation read of its memory: which source tokens, how strongly, and how much of full attention was kept.

A report travels in the cache, so threads do not mix, and a generation without one pays nothing.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...pages import figure, heading, heat_map_png, page, paragraph, table, token_heat

HeadPlace = tuple[int, int]
"""A layer and one of its heads."""
DETAIL = 32
"""Source tokens remembered for each layer, head and step."""
SINKS = 4
"""First tokens of a document that draw attention whatever they say (Xiao et al. 2023); passages leave them out."""


@dataclass(frozen=True)
class QueryLayout:
    """How the queries of one attention call lie: (documents, key heads, groups x repeats x target, ...)."""

    groups: int
    repeats: int
    target: int


@dataclass(frozen=True)
class AttentionCall:
    """One call of attention to a memory.

    Args:
        layer: number of the layer.
        first_step: local position of the first query.
        layout: how queries lie.
        heads: the heads that read the memory, None for all.
        window_first: whether step 0 reads the first window instead.
    """

    layer: int
    first_step: int
    layout: QueryLayout
    heads: tuple[int, ...] | None = None
    window_first: bool = False


@dataclass(frozen=True)
class Passage:
    """A stretch of the document and the share of the attention to memory that fell on it."""

    start: int
    end: int
    share: float
    text: str


class AttentionReport:
    """Filled by the generation whose cache carries it; of several rows on one document, the first is recorded."""

    def __init__(self) -> None:
        self.input_ids: Tensor | None = None
        self.lengths: list[int] = []
        self._attention: dict[int, Tensor] = {}  # step -> (documents, source), summed over layers, mean over heads
        self._details: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}  # step, layer -> ids, weights
        self._layers: set[int] = set()
        self._mass: list[float] = []
        self._recall: list[float] = []
        self._memory_share: list[float] = []
        self._far: dict[int, list[Tensor]] = {}  # layer -> (heads,) of each step

    def begin(self, input_ids: Tensor, lengths: Tensor) -> None:
        """Note the documents that will be read: (documents, longest) and (documents,)."""
        self.input_ids, self.lengths = input_ids, lengths.tolist()

    def add(self, call: AttentionCall, blocks: list[tuple[Any, ...]], share: Tensor | None) -> None:
        """Note one attention call.

        Args:
            call: which one.
            blocks: what attention showed its `Observer`: (first query, weights, ids, mass), in order; and the recall
                of an index.
            share: (documents, key heads, count) of the whole softmax that fell on the memory, None for all of it.
        """
        weights = torch.cat([block[1] for block in blocks], dim=2).float().cpu()
        mass = torch.cat([block[3] for block in blocks], dim=2).float().cpu()
        ids = torch.arange(weights.shape[-1]).expand_as(weights)
        if blocks[0][2] is not None:
            ids = torch.cat([block[2] for block in blocks], dim=2).cpu()
        shares = torch.ones(weights.shape[:3]) if share is None else share.float().cpu()
        # (documents, heads, target, ...) of the first row that asks each document
        weights, mass, ids, shares = (_first_rows(tensor, call.layout) for tensor in (weights, mass, ids, shares))
        heads = list(range(weights.shape[1])) if call.heads is None else list(call.heads)
        skipped = 1 if call.window_first and call.first_step == 0 else 0
        if skipped == weights.shape[2]:
            return
        self._layers.add(call.layer)
        self._mass.append(mass[:, heads, skipped:].mean().item())
        if len(blocks[0]) > 4:
            recall = _first_rows(torch.cat([block[4] for block in blocks], dim=2).float().cpu(), call.layout)
            self._recall.append(recall[:, heads, skipped:].mean().item())
        self._memory_share.append(shares[:, heads, skipped:].mean().item())
        read = torch.zeros_like(weights)
        read[:, heads] = (weights * shares.unsqueeze(-1))[:, heads]
        far = (read * (ids >= SINKS)).sum(-1).mean(0)  # (heads, target)
        self._far.setdefault(call.layer, []).extend(far[:, skipped:].unbind(1))
        for target in range(skipped, weights.shape[2]):
            step = call.first_step + target
            self._add_step(step, call.layer, read[:, :, target], ids[:, :, target], len(heads))

    def _add_step(self, step: int, layer: int, weights: Tensor, ids: Tensor, heads: int) -> None:
        """`weights` and `ids` (documents, heads, kept) of one layer and step; `heads` of them read the memory."""
        documents = weights.shape[0]
        assert self.input_ids is not None
        total = self._attention.setdefault(step, torch.zeros(documents, self.input_ids.shape[1]))
        total.scatter_add_(1, ids.reshape(documents, -1), weights.reshape(documents, -1) / heads)
        best, places = weights.topk(min(DETAIL, weights.shape[-1]), dim=-1)
        self._details[step, layer] = ids.gather(-1, places), best

    @property
    def steps(self) -> list[int]:
        """The recorded steps: local positions of the queries."""
        return sorted(self._attention)

    @property
    def mass(self) -> float:
        """Mean share of the softmax over all of the memory's keys that the kept keys hold; 1 if all were kept."""
        return sum(self._mass) / max(len(self._mass), 1)

    @property
    def recall(self) -> float:
        """Mean share of the exact best keys that an index found; 1 where all keys were searched."""
        return sum(self._recall) / len(self._recall) if self._recall else 1.0

    @property
    def memory_share(self) -> float:
        """Mean share of attention that fell on the memory rather than on local tokens."""
        return sum(self._memory_share) / max(len(self._memory_share), 1)

    def far_attention(self) -> dict[int, Tensor]:
        """Of each recorded layer, the share of attention (heads,) that fell on the memory, mean over steps.

        Less what fell on the document's first tokens, which draw attention whatever they say.
        """
        return {layer: torch.stack(steps).mean(0) for layer, steps in sorted(self._far.items())}

    def attention_to(self, start: int, end: int, document: int = 0) -> dict[int, Tensor]:
        """Of each recorded layer, the share of attention (heads,) on source tokens [start, end), mean over steps.

        Of each step the `DETAIL` tokens that a head read most are counted.
        """
        shares: dict[int, Tensor] = {}
        for (_, layer), (ids, weights) in sorted(self._details.items()):
            inside = (weights[document] * ((ids[document] >= start) & (ids[document] < end))).sum(-1)
            shares[layer] = shares.get(layer, 0) + inside / len(self.steps)
        return shares

    def tokens(self, step: int, layer: int, head: int, document: int = 0) -> tuple[Tensor, Tensor]:
        """Source indices and weights, strongest first, of what one head read at one step: at most `DETAIL` of them.

        Raises:
            ValueError: that step, layer or head was not recorded.
        """
        if (step, layer) not in self._details:
            raise ValueError(
                f"`step` {step} of `layer` {layer} was not recorded; steps {self.steps[:3]}...{self.steps[-3:]}, "
                f"layers {sorted(self._layers)} were."
            )
        ids, weights = self._details[step, layer]
        if not 0 <= head < ids.shape[1]:
            raise ValueError(f"`head` must lie in [0, {ids.shape[1]}), got {head}.")
        return ids[document, head], weights[document, head]

    def matrix(self, document: int = 0, heads: Sequence[HeadPlace] | None = None) -> Tensor:
        """(steps, source): attention of each step to each source token.

        Args:
            document: which one.
            heads: whose mean it is, such as `unlimited.retrieval_heads(memory)`, of the `DETAIL` tokens that each read
                most in a step; None for the mean over all layers and heads.

        Raises:
            ValueError: nothing was recorded, or not one of `heads`.
        """
        if not self.steps:
            raise ValueError("Nothing was recorded: pass the report to `memory.inputs(record=...)` and generate.")
        if heads is None:
            rows = torch.stack([self._attention[step][document] / max(len(self._layers), 1) for step in self.steps])
            return rows[:, : self.lengths[document]]
        read = torch.zeros(len(self.steps), self.lengths[document])
        for row, step in zip(read, self.steps, strict=True):
            for layer, head in heads:
                ids, weights = self.tokens(step, layer, head, document)
                inside = ids < len(row)  # a shorter document among others: what is beyond it has no weight
                row.index_add_(0, ids[inside], weights[inside] / len(heads))
        return read

    def passages(
        self,
        tokenizer: Any,
        count: int = 3,
        length: int = 64,
        document: int = 0,
        since: int = 0,
        heads: Sequence[HeadPlace] | None = None,
    ) -> list[Passage]:
        """The `count` passages of `length` tokens, apart from each other, that were read most from step `since` on.

        Args:
            tokenizer: that made the document's tokens.
            count, length: how many passages, of how many tokens.
            document: which one.
            since: first step that counts.
            heads: whose reading counts, as of `matrix`; all of them together tell little of where an answer stands.

        Raises:
            ValueError: one of `heads` was not recorded.
        """
        steps = [place for place, step in enumerate(self.steps) if step >= since]
        read = self.matrix(document, heads)[steps].sum(0)
        read[:SINKS] = 0
        read = read / read.sum().clamp(min=torch.finfo(read.dtype).tiny)
        width = min(length, read.shape[0])
        sums = read.unfold(0, width, 1).sum(-1)
        found = []
        for _ in range(count):
            start = int(sums.argmax())
            if sums[start] <= 0:
                break
            ids = self.input_ids[document, start : start + width]  # type: ignore[index]
            found.append(Passage(start, start + width, float(sums[start]), tokenizer.decode(ids.tolist())))
            sums[max(0, start - width + 1) : start + width] = -1
        return found

    def heatmap(
        self,
        tokenizer: Any,
        path: str | Path,
        document: int = 0,
        answer: str = "",
        heads: Sequence[HeadPlace] | None = None,
    ) -> Path:
        """Write `path` (HTML) and a PNG beside it: what was read, over the document's text and over the steps.

        Args:
            tokenizer: that made the document's tokens.
            path: where to.
            document: which one.
            answer: written on the page.
            heads: what these read, as of `matrix`; None for all heads.

        Returns:
            The HTML file.
        """
        path = Path(path).with_suffix(".html")
        matrix = self.matrix(document, heads)
        source = matrix.shape[1]
        bins = min(source, 200)
        edges = torch.linspace(0, source, bins + 1).long()
        read = matrix.clone()
        read[:, :SINKS] = 0
        cumulative = torch.cat([torch.zeros(read.shape[0], 1), read.cumsum(1)], dim=1)
        binned = cumulative[:, edges[1:]] - cumulative[:, edges[:-1]]
        ids = self.input_ids[document, :source].tolist()  # type: ignore[index]
        png = heat_map_png(
            binned.tolist(),
            path.with_suffix(".png"),
            x_labels=[f"{edge:,}" for edge in edges[:-1].tolist()],
            y_labels=[str(step) for step in self.steps],
            title="What was read of the document",
            axes_names=("source token", "step"),
        )
        passages = self.passages(tokenizer, count=5, document=document, heads=heads)
        shown = "all heads" if heads is None else ", ".join(f"head {head} of layer {layer}" for layer, head in heads)
        rows = [(f"{p.start:,}-{p.end:,}", f"{100 * p.share:.1f} %", p.text) for p in passages]
        pieces = [tokenizer.decode([token]) for token in ids]
        body = [
            paragraph(
                f"{source:,} source tokens, {len(self.steps)} steps, {len(self._layers)} layers. "
                f"{100 * self.memory_share:.1f} % of attention fell on the memory; the kept keys hold "
                f"{100 * self.mass:.1f} % of the softmax over all of its keys. The first {SINKS} tokens, which draw "
                "attention whatever they say, are left out of the pictures."
            ),
            *([heading("Answer"), paragraph(answer)] if answer else []),
            figure(png, f"Attention by step and place, mean over {shown}"),
            heading("Most read passages"),
            table(rows, header=("tokens", "share", "text")),
            heading("The document"),
            token_heat(pieces, read.sum(0).tolist(), scale=float(read.sum(0).quantile(0.999))),
        ]
        page("Attention over a long document", "".join(body), path)
        return path


def _first_rows(queries: Tensor, layout: QueryLayout) -> Tensor:
    """(documents, key heads, count, ...) to (documents, heads, target, ...) of the first row of each document."""
    split = queries.unflatten(2, (layout.groups, layout.repeats, layout.target))
    return split[:, :, :, 0].flatten(1, 2)


_RECORDING: ContextVar[AttentionReport | None] = ContextVar("graft_recording", default=None)


@contextmanager
def recording() -> Iterator[AttentionReport]:
    """Give one report to every cache this thread makes inside the `with`."""
    report = AttentionReport()
    token = _RECORDING.set(report)
    try:
        yield report
    finally:
        _RECORDING.reset(token)


def current_report() -> AttentionReport | None:
    """The report of the `recording()` this thread is in, if any."""
    return _RECORDING.get()
