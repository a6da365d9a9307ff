"""From an experiment file to its stages and what each starts from: parents by name, through other experiments, without a circle."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Any

from alphaprune import pretrained, sources
from alphaprune.errors import UsageError
from alphaprune.identity import BASE, SCRATCH, Node, identified, narrow_or_branched
from alphaprune.settings import MOST_STAGES, Settings, Stage, load_settings, parameter_files, project_root
from alphaprune.yaml_text import in_yaml

OF_ONE_EXPERIMENT = ("stages", "title", "folds", "publish")  # settings that hold for no other
# At a stage and what it starts from.
ALIKE = ("network", "width", "keep_ratio", "anneal", "init", "widths", "round_to")


class Stages:
    """An experiment of a preset: its settings and its stages in order. Arguments and errors as of `experiment.Experiment`."""

    def __init__(self, preset: str, experiment: str, root: Path | None = None, **given: Any):
        self.root = root or project_root()
        self.given = given
        self.settings = load_settings(preset, experiment, self.root, **given)
        self.data_checksum = sources.checksum(self.settings.data)
        self._all = {experiment: self.settings}
        self._nodes: dict[str, Node] = {}
        self.stages = [self._resolve(experiment, s.name, ()) for s in self.settings.stages]

    def find(self, name: str) -> Node:
        """A stage by the name `<stage>` or `<experiment>/<stage>`."""
        experiment, _, stage = name.rpartition("/")
        return self._resolve(experiment or self.settings.experiment, stage, ())

    def folder(self, node: Node) -> Path:
        """Where a stage's weights and records lie."""
        stages = self.root / "results" / self.settings.preset / "stages"
        return stages / node.settings.experiment / f"{node.stage.name}-{node.identity[:8]}"

    def weights(self, node: Node) -> Path:
        """The file of a stage's weights."""
        return self.folder(node) / "weights.safetensors"

    @property
    def label(self) -> str:
        """The experiment's name, and the settings that differ from its files: `fig4`, `fig4,seed=1`."""
        return self.named(self.settings.experiment)

    def named(self, what: str) -> str:
        """A name for what is made of the experiment, which ends in the settings that differ from its files: `figure4`, `figure4,seed=1`."""
        files = load_settings(self.settings.preset, self.settings.experiment, self.root)
        changed = {k: v for k, v in self.settings if v != getattr(files, k)}
        short = (f"{k}={v}" if isinstance(v, int | float) else k for k, v in sorted(changed.items()))
        return ",".join([what, *short])

    def figure(self, name: str) -> Path:
        """Where a figure of the experiment lies, without ending, so that other settings do not write over it."""
        return self.root / "results" / self.settings.preset / "figures" / self.named(name)

    @property
    def changed(self) -> dict[str, Any]:
        """The settings given that differ from the experiment's files, by name, as they were given."""
        return self._changed(self.settings)

    @property
    def command(self) -> str:
        """The command that makes the experiment's records."""
        return self.command_of(self.settings)

    def command_of(self, settings: Settings) -> str:
        """The command that makes the records of this experiment, or of one it starts from: the same, whichever of them runs."""
        file = f"params/{settings.preset}/{settings.experiment}.yaml"
        changed = self._changed(settings).items()
        given = [("--set", shlex.quote(f"{name}={in_yaml(value)}")) for name, value in changed]
        return " ".join(["python -m alphaprune.experiment", file, *(word for pair in given for word in pair)])

    def _changed(self, s: Settings) -> dict[str, Any]:
        files = load_settings(s.preset, s.experiment, self.root)
        same = {k for k, v in s if v == getattr(files, k)}
        # A notebook that was run from the experiment's file is given what stands in it.
        shared = f"params/{self.given.get('stages_of')}/{s.experiment}.yaml"
        if shared in parameter_files(s.preset, s.experiment, self.root):
            same.add("stages_of")
        if s is not self.settings:
            same |= set(OF_ONE_EXPERIMENT)
        return {k: v for k, v in sorted(self.given.items()) if k not in same}

    def _resolve(self, experiment: str, stage: str, path: tuple[str, ...]) -> Node:
        name = f"{experiment}/{stage}"
        if name in self._nodes:
            return self._nodes[name]
        if len(path) > MOST_STAGES:
            raise UsageError(
                f"stage '{path[0]}' has more than {MOST_STAGES} stages before it; make them fewer"
            )
        if name in path:
            raise UsageError(
                f"stage '{name}' starts from itself: {' <- '.join((*path[path.index(name) :], name))}"
            )
        if experiment not in self._all:
            shared = {k: v for k, v in self.given.items() if k not in OF_ONE_EXPERIMENT}
            self._all[experiment] = load_settings(self.settings.preset, experiment, self.root, **shared)
        settings = self._all[experiment]
        found = [s for s in settings.stages if s.name == stage]
        if not found:
            raise UsageError(
                f"params/{settings.preset}/{experiment}.yaml has no stage '{stage}'"
                f"{f', which {path[-1]} starts from' if path else ''}; it has: {', '.join(s.name for s in settings.stages) or 'none'}"
            )
        parent = found[0].parent
        if parent not in (SCRATCH, BASE):
            other, _, its_stage = parent.rpartition("/")
            parent = self._resolve(other or experiment, its_stage, (*path, name))
        _check_descent(name, settings, found[0], parent)
        self._nodes[name] = self._identified(settings, found[0], parent)
        return self._nodes[name]

    def _identified(self, settings: Settings, stage: Stage, parent: Node | str) -> Node:
        if isinstance(parent, Node):
            origin = parent.identity
        else:
            origin = pretrained.digest(settings, self.root) if parent == BASE else SCRATCH
        ratios = None
        if any(narrow_or_branched(stage, parent)) and settings.widths != "uniform":
            from alphaprune import layer_widths  # measures: brings torch, which nothing else here needs

            ratios = layer_widths.ratios(settings, self.root)
        return identified(settings, stage, parent, origin, self.data_checksum, ratios)


