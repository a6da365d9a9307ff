"""Progress for people, a line an epoch."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from alphaprune.train import Outcome


class Progress:
    """Says where an experiment's run is, how accurate, and how long it may still take.

    Args:
        stages: how many stages will train.
        say: takes a line.
    """

    def __init__(self, stages: int, say: Callable[[str], None]):
        self.stages, self.done, self.say = stages, 0, say
        self.started, self.epochs_run = time.monotonic(), 0

    def begin(self, experiment: str, stage: str, parent: str, why: str, max_epochs: int) -> None:
        self.max_epochs = max_epochs
        self.where = f"[{experiment}] stage {self.done + 1}/{self.stages} {stage}"
        self.say(f"{self.where}: {why}; starts from {parent}")

    def skip(self, why: str) -> None:
        self.done += 1
        self.say(why)

    def epoch(self, outcome: Outcome) -> None:
        self.epochs_run += 1
        train, val = outcome.latest("train"), outcome.latest("val")
        left = (self.stages - self.done) * self.max_epochs - outcome.epochs
        seconds = left * (time.monotonic() - self.started) / self.epochs_run
        self.say(
            f"{self.where}: epoch {outcome.epochs}/{self.max_epochs}, train {train:.1%}, validation {val:.1%}, "
            f"at most {_duration(seconds)} left"
        )

    def end(self, outcome: Outcome, metrics: dict[str, float]) -> None:
        self.done += 1
        fold_now = f", if folded now {metrics['fold_now']:.1%}" if "fold_now" in metrics else ""
        diverged = (
            f"; the loss was found no longer finite at step {outcome.steps}, the last good weights are kept"
            if outcome.diverged
            else ""
        )
        self.say(
            f"{self.where}: best {outcome.best_accuracy:.1%} in epoch {outcome.best_epoch}{fold_now}{diverged}"
        )


def _duration(seconds: float) -> str:
    minutes, hours = int(seconds // 60), int(seconds // 3600)
    return f"{hours} h {minutes % 60:02d} min" if hours else f"{minutes} min {int(seconds % 60):02d} s"
