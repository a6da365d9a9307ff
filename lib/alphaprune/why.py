"""Why something runs again: which of the inputs that determine its result have changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

SHOWN = 3  # differences that are named one by one


def what_changed(determines: Mapping[str, Any], earlier: Sequence[Mapping[str, Any]]) -> str:
    """The inputs in which something differs from the recorded one that is most like it.

    Args:
        determines: all inputs, nested by what they belong to.
        earlier: those of what is recorded.

    Returns:
        Such as `recipe.max_epochs 3 -> 2; seed 0 -> 1`; empty if nothing is recorded.
    """
    new = _flat(determines)
    differences = [
        {k: (old.get(k), new.get(k)) for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k)}
        for old in map(_flat, earlier)
    ]
    if not differences:
        return ""
    fewest = min(differences, key=len)
    named = [f"{key} {_short(before)} -> {_short(now)}" for key, (before, now) in fewest.items()]
    more = f"; and {len(named) - SHOWN} more" if len(named) > SHOWN else ""
    return "; ".join(named[:SHOWN]) + more


def _flat(content: Any, key: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dots between the keys."""
    if not isinstance(content, Mapping):
        return {key: content}
    found: dict[str, Any] = {}
    for k, v in content.items():
        found |= _flat(v, f"{key}.{k}" if key else str(k))
    return found


def _short(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text[:8] if len(text) == 64 else text[:24]  # digests by their beginning
