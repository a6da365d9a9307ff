"""From an experiment file to its stages, their parents and their records.

A stage's identity is a hash of all that determines its result. A stage recorded under its identity is not run
again, whichever experiment or machine recorded it. Run one experiment, and whatever it starts from, with

    python -m alphaprune.experiment params/quick/fig4.yaml --set seed=1
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import os
import shlex
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import yaml
from torch import nn
from torch.optim.swa_utils import update_bn

from alphaprune import data as images
from alphaprune import yaml_text
from alphaprune.blend import WIDE_SHARE, wide_share
from alphaprune.errors import UsageError, shown
from alphaprune.fold import fold
from alphaprune.interrupt import Interrupted, ending_with_a_line
from alphaprune.lock import only_here
from alphaprune.models import NETWORKS
from alphaprune.narrowing import from_scratch, torch_pruning
from alphaprune.parallel import BRANCHES_VERSION, ParallelModel
from alphaprune.progress import Progress
from alphaprune.provenance import of_records, provenance
from alphaprune.records import (
    COLUMNS,
    DamagedRecord,
    SensitivityRecord,
    StageRecord,
    read_history,
    read_record,
)
from alphaprune.schedule import Try, next_try, staggered
from alphaprune.sensitivity import allot, damages
from alphaprune.settings import (
    MOST_STAGES,
    Settings,
    Stage,
    check_names,
    given_parameters,
    load_settings,
    parameter_files,
    project_root,
)
from alphaprune.skips import SkipModel
from alphaprune.storage import load_tensors, read_digest, save_tensors, write_bytes, write_json
from alphaprune.train import (
    TRAINING_VERSION,
    Outcome,
    accelerator_for_this_machine,
    derive_seed,
    evaluate,
    fit,
)
from alphaprune.weights import WrongWeights, load_weights
from alphaprune.why import what_changed

# Part of the identity of every stage whose network is plain and narrow. Raise it when what it begins with changes.
NARROWING_VERSION = 1
# Part of the identity of widths by sensitivity. Raise it when what is measured changes.
SENSITIVITY_VERSION = 1
SENSITIVITY_IMAGES = 1000  # at most
STATISTICS_BATCH = 250  # images, for BatchNorm
SHARE_IMAGES = 500  # at most, for `wide_share`
SCRATCH, BASE = "scratch", "base"
OF_ONE_EXPERIMENT = ("stages", "title", "folds", "publish")  # settings that hold for no other


@dataclass(frozen=True)
class _Node:
    """A stage together with the experiment it belongs to, its parent and its identity."""

    settings: Settings
    stage: Stage
    parent: _Node | str  # another stage, or SCRATCH or BASE
    determines: dict[str, Any] = field(hash=False, compare=False)  # all that its result is a function of
    identity: str  # a hash of it

    @property
    def name(self) -> str:
        return f"{self.settings.experiment}/{self.stage.name}"

    @property
    def narrowed_at(self) -> _Node | None:
        """This stage or the one before that made the network a plain narrow one; None while it has not been."""
        node: _Node | str = self
        while isinstance(node, _Node):
            if node.stage.narrow:
                return node
            node = node.parent
        return None

    @property
    def key(self) -> str:
        """What the stage's random numbers are a function of."""
        return f"{self.settings.seed}/{self.name}"


