"""A memory that grows: only the windows that the new tokens change are read again, the rest is taken over.

Windows that lie at the same place in the old document and in the grown one, all but the last at least, saw the same
tokens, so what they kept stays. The result is what remembering the whole document at once would have given.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ...configuration.configuration_unlimiformer import UnlimiformerConfig
from .memory import Memory
from .positions import Rotation, memory_positions, rotate
from .remember import Documents, joined_rows
from .windows import tokens_kept

SHAPING_OPTIONS = ("overlap", "store", "first_layer", "last_layer", "heads", "first_step", "positions")
"""Options that decide what is stored and where it lies; the others only say how it is read."""


def check_appendable(memory: Memory, config: UnlimiformerConfig, window: int, fingerprint: str) -> None:
    """Refuse to append to a memory that other weights or other options made.

    Raises:
        ValueError: names what differs, with both values.
    """
    if memory.fingerprint != fingerprint:
        raise ValueError(
            f"`memory` was made by weights {memory.fingerprint}, this model has {fingerprint}: what it would append "
            "would not fit what is there. Remember the whole document again."
        )
    pairs = {name: (getattr(memory.config, name), getattr(config, name)) for name in SHAPING_OPTIONS}
    for name, (theirs, ours) in {"window": (memory.window, window), **pairs}.items():
        if theirs != ours:
            raise ValueError(
                f"`memory` was made with `{name}` {theirs!r}, and this attachment has {ours!r}: attach with the "
                "options of `memory.config`, or remember the whole document again."
            )


def grown(memory: Memory, more: tuple[Tensor, Tensor], more_global: Tensor | None = None) -> Documents:
    """The documents of a memory's rows with `more` behind them, and how many tokens of each stay as they are.

    Args:
        memory: whose rows grow; a document that several rows ask becomes one for each of them.
        more: ids (rows, longest), right-padded, and lengths (rows,).
        more_global: like the ids of `more`, which of them have global attention; None if none have.

    Raises:
        ValueError: there are as many rows in `more` as in the memory, or else both numbers are named.
    """
    ids, added = more
    if len(ids) != len(memory):
        raise ValueError(
            f"`input_ids` must have a row for each of the memory's {len(memory)} rows, got {len(ids)}: "
            "`memory.select([...])` picks the documents that grow."
        )
    rows = list(memory.documents)
    before = memory.lengths[rows]
    after = before + added
    global_tokens = None
    if memory.global_tokens is not None or more_global is not None:
        earlier, later = (
            torch.zeros_like(of, dtype=torch.bool) if found is None else found
            for found, of in ((memory.global_tokens, memory.input_ids), (more_global, ids))
        )
        global_tokens = joined_rows(earlier[rows], later, (before, added))
    held = []
    for row, document in enumerate(rows):
        old, new = int(before[row]), int(after[row])
        prefix = memory.prefixes[document] if memory.prefixes else 0
        causal = not memory.is_encoder_decoder
        kept = tokens_kept(old - prefix, new - prefix, memory.window - prefix, memory.config.overlap, causal)
        held.append(prefix + kept if kept else 0)
    prefixes = tuple(memory.prefixes[document] for document in rows) if memory.prefixes else ()
    joint = joined_rows(memory.input_ids[rows], ids, (before, added))
    return Documents(joint, after, prefixes, tuple(held), global_tokens)


def joined(memory: Memory, tail: Memory, documents: Documents, rotations: Mapping[int, Rotation]) -> Memory:
    """One memory: of each row what was held, then what was read.

    Squeezed positions depend on a document's length, so rotary keys that were held are moved once more, in float32 or
    wider; in a half-precision memory each move rounds them again.

    Args:
        memory: the old one.
        tail: what was read of `documents`, without the tokens that are held.
        documents: what `grown` returned.
        rotations: how layers of a decoder turn their keys.
    """
    tails = tail.tensors()
    named = {}
    for name, old in memory.tensors().items():
        kind, _, layer = name.partition(".")
        new = tails[name].to(old.device, old.dtype)
        if kind.startswith("window_"):
            named[name] = _join_windows(memory, old, new, documents)
        else:
            turns = rotations.get(int(layer)) if kind == "keys" else None
            named[name] = _join_stored(memory, old, new, documents, turns)
    return replace(
        memory.with_tensors(named),
        input_ids=documents.ids.to(memory.input_ids.device),
        lengths=documents.lengths,
        documents=tuple(range(len(documents.lengths))),
        prefixes=documents.prefixes,
        global_tokens=documents.global_tokens,
    )


def _join_stored(memory: Memory, old: Tensor, new: Tensor, documents: Documents, turns: Rotation | None) -> Tensor:
    """Tokens that are held from `old`, the others from `new`; both (documents, ..., tokens, width)."""
    lengths = documents.lengths.tolist()
    out = old.new_zeros(len(lengths), *old.shape[1:-2], max(lengths), old.shape[-1])
    for row, (document, length) in enumerate(zip(memory.documents, lengths, strict=True)):
        held = documents.held_of(row)
        kept = old[document, ..., :held, :]
        out[row, ..., :held, :] = rotate(kept, _moves(memory, document, length)[:held], turns) if held else kept
        out[row, ..., held:length, :] = new[row, ..., : length - held, :]
    return out


def _moves(memory: Memory, document: int, length: int) -> Tensor:
    """By how many positions each token of a document moves as it grows to `length`."""
    before, rule = int(memory.lengths[document]), memory.config.positions
    places = memory_positions(length, memory.window, rule)[0][:before]
    return places - memory_positions(before, memory.window, rule)[0]


def _join_windows(memory: Memory, old: Tensor, new: Tensor, documents: Documents) -> Tensor:
    """The first window of each row: read again where nothing is held, else the old one."""
    out = torch.zeros_like(new)
    for row, document in enumerate(memory.documents):
        source = old[document] if documents.held_of(row) else new[row]
        width = min(source.shape[-2], out.shape[-2])
        out[row, ..., :width, :] = source[..., :width, :]
    return out