def of_file(file: Path) -> tuple[str, str, Path]:
    """The preset, the experiment and the project's folder of an experiment file (raises UsageError if it is none)."""
    if not file.is_file():
        raise UsageError(f"{file} does not exist; experiment files lie in params/<preset>/")
    # Not resolved: what a link leads to may be another project's, and its results are not ours to write.
    path = Path(os.path.abspath(file))
    if path.parent.parent.name != "params":
        raise UsageError(f"{file} is no experiment file; those lie in params/<preset>/")
    return path.parent.name, path.stem, path.parents[2]


def _check_descent(name: str, settings: Settings, stage: Stage, parent: Node | str) -> None:
    """Refuse a stage whose network cannot be made from its parent's."""
    if stage.narrow and stage.narrow != "fold" and parent != BASE:
        raise UsageError(f"stage '{name}': narrow: {stage.narrow} needs `from: base`")
    if stage.refit and parent != BASE and (not isinstance(parent, Node) or parent.stage.alpha is None):
        raise UsageError(
            f"stage '{name}': refit needs base or a stage with branches to start from, not '{stage.parent}'"
        )
    if not isinstance(parent, Node):
        return
    if parent.narrowed_at and (stage.alpha is not None or stage.narrow):
        raise UsageError(
            f"stage '{name}' starts from '{parent.name}', which is narrow already; train it plain"
        )
    if stage.alpha is None and parent.stage.alpha is not None and stage.narrow != "fold":
        raise UsageError(
            f"stage '{name}' has no alpha, but '{parent.name}', which it starts from, has branches; give it an alpha, or narrow: fold"
        )
    for key in ALIKE:
        own, its = getattr(settings, key), getattr(parent.settings, key)
        if own != its:
            raise UsageError(
                f"{key} is {own} at '{name}', but {its} at '{parent.name}', which it starts from; set both alike"
            )
