"""One stage of training: fit until the validation loss stops falling, keep the best checkpoint, resume exactly.

Every random choice is a function of (key, epoch), never of what ran before, and the state is written after
every epoch (on a GPU where the last is ten seconds old), every minute within one, and when a signal asks to stop; so a run that was killed and started again goes
on as if nothing had happened.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau

from alphaprune.allocator import keep_freed_memory
from alphaprune.captured import Gradients
from alphaprune.data import Split, batches
from alphaprune.errors import UsageError, shown
from alphaprune.faulty_kernels import without_them
from alphaprune.interrupt import SafePoints
from alphaprune.memory_format import channels_last
from alphaprune.modes import in_eval_mode
from alphaprune.muon import optimizer_of
from alphaprune.objective import Loss
from alphaprune.recipe import Objective, Recipe
from alphaprune.resume_state import read_state
from alphaprune.storage import digest_file, load_tensors, save_tensors

with warnings.catch_warnings():  # its progress bars, which are not used here, ask for notebook widgets
    warnings.filterwarnings("ignore", message="IProgress not found")
    from accelerate import Accelerator

PRECISION = "ACCELERATE_MIXED_PRECISION"  # accelerate's own variable
SAVE_EVERY = 60.0  # seconds within an epoch
SAVE_BETWEEN = 10.0  # seconds between epochs, on a GPU, where an epoch may take less than saving


@dataclass
class Outcome:
    """What a stage came to. `history` rows have the keys step, epoch, split, metric, value (a share, 0..1)."""

    history: list[dict[str, Any]] = field(default_factory=list)
    best_epoch: int = 0
    best_accuracy: float = -1.0
    epochs: int = 0
    steps: int = 0
    images: int = 0
    seconds: float = 0.0
    diverged: bool = False

    @property
    def reached(self) -> float:
        """Best validation accuracy after an epoch; where the first epoch diverged, what it left."""
        if self.best_epoch or not self.diverged:
            return self.best_accuracy
        return self.latest("val")

    def latest(self, split: Literal["train", "val"]) -> float:
        """The accuracy that was measured last, a share of 1."""
        return next(
            r["value"] for r in reversed(self.history) if (r["split"], r["metric"]) == (split, "accuracy")
        )


def fit(
    model: nn.Module,
    train: Split,
    val: Split,
    recipe: Recipe,
    key: str,
    checkpoint: Path,
    after_epoch: Callable[[Outcome], None] = lambda outcome: None,
    objective: Objective | None = None,
    teacher: nn.Module | None = None,
    measure: Callable[[int, float], dict[str, float]] = lambda epoch, accuracy: {},
    identity: str | None = None,
    anneal: Callable[[float], bool] | None = None,
    accelerator: Accelerator | None = None,
) -> Outcome:
    """Train `model` in place and leave it with its best weights, those of the highest validation accuracy, or its last, as the recipe says.

    Args:
        model: the network; parameters that do not require a gradient are left as they are.
        train, val: the images.
        recipe: how to train.
        key: names the run's random numbers; the same key gives the same run.
        checkpoint: file of the resume state. It is kept twice, as `<name>.0` and `<name>.1` before the suffix, so that a
            damaged one leaves the one before; read if they are there, removed at the end by the caller.
        after_epoch: called after every epoch, once the state is on disk; on a GPU it may be that of some seconds ago.
        objective: what to train for; cross entropy with the labels if None.
        teacher: the network to learn from, where the objective asks for one.
        measure: called after every epoch with its number and the validation accuracy, and before the first with 0 and that, for
            more to note of the validation images; it leaves the model as it was.
        anneal: called before every step, and at the end of every epoch, with the share of all steps that is done, to change the model; returns
            whether it is what it shall be in the end, and is not changed any more. Of the epochs, only those that end so can be the best. The number of steps has to be
            known: with "one_cycle" alone.
        identity: what the states are of; one that was saved with another is not gone on from. The key if None.
        accelerator: says where training runs; that of `accelerator_for_this_machine` if None, on a GPU (bf16) if there is one.

    Returns:
        The outcome. Row 0 of the validation accuracy is that of the weights the stage began with. A loss that
        is no longer finite ends the stage, with `diverged` set and the best weights so far: on a CPU at the next row
        of training accuracy; on a GPU, where these are read together, when the state is saved or the epoch ends.

    Raises:
        Interrupted: after SIGTERM or SIGINT, once the state is on disk.
        UsageError: if a label is none of the classes that the network tells apart, or the images do not fit it; if `anneal` is given with "plateau".
    """
    if anneal is not None and recipe.lr_schedule != "one_cycle":
        raise UsageError(
            "anneal needs lr_schedule 'one_cycle': with 'plateau' the number of steps is not known before"
        )
    anneal = anneal or (lambda done: True)
    _check_labels(model, train, val)
    keep_freed_memory()
    accelerator = accelerator or accelerator_for_this_machine()
    channels_last(model.to(accelerator.device))
    train, val = train.to(accelerator.device), val.to(accelerator.device)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = optimizer_of(recipe.optimizer, trained, recipe.lr, recipe.momentum, recipe.weight_decay)
    steps_an_epoch = recipe.steps_an_epoch(len(train))
    all_steps = recipe.max_epochs * steps_an_epoch
    if recipe.lr_schedule == "one_cycle":
        try:
            scheduler: Any = OneCycleLR(optimizer, recipe.lr, all_steps, pct_start=0.2, cycle_momentum=False)
        except ZeroDivisionError:  # of five steps the first is all of the rise
            raise UsageError(
                f"one_cycle cannot be taken over {all_steps} steps; give another number of epochs or a smaller batch_size"
            ) from None
    else:
        scheduler = ReduceLROnPlateau(optimizer, factor=recipe.lr_factor, patience=recipe.lr_patience)
    stepper, prepared = accelerator.prepare(model, optimizer)
    of = identity or key
    if accelerator.device.type == "cpu" and accelerator.mixed_precision != "no":
        of = f"{of} in {accelerator.mixed_precision}"  # a stage is not begun in one precision and ended in another
    state = _State(model, optimizer, scheduler, checkpoint, of)

    if not state.resume():
        loss, accuracy = evaluate(model, val, accelerator=accelerator)
        state.note("val", loss=loss, accuracy=accuracy, **measure(0, accuracy))
        state.keep_best(accuracy)
        state.since = time.monotonic()  # the time of training is counted
    outcome = state.outcome
    loss_of = Loss(objective or Objective(), model, stepper, teacher, recipe.label_smoothing)
    gradients = Gradients(loss_of, model, trained, accelerator)
    with SafePoints() as signals, without_them(model):
        while not state.finished(recipe):
            seed = state.begin_epoch(key)
            model.train()
            drawn_by = torch.Generator().manual_seed(seed)
            shuffled = batches(train, recipe.batch_size, drawn_by, recipe.augment_in(outcome.epochs))
            for step, (images, labels) in enumerate(shuffled, 1):
                if step <= state.step:  # done before the run was interrupted
                    continue
                arrived = anneal(outcome.steps / all_steps)
                loss, logits = gradients(images, labels, arrived and loss_of.is_alike)
                prepared.step()
                if recipe.lr_schedule == "one_cycle":
                    scheduler.step()
                outcome.steps += 1
                outcome.images += len(labels)
                state.step = step
                state.meter.add(loss, logits, labels)
                if step % recipe.log_every == 0 or step == steps_an_epoch:
                    state.end_log_point()
                saving = step < steps_an_epoch and (signals.wanted or state.age() >= SAVE_EVERY)
                if (saving or not state.waits_to_read) and not state.read():
                    break
                if saving:
                    state.save()
                    signals.stop(f"saved after step {outcome.steps}, in epoch {outcome.epochs}")
            state.read()
            arrived = anneal(outcome.steps / all_steps)
            val_loss, accuracy = evaluate(model, val, accelerator=accelerator)
            state.note("val", loss=val_loss, accuracy=accuracy, **measure(outcome.epochs, accuracy))
            state.note("train", lr=optimizer.param_groups[0]["lr"])
            outcome.diverged = not all(math.isfinite(row["value"]) for row in outcome.history)
            if outcome.diverged:
                outcome.history = [row for row in outcome.history if math.isfinite(row["value"])]
            elif arrived and (
                outcome.best_epoch == 0  # as it began
                or accuracy > outcome.best_accuracy
                or recipe.keep == "last"
            ):
                state.keep_best(accuracy)
            state.count_plateau(val_loss)
            if recipe.lr_schedule == "plateau":
                scheduler.step(val_loss)
            state.step = 0
            due = not state.waits_to_read or state.age() >= SAVE_BETWEEN or state.finished(recipe)
            if due:
                state.save()
            after_epoch(outcome)
            if signals.wanted and not due:
                state.save()
            signals.stop(f"saved after epoch {outcome.epochs}")
    accelerator.unwrap_model(
        stepper, keep_fp32_wrapper=False
    )  # else its forward would stay in bf16, where there is a GPU
    model.load_state_dict(state.best)
    return outcome


def _check_labels(model: nn.Module, *splits: Split) -> None:
    """Refuse images that the network cannot take and labels that are none of its classes, before any training."""
    for split in splits:
        if len(split) == 0:
            raise UsageError("there are no images to train on or to validate with; give at least one of each")
        image, _ = next(batches(split.to(next(model.parameters()).device).first(1), 1))
        check_labels(split.labels, classes_of(model, image))


@torch.no_grad()
def classes_of(model: nn.Module, images: Tensor) -> int:
    """How many classes a network tells apart (raises UsageError if the images, (N, C, H, W), do not fit it, or it does not give logits alone)."""
    try:
        with in_eval_mode(model):
            output = model(images)
    except (RuntimeError, TypeError, StopIteration) as e:  # the last two of a network with several inputs
        why = str(e)[:200] or "it takes more than one input"
        raise UsageError(
            f"images of {tuple(images.shape[1:])} do not fit the network ({why}); give others"
        ) from None
    if not isinstance(output, Tensor) or output.dim() != 2:
        raise UsageError(
            f"the network gives {type(output).__name__}{f' of shape {tuple(output.shape)}' if isinstance(output, Tensor) else ''}; "
            "only one that gives logits, (images, classes), and nothing else, can be trained so"
        )
    return output.shape[1]


def check_labels(labels: Tensor, classes: int) -> None:
    """Raise UsageError if a label is none of so many classes."""
    lowest, highest = labels.min().item(), labels.max().item()
    if lowest < 0 or highest >= classes:
        raise UsageError(
            f"labels go from {lowest} to {highest}, but the network tells {classes} classes apart; "
            f"give labels 0 to {classes - 1}, or a network with more classes"
        )


def accelerator_for_this_machine(cpu: bool = False) -> Accelerator:
    """A CUDA device if there is one, or the CPU in any case; bf16 on a GPU that has it, float32 elsewhere.

    For a CPU that is fast in bf16, such as one with AMX, accelerate's own ACCELERATE_MIXED_PRECISION=bf16 asks for that.
    """
    gpu = not cpu and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    asked = os.environ.get(PRECISION, "no")
    if not gpu and asked not in ("no", "bf16"):  # accelerate takes any text, and trains in float32
        raise UsageError(f"{PRECISION} is {shown(asked)}; a CPU trains in bf16, or without it in float32")
    # Others than CUDA's, such as MPS, have no float64, which least squares and folding take.
    return Accelerator(mixed_precision="bf16" if gpu else None, cpu=cpu or not torch.cuda.is_available())


@torch.no_grad()
def evaluate(
    model: nn.Module, split: Split, batch_size: int = 500, accelerator: Accelerator | None = None
) -> tuple[float, float]:
    """Mean cross entropy and accuracy (0..1) of a model in eval mode, on the model's device. Restores the mode of each of its modules."""
    device = next(model.parameters()).device
    split = split.to(device)
    loss, correct = torch.zeros((), device=device), torch.zeros((), device=device)
    with in_eval_mode(model), accelerator.autocast() if accelerator else nullcontext():
        for images, labels in batches(split, batch_size):
            logits = model(images).float()
            loss += F.cross_entropy(logits, labels, reduction="sum")
            correct += (logits.argmax(1) == labels).sum()
    return loss.item() / len(split), correct.item() / len(split)


