"""An experiment: its stages, their records, and running those that are not recorded.

A stage's identity is a hash of all that determines its result. A stage recorded under its identity is not run
again, whichever experiment or machine recorded it. Run one experiment, and whatever it starts from, with

    python -m alphaprune.experiment params/quick/fig4.yaml --set seed=1

`stages` has what an experiment file means, `recorded` what its records say, `stage_training` how a stage is trained. What
computes is imported where it is needed: torch takes seconds, and what is wrong with the input is said before.
"""

from __future__ import annotations

if __name__ == "__main__":
    from alphaprune.interrupt import while_importing

    while_importing()

import argparse
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from alphaprune import pretrained, yaml_text
from alphaprune.errors import Missing, UsageError, shown
from alphaprune.identity import Node
from alphaprune.interrupt import ending_with_a_line
from alphaprune.lock import only_here
from alphaprune.mending import mend, publish, publishes
from alphaprune.progress import Progress
from alphaprune.recorded import NOT_RECORDED, Recorded
from alphaprune.records import COLUMNS
from alphaprune.settings import check_names, given_parameters
from alphaprune.stages import of_file

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["COLUMNS", "Experiment", "main"]


class Experiment(Recorded):
    """An experiment of a preset: its settings, its stages in order, their records.

    Args:
        preset, experiment: name the file `params/<preset>/<experiment>.yaml`.
        root: the project's folder; found from the working directory if None.
        given: settings that replace those of the files, for this experiment and all it starts from.

    Raises:
        UsageError: if the settings are not complete and consistent, a parent does not exist or is circular,
            or the pretrained weights are missing.
    """

    @classmethod
    def from_notebook(cls, variables: Mapping[str, Any], before: set[str]) -> Experiment:
        """The experiment that a notebook's parameters describe; arguments as of `settings.given_parameters`."""
        given = given_parameters(variables, before)
        preset, experiment = given.pop("preset", None), given.pop("experiment", None)
        if not preset or not experiment:
            raise UsageError(
                "parameters 'preset' and 'experiment' are missing; give both, or a file: papermill -f params/quick/fig4.yaml"
            )
        check_names(given, "the parameters given")
        return cls(preset, experiment, **given)

    # ---- running

    def run(
        self, say: Callable[[str], None] = print, again: bool = False, weights: bool = False
    ) -> pd.DataFrame:
        """Run every stage that is not recorded, parents first, and return the experiment's history.

        Args:
            say: takes the lines of progress.
            again: forget the records of the experiment's own stages first, and train them anew.
            weights: train the last stage anew also where its record is there and its weights are not.
        """
        if self.settings.threads:
            import torch

            torch.set_num_threads(self.settings.threads)
        for node in self.stages if again else ():
            if self.why(node) is None:  # what was interrupted goes on
                shutil.rmtree(self.folder(node))
        mend(self, say)
        self._grow()
        to_run = self._to_run(weights)
        recorded = len([n for n in self.stages if n.name not in to_run])
        more = (
            f" and those that follow from {'it' if len(to_run) == 1 else 'them'}"
            if self.settings.adaptive and to_run
            else ""
        )
        stages = f"{len(to_run)} stage{'s' * (len(to_run) != 1)}"
        say(f"[{self.settings.experiment}] {stages} to train{more}, {recorded} already recorded")
        while to_run:
            self._train(list(to_run.values()), say)
            self._grow()
            to_run = self._to_run(weights)
        if publishes(self):
            publish(self)
        return self.history()

    def reasons(self) -> list[str]:
        """What would run, and why: a line for each stage that is recorded in some way, one for all that are not, one if none would run."""
        to_run = self._to_run()
        if to_run and publishes(self) and self._is_published():
            return [
                f"{self.settings.experiment}: published in {self.settings.publish}, which the others start from; not trained again"
            ]
        why = {name: self._needs(node) for name, node in to_run.items()}
        new: dict[str, list[str]] = {}
        for name in (n for n, reason in why.items() if reason == NOT_RECORDED):
            new.setdefault(to_run[name].settings.experiment, []).append(name)
        lines = [f"{name}: {reason}" for name, reason in why.items() if reason != NOT_RECORDED]
        lines += [
            f"{experiment}: {len(names)} stages are {NOT_RECORDED}, from {names[0].partition('/')[2]} on"
            if len(names) > 1
            else f"{names[0]}: {NOT_RECORDED}"
            for experiment, names in new.items()
        ]
        count = len(self.stages)
        all_of_them = f"all {count} stages are" if count > 1 else "its stage is"
        return lines or [f"{self.settings.experiment}: {all_of_them} recorded"]

    def _to_run(self, weights: bool = False) -> dict[str, Node]:
        last = self.stages[-1] if weights else None
        return {n.name: n for stage in self.stages for n in self._missing(stage, stage is last)}

    def _needs(self, node: Node, weights_needed: bool = True) -> str | None:
        """Why a stage has to be trained, None if it has not."""
        if why := self.why(node) or self.weights_damage(node):
            return why
        missing = weights_needed and not self.weights(node).is_file()
        return "its weights are needed and missing" if missing else None

    def _missing(self, node: Node, weights_needed: bool = False) -> list[Node]:
        if self._needs(node, weights_needed) is None:
            return []
        before = self._missing(node.parent, weights_needed=True) if isinstance(node.parent, Node) else []
        return [*before, node]

    def _train(self, nodes: list[Node], say: Callable[[str], None]) -> None:
        from alphaprune import data
        from alphaprune.stage_training import train_stage

        found = data.load(self.settings.data)
        progress = Progress(len(nodes), say)
        for node in nodes:
            with only_here(self.folder(node), node.name, say):
                if why := self._needs(node):
                    s = node.settings
                    progress.begin(s.experiment, node.stage.name, node.stage.parent, why, s.max_epochs)
                    train_stage(self, node, found, progress)
                else:
                    progress.skip(f"{node.name} was recorded by another run meanwhile")

    # ---- networks

    def model(self, name: str) -> nn.Module:
        """The trained model of a recorded stage in eval mode: at its alpha, or plain where it has none."""
        from alphaprune.stage_networks import StageNetworks

        node = self.find(name)
        command = (
            f"python -m alphaprune.experiment params/{self.settings.preset}/{node.settings.experiment}.yaml"
        )
        if why := self.why(node) or self.weights_damage(node):
            raise UsageError(f"stage '{node.name}': {why}; run its experiment first: {command}")
        if not self.weights(node).is_file():
            raise UsageError(
                f"the weights of stage '{node.name}' are gone; delete {self.folder(node)} and run its experiment again: {command}"
            )
        return StageNetworks(self).trained(node)

    def base_network(self) -> nn.Module:
        """The preset's pretrained network, in eval mode."""
        return pretrained.network(self.settings, self.root).eval()

    @staticmethod
    def example_image() -> torch.Tensor:
        """One image of the size the networks expect, (1, 3, 32, 32)."""
        from alphaprune.models import example_image

        return example_image()

    def seconds_for_widths(self) -> float:
        """How long it took to measure what the widths were chosen by; 0 where nothing is measured for them."""
        if self.settings.widths != "sensitivity":
            return 0.0
        from alphaprune.layer_widths import measured

        return measured(self.settings, self.root)["seconds"]


