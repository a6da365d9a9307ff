"""SIGTERM and Ctrl-C at a moment that suits: what is under way is saved first, then the command ends.

A loop that can save works within `SafePoints`, and asks between two steps whether it shall stop. Everywhere else a signal ends a
command at once; all files are whole at any moment anyway.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
_left: set[signal.Signals] = set()  # to another process


class Interrupted(BaseException):
    """A signal asked to stop. No `Exception`, so that nothing takes it for an error to recover from.

    Args:
        number: of the signal.
        where: what was stopped, and whether it is saved.
        again: what the same command does next time.
    """

    def __init__(self, number: int, where: str = "", again: str = "goes on from there"):
        super().__init__(number, where, again)
        self.number, self.where, self.again = number, where, again

    def __str__(self) -> str:
        what = f"{self.where}; " if self.where else ""
        return f"stopped by {signal.Signals(self.number).name}; {what}the same command {self.again}"

    @property
    def exit_code(self) -> int:
        """128 + the signal, as shells have it."""
        return 128 + self.number


@contextmanager
def _handled(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Signals go to `handler` meanwhile; only the main thread can have any."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in SIGNALS if number not in _left}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


class SafePoints:
    """Within this context a signal waits until `stop` is called. A second one does not wait.

    Attributes:
        wanted: whether a signal has come.
    """

    def __init__(self) -> None:
        self._asked: list[int] = []

    @property
    def wanted(self) -> bool:
        return bool(self._asked)

    def stop(self, where: str) -> None:
        """Raise `Interrupted` if a signal has come; `where` says what was stopped."""
        if self._asked:
            raise Interrupted(self._asked[0], where)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._asked:
            raise Interrupted(number)
        self._asked.append(number)

    def __enter__(self) -> SafePoints:
        self._context = _handled(self._handle)
        self._context.__enter__()
        return self

    def __exit__(self, *raised: object) -> None:
        self._context.__exit__(*raised)


def leave_to_parent() -> None:
    """In a worker: Ctrl-C reaches all processes of a terminal, and the one that has the others tells them, with SIGTERM."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _left.add(signal.SIGINT)


def while_importing() -> None:
    """For a command whose imports take a second: until `ending_with_a_line` a signal ends it with its line too, at once."""

    def handler(number: int, frame: FrameType | None) -> None:
        os.write(2, f"alphaprune: {Interrupted(number)}\n".encode())
        os._exit(128 + number)  # nothing has begun

    for number in SIGNALS:
        signal.signal(number, handler)


@contextmanager
def ending_with_a_line() -> Iterator[None]:
    """For a command: a signal, or that nobody reads its output any more (`| head`), ends it with one line and the usual exit code."""

    def handler(number: int, frame: FrameType | None) -> None:
        raise Interrupted(number)

    try:
        with _handled(handler):
            yield
            sys.stdout.flush()
    except Interrupted as e:
        print(f"alphaprune: {e}", file=sys.stderr)
        raise SystemExit(e.exit_code) from None
    except BrokenPipeError:
        # What is still in the buffer goes nowhere, or Python would fail on it once more as it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        print("alphaprune: nobody reads the output any more; stopped", file=sys.stderr)
        raise SystemExit(128 + signal.SIGPIPE) from None
