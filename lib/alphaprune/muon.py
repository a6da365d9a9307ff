"""Muon: momentum SGD whose step of a weight that mixes channels is made orthogonal first.

Read as a matrix G, (outputs, all that each output reads), the direction in which a weight is to go has few large singular values and
many small ones. Muon takes the same step along all of them (Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024):

    B <- m B + (1 - m) G                        the momentum of the gradient
    D  = m B + (1 - m) G                        Nesterov's look ahead, U S V^T
    W <- W - lr (0.05 sqrt(max(rows, columns)) O(D) + decay W)   O(D) near U V^T

whose entries are of one size in layers of any shape (Liu et al., "Muon is scalable for LLM training", 2025, with 0.2: here the rate is that of SGD for
what mixes nothing, biases, BatchNorms and depthwise filters). O is five steps of an iteration of Newton and Schulz's kind: singular values
end between about 0.7 and 1.2, those a hundred times below the largest lower.

`torch.optim.Muon` takes matrices alone, and multiplies them in bfloat16, for which a CPU without instructions for that takes some thirty times as long.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from alphaprune.recipe import Optimizer

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
        weight_decay: of all parameters, at least 0; where a step is orthogonal it is not part of the gradient.
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
    name: Optimizer, params: Iterable[Tensor], lr: float, momentum: float, weight_decay: float
) -> torch.optim.Optimizer:
    """SGD with momentum, "sgd", or "muon"; arguments as of both."""
    return (Muon if name == "muon" else torch.optim.SGD)(
        params, lr=lr, momentum=momentum, weight_decay=weight_decay
    )


def mixes_channels(weight: Tensor) -> bool:
    """Whether each output of a weight, (outputs, inputs, ...), reads more than one channel."""
    return weight.dim() > 1 and weight.shape[1] > 1


def orthogonal(matrix: Tensor) -> Tensor:
    """Near U V^T for a matrix U S V^T: the same directions, with singular values between about 0.7 and 1.2; 0 where it is 0."""
    tall = len(matrix) > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / x.norm().clamp(min=EPS)
    for _ in range(STEPS):
        gram = x @ x.T
        x = A * x + torch.addmm(gram, gram, gram, beta=B, alpha=C) @ x
    return x.T if tall else x