def _given(items: list[str]) -> dict[str, Any]:
    """The settings of `--set NAME=VALUE`."""
    given = {}
    for item in items:
        key, equals, value = item.partition("=")
        if not equals:
            raise UsageError(f"--set {item}: write NAME=VALUE, such as seed=1")
        try:
            given[key] = yaml_text.parse(value)
        except ValueError as e:
            raise UsageError(f"--set {key}: {shown(value)} is not a YAML value ({e})") from None
    check_names(given, "--set")
    return given


def _run_all(files: list[Path], given: dict[str, Any], only_why: bool) -> None:
    said: list[str] = []
    waiting: dict[str, list[str]] = {}  # experiments by what they cannot begin without
    try:
        for file in files:
            preset, name, root = of_file(file)
            try:
                experiment = Experiment(preset, name, root, **given)
            except Missing as e:
                if not only_why:
                    raise
                waiting.setdefault(str(e), []).append(name)
                continue
            if only_why:
                new = [line for line in experiment.reasons() if line not in said]  # a parent of several
                said += new
                print(*new, sep="\n")
                continue
            experiment.run(lambda line: print(line, flush=True))
            print(experiment.summary().to_string(index=False, float_format="{:.4g}".format))
    finally:
        for what, names in waiting.items():
            print(f"{', '.join(names)}: all stages, once there is what they start from: {what}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m alphaprune.experiment", description="Run one experiment."
    )
    parser.add_argument("file", type=Path, nargs="+", help="params/<preset>/<experiment>.yaml")
    parser.add_argument("--why", action="store_true", help="train nothing; say what would run, and why")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="replace a setting, such as seed=1"
    )
    args = parser.parse_args(arguments)
    try:
        with ending_with_a_line():
            _run_all(args.file, _given(args.set), args.why)
    except UsageError as e:
        print(f"alphaprune: {e}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
