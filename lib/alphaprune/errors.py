"""The one error that is meant for people: what is wrong, where, and the remedy, in one line."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Any

LONGEST = 2000  # characters of a message
LONGEST_VALUE = 60  # of a value in it
LISTED = 40  # names that there are


class UsageError(ValueError):
    """Something the user can mend. Command lines and notebooks print its text alone and exit with 2.

    Args:
        message: the text. What it quotes may come from anywhere, so it is made one line that a terminal only shows:
            line ends become spaces, other unprintable characters are written out, and what is too long is cut.
    """

    def __init__(self, message: str):
        line = re.sub(r"\s*[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]\s*", " ", message[: 2 * LONGEST]).strip()
        line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
        super().__init__(line if len(line) <= LONGEST else f"{line[:LONGEST]} ...")


class Damaged(UsageError):
    """A file that is there, but not as it was written. Whoever asked makes it again, where it can."""


class Missing(UsageError):
    """What another command makes first; the message names that command."""


def like(name: str, known: Iterable[str], between: str = ", ") -> str:
    """For an error about a name: the one that was meant, or those there are."""
    names = list(known)
    close = difflib.get_close_matches(name[:LONGEST_VALUE], names, 1)
    more = f"{between}..." if len(names) > LISTED else ""
    return f"; did you mean '{close[0]}'?" if close else f"; there are: {between.join(names[:LISTED])}{more}"


def shown(value: Any) -> str:
    """A value that was given, for a message: its `repr`, cut."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # whole numbers of thousands of digits have no decimal form
        text = f"a {type(value).__name__} that is too large to be shown"
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}..."
