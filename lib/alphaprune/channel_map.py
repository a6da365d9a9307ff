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

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        """`scale` times the map of x; the weight is scaled, which costs nothing beside x."""
        weight = self.weight if scale == 1 else scale * self.weight
        if self.dim == 1 and self.outer == self.inner == 1:
            weight = weight.view(*weight.shape, *(1,) * (x.dim() - 2))
            return _CONVOLUTIONS[x.dim()](x, weight, groups=self.groups)
        if self.outer == self.inner == 1:
            return F.linear(x, weight)
        entries = x.unflatten(self.dim, (self.outer, -1, self.inner))
        if self.dim == 1:
            return torch.einsum("oc,nacb...->naob...", weight, entries).flatten(1, 3)
        return torch.einsum("oc,...acb->...aob", weight, entries).flatten(-3)


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
    if reduce is None and expand is None:
        return weight
    contiguous = weight.is_contiguous()
    with torch.autocast(weight.device.type, enabled=False):  # products of weights are worth full precision
        if transposed:
            weight = _swap(weight, groups)
        if expand is not None and (expand.outer > 1 or expand.inner > 1):  # such as behind a flatten
            entries = weight.unflatten(1, (expand.outer, -1, expand.inner))
            weight = torch.einsum("oacb...,ck->oakb...", entries, expand.weight).flatten(1, 3)
            expand = None
        # The columns last: where W is channels_last, what follows are two products of matrices as they lie in memory.
        weight = weight.movedim(1, -1).unflatten(0, (groups, -1))  # (groups, O / groups, ..., C / groups)
        if reduce is not None:
            weight = _times(_blocks(reduce, groups), weight.flatten(2)).unflatten(2, weight.shape[2:])
        if expand is not None:
            weight = _times(weight.flatten(1, -2), _blocks(expand, groups)).unflatten(1, weight.shape[1:-1])
        weight = weight.flatten(0, 1).movedim(-1, 1)  # (k_out, k_in / groups, ...)
        weight = _swap(weight, groups) if transposed else weight
        return weight.clone(memory_format=torch.contiguous_format) if contiguous else weight


def compose_bias(bias: Tensor | None, reduce: ChannelMap | None) -> Tensor | None:
    """R b, (O) -> (k_out)."""
    if bias is None or reduce is None:
        return bias
    return torch.bmm(_blocks(reduce, reduce.groups), bias.view(reduce.groups, -1, 1)).flatten()


def _blocks(branch: ChannelMap, groups: int) -> Tensor:
    """(outputs, inputs / groups) -> (groups, outputs / groups, inputs / groups)."""
    return branch.weight.unflatten(0, (groups, -1))


def _times(a: Tensor, b: Tensor) -> Tensor:
    """(groups, m, n) and (groups, n, p) -> (groups, m, p); for one group without the overhead of a batch."""
    return torch.mm(a[0], b[0])[None] if len(a) == 1 else torch.bmm(a, b)


def _swap(weight: Tensor, groups: int) -> Tensor:
    """(C, O / groups, ...) <-> (O, C / groups, ...)."""
    return weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