class Experiment:
    """An experiment of a preset: its settings, its stages in order, their records.

    Args:
        preset, experiment: name the file `params/<preset>/<experiment>.yaml`.
        root: the project's folder; found from the working directory if None.
        given: settings that replace those of the files, for this experiment and all it starts from.

    Raises:
        UsageError: if the settings are not complete and consistent, a parent does not exist or is circular,
            or the pretrained weights are missing.
    """

    def __init__(self, preset: str, experiment: str, root: Path | None = None, **given: Any):
        self.root = root or project_root()
        self.given = given
        self.settings = load_settings(preset, experiment, self.root, **given)
        self._all = {experiment: self.settings}
        self._checksum = images.checksum(self.settings.data)
        self._nodes: dict[str, _Node] = {}
        self.stages = [self._resolve(experiment, s.name, ()) for s in self.settings.stages]
        self._grow()
        if self.settings.folds not in (None, "best"):
            self.find(self.settings.folds)  # refused now if there is no such stage

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

    # ---- stages, parents, identities

    def _resolve(self, experiment: str, stage: str, path: tuple[str, ...]) -> _Node:
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
        self._check_descent(name, settings, found[0], parent)
        node = self._node(settings, found[0], parent)
        self._nodes[name] = node
        return node

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
        nodes: list[_Node] = []
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
            node = self._node(s, stage, parent)
            nodes.append(node)
            self._nodes[node.name] = node
            if self.why(node) is not None:
                break
            tries.append(following)
            reached.append(self.record(node.name)["metrics"]["val_accuracy"])
        self.stages += nodes

    @staticmethod
    def _check_descent(name: str, settings: Settings, stage: Stage, parent: _Node | str) -> None:
        if stage.narrow and stage.narrow != "fold" and parent != BASE:
            raise UsageError(f"stage '{name}': narrow: {stage.narrow} needs `from: base`")
        if stage.refit and (not isinstance(parent, _Node) or parent.stage.alpha is None):
            raise UsageError(
                f"stage '{name}': refit needs a stage with branches to start from, not '{stage.parent}'"
            )
        if not isinstance(parent, _Node):
            return
        if parent.narrowed_at and (stage.alpha is not None or stage.narrow):
            raise UsageError(
                f"stage '{name}' starts from '{parent.name}', which is narrow already; train it plain"
            )
        if stage.alpha is None and parent.stage.alpha is not None and stage.narrow != "fold":
            raise UsageError(
                f"stage '{name}' has no alpha, but '{parent.name}', which it starts from, has branches; give it an alpha, or narrow: fold"
            )
        for key in ("network", "width", "keep_ratio", "anneal", "init", "widths"):
            own, its = getattr(settings, key), getattr(parent.settings, key)
            if own != its:
                raise UsageError(
                    f"{key} is {own} at '{name}', but {its} at '{parent.name}', which it starts from; set both alike"
                )

    def _node(self, settings: Settings, stage: Stage, parent: _Node | str) -> _Node:
        determines = self._determines(settings, stage, parent)
        identity = hashlib.sha256(json.dumps(determines, sort_keys=True).encode()).hexdigest()
        return _Node(settings, stage, parent, determines, identity)

    def _determines(self, settings: Settings, stage: Stage, parent: _Node | str) -> dict[str, Any]:
        """Everything that determines the stage's result; hardware and colours do not."""
        branches = stage.alpha is not None
        narrow = stage.narrow or (isinstance(parent, _Node) and parent.narrowed_at)
        if isinstance(parent, _Node):
            origin = parent.identity
        else:
            origin = self._base_digest(settings) if parent == BASE else SCRATCH
        return {
            "training_version": TRAINING_VERSION,
            "experiment": settings.experiment,
            "stage": stage.determines(),
            "parent": origin,
            "recipe": asdict(settings.recipe(stage)),
            "network": {
                f"{settings.network}_width": settings.width,
                "keep_ratio": settings.keep_ratio if branches or narrow else None,
                **({"anneal": settings.anneal, "branches": BRANCHES_VERSION} if branches else {}),
                **({"narrowing": NARROWING_VERSION} if narrow else {}),
                **(self._init_identity(settings, stage) if branches or narrow else {}),
                **(
                    {"widths": self._ratios(settings)}
                    if (branches or narrow) and settings.widths != "uniform"
                    else {}
                ),
            },
            "data": [self._checksum, settings.train_images, settings.val_images],
            "seed": settings.seed,
        }

    @staticmethod
    def _init_identity(settings: Settings, stage: Stage) -> dict[str, Any]:
        if settings.init == "random" and not stage.refit:
            return {}
        return {"init": settings.init, "init_images": settings.init_images}

    def _ratios(self, settings: Settings) -> float | dict[str, float]:
        """What the settings' keep_ratio means for each layer."""
        if settings.widths == "uniform":
            return settings.keep_ratio
        damage = self._damages(settings)["damages"]
        network = NETWORKS[settings.network](settings.width).eval()
        curves = {group: {float(r): d for r, d in curve.items()} for group, curve in damage.items()}
        try:
            return allot(network, curves, settings.keep_ratio, self.example_image())
        except UsageError as e:
            where = f"results/{settings.preset}/sensitivity"
            raise UsageError(f"{where}: {e}: delete that folder and run the same command again") from None

    def _damages(self, settings: Settings) -> dict[str, Any]:
        """What narrowing single layers does to the pretrained network, measured once and recorded."""
        determines = [
            SENSITIVITY_VERSION,
            self._base_digest(settings),
            self._checksum,
            settings.train_images,
            settings.init_images,
        ]
        identity = hashlib.sha256(json.dumps(determines).encode()).hexdigest()
        record = self.root / "results" / settings.preset / "sensitivity" / f"{identity[:8]}.json"
        try:
            if (
                record.is_file()
                and (content := read_record(record, SensitivityRecord))["identity"] == identity
            ):
                return content
        except DamagedRecord as e:
            warnings.warn(f"{e}; it is measured again", stacklevel=2)
        started = time.monotonic()
        device = accelerator_for_this_machine().device
        seen = self._first_images(settings)[:SENSITIVITY_IMAGES].to(device)
        found = damages(self._pretrained(settings).eval().to(device), seen)
        content = {"identity": identity, "damages": found, "seconds": round(time.monotonic() - started, 1)}
        write_json(record, content)
        return content

    def seconds_for_widths(self) -> float:
        """How long it took to measure what the widths were chosen by; 0 where they are uniform."""
        uniform = self.settings.widths == "uniform"
        return 0.0 if uniform else self._damages(self.settings)["seconds"]

    def _first_images(self, settings: Settings) -> torch.Tensor:
        train = images.load(settings.data).train.first(settings.train_images)
        return next(images.batches(train, settings.init_images))[0]

    def _base_digest(self, settings: Settings) -> str:
        if not (self.root / f"{settings.base}.sha256").is_file():
            raise UsageError(
                f"the pretrained weights {settings.base} are missing; run `make pretrain PRESET={settings.preset}`"
            )
        return read_digest(self.root / settings.base)

    def folder(self, node: _Node) -> Path:
        """Where a stage's weights and records lie."""
        stages = self.root / "results" / self.settings.preset / "stages"
        return stages / node.settings.experiment / f"{node.stage.name}-{node.identity[:8]}"

    def find(self, name: str) -> _Node:
        """A stage by the name `<stage>` or `<experiment>/<stage>`."""
        experiment, _, stage = name.rpartition("/")
        return self._resolve(experiment or self.settings.experiment, stage, ())

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

    def why(self, node: _Node) -> str | None:
        """Why a stage would run; None if it is recorded."""
        record = self.folder(node) / "run.json"
        if not record.is_file():
            files = sorted(self.folder(node).parent.glob(f"{node.stage.name}-????????/run.json"))
            if not files:
                return "not recorded yet"
            changed = what_changed(node.determines, _recorded_inputs(files))
            return f"recorded with other inputs{f' ({changed})' if changed else ''}"
        try:
            if read_record(record, StageRecord)["identity"] != node.identity:
                return f"{record} belongs to another stage"
            self._read_history(node)
        except DamagedRecord as e:
            return str(e)
        return None

    @property
    def label(self) -> str:
        """The experiment's name, and the settings that differ from its files: `fig4`, `fig4,seed=1`."""
        files = load_settings(self.settings.preset, self.settings.experiment, self.root)
        changed = {k: v for k, v in self.settings if v != getattr(files, k)}
        short = ",".join(f"{k}={v}" if isinstance(v, int | float) else k for k, v in sorted(changed.items()))
        return f"{self.settings.experiment},{short}" if short else self.settings.experiment

    @property
    def changed(self) -> dict[str, Any]:
        """The settings given that differ from the experiment's files, by name, as they were given."""
        names = self.settings.preset, self.settings.experiment, self.root
        files = load_settings(*names)
        same = {k for k, v in self.settings if v == getattr(files, k)}
        # A notebook that was run from the experiment's file is given what stands in it.
        if f"params/{self.given.get('stages_of')}/{self.settings.experiment}.yaml" in parameter_files(*names):
            same.add("stages_of")
        return {k: v for k, v in sorted(self.given.items()) if k not in same}

    @property
    def command(self) -> str:
        """The command that makes the experiment's records."""
        file = f"params/{self.settings.preset}/{self.settings.experiment}.yaml"
        given = [("--set", shlex.quote(f"{name}={in_yaml(value)}")) for name, value in self.changed.items()]
        return " ".join(["python -m alphaprune.experiment", file, *(word for pair in given for word in pair)])

    def stage_table(self) -> pd.DataFrame:
        """The stages as they stand in the file, and why each would run."""
        rows = [
            n.stage.model_dump(by_alias=True, exclude={"color"}) | {"state": self.why(n) or "recorded"}
            for n in self.stages
        ]
        return pd.DataFrame(rows)

    def reasons(self) -> list[str]:
        """A line a stage that would run, and why; one line if none would."""
        lines = [f"{name}: {self._needs(node)}" for name, node in self._to_run().items()]
        return lines or [f"{self.settings.experiment}: all {len(self.stages)} stages are recorded"]

    # ---- running

    def run(self, say: Callable[[str], None] = print, again: bool = False) -> pd.DataFrame:
        """Run every stage that is not recorded, parents first, and return the experiment's history.

        Args:
            say: takes the lines of progress.
            again: forget the records of the experiment's own stages first, and train them anew.
        """
        if self.settings.threads:
            torch.set_num_threads(self.settings.threads)
        for node in self.stages if again else ():
            if self.why(node) is None:  # what was interrupted goes on
                shutil.rmtree(self.folder(node))
        self._grow()
        to_run = self._to_run()
        recorded = len([n for n in self.stages if n.name not in to_run])
        more = " and those that follow from them" if self.settings.adaptive and to_run else ""
        say(f"[{self.settings.experiment}] {len(to_run)} stages to train{more}, {recorded} already recorded")
        while to_run:
            data = images.load(self.settings.data)
            progress = Progress(len(to_run), say)
            for node in to_run.values():
                with only_here(self.folder(node), node.name, say):
                    if why := self._needs(node):
                        self._train(node, why, data, progress)
                    else:
                        progress.skip(f"{node.name} was recorded by another run meanwhile")
            self._grow()
            to_run = self._to_run()
        if self.settings.publish and self.label == self.settings.experiment:
            self._publish()
        return self.history()

    def _to_run(self) -> dict[str, _Node]:
        return {n.name: n for stage in self.stages for n in self._missing(stage)}

    def _needs(self, node: _Node, weights_needed: bool = True) -> str | None:
        """Why a stage has to be trained, None if it has not."""
        has_weights = (self.folder(node) / "weights.safetensors").is_file()
        if weights_needed and not has_weights:
            return self.why(node) or "its weights are needed and missing"
        return self.why(node)

    def _missing(self, node: _Node, weights_needed: bool = False) -> list[_Node]:
        if self._needs(node, weights_needed) is None:
            return []
        before = self._missing(node.parent, weights_needed=True) if isinstance(node.parent, _Node) else []
        return [*before, node]

    def _train(self, node: _Node, why: str, data: images.Dataset, progress: Progress) -> None:
        s, stage, folder = node.settings, node.stage, self.folder(node)
        progress.begin(s.experiment, stage.name, stage.parent, why, s.max_epochs)
        started = time.monotonic()
        model = self._start(node)
        start_seconds = time.monotonic() - started
        checkpoint = folder / "resume.safetensors"
        val = data.val.first(s.val_images)
        train = data.train.first(s.train_images)
        objective = stage.objective()
        teacher = self._pretrained(s) if objective.needs_teacher else None

        def fold_now() -> float:
            """What the network would score if it were folded at this moment."""
            alpha, model.alpha = model.alpha, 0.0
            accuracy = evaluate(model, val, accelerator=accelerator_for_this_machine())[1]
            model.alpha = alpha
            return accuracy

        def share() -> dict[str, float]:
            """How much of what each mixer reads comes from the wide program."""
            if not isinstance(model, ParallelModel) or stage.alpha == 0:
                return {}
            seen = next(images.batches(val.to(next(model.parameters()).device), SHARE_IMAGES))[0]
            return {f"{WIDE_SHARE}{layer}": s for layer, s in wide_share(model, seen).items()}

        def measure(epoch: int) -> dict[str, float]:
            if stage.alpha is None or epoch % s.fold_now_every:
                return {}
            return {"fold_now_running": fold_now(), **share()}

        recipe = s.recipe(stage)
        try:
            outcome = fit(
                model, train, val, recipe, node.key, checkpoint, progress.epoch, objective, teacher, measure
            )
        except Interrupted as e:
            raise Interrupted(e.number, f"stage {node.name} is {e.where}") from None
        metrics = {"val_accuracy": outcome.reached}
        if stage.alpha is not None:
            metrics["fold_now"] = fold_now()
            last = {"step": outcome.steps, "epoch": outcome.epochs, "split": "val"}
            outcome.history.append(last | {"metric": "fold_now", "value": metrics["fold_now"]})
        digest = save_tensors(folder / "weights.safetensors", model.state_dict())
        history = pd.DataFrame(outcome.history).assign(
            experiment=s.experiment, stage=stage.name, alpha=stage.alpha, lr=stage.lr
        )
        write_bytes(folder / "history.csv", history[COLUMNS].to_csv(index=False).encode())
        # Last, since it makes the stage recorded.
        write_json(folder / "run.json", self._record(node, outcome, metrics, digest, start_seconds))
        for leftover in (*folder.glob("resume.*"), *folder.glob(".*.tmp")):
            leftover.unlink()
        progress.end(outcome, metrics)

    def _start(self, node: _Node) -> nn.Module:
        """The model a stage trains, with the weights it starts from."""
        if node.narrowed_at:
            model = self._narrow(node.narrowed_at)
            if node.narrowed_at is not node:
                load_weights(model, self.folder(node.parent) / "weights.safetensors")
            return model
        if isinstance(node.parent, _Node) and node.parent.stage.alpha is not None and not node.stage.refit:
            model = self._parallel(node)
            load_weights(model, self.folder(node.parent) / "weights.safetensors")
        elif node.stage.alpha is None:
            model = self._network(node)
        else:
            model = self._parallel(node, fitted=True)
        if node.stage.alpha is not None:
            self._set_alpha(model, node)
        if isinstance(model, ParallelModel):
            model.train_wide = node.stage.train_wide
            model.hold_batchnorm = node.stage.hold_batchnorm
        return model

    @staticmethod
    def _set_alpha(model: ParallelModel | SkipModel, node: _Node) -> None:
        alpha, order = node.stage.alpha, node.stage.order
        model.alpha = alpha if order == "together" else staggered(alpha, len(model.expand), order)

    def _narrow(self, node: _Node) -> nn.Module:
        """The plain narrow network that a stage with `narrow` begins with."""
        s, how = node.settings, node.stage.narrow
        torch.manual_seed(derive_seed(node.key, 0))
        if how.startswith("torch-pruning"):
            return torch_pruning(
                self._pretrained(s), self._ratios(s), how.rpartition("-")[2], self.example_image()
            )
        if isinstance(node.parent, _Node) and not node.stage.refit:
            model = self._parallel(node.parent)
            load_weights(model, self.folder(node.parent) / "weights.safetensors")
        else:
            model = self._parallel(node, fitted=how == "fold")
        if how == "scratch":
            torch.manual_seed(derive_seed(node.key, 0))
            return from_scratch(model)
        model.alpha = 0.0
        return fold(model)[0]

    def _network(self, node: _Node) -> nn.Module:
        """The plain network a stage trains, or that the branches are put beside."""
        if node.parent == BASE:
            return self._pretrained(node.settings)
        torch.manual_seed(derive_seed(node.key, 0))
        network = NETWORKS[node.settings.network](node.settings.width)
        if isinstance(node.parent, _Node):
            load_weights(network, self.folder(node.parent) / "weights.safetensors")
        return network

    def _wide_program(self, node: _Node) -> nn.Module:
        """The wide network of a stage with branches, as it is without them: its BatchNorms measure their statistics anew."""
        network = copy.deepcopy(self.model(node.name).network)
        seen = self._first_images(node.settings).split(STATISTICS_BATCH)
        update_bn(seen, network)
        return network.eval()

    def _pretrained(self, settings: Settings) -> nn.Module:
        network = NETWORKS[settings.network](settings.width)
        try:
            load_weights(network, self.root / settings.base)
        except WrongWeights as e:
            raise UsageError(
                f"the weights in {settings.base} do not fit a {settings.network} of width {settings.width:g}; set width to "
                f"theirs, or base to another file and run `make pretrain PRESET={settings.preset}` ({e})"
            ) from None
        return network

    def _parallel(self, node: _Node, fitted: bool = False) -> ParallelModel | SkipModel:
        """The model with an alpha around a stage's first ancestor; its branches depend on the seed alone.

        `fitted` starts them as the settings' `init` says; without, they wait for weights to be loaded.
        """
        first = node
        while (
            not first.stage.refit and isinstance(first.parent, _Node) and first.parent.stage.alpha is not None
        ):
            first = first.parent
        network = self._wide_program(first.parent) if first.stage.refit else self._network(first)
        if node.settings.anneal == "skips":
            return SkipModel(network, self.example_image())
        torch.manual_seed(derive_seed(node.settings.seed, "branches"))
        s = node.settings
        init = node.stage.refit or s.init
        options: dict[str, Any] = {}
        if fitted and init != "random":
            options = {"init": init, "images": self._first_images(s)}
        return ParallelModel(network, self._ratios(s), self.example_image(), **options)

    def model(self, name: str) -> nn.Module:
        """The trained model of a recorded stage in eval mode: at its alpha, or plain where it has none."""
        node = self.find(name)
        path = self.folder(node) / "weights.safetensors"
        if self.why(node) is not None or not path.is_file():
            raise UsageError(
                f"stage '{node.name}' has no weights yet; run its experiment first: python -m alphaprune.experiment params/{self.settings.preset}/{node.settings.experiment}.yaml"
            )
        if node.narrowed_at:
            model = self._narrow(node.narrowed_at)
            load_weights(model, path)
            return model.eval()
        model = self._parallel(node)
        load_weights(model, path)
        self._set_alpha(model, node)
        return model.eval()

    @staticmethod
    def example_image() -> torch.Tensor:
        """One image of the size the networks expect, (1, 3, 32, 32)."""
        return torch.zeros(1, 3, 32, 32)

    def base_network(self) -> nn.Module:
        """The preset's pretrained network, in eval mode."""
        return self._pretrained(self.settings).eval()

    # ---- records

    def _record(
        self, node: _Node, outcome: Outcome, metrics: dict[str, float], digest: str, start_seconds: float
    ) -> dict[str, Any]:
        summary = {k: v for k, v in vars(outcome).items() if k != "history"}
        summary["seconds"] = round(outcome.seconds, 2)
        summary["start_seconds"] = round(start_seconds, 2)
        return {
            "identity": node.identity,
            "determines": node.determines,
            "experiment": node.settings.experiment,
            "stage": node.stage.model_dump(by_alias=True),
            "parent": node.parent.identity if isinstance(node.parent, _Node) else node.parent,
            "settings": node.settings.model_dump(mode="json", exclude={"stages", "title"}),
            "metrics": metrics,
            "outcome": summary,
            "weights_sha256": digest,
            "data_checksum": self._checksum,
            **provenance(self.root, self.command),
        }

    def provenance(self) -> dict[str, Any]:
        """What figures of the experiment were made from, in the form of `alphaprune.provenance`: its recorded stages, all they
        come from, and the record of the pretrained weights."""
        nodes: dict[str, _Node] = {}

        def add(node: _Node | str) -> None:
            if isinstance(node, _Node) and node.name not in nodes:
                add(node.parent)  # parents first
                nodes[node.name] = node

        for stage in self.stages:
            add(stage)
        pretrained = (self.root / self.settings.base).with_name("run.json")
        records = [pretrained] if pretrained.is_file() else []
        records += [self.folder(n) / "run.json" for n in nodes.values() if self.why(n) is None]
        experiments = dict.fromkeys(
            [self.settings.experiment, *(n.settings.experiment for n in nodes.values())]
        )
        files = [f for e in experiments for f in parameter_files(self.settings.preset, e, self.root)]
        return of_records(self.root, records, self.command, files)

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
        return self._read_history(self.find(name))

    def _read_history(self, node: _Node) -> pd.DataFrame:
        return read_history(self.folder(node) / "history.csv", node.settings.experiment, node.stage.name)

    def published(self) -> pd.DataFrame | None:
        """The history beside the published weights, in the form of `curves`; None if they are not there, or it is damaged."""
        history = self._publishes() / "history.csv"
        if not (self.root / f"{self.settings.base}.sha256").is_file() or not history.is_file():
            return None
        try:
            return read_history(history).assign(start=0, color=None)
        except DamagedRecord as e:
            warnings.warn(f"{e}; it is made again", stacklevel=2)
            return None

    def published_is_current(self) -> bool:
        """Whether the published weights were made with these very parameters."""
        try:
            record = read_record(self._publishes() / "run.json", StageRecord)
        except DamagedRecord as e:
            warnings.warn(str(e), stacklevel=2)
            return False
        return record["identity"] == self.stages[-1].identity

    def _publishes(self) -> Path:
        if self.settings.publish is None:
            raise UsageError(
                f"experiment '{self.settings.experiment}' publishes nothing; add publish: results/<preset>/pretrained"
            )
        return self.root / self.settings.publish

    def curves(self) -> pd.DataFrame:
        """The measurements of the experiment's stages and of those of other experiments it starts from, with
        the columns `start`, the training step at which a stage begins, and `color`."""
        outside = [
            n.parent for n in self.stages if isinstance(n.parent, _Node) and n.parent not in self.stages
        ]
        start: dict[str, int] = {}
        parts = []
        for node in [*dict.fromkeys(outside), *self.stages]:
            if self.why(node) is None:
                start[node.name] = 0
                if isinstance(node.parent, _Node) and node.parent.name in start:
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

    def _publish(self) -> None:
        """Copy the last stage's weights and records to the folder that the settings name."""
        source, target = self.folder(self.stages[-1]), self.root / self.settings.publish
        for name in ("history.csv", "run.json"):
            write_bytes(target / name, (source / name).read_bytes())
        save_tensors(target / Path(self.settings.base).name, load_tensors(source / "weights.safetensors")[0])