def derive_seed(*parts: object) -> int:
    """A 63-bit seed that is a function of `parts` and of nothing else."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


class _Meter:
    """Sums of loss, correct answers and images since the last log point, on the device."""

    def __init__(self, device: torch.device):
        self.sums = torch.zeros(3, device=device)  # loss, correct, images

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        correct = (logits.detach().argmax(1) == labels).sum()
        self.sums += torch.stack(
            [loss.detach() * len(labels), correct, torch.full_like(loss, len(labels))]
        ).detach()

    def take(self) -> Tensor:
        """The sums, which begin again at 0; nothing waits for them."""
        taken, self.sums = self.sums, torch.zeros_like(self.sums)
        return taken


class _State:
    """Everything a stage needs to go on: weights, momentum, schedule, best weights, history, and within an epoch how
    many of its steps are done, what is measured of them, and the random state."""

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any, path: Path, of: str
    ):
        self.model, self.optimizer, self.scheduler, self.path = model, optimizer, scheduler, path
        self.of = of
        self.outcome = Outcome()
        self.best: dict[str, Tensor] | None = None
        self.lowest_loss, self.epochs_since_lowest = math.inf, 0
        self.step = 0  # of the running epoch; 0 between epochs
        self.meter = _Meter(self._device)
        self.unread: list[tuple[int, Tensor]] = []  # log points: the step, and the meter's sums on the device
        self.random: dict[str, Tensor] | None = None  # where an epoch is to be resumed
        self.saves, self.since = 0, time.monotonic()

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def begin_epoch(self, key: str) -> int:
        """Start the next epoch, or go on with the one that was interrupted. Returns its seed."""
        if self.step == 0:
            self.outcome.epochs += 1
            self.meter.sums.zero_()
        seed = derive_seed(key, self.outcome.epochs)
        torch.manual_seed(seed)
        if self.random is not None:
            torch.set_rng_state(self.random["cpu"])
            if "cuda" in self.random:
                torch.cuda.set_rng_state(self.random["cuda"])
            self.random = None
        return seed

    def age(self) -> float:
        """Seconds since the state was last saved, or begun."""
        return time.monotonic() - self.since

    def note(self, split: str, **measured: float) -> None:
        self._note(self.outcome.steps, split, measured)

    def _note(self, step: int, split: str, measured: dict[str, float]) -> None:
        epoch = self.outcome.epochs
        self.outcome.history += [
            {"step": step, "epoch": epoch, "split": split, "metric": metric, "value": value}
            for metric, value in measured.items()
        ]

    @property
    def waits_to_read(self) -> bool:
        """Whether log points stay on the device until the epoch's end or a save: reading one waits for all that a GPU was given."""
        return self._device.type != "cpu"

    def end_log_point(self) -> None:
        self.unread.append((self.outcome.steps, self.meter.take()))

    def read(self) -> bool:
        """Note the log points that were not read yet, up to the first whose loss is not finite. Returns whether there is none such."""
        if not self.unread:
            return True
        steps, sums = zip(*self.unread, strict=True)
        self.unread = []
        for step, (loss, correct, images) in zip(steps, torch.stack(sums).tolist(), strict=True):
            self._note(step, "train", {"accuracy": correct / images, "loss": loss / images})
            if not math.isfinite(loss):
                return False
        return True

    def keep_best(self, accuracy: float) -> None:
        self.best = {k: v.detach().clone() for k, v in self.model.state_dict().items()}
        self.outcome.best_epoch, self.outcome.best_accuracy = self.outcome.epochs, accuracy

    def count_plateau(self, loss: float) -> None:
        lower = loss < self.lowest_loss
        self.epochs_since_lowest = 0 if lower else self.epochs_since_lowest + 1
        self.lowest_loss = min(loss, self.lowest_loss) if math.isfinite(loss) else self.lowest_loss

    def finished(self, recipe: Recipe) -> bool:
        stale = recipe.lr_schedule == "plateau" and self.epochs_since_lowest >= recipe.patience
        ended = self.outcome.epochs >= recipe.max_epochs or stale or self.outcome.diverged
        return ended and self.step == 0

    def save(self) -> None:
        self.outcome.seconds += self.age()
        momentum = {i: s["momentum_buffer"] for i, s in self.optimizer.state_dict()["state"].items()}
        tensors = {f"model/{k}": v for k, v in self.model.state_dict().items()}
        tensors |= {f"best/{k}": v for k, v in self.best.items()}
        tensors |= {f"momentum/{i}": v for i, v in momentum.items() if v is not None}
        tensors |= {"meter/sums": self.meter.sums, "random/cpu": torch.get_rng_state()}
        if self._device.type == "cuda":
            tensors["random/cuda"] = torch.cuda.get_rng_state()
        groups = [{k: v for k, v in g.items() if k != "params"} for g in self.optimizer.param_groups]
        self.saves += 1
        rest = {
            "of": self.of,
            "saves": self.saves,
            "step": self.step,
            "outcome": vars(self.outcome),
            "scheduler": {k: v for k, v in self.scheduler.state_dict().items() if k != "_anneal_func_type"},
            "lr": [g["lr"] for g in groups],
            "lowest_loss": self.lowest_loss,
            "epochs_since_lowest": self.epochs_since_lowest,
        }
        save_tensors(self._slots()[self.saves % 2], tensors, {"state": json.dumps(rest)})
        self.since = time.monotonic()

    def _slots(self) -> list[Path]:
        return [self.path.with_name(f"{self.path.stem}.{i}{self.path.suffix}") for i in (0, 1)]

    def _newest(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The later of the two states on disk that is whole."""
        found = []
        for slot in self._slots():
            try:
                tensors, metadata = load_tensors(slot)
                rest = read_state(tensors, metadata, self.model, self.optimizer, self.scheduler, self.of)
                found.append((tensors, rest))
            except UsageError as e:  # cut off while it was written, or damaged since
                if slot.is_file() or digest_file(slot).exists():
                    warnings.warn(
                        f"{slot.name}: {e}. It goes on from the state before, with the same result",
                        stacklevel=2,
                    )
        return max(found, key=lambda f: f[1]["saves"], default=None)

    def resume(self) -> bool:
        newest = self._newest()
        if newest is None:
            return False
        tensors, rest = newest
        part = lambda prefix: {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}  # noqa: E731
        self.outcome = Outcome(**rest["outcome"])
        self.saves, self.step = rest["saves"], rest["step"]
        self.lowest_loss, self.epochs_since_lowest = rest["lowest_loss"], rest["epochs_since_lowest"]
        self.model.load_state_dict(part("model/"))
        device = self._device
        self.best = {k: v.to(device) for k, v in part("best/").items()}
        self.meter.sums.copy_(tensors["meter/sums"])
        self.random = part("random/") if self.step else None
        whole = self.optimizer.state_dict()
        whole["state"] = {int(i): {"momentum_buffer": v} for i, v in part("momentum/").items()}
        self.optimizer.load_state_dict(whole)
        self.scheduler.load_state_dict(rest["scheduler"])
        for group, lr in zip(self.optimizer.param_groups, rest["lr"], strict=True):
            group["lr"] = lr
        self.since = time.monotonic()
        return True
