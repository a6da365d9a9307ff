"""Which nodes of a traced network mix channels, which keep them apart, and what a mixer reads.

`torch.fx` turns the network into a list of nodes. A *mixer* (convolution, linear layer) computes every output
channel from all input channels; everything between mixers treats each channel on its own, so it can run on
fewer channels without a change. That is all that pruning needs to know. A kind of node is covered by adding it
to one of the tables below; a node that no table covers is an error that names it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn import functional as F

from alphaprune.errors import UsageError

MIXERS = (nn.Conv2d, nn.Linear)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
CHANNELWISE_MODULES = (
    nn.Identity, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SiLU, nn.GELU, nn.Hardswish, nn.Sigmoid, nn.Hardsigmoid,
    nn.Tanh, nn.Softplus, nn.Mish, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d,
    nn.Dropout, nn.Dropout2d, nn.Flatten,
)  # fmt: skip
CHANNELWISE_FUNCTIONS = (
    torch.relu, F.relu, F.relu6, F.leaky_relu, F.elu, F.silu, F.gelu, F.hardswish, torch.sigmoid, F.sigmoid,
    F.hardsigmoid, torch.tanh, F.tanh, F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d,
    F.dropout, F.dropout2d, torch.flatten,
)  # fmt: skip
CHANNELWISE_METHODS = ("relu", "sigmoid", "tanh", "flatten", "contiguous")


@dataclass(frozen=True)
class Mixer:
    """A convolution or linear layer, and how the narrow program meets it.

    Attributes:
        node: name of its node in the traced graph.
        module: qualified name of its module in the network.
        reads: channels C of the narrowed tensor it reads, 0 if it reads the network's input as it is.
        positions: entries that a flatten put behind each channel it reads (1 for a convolution).
        writes: its output channels if the narrow program goes on behind it, 0 for the last mixer.
    """

    node: str
    module: str
    reads: int
    positions: int
    writes: int


@dataclass(frozen=True)
class TracedNetwork:
    """The node list of a network and the role of every node that computes something.

    `mixers` and `norms` map node names to the mixer, and to a normalisation of which the narrow program has a copy:
    its module's name and the channels of the tensor it normalises. All other nodes are channel-wise, or lie
    outside the part that is narrowed.
    """

    graph: fx.Graph
    mixers: dict[str, Mixer]
    norms: dict[str, tuple[str, int]]


def trace(network: nn.Module, example_input: Tensor) -> TracedNetwork:
    """Trace a network and find the role of each node.

    Args:
        network: any module that `torch.fx` can trace, with one input and one output.
        example_input: a batch as the network expects it, (N, C, H, W); its values do not matter.

    Returns:
        The traced network.

    Raises:
        UsageError: naming the node, if the network cannot be traced or a node is covered by no rule.
    """
    try:
        graph = fx.Tracer().trace(network)
    except Exception as e:
        raise UsageError(
            f"{type(network).__name__} cannot be traced ({' '.join(str(e).split())[:160]}); "
            "control flow that depends on data must leave forward()"
        ) from None
    traced = fx.GraphModule(network, graph)
    was_training = network.training
    traced.eval()
    try:
        with torch.no_grad():
            ShapeProp(traced).propagate(example_input)
    except Exception as e:
        cause = str(e.__cause__ or e).strip().splitlines()[0]
        raise UsageError(
            f"example_input {tuple(example_input.shape)} {example_input.dtype} on {example_input.device} does not "
            f"pass through the network: {cause}"
        ) from None
    finally:
        network.train(was_training)

    before_output = _reaches_output_without_mixer(traced)
    mixers: dict[str, Mixer] = {}
    norms: dict[str, tuple[str, int]] = {}
    channels: dict[fx.Node, int] = {}  # of the nodes in the narrow program: their channels in the wide one
    seen: dict[str, str] = {}
    for node in graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        module = traced.get_submodule(node.target) if node.op == "call_module" else None
        if module is not None and next(module.parameters(), None) is not None:
            if node.target in seen:
                raise UsageError(f"module '{node.target}' is used twice; give each use a module of its own")
            seen[node.target] = node.name
        narrowed = [n for n in node.all_input_nodes if n in channels]
        if isinstance(module, MIXERS):
            source = node.all_input_nodes[0]
            _check_mixer(node, module, source)
            out = module.out_channels if isinstance(module, nn.Conv2d) else module.out_features
            reads = channels.get(source, 0)
            width = module.in_channels if isinstance(module, nn.Conv2d) else module.in_features
            last = node in before_output
            mixers[node.name] = Mixer(
                node.name, node.target, reads, width // reads if reads else 1, 0 if last else out
            )
            if not last:
                channels[node] = out
        elif narrowed:
            _check_channelwise(node, module, narrowed)
            channels[node] = channels[narrowed[0]]
            if isinstance(module, NORMS):
                norms[node.name] = (node.target, channels[node])
    if not any(m.reads for m in mixers.values()):
        raise UsageError(
            f"{type(network).__name__} has fewer than two convolutions or linear layers in a row: nothing to prune"
        )
    return TracedNetwork(graph, mixers, norms)


def _reaches_output_without_mixer(traced: fx.GraphModule) -> set[fx.Node]:
    """Nodes from which a path leads to the output that passes no further mixer."""
    found: set[fx.Node] = set()
    for node in reversed(traced.graph.nodes):
        if node.op == "output":
            found.update(node.all_input_nodes)
        elif node in found:
            is_mixer = node.op == "call_module" and isinstance(traced.get_submodule(node.target), MIXERS)
            if not is_mixer:
                found.update(node.all_input_nodes)
    return found


def _check_mixer(node: fx.Node, module: nn.Module, source: fx.Node) -> None:
    if isinstance(module, nn.Conv2d) and module.groups != 1:
        raise UsageError(
            f"layer '{node.target}' is a grouped convolution (groups={module.groups}); no rule covers it yet"
        )
    if isinstance(module, nn.Linear) and len(source.meta["tensor_meta"].shape) != 2:
        raise UsageError(
            f"linear layer '{node.target}' reads a tensor of more than two dimensions; flatten it first"
        )


def _check_channelwise(node: fx.Node, module: nn.Module | None, narrowed: list[fx.Node]) -> None:
    what = (
        f"'{node.target}' ({type(module).__name__})"
        if module is not None
        else f"'{node.name}' ({_name(node.target)})"
    )
    covered = (
        isinstance(module, CHANNELWISE_MODULES + NORMS)
        if node.op == "call_module"
        else (node.op == "call_function" and node.target in CHANNELWISE_FUNCTIONS)
        or (node.op == "call_method" and node.target in CHANNELWISE_METHODS)
    )  # fmt: skip
    if not covered or len(node.all_input_nodes) != 1:
        raise UsageError(
            f"node {what} is covered by no rule of the lockstep: it may mix channels or join branches; prune a part of the network without it"
        )
    before, after = narrowed[0].meta["tensor_meta"].shape, node.meta["tensor_meta"].shape
    if before[0] != after[0] or after[1] % before[1]:
        raise UsageError(
            f"node {what} turns {tuple(before)} into {tuple(after)} and does not keep channels apart; flatten from dimension 1"
        )


def _name(target: object) -> str:
    return getattr(target, "__name__", str(target))
