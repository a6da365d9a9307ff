"""Controls: other ways to a narrow network of the same cost, on the same images, each with its own best learning rate.

    python -m alphaprune.controls quick --jobs 2

The methods are data, `params/controls.yaml`: stages and settings of the experiment `controls` of a preset. Each method gets its learning
rate from the same search on the validation images, with the first seed; the other seeds run with that rate. The epochs of the preset are
divided evenly among a method's stages, so that all see the same number of images. What has run is recorded, stage by stage, and not run again.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from alphaprune import data as images
from alphaprune.errors import UsageError
from alphaprune.experiment import Experiment
from alphaprune.fold import fold
from alphaprune.measure import multiply_adds, parameters
from alphaprune.parallel import ParallelModel
from alphaprune.settings import load_settings, project_root
from alphaprune.storage import write_bytes, write_json
from alphaprune.train import evaluate

EXPERIMENT = "controls"
COLUMNS = [
    "method", "seed", "keep_ratio", "images", "seconds", "params", "macs", "val_accuracy", "test_accuracy", "lr", "searched",
]  # fmt: skip


class Method(BaseModel):
    """Stages with `{lr}` for the learning rate, and settings that replace the experiment's."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    stages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    settings: dict[str, Any] = {}

    def stages_at(self, lr: float) -> list[dict[str, Any]]:
        def filled(value: Any) -> Any:
            if value == "{lr}":
                return lr
            return value.replace("{lr}", f"{lr:g}") if isinstance(value, str) else value

        return [{key: filled(value) for key, value in stage.items()} for stage in self.stages]


class Controls(BaseModel):
    """What `params/controls.yaml` holds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    lrs: Annotated[list[float], Field(min_length=1)]
    first_lr: float
    seeds: Annotated[list[int], Field(min_length=1)]
    keep_ratios: Annotated[list[float], Field(min_length=1)]
    methods: dict[str, Method]


def load_controls(root: Path) -> Controls:
    """Read and check `params/controls.yaml`."""
    file = root / "params" / "controls.yaml"
    try:
        controls = Controls.model_validate(yaml.safe_load(file.read_text(encoding="utf-8")))
    except (OSError, yaml.YAMLError, ValidationError) as e:
        raise UsageError(f"{file}: {' '.join(str(e).split())[:200]}") from None
    if controls.first_lr not in controls.lrs:
        raise UsageError(f"{file}: first_lr {controls.first_lr:g} is none of lrs")
    return controls


def run(
    preset: str,
    root: Path | None = None,
    methods: Sequence[str] = (),
    keep_ratios: Sequence[float] = (),
    seeds: Sequence[int] = (),
    jobs: int = 1,
    say: Callable[[str], None] = print,
) -> pd.DataFrame:
    """Run what is not recorded yet and write `results/<preset>/controls.csv`.

    Args:
        preset: a folder in params/ that has a `controls.yaml`.
        root: the project's folder; found from the working directory if None.
        methods, keep_ratios, seeds: only these; all that `params/controls.yaml` names if empty.
        jobs: methods that run at once, each in a process of its own.
        say: takes the lines of progress.

    Returns:
        The table, `COLUMNS`; accuracies in percent, `images` and `seconds` of the whole training, `seconds` with the making of the
        network before it, `searched` the learning rates tried.
    """
    root = root or project_root()
    controls = load_controls(root)
    if unknown := set(methods) - set(controls.methods):
        raise UsageError(
            f"method {sorted(unknown)[0]!r} is unknown; there are: {'; '.join(controls.methods)}"
        )
    work = [
        (preset, str(root), name, ratio, tuple(seeds or controls.seeds))
        for ratio in keep_ratios or controls.keep_ratios
        for name in methods or controls.methods
    ]
    target = root / "results" / preset / "controls.csv"
    rows: dict[int, list[dict[str, Any]]] = {}
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        waiting = {pool.submit(_compare, *task): i for i, task in enumerate(work)}
        for done in as_completed(waiting):
            i = waiting[done]
            rows[i] = done.result()
            scores = ", ".join(f"{r['val_accuracy']:.1f}" for r in rows[i])
            say(
                f"[{len(rows)}/{len(work)}] {work[i][2]}, keep_ratio {work[i][3]:g}: {scores} % validation, lr {rows[i][0]['lr']:g}"
            )
            table = pd.DataFrame([r for j in sorted(rows) for r in rows[j]], columns=COLUMNS)
            write_bytes(target, table.to_csv(index=False, float_format="%.6g").encode())
    return table


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Mean and standard deviation over seeds, a row a method and keep_ratio, best first."""
    grouped = table.groupby(["keep_ratio", "method"], sort=False)
    columns = {
        "seeds": grouped["seed"].nunique(),
        "lr": grouped["lr"].first(),
        "val_mean": grouped["val_accuracy"].mean(),
        "val_std": grouped["val_accuracy"].std(),
        "test_mean": grouped["test_accuracy"].mean(),
        "test_std": grouped["test_accuracy"].std(),
        "params": grouped["params"].first(),
        "macs": grouped["macs"].first(),
        "seconds": grouped["seconds"].mean(),
    }
    found = pd.DataFrame(columns).reset_index()
    return found.sort_values(["keep_ratio", "val_mean"], ascending=False, ignore_index=True)


