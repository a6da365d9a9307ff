"""Channels of zeros that fill a layer up to whole registers, behind those it has.

Kernels for convolutions compute as many channels at once as a register holds numbers, 8 of float32 in AVX2. Of 22 channels the
last 6 take a register too, with a mask, and every row of 22 numbers begins elsewhere within a cache line. With two filters of
zeros behind them, and two columns of zeros in each layer that reads them, the network computes the same from rows of 24:

    W' = [W 0; 0 0],   b' = [b; 0],   W' [x; anything finite] + b' = [W x + b; 0]
"""

from __future__ import annotations

import copy
import itertools

import torch
from torch import Tensor, fx, nn

from alphaprune.compare import close, run
from alphaprune.errors import UsageError
from alphaprune.graph import Mixer, Structure, read
from alphaprune.rules import Rule, rule_of
from alphaprune.trace import MIXING_LAYERS, Trace, trace

# Of the channels there are: a tenth more costs a fifth more multiply-adds where both sides of a layer grow. On two threads with AVX2 it
# pays from 22 and 44 to 24 and 48 (ResNet-18 14 % faster, VGG-16 5 %); from 33, 65, 129 and 257 to 40, 72, 136 and 264 VGG-16 is 17 % slower.
MOST = 0.1
_A_NUMBER_EACH = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.PReLU)
# Of zero they may give what is not finite, and that times a column of zeros is no zero.
_NOT_FINITE = {"log", "log_", "rsqrt", "rsqrt_", "reciprocal", "reciprocal_", "pow", "pow_"}
_DIVISIONS = {"div", "div_", "truediv", "itruediv"}
_SAFE = (Rule.ELEMENTWISE, Rule.SPATIAL, Rule.REDUCTION, Rule.RESHAPING)

Space = tuple[int, ...]  # roots of the channels of a tensor, in their order


@torch.no_grad()
def padded(network: nn.Module, inputs: tuple[Tensor, ...], multiple: int, tolerance: float) -> nn.Module:
    """A copy of a network, in eval mode, with channels of zeros where it then computes the same; else a copy as it is.

    Args:
        network: any that `torch.fx` can trace.
        inputs: what is computed is compared on them.
        multiple: as of `pad_channels`.
        tolerance: share of the largest value in each output that rounding explains.
    """
    own = copy.deepcopy(network).eval()
    if multiple == 1:
        return own
    plain = copy.deepcopy(own)
    try:
        pad_channels(trace(own, inputs), multiple)
        found, expected = (run(n, inputs, type(network).__name__) for n in (own, plain))
    # Whatever a network does that this module did not think of, such as counting its channels: it is right as it is.
    except Exception:
        return plain
    pairs = list(zip(found, expected, strict=True))
    whole = [(a, b) for a, b in pairs if not b.is_floating_point()]
    real = [(a, b) for a, b in pairs if b.is_floating_point()]
    if not real:  # such as behind argmax: little would show
        return plain
    same = close(*zip(*real, strict=True), tolerance) and all(torch.equal(a, b) for a, b in whole)
    return own if same else plain


def pad_channels(traced: Trace, multiple: int) -> None:
    """Fill layers up with channels of zeros, in place, where all that they meet can take them.

    Left as they are: channels that reach the output or an input; that are joined with others or divided into groups; that meet a
    LayerNorm, GroupNorm or InstanceNorm, a parameter, or a layer that is called as a function; and where it would add more than
    `MOST`. A network with an operation that no rule covers is left as it is altogether.

    Args:
        traced: the network, in eval mode; its layers are changed, its graphs stay.
        multiple: of channels, 1 or more.
    """
    try:
        structure = read(traced)
    except UsageError:  # nothing to narrow is nothing to fill up
        return
    added = _added(structure, multiple)
    for m in structure.layers():
        gives, reads = (_more(structure, added, ids) for ids in (m.ids, m.ids_in))
        if gives or reads:
            _pad_mixer(traced.network.get_submodule(m.name), m, gives, reads)
    for c in {c.key: c for c in structure.channel_layers.values() if not c.is_parameter}.values():
        if more := _more(structure, added, c.ids):
            _pad_channel_layer(traced.network.get_submodule(c.name), more)


