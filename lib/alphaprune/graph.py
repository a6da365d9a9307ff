"""Which nodes of a network mix channels, which keep them apart, and which channels are tied together.

A *mixer* (convolution, linear layer) computes every output channel from all input channels; what lies between
mixers treats each channel on its own, by the rules of `rules.py`, and can run on fewer of them. Every output channel of
a mixer gets an id, and the ids are followed through the graph: an addition ties those that meet, a concatenation joins
them, a channel shuffle reorders them. Channels that reach the network's output, or that the user excludes,
cannot be narrowed, and with them all that are tied to them.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_flatten

from alphaprune.errors import UsageError, like
from alphaprune.rules import DRAWING, Rule, describe, rule_of
from alphaprune.ties import Ties, atoms
from alphaprune.trace import MIXING_LAYERS, NORMS, TRANSPOSED, Trace

MIXING_FUNCTIONS = {
    F.linear: None,  # and where `groups` stands among the arguments of the others
    F.conv1d: 6, F.conv2d: 6, F.conv3d: 6,
    F.conv_transpose1d: 6, F.conv_transpose2d: 6, F.conv_transpose3d: 6,
}  # fmt: skip

# Of norms called as functions, and where their number of groups stands among the arguments.
NORM_FUNCTIONS = {F.batch_norm: None, F.instance_norm: None, F.layer_norm: None, F.group_norm: 1}


@dataclass(frozen=True)
class Pattern:
    """How the channels of a tensor lie along its channel dimension: (outer, channels, inner) entries.

    (1, C, 1) for a map, (1, C, H * W) behind a flatten, (H * W, C, 1) behind one of channels-last maps.
    """

    outer: int
    channels: int
    inner: int


@dataclass(frozen=True)
class Mixer:
    """A convolution or linear layer, and how the narrow program meets it.

    Attributes:
        key: name of the first node that calls it; its branches are kept under this name.
        source: name of the node whose tensor that first node reads.
        name: qualified name of the layer, or of its weight where a function is called with it.
        weight, bias: qualified names of its parameters; bias None if it has none.
        groups: of a grouped convolution, else 1.
        transposed: whether its weight is (in, out / groups, ...) and not (out, in / groups, ...).
        dim: the dimension it mixes, 1 for a convolution, -1 for a linear layer.
        reads: how the channels it reads lie; None if it reads tensors that are not narrowed.
        ids_in: ids of the entries it reads, None likewise.
        ids: ids of its output channels.
    """

    key: str
    source: str
    name: str
    weight: str
    bias: str | None
    groups: int
    transposed: bool
    dim: int
    reads: Pattern | None
    ids_in: Tensor | None
    ids: Tensor


@dataclass(frozen=True)
class ChannelLayer:
    """A layer with a number for each channel, of which the narrow program has its own copy: a normalisation, a
    depthwise convolution, a PReLU, or a parameter that is added to or multiplied with a tensor.

    Attributes:
        key: name of the first node that calls it.
        name: qualified name of the layer or parameter.
        ids: ids of the entries it holds numbers for.
        dim: where the channels lie: in the tensor it acts on, or in the parameter itself.
        is_parameter: whether it is a parameter and no layer.
    """

    key: str
    name: str
    ids: Tensor
    dim: int
    is_parameter: bool


@dataclass
class Structure:
    """A traced network, read: the role of every node, and which channels are tied.

    Attributes:
        trace: the network as nodes.
        mixers, channel_layers: by the name of each node that calls one.
        labels: by node name the ids in its tensor, of length 1 in every dimension along which they do not differ;
            None where a tensor is not narrowed.
        atoms: sets of roots; of each set a share is kept.
        even: sets of roots that an operation divides into blocks of the same length, so one share is kept of all.
        fixed: why channels are not narrowed, by root.
    """

    trace: Trace
    ties: Ties = field(default_factory=Ties)
    mixers: dict[str, Mixer] = field(default_factory=dict)
    channel_layers: dict[str, ChannelLayer] = field(default_factory=dict)
    labels: dict[str, Any] = field(default_factory=dict)
    atoms: list[Tensor] = field(default_factory=list)
    even: list[Tensor] = field(default_factory=list)
    fixed: dict[int, str] = field(default_factory=dict)

    def is_fixed(self, ids: Tensor) -> bool:
        """Whether none of these channels is narrowed."""
        return bool(torch.isin(self.ties.roots(ids), self._fixed_roots).all())

    @cached_property
    def _fixed_roots(self) -> Tensor:  # only asked for when all reasons are known
        return torch.tensor(sorted(self.fixed), dtype=torch.long)

    def layers(self) -> list[Mixer]:
        """The mixers, an entry a layer, in the order of their first use."""
        return list({m.key: m for m in self.mixers.values()}.values())

    def depthwise(self) -> list[ChannelLayer]:
        """The depthwise convolutions, an entry a layer."""
        layers = {x.key: x for x in self.channel_layers.values() if not x.is_parameter}.values()
        return [x for x in layers if isinstance(self.trace.network.get_submodule(x.name), MIXING_LAYERS)]

    def tied(self) -> list[str]:
        """The mixers whose output channels are tied to another's, a line a group: `conv, blocks.0.conv2`."""
        groups: dict[int, list[str]] = {}
        for mixer in self.layers():
            roots = set(self.ties.roots(mixer.ids).tolist())
            group = next((g for g in groups if g in roots), min(roots))
            groups.setdefault(group, []).append(mixer.name)
        return [", ".join(names) for names in groups.values() if len(names) > 1]

    def why_fixed(self, mixer: Mixer) -> str | None:
        """Why a mixer keeps all its channels, None if it does not."""
        reasons = {self.fixed.get(r) for r in self.ties.roots(mixer.ids).tolist()}
        return None if None in reasons else min(reasons, key=lambda r: (r.startswith("tied"), r))


