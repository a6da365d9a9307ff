"""Branches that work before any training: channels selected, the way there and back by least squares.

R takes the channels that stay, the narrow copies take their numbers, and E gives each of them back in its own place, 0 for
the others: that is `select`. `least_squares` goes on from there, layer after layer:

    E = argmin |X - E X_n|^2 + ridge |E - E_select|^2     X:   what the mixer reads in the pretrained network
                                                          X_n: what it reads in the narrow program
    R = argmin |S Z - R Z_n|^2 + ridge |R - S|^2          Z:   what the mixer gives in the pretrained network
                                                          Z_n = W(E X_n), S = R_select

With all layers before already narrow, each of them also corrects what those before lost (the asymmetric reconstruction
of Zhang et al., "Accelerating very deep convolutional networks for classification and detection", 2016).
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn

from alphaprune.channel_map import compose
from alphaprune.exact import full_float32
from alphaprune.graph import Mixer, Structure, attribute
from alphaprune.modes import in_eval_mode
from alphaprune.recipe import RIDGE
from alphaprune.selection import Inputs, moments, rows
from alphaprune.widths import Widths

LARGER_RIDGE = 1.0  # at least, where there are too few images
# Of second moments, by the type they are formed in: less variance than that is none (with AVX2 7.5e-5 was seen of a layer that does not vary).
ROUNDING = {torch.float64: 1e-12, torch.float32: 2e-4}
PLACES = 4  # at least, for every channel


def enough_images(size: int) -> int:
    """How many square images of a size in pixels are enough for the usual networks: larger ones have more places each.

    >>> enough_images(224), enough_images(32)
    (256, 2148)
    """
    return max(256, 2_200_000 // size**2)


class TooFewImages(UserWarning):
    """Least squares had fewer images than some layers ask for.

    Args:
        needed: by layer name the images that would do.
        given: the images that there were.
        ridge: what is used there.
    """

    def __init__(self, needed: Mapping[str, int], given: int, ridge: float):
        super().__init__(
            f"too few images for the least squares at {', '.join(needed)}: {given:,} were given, {max(needed.values()):,} would do "
            f"({PLACES} places for each of a layer's channels; an image is one place for a linear layer); "
            f"there the ridge is {ridge:g}, and the fit stays near plain selection"
        )
        self.needed, self.given, self.ridge = dict(needed), given, ridge


class Lockstep(Protocol):
    """What is needed of a `ParallelModel`, which is made with what stands here."""

    network: nn.Module
    structure: Structure
    widths: Widths
    reduce: nn.ModuleDict
    expand: nn.ModuleDict

    @property
    def mixers(self) -> list[Mixer]: ...
    def call_mixer(self, node: fx.Node, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor: ...
    def channelwise(self, node: fx.Node, values: Mapping[str, Any], narrow: bool) -> Any: ...


@torch.no_grad()
def put_back(model: Lockstep) -> None:
    """R takes the channels that stay, E gives them back in their places."""
    for m in model.mixers:
        for branch, ids in ((model.reduce, m.ids), (model.expand, m.ids_in)):
            if m.key in branch:
                weight = branch[m.key].weight
                if branch is model.expand:
                    p = m.reads
                    ids = ids.view(p.outer, p.channels, p.inner)[0, :, 0]
                weight.copy_(_places(model.widths.positions(ids), weight, m.groups, branch is model.reduce))


def _places(kept: Tensor, weight: Tensor, groups: int, reduce: bool) -> Tensor:
    """A matrix with a 1 for each channel that stays: (k, C / groups) for R, (C, k / groups) for E."""
    matrix = torch.zeros_like(weight)
    per_group = weight.shape[1]  # entries read in a group
    number = torch.arange(len(kept), device=kept.device)
    if reduce:
        matrix[number, kept % per_group] = 1
    elif len(kept) == per_group * groups:
        matrix[kept, number % per_group] = 1
    else:  # behind a channel shuffle the narrow program holds another number; evenly spread
        n = per_group * groups
        matrix[torch.arange(n) * len(weight) // n, torch.arange(n) % per_group] = 1
    return matrix


@dataclass(frozen=True)
class Fit:
    """What came of least squares.

    Attributes:
        report: by layer name, where channels are gone in what the layer reads or gives: `unread`, the share of the second moments of what it
            reads that E does not reach; `lost`, the share of those of its channels that stay that R does not reach; `places`, how many there
            were for each channel; and the `ridge` used.
        answers: what the narrow program gives, for each batch.
    """

    report: dict[str, dict[str, float]]
    answers: list[Any]


@torch.no_grad()
def fit_branches(models: Sequence[Lockstep], batches: Sequence[Inputs], ridge: float = RIDGE) -> list[Fit]:
    """Set every E and R by least squares, layer after layer, and say what came of it.

    Args:
        models: of one network, with R and E as `put_back` leaves them. What the network holds is computed once for all of them.
        batches: inputs of the network. All that is needed of one layer is held for all of them at once.
        ridge: what a step away from selection costs, as a share of the mean second moment of what is read.

    Returns:
        One for each model.

    Warns:
        TooFewImages: where there are fewer than `PLACES` places a channel.
    """
    first, trace = models[0], models[0].structure.trace
    original: list[dict[str, Any]] = [{} for _ in batches]
    sides = [_Narrow(model, [{} for _ in batches]) for model in models]
    last = {n: node for node in trace.nodes for n in node.all_input_nodes}  # who reads it last
    inputs = [n for n in trace.nodes if n.op == "placeholder"]
    with in_eval_mode(*models), full_float32():
        for node in trace.nodes:
            if node.op == "output":
                break
            mixer = first.structure.mixers.get(node.name)
            for given, o in zip(batches, original, strict=True):
                if node.op == "placeholder":
                    o[node.name] = given[inputs.index(node)]
                elif mixer is None:
                    o[node.name] = first.channelwise(node, o, narrow=False)
                else:
                    o[node.name] = first.call_mixer(node, o[node.args[0].name], *_own(first, mixer))
            for side in sides:
                side.go_on(node, original, ridge)
            for read in [r for r in node.all_input_nodes if last[r] is node]:
                for values in itertools.chain(original, *(side.values for side in sides)):
                    del values[read.name]
    given = sum(len(inputs[0]) for inputs in batches)
    for side in sides:
        scarce = {name: found["places"] for name, found in side.report.items() if found["places"] < PLACES}
        if scarce and ridge < LARGER_RIDGE:
            needed = {name: math.ceil(given * PLACES / places) for name, places in scarce.items()}
            warnings.warn(TooFewImages(needed, given, max(ridge, LARGER_RIDGE)), stacklevel=4)
    return [Fit(side.report, side.given(node)) for side in sides]


class _Narrow:
    """The narrow program of a model, as far as it has come.

    Args:
        model: its branches are fitted.
        values: by node name what it holds, for each batch.
    """

    def __init__(self, model: Lockstep, values: list[dict[str, Any]]):
        self.model, self.values = model, values
        self.report: dict[str, dict[str, float]] = {}
        self.alike: set[str] = set()  # nodes before which no channel is gone: it holds what the original does

    def go_on(self, node: fx.Node, original: list[dict[str, Any]], ridge: float) -> None:
        """Run one more node, and fit it first if it mixes; the original holds what it gives there."""
        model, mixer = self.model, self.model.structure.mixers.get(node.name)
        before = {r.name for r in node.all_input_nodes}
        if node.op == "placeholder" or (model.widths.all_stay(node.name) and before <= self.alike):
            # R and E, which give all back, are what least squares would find.
            self.alike.add(node.name)
            for o, n in zip(original, self.values, strict=True):
                n[node.name] = o[node.name]
        elif mixer is None:
            for n in self.values:
                n[node.name] = model.channelwise(node, n, narrow=True)
        elif found := _mix(model, node, mixer, original, self.values, ridge):
            self.report.setdefault(mixer.name, found)

    def given(self, output: fx.Node) -> list[Any]:
        """What the program gives at the output, for each batch."""
        return [fx.node.map_arg(output.args[0], lambda n, held=held: held[n.name]) for held in self.values]


def _mix(
    model: Lockstep,
    node: fx.Node,
    m: Mixer,
    original: list[dict[str, Any]],
    narrow: list[dict[str, Any]],
    ridge: float,
) -> dict[str, float]:
    """A mixer in the narrow program, its E fitted before it runs and its R behind it, where it is used first."""
    source, first = node.args[0].name, node.name == m.key
    weight, bias = _own(model, m)
    reduce, expand = (d[m.key] if m.key in d else None for d in (model.reduce, model.expand))
    found: dict[str, float] = {}
    if first and expand is not None:
        c, k = len(expand.weight), expand.weight.shape[1] * m.groups
        pairs = [
            (rows(o[source], m, c), rows(n[source], m, k)) for o, n in zip(original, narrow, strict=True)
        ]
        found["unread"], found["ridge"], found["places"] = _regress(expand.weight, pairs, m.groups, ridge)
    whole = compose(weight, None, expand, m.groups, m.transposed)
    for n in narrow:
        n[node.name] = model.call_mixer(node, n[source], whole, bias)
    if first and reduce is not None and expand is not None:
        kept = model.widths.positions(m.ids)
        along = [
            (o[node.name].movedim(m.dim, -1), n[node.name].movedim(m.dim, -1))
            for o, n in zip(original, narrow, strict=True)
        ]
        pairs = [(z[..., kept].flatten(0, -2), z_n.flatten(0, -2)) for z, z_n in along]
        found["lost"], used, places_a_channel = _regress(reduce.weight, pairs, m.groups, ridge, centred=True)
        found["ridge"] = max(found["ridge"], used)
        found["places"] = min(found["places"], places_a_channel)
    if reduce is not None:
        for n in narrow:
            n[node.name] = reduce(n[node.name])
    return found


def _own(model: Lockstep, m: Mixer) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a mixer in the original."""
    return attribute(model.network, m.weight), None if m.bias is None else attribute(model.network, m.bias)


