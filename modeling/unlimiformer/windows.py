"""How an input of any length is cut into windows, and which tokens of each window are kept.

Windows overlap so that every kept token was read with context around it. The kept ranges tile the input exactly.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Window:
    """One window: it reads tokens `[start, end)` of the document and keeps `[keep_start, keep_end)` of them."""

    start: int
    end: int
    keep_start: int
    keep_end: int


def plan_windows(length: int, window: int, overlap: float, causal: bool) -> list[Window]:
    """Cut a document of `length` tokens into windows of `window` tokens (Bertsch et al. 2023, section 3.1).

    With margin m = floor(window overlap / 2) and stride window - 2m, window j starts at j stride, the last one at
    length - window. An encoder keeps the middle of a window, so that each kept token saw m tokens on either side; a
    decoder (`causal`) keeps its end, so that each saw 2m tokens before it.

    Args:
        length: tokens of the document, at least 1.
        window: tokens of a window, at least 1.
        overlap: in [0, 1), with a stride of at least 1.

    Returns:
        The windows in order; their kept ranges tile [0, length). One window, all kept, if the document fits in it.

    Raises:
        ValueError: the overlap leaves no stride, or the document is empty.
    """
    margin = int(window * overlap / 2)
    stride = window - 2 * margin
    if length < 1 or stride < 1:
        raise ValueError(
            f"`length` must be at least 1 and `overlap` leave a stride, got {length} and {overlap} of window {window}."
        )
    if length <= window:
        return [Window(0, length, 0, length)]
    count = 1 - (window - length) // stride  # 1 + ceil((length - window) / stride)
    starts = [j * stride for j in range(count - 1)] + [length - window]
    lead = 2 * margin if causal else margin  # tokens at the head of a window that an earlier one has kept
    bounds = [0, *(j * stride + lead for j in range(1, count)), length]
    return [Window(start, start + window, *bounds[j : j + 2]) for j, start in enumerate(starts)]


def tokens_kept(before: int, after: int, window: int, overlap: float, causal: bool) -> int:
    """How many tokens of a document need not be read again when it grows from `before` to `after` tokens.

    Windows that lie in both documents at the same place, and keep no more than they did, are kept. With c windows
    before, these are the first c - 1 at least, so (c - 1) stride + m tokens of an encoder and (c - 1) stride + 2m of a
    decoder stay; of a document that was one window that the grown one does not begin with, none.
    """
    read = {(part.start, part.end): part for part in plan_windows(before, window, overlap, causal)}
    kept = 0
    for part in plan_windows(after, window, overlap, causal):
        same = read.get((part.start, part.end))
        if same is None or not (same.keep_start <= part.keep_start and part.keep_end <= same.keep_end):
            break
        kept = part.keep_end
    return kept
