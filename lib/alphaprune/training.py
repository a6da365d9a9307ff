"""A network trained on a loader of one's own: the recipe, for images that are not held in memory.

`train.fit` is for the experiments, whose images are, and can be gone on with to the bit. This is a loop over epochs:

    for epoch in training(model, loader, epochs=6, lr=0.01, teacher=network):
        print(epoch)
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor, nn

from alphaprune.allocator import keep_freed_memory
from alphaprune.captured import Gradients
from alphaprune.errors import UsageError, shown
from alphaprune.faulty_kernels import without_them
from alphaprune.memory_format import channels_last
from alphaprune.modes import in_eval_mode
from alphaprune.muon import optimizer_of
from alphaprune.objective import Loss
from alphaprune.parallel import ParallelModel
from alphaprune.recipe import Objective, OptimizerName
from alphaprune.schedule import falling
from alphaprune.train import accelerator_for_this_machine, check_labels, classes_of

DISTILLED = 0.9  # share of the teacher's soft labels in the loss
MOMENTUM, WEIGHT_DECAY = 0.9, 5e-4
RISING = 0.2  # share of the steps in which the rate rises
LOOKED_AFTER = 100  # steps after which it is looked whether the loss is still finite: a GPU is waited for


@dataclass(frozen=True)
class Epoch:
    """What an epoch came to: which of how many it was, the mean loss of its images, alpha at its end (None without branches), seconds."""

    number: int
    of: int
    loss: float
    alpha: float | None
    seconds: float

    def __str__(self) -> str:
        alpha = "" if self.alpha is None else f", alpha {self.alpha:.2f}"
        return f"epoch {self.number}/{self.of}: loss {self.loss:.3f}{alpha}, {self.seconds:.0f} s"


def training(
    model: nn.Module,
    loader: Iterable[Any],
    epochs: int,
    lr: float,
    teacher: nn.Module | None = None,
    optimizer: OptimizerName = "sgd",
) -> Iterator[Epoch]:
    """Train a model in place: an epoch each time the next one is asked for, and nothing before.

    The rate of the steps, of SGD with momentum or of Muon, rises over a fifth of them and falls to 0 in the others. A `ParallelModel` is annealed: in every batch
    each layer's alpha is 0 or 1, and 1 with a probability that falls from 1 to 0 over the first half of the steps; from there on it runs at alpha 0.
    With a CUDA device the model is moved there, trained in bf16 if the device has that, and stays there.

    Args:
        model: a network of one input, with logits, (N, classes), as its one output, or a `ParallelModel` of such. Every module of it trains, those in
            eval mode too; between epochs and at the end it is in eval mode.
        loader: gives batches of images, (N, C, H, W), and labels, (N,) whole numbers, best on the CPU; with a length, such as a DataLoader.
        epochs: how many, at least 1.
        lr: the highest learning rate, above 0.
        teacher: the network whose soft labels are nine tenths of the loss, such as the one that is pruned; the labels alone if None.
        optimizer: "sgd", with momentum, or "muon", whose steps take longer (see `muon`); on a GPU it has not been tried.

    Yields:
        What each epoch came to.

    Raises:
        UsageError: if an argument or a batch is not as it should be, or the loss is no longer finite. Whatever ends an epoch early, the model is as it
            was after the one before.

    Source:
        Xu et al., BERT-of-Theseus, 2020 (alpha); Hinton et al., Distilling the knowledge in a neural network, 2015; Jordan et al., 2024 (Muon).
    """
    if not isinstance(epochs, int) or epochs < 1:
        raise UsageError(f"epochs is {shown(epochs)}; give a whole number, 1 at least")
    if not (isinstance(lr, int | float) and 0 < lr < math.inf):
        raise UsageError(f"lr is {shown(lr)}; give a number above 0, such as 0.01")
    try:
        batches = len(loader)
    except TypeError:
        raise UsageError(
            "the loader has no length, and the number of steps is not known; give a DataLoader of a dataset with a length"
        ) from None
    if batches == 0:
        raise UsageError("the loader has no batches; with drop_last it needs as many images as one holds")
    if not any(p.requires_grad for p in model.parameters()):
        raise UsageError("no parameter of the model requires a gradient; there is nothing to train")
    if optimizer not in get_args(OptimizerName):
        raise UsageError(f"optimizer is {shown(optimizer)}; use {', '.join(get_args(OptimizerName))}")
    return _epochs(model, loader, epochs, batches * epochs, lr, teacher, optimizer)


def _epochs(
    model: nn.Module,
    loader: Any,
    epochs: int,
    steps: int,
    lr: float,
    teacher: nn.Module | None,
    optimizer_name: OptimizerName,
) -> Iterator[Epoch]:
    keep_freed_memory()
    accelerator = accelerator_for_this_machine()
    device = accelerator.device
    channels_last(model.to(device))
    annealed = isinstance(model, ParallelModel)
    distill = DISTILLED if teacher is not None else 0.0
    objective = Objective(distill=distill, draw="bernoulli" if annealed else "fixed")
    loss_of = Loss(objective, model, lambda images: _logits(model(images)), teacher)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = optimizer_of(optimizer_name, trained, lr, MOMENTUM, WEIGHT_DECAY)
    gradients = Gradients(loss_of, model, trained, accelerator)
    done, classes = 0, None
    for number in range(1, epochs + 1):
        began, good = time.monotonic(), _Kept(model)
        total, seen = torch.zeros((), device=device), 0
        try:
            model.train()
            with without_them(model):
                for step, batch in enumerate(loader, 1):
                    images, labels = _pair(batch)
                    if classes is None:
                        classes = classes_of(model, images[:1].to(device))
                    check_labels(labels, classes)
                    if annealed and model.alpha != (alpha := falling(2 * done / steps, 1.0, 0.0)):
                        model.alpha = alpha
                    for group in optimizer.param_groups:
                        group["lr"] = lr * _share((done + 0.5) / steps)
                    images, labels = (t.to(device, non_blocking=True) for t in (images, labels))
                    loss, _ = gradients(images, labels, loss_of.is_alike)
                    optimizer.step()
                    total += loss * len(labels)
                    seen, done = seen + len(labels), done + 1
                    if step % LOOKED_AFTER == 0:
                        _check_finite(number, lr, total)
            if seen == 0:
                raise UsageError(
                    f"epoch {number}: the loader gave no batches; it has to begin anew every epoch"
                )
            _check_finite(number, lr, total, *trained)
        except BaseException:
            good.restore(model)
            raise
        if annealed:
            model.alpha = falling(2 * done / steps, 1.0, 0.0) if number < epochs else 0.0
        model.eval()
        alpha = float(model.alpha) if annealed else None
        yield Epoch(number, epochs, total.item() / seen, alpha, time.monotonic() - began)


class _Kept:
    """A model's weights, statistics and alpha as they are, to come back to."""

    def __init__(self, model: nn.Module):
        self.state = {k: v.clone() for k, v in model.state_dict().items()}
        self.alpha = model.alpha if isinstance(model, ParallelModel) else None

    def restore(self, model: nn.Module) -> None:
        model.load_state_dict(self.state)
        if self.alpha is not None:
            model.alpha = self.alpha
        model.eval()


