"""What is recorded of an experiment: which of its stages, and why not the others; their measurements as tables."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pandas as pd

from alphaprune import pretrained
from alphaprune.errors import Damaged, UsageError
from alphaprune.identity import Node
from alphaprune.provenance import of_records
from alphaprune.records import COLUMNS, StageRecord, read_history, read_record
from alphaprune.schedule import Try, next_try
from alphaprune.settings import parameter_files
from alphaprune.stages import Stages
from alphaprune.storage import digest_file, digest_of
from alphaprune.why import what_changed

NOT_RECORDED = "not recorded yet"


class Recorded(Stages):
    """An experiment and its records. Arguments and errors as of `experiment.Experiment`."""

    def __init__(self, preset: str, experiment: str, root: Path | None = None, **given: Any):
        super().__init__(preset, experiment, root, **given)
        self._grow()
        if self.settings.folds not in (None, "best"):
            self.find(self.settings.folds)  # refused now if there is no such stage

    def _grow(self) -> None:
        """Behind the stages of the file, those of the adaptive schedule: what is recorded and what follows from it."""
        s, plan = self.settings, self.settings.adaptive
        del self.stages[len(s.stages) :]
        if plan is None:
            return
        start = self.find(plan.parent)
        if start.stage.alpha is None:
            raise UsageError(
                f"adaptive starts from '{start.name}', which has no alpha; name a stage that has"
            )
        nodes: list[Node] = []
        tries: list[Try] = []
        reached: list[float] = []
        while self.why(start) is None:
            before = self.record(start.name)["metrics"]["val_accuracy"]
            following = next_try(tries, reached, before, plan.survive, plan.first, plan.smallest)
            if following is None:
                break
            parent = start if following.start is None else nodes[following.start]
            name = plan.parent if parent is start else parent.stage.name
            stage = plan.stage(len(nodes) + 1, following.alpha, name)
            node = self._identified(s, stage, parent)
            nodes.append(node)
            self._nodes[node.name] = node
            if self.why(node) is not None:
                break
            tries.append(following)
            reached.append(self.record(node.name)["metrics"]["val_accuracy"])
        self.stages += nodes

    def why(self, node: Node, same: Sequence[str] = ()) -> str | None:
        """Why a stage would run; None if it is recorded. What changed is told against the most similar record of the stage's name;
        only those count that have the same of what `same` names, keys of `Node.determines`."""
        record = self.folder(node) / "run.json"
        if not record.is_file():
            files = sorted(self.folder(node).parent.glob(f"{node.stage.name}-????????/run.json"))
            if self.weights(node).exists() or record.with_name("history.csv").exists():
                return f"{record} is missing"
            if not files:
                return NOT_RECORDED
            earlier = [c.get("determines", {}) for c in _whole(files).values()]
            alike = [e for e in earlier if all(e.get(key) == node.determines.get(key) for key in same)]
            if not alike:
                return NOT_RECORDED
            changed = what_changed(node.determines, [e for e in alike if e])
            return f"recorded with other inputs{f' ({changed})' if changed else ''}"
        try:
            content = read_record(record, StageRecord)
            if content["identity"] != node.identity:
                return f"{record} belongs to another stage"
            self._read_history(node, content)
        except Damaged as e:
            return str(e)
        return None

    def weights_damage(self, node: Node) -> str | None:
        """What is wrong with the weights of a recorded stage; None if they are whole, or gone together with their checksum."""
        path = self.weights(node)
        if not path.is_file():
            return f"{path} is missing" if digest_file(path).exists() else None
        if digest_of(path) != self.record(node.name)["weights_sha256"]:
            return f"{path} is damaged (its SHA-256 is not the one in its record)"
        return None

    def to_fold(self) -> str:
        """The stage that the settings' `folds` means: `best` is the experiment's recorded stage at alpha 0 with the highest
        validation accuracy, the first of equals."""
        if self.settings.folds != "best":
            return self.settings.folds
        ends = [n for n in self.stages if n.stage.alpha == 0 and self.why(n) is None]
        if not ends:
            raise UsageError(
                f"no stage of '{self.settings.experiment}' at alpha 0 is recorded yet; run it first"
            )
        return max(ends, key=lambda n: self.record(n.name)["metrics"]["val_accuracy"]).name

    def stage_table(self) -> pd.DataFrame:
        """The stages as they stand in the file, and why each would run."""
        rows = [
            n.stage.model_dump(by_alias=True, exclude={"color"}) | {"state": self.why(n) or "recorded"}
            for n in self.stages
        ]
        return pd.DataFrame(rows)

    def record(self, name: str) -> dict[str, Any] | None:
        """The record of a stage, or None if it has not run."""
        node = self.find(name)
        return None if self.why(node) else read_record(self.folder(node) / "run.json", StageRecord)

    def history(self) -> pd.DataFrame:
        """All measurements of the experiment's own stages, one a row, in the columns `COLUMNS`."""
        recorded = [self.stage_history(n.name) for n in self.stages if self.why(n) is None]
        return pd.concat(recorded, ignore_index=True) if recorded else pd.DataFrame(columns=COLUMNS)

    def stage_history(self, name: str) -> pd.DataFrame:
        """The measurements of a recorded stage, in the columns `COLUMNS`."""
        node = self.find(name)
        return self._read_history(node, read_record(self.folder(node) / "run.json", StageRecord))

    def _read_history(self, node: Node, record: dict[str, Any]) -> pd.DataFrame:
        file, of = self.folder(node) / "history.csv", (node.settings.experiment, node.stage.name)
        return read_history(file, *of, sha256=record.get("history_sha256"))

    def curves(self) -> pd.DataFrame:
        """The measurements of the experiment's stages and of those of other experiments it starts from, with
        the columns `start`, the training step at which a stage begins, and `color`."""
        outside = [
            n.parent for n in self.stages if isinstance(n.parent, Node) and n.parent not in self.stages
        ]
        start: dict[str, int] = {}
        parts = []
        for node in [*dict.fromkeys(outside), *self.stages]:
            if self.why(node) is None:
                start[node.name] = 0
                if isinstance(node.parent, Node) and node.parent.name in start:
                    start[node.name] = (
                        start[node.parent.name] + self.record(node.parent.name)["outcome"]["steps"]
                    )
                parts.append(
                    self.stage_history(node.name).assign(start=start[node.name], color=node.stage.color)
                )
        if not parts:
            raise UsageError(f"experiment '{self.settings.experiment}' has no records to draw; run it first")
        return pd.concat(parts, ignore_index=True)

    def summary(self) -> pd.DataFrame:
        """One row a recorded stage: its alpha, lr, parent, epochs, validation and fold-now accuracy (0..1)."""
        rows = []
        for node in self.stages:
            if (record := self.record(node.name)) is not None:
                rows.append(
                    {
                        "stage": node.stage.name,
                        "from": node.stage.parent,
                        "alpha": node.stage.alpha,
                        "lr": node.stage.lr,
                        "train_wide": node.stage.train_wide,
                        "epochs": record["outcome"]["epochs"],
                        "images": record["outcome"]["images"],
                        "seconds": record["outcome"]["seconds"],
                        "diverged": record["outcome"]["diverged"],
                        **record["metrics"],
                    }
                )
        return pd.DataFrame(rows)

    def provenance(self) -> dict[str, Any]:
        """What figures of the experiment were made from, in the form of `alphaprune.provenance`: its recorded stages, all they
        come from, and the record of the pretrained weights."""
        nodes: dict[str, Node] = {}
        for stage in self.stages:
            nodes |= {node.name: node for node in reversed(stage.line)}  # parents first
        records = list(_whole([(self.root / self.settings.base).with_name("run.json")]))
        records += [self.folder(n) / "run.json" for n in nodes.values() if self.why(n) is None]
        experiments = dict.fromkeys(
            [self.settings.experiment, *(n.settings.experiment for n in nodes.values())]
        )
        files = [f for e in experiments for f in parameter_files(self.settings.preset, e, self.root)]
        return of_records(self.root, records, self.command, files)

    # ---- the pretrained network of a preset, which one of its experiments publishes

    def published(self) -> pd.DataFrame | None:
        """The history beside the published weights, in the form of `curves`; None if `run` has yet to publish them.

        Where the weights alone are missing, as in git those of large networks are, a warning says so.

        Raises:
            UsageError: if weights or records are damaged, and the stage that they were published from is not recorded here.
        """
        folder = self._publishes()
        damage = pretrained.damage(self.settings, self.root)
        history = folder / "history.csv"
        if damage is None:
            return read_history(history).assign(start=0, color=None) if history.is_file() else None
        last = self.stages[-1]
        if self.why(last) is not None or not self.weights(last).is_file():
            if pretrained.is_recorded(self.settings, self.root):
                warnings.warn(
                    f"{damage}; what is recorded of it is shown, and nothing can be trained from it",
                    stacklevel=2,
                )
                return read_history(history).assign(start=0, color=None)
            raise UsageError(f"{damage}; {pretrained.remedy(self.settings)}")
        warnings.warn(f"{damage}; it is published again", stacklevel=2)
        return None

    def published_is_current(self) -> bool:
        """Whether the published weights were made with these very parameters."""
        try:
            record = read_record(self._publishes() / "run.json", StageRecord)
        except Damaged as e:
            warnings.warn(str(e), stacklevel=2)
            return False
        return record["identity"] == self.stages[-1].identity

    def _is_published(self) -> bool:
        """Whether what the experiment publishes is there and whole."""
        whole = pretrained.damage(self.settings, self.root) is None
        return whole and (self._publishes() / "run.json").is_file()

    def _publishes(self) -> Path:
        if self.settings.publish is None:
            raise UsageError(
                f"experiment '{self.settings.experiment}' publishes nothing; add publish: results/<preset>/pretrained"
            )
        return self.root / self.settings.publish


def _whole(files: list[Path]) -> dict[Path, dict[str, Any]]:
    """Of these records those that are there and whole, with their content."""
    found = {}
    for file in files:
        with suppress(Damaged):
            found[file] = read_record(file, StageRecord)
    return found
