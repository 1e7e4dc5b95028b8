"""The data sets of the Unlimiformer paper as files a run reads: from script-free sources to Parquet.

SCROLLS (Shaham et al. 2022, arXiv 2201.03533) lies on the Hub as a zip of JSON lines for each task; SQuAD and HotpotQA
as Parquet, of which SLED (Ivgi et al. 2022, arXiv 2208.00748) made the variants that the paper took over.
"""

from __future__ import annotations

import io
import json
import logging
import random
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset

from graft.atomic_files import new_file
from graft.trainer.configuration_error import ConfigurationError

logger = logging.getLogger(__name__)

Row = dict[str, Any]
DISTRACTORS = 9  # passages beside the right one, as in SLED


def document_of_its_own(row: Mapping[str, Any]) -> Row:
    """A row of a task without questions: id, document, answer."""
    return {"id": row["id"], "document": row["input"], "answer": row["output"]}


def question_before_document(row: Mapping[str, Any]) -> Row:
    """A row whose input is a question, a blank line and the document: id, question, document, answer."""
    return _split(row, str(row["input"]).find("\n\n"))


def choices_before_document(row: Mapping[str, Any]) -> Row:
    """A row of QuALITY, whose four choices stand between question and document; they go with the question."""
    text = str(row["input"])
    return _split(row, text.find("\n\n", text.find("(D)")))


def _split(row: Mapping[str, Any], end: int) -> Row:
    if end < 0:
        raise ConfigurationError(f"The row {row['id']!r} has no blank line between question and document.")
    text = str(row["input"])
    return {
        "id": row["id"],
        "question": text[:end].strip(),
        "document": text[end:].strip(),
        "answer": row["output"],
    }


SCROLLS: dict[str, Callable[[Mapping[str, Any]], Row]] = {
    "gov_report": document_of_its_own,
    "summ_screen_fd": document_of_its_own,
    "qmsum": question_before_document,
    "qasper": question_before_document,
    "narrative_qa": question_before_document,
    "quality": choices_before_document,
    "contract_nli": question_before_document,
}
"""A row of each task's JSON lines (id, pid, input, output) to ours."""


def squad_rows(rows: Sequence[Mapping[str, Any]], shuffles: bool | None, seed: int = 0) -> Iterator[Row]:
    """SQuAD with its own passage, or behind it nine drawn ones, or the ten in a drawn order.

    Args:
        rows: id, question, context, answers {"text": [...]}.
        shuffles: None for the passage alone, False for distractors behind it, True for ten passages shuffled.
    """
    passages = sorted({str(row["context"]) for row in rows})
    drawing = random.Random(seed)
    for row in rows:
        document = [str(row["context"])]
        if shuffles is not None:
            drawn = drawing.sample(passages, min(DISTRACTORS + 1, len(passages)))
            document += [passage for passage in drawn if passage != row["context"]][:DISTRACTORS]
        if shuffles:
            drawing.shuffle(document)
        answers = list(dict.fromkeys(row["answers"]["text"]))
        yield {"id": row["id"], "question": row["question"], "document": "\n".join(document), "answer": answers}


def hotpotqa_rows(rows: Iterable[Mapping[str, Any]], second_only: bool) -> Iterator[Row]:
    """HotpotQA with its two gold passages, or with the second alone; in the order of the supporting facts.

    Args:
        rows: id, question, answer, supporting_facts {"title": [...]}, context {"title": [...], "sentences": [[...]]}.
    """
    for row in rows:
        passages = dict(zip(row["context"]["title"], row["context"]["sentences"], strict=True))
        titles = list(dict.fromkeys(row["supporting_facts"]["title"]))
        texts = ["".join(passages[title]) for title in titles if title in passages]
        document = "\n".join(texts[-1:] if second_only else texts)
        yield {"id": row["id"], "question": row["question"], "document": document, "answer": row["answer"]}


@dataclass(frozen=True)
class Variant:
    """What a variant is made of: a data set on the Hub, its config, and a function of a split's rows."""

    dataset: str
    config: str | None
    rows: Callable[[Any], Iterator[Row]]


VARIANTS = {
    "squad": Variant("rajpurkar/squad", None, lambda rows: squad_rows(rows, None)),
    "squad_ordered_distractors": Variant("rajpurkar/squad", None, lambda rows: squad_rows(rows, False)),
    "squad_shuffled_distractors": Variant("rajpurkar/squad", None, lambda rows: squad_rows(rows, True)),
    "hotpotqa": Variant("hotpotqa/hotpot_qa", "distractor", lambda rows: hotpotqa_rows(rows, False)),
    "hotpotqa_second_only": Variant("hotpotqa/hotpot_qa", "distractor", lambda rows: hotpotqa_rows(rows, True)),
}
PAPER_DATASETS = (*SCROLLS, *VARIANTS)


def _zipped_split(path: Path, split: str) -> list[Row]:
    """The rows of `<anything>/<split>.jsonl` in the zip."""
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if Path(name).name == f"{split}.jsonl"]
        if len(names) != 1:
            raise ConfigurationError(f"{str(path)!r} must hold one {split}.jsonl, it holds {archive.namelist()}.")
        with archive.open(names[0]) as lines:
            return [json.loads(line) for line in io.TextIOWrapper(lines, encoding="utf-8") if line.strip()]


def _splits(name: str, source: str | None) -> Iterator[tuple[str, Iterable[Row]]]:
    """The splits with answers of a data set; SCROLLS keeps those of its test sets to itself."""
    if name in VARIANTS:
        variant = VARIANTS[name]
        try:
            loaded = load_dataset(source or variant.dataset, variant.config if source is None else None)
        except Exception as error:  # offline, no such folder, broken files: no common class
            reason = " ".join(str(error).split())
            raise ConfigurationError(f"{source or variant.dataset!r} cannot be loaded: {reason}") from error
        for split in ("train", "validation"):
            yield split, variant.rows(loaded[split])
        return
    path = Path(source or f".cache/scrolls/{name}.zip")
    if not path.is_file():
        raise ConfigurationError(
            f"There is no {str(path)!r}; get it with: hf download tau/scrolls {name}.zip --repo-type dataset "
            f"--local-dir {path.parent}"
        )
    for split in ("train", "validation"):
        yield split, map(SCROLLS[name], _zipped_split(path, split))


def prepare_paper_dataset(name: str, output: Path, source: str | None = None) -> dict[str, int]:
    """Write `output`/train.parquet and validation.parquet with the columns id, question, document, answer.

    Args:
        name: one of PAPER_DATASETS.
        source: the zip of a SCROLLS task, `.cache/scrolls/<name>.zip` by default; of the others a folder or Hub id
            instead of their own.

    Returns:
        Split -> rows.

    Raises:
        ConfigurationError: the name is unknown, or the source is missing or broken.
    """
    if name not in PAPER_DATASETS:
        raise ConfigurationError(f"There is no data set {name!r}; there are {', '.join(PAPER_DATASETS)}.")
    counts = {}
    for split, rows in _splits(name, source):
        table = Dataset.from_list(list(rows))
        with new_file(output / f"{split}.parquet") as temporary:
            table.to_parquet(str(temporary))
        counts[split] = len(table)
    return counts
