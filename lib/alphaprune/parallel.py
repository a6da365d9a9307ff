"""The network that runs wide and narrow in lockstep, blended by alpha.

The channel-wise program of a network runs twice, once with the pretrained C channels and once with k of them.
The mixers W are shared. With E (k -> C, "expand") and R (C -> k, "reduce"), both without bias,

    x = alpha * wide + (1 - alpha) * E(narrow)      what mixer W reads
    z = W(x)                                        wide continues with z, narrow with R(z)

The first mixer reads the input itself, the last has no R. At alpha = 0 only `R . W . E` is left of a mixer, one
ordinary layer k -> k: that is what `fold` writes down.

E has no bias because the bias would meet the next convolution's zero padding: inside the image it is added,
in the border it is not, and no single convolution does that.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from alphaprune.errors import UsageError
from alphaprune.graph import Mixer, trace

WIDE, NARROW = "wide", "narrow"


class ChannelMap(nn.Module):
    """A linear map between channels at every position: the 1x1 convolution without bias, on maps or flattened maps.

    Args:
        inputs, outputs: channels before and after.
        positions: entries behind each channel if the tensor it acts on is flattened, else 1.

    Shapes:
        (N, inputs, ...) -> (N, outputs, ...), or (N, inputs * positions) -> (N, outputs * positions).
    """

    def __init__(self, inputs: int, outputs: int, positions: int = 1, **factory):
        super().__init__()
        self.positions = positions
        self.weight = nn.Parameter(nn.Linear(inputs, outputs, bias=False, **factory).weight.detach())

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 4:
            return F.conv2d(x, self.weight[:, :, None, None])
        if self.positions == 1:
            return F.linear(x, self.weight)
        return torch.einsum("oi,nip->nop", self.weight, x.unflatten(1, (-1, self.positions))).flatten(1)


def compose(weight: Tensor, reduce: ChannelMap | None, expand: ChannelMap | None) -> Tensor:
    """The weight of `R . W . E`, differentiable in all three.

    Args:
        weight: of W, (O, C, h, w) or (O, C * positions).
        reduce: R, its weight (k_out, O); None to leave it out.
        expand: E, its weight (C, k_in); None to leave it out.

    Returns:
        (k_out, k_in, h, w) or (k_out, k_in * positions); O and C stay where R and E are left out.
    """
    with torch.autocast(weight.device.type, enabled=False):  # products of weights are worth full precision
        if expand is not None:
            if weight.dim() == 4:
                weight = torch.einsum("ochw,ck->okhw", weight, expand.weight)
            else:
                weight = torch.einsum(
                    "ocp,ck->okp", weight.unflatten(1, (-1, expand.positions)), expand.weight
                ).flatten(1)
        if reduce is not None:
            weight = torch.einsum("ro,o...->r...", reduce.weight, weight)
    return weight


class ParallelModel(nn.Module):
    """A pretrained network with a narrow program beside it that takes over as alpha goes from 1 to 0.

    Args:
        network: a CNN that `torch.fx` can trace, with one input and one output. It is copied, not changed.
        keep_ratio: share of the channels that the narrow program has, in (0, 1]: k = int(C * keep_ratio).
        example_input: a batch as the network expects it, (N, C, H, W), on the network's device.

    Attributes:
        alpha: 1.0 at first. Set it to one number in [0, 1], to one number a mixer (a sequence), or to a mapping
            from module names to numbers. Mixers that read the network's input have none.
        train_wide: whether the pretrained weights train (True at first). Running statistics of BatchNorm follow
            the batches in training mode either way.
        composed: whether products like R.W.E are formed before they meet the images (True). The function is the
            same; False is slower and there to compare with.

    Raises:
        UsageError: if an argument is out of range or the network has a node that no rule covers.

    Example:
        >>> import torch
        >>> from alphaprune import ParallelModel, fold
        >>> from alphaprune.models import vgg16
        >>> model = ParallelModel(vgg16(0.25), keep_ratio=0.34375, example_input=torch.zeros(2, 3, 32, 32))
        >>> model.alpha = 0.0
        >>> small, certificate = fold(model)
        >>> small.features[0].out_channels
        5
    """

    def __init__(self, network: nn.Module, keep_ratio: float = 0.34375, example_input: Tensor | None = None):
        super().__init__()
        if isinstance(network, ParallelModel):
            raise UsageError("network is a ParallelModel already; pass the network it was made from")
        if not isinstance(keep_ratio, int | float) or not 0 < keep_ratio <= 1:
            raise UsageError(f"keep_ratio is {keep_ratio!r}; give a number in (0, 1], such as 0.34375")
        if example_input is None:
            raise UsageError("example_input is missing; pass one batch of images as the network expects it")
        self.keep_ratio = float(keep_ratio)
        self.network = copy.deepcopy(network)
        # An operation in place on what the wide program holds would change what R reads.
        self.in_place = [name for name, m in self.network.named_modules() if getattr(m, "inplace", False)]
        for name in self.in_place:
            self.network.get_submodule(name).inplace = False
        self.example_input = example_input.detach()
        traced = trace(self.network, self.example_input)
        self.graph, self.mixers = traced.graph, traced.mixers

        self.reduce, self.expand, self.narrow_norms = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()
        for node, m in self.mixers.items():
            weight = self.network.get_submodule(m.module).weight
            factory = {"device": weight.device, "dtype": weight.dtype}
            if m.writes:
                self.reduce[node] = ChannelMap(m.writes, self._kept(m.writes, m.module), **factory)
            if m.reads:
                self.expand[node] = ChannelMap(self._kept(m.reads, m.module), m.reads, m.positions, **factory)
        for node, (name, channels) in traced.norms.items():
            self.narrow_norms[node] = self._narrow_norm(name, channels)
        self.composed = True
        self.train_wide = True
        self.alpha = 1.0

    def _kept(self, channels: int, name: str) -> int:
        k = int(channels * self.keep_ratio)
        if k == 0:
            raise UsageError(
                f"keep_ratio {self.keep_ratio} leaves none of the {channels} channels at '{name}'; give at least {1 / channels:.3g}"
            )
        return k

    def _narrow_norm(self, name: str, channels: int) -> nn.Module:
        wide = self.network.get_submodule(name)
        features = self._kept(channels, name) * (
            wide.num_features // channels
        )  # behind a flatten: k * positions
        narrow = type(wide)(features, wide.eps, wide.momentum, wide.affine, wide.track_running_stats)
        return narrow.to(next(self.network.parameters()))

    @property
    def alpha(self) -> float | tuple[float, ...]:
        """The blend weight: one number if all mixers share it, else one a mixer."""
        values = tuple(self._alpha.values())
        return values[0] if len(set(values)) == 1 else values

    @alpha.setter
    def alpha(self, value: float | Sequence[float] | Mapping[str, float]) -> None:
        nodes = {m.module: node for node, m in self.mixers.items() if m.reads}
        if isinstance(value, Mapping):
            if unknown := set(value) - set(nodes):
                raise UsageError(
                    f"alpha is given for {sorted(unknown)}; the mixers that have one are {list(nodes)}"
                )
            given = dict(self._alpha) | {nodes[name]: v for name, v in value.items()}
        elif isinstance(value, Sequence):
            if len(value) != len(nodes):
                raise UsageError(
                    f"alpha has {len(value)} values, but there are {len(nodes)} mixers that read a blend"
                )
            given = dict(zip(nodes.values(), value, strict=True))
        else:
            given = dict.fromkeys(nodes.values(), value)
        for node, v in given.items():
            if isinstance(v, bool) or not isinstance(v, int | float) or not 0 <= v <= 1:
                raise UsageError(f"alpha {v!r} at '{self.mixers[node].module}' is not a number in [0, 1]")
        self._alpha = {node: float(v) for node, v in given.items()}
        self._live = self._needed()

    @property
    def train_wide(self) -> bool:
        return self._train_wide

    @train_wide.setter
    def train_wide(self, value: bool) -> None:
        self._train_wide = bool(value)
        self.network.requires_grad_(self._train_wide)

    def _needed(self) -> set[tuple[str, str]]:
        """The (node, program) pairs that the output depends on at the present alpha, walking back from it.

        At alpha = 1 nothing narrow is among them, at alpha = 0 nothing wide before the last mixer.
        """
        output = next(n for n in self.graph.nodes if n.op == "output")
        needed: set[tuple[str, str]] = set()
        open_pairs = [(n, WIDE) for n in output.all_input_nodes]
        while open_pairs:
            node, program = open_pairs.pop()
            if (node.name, program) in needed:
                continue
            needed.add((node.name, program))
            a = self._alpha.get(node.name)
            if node.name not in self.mixers:
                programs = [program]
            elif a is None:  # the first mixer reads the input itself
                programs = [WIDE]
            else:
                programs = [WIDE] * (a > 0) + [NARROW] * (a < 1)
            open_pairs += [(n, p) for n in node.all_input_nodes for p in programs]
        return needed

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the blend at the present alpha, (N, C, H, W) -> (N, classes)."""
        return self.run(x)[0]

    def run(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The output, and what the narrow program holds behind each mixer, by module name (where it was computed)."""
        wide: dict[str, Tensor] = {}
        narrow: dict[str, Tensor] = {}
        behind_mixers: dict[str, Tensor] = {}
        for node in self.graph.nodes:
            if node.op == "placeholder":
                wide[node.name] = x
            elif node.op == "output":
                return fx.node.map_arg(node.args[0], lambda n: wide[n.name]), behind_mixers
            elif node.name in self.mixers:
                self._mix(self.mixers[node.name], node.all_input_nodes[0].name, wide, narrow)
                if node.name in narrow:
                    behind_mixers[node.target] = narrow[node.name]
            else:
                for program, values in ((WIDE, wide), (NARROW, narrow)):
                    if (node.name, program) in self._live:
                        values[node.name] = self._channelwise(node, program, values)
        raise AssertionError("a traced graph ends with an output node")

    def _mix(self, m: Mixer, source: str, wide: dict[str, Tensor], narrow: dict[str, Tensor]) -> None:
        """x = alpha * wide + (1 - alpha) * E(narrow);  z = W(x);  wide continues with z, narrow with R(z).

        What is constant for all images is multiplied first: W.E where nothing wide is read (alpha = 0), R.W
        where nothing wide is read behind.
        """
        layer = self.network.get_submodule(m.module)
        expand = self.expand[m.node] if m.reads else None
        reduce = self.reduce[m.node] if m.writes else None
        to_wide, to_narrow = ((m.node, p) in self._live for p in (WIDE, NARROW))
        a = self._alpha.get(m.node, 1.0)
        merge_expand = self.composed and a == 0
        merge_reduce = self.composed and to_narrow and not to_wide
        if a == 1:
            x = wide[source]
        elif merge_expand:
            x = narrow[source]
        elif a == 0:
            x = expand(narrow[source])
        else:
            x = torch.lerp(expand(narrow[source]), wide[source], a)  # E(n) + a * (w - E(n))
        weight = compose(layer.weight, reduce if merge_reduce else None, expand if merge_expand else None)
        bias = reduce.weight @ layer.bias if merge_reduce and layer.bias is not None else layer.bias
        z = (
            layer._conv_forward(x, weight, bias)
            if isinstance(layer, nn.Conv2d)
            else F.linear(x, weight, bias)
        )
        if to_wide:
            wide[m.node] = z
        if to_narrow:
            narrow[m.node] = z if merge_reduce else reduce(z)

    def _channelwise(self, node: fx.Node, program: str, values: dict[str, Tensor]) -> Tensor:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: values[n.name])
        if kwargs.get("inplace"):
            kwargs = {**kwargs, "inplace": False}
        if node.op == "call_module":
            own_copy = program == NARROW and node.name in self.narrow_norms
            module = self.narrow_norms[node.name] if own_copy else self.network.get_submodule(node.target)
            return module(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], node.target)(*args[1:], **kwargs)
        if node.op == "get_attr":
            return fx.graph_module._get_attr(self.network, node.target)
        return node.target(*args, **kwargs)