def read(trace: Trace, exclude: Sequence[str] = ()) -> Structure:
    """Find the role of every node and the ties between channels.

    Args:
        trace: the traced network.
        exclude: names of layers, of modules that contain them, or patterns such as `layer4.*`, whose output
            channels are all kept.

    Raises:
        UsageError: if a node that must be narrowed is covered by no rule, a layer is used under two shapes, a
            pattern matches nothing, or nothing is left to narrow.
    """
    reader = _Reader(trace)
    for node in trace.nodes:
        reader.read(node)
    return reader.finish(exclude)


def matches(name: str, pattern: str) -> bool:
    """Whether a layer is meant: by its name, a module that contains it, or a pattern."""
    return name == pattern or name.startswith(f"{pattern}.") or fnmatchcase(name, pattern)


class _Uncovered(Exception):
    """No rule covers the node; the argument says why."""


class _Reader:
    def __init__(self, trace: Trace):
        self.trace, self.s = trace, Structure(trace)
        self.ties, self.labels = self.s.ties, self.s.labels
        self.reasons: list[tuple[Tensor, str]] = []  # channels that are not narrowed, and why
        self.uncovered: list[tuple[str, Tensor]] = []
        self.unknown: set[str] = set()  # nodes behind an uncovered one, whose channels nobody knows
        self.reasons_behind: list[tuple[Tensor, str]] = []  # what meets those is not narrowed either
        self.blocks: list[tuple[Tensor, int]] = []  # channels that are divided into blocks of equal share
        self.even: list[tuple[str, Tensor]] = []  # where that is, or where what lies in a block is not known
        self.by_name: dict[str, Mixer | ChannelLayer] = {}

    # ---- one node

    def read(self, node: fx.Node) -> None:
        module = self.trace.module(node)
        inputs = [self.labels[n.name] for n in node.all_input_nodes]
        labelled = [x for x in tree_flatten(inputs)[0] if isinstance(x, Tensor)]
        self.labels[node.name] = None
        if node.op == "output":
            for x in labelled:
                self.reasons.append((x, "it is the network's output"))
        elif node.op == "get_attr":
            self.labels[node.name] = self._parameter(node)
        elif node.op != "placeholder":
            try:
                if isinstance(module, MIXING_LAYERS) or node.target in MIXING_FUNCTIONS:
                    self.labels[node.name] = self._mixer(node, module)
                elif labelled and _tensors(self.trace.values[node.name]):
                    self.labels[node.name] = self._channelwise(node, module)
            except _Uncovered as why:
                if not labelled:
                    raise UsageError(f"{describe(node, module)} {why}") from None
                self._leave(node, module, tuple(labelled), str(why))
                self.unknown.add(node.name)
            if self.labels[node.name] is None and any(n.name in self.unknown for n in node.all_input_nodes):
                self.unknown.add(node.name)

    def _leave(self, node: fx.Node, module: nn.Module | None, labels: Any, why: str) -> None:
        """A node that is right only if nothing of what it reads is narrowed."""
        involved = torch.cat([x.flatten() for x in tree_flatten(labels)[0]])
        if self._leads_to_output(node):
            self.reasons.append((involved, "it leads to the network's output"))
        else:
            self.uncovered.append((f"{describe(node, module)} {why}", involved))

    def _leads_to_output(self, node: fx.Node) -> bool:
        """Whether no mixer comes behind a node."""
        behind = [node]
        for n in behind:
            if n is not node and (
                n.target in MIXING_FUNCTIONS or isinstance(self.trace.module(n), MIXING_LAYERS)
            ):
                return False
            behind += [u for u in n.users if u not in behind]
        return not isinstance(self.trace.module(node), MIXING_LAYERS)

    def _channelwise(self, node: fx.Node, module: nn.Module | None) -> Any:
        if isinstance(module, NORMS) or (isinstance(module, nn.PReLU) and module.num_parameters > 1):
            return self._channel_layer(node, module)
        if isinstance(module, nn.PReLU):
            return self._given(node)
        if node.target in NORM_FUNCTIONS:
            return self._norm_function(node)
        if node.target in DRAWING:
            raise UsageError(f"{describe(node, module)} draws random numbers; take it out of forward()")
        rule = rule_of(node, module)
        if rule is None or rule is Rule.NUMBER:  # a number has no channels, and this is a tensor
            raise _Uncovered("is covered by no rule, it may mix channels")
        apply = {
            Rule.ELEMENTWISE: self._elementwise,
            Rule.SPATIAL: self._spatial,
            Rule.REDUCTION: self._reduction,
            Rule.RESHAPING: self._reshaping,
            Rule.JOINING: self._joining,
        }
        return apply[rule](node, module)

    # ---- layers

    def _mixer(self, node: fx.Node, module: nn.Module | None) -> Tensor | None:
        """A mixer's output channels are new ones; where the layer is used again, they are those of its first use."""
        source = node.args[0]
        given = self.labels[source.name]
        value = self.trace.values[node.name]
        linear = isinstance(module, nn.Linear) or node.target is F.linear
        dim = value.dim() - 1 if linear else 1
        name, weight, bias, groups = self._parameters(node, module)
        shape = attribute(self.trace.network, weight).shape
        transposed = isinstance(module, TRANSPOSED) or getattr(node.target, "__name__", "").startswith(
            "conv_tr"
        )
        if transposed and module is not None and (len(node.args) > 1 or node.kwargs):
            raise UsageError(
                f"{describe(node, module)} is called with output_size; set output_padding instead"
            )
        if given is not None and (isinstance(given, tuple) or _varying(given) != [dim]):
            self._leave(
                node, module, given, f"mixes dimension {dim}, along which the channels do not lie alone"
            )
            given = None
        ids_in = None if given is None else given.flatten()
        depthwise = groups > 1 and groups == value.shape[1] == self.trace.values[source.name].shape[1]
        if depthwise and ids_in is not None:
            if module is None:
                raise _Uncovered("is a depthwise convolution called as a function; make it a layer")
            return self._channel_layer(node, module)
        reads = None if ids_in is None else _pattern(ids_in)
        if ids_in is not None and (reads is None or (groups > 1 and reads.channels != len(ids_in))):
            why = "reads flattened maps of different sizes, or the same channels several times"
            self._leave(node, module, given, why)
            ids_in = reads = None
        mixer = self.by_name.get(name)
        if mixer is not None:
            self._used_again(node, mixer, ids_in)
        else:
            mixer = Mixer(
                key=node.name,
                source=source.name,
                name=name,
                weight=weight,
                bias=bias,
                groups=groups,
                transposed=transposed,
                dim=-1 if linear else 1,
                reads=reads,
                ids_in=ids_in,
                ids=self.ties.new(shape[1] * groups if transposed else shape[0]),
            )
            self.s.mixers[node.name] = self.by_name[name] = mixer
            self.blocks.append((mixer.ids, groups))
            if groups > 1 and ids_in is not None:
                self.blocks.append((ids_in, groups))
                self.even.append((name, ids_in))
        if len(mixer.ids) == 1:
            self.reasons.append((mixer.ids, "it has one channel"))
            return None
        return _along(mixer.ids, dim, value.dim())

    def _parameters(self, node: fx.Node, module: nn.Module | None) -> tuple[str, str, str | None, int]:
        """Name, weight, bias and groups of a mixing layer, or of a function that is called with parameters."""
        if module is not None:
            if "weight" not in module._parameters:
                raise _Uncovered(
                    "computes its weight from others; make it plain with torch.nn.utils.parametrize.remove_parametrizations"
                )
            bias = f"{node.target}.bias" if module.bias is not None else None
            return node.target, f"{node.target}.weight", bias, getattr(module, "groups", 1)
        given = dict(zip(("input", "weight", "bias"), node.args, strict=False)) | dict(node.kwargs)
        names = []
        for part in ("weight", "bias"):
            n = given.get(part)
            if n is not None and not (isinstance(n, fx.Node) and n.op == "get_attr"):
                raise _Uncovered(
                    f"is called with a {part} that is computed; only plain parameters are covered"
                )
            names.append(n.target if n is not None else None)
        place = MIXING_FUNCTIONS[node.target]
        groups = node.kwargs.get("groups", node.args[place] if place and len(node.args) > place else 1)
        return names[0], names[0], names[1], groups

    def _used_again(self, node: fx.Node, first: Mixer | ChannelLayer, ids_in: Tensor | None) -> None:
        before = first.ids_in if isinstance(first, Mixer) else first.ids
        if (before is None) != (ids_in is None) or (ids_in is not None and len(ids_in) != len(before)):
            raise UsageError(
                f"layer '{first.name}' is used under two shapes, at '{first.key}' and '{node.name}'; give each use a layer of its own"
            )
        if ids_in is not None:
            self.ties.tie(before, ids_in)
        (self.s.mixers if isinstance(first, Mixer) else self.s.channel_layers)[node.name] = first

    def _channel_layer(self, node: fx.Node, module: nn.Module) -> Tensor:
        given = self._given(node)
        dim = given.dim() - 1 if type(module) is nn.LayerNorm else 1
        if (
            isinstance(module, nn.LayerNorm)
            and type(module) is not nn.LayerNorm
            and len(_varying(given)) == 1
        ):
            dim = _varying(given)[0]  # such as torchvision's LayerNorm2d
        if _varying(given) != [dim] or (
            isinstance(module, nn.LayerNorm) and tuple(module.normalized_shape) != (given.numel(),)
        ):
            raise _Uncovered("normalises over more than the channels of each place")
        ids = given.flatten()
        if (first := self.by_name.get(node.target)) is not None:
            self._used_again(node, first, ids)
        else:
            layer = ChannelLayer(node.name, node.target, ids, dim, is_parameter=False)
            self.s.channel_layers[node.name] = self.by_name[node.target] = layer
        if isinstance(module, nn.GroupNorm) and module.num_groups > 1:
            self.blocks.append((ids, module.num_groups))
            self.even.append((node.target, ids))
        return given

    def _norm_function(self, node: fx.Node) -> Tensor:
        """A norm called as a function: its parameters and statistics hold a number for each channel it reads."""
        given = self._given(node)
        dim = given.dim() - 1 if node.target is F.layer_norm else 1
        others = [n for n in node.all_input_nodes[1:] if isinstance(self.trace.values[n.name], Tensor)]
        labels = [self.labels[n.name] for n in others]
        if _varying(given) != [dim] or any(x is None or x.numel() != given.numel() for x in labels):
            raise _Uncovered("normalises over more than the channels of each place, or with computed numbers")
        for x in labels:
            self.ties.tie(given, x)
        if (place := NORM_FUNCTIONS[node.target]) is not None:
            groups = node.kwargs.get("num_groups", node.args[place] if len(node.args) > place else None)
            self.blocks.append((given.flatten(), groups))
            self.even.append((node.name, given.flatten()))
        return given

    def _parameter(self, node: fx.Node) -> Tensor | None:
        """A parameter or buffer with one dimension of length above 1 may hold a number for each channel."""
        value = self.trace.values[node.name]
        dims = [d for d, n in enumerate(value.shape) if n > 1] if isinstance(value, Tensor) else []
        if len(dims) != 1 or node.target.startswith(
            "_tensor_constant"
        ):  # made anew in forward(), at full length
            return None
        if (first := self.by_name.get(node.target)) is not None:
            self.s.channel_layers[node.name] = first
        else:
            ids = self.ties.new(value.shape[dims[0]])
            first = ChannelLayer(node.name, node.target, ids, dims[0], is_parameter=True)
            self.s.channel_layers[node.name] = self.by_name[node.target] = first
        return _along(first.ids, dims[0], value.dim())

    # ---- rules

    def _given(self, node: fx.Node) -> Any:
        given = self.labels[node.all_input_nodes[0].name]
        if given is None:
            raise _Uncovered("takes channels for something else than its first operand")
        return given

    def _elementwise(self, node: fx.Node, module: nn.Module | None) -> Tensor:
        """Channels that meet are tied. An operand of length 1 along the channels is spread over them."""
        ndim = self.trace.values[node.name].dim()
        return self._tied(node.all_input_nodes, ndim)

    def _tied(self, operands: Iterable[fx.Node], ndim: int) -> Tensor:
        operands = [n for n in dict.fromkeys(operands) if isinstance(self.trace.values[n.name], Tensor)]
        aligned = [_align(self.labels[n.name], ndim) for n in operands if self.labels[n.name] is not None]
        first = aligned[0]
        for other in aligned[1:]:
            if other.shape != first.shape:
                raise _Uncovered("lets channels meet that lie along different dimensions")
            self.ties.tie(first, other)
        for n in operands:
            shape = _align(self.trace.values[n.name], ndim).shape
            if self.labels[n.name] is None and any(shape[d] > 1 for d in _varying(first)):
                if n.op == "get_attr":
                    raise _Uncovered(
                        f"meets '{n.target}', a parameter with a number for each channel and place"
                    )
                reasons = self.reasons_behind if n.name in self.unknown else self.reasons
                reasons.append((first, f"it meets '{n.name}', which is not narrowed"))
        return first

    def _spatial(self, node: fx.Node, module: nn.Module | None) -> Tensor:
        value, given = self.trace.values[node.name], self._given(node)
        if not isinstance(value, Tensor) or any(value.shape[d] != given.shape[d] for d in _varying(given)):
            raise _Uncovered("changes the number of channels")
        return given

    def _reduction(self, node: fx.Node, module: nn.Module | None) -> Tensor:
        given = self._given(node)
        dims = node.kwargs.get("dim", node.kwargs.get("axis", node.args[1] if len(node.args) > 1 else None))
        dims = fx.node.map_arg(dims, lambda n: self.trace.values[n.name])
        keep = self.trace.values[node.name].dim() == given.dim()
        dims = [dims] if isinstance(dims, int) else dims
        if dims is None or {d % given.dim() for d in dims} & {0, *_varying(given)}:
            raise _Uncovered("sums over channels or images")
        return given.amax(tuple(dims), keepdim=keep)

    def _reshaping(self, node: fx.Node, module: nn.Module | None) -> Any:
        """What moves numbers moves ids: the operation is run on them."""
        source, given = node.all_input_nodes[0], self._given(node)
        if isinstance(given, tuple):  # what chunk gave
            return given[node.args[1]]
        index = node.args[1] if node.target is operator.getitem else ()
        for i in index if isinstance(index, tuple) else (index,):
            if isinstance(i, list) or (isinstance(i, fx.Node) and _tensors(self.trace.values[i.name])):
                raise _Uncovered("picks numbers by a list or a tensor")
        value = self.trace.values[source.name]
        whole = given.expand(value.shape).contiguous()
        other = {n: self.trace.values[n.name] for n in node.all_input_nodes} | {source: whole}
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), other.__getitem__)
        if module is not None:
            moved = module(whole)
        elif node.op == "call_method":
            moved = getattr(args[0], node.target)(*args[1:], **kwargs)
        else:
            moved = node.target(*args, **kwargs)
        parts = tuple(_squeeze(t) for t in (moved if isinstance(moved, tuple | list) else [moved]))
        constant = all(n is source for n in node.all_input_nodes)
        is_split = node.target in (torch.split, "split")
        if constant and (
            is_split or torch.cat([p.flatten() for p in parts]).unique().numel() < given.unique().numel()
        ):
            raise _Uncovered("takes a fixed number of channels; chunk, or compute the number from x.shape")
        if given.shape[0] == 1 and any(t.shape[0] > 1 for t in parts):
            raise _Uncovered("moves channels among images")
        flat = given.flatten()
        split = len(parts) > 1 and len({p.numel() for p in parts}) == 1
        split = split and sum(p.numel() for p in parts) == len(flat)
        if split or (len(parts) == 1 and len(_varying(parts[0])) > len(_varying(given))):
            self.even.append((node.name, flat))
            if bool((flat.diff() == 1).all()):  # channels in one row, so blocks of them keep their meaning
                number = len(parts) if split else parts[0].shape[_varying(parts[0])[0]]
                self.blocks.append((flat, number))
        return parts if isinstance(moved, tuple | list) else parts[0]

    def _joining(self, node: fx.Node, module: nn.Module | None) -> Tensor:
        operands = node.args[0] if node.args else node.kwargs["tensors"]
        ndim = self.trace.values[node.name].dim()
        dim = (
            node.kwargs.get("dim", node.kwargs.get("axis", node.args[1] if len(node.args) > 1 else 0)) % ndim
        )
        if isinstance(operands, fx.Node):  # all that a chunk gave
            parts = self.labels[operands.name]
            if isinstance(parts, tuple) and all(_varying(x) == [dim] for x in parts):
                return torch.cat(parts, dim)
            raise _Uncovered("joins parts that are not named one by one")
        labelled = [self.labels[n.name] for n in operands if self.labels[n.name] is not None]
        if all(_varying(x) == [x.dim() - ndim + dim] for x in labelled):
            parts = []
            for n in operands:
                if (given := self.labels[n.name]) is None:
                    ids = self.ties.new(self.trace.values[n.name].shape[dim])
                    self.reasons.append((ids, f"'{n.name}' is not narrowed"))
                    given = _along(ids, dim, ndim)
                parts.append(given)
            return torch.cat(parts, dim)
        if any(dim in _varying(x) for x in labelled):
            raise _Uncovered("joins channels that lie along different dimensions")
        return self._tied(operands, ndim)

    # ---- ties and what cannot be narrowed

    def finish(self, exclude: Sequence[str]) -> Structure:
        s, roots = self.s, self.ties.roots
        mixers = s.layers()
        for pattern in exclude:
            layers = [*mixers, *s.depthwise()]
            if not isinstance(pattern, str):
                raise UsageError(f"exclude holds {pattern!r}; give names or patterns, such as 'layer4.*'")
            meant = [m for m in layers if matches(m.name, pattern)]
            if not meant:
                raise UsageError(
                    f"exclude {pattern!r} matches no convolution or linear layer{like(pattern, [m.name for m in layers])}"
                )
            self.reasons += [(m.ids, f"'{m.name}' is excluded") for m in meant]
        own = {r for m in mixers for r in roots(m.ids).tolist()}
        for layer in s.channel_layers.values():  # a parameter that never meets a mixer's channels
            if layer.is_parameter and not own.intersection(roots(layer.ids).tolist()):
                self.reasons.append((layer.ids, "it meets no layer's channels"))
        self._fix(self.reasons, mixers)
        # What mixes by attention is named first: it says best what kind of network this is.
        open_ends = [(what, set(roots(ids).tolist()) - s.fixed.keys()) for what, ids in self.uncovered]
        open_ends = sorted((o for o in open_ends if o[1]), key=lambda o: "ttention" not in o[0])
        if open_ends:
            involved = set().union(*(ids for _, ids in open_ends))
            names = [m.name for m in mixers if involved.intersection(roots(m.ids).tolist())]
            more = f" (and {len(open_ends) - 1} more)" if len(open_ends) > 1 else ""
            raise UsageError(
                f"{open_ends[0][0]}{more}; to leave what is read there as wide as it is, exclude={names}"
            )
        self._fix(self.reasons_behind, mixers)
        s.even = [roots(ids) for _, ids in self.even]
        constraints = [(roots(ids), blocks) for ids, blocks in self.blocks]
        s.atoms = [a for a in atoms(constraints) if any(r not in s.fixed for r in a.tolist())]
        if not s.atoms:
            raise UsageError(
                f"{type(self.trace.network).__name__} has nothing to narrow: it needs two convolutions or linear layers in a row"
                + (", and not all of them excluded" if exclude else "")
            )
        return s

    def _fix(self, reasons: list[tuple[Tensor, str]], mixers: list[Mixer]) -> None:
        """A mixer keeps all channels or a share of all: what is fixed for one channel is fixed for its layer, and for
        all that are divided into blocks with it."""
        for ids, reason in reasons:
            self.s.fixed.update((r, reason) for r in self.ties.roots(ids).tolist() if r not in self.s.fixed)
        changed = True
        while changed:
            changed = False
            for m in mixers:
                all_roots = set(self.ties.roots(m.ids).tolist())
                known = all_roots & self.s.fixed.keys()
                if known and known != all_roots:
                    changed = True
                    self.s.fixed.update(dict.fromkeys(all_roots - known, f"tied to '{m.name}'"))
            for name, ids in self.even:
                all_roots = set(self.ties.roots(ids).tolist())
                known = all_roots & self.s.fixed.keys()
                if known and known != all_roots:
                    changed = True
                    reason = f"tied at '{name}', whose blocks keep the same number, to channels that stay"
                    self.s.fixed.update(dict.fromkeys(all_roots - known, reason))


