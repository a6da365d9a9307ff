"""The report's claims against the records: what it said, what we measured, and the verdict.

The claims and the rules that judge them are data, `params/claims.yaml`; nothing here knows an outcome.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from statistics import NormalDist
from typing import Annotated, Literal

import pandas as pd
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from alphaprune import yaml_text
from alphaprune.errors import UsageError

REPRODUCED, NOT_REPRODUCED, LEFT_OPEN, NOT_RUN = "reproduced", "not reproduced", "report left open", "not run"


class Claim(BaseModel):
    """One claim. The fields are explained at the head of `params/claims.yaml`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str
    experiment: str
    claim: str
    of: Annotated[tuple[str, ...], Field(min_length=1)]
    take: Literal["lowest", "highest"] = "lowest"
    minus: str | None = None
    reported: float | None = None
    alpha: float | None = None
    rule: dict[Literal["within", "below", "above"], float] | Literal["left_open"]

    @model_validator(mode="after")
    def _rule_can_be_applied(self) -> Claim:
        if isinstance(self.rule, dict) and (
            len(self.rule) != 1 or ("within" in self.rule and self.reported is None)
        ):
            raise ValueError("a rule is one of within (needs `reported`), below, above, or left_open")
        return self

    def measure(self, accuracy: Callable[[str], float | None]) -> float | None:
        """Our number, in percent or points; None if a stage it needs has not run."""
        values = [accuracy(stage) for stage in self.of]
        subtracted = accuracy(self.minus) if self.minus else 0.0
        if subtracted is None or any(v is None for v in values):
            return None
        return (min(values) if self.take == "lowest" else max(values)) - subtracted

    def verdict(self, measured: float | None) -> str:
        if measured is None:
            return NOT_RUN
        if self.rule == "left_open":
            return LEFT_OPEN
        ((kind, bound),) = self.rule.items()
        if kind == "within":
            holds = abs(measured - self.reported) <= bound
        else:
            holds = measured < bound if kind == "below" else measured > bound
        return REPRODUCED if holds else NOT_REPRODUCED

    def rule_in_words(self) -> str:
        if self.rule == "left_open":
            return "no result given"
        ((kind, bound),) = self.rule.items()
        return f"within {bound:g} of the report" if kind == "within" else f"{kind} {bound:g}"


def load_claims(path: Path) -> list[Claim]:
    """The claims in a file.

    Raises:
        UsageError: if the file is missing or a claim is not complete.
    """
    try:
        return TypeAdapter(list[Claim]).validate_python(yaml_text.read(path))
    except ValidationError as e:
        raise UsageError(f"{path} does not hold claims: {' '.join(str(e).split())[:200]}") from None


def score(claims: list[Claim], accuracy: Callable[[str], float | None]) -> pd.DataFrame:
    """One row a claim.

    Args:
        claims: as `load_claims` gives them.
        accuracy: from the name of a stage, `<experiment>/<stage>`, to its accuracy in percent, None if not run.

    Returns:
        Columns id, experiment, claim, report, ours, difference, rule, verdict.
    """
    rows = []
    for c in claims:
        ours = c.measure(accuracy)
        difference = None if ours is None or c.reported is None else ours - c.reported
        rows.append(
            (c.id, c.experiment, c.claim, c.reported, ours, difference, c.rule_in_words(), c.verdict(ours))
        )
    columns = ["id", "experiment", "claim", "report", "ours", "difference", "rule", "verdict"]
    return pd.DataFrame(rows, columns=columns).round({"report": 2, "ours": 2, "difference": 2})


def guessing(images: int, times: int = 1, classes: int = 10) -> float:
    """The accuracy, a share of 1, that guessing on so many images does not exceed in 19 of 20 cases.

        p + z sqrt(p (1 - p) / images),   p = 1 / classes,   P(one guess is below) = 0.95^(1 / times)

    Args:
        images: how many.
        times: of how many independent guesses the best counts, as a stage's best epoch does.
        classes: equally many images of each.

    Source:
        the normal approximation of a binomial distribution, its quantile z.

    Example:
        >>> round(guessing(1000), 3), round(guessing(1000, times=6), 3)
        (0.116, 0.123)
    """
    p = 1 / classes
    return p + NormalDist().inv_cdf(0.95 ** (1 / times)) * math.sqrt(p * (1 - p) / images)
