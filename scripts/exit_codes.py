"""How every command ends: 0, 2 and one line for a user's mistake, 130 after Ctrl-C, 141 where nobody reads on."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

MISTAKES: tuple[type[Exception], ...] = (ValueError, OSError, ImportError)
GOES_ON = "What is finished is kept: the same command goes on."


def exit_code(
    command: str,
    work: Callable[[], int | None],
    mistakes: tuple[type[Exception], ...] = MISTAKES,
    when_interrupted: str = "",
) -> int:
    """Do `work` and return what it returns, 0 for nothing; what a user has to know stands on one line of stderr.

    Args:
        command: what the line begins with.
        mistakes: exceptions that are a user's; any other one is a fault of ours and keeps its traceback.
        when_interrupted: what Ctrl-C has left, and how to go on.
    """
    try:
        code = work() or 0
        sys.stdout.flush()  # here, where a reader who has left is noticed
    except KeyboardInterrupt:
        print(f"\n{command}: interrupted. {when_interrupted}".rstrip(), file=sys.stderr)
        return 130
    except BrokenPipeError:  # `| head` has read enough; the flush at exit must not complain again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except mistakes as error:
        print(f"{command}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return code
