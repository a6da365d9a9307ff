"""Linear maps between channels, and their products with the weights of mixers."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_CONVOLUTIONS = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}


class ChannelMap(nn.Module):
    """A linear map between channels at every position, without bias: "reduce" and "expand".

    Args:
        inputs, outputs: channels before and after.
        dim: where the channels lie: 1, as for a convolution, or -1, as for a linear layer.
        outer, inner: how often the channels follow each other, and entries behind each of them, as behind a flatten or
            where a map is joined with itself; else 1 and 1.
        groups: blocks of channels that are mapped each on its own.

    Shapes:
        (N, outer * inputs * inner, ...) -> (N, outer * outputs * inner, ...) for dim 1;
        (..., outer * inputs * inner) -> (..., outer * outputs * inner) for dim -1.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        dim: int = 1,
        outer: int = 1,
        inner: int = 1,
        groups: int = 1,
        **factory,
    ):
        super().__init__()
        self.dim, self.outer, self.inner, self.groups = dim, outer, inner, groups
        self.weight = nn.Parameter(
            nn.Linear(inputs // groups, outputs, bias=False, **factory).weight.detach()
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.dim == 1 and self.outer == self.inner == 1:
            weight = self.weight.view(*self.weight.shape, *(1,) * (x.dim() - 2))
            return _CONVOLUTIONS[x.dim()](x, weight, groups=self.groups)
        if self.outer == self.inner == 1:
            return F.linear(x, self.weight)
        entries = x.unflatten(self.dim, (self.outer, -1, self.inner))
        if self.dim == 1:
            return torch.einsum("oc,nacb...->naob...", self.weight, entries).flatten(1, 3)
        return torch.einsum("oc,...acb->...aob", self.weight, entries).flatten(-3)


def compose(
    weight: Tensor,
    reduce: ChannelMap | None,
    expand: ChannelMap | None,
    groups: int = 1,
    transposed: bool = False,
) -> Tensor:
    """The weight of `R . W . E`, differentiable in all three.

    Args:
        weight: of W, (O, C / groups, ...), or (C, O / groups, ...) if transposed, or with outer * C * inner for C.
        reduce: R, its weight (k_out, O / groups); None to leave it out.
        expand: E, its weight (C, k_in / groups); None to leave it out.
        groups, transposed: of the convolution.

    Returns:
        The same with k_out for O and k_in for C, which stay where R and E are left out; contiguous where W is, since a
        convolution hands the order of its weight on to its output, which forward() may take a view of.
    """
    contiguous = weight.is_contiguous()
    with torch.autocast(weight.device.type, enabled=False):  # products of weights are worth full precision
        if transposed:
            weight = _swap(weight, groups)
        if expand is not None:
            if expand.outer == expand.inner == 1:
                weight = _blocks("oc...,ck->ok...", weight, expand.weight, groups)
            else:
                entries = weight.unflatten(1, (expand.outer, -1, expand.inner))
                weight = torch.einsum("oacb...,ck->oakb...", entries, expand.weight).flatten(1, 3)
        if reduce is not None:
            weight = _blocks("ro,o...->r...", reduce.weight, weight, groups)
        weight = _swap(weight, groups) if transposed else weight
        return weight.clone(memory_format=torch.contiguous_format) if contiguous else weight


def compose_bias(bias: Tensor | None, reduce: ChannelMap | None) -> Tensor | None:
    """R b, (O) -> (k_out)."""
    if bias is None or reduce is None:
        return bias
    return _blocks("ro,o->r", reduce.weight, bias, reduce.groups)


def _blocks(formula: str, a: Tensor, b: Tensor, groups: int) -> Tensor:
    """einsum of two weights whose first dimension is divided into groups, a group at a time."""
    if groups == 1:
        return torch.einsum(formula, a, b)
    left, right = formula.split("->")
    left = ",".join(f"g{term}" for term in left.split(","))
    return torch.einsum(
        f"{left}->g{right}", a.unflatten(0, (groups, -1)), b.unflatten(0, (groups, -1))
    ).flatten(0, 1)


def _swap(weight: Tensor, groups: int) -> Tensor:
    """(C, O / groups, ...) <-> (O, C / groups, ...)."""
    return weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