def _regress(
    weight: Tensor, pairs: list[tuple[Tensor, Tensor]], groups: int, ridge: float, centred: bool = False
) -> tuple[float, float, float]:
    """Replace a map M_0 by M = M_0 + (B - M_0 A) (A + ridge)^-1 with A = X^T X, B = Y^T X, a group at a time.

    Args:
        weight: M, (outputs, inputs / groups).
        pairs: Y (places, outputs) and X (places, inputs), a batch each.
        ridge: a share of the mean second moment of X.
        centred: whether X and Y count from their means. E has to carry the mean, since what is behind a ReLU lives on it;
            R does better without (quarter-width VGG-16, 2,000 images, alpha 0: 49 % against 44 %).

    Returns:
        The share of Y's second moments that M X does not reach; the largest ridge used, as a group whose places are too
        few has a larger one; and the places for each channel of X that is not always 0, infinite where all are.
    """
    outputs, inputs = len(weight), weight.shape[1] * groups
    a, b = (torch.zeros(n, inputs, dtype=torch.float64, device=weight.device) for n in (inputs, outputs))
    total, places = 0.0, sum(len(x) for _, x in pairs)
    for y, x in pairs:
        a += moments(x, x)
        b += moments(y, x)
        total += torch.linalg.vector_norm(y, dtype=torch.float64).item() ** 2
    uncentred = a.diagonal().clone()
    if centred:
        mean_y, mean_x = (sum(t[i].double().sum(0) for t in pairs) / places for i in (0, 1))
        a -= places * torch.outer(mean_x, mean_x)
        b -= places * torch.outer(mean_y, mean_x)
        total -= places * mean_y.square().sum().item()
    rounding = ROUNDING[torch.promote_types(pairs[0][1].dtype, torch.float32)]
    left, fewest, largest = total, math.inf, ridge
    for g in range(groups):
        of_y, of_x = (slice(g * n // groups, (g + 1) * n // groups) for n in (outputs, inputs))
        start, own, cross = weight[of_y].double(), a[of_x, of_x], b[of_y, of_x]
        # A channel that is always 0 does no harm; others must be independent, which takes places enough.
        alive = own.diagonal() > 0
        scarce = places < PLACES * (living := int(alive.sum()))
        own_ridge = max(ridge, LARGER_RIDGE) if scarce else ridge
        largest = max(largest, own_ridge)
        fewest = min(fewest, places / living if living else math.inf)
        scale = own.diagonal().mean()
        if scale <= rounding * uncentred[of_x].mean():  # nothing varies, and any map will do
            continue
        damped = own + own_ridge * scale * torch.eye(len(own), dtype=own.dtype, device=own.device)
        fitted = start + torch.linalg.solve(damped, (cross - start @ own).T).T
        weight[of_y] = fitted.to(weight)
        left += ((fitted @ own) * fitted).sum().item() - 2 * (fitted * cross).sum().item()
    return (max(left, 0.0) / total if total else 0.0), largest, fewest
