"""A network as a list of nodes, with what each of them gives for an example input.

`torch.fx` writes a network down as a graph of calls. Layers are kept whole; everything else is taken apart.
The graph is taken once in eval and once in training mode, since flags like `training=self.training` are frozen
into it; the two must list the same nodes.
"""

from __future__ import annotations

import inspect
import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from alphaprune.errors import UsageError
from alphaprune.modes import in_eval_mode
from alphaprune.rules import is_stochastic_depth

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

    def last_read(self) -> dict[str, list[str]]:
        """By node name the nodes that it is the last to read, in either mode."""
        found: dict[str, list[str]] = {}
        later: set[str] = set()
        for node in reversed(self.nodes):
            found[node.name] = [n.name for n in node.all_input_nodes if n.name not in later]
            later.update(found[node.name])
        return found

    def module(self, node: fx.Node) -> nn.Module | None:
        """The layer a node calls, None if it calls something else."""
        return self.network.get_submodule(node.target) if node.op == "call_module" else None


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True  # a buffer may hold a number for each channel

    def is_leaf_module(self, m: nn.Module, name: str) -> bool:
        """Layers are kept whole, a layer with a forward() of its own that may use its weight otherwise is not."""
        if isinstance(m, MIXING_LAYERS):
            base = next(c for c in MIXING_LAYERS if isinstance(m, c))
            same = type(m).forward is base.forward
            return same and getattr(type(m), "_conv_forward", None) is getattr(base, "_conv_forward", None)
        return isinstance(m, NORMS) or is_stochastic_depth(m) or super().is_leaf_module(m, name)


def as_inputs(example: Any) -> tuple[Any, ...]:
    """One tensor, or a tuple of what forward() takes, as a tuple."""
    return tuple(example) if isinstance(example, tuple | list) else (example,)


def layers_in_place(network: nn.Module) -> list[str]:
    """Names of torch's own layers that work in place."""
    named = network.named_modules()
    return [
        n for n, m in named if type(m).__module__.startswith("torch.nn.") and getattr(m, "inplace", False)
    ]


def check_network(network: nn.Module) -> None:
    """Refuse what cannot be traced for a reason that can be named (raises UsageError)."""
    if not isinstance(network, nn.Module) or isinstance(network, torch.jit.ScriptModule):
        what = "is compiled by torch.jit" if isinstance(network, nn.Module) else "is no torch.nn.Module"
        raise UsageError(f"network, a {type(network).__name__}, {what}; pass the plain network")
    wrapped = "_orig_mod" if hasattr(network, "_orig_mod") else "module"  # torch.compile's
    if wrapped == "_orig_mod" or isinstance(network, nn.DataParallel):
        raise UsageError(f"network is wrapped in a {type(network).__name__}; pass network.{wrapped}")
    tensors = [*network.named_parameters(), *network.named_buffers()]
    if meta := [name for name, t in tensors if t.is_meta]:
        raise UsageError(
            f"'{meta[0]}' is on the meta device, where it has no numbers; load the weights first"
        )
    if lazy := [name for name, t in tensors if nn.parameter.is_lazy(t)]:
        raise UsageError(f"'{lazy[0]}' has no shape yet; run the network once on a batch first")


def trace(
    network: nn.Module, example_input: Tensor | tuple[Tensor, ...], in_place: Sequence[str] = ()
) -> Trace:
    """Trace a network and run it once on the example.

    Args:
        network: any module that `torch.fx` can trace. Its mode is restored.
        example_input: a batch as the network expects it, (N, C, H, W), or a tuple for several inputs.
        in_place: names of layers that were meant to work in place, and will not.

    Raises:
        UsageError: naming the place, if the network cannot be traced, does something else in training mode,
            or does not take the example.
    """
    inputs = as_inputs(example_input)
    _check_example(network, inputs)
    with in_eval_mode(network):
        graphs = {}
        for training in (True, False):
            network.train(training)
            graphs[training] = _graph(network, len(inputs), in_place)
        _check_same(graphs, type(network).__name__)
        values = _run(network, graphs[False], inputs)
    return Trace(network, graphs, values)


