"""How many channels the narrow program has: from a keep_ratio, or from a target for parameters or multiply-adds."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_flatten

from alphaprune.errors import UsageError, like
from alphaprune.graph import MIXING_FUNCTIONS, ChannelLayer, Mixer, Structure, attribute, matches
from alphaprune.rules import OUT_OF_PLACE, describe
from alphaprune.trace import Trace

KeepRatio = float | Mapping[str, float]


@dataclass(frozen=True)
class Widths:
    """Which channels stay, and the shapes of the narrow program that follow.

    Attributes:
        structure: the network.
        kept: whether a channel stays, by id.
        values: by node name what the narrow program gives there, tensors as shapes; only where it differs from
            the wide one.
    """

    structure: Structure
    kept: Tensor
    values: dict[str, Any]

    def positions(self, ids: Tensor) -> Tensor:
        """Places, in a row of channels, of those that stay."""
        return self.kept[ids.flatten()].nonzero().flatten()

    def entries(self, node: str, dim: int) -> int:
        """Length of the channel dimension at a node of the narrow program."""
        value = self.values.get(node, self.structure.trace.values[node])
        return value.shape[dim]

    def held_by(self, layer: ChannelLayer) -> Tensor:
        """Places of the channels of a channel layer that stay.

        Behind a channel shuffle the narrow program may hold another number than stays of these ids; it then
        takes as many, evenly spread.
        """
        kept, n = self.positions(layer.ids), self.entries(layer.key, layer.dim)
        return kept if len(kept) == n else torch.arange(n) * len(layer.ids) // n

    def all_stay(self, node: str) -> bool:
        """Whether the narrow program gives as many channels at a node as the wide one."""
        wide = self.structure.trace.values[node]
        shapes = (
            [getattr(v, "shape", v) for v in tree_flatten(x)[0]] for x in (self.values.get(node, wide), wide)
        )
        return next(shapes) == next(shapes)

    def read_by(self, mixer: Mixer) -> int:
        """Channels a mixer reads in the narrow program."""
        entries = self.entries(mixer.source, mixer.dim)
        return entries // (mixer.reads.outer * mixer.reads.inner) if mixer.reads else entries


def choose(structure: Structure, keep_ratio: KeepRatio, round_to: int = 1) -> Widths:
    """Keep the first k = int(C * keep_ratio) channels of every set of C tied ones.

    Args:
        structure: the network.
        keep_ratio: in (0, 1]; or by name, containing module or pattern of layers, the last match counting; layers
            that nothing matches keep all. Tied layers keep the largest of their ratios.
        round_to: k of a layer is the next lower multiple of this, but at least one multiple.

    Raises:
        UsageError: if a ratio is out of range, matches no layer, or leaves a layer without channels, or if
            the network counts on a fixed number of channels.
    """
    check_round_to(round_to)
    ratio_of = _ratios(structure, keep_ratio)
    kept = [torch.tensor(sorted(structure.fixed), dtype=torch.long)]
    for atom in structure.atoms:
        ratio, blocks, name = ratio_of[int(atom[0])]
        kept.append(atom[: _share(len(atom), ratio, blocks, name, round_to)])
    kept = torch.isin(structure.ties.roots(structure.ties.all), torch.cat(kept))
    return Widths(structure, kept, _narrow_values(structure, kept))


def check_round_to(round_to: int) -> None:
    """Raise UsageError if channels cannot be rounded to multiples of this."""
    if isinstance(round_to, bool) or not isinstance(round_to, int) or round_to < 1:
        raise UsageError(f"round_to is {round_to!r}; give a whole number of at least 1, such as 8")


def _share(channels: int, ratio: float, blocks: int, name: str, round_to: int) -> int:
    k = int(channels * ratio)
    multiple = round_to // math.gcd(round_to, blocks)
    if multiple > 1:
        k = max(k // multiple, 1) * multiple
    if blocks > 1:
        k = max(k, 1)  # each group of a convolution keeps something
    if k == 0:
        raise UsageError(
            f"keep_ratio {ratio} leaves none of the {channels} channels at '{name}'; give at least {1 / channels:.3g}"
        )
    return min(k, channels)


def _ratios(structure: Structure, keep_ratio: KeepRatio) -> dict[int, tuple[float, int, str]]:
    """By root: the ratio that counts there, the blocks its layer is divided into, and the layer's name."""
    by_name = keep_ratio if isinstance(keep_ratio, Mapping) else {"*": keep_ratio}
    if not by_name:
        raise UsageError("keep_ratio names no layer; give one number, or a mapping such as {'*': 0.5}")
    for name, ratio in by_name.items():
        if not isinstance(name, str):
            raise UsageError(f"keep_ratio names {name!r}; give names or patterns, such as 'layer4.*'")
        if isinstance(ratio, bool) or not isinstance(ratio, Real) or not 0 < ratio <= 1:
            raise UsageError(f"keep_ratio is {ratio!r}; give a number in (0, 1], such as 0.34375")
        layers = (*structure.mixers.values(), *structure.depthwise())
        if not any(matches(layer.name, name) for layer in layers):
            names = list(dict.fromkeys(layer.name for layer in layers))
            raise UsageError(
                f"keep_ratio names {name!r}, which matches no convolution or linear layer{like(name, names)}"
            )
    atom_of = {r: i for i, atom in enumerate(structure.atoms) for r in atom.tolist()}
    found: dict[int, tuple[float, int, str]] = {}
    for mixer in structure.mixers.values():
        own = [ratio for name, ratio in by_name.items() if matches(mixer.name, name)]
        ratio = own[-1] if own else 1.0
        roots = structure.ties.roots(mixer.ids).tolist()
        in_sets = len({atom_of.get(r) for r in roots})
        for r in roots:
            before = found.get(r, (0.0, 1, mixer.name))
            found[r] = max(ratio, before[0]), max(in_sets, before[1]), before[2]
    for layer in structure.depthwise():
        own = [ratio for name, ratio in by_name.items() if matches(layer.name, name)]
        for r in structure.ties.roots(layer.ids).tolist() if own else ():
            if r in found:
                found[r] = max(own[-1], found[r][0]), *found[r][1:]
    uneven = True
    while uneven:  # blocks of a channel shuffle, a split or a grouped convolution keep the same share
        uneven = False
        for roots in structure.even:
            own = [found[r][0] for r in roots.tolist() if r in found]
            if own and min(own) < max(own):
                uneven = True
                for r in set(roots.tolist()) & found.keys():
                    found[r] = max(own), *found[r][1:]
    return found


