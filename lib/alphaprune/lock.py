"""One run at a time in a folder. The lock is the kernel's, so it goes with the process that holds it, however that dies."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from alphaprune.errors import UsageError

LOCK = ".lock"


@contextmanager
def only_here(folder: Path, what: str, say: Callable[[str], None]) -> Iterator[None]:
    """Wait until no other process is in this context with the same folder, then be the only one.

    Args:
        folder: made if it is not there. The lock is its file `.lock`, which names the holder's process and host; it stays.
        what: the name of what is done there, for the line that says who is waited for.
        say: takes that line.

    Raises:
        UsageError: where the folder cannot be written.
    """
    lock = FileLock(folder / LOCK)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        holder = (folder / LOCK).read_text().strip() or "another process"
        say(f"{holder} is at {what}; waiting for it")
        lock.acquire()
    except OSError as e:
        raise UsageError(f"{folder} cannot be written ({e.strerror}); make it writable") from None
    try:
        (folder / LOCK).write_text(f"process {os.getpid()} on {socket.gethostname()}\n")
        yield
    finally:
        lock.release()
