"""How a stage trains, as plain data: what `settings` reads and `train` does. It loads without torch, which takes seconds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# Part of every stage's identity. Raise it when a change in train.py, parallel.py or data.py changes results by more than what
# the kernels of another CPU round otherwise, as `few_channels` does.
TRAINING_VERSION = 1
# Part of the identity of every stage with branches. Raise it when their names, their start or the order of
# their sums change.
BRANCHES_VERSION = 3
Init = Literal["random", "select", "least_squares"]  # what branches start from, see `initialise`
SelectBy = Literal["variance", "norm"]  # what a channel is worth, see `selection`
RIDGE = 1e-4  # of least squares, where no other is asked for: as close a fit as the images allow
LARGEST_RIDGE = 1e6  # beside which any fit is plain selection
TRIVIAL_VERSION = 2  # part of the identity of every stage that trains with it, likewise
MUON_VERSION = (
    1  # part of the identity of every stage that trains with it; raise it when the steps of muon.py change
)
Draw = Literal["fixed", "bernoulli", "uniform"]
Augment = Literal["crop", "mirror", "trivial"]
OptimizerName = Literal["sgd", "muon"]
Keep = Literal["best", "last"]


@dataclass(frozen=True)
class Recipe:
    """How a stage trains.

    Attributes:
        lr: learning rate at the start ("plateau") or at its peak ("one_cycle").
        lr_schedule: "plateau" multiplies the rate by `lr_factor` when the validation loss has not fallen for
            more than `lr_patience` epochs, and the stage stops early after `patience` such epochs;
            "one_cycle" rises and falls over exactly `max_epochs` epochs.
        max_epochs: epochs at most.
        patience: epochs without a lower validation loss after which a "plateau" stage ends.
        batch_size: images a step.
        optimizer: "sgd", with momentum, or "muon", see `muon`.
        momentum, weight_decay: of the optimizer.
        label_smoothing: of the cross entropy.
        augment: "crop" flips and crops the training images; "mirror" flips them alone; "trivial" makes a change of TrivialAugment to each before that.
        augment_until: share of the epochs in which "trivial" does so, in (0, 1]; in the last ones images are mirrored and cropped alone, which
            is nearer to those that are judged (He et al., Data augmentation revisited, 2019).
        keep: the weights that a stage ends with: "best", those of the epoch with the highest validation accuracy, or, with "one_cycle", "last":
            its rate ends at 0, and few validation images would choose an epoch by chance.
        log_every: steps between two rows of training accuracy.
    """

    lr: float
    lr_schedule: Literal["plateau", "one_cycle"] = "plateau"
    max_epochs: int = 400
    patience: int = 25
    lr_patience: int = 10
    lr_factor: float = 0.5
    batch_size: int = 128
    optimizer: OptimizerName = "sgd"
    momentum: float = 0.9
    weight_decay: float = 0.0
    label_smoothing: float = 0.0
    augment: Augment = "crop"
    augment_until: float = 1.0
    keep: Keep = "best"
    log_every: int = 20

    def augment_in(self, epoch: int) -> Augment:
        """The augmentation of an epoch, of which the first is 1."""
        last = self.augment == "trivial" and epoch > round(self.augment_until * self.max_epochs)
        return "crop" if last else self.augment

    def steps_an_epoch(self, images: int) -> int:
        """Steps for so many images; what does not fill a batch is left out, unless it is all."""
        return max(images // self.batch_size, 1)


@dataclass(frozen=True)
class Objective:
    """The parts of a loss and their weights; see the formula in `objective`.

    Attributes:
        distill: share of the teacher's soft labels, in [0, 1].
        temperature: T, above 0.
        match_logits, match_layers, alongside: weights of further parts, at least 0.
        draw: each mixer's alpha in a batch of training: "fixed", that of the stage; "bernoulli", 1 with the stage's alpha as its
            probability, else 0 (Xu et al., BERT-of-Theseus, 2020); "uniform", between 0 and the stage's.
        hold_batchnorm: whether the BatchNorms of the wide program keep statistics and scale, so that what alpha takes from the
            wide path is not given back by the next of them.
    """

    distill: float = 0.0
    temperature: float = 4.0
    match_logits: float = 0.0
    match_layers: float = 0.0
    alongside: float = 0.0
    draw: Draw = "fixed"
    hold_batchnorm: bool = False

    @property
    def needs_teacher(self) -> bool:
        return bool(self.distill or self.match_logits or self.match_layers)
