"""Widths a layer by sensitivity: wide where narrowing hurts, narrow where it does not, at the same cost.

Each group of tied layers is narrowed alone to a few ratios r, without training, and what that does to the network's
answers is measured on images. All layers are fitted by least squares, so those behind make good what they can, as they
will when all are narrow:

    damage_g(r) = mean KL(softmax(network) || softmax(network with group g at r))

The widths k_g are those of

    the smallest sum over g of damage_g(k_g / C_g) ** power

that cost no more multiply-adds, and no more parameters, than one keep_ratio for all. For small changes KL is half the square of a distance
(Fisher's), and distances of single layers are what adds up at most when all are narrowed: power 1/2. Power 1 adds as if what layers do were independent; it
spares the worst layers more, at the price of many others. That either says where to save is an assumption (Li et al., "Pruning
filters for efficient ConvNets", 2017, choose their layers by each alone), to be checked by training.
"""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_flatten

from alphaprune.errors import UsageError, shown
from alphaprune.exact import full_float32
from alphaprune.graph import Mixer, Structure
from alphaprune.initialise import TooFewImages, fit_branches
from alphaprune.modes import in_eval_mode
from alphaprune.parallel import INITIAL_BATCH, ParallelModel
from alphaprune.selection import Inputs, second_moments, select
from alphaprune.trace import as_inputs
from alphaprune.widths import check_round_to, choose, costs

RATIOS = (0.12, 0.35, 0.65)
LEAST = 0.05  # share of its channels that a group keeps at least
EXCHANGES = 40_000  # random changes that the search tries


class OtherLayers(UsageError):
    """Damages that were measured on another network."""


def damages(
    network: nn.Module,
    images: Tensor | tuple[Tensor, ...],
    exclude: Sequence[str] = (),
    ratios: Sequence[float] = RATIOS,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, dict[float, float]]:
    """What narrowing one group of tied layers alone does to a network's answers.

    Args:
        network: a CNN with logits, (N, classes), as its first output.
        images: inputs as in training, a thousand or two small ones; the same are fitted to and measured on.
        exclude: see `ParallelModel`.
        ratios: the ratios to measure, in (0, 1).
        say: takes lines of progress, one before the first group and one behind each; it takes minutes.

    Returns:
        By group, named by its layers joined with ", ", the damage in nats at each ratio: at the one asked for, though a layer
        keeps whole channels, one at least, and may have kept another share.
    """
    said: list[warnings.WarningMessage] = []
    try:
        with warnings.catch_warnings(record=True) as said:  # the same of each of some fifty models
            return _damages(network, images, exclude, ratios, say)
    finally:
        _say_once([w.message for w in said])


def _say_once(said: Sequence[Warning]) -> None:
    """Warn of what many models warned of, once for each text, and once of all that had too few images."""
    scarce = [w for w in said if isinstance(w, TooFewImages)]
    for warning in {(type(w), str(w)): w for w in said if not isinstance(w, TooFewImages)}.values():
        warnings.warn(warning, stacklevel=3)
    if scarce:
        names = dict.fromkeys(name for w in scarce for name in w.needed)
        needed = {name: max(w.needed.get(name, 0) for w in scarce) for name in names}
        warnings.warn(TooFewImages(needed, scarce[0].given, scarce[0].ridge), stacklevel=3)


