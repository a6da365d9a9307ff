"""Channels of zeros that fill a layer up to whole registers, behind those it has.

Kernels for convolutions compute as many channels at once as a register holds numbers, 8 of float32 in AVX2. Of 22 channels the
last 6 take a register too, with a mask, and every row of 22 numbers begins elsewhere within a cache line. With two filters of
zeros behind them, and two columns of zeros in each layer that reads them, the network computes the same from rows of 24:

    W' = [W 0; 0 0],   b' = [b; 0],   W' [x; anything finite] + b' = [W x + b; 0]
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, fx, nn

from alphaprune.errors import UsageError
from alphaprune.graph import ChannelLayer, Mixer, Structure, read
from alphaprune.rules import Rule, rule_of
from alphaprune.trace import MIXING_LAYERS, Trace

# Of the channels there are: a tenth more costs a fifth more multiply-adds where both sides of a layer grow. 22 to 24 pays, 33 to 40
# does not (full-width VGG-16, AVX2, two threads: 6 % faster, 7 % slower).
MOST = 0.1
_A_NUMBER_EACH = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.PReLU)
_SAFE = (Rule.ELEMENTWISE, Rule.SPATIAL, Rule.REDUCTION, Rule.RESHAPING)

Space = tuple[int, ...]  # roots of the channels of a tensor, in their order


@torch.no_grad()
def pad_channels(traced: Trace, multiple: int) -> None:
    """Fill layers up with channels of zeros, in place, where all that they meet can take them.

    Left as they are: channels that reach the output or an input, that a concatenation joins with others, that are divided into
    groups, or that something takes the mean or the square of (LayerNorm, GroupNorm); and where it would add more than `MOST`.

    Args:
        traced: the network, in eval mode; its layers are changed, its graphs stay.
        multiple: of channels, 1 or more.
    """
    if multiple == 1:
        return
    try:
        structure = read(traced)
    except UsageError:  # nothing to narrow is nothing to fill up
        return
    added = _added(structure, multiple)
    for m in structure.layers():
        gives, reads = (added.get(_space(structure, ids), 0) for ids in (m.ids, _read(m)))
        if gives or reads:
            _pad_mixer(traced.network.get_submodule(m.name), m, gives, reads)
    for c in {c.key: c for c in structure.channel_layers.values() if not c.is_parameter}.values():
        if extra := added.get(_space(structure, c.ids), 0):
            _pad_channel_layer(traced.network.get_submodule(c.name), extra)


def _read(m: Mixer) -> Tensor | None:
    """The channels a mixer reads, each once."""
    return None if m.ids_in is None else m.ids_in[:: m.reads.inner][: m.reads.channels]


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
            whole = met if len(met) == 1 and _takes(structure, node) else set()
            for space in met:
                if space not in whole or not _repeats(seen, space):
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
    if isinstance(structure.channel_layers.get(node.name), ChannelLayer):
        depthwise = isinstance(module, MIXING_LAYERS) and module.out_channels == module.in_channels
        return depthwise or isinstance(module, _A_NUMBER_EACH)
    return rule_of(node, module) in _SAFE


def _pad_mixer(layer: nn.Module, m: Mixer, gives: int, reads: int) -> None:
    """So many filters of zeros behind those there are, columns of zeros for so many channels more that it reads."""
    into, out = (0, 1) if m.transposed else (1, 0)
    layer.weight = _longer(layer.weight, out, gives)
    if layer.bias is not None:
        layer.bias = _longer(layer.bias, 0, gives)
    if reads:
        layer.weight = _longer(layer.weight, into, reads * m.reads.inner)
    sizes = ("in_features", "out_features") if m.dim == -1 else ("in_channels", "out_channels")
    for name, dim in zip(sizes, (into, out), strict=True):
        setattr(layer, name, layer.weight.shape[dim])


def _pad_channel_layer(layer: nn.Module, extra: int) -> None:
    """A BatchNorm, depthwise convolution or PReLU that gives zeros there."""
    for tensors in (layer._parameters, layer._buffers):
        for name, t in tensors.items():
            if t is not None and t.dim() > 0:
                tensors[name] = _longer(t, 0, extra, 1.0 if name == "running_var" else 0.0)
    for name in ("num_features", "num_parameters", "in_channels", "out_channels", "groups"):
        if hasattr(layer, name):
            setattr(layer, name, getattr(layer, name) + extra)


def _longer(t: Tensor, dim: int, extra: int, value: float = 0.0) -> Tensor:
    shape = list(t.shape)
    shape[dim] = extra
    longer = torch.cat([t.detach(), t.new_full(shape, value)], dim)
    return nn.Parameter(longer, t.requires_grad) if isinstance(t, nn.Parameter) else longer