def _share(done: float) -> float:
    """Share of the highest rate: up and down by half a cosine each (Smith and Topin, Super-convergence, 2018)."""
    part = done / RISING if done < RISING else (1 - done) / (1 - RISING)
    return (1 - math.cos(math.pi * part)) / 2


def _pair(batch: Any) -> tuple[Tensor, Tensor]:
    """Images and labels of a batch."""
    if not isinstance(batch, tuple | list) or len(batch) != 2 or not all(map(torch.is_tensor, batch)):
        raise UsageError(
            f"the loader gives {type(batch).__name__} {shown(batch)}; a batch is two tensors, images and labels"
        )
    images, labels = batch
    if labels.shape != images.shape[:1] or labels.is_floating_point():
        raise UsageError(
            f"the labels of a batch are {labels.dtype} of shape {tuple(labels.shape)}; give one whole number an image, as CrossEntropyLoss takes them"
        )
    return images, labels.long()


def _logits(output: Any) -> Tensor:
    if not isinstance(output, Tensor):
        raise UsageError(
            f"in training the network gives {type(output).__name__} and not logits alone; switch auxiliary outputs off, such as by aux_logits=False"
        )
    return output


def _check_finite(epoch: int, lr: float, *values: Tensor) -> None:
    if not all(v.isfinite().all() for v in values):
        raise UsageError(
            f"epoch {epoch}: the loss is no longer finite; the model is as it was before this epoch. "
            f"Take a lower rate than {lr:g}, or look for images that are not finite"
        )


@torch.no_grad()
def accuracy(network: nn.Module, loader: Iterable[Any]) -> float:
    """The share of images, 0 to 1, whose label a network gives its highest logit, in eval mode and where the network is.

    Args:
        network: with logits, (N, classes), as its output.
        loader: as of `training`; a length is not needed.

    Raises:
        UsageError: if a batch is not images and labels, or there is none.
    """
    device = next(network.parameters()).device
    right, seen = torch.zeros((), device=device), 0
    with in_eval_mode(network):
        for batch in loader:
            images, labels = _pair(batch)
            right += (_logits(network(images.to(device))).argmax(1) == labels.to(device)).sum()
            seen += len(labels)
    if seen == 0:
        raise UsageError("the loader gives no batches; there is nothing to measure the accuracy on")
    return right.item() / seen
