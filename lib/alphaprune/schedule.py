"""Alpha schedules: the values that alpha takes, one training stage for each.

    step            alpha_t = alpha_(t-1) - by
    multiplicative  alpha_t = alpha_(t-1) * by
    exponential     alpha_t = exp(-by * t)
    cosine          alpha_t = (1 + cos(pi * t / by)) / 2, by the number of steps
    listed          the values given

all from alpha_0 = 1, which is the pretrained network and is not trained. Threshold rule: the first value below
`threshold` is replaced by 0 and ends the schedule. A listed schedule is taken as it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from alphaprune.errors import UsageError

THRESHOLD = 0.015
MOST_VALUES = 1000
Kind = Literal["step", "multiplicative", "exponential", "cosine", "listed"]
Order = Literal["together", "front", "back"]
OVERLAP = 0.5  # share of the layers whose alpha falls at the same time, staggered


def falling(done: float, first: float, last: float) -> float:
    """Alpha that falls evenly within a stage, as the replacement rate of Xu et al., BERT-of-Theseus (2020), section 3.3, rises.

        alpha = first + (last - first) * done

    Args:
        done: how much of the fall is over; from 1 on alpha is `last`.
        first, last: alpha at its beginning and its end.
    """
    return last if done >= 1 else first + (last - first) * done


def alphas(kind: Kind, by: float | Sequence[float], threshold: float = THRESHOLD) -> list[float]:
    """The values of alpha, after 1, that a schedule goes through.

    Args:
        kind: "step", "multiplicative", "exponential", "cosine" or "listed".
        by: what is subtracted, in (0, 1]; the factor, in (0, 1); the rate, above 0; the number of steps, whole; or the
            values themselves.
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
        >>> alphas("cosine", 4)
        [0.853553390593, 0.5, 0.146446609407, 0.0]
    """
    if kind == "listed":
        values = list(by) if isinstance(by, Sequence) else []
        if not values or not all(0 <= a <= 1 for a in values):
            raise UsageError(f"a listed schedule needs values in [0, 1], not {by!r}")
        return values
    upper = {
        "step": 1.0,
        "multiplicative": math.nextafter(1, 0),
        "exponential": math.inf,
        "cosine": 1000,
    }.get(kind)
    if upper is None:
        raise UsageError(
            f"schedule '{kind}' is unknown; use step, multiplicative, exponential, cosine or listed"
        )
    if isinstance(by, Sequence) or not 0 < by <= upper or math.isinf(by):
        raise UsageError(
            f"schedule '{kind}' by {by!r} does not lead from 1 to 0; see alphaprune.schedule for the ranges"
        )
    if kind == "cosine" and by != int(by):
        raise UsageError(f"schedule 'cosine' by {by!r}: give a whole number of steps, such as 8")
    if not 0 < threshold < 1:
        raise UsageError(f"threshold is {threshold!r}; give a number in (0, 1), such as {THRESHOLD}")
    values = []
    for alpha in _falling(kind, by):
        if alpha < threshold:
            return [*values, 0.0]
        values.append(alpha)
        if len(values) > MOST_VALUES:
            raise UsageError(
                f"schedule '{kind}' by {by!r} goes through more than {MOST_VALUES} values; take larger steps"
            )
    raise AssertionError("every schedule falls below its threshold")


def _falling(kind: Kind, by: float) -> Iterator[float]:
    t = 0
    while True:
        t += 1
        if kind == "step":
            yield round(1 - t * by, 12)  # not 0.29999999999999993
        elif kind == "cosine":
            yield round((1 + math.cos(math.pi * min(t / by, 1))) / 2, 12)
        else:
            yield by**t if kind == "multiplicative" else math.exp(-by * t)


def staggered(alpha: float, layers: int, order: Order) -> list[float]:
    """One alpha a layer, falling one after the other while their common alpha goes from 1 to 0.

    Half of the layers fall at the same time: with progress p = 1 - alpha, layer i of n starts at p = (i / (n - 1)) / 2 and is at 0
    when p is 1/2 further.

    Args:
        alpha: in [0, 1]. At 1 all are 1, at 0 all are 0.
        layers: n, at least 1.
        order: "front" lets the first layer fall first, "back" the last; "together" gives all the same.

    Example:
        >>> staggered(0.75, 3, "front")
        [0.5, 1.0, 1.0]
        >>> staggered(0.5, 3, "back")
        [1.0, 0.5, 0.0]
    """
    if order == "together" or layers == 1:
        return [alpha] * layers
    starts = [(1 - OVERLAP) * i / (layers - 1) for i in range(layers)]
    values = [1 - min(max((1 - alpha - start) / OVERLAP, 0.0), 1.0) for start in starts]
    return values if order == "front" else values[::-1]


@dataclass(frozen=True)
class Try:
    """One stage of an adaptive schedule: from the try `start` (None: what the schedule starts from) to `alpha`."""

    start: int | None
    alpha: float
    step: float


def next_try(
    tries: Sequence[Try],
    accuracies: Sequence[float],
    before: float,
    survive: float,
    first: float = 0.5,
    smallest: float = 0.01,
) -> Try | None:
    """The largest step of alpha that the accuracy survives: what the report did by hand, by rule.

    A try survives if it costs at most `survive` of the accuracy of what it started from. Then the next one starts from it,
    with twice its step; else the next starts where it started, with half of it. A step that is `smallest` or less is taken
    whatever it costs, so that the schedule ends.

    Args:
        tries: so far, in order.
        accuracies: validation accuracy that each reached, 0..1.
        before: accuracy of what the schedule starts from, at alpha 1.
        survive: accuracy that a step may cost.
        first: the first step.
        smallest: see above.

    Returns:
        The next one, None where alpha 0 is reached.

    Example:
        >>> next_try([], [], 0.9, 0.01)
        Try(start=None, alpha=0.5, step=0.5)
        >>> next_try([Try(None, 0.5, 0.5)], [0.8], 0.9, 0.01)
        Try(start=None, alpha=0.75, step=0.25)
    """
    start, alpha, accuracy, step = None, 1.0, before, first
    for i, (tried, reached) in enumerate(zip(tries, accuracies, strict=True)):
        if reached >= accuracy - survive or tried.step <= smallest:
            if tried.alpha == 0:
                return None
            start, alpha, accuracy, step = i, tried.alpha, reached, 2 * tried.step
        else:
            step = tried.step / 2
    step = min(step, alpha)
    target = round(alpha - step, 12)
    return Try(start, 0.0 if target < THRESHOLD else target, step)
