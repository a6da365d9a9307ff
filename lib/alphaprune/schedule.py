"""Alpha schedules: the values that alpha takes, one training stage for each.

    step            alpha_t = alpha_(t-1) - by
    multiplicative  alpha_t = alpha_(t-1) * by
    exponential     alpha_t = exp(-by * t)
    listed          the values given

all from alpha_0 = 1, which is the pretrained network and is not trained. Threshold rule: the first value below
`threshold` is replaced by 0 and ends the schedule. A listed schedule is taken as it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Literal

from alphaprune.errors import UsageError

THRESHOLD = 0.015
Kind = Literal["step", "multiplicative", "exponential", "listed"]


def alphas(kind: Kind, by: float | Sequence[float], threshold: float = THRESHOLD) -> list[float]:
    """The values of alpha, after 1, that a schedule goes through.

    Args:
        kind: "step", "multiplicative", "exponential" or "listed".
        by: what is subtracted, in (0, 1]; the factor, in (0, 1); the rate, above 0; or the values themselves.
        threshold: values below it become 0, in (0, 1).

    Returns:
        Falling values that end with 0; for "listed", the values given.

    Raises:
        UsageError: if an argument is out of range.

    Example:
        >>> alphas("step", 0.25)
        [0.75, 0.5, 0.25, 0.0]
        >>> alphas("multiplicative", 0.25)
        [0.25, 0.0625, 0.015625, 0.0]
    """
    if kind == "listed":
        values = list(by) if isinstance(by, Sequence) else []
        if not values or not all(0 <= a <= 1 for a in values):
            raise UsageError(f"a listed schedule needs values in [0, 1], not {by!r}")
        return values
    upper = {"step": 1.0, "multiplicative": math.nextafter(1, 0), "exponential": math.inf}.get(kind)
    if upper is None:
        raise UsageError(f"schedule '{kind}' is unknown; use step, multiplicative, exponential or listed")
    if isinstance(by, Sequence) or not 0 < by <= upper or math.isinf(by):
        raise UsageError(
            f"schedule '{kind}' by {by!r} does not lead from 1 to 0; see alphaprune.schedule for the ranges"
        )
    if not 0 < threshold < 1:
        raise UsageError(f"threshold is {threshold!r}; give a number in (0, 1), such as {THRESHOLD}")
    values = []
    for alpha in _falling(kind, by):
        if alpha < threshold:
            return [*values, 0.0]
        values.append(alpha)
    raise AssertionError("every schedule falls below its threshold")


def _falling(kind: Kind, by: float) -> Iterator[float]:
    t = 0
    while True:
        t += 1
        if kind == "step":
            yield round(1 - t * by, 12)  # not 0.29999999999999993
        else:
            yield by**t if kind == "multiplicative" else math.exp(-by * t)