def _graph(network: nn.Module, inputs: int, in_place: Sequence[str]) -> fx.Graph:
    given = list(inspect.signature(network.forward).parameters.values())
    if any(p.kind is p.VAR_POSITIONAL for p in given):
        raise UsageError(f"{type(network).__name__}.forward() takes any number of inputs; name them")
    defaults = {p.name: p.default for p in given[inputs:] if p.default is not p.empty}
    try:
        graph = _Tracer().trace(network, defaults)
    except Exception as e:
        raise UsageError(
            f"{type(network).__name__} cannot be traced ({' '.join(str(e).split())[:160]}); "
            "control flow that depends on the data or its shape must leave forward()"
        ) from None
    _check_in_place(graph, in_place, type(network).__name__)
    arguments = [n for n in graph.nodes if n.op == "placeholder"]
    for node in reversed(graph.nodes):
        if "input" in node.kwargs and not node.args:  # conv(input=x)
            node.args, node.kwargs = (
                (node.kwargs["input"],),
                {k: v for k, v in node.kwargs.items() if k != "input"},
            )
        if node.users or node.op == "output" or node in arguments[:inputs]:
            continue
        if (
            node.op == "call_module"
            and next(network.get_submodule(node.target).parameters(), None) is not None
        ):
            raise UsageError(
                f"what layer '{node.target}' gives is not used; leave the call out of forward(), or set that part of the network to None"
            )
        graph.erase_node(node)
    for node in graph.nodes:
        if any(hasattr(taken, node.name) for taken in (nn.ModuleDict(), nn.ParameterDict())):
            node.name = (
                f"{node.name}_"  # branches are kept under nodes' names, which must not be such a method's
            )
    return graph


def _check_in_place(graph: fx.Graph, in_place: Sequence[str], name: str) -> None:
    """Nothing reads a tensor that was overwritten, since here nothing is."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        method = node.op == "call_method" and node.target.endswith("_") and not node.target.endswith("__")
        module = node.op == "call_module" and node.target in in_place
        function = node.op == "call_function" and (
            node.target in (operator.iadd, operator.isub, operator.imul, operator.itruediv, F.relu_)
        )
        if not (method or module or function or node.kwargs.get("inplace") is True) or not node.args:
            continue
        overwritten = node.args[0]
        later = (
            [u for u in overwritten.users if order[u] > order[node]]
            if isinstance(overwritten, fx.Node)
            else []
        )
        later = [u for u in later if not (u.op == "call_method" and u.target in ("size", "dim"))]
        if isinstance(overwritten, fx.Node) and (later or not node.users):
            raise UsageError(
                f"{name} overwrites '{overwritten.name}' at '{node.name}' and goes on using it; write it without the operation in place"
            )


def _check_example(network: nn.Module, inputs: tuple[Any, ...]) -> None:
    try:
        inspect.signature(network.forward).bind(*inputs)
    except TypeError as e:
        raise UsageError(
            f"example_input holds {len(inputs)} inputs, which {type(network).__name__}.forward() does not take ({e})"
        ) from None
    weight = next((p for p in network.parameters() if p.is_floating_point()), None)
    for x in inputs:
        if not isinstance(x, Tensor):
            raise UsageError(
                f"example_input holds a {type(x).__name__}; give a tensor, or a tuple of tensors"
            )
        if x.numel() == 0 or (x.is_floating_point() and not x.is_meta and not x.isfinite().all()):
            what = "is empty" if x.numel() == 0 else "holds NaN or infinite numbers"
            raise UsageError(f"example_input {what}; give a batch of images as the network expects it")
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
    read = {mode: [[r.name for r in n.all_input_nodes] for n in g.nodes] for mode, g in graphs.items()}
    if listed[True] != listed[False] or read[True] != read[False]:
        seen = {target for _, target in listed[False]}
        extra = [target for op, target in listed[True] if op == "call_module" and target not in seen]
        raise UsageError(
            f"{name} computes something else in training mode{f', with {extra[0]!r}' if extra else ''}; "
            "switch such parts off first, as in network.aux_logits = False and network.aux1 = network.aux2 = None"
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
