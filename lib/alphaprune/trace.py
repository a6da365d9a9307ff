"""A network as a list of nodes, with what each of them gives for an example input.

`torch.fx` writes a network down as a graph of calls. Layers are kept whole; everything else is taken apart.
The graph is taken once in eval and once in training mode, since flags like `training=self.training` are frozen
into it; the two must list the same nodes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map
from torchvision.ops import StochasticDepth

from alphaprune.errors import UsageError

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
MIXING_LAYERS = (*CONVOLUTIONS, *TRANSPOSED, nn.Linear)
NORMS = (
    nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.LayerNorm, nn.GroupNorm,
    nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d,
)  # fmt: skip


@dataclass(frozen=True)
class Trace:
    """The node list of a network.

    Attributes:
        network: the network that was traced.
        graphs: the graph in eval mode, by False, and in training mode, by True; same nodes, other flags.
        values: by node name what it gives for the example input: a tensor without content (on the meta device)
            for a tensor, the value itself for a number, tuples of these.
    """

    network: nn.Module
    graphs: dict[bool, fx.Graph]
    values: dict[str, Any]

    @property
    def nodes(self) -> list[fx.Node]:
        return list(self.graphs[False].nodes)

    def module(self, node: fx.Node) -> nn.Module | None:
        """The layer a node calls, None if it calls something else."""
        return self.network.get_submodule(node.target) if node.op == "call_module" else None


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, name: str) -> bool:
        """Layers are kept whole, a layer with a forward() of its own that may use its weight otherwise is not."""
        if isinstance(m, MIXING_LAYERS):
            base = next(c for c in MIXING_LAYERS if isinstance(m, c))
            return type(m).forward is base.forward
        return isinstance(m, (*NORMS, StochasticDepth)) or super().is_leaf_module(m, name)


def as_inputs(example: Any) -> tuple[Any, ...]:
    """One tensor, or a tuple of what forward() takes, as a tuple."""
    return tuple(example) if isinstance(example, tuple | list) else (example,)


def trace(network: nn.Module, example_input: Tensor | tuple[Tensor, ...]) -> Trace:
    """Trace a network and run it once on the example.

    Args:
        network: any module that `torch.fx` can trace. Its mode is restored.
        example_input: a batch as the network expects it, (N, C, H, W), or a tuple for several inputs.

    Raises:
        UsageError: naming the place, if the network cannot be traced, does something else in training mode,
            or does not take the example.
    """
    inputs = as_inputs(example_input)
    _check_example(network, inputs)
    was_training = {m: m.training for m in network.modules()}
    try:
        graphs = {}
        for training in (False, True):
            network.train(training)
            graphs[training] = _graph(network)
        network.eval()
        _check_same(graphs, type(network).__name__)
        values = _run(network, graphs[False], inputs)
    finally:
        for module, mode in was_training.items():
            module.training = mode
    return Trace(network, graphs, values)


def _graph(network: nn.Module) -> fx.Graph:
    try:
        graph = _Tracer().trace(network)
    except Exception as e:
        raise UsageError(
            f"{type(network).__name__} cannot be traced ({' '.join(str(e).split())[:160]}); "
            "control flow that depends on data must leave forward()"
        ) from None
    for node in reversed(graph.nodes):
        if not node.users and node.op not in ("placeholder", "output"):
            graph.erase_node(node)
    return graph


def _check_example(network: nn.Module, inputs: tuple[Any, ...]) -> None:
    weight = next(network.parameters(), None)
    for x in inputs:
        if not isinstance(x, Tensor):
            raise UsageError(
                f"example_input holds a {type(x).__name__}; give a tensor, or a tuple of tensors"
            )
        if weight is not None and x.device != weight.device:
            raise UsageError(
                f"example_input is on {x.device}, the network on {weight.device}; move one to the other"
            )
        if weight is not None and x.is_floating_point() and x.dtype != weight.dtype:
            raise UsageError(
                f"example_input is {x.dtype}, the network's weights are {weight.dtype}; convert one to the other"
            )


def _check_same(graphs: dict[bool, fx.Graph], name: str) -> None:
    listed = {
        mode: [(n.op, re.sub(r"^_tensor_constant\d+$", "constant", str(n.target))) for n in g.nodes]
        for mode, g in graphs.items()
    }
    if listed[True] == listed[False]:
        for node, same in zip(graphs[True].nodes, graphs[False].nodes, strict=True):
            node.name = same.name  # tensors made in forward() are numbered on
    else:
        seen = {target for _, target in listed[False]}
        extra = [target for op, target in listed[True] if op == "call_module" and target not in seen]
        raise UsageError(
            f"{name} computes something else in training mode{f', with {extra[0]!r}' if extra else ''}; "
            "switch such parts off first, as in network.aux_logits = False"
        )


@torch.no_grad()
def _run(network: nn.Module, graph: fx.Graph, inputs: tuple[Any, ...]) -> dict[str, Any]:
    """What every node gives for the inputs, tensors as shapes."""
    values: dict[str, Any] = {}
    current: list[fx.Node] = []

    class Recorder(fx.Interpreter):
        def run_node(self, node: fx.Node) -> Any:
            current[:] = [node]
            value = super().run_node(node)
            values[node.name] = tree_map(
                lambda v: torch.empty_like(v, device="meta") if isinstance(v, Tensor) else v, value
            )
            return value

    try:
        Recorder(fx.GraphModule(network, graph)).run(*inputs)
    except Exception as e:
        where = f" at '{current[0].target}'" if current and current[0].op == "call_module" else ""
        shapes = ", ".join(f"{tuple(x.shape)} {x.dtype}" for x in inputs)
        raise UsageError(
            f"example_input {shapes} does not pass through the network{where}: {str(e).strip().splitlines()[0]}"
        ) from None
    return values
