"""The network that runs wide and narrow in lockstep, blended by alpha.

The channel-wise program of a network runs twice, once with the pretrained C channels and once with k of them.
The mixers W are shared. With E (k -> C, "expand") and R (C -> k, "reduce"), both without bias,

    x = alpha * wide + (1 - alpha) * E(narrow)      what mixer W reads
    z = W(x)                                        wide continues with z, narrow with R(z)

A mixer that reads what is not narrowed, such as the image, has no E; one whose channels all stay, such as the last, has
no R, and both programs go on with z. At alpha = 0 only `R . W . E` is left of a mixer, one
ordinary layer k -> k: that is what `fold` writes down.

E has no bias because the bias would meet the next convolution's zero padding: inside the image it is added,
in the border it is not, and no single convolution does that.
"""

from __future__ import annotations

import copy
from collections import ChainMap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from numbers import Real
from typing import Any, get_args

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from alphaprune.channel_map import ChannelMap, compose, compose_bias
from alphaprune.compare import real_tensors
from alphaprune.errors import UsageError
from alphaprune.exact import full_float32
from alphaprune.few_channels import batch_norm
from alphaprune.graph import ChannelLayer, Mixer, attribute, read
from alphaprune.initialise import fit_branches, put_back
from alphaprune.modes import in_eval_mode
from alphaprune.recipe import LARGEST_RIDGE, RIDGE, Init, SelectBy
from alphaprune.selection import select
from alphaprune.trace import as_inputs, check_network, layers_in_place, trace
from alphaprune.widths import KeepRatio, Widths, call, choose, for_target, is_narrow

WIDE, NARROW = "wide", "narrow"
BATCHNORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
INITIAL_BATCH = 100  # images at once while the branches are fitted
_TRANSPOSED = {3: F.conv_transpose1d, 4: F.conv_transpose2d, 5: F.conv_transpose3d}


