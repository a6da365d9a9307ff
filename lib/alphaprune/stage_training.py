"""One stage trained and recorded: from the network it begins with to its weights, its history and, last, its record."""

from __future__ import annotations

import hashlib
import time
from typing import Any

import pandas as pd

from alphaprune import data as images
from alphaprune.blend import fold_now, wide_share
from alphaprune.course import FOLD_NOW_AT_END, FOLD_NOW_RUNNING, WIDE_SHARE
from alphaprune.identity import Node
from alphaprune.interrupt import Interrupted
from alphaprune.mending import remove_leftovers
from alphaprune.parallel import ParallelModel
from alphaprune.progress import Progress
from alphaprune.provenance import provenance
from alphaprune.records import COLUMNS, write_record
from alphaprune.stage_networks import StageNetworks, set_alpha
from alphaprune.stages import Stages
from alphaprune.storage import save_tensors, write_bytes
from alphaprune.train import Outcome, accelerator_for_this_machine, fit

SHARE_IMAGES = 200  # at most, for `wide_share`; of each it sees every place


def train_stage(of: Stages, node: Node, data: images.Dataset, progress: Progress) -> None:
    """Train a stage, or go on with it, and record it.

    Args:
        of: the experiment whose folders are written.
        node: the stage; the weights of what it starts from are there.
        data: the images of its settings.
        progress: is told of every epoch and of the end.

    Raises:
        Interrupted: after a signal, once the state is on disk.
        UsageError: if weights or images do not fit, or the disk does not take what is written.
    """
    s, stage, folder = node.settings, node.stage, of.folder(node)
    networks = StageNetworks(of)
    started = time.monotonic()
    model = networks.begun(node)
    start_seconds = time.monotonic() - started
    val, train = data.val.first(s.val_images), data.train.first(s.train_images)
    objective, falls = stage.objective(), stage.alpha_from is not None
    teacher = networks.pretrained(node) if objective.needs_teacher else None

    def share() -> dict[str, float]:
        """How much of what each mixer reads comes from the wide program."""
        if not isinstance(model, ParallelModel) or model.alpha == 0:
            return {}
        seen = next(images.batches(val.to(next(model.parameters()).device), SHARE_IMAGES))[0]
        return {f"{WIDE_SHARE}{layer}": s for layer, s in wide_share(model, seen).items()}

    def measure(epoch: int, accuracy: float) -> dict[str, float]:
        if stage.alpha is None or epoch % s.fold_now_every:
            return {}
        return {FOLD_NOW_RUNNING: accuracy if model.alpha == 0 else fold_now(model, val), **share()}

    def anneal(done: float) -> bool:
        """Alpha as it is when a share of the stage is done; whether it is the stage's."""
        set_alpha(model, stage, stage.alpha_at(done))
        return stage.alpha_at(done) == stage.alpha

    checkpoint = folder / "resume.safetensors"
    try:
        outcome = fit(
            model, train, val, s.recipe(stage), node.key, checkpoint, progress.epoch, objective, teacher, measure,
            node.identity, anneal if falls else None,
        )  # fmt: skip
    except Interrupted as e:
        raise Interrupted(e.number, f"stage {node.name} is {e.where}") from None
    if falls:
        anneal(1.0)  # also where it ended early
    metrics = {"val_accuracy": outcome.reached}
    if stage.alpha is not None:
        of_the_best = [r["value"] for r in outcome.history if (r["metric"], r["epoch"]) == (FOLD_NOW_RUNNING, outcome.best_epoch)]  # fmt: skip
        metrics[FOLD_NOW_AT_END] = of_the_best[0] if of_the_best else fold_now(model, val)
        last = {"step": outcome.steps, "epoch": outcome.epochs, "split": "val"}
        outcome.history.append(last | {"metric": FOLD_NOW_AT_END, "value": metrics[FOLD_NOW_AT_END]})
    digest = save_tensors(of.weights(node), model.state_dict())
    steps = s.max_epochs * s.recipe(stage).steps_an_epoch(len(train))
    table = pd.DataFrame(outcome.history).assign(experiment=s.experiment, stage=stage.name, lr=stage.lr)
    table["alpha"] = [stage.alpha_at(step / steps) for step in table["step"]]
    history = table[COLUMNS].to_csv(index=False).encode()
    write_bytes(folder / "history.csv", history)
    digests = {"weights_sha256": digest, "history_sha256": hashlib.sha256(history).hexdigest()}
    # Last, since it makes the stage recorded.
    fit_of = {"least_squares": _fitted(networks.least_squares)} if networks.least_squares else {}
    record = _record(of, node, outcome, metrics, start_seconds) | fit_of | digests
    write_record(folder / "run.json", record)
    remove_leftovers(folder)
    progress.end(outcome, metrics)


def _fitted(least_squares: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """What least squares did not reach, and the ridge, a larger one where images were too few; by layer."""
    return {
        layer: {k: float(f"{found[k]:.4g}") for k in ("unread", "lost", "ridge") if k in found}
        for layer, found in least_squares.items()
    }


def _record(
    of: Stages, node: Node, outcome: Outcome, metrics: dict[str, float], start_seconds: float
) -> dict[str, Any]:
    summary = {k: v for k, v in vars(outcome).items() if k != "history"}
    summary["seconds"] = round(outcome.seconds, 2)
    summary["start_seconds"] = round(start_seconds, 2)
    return {
        "identity": node.identity,
        "determines": node.determines,
        "experiment": node.settings.experiment,
        "stage": node.stage.model_dump(by_alias=True),
        "parent": node.parent.identity if isinstance(node.parent, Node) else node.parent,
        "settings": node.settings.model_dump(mode="json", exclude={"stages", "title"}),
        "metrics": metrics,
        "outcome": summary,
        "data_checksum": of.data_checksum,
        "mixed_precision": accelerator_for_this_machine().mixed_precision,
        **provenance(of.root, of.command_of(node.settings)),
    }