def for_target(structure: Structure, share: float, cost: str, round_to: int = 1) -> tuple[float, Widths]:
    """The largest keep_ratio whose folded network costs at most a share of the original.

    Args:
        structure: the network.
        share: of the original's cost, in (0, 1).
        cost: "parameters" or "multiply_adds".
        round_to: see `choose`.

    Returns:
        The ratio, to 1/1024, and the widths it gives.

    Raises:
        UsageError: if the share is out of range or no ratio reaches it.
    """
    name = {"parameters": "for_params", "multiply_adds": "for_macs"}[cost]
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share < 1:
        raise UsageError(f"{name} is {share!r}; give a share of the original in (0, 1), such as 0.25")
    budget = share * sum(row[cost] for row in costs(structure))
    low, high, best, problem = 0, 1024, None, None
    while high - low > 1:
        middle = (low + high) // 2
        try:
            widths = choose(structure, middle / 1024, round_to)
        except UsageError as e:  # some layer would be left without channels
            low, problem = middle, e
            continue
        if sum(row[cost] for row in costs(structure, widths)) <= budget:
            low, best = middle, (middle / 1024, widths)
        else:
            high = middle
    if best is None:
        raise UsageError(
            f"{name}={share} is out of reach: the narrowest network that keeps a channel (or round_to of them) in every layer costs more{f' ({problem})' if problem else ''}; give a larger share"
        )
    return best


