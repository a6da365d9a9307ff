"""Which channels stay: those from which the others can be told best.

Channels that are tied stay or go together, so they are chosen a tied group at a time. Where images are given, a
channel is worth what it explains of all that the mixers read: with G = X^T X of a mixer's input X (places, C) and what the
channels chosen so far explain taken off, channel j explains

    sum_i G_ij^2 / G_jj

of the rest; the one that explains most is chosen, its share is taken off G, and so on. That is a pivoted Cholesky
factorisation whose pivot is chosen by column (Farahat et al., "Efficient greedy feature selection for
unsupervised learning", 2013). Or, by norm, the sum of the squares of all
weights of layers that make it, scale it and read it (Fang et al., "DepGraph", 2023), for which no images are needed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, fx

from alphaprune.exact import full_float32
from alphaprune.graph import Mixer, Structure, attribute
from alphaprune.modes import in_eval_mode
from alphaprune.widths import Widths

Inputs = tuple[Tensor, ...]
Moments = Mapping[str, Tensor]  # X^T X of what a mixer reads, (C, C), by the mixer's key
STEPS = 512  # of the choice in a group, about; where more channels stay, several are chosen at a step


def select(widths: Widths, batches: Iterable[Inputs] | None = None, seen_by: Moments | None = None) -> Widths:
    """As many channels of every tied group as `widths` keeps, but those worth most.

    Args:
        widths: how many channels stay.
        batches: inputs of the network; None to go by the weights' norms.
        seen_by: in place of these, what `second_moments` gave for them.
    """
    s = widths.structure
    worth = _norms(s) if batches is None and seen_by is None else None
    narrowed = [atom for atom in s.atoms if not widths.kept[atom].all()]
    if seen_by is None and worth is None and narrowed:
        seen_by = second_moments(s, {r for atom in narrowed for r in atom.tolist()}, batches)
    kept = widths.kept.clone()
    for atom in narrowed:
        k = int(widths.kept[atom].sum())
        if worth is None:
            chosen = _greedy(_blocks(s, atom, seen_by), k)
        else:
            chosen = torch.tensor([worth[r] for r in atom.tolist()]).topk(k).indices
        roots = atom[chosen]
        dropped = atom[torch.isin(atom, roots, invert=True)]
        of_each = s.ties.roots(s.ties.all)
        kept[torch.isin(of_each, roots)], kept[torch.isin(of_each, dropped)] = True, False
    return replace(widths, kept=kept)


def rows(x: Tensor, mixer: Mixer, channels: int) -> Tensor:
    """What a mixer reads as rows of channels, one a place: (N, outer * C * inner, ...) -> (places, C)."""
    p = mixer.reads
    entries = x.movedim(mixer.dim, -1).unflatten(-1, (p.outer, channels, p.inner))
    return entries.movedim(-2, -1).reshape(-1, channels)


def moments(y: Tensor, x: Tensor) -> Tensor:
    """Y^T X as float64, formed in the type of what is read, but not in fewer than 32 bits."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return (y.to(dtype).T @ x.to(dtype)).double()


def second_moments(s: Structure, roots: set[int], batches: Iterable[Inputs]) -> Moments:
    """X^T X of what each mixer reads that reads channels of these roots, (C, C), by the mixer's key."""
    readers = defaultdict(list)
    for m in s.layers():
        if m.reads is not None and not roots.isdisjoint(s.ties.roots(m.ids_in).flatten().tolist()):
            readers[m.source].append(m)
    sums: dict[str, Tensor] = {}

    class Observer(fx.Interpreter):
        def run_node(self, node: fx.Node) -> Tensor:
            value = super().run_node(node)
            for m in readers[node.name]:
                x = rows(value, m, m.reads.channels)
                sums[m.key] = sums.get(m.key, 0) + moments(x, x)
            return value

    network = s.trace.network
    with torch.no_grad(), in_eval_mode(network), full_float32():
        observer = Observer(fx.GraphModule(network, s.trace.graphs[False]))
        for inputs in batches:
            observer.run(*inputs)
    return sums


def _blocks(s: Structure, atom: Tensor, seen_by: Moments) -> list[Tensor]:
    """For each mixer that reads channels of a tied group, their second moments, (n, n), with trace 1.

    A channel that a mixer reads several times, as after a concatenation with itself, counts once for each.
    """
    place = {r: i for i, r in enumerate(atom.tolist())}
    found = []
    for m in s.layers():
        if m.key not in seen_by:
            continue
        p = m.reads
        roots = s.ties.roots(m.ids_in).view(p.outer, p.channels, p.inner)[0, :, 0].tolist()
        times: dict[int, list[int]] = defaultdict(
            list
        )  # places in the mixer's input, by how often met before
        met: dict[int, int] = defaultdict(int)
        for i, r in enumerate(roots):
            if r in place:
                times[met[r]].append(i)
                met[r] += 1
        for there in times.values():
            here = torch.tensor([place[roots[i]] for i in there])
            block = torch.zeros(len(atom), len(atom), dtype=torch.float64)
            own = torch.tensor(there)
            block[here[:, None], here] = seen_by[m.key].cpu()[own[:, None], own]
            trace = block.diagonal().sum()
            if trace > 0:
                found.append(block / trace)
    return found


def _greedy(blocks: list[Tensor], k: int) -> Tensor:
    """The k channels that explain most, one after the other, in large groups some at a time; the first ones where nothing is read."""
    if not blocks:
        return torch.arange(k)
    left = torch.stack(blocks)  # (mixers, n, n): what is not explained yet
    at_once = max(1, k // STEPS)
    chosen: list[int] = []
    while len(chosen) < k:
        # A channel that is explained already adds nothing.
        own = left.diagonal(dim1=1, dim2=2).clamp_min(1e-12)
        gain = (left.square().sum(1) / own).sum(0)
        gain[chosen] = -1
        best = gain.topk(min(at_once, k - len(chosen))).indices
        columns = left[:, :, best]  # (mixers, n, b)
        among = left[:, best][:, :, best] + 1e-12 * torch.eye(len(best), dtype=left.dtype)
        left = left - columns @ torch.linalg.solve(among, columns.mT)
        chosen += best.tolist()
    return torch.tensor(chosen)


def _norms(s: Structure) -> dict[int, float]:
    """By root: the sum of the squares of all weights of layers that make it, scale it and read it."""
    worth: dict[int, float] = defaultdict(float)

    def add(ids: Tensor, squares: Tensor) -> None:
        for r, size in zip(s.ties.roots(ids.flatten()).tolist(), squares.flatten().tolist(), strict=True):
            worth[r] += size

    network = s.trace.network
    for m in s.layers():
        # (out, in / groups, ...), where it is transposed (in, out / groups, ...)
        weight = attribute(network, m.weight).detach().double()
        squares = weight.square().reshape(*weight.shape[:2], -1).sum(2).unflatten(0, (m.groups, -1))
        of_each = squares.mT if m.transposed else squares  # (groups, outputs, inputs)
        add(m.ids, of_each.sum(2))
        if m.ids_in is not None:
            add(m.ids_in, of_each.sum(1))
    for layer in {x.key: x for x in s.channel_layers.values() if not x.is_parameter}.values():
        scale = network.get_submodule(layer.name).weight
        if scale is not None:
            add(layer.ids, scale.detach().double().square().reshape(len(scale), -1).sum(1))
    return worth