def _tensors(value: Any) -> bool:
    return any(isinstance(v, Tensor) for v in tree_flatten(value)[0])


def _varying(labels: Tensor) -> list[int]:
    return [d for d, n in enumerate(labels.shape) if n > 1]


def _along(ids: Tensor, dim: int, ndim: int) -> Tensor:
    shape = [1] * ndim
    shape[dim] = len(ids)
    return ids.view(shape)


def _align(x: Tensor, ndim: int) -> Tensor:
    """Dimensions of length 1 in front, as broadcasting adds them."""
    return x[(None,) * (ndim - x.dim())]


def _squeeze(labels: Tensor) -> Tensor:
    """Length 1 in every dimension along which the ids do not differ."""
    for d in range(labels.dim()):
        first = labels.narrow(d, 0, 1)
        if labels.shape[d] > 1 and bool((labels == first).all()):
            labels = first
    return labels


def _pattern(ids: Tensor) -> Pattern | None:
    """(outer, channels, inner) of entries that are channels repeated; None if they are something else."""
    channels = ids.unique().numel()
    inner = next((i for i, x in enumerate(ids.tolist()) if x != ids[0]), len(ids))
    outer, rest = divmod(len(ids), channels * inner)
    if rest:
        return None
    rows = ids.view(outer, channels, inner)
    return Pattern(outer, channels, inner) if bool((rows == rows[:1, :, :1]).all()) else None


def attribute(network: nn.Module, name: str) -> Tensor:
    """A parameter or buffer by its qualified name."""
    owner, _, last = name.rpartition(".")
    return getattr(network.get_submodule(owner), last)