def _damages(
    network: nn.Module,
    images: Tensor | tuple[Tensor, ...],
    exclude: Sequence[str],
    ratios: Sequence[float],
    say: Callable[[str], None],
) -> dict[str, dict[float, float]]:
    example = tuple(x[:1] for x in as_inputs(images))
    structure = ParallelModel(network, 1.0, example, exclude=exclude).structure
    batches = list(zip(*(x.split(INITIAL_BATCH) for x in as_inputs(images)), strict=True))
    seen_by = second_moments(structure, {r for atom in structure.atoms for r in atom.tolist()}, batches)
    expected = _answers(network, batches)
    found: dict[str, dict[float, float]] = {}
    groups = _groups(structure, min(ratios))
    say(
        f"{len(groups)} groups of layers, each narrowed alone to {', '.join(f'{r:g}' for r in ratios)} of its channels"
    )
    for n, group in enumerate(groups, 1):
        found[", ".join(group)] = damage = {}
        shares = [_shares(structure, group, ratio) for ratio in ratios]
        chosen = [select(choose(structure, share), seen_by=seen_by) for share in shares]
        models = [
            ParallelModel(network, widths, example, exclude=exclude, init="select", images=images)
            for widths in chosen
        ]
        for ratio, fit in zip(ratios, fit_branches(models, batches), strict=True):
            answers = _log_probabilities(fit.answers)
            damage[ratio] = F.kl_div(answers, expected, reduction="batchmean", log_target=True).item()
        measured = ", ".join(f"{d:.3g} at {ratio:g}" for ratio, d in damage.items())
        say(f"[{n}/{len(groups)}] {', '.join(group)}: damage {measured}")
    return found


