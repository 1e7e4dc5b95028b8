"""What `--dry-run` shows: one example as the model will see it, what is trained, and what the run would do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from graft.trainer.loading import parameter_counts
from graft.trainer.streamed_rows import first_rows, is_streamed
from graft.trainer.tokenisation import IGNORED

if TYPE_CHECKING:
    from graft.trainer.training_run import Prepared


def plan_of(prepared: Prepared) -> str:
    """The plan in lines of text."""
    configuration, args = prepared.configuration, prepared.args
    counts = parameter_counts(prepared.model)
    batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    kind = "adapter" if configuration.adapter else "all weights" if counts["trained"] == counts["total"] else "some"
    lines = [
        f"model      {configuration.model.name or configuration.model.config} ({type(prepared.model).__name__})",
        f"parameters {counts['total']:,}, trained {counts['trained']:,} ({kind})",
        f"memory     {configuration.memory if configuration.memory is not None else 'none'}",
        f"retrieval  {configuration.retrieval if configuration.retrieval is not None else 'none'}",
        f"graph      {configuration.graph if configuration.graph is not None else 'none'}",
        f"splits     {', '.join(f'{name}: {_size(rows)} tried' for name, rows in prepared.splits.items())}",
        f"views      {', '.join(configuration.data.eval_views or [])}",
        f"batch      {args.per_device_train_batch_size} x {args.gradient_accumulation_steps} accumulated x "
        f"{args.world_size} process(es) = {batch}",
        f"does       {', '.join(name for name in ('train', 'eval', 'predict') if getattr(args, f'do_{name}'))}",
        f"writes to  {args.output_dir}",
    ]
    return "\n".join(lines + _example(prepared))


def _size(rows: Any) -> str:
    return "a stream" if is_streamed(rows) else f"{len(rows)} rows"


def _example(prepared: Prepared) -> list[str]:
    """The first row of the training rows, or else of the first view, decoded with its special tokens."""
    rows = prepared.train if prepared.train is not None else next(iter(prepared.during_training.values()), None)
    if rows is None:
        return []
    row, tokenizer = first_rows(rows, 1)[0], prepared.tokenizer
    lines = [f"example    row {row['id']}"]
    for name in ("memory_ids", "input_ids", "labels"):
        if name in row:
            ids = [int(token) for token in row[name] if token != IGNORED]
            lines.append(f"  {name} ({len(row[name])} tokens): {_shortened(str(tokenizer.decode(ids)))!r}")
    if "chunk_ids" in row:
        for chunk, weights in enumerate(row["chunk_weights"]):
            read = ", ".join(f"{other} ({weight:.2f})" for other, weight in enumerate(weights[:-1]) if weight)
            size = sum(each == chunk for each in row["chunk_ids"])
            lines.append(f"  chunk {chunk} ({size} tokens) reads {read or 'no earlier one'}")
    if "retrieved" in row:  # of the first chunk, whose neighbours the second reads
        for place, neighbour in enumerate(row["retrieved"][0].tolist()):
            text = str(tokenizer.decode(neighbour, skip_special_tokens=True))
            lines.append(f"  neighbour {place} of the first chunk ({len(neighbour)} tokens): {_shortened(text)!r}")
    return lines


def _shortened(text: str, most: int = 400) -> str:
    return text if len(text) <= most else f"{text[: most // 2]} [...] {text[-most // 2 :]}"