class ParallelModel(nn.Module):
    """A pretrained network with a narrow program beside it that takes over as alpha goes from 1 to 0.

    Args:
        network: a CNN that `torch.fx` can trace. It is copied, not changed.
        keep_ratio: share of the channels that the narrow program has, in (0, 1]: k = int(C * keep_ratio). Also a mapping
            from names of layers, of modules that contain them, or patterns, to shares; the last match counts, layers that
            nothing matches keep all, tied layers keep the largest of their shares. Or the `widths` of another model of such a network: its channels.
        example_input: a batch as the network expects it, (N, C, H, W), on the network's device; a tuple of tensors for
            several inputs.
        exclude: names or patterns, such as `layer4.*`, of layers whose output channels are all kept.
        round_to: k is rounded down to a multiple of this, to one multiple at least.
        for_macs, for_params: instead of keep_ratio, the share of the original's multiply-adds or parameters, in
            (0, 1), that the folded network may have; the largest ratio that keeps to it is found.
        init: what the branches start from: "random", the report's way; "select", where R takes the channels that are
            worth most and E gives them back; "least_squares", where E gives all channels as well as a linear map can.
        images: inputs as in training, (N, C, H, W), or a tuple for several inputs: a few thousand small ones. "least_squares" needs
            them, and "select" to go by variance.
        select_by: what a channel is worth to "select" and "least_squares": "variance", what it explains of all that layers read in the images;
            "norm", also where there are none, the squares of the weights that make it, scale it and read it.
        ridge: of "least_squares", above 0: what a step away from "select" costs, as a share of the mean second moment of what is
            read. As small as it is, it gives the best network before training; 0.1 gives a worse one that trains better.

    Attributes:
        keep_ratio: as given or found; None where channels were given.
        alpha: 1.0 at first. Set it to one number in [0, 1], to one number a mixer (a sequence), or to a mapping
            from layer names to numbers. Mixers that read nothing narrowed, as the first, have none.
        train_wide: whether the pretrained weights train (True at first), those that required a gradient. Running statistics of BatchNorm follow
            the batches in training mode either way.
        composed: whether products like R.W.E are formed before they meet the images (True). The function is the
            same; False is slower and there to compare with.
        hold_batchnorm: whether, in training, the BatchNorms of the wide program keep their running statistics, scale and
            shift (False).
        observer: called in each run with a mixer's key and what it reads before that is blended, wide (None where nothing wide is
            read) and narrow; None (as it is at first) to leave that.
        least_squares: by layer name what least squares did not reach, see `initialise.Fit`; None where nothing was fitted.
        structure, widths: which channels are tied and why some stay (see `graph`), and how many are left.

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

    def __init__(
        self,
        network: nn.Module,
        keep_ratio: KeepRatio | Widths | None = None,
        example_input: Tensor | tuple[Tensor, ...] | None = None,
        *,
        exclude: Sequence[str] = (),
        round_to: int = 1,
        for_macs: float | None = None,
        for_params: float | None = None,
        init: Init = "random",
        images: Tensor | tuple[Tensor, ...] | None = None,
        ridge: float = RIDGE,
        select_by: SelectBy = "variance",
    ):
        super().__init__()
        check_network(network)
        if inside := [name for name, m in network.named_modules() if isinstance(m, ParallelModel)]:
            where = f"holds one at '{inside[0]}'" if inside[0] else "is a ParallelModel"
            raise UsageError(f"network {where} already; pass the network it was made from")
        if isinstance(keep_ratio, Tensor):
            raise UsageError("keep_ratio is a tensor; the order is network, keep_ratio, example_input")
        if example_input is None:
            raise UsageError("example_input is missing; pass one batch of images as the network expects it")
        if sum(choice is not None for choice in (keep_ratio, for_macs, for_params)) > 1:
            raise UsageError("keep_ratio, for_macs and for_params exclude each other; give one of them")
        if exclude is not None and not isinstance(exclude, list | tuple | set | frozenset):
            what = f"the text {exclude!r}; give a list, [{exclude!r}]"
            raise UsageError(
                f"exclude is {what if isinstance(exclude, str) else f'{exclude!r}; give a list of names'}"
            )
        try:
            self.network = copy.deepcopy(network)
        except RuntimeError as e:  # such as a weight that a hook computes
            raise UsageError(
                f"{type(network).__name__} cannot be copied ({str(e).splitlines()[0][:120]}); "
                "remove weight norm and the like first, and the graph of an earlier backward pass"
            ) from None
        # An operation in place on what the wide program holds would change what R reads.
        self.in_place = layers_in_place(self.network)
        for name in self.in_place:
            self.network.get_submodule(name).inplace = False
        self.example_input = tuple(x.detach() for x in as_inputs(example_input) if isinstance(x, Tensor))
        self.structure = read(trace(self.network, example_input, self.in_place), exclude or ())
        if isinstance(keep_ratio, Widths):
            if keep_ratio.kept.shape != self.structure.ties.all.shape:
                raise UsageError(
                    "keep_ratio holds the widths of a model of another network; give those of this one's"
                )
            self.keep_ratio, self.widths = None, replace(keep_ratio, structure=self.structure)
        elif for_macs is not None:
            self.keep_ratio, self.widths = for_target(self.structure, for_macs, "multiply_adds", round_to)
        elif for_params is not None:
            self.keep_ratio, self.widths = for_target(self.structure, for_params, "parameters", round_to)
        else:
            self.keep_ratio = 0.34375 if keep_ratio is None else keep_ratio
            self.widths = choose(self.structure, self.keep_ratio, round_to)
        batches = _check_init(init, images, self.example_input, ridge, select_by)
        if init != "random" and not isinstance(keep_ratio, Widths):
            self.widths = select(self.widths, batches if select_by == "variance" else None)
        self._narrow = self._narrow_nodes()
        self._last_read = self.structure.trace.last_read()

        self.reduce, self.expand, self.narrow_layers = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()
        self.narrow_parameters = nn.ParameterDict()
        for m in self.mixers:
            self._add_branches(m)
        for layer in {x.key: x for x in self.structure.channel_layers.values()}.values():
            if layer.key in self._narrow:
                self._add_copy(layer, init)
        # What the network's owner has frozen stays so.
        self._frozen = {n for n, p in self.network.named_parameters() if not p.requires_grad}
        self.composed = True
        self.observer: Callable[[str, Tensor | None, Tensor], None] | None = None
        self._hold_batchnorm = False
        self.train_wide = True
        self.alpha = 1.0
        self._check_same_function(network)
        if init != "random":
            put_back(self)
        self.least_squares = (
            fit_branches([self], batches, ridge)[0].report if init == "least_squares" else None
        )

    @property
    def mixers(self) -> list[Mixer]:
        """The mixers, one entry a layer, in the order of their first use."""
        return self.structure.layers()

    def _narrow_nodes(self) -> set[str]:
        found: dict[str, bool] = {}
        for node in self.structure.trace.nodes:
            if is_narrow(self.structure, node, found):
                found[node.name] = True
        return set(found)

    def _add_branches(self, m: Mixer) -> None:
        weight = attribute(self.network, m.weight)
        factory = {"device": weight.device, "dtype": weight.dtype}
        if m.key in self._narrow:
            kept = len(self.widths.positions(m.ids))
            self.reduce[m.key] = ChannelMap(len(m.ids), kept, m.dim, groups=m.groups, **factory)
        if m.source in self._narrow:
            p = m.reads
            read = self.widths.read_by(m)
            self.expand[m.key] = ChannelMap(read, p.channels, m.dim, p.outer, p.inner, m.groups, **factory)
            self._pass_on_what_stays(m, self.expand[m.key].weight)

    def _pass_on_what_stays(self, m: Mixer, weight: Tensor) -> None:
        """Channels that a concatenation brings unnarrowed beside narrow ones start as themselves."""
        if m.groups > 1 or m.reads.outer > 1 or m.reads.inner > 1:
            return
        kept = self.widths.positions(m.ids_in)
        if len(kept) != weight.shape[1]:
            return
        for column, row in enumerate(kept.tolist()):
            if self.structure.is_fixed(m.ids_in[row]):
                with torch.no_grad():
                    weight[row], weight[:, column] = 0, 0
                    weight[row, column] = 1

    def _add_copy(self, layer: ChannelLayer, init: Init) -> None:
        kept = self.widths.held_by(layer)
        if not layer.is_parameter:
            narrow = narrowed(self.network.get_submodule(layer.name), kept)
            if init == "random" and hasattr(narrow, "reset_parameters"):
                narrow.reset_parameters()
            self.narrow_layers[layer.key] = narrow.requires_grad_(True)
        else:
            wide = attribute(self.network, layer.name)
            values = wide.detach().index_select(layer.dim, kept.to(wide.device)).clone()
            trains = isinstance(wide, nn.Parameter)
            self.narrow_parameters[layer.key] = nn.Parameter(values, requires_grad=trains)

    @torch.no_grad()
    def _check_same_function(self, network: nn.Module) -> None:
        """At alpha = 1 this is the network; that shows that the trace is right."""
        with in_eval_mode(network, self), full_float32():
            expected, found = (real_tensors(f(*self.example_input)) for f in (network, self))
        for a, b in zip(expected, found, strict=True):
            if a.is_meta:
                continue
            if a.shape != b.shape or not torch.allclose(
                a, b, rtol=1e-3, atol=1e-3 * float(a.abs().max()), equal_nan=True
            ):
                raise UsageError(
                    f"{type(network).__name__} does not compute the same once it is traced; look in forward() for operations in "
                    "place on a tensor that is used again, random numbers, or values that depend on the data"
                )

    @property
    def alpha(self) -> float | tuple[float, ...]:
        """The blend weight: one number if all mixers share it, else one a mixer."""
        values = tuple(self._alpha.values())
        return values[0] if len(set(values)) == 1 else values

    @alpha.setter
    def alpha(self, value: float | Sequence[float] | Mapping[str, float]) -> None:
        nodes = {m.name: m.key for m in self.mixers if m.key in self.expand}
        if isinstance(value, str):
            raise UsageError(f"alpha is the text {value!r}; give a number in [0, 1]")
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
            if isinstance(v, bool) or not isinstance(v, Real) or not 0 <= v <= 1:
                name = self.structure.mixers[node].name
                raise UsageError(f"alpha {v!r} at '{name}' is not a number in [0, 1]")
        self._alpha = {node: float(v) for node, v in given.items()}
        self._live = self._needed()

    @property
    def train_wide(self) -> bool:
        return self._train_wide

    @train_wide.setter
    def train_wide(self, value: bool) -> None:
        self._train_wide = bool(value)
        held = {f"{n}.{p}" for n in self._wide_batchnorms() for p in ("weight", "bias")}
        kept = self._frozen | held if self.hold_batchnorm else self._frozen
        for name, p in self.network.named_parameters():
            p.requires_grad_(self._train_wide and name not in kept)

    @property
    def hold_batchnorm(self) -> bool:
        return self._hold_batchnorm

    @hold_batchnorm.setter
    def hold_batchnorm(self, value: bool) -> None:
        self._hold_batchnorm = bool(value)
        self.train(self.training)
        self.train_wide = self._train_wide

    def _wide_batchnorms(self) -> dict[str, nn.Module]:
        return {n: m for n, m in self.network.named_modules() if isinstance(m, BATCHNORMS)}

    def train(self, mode: bool = True) -> ParallelModel:
        super().train(mode)
        if mode and self._hold_batchnorm:
            for norm in self._wide_batchnorms().values():
                norm.eval()
        return self

    def _needed(self) -> set[tuple[str, str]]:
        """The (node, program) pairs that the output depends on at the present alpha, walking back from it.

        At alpha = 1 nothing narrow is among them, at alpha = 0 nothing wide that is narrowed.
        """
        nodes = self.structure.trace.nodes
        output = next(n for n in nodes if n.op == "output")
        needed: set[tuple[str, str]] = set()
        open_pairs = [(n, WIDE) for n in output.all_input_nodes]
        while open_pairs:
            node, program = open_pairs.pop()
            if program == NARROW and node.name not in self._narrow:
                program = WIDE  # both programs meet there
            if (node.name, program) in needed:
                continue
            needed.add((node.name, program))
            mixer = self.structure.mixers.get(node.name)
            a = self._alpha.get(mixer.key) if mixer is not None else None
            if a is None:  # no mixer, or one that reads nothing narrowed
                programs = [WIDE if mixer is not None else program]
            else:
                programs = [WIDE] * (a > 0) + [NARROW] * (a < 1)
            open_pairs += [(n, p) for n in node.all_input_nodes for p in programs]
        return needed

    def forward(self, *inputs: Tensor) -> Any:
        """What the network gives, for the blend at the present alpha: (N, C, H, W) -> (N, classes), say."""
        return self._pass(inputs, None)

    def run(self, *inputs: Tensor) -> tuple[Any, dict[str, Tensor]]:
        """The output, and what the narrow program holds behind each reduced mixer, by layer name (where computed)."""
        behind_mixers: dict[str, Tensor] = {}
        return self._pass(inputs, behind_mixers), behind_mixers

    def _pass(self, inputs: tuple[Tensor, ...], behind_mixers: dict[str, Tensor] | None) -> Any:
        values: dict[str, dict[str, Any]] = {WIDE: {}, NARROW: {}}
        remaining = iter(inputs)
        for node in self.structure.trace.graphs[self.training].nodes:
            if node.op == "placeholder":
                values[WIDE][node.name] = next(remaining)
            elif node.op == "output":
                return fx.node.map_arg(node.args[0], lambda n: values[WIDE][n.name])
            elif node.name in self.structure.mixers:
                self._mix(node, self.structure.mixers[node.name], values)
                if behind_mixers is not None and node.name in values[NARROW]:
                    behind_mixers[self.structure.mixers[node.name].name] = values[NARROW][node.name]
            else:
                for program in (WIDE, NARROW):
                    if (node.name, program) in self._live:
                        narrow = program == NARROW
                        before = ChainMap(values[NARROW], values[WIDE]) if narrow else values[WIDE]
                        values[program][node.name] = self.channelwise(node, before, narrow)
            for name in self._last_read[
                node.name
            ]:  # its memory, still in the caches, is what the next layer writes to
                values[WIDE].pop(name, None)
                values[NARROW].pop(name, None)
        raise AssertionError("a traced graph ends with an output node")

    def _mix(self, node: fx.Node, m: Mixer, values: dict[str, dict[str, Any]]) -> None:
        """x = alpha * wide + (1 - alpha) * E(narrow);  z = W(x);  wide continues with z, narrow with R(z).

        What is constant for all images is multiplied first: W.E where nothing wide is read (alpha = 0), R.W
        where nothing wide is read behind.
        """
        to_wide, to_narrow = ((node.name, p) in self._live for p in (WIDE, NARROW))
        if not (to_wide or to_narrow):
            return
        wide, narrow, source = values[WIDE], values[NARROW], node.args[0].name
        if self.observer is not None and node.name in self.expand and source in narrow:
            self.observer(node.name, wide.get(source), narrow[source])
        weight = attribute(self.network, m.weight)
        bias = None if m.bias is None else attribute(self.network, m.bias)
        expand = self.expand[m.key] if m.key in self.expand else None
        reduce = self.reduce[m.key] if m.key in self.reduce else None
        a = self._alpha.get(m.key, 1.0)
        merge_expand = self.composed and a == 0
        merge_reduce = self.composed and to_narrow and not to_wide
        if a == 1:
            x = wide[source]
        elif merge_expand:
            x = narrow[source]
        elif a == 0:
            x = expand(narrow[source])
        else:
            x = expand(narrow[source], 1 - a)
            if (
                x.stride() != wide[source].stride()
            ):  # W's output has the memory order of x, and forward() may take a view of it
                x = torch.empty_like(wide[source]).copy_(x)
            x = x.add_(wide[source], alpha=a)
        weight = compose(
            weight, reduce if merge_reduce else None, expand if merge_expand else None, m.groups, m.transposed
        )
        z = self.call_mixer(node, x, weight, compose_bias(bias, reduce) if merge_reduce else bias)
        if to_wide:
            wide[node.name] = z
        if to_narrow:
            narrow[node.name] = z if merge_reduce else reduce(z)

    def call_mixer(self, node: fx.Node, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """A mixing layer, or a function, with these weights in place of its own."""
        if node.op == "call_function":
            args = (x, weight, bias, *node.args[3:])
            return node.target(*args, **{k: v for k, v in node.kwargs.items() if k not in ("weight", "bias")})
        layer = self.network.get_submodule(node.target)
        if isinstance(layer, nn.Linear):
            return F.linear(x, weight, bias)
        if not layer.transposed:
            return layer._conv_forward(x, weight, bias)
        function = _TRANSPOSED[weight.dim()]
        return function(
            x, weight, bias, layer.stride, layer.padding, layer.output_padding, layer.groups, layer.dilation
        )

    def channelwise(self, node: fx.Node, values: Mapping[str, Any], narrow: bool) -> Any:
        """A node that is no mixer, run on what `values` holds of those before it, with the narrow copies or without."""
        layer = self.structure.channel_layers.get(node.name)
        if node.op == "get_attr":
            own = narrow and layer is not None and layer.key in self.narrow_parameters
            return self.narrow_parameters[layer.key] if own else attribute(self.network, node.target)
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: values[n.name])
        module = None
        if node.op == "call_module":
            own = narrow and layer is not None and layer.key in self.narrow_layers
            module = self.narrow_layers[layer.key] if own else self.network.get_submodule(node.target)
            if own and isinstance(module, nn.BatchNorm2d) and not kwargs:
                return batch_norm(module, *args)
        return call(node, module, args, kwargs)


def _check_init(
    init: str,
    images: Tensor | tuple[Tensor, ...] | None,
    example: tuple[Tensor, ...],
    ridge: float,
    select_by: str,
) -> list[tuple[Tensor, ...]] | None:
    """The images in batches, None if there are none."""
    if init not in get_args(Init):
        raise UsageError(f"init is {init!r}; use {', '.join(get_args(Init))}")
    if isinstance(ridge, bool) or not isinstance(ridge, Real) or not 0 < ridge <= LARGEST_RIDGE:
        raise UsageError(f"ridge is {ridge!r}; give a number above 0, such as 0.1, {LARGEST_RIDGE:g} at most")
    if ridge != RIDGE and init != "least_squares":
        raise UsageError(f"ridge is for init='least_squares'; init is {init!r}")
    if select_by not in get_args(SelectBy):
        raise UsageError(f"select_by is {select_by!r}; use {', '.join(get_args(SelectBy))}")
    if select_by != "variance" and init == "random":
        raise UsageError(
            f"select_by={select_by!r} is for init='select' and init='least_squares'; give one of them"
        )
    if images is not None and init == "random":
        raise UsageError(
            "images are for init='select' and init='least_squares'; give one of them, or no images"
        )
    if init == "least_squares" and images is None:
        raise UsageError("init='least_squares' needs images; pass a few thousand of the training images")
    if images is None:
        return None
    given = as_inputs(images)
    if len(given) != len(example):
        raise UsageError(
            f"images hold {len(given)} input{'s' * (len(given) != 1)}, example_input {len(example)}; give as many, a tuple of tensors"
        )
    for x, like in zip(given, example, strict=True):
        if not isinstance(x, Tensor):
            raise UsageError(f"images is a {type(x).__name__}; give a tensor, torch.cat of some batches")
        if x.device != like.device:
            raise UsageError(
                f"images are on {x.device}, example_input on {like.device}; move one to the other"
            )
        if x.shape[1:2] != like.shape[1:2] or x.dim() != like.dim() or x.dtype != like.dtype or not len(x):
            expected = f"(N, {', '.join(str(n) for n in like.shape[1:])}) {like.dtype}"
            raise UsageError(
                f"images are {tuple(x.shape)} {x.dtype}; give some like example_input, {expected}"
            )
        if x.is_floating_point() and not x.isfinite().all():
            raise UsageError("images hold NaN or infinite numbers; leave those out")
    if len({len(x) for x in given}) > 1:
        raise UsageError(
            f"images hold {' and '.join(str(len(x)) for x in given)} images; give as many of each"
        )
    return list(zip(*(x.detach().split(INITIAL_BATCH) for x in given), strict=True))


def narrowed(layer: nn.Module, kept: Tensor) -> nn.Module:
    """A copy of a layer that holds a number, or a filter, for each channel, with only the channels kept.

    Args:
        layer: a normalisation, depthwise convolution or PReLU.
        kept: places of the channels that stay, ascending.
    """
    narrow = copy.deepcopy(layer)
    for tensors in (narrow._parameters, narrow._buffers):
        for name, t in tensors.items():
            if t is not None and t.dim() > 0:
                values = t.detach().index_select(0, kept.to(t.device)).clone()
                is_parameter = isinstance(t, nn.Parameter)
                tensors[name] = nn.Parameter(values, t.requires_grad) if is_parameter else values
    k = len(kept)
    for name in ("num_features", "num_channels", "num_parameters", "in_channels", "out_channels"):
        if hasattr(narrow, name):
            setattr(narrow, name, k)
    if isinstance(narrow, nn.LayerNorm):
        narrow.normalized_shape = (k,)
    elif hasattr(narrow, "groups"):
        narrow.groups = k
    return narrow