def _more(structure: Structure, added: dict[Space, int], ids: Tensor | None) -> int:
    """Entries that come behind these, which are channels, each several times where they lie behind a flatten."""
    seen = _space(structure, ids)
    space = tuple(dict.fromkeys(seen))
    return added.get(space, 0) * (len(seen) // max(len(space), 1))


def _space(structure: Structure, ids: Tensor | None) -> Space:
    return () if ids is None else tuple(structure.ties.roots(ids.flatten()).tolist())


def _added(structure: Structure, multiple: int) -> dict[Space, int]:
    """By space how many channels are added: those of a mixer whose every reader, and all in between, can take them."""
    found: dict[Space, int] = {}
    for m in structure.layers():
        space = _space(structure, m.ids)
        extra = -len(space) % multiple
        once = len(set(space)) == len(space)
        if once and 0 < extra <= MOST * len(space) and not set(space) & structure.fixed.keys():
            found[space] = extra
    owner: dict[int, set[Space]] = {}
    for space in found:
        for root in space:
            owner.setdefault(root, set()).add(space)
    for node in structure.trace.nodes:
        for seen in _seen(structure, node):
            met = set().union(*(owner.get(root, set()) for root in set(seen)))
            alone = len(met) == 1 and _takes(structure, node)
            for space in met:
                if not (alone and _repeats(seen, space)):
                    found.pop(space, None)
    return found


def _seen(structure: Structure, node: fx.Node) -> list[Space]:
    """The channels in what a node gives, and in what it reads if it is a layer."""
    label = structure.labels.get(node.name)
    given = label if isinstance(label, tuple) else (label,)
    layer = structure.mixers.get(node.name) or structure.channel_layers.get(node.name)
    own = [layer.ids, layer.ids_in] if isinstance(layer, Mixer) else [layer.ids] if layer is not None else []
    return [_space(structure, ids) for ids in (*given, *own) if ids is not None]


def _repeats(seen: Space, space: Space) -> bool:
    """Whether what is seen are these channels in their order, each perhaps several times in a row, as behind a flatten."""
    inner, rest = divmod(len(seen), len(space))
    return rest == 0 and seen == tuple(itertools.chain.from_iterable([r] * inner for r in space))


def _takes(structure: Structure, node: fx.Node) -> bool:
    """Whether a node does with more channels what it does with those there are."""
    module = structure.trace.module(node)
    if (m := structure.mixers.get(node.name)) is not None:
        return module is not None and m.groups == 1
    if node.name in structure.channel_layers:  # of those that mix a depthwise convolution is one
        return isinstance(module, (*_A_NUMBER_EACH, *MIXING_LAYERS))
    name = getattr(node.target, "__name__", str(node.target))
    by_channels = name in _DIVISIONS and isinstance(node.args[1], fx.Node)
    return rule_of(node, module) in _SAFE and name not in _NOT_FINITE and not by_channels


def _pad_mixer(layer: nn.Module, m: Mixer, gives: int, reads: int) -> None:
    """So many filters of zeros behind those there are, so many columns of zeros."""
    into, out = (0, 1) if m.transposed else (1, 0)
    layer.weight = _longer(layer.weight, out, gives)
    if layer.bias is not None:
        layer.bias = _longer(layer.bias, 0, gives)
    layer.weight = _longer(layer.weight, into, reads)
    sizes = ("in_features", "out_features") if m.dim == -1 else ("in_channels", "out_channels")
    for name, dim in zip(sizes, (into, out), strict=True):
        setattr(layer, name, layer.weight.shape[dim])


def _pad_channel_layer(layer: nn.Module, more: int) -> None:
    """A BatchNorm, depthwise convolution or PReLU that gives zeros there."""
    for tensors in (layer._parameters, layer._buffers):
        for name, t in tensors.items():
            if t is not None and t.dim() > 0:
                tensors[name] = _longer(t, 0, more, 1.0 if name == "running_var" else 0.0)
    for name in ("num_features", "num_parameters", "in_channels", "out_channels", "groups"):
        if hasattr(layer, name):
            setattr(layer, name, getattr(layer, name) + more)


def _longer(t: Tensor, dim: int, extra: int, value: float = 0.0) -> Tensor:
    shape = list(t.shape)
    shape[dim] = extra
    longer = torch.cat([t.detach(), t.new_full(shape, value)], dim)
    return nn.Parameter(longer, t.requires_grad) if isinstance(t, nn.Parameter) else longer
