"""One writer per corpus: a lock that the kernel gives back when its holder dies, however it dies."""

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOCK = ".lock"


@contextmanager
def corpus_lock(folder: str | Path, timeout: float = 0.0) -> Iterator[None]:
    """Hold the lock of a corpus folder, which is made if need be. Readers need none.

    Args:
        folder: of the corpus.
        timeout: seconds to wait for another writer.

    Raises:
        TimeoutError: another process holds it; says which.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path, deadline = folder / LOCK, time.monotonic() + timeout
    while (descriptor := _try_lock(path)) is None:
        if time.monotonic() >= deadline:
            raise TimeoutError(f"{folder} is being written by {_holder(path)}; wait for it, or end it.")
        time.sleep(0.05)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # while still held: whoever waits will see that the name is gone
        os.close(descriptor)


def _try_lock(path: Path) -> int | None:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        held = os.fstat(descriptor)
        current = os.stat(path)
    except (BlockingIOError, FileNotFoundError):
        os.close(descriptor)
        return None
    if (held.st_ino, held.st_dev) != (current.st_ino, current.st_dev):  # the one we locked has been removed meanwhile
        os.close(descriptor)
        return None
    os.truncate(descriptor, 0)
    os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
    return descriptor


def _holder(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8") or "another process"
    except OSError:
        return "another process"