def allot(
    network: nn.Module,
    damage: Mapping[str, Mapping[float, float]],
    keep_ratio: float,
    example_input: Tensor | tuple[Tensor, ...],
    exclude: Sequence[str] = (),
    round_to: int = 1,
    power: float = 1.0,
) -> dict[str, float]:
    """A keep_ratio a layer, of the same cost as one for all and with the least damage.

    Args:
        network: as for `damages`.
        damage: what `damages` gave.
        keep_ratio: the ratio for all whose multiply-adds and parameters are not exceeded, in (0, 1].
        example_input: a batch as the network expects it, of the image size that multiply-adds count for.
        exclude: as for `damages`.
        round_to: each layer keeps a multiple of so many channels, or all it has: 8 or 16 fill the registers of a CPU. One ratio for all
            rounds down, or up to one multiple; here some layers are rounded up for what others save.
        power: of each damage before they are added, in (0, 1].

    Returns:
        By layer name its ratio, to be given to `ParallelModel`.

    Raises:
        OtherLayers: if `damage` is of other layers than the network's.
        UsageError: if a multiple of `round_to` in every layer already costs more, or `power` is out of range.
    """
    check_round_to(round_to)
    if not 0 < power <= 1:
        raise UsageError(f"power is {shown(power)}; give a number in (0, 1]")
    damage = {group: {r: max(d, 0.0) ** power for r, d in curve.items()} for group, curve in damage.items()}
    structure = ParallelModel(network, 1.0, example_input, exclude=exclude).structure
    groups = [group.split(", ") for group in damage]
    layers = {m.name for m in _narrowed(structure)}
    if differs := sorted(layers.symmetric_difference(name for group in groups for name in group)):
        raise OtherLayers(f"the damages measured are of other layers ('{differs[0]}'); measure them again")
    channels = [_widest(structure, group) for group in groups]
    curves = [_curve(damage[", ".join(g)], c) for g, c in zip(groups, channels, strict=True)]

    def mapping(kept: Sequence[int]) -> dict[str, float]:
        # A little more than k / C, since k is rounded down from it.
        shares = [min((k + 0.5) / c, 1.0) for k, c in zip(kept, channels, strict=True)]
        each = [_shares(structure, group, share) for group, share in zip(groups, shares, strict=True)]
        return {name: share for group in each for name, share in group.items()}

    def cost(ratios: Mapping[str, float], multiple: int) -> tuple[int, int]:
        rows = costs(structure, choose(structure, ratios, multiple))
        return sum(r["multiply_adds"] for r in rows), sum(r["parameters"] for r in rows)

    uniform = [max(int(c * keep_ratio), 1) for c in channels]
    estimate = _Estimate(structure, groups)
    start = [max(k // round_to * round_to, min(round_to, c)) for k, c in zip(uniform, channels, strict=True)]
    _take_back(start, curves, estimate, estimate(uniform), round_to)
    kept = _search(start, curves, estimate, estimate(uniform), round_to)
    # The estimate knows of no rounding in groups, nor of tied layers with other numbers of channels; what it allows
    # too much is taken back where that hurts least.
    budget = cost(_shares(structure, layers, keep_ratio), 1)
    _take_back(kept, curves, lambda k: cost(mapping(k), round_to), budget, round_to)
    if round_to == 1:
        return mapping(kept)
    # Layers of a group may have other numbers of channels, and parts of a layer be tied to different ones.
    widths = choose(structure, mapping(kept), round_to)
    shares = {
        r: min((int(widths.kept[a].sum()) + 0.5) / len(a), 1.0) for a in structure.atoms for r in a.tolist()
    }
    roots = {m.name: structure.ties.roots(m.ids).tolist() for m in _narrowed(structure)}
    return {name: min(shares[r] for r in own if r in shares) for name, own in roots.items()}


def _take_back(
    kept: list[int],
    curves: Sequence[np.ndarray],
    cost: Callable[[Sequence[int]], Sequence[float]],
    budget: Sequence[float],
    round_to: int,
) -> None:
    """Narrow where that hurts least until nothing costs more than the budget."""
    while any(have > may for have, may in zip(cost(kept), budget, strict=True)):
        lower = {i: (k - 1) // round_to * round_to for i, k in enumerate(kept) if k > round_to}
        if not lower:
            raise UsageError(
                f"round_to={round_to} is too coarse: {round_to} channels in every layer already cost more than this keep_ratio for all; give a "
                "smaller round_to, or a larger keep_ratio"
            )
        i = min(lower, key=lambda i: curves[i][lower[i]] - curves[i][kept[i]])
        kept[i] = lower[i]


def _answers(model: nn.Module, batches: Iterable[Inputs]) -> Tensor:
    """Log-probabilities, (N, classes)."""
    with torch.no_grad(), in_eval_mode(model), full_float32():
        return _log_probabilities([model(*inputs) for inputs in batches])


def _log_probabilities(outputs: Iterable[Any]) -> Tensor:
    """Of the first tensor of each output, (N, classes)."""
    return torch.cat([F.log_softmax(tree_flatten(output)[0][0], 1) for output in outputs])


def _groups(structure: Structure, ratio: float) -> list[list[str]]:
    """Names of the layers that are narrowed, those together that are tied, or that cannot be narrowed one by one.

    The halves that a channel shuffle mixes, say, must stay equally wide.
    """
    alone, together = [], []
    for group in _tied(structure):
        try:
            choose(structure, _shares(structure, group, ratio))
        except UsageError:
            together += group
        else:
            alone.append(group)
    return [*alone, together] if together else alone


def _tied(structure: Structure) -> list[list[str]]:
    found: list[tuple[set[int], list[str]]] = []
    for m in _narrowed(structure):
        roots = set(structure.ties.roots(m.ids).tolist())
        met = [g for g in found if g[0] & roots]
        found = [g for g in found if g not in met]
        found.append((roots.union(*(g[0] for g in met)), [n for g in met for n in g[1]] + [m.name]))
    return [names for _, names in found]


def _narrowed(structure: Structure) -> list[Mixer]:
    mixers = structure.layers()
    return [m for m in mixers if not structure.is_fixed(m.ids)]


def _widest(structure: Structure, group: Iterable[str]) -> int:
    """Channels of the widest of some layers, in which a ratio for all of them is counted."""
    return max(_channels(structure, name) for name in group)


def _shares(structure: Structure, names: Iterable[str], ratio: float) -> dict[str, float]:
    """The ratio by layer name, and more where it would leave none of a layer's channels."""
    # A little more than 1 / C, which times C may be less than 1.
    return {name: min(max(ratio, 1.5 / _channels(structure, name)), 1.0) for name in names}


def _channels(structure: Structure, name: str) -> int:
    return next(len(m.ids) for m in structure.mixers.values() if m.name == name)


def _curve(damage: Mapping[float, float], channels: int) -> np.ndarray:
    """Damage with k = 0 ... C channels: a line between those measured, both on logarithmic scales; never rising with k."""
    ratios = sorted(damage)
    x, y = np.log(ratios), np.log(np.maximum([damage[r] for r in ratios], 1e-6))
    share = np.arange(channels + 1) / channels
    at = np.log(np.maximum(share, 1e-9))
    values = np.interp(at, x, y)
    slope = (y[1] - y[0]) / (x[1] - x[0]) if len(x) > 1 else -1.0
    values = np.where(at < x[0], y[0] + min(slope, -1.0) * (at - x[0]), values)
    last = np.exp(y[-1]) * (1 - share) / (1 - ratios[-1])  # nothing is lost where all channels stay
    curve = np.where(share > ratios[-1], last, np.exp(values))
    return np.maximum.accumulate(curve[::-1])[::-1]


class _Estimate:
    """Multiply-adds and parameters of k channels a group: of each layer the wide cost times the shares it reads and gives."""

    def __init__(self, structure: Structure, groups: Sequence[Sequence[str]]):
        self.channels = np.array([_widest(structure, g) for g in groups])
        of_root: dict[int, int] = {}
        for i, group in enumerate(groups):
            for m in structure.mixers.values():
                if m.name in group:
                    of_root |= dict.fromkeys(structure.ties.roots(m.ids).tolist(), i)

        def shares(ids: Tensor | None) -> np.ndarray:
            """Which groups the channels belong to, as shares; the last for those of none."""
            row = np.zeros(len(groups) + 1)
            if ids is None:
                row[-1] = 1
                return row
            for r in structure.ties.roots(ids).tolist():
                row[of_root.get(r, -1)] += 1 / ids.numel()
            return row

        owners = {x.name: x for x in (*structure.channel_layers.values(), *structure.mixers.values())}
        rows = costs(structure)
        self.wide = np.array([[r["multiply_adds"], r["parameters"]] for r in rows], dtype=float)
        self.reads = np.array([shares(getattr(owners[r["name"]], "ids_in", None)) for r in rows])
        self.gives = np.array([shares(owners[r["name"]].ids) for r in rows])

    def __call__(self, kept: Sequence[int]) -> np.ndarray:
        share = np.append(np.array(kept) / self.channels, 1.0)
        return ((self.reads @ share) * (self.gives @ share)) @ self.wide


def _search(
    start: list[int],
    curves: Sequence[np.ndarray],
    estimate: _Estimate,
    budget: np.ndarray,
    round_to: int,
) -> list[int]:
    """Exchange channels among groups by simulated annealing, within the budget; the best met.

    Kirkpatrick et al., "Optimization by simulated annealing", 1983. The same numbers are drawn each time.
    """
    draw, most = random.Random(0), [len(c) - 1 for c in curves]

    def total(kept: Sequence[int]) -> float:
        return sum(float(c[k]) for c, k in zip(curves, kept, strict=True))

    def rounded(k: int, j: int) -> int:
        least = math.ceil(max(1, math.ceil(LEAST * most[j])) / round_to) * round_to
        k = min(most[j], max(least, k))
        return k if k == most[j] else k // round_to * round_to

    now, best = list(start), list(start)
    now_damage = best_damage = total(start)
    for i in range(EXCHANGES):
        temperature = best_damage * 0.1 * (1 - i / EXCHANGES) + 1e-9
        tried = list(now)
        for _ in range(draw.choice((1, 2, 2, 3))):
            j = draw.randrange(len(tried))
            step = draw.choice((-1, 1)) * max(1, round(draw.random() * 0.1 * most[j] / round_to)) * round_to
            tried[j] = rounded(tried[j] + step, j)
        damage = total(tried)
        worse = damage - now_damage
        if worse > 0 and draw.random() >= math.exp(-worse / temperature):
            continue
        if (estimate(tried) > budget).any():
            continue
        now, now_damage = tried, damage
        if damage < best_damage:
            best, best_damage = list(tried), damage
    return best