def _recorded_inputs(files: list[Path]) -> list[dict[str, Any]]:
    """What the records in these files were determined by, as far as they are whole and say so."""
    found = []
    for file in files:
        try:
            found.append(read_record(file, StageRecord).get("determines"))
        except DamagedRecord:
            continue
    return [inputs for inputs in found if inputs]


def _of_file(file: Path, given: dict[str, Any]) -> Experiment:
    if not file.is_file():
        raise UsageError(f"{file} does not exist; experiment files lie in params/<preset>/")
    # Not resolved: what a link leads to may be another project's, and its results are not ours to write.
    path = Path(os.path.abspath(file))
    if path.parent.parent.name != "params":
        raise UsageError(f"{file} is no experiment file; those lie in params/<preset>/")
    return Experiment(path.parent.name, path.stem, root=path.parents[2], **given)


def in_yaml(value: Any) -> str:
    """A setting as it is written on a command line, on one line.

    >>> in_yaml(1e-5), in_yaml([{"alpha": 0.5}])
    ('1.0e-05', '[{alpha: 0.5}]')
    """
    text = yaml.safe_dump(value, default_flow_style=True, width=float("inf"), sort_keys=False)
    return text.removesuffix("...\n").strip()


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
        given = {}
        for item in args.set:
            key, equals, value = item.partition("=")
            if not equals:
                raise UsageError(f"--set {item}: write NAME=VALUE, such as seed=1")
            try:
                given[key] = yaml_text.parse(value)
            except ValueError as e:
                raise UsageError(f"--set {key}: {shown(value)} is not a YAML value ({e})") from None
        check_names(given, "--set")
        said: list[str] = []
        for file in args.file:
            experiment = _of_file(file, given)
            if args.why:
                new = [line for line in experiment.reasons() if line not in said]  # a parent of several
                said += new
                print(*new, sep="\n")
                continue
            with ending_with_a_line():
                experiment.run(lambda line: print(line, flush=True))
            print(experiment.summary().to_string(index=False, float_format="{:.4g}".format))
    except UsageError as e:
        print(f"alphaprune: {e}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