def costs(structure: Structure, widths: Widths | None = None) -> list[dict[str, Any]]:
    """Parameters and multiply-adds (of one image) of every layer, wide or at the given widths.

    Returns:
        One row a mixer or channel layer, and one a mixing function whose weight is computed (which stays wide), in order:
        name, in, out (channels), parameters, multiply_adds.
    """
    trace = structure.trace
    batch = next(trace.values[n.name] for n in trace.nodes if n.op == "placeholder").shape[0]
    rows, seen = [], set()
    own = {name for m in structure.mixers.values() for name in (m.weight, m.bias)}
    for node in trace.nodes:
        mixer, layer = structure.mixers.get(node.name), structure.channel_layers.get(node.name)
        if mixer is None and node.target in MIXING_FUNCTIONS:
            rows.append(_computed(trace, node, batch))
        if mixer is None and (layer is None or layer.name in own):
            continue
        owner = mixer or layer
        first, value = owner.name not in seen, trace.values[node.name]
        seen.add(owner.name)
        module = trace.module(node)
        if mixer is not None:
            weight = attribute(trace.network, mixer.weight)
            kernel = weight[0, 0].numel() if weight.dim() > 2 else 1
            per = mixer.reads.outer * mixer.reads.inner if mixer.reads else 1
            wide_in = (weight.shape[0] if mixer.transposed else weight.shape[1] * mixer.groups) // per
            n_in = widths.read_by(mixer) if widths else wide_in
            n_out = len(widths.positions(mixer.ids)) if widths else len(mixer.ids)
            products = n_in * per // mixer.groups * n_out * kernel
            count = products + (n_out if mixer.bias else 0)
            places = value.numel() // batch // len(mixer.ids)
            if mixer.transposed:  # every input place meets the kernel
                source = trace.values[node.args[0].name]
                places = source.numel() // batch // source.shape[1]
        else:
            n_in = n_out = len(widths.held_by(layer)) if widths else len(layer.ids)
            tensors = (
                list(module.parameters()) if module is not None else [attribute(trace.network, layer.name)]
            )
            trainable = [t for t in tensors if isinstance(t, torch.nn.Parameter)]
            count = sum(t.numel() * n_out // len(layer.ids) for t in trainable)
            depthwise = hasattr(module, "kernel_size")
            products = n_out * math.prod(module.kernel_size) if depthwise else 0
            met = trace.values[node.args[0].name] if getattr(module, "transposed", False) else value
            places = met.numel() // batch // met.shape[1] if depthwise else 0
        rows.append(
            {
                "name": owner.name,
                "in": n_in,
                "out": n_out,
                "parameters": count if first else 0,
                "multiply_adds": products * places,
            }
        )
    return rows


def _computed(trace: Trace, node: fx.Node, batch: int) -> dict[str, Any]:
    """The row of a convolution or linear function that is called with a computed weight."""
    weight = trace.values[(node.args[1] if len(node.args) > 1 else node.kwargs["weight"]).name]
    source, value = trace.values[node.args[0].name], trace.values[node.name]
    transposed = node.target.__name__.startswith("conv_tr")
    places = (source if transposed else value).numel() // batch  # each of these numbers meets a filter
    dim = -1 if weight.dim() == 2 else 1
    return {
        "name": node.name,
        "in": source.shape[dim],
        "out": value.shape[dim],
        "parameters": 0,
        "multiply_adds": places * weight[0].numel(),
    }


def is_narrow(structure: Structure, node: fx.Node, narrow: Mapping[str, Any]) -> bool:
    """Whether the narrow program has a value of its own at a node, given those at the nodes before."""
    owner = structure.mixers.get(node.name) or structure.channel_layers.get(node.name)
    if isinstance(owner, Mixer) or node.op == "get_attr":
        return owner is not None and not structure.is_fixed(owner.ids)
    return node.op != "output" and any(n.name in narrow for n in node.all_input_nodes)


def _narrow_values(structure: Structure, kept: Tensor) -> dict[str, Any]:
    """Run the narrow program on shapes. What must not differ from the wide one is checked."""
    trace = structure.trace
    partial = Widths(structure, kept, {})
    values = partial.values
    for node in trace.nodes:
        if not is_narrow(structure, node, values):
            continue
        wide = trace.values[node.name]
        layer = structure.channel_layers.get(node.name)
        if node.name in structure.mixers:
            values[node.name] = _resized(
                wide, structure.mixers[node.name].dim, partial, structure.mixers[node.name].ids
            )
        elif layer is not None and layer.is_parameter:
            values[node.name] = _resized(wide, layer.dim, partial, layer.ids)
        elif layer is not None:
            before = values[node.all_input_nodes[0].name]
            labels = structure.labels[node.name]
            values[node.name] = wide.new_empty(
                [b if n > 1 else w for b, w, n in zip(before.shape, wide.shape, labels.shape, strict=True)]
            )
        else:
            values[node.name] = _run(structure, node, values)
            _check_shape(structure, node, values[node.name])
    for mixer in structure.layers():
        for ids in (mixer.ids, mixer.ids_in):
            if mixer.groups > 1 and ids is not None:
                _check_groups(partial, mixer.name, ids, mixer.groups)
    for layer in {x.key: x for x in structure.channel_layers.values()}.values():
        if layer.key in values and not layer.is_parameter:
            groups = getattr(trace.network.get_submodule(layer.name), "num_groups", 1)
            _check_groups(partial, layer.name, layer.ids, groups)
    return values


def _resized(wide: Tensor, dim: int, widths: Widths, ids: Tensor) -> Tensor:
    shape = list(wide.shape)
    shape[dim] = len(widths.positions(ids))
    return wide.new_empty(shape)


def _run(structure: Structure, node: fx.Node, values: dict[str, Any]) -> Any:
    trace = structure.trace
    args, kwargs = fx.node.map_arg(
        (node.args, node.kwargs), lambda n: values.get(n.name, trace.values[n.name])
    )
    try:
        module = trace.module(node)
        if module is not None and next(module.parameters(), None) is not None:
            module = copy.deepcopy(module).to("meta")
        return call(node, module, args, kwargs)
    except Exception as e:
        raise UsageError(
            f"{describe(node, trace.module(node))} cannot run on fewer channels, it counts on a fixed number of them "
            f"({str(e).splitlines()[0][:120]}); compute numbers from x.shape, or exclude={_read_at(structure, node)}"
        ) from None


def call(node: fx.Node, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a node that is no mixer on given values, out of place."""
    target = OUT_OF_PLACE.get(node.target, node.target) if node.op != "call_module" else None
    if kwargs.get("inplace"):
        kwargs = {**kwargs, "inplace": False}
    if node.op == "call_module":
        return module(*args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], target)(*args[1:], **kwargs)
    return target(*args, **kwargs)


def _check_shape(structure: Structure, node: fx.Node, value: Any) -> None:
    wide, labels = structure.trace.values[node.name], structure.labels[node.name]
    if not isinstance(value, Tensor) or not isinstance(labels, Tensor):
        return
    same = value.dim() == wide.dim() and all(
        v == w for v, w, n in zip(value.shape, wide.shape, labels.shape, strict=True) if n == 1
    )
    if not same or 0 in value.shape:
        raise UsageError(
            f"{describe(node, structure.trace.module(node))} gives {tuple(value.shape)} on fewer channels where it gave "
            f"{tuple(wide.shape)}: it counts on a fixed number of them; compute numbers from x.shape, or flatten(1), or "
            f"exclude={_read_at(structure, node)}"
        )


def _check_groups(widths: Widths, name: str, ids: Tensor, groups: int) -> None:
    size = len(ids) // groups
    per_group = torch.bincount(widths.positions(ids) // size, minlength=groups)
    if bool((per_group != per_group[0]).any()):
        raise UsageError(
            f"the {groups} groups of '{name}' would keep different numbers of channels; exclude={_made_by(widths.structure, ids)}"
        )


def _read_at(structure: Structure, node: fx.Node) -> list[str]:
    """The mixers whose channels a node reads."""
    labels = [structure.labels[n.name] for n in node.all_input_nodes]
    ids = [x.flatten() for x in tree_flatten(labels)[0] if isinstance(x, Tensor)]
    return _made_by(structure, torch.cat(ids)) if ids else []


def _made_by(structure: Structure, ids: Tensor) -> list[str]:
    """The mixers that these channels are the output of."""
    roots = structure.ties.roots(ids)
    mixers = structure.layers()
    return [m.name for m in mixers if bool(torch.isin(structure.ties.roots(m.ids), roots).any())]
