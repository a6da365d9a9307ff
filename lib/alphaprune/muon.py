"""Muon: momentum SGD whose step of a weight that mixes channels is made orthogonal first.

Read as a matrix G, a row for each of its first dimension, the direction in which a weight is to go has few large singular values and
many small ones. Muon takes the same step along all of them (Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024):

    B <- m B + (1 - m) G                        the momentum of the gradient
    D  = m B + (1 - m) G                        Nesterov's look ahead, U S V^T
    W <- W - lr (0.05 sqrt(max(rows, columns)) O(D) + decay W)   O(D) near U V^T

The entries of such a step are of one size in layers of any shape, as in Liu et al., "Muon is scalable for LLM training", 2025. All other
parameters, biases, BatchNorms, depthwise filters, take steps of SGD with momentum at the same rate; 0.05, theirs is 0.2, is what lets one rate do
for both, as found with a VGG-16 on its validation images. The groups of a grouped convolution count as one matrix.

O is five steps of an iteration of Newton and Schulz's kind: singular values end between about 0.7 and 1.2, those that are below some
hundredths of the largest lower. `torch.optim.Muon` takes matrices alone, and multiplies them in bfloat16, which is slow on a CPU without instructions for it.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from alphaprune.recipe import OptimizerName

A, B, C = 3.4445, -4.7750, 2.0315  # X <- A X + B (X X^T) X + C (X X^T)^2 X, Jordan's
STEPS = 5
EPS = 1e-7  # of a norm: a gradient that has all but gone is not made a whole step of
SIZE = 0.05  # root mean square of a step's entries at rate 1, about


class Muon(torch.optim.Optimizer):
    """As described above.

    Args:
        params: what to train.
        lr: learning rate, at least 0.
        momentum: m, in [0, 1).
        weight_decay: of all parameters, at least 0. Where a step is orthogonal it is not part of the gradient, so momentum does not add it
            up: there it pulls 1 - m as strongly as SGD's.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float = 0.9, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Take a step along the gradients that are there."""
        for group in self.param_groups:
            lr, momentum, decay = group["lr"], group["momentum"], group["weight_decay"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                along = state["momentum_buffer"]
                if mixes_channels(p):
                    along.lerp_(p.grad, 1 - momentum)
                    step = orthogonal(p.grad.lerp(along, momentum).flatten(1))
                    size = SIZE * max(step.shape) ** 0.5
                    p.mul_(1 - lr * decay).add_(step.view(p.shape), alpha=-lr * size)
                else:
                    along.mul_(momentum).add_(p.grad).add_(p, alpha=decay)
                    p.add_(along, alpha=-lr)


def optimizer_of(
    name: OptimizerName, params: Iterable[Tensor], lr: float, momentum: float, weight_decay: float
) -> torch.optim.Optimizer:
    """The optimizer of a name, with arguments as of `Muon`."""
    of = {"sgd": torch.optim.SGD, "muon": Muon}[name]
    return of(params, lr=lr, momentum=momentum, weight_decay=weight_decay)


def mixes_channels(weight: Tensor) -> bool:
    """Whether a weight mixes channels, by its shape: a matrix of several rows and columns, or such a one for each place of a filter.

    Depthwise filters, (channels, 1, ...), and scales, (1, channels, 1, 1), do not.
    """
    return weight.dim() > 1 and min(weight.shape[:2]) > 1


def orthogonal(matrix: Tensor) -> Tensor:
    """Near U V^T for a matrix U S V^T: the same directions, with singular values as said above; 0 where it is 0."""
    tall = len(matrix) > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / x.norm().clamp(min=EPS)
    for _ in range(STEPS):
        gram = x @ x.T
        x = A * x + torch.addmm(gram, gram, gram, beta=B, alpha=C) @ x
    return x.T if tall else x