def _compare(
    preset: str, root: str, name: str, keep_ratio: float, seeds: tuple[int, ...]
) -> list[dict[str, Any]]:
    """All seeds of a method, the first of them with every learning rate that the search asks for."""
    controls = load_controls(Path(root))
    method = controls.methods[name]

    def train(lr: float, seed: int) -> Experiment:
        stages = method.stages_at(lr)
        shared = {**method.settings, "keep_ratio": keep_ratio, "seed": seed, "stages": stages}
        epochs = load_settings(preset, EXPERIMENT, Path(root)).max_epochs
        count = len(load_settings(preset, EXPERIMENT, Path(root), **shared).stages)
        experiment = Experiment(preset, EXPERIMENT, Path(root), max_epochs=max(epochs // count, 1), **shared)
        experiment.run(lambda line: None)
        return experiment

    tried: dict[float, float] = {}

    def reached(lr: float) -> float:
        if lr not in tried:
            found = train(lr, seeds[0])
            tried[lr] = found.record(found.stages[-1].name)["metrics"]["val_accuracy"]
        return tried[lr]

    best = climb(sorted(controls.lrs), controls.first_lr, reached)
    return [
        {
            "method": name,
            "seed": seed,
            "keep_ratio": keep_ratio,
            "lr": best,
            "searched": " ".join(f"{x:g}" for x in sorted(tried)),
        }
        | _measure(train(best, seed))
        for seed in seeds
    ]


def climb(grid: Sequence[float], first: float, reached: Callable[[float], float]) -> float:
    """The value of a grid that is better than both its neighbours, found by climbing from `first`."""
    i = grid.index(first)
    while True:
        around = [j for j in (i, i - 1, i + 1) if 0 <= j < len(grid)]
        best = max(around, key=lambda j: reached(grid[j]))
        if best == i:
            return grid[i]
        i = best


@torch.no_grad()
def _measure(experiment: Experiment) -> dict[str, Any]:
    """What the last stage's network, folded if it has branches, costs and scores; the test images are read once."""
    last = experiment.stages[-1]
    outcomes = [experiment.record(n.name)["outcome"] for n in experiment.stages]
    seconds = sum(o["seconds"] + o["start_seconds"] for o in outcomes) + experiment.seconds_for_widths()
    file = experiment.folder(last) / "final.json"
    if not file.is_file():
        model = experiment.model(last.name)
        if isinstance(model, ParallelModel):
            model = fold(model)[0]
        test = images.load_test(experiment.settings.data)
        final = {
            "params": parameters(model),
            "macs": multiply_adds(model, experiment.example_image()),
            "test_accuracy": 100 * evaluate(model, test)[1],
        }
        write_json(file, final)
    return {
        "images": sum(o["images"] for o in outcomes),
        "seconds": seconds,
        "val_accuracy": 100 * experiment.record(last.name)["metrics"]["val_accuracy"],
        **json.loads(file.read_text()),
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m alphaprune.controls", description="Run the controls.")
    parser.add_argument("preset")
    parser.add_argument(
        "--method", action="append", default=[], help="only this one; may be given several times"
    )
    parser.add_argument("--keep-ratio", action="append", default=[], type=float)
    parser.add_argument("--seed", action="append", default=[], type=int)
    parser.add_argument("--jobs", type=int, default=1, help="methods at once")
    args = parser.parse_args(arguments)
    try:
        table = run(
            args.preset,
            None,
            args.method,
            args.keep_ratio,
            args.seed,
            args.jobs,
            lambda line: print(line, flush=True),
        )
        print(summary(table).to_string(index=False, float_format="{:.4g}".format))
    except UsageError as e:
        print(f"alphaprune: {e}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
