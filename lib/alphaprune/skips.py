"""Skip connections annealed away: the other reading of "skip connections" in the report's plan.

An addition of a network joins a main path, with several mixers, and a shortcut with fewer. Weighted by alpha,

    x = main + alpha * shortcut

the network loses its shortcuts as alpha goes from 1 to 0 and trains on without them. At 0 they can be taken out: what is
left is a plain chain of layers. Channels stay as they are; `ParallelModel` narrows them, before or after.
"""

from __future__ import annotations

import copy
import operator
from typing import Any

import torch
from torch import Tensor, fx, nn

from alphaprune.certificate import Certificate
from alphaprune.compare import real_tensors
from alphaprune.errors import UsageError
from alphaprune.exact import full_float32
from alphaprune.fold import compare
from alphaprune.modes import in_eval_mode
from alphaprune.trace import MIXING_LAYERS, Trace, as_inputs, layers_in_place, trace

ADDITIONS = {operator.add, operator.iadd, torch.add, "add", "add_"}


class SkipModel(nn.Module):
    """A network whose shortcuts are weighted by alpha.

    Args:
        network: a network with skip connections that `torch.fx` can trace. It is copied, not changed.
        example_input: a batch as the network expects it, or a tuple of tensors.

    Attributes:
        alpha: 1.0 at first, which is the network itself; a number in [0, 1].
        shortcuts: for each weighted addition its node's name and the name of the node that the shortcut ends with.

    Raises:
        UsageError: if the network cannot be traced or has no shortcut.
    """

    def __init__(self, network: nn.Module, example_input: Tensor | tuple[Tensor, ...]):
        super().__init__()
        self.network = copy.deepcopy(network)
        self.in_place = layers_in_place(self.network)
        for name in self.in_place:  # what an operation in place overwrites may be the start of a shortcut
            self.network.get_submodule(name).inplace = False
        self.trace = trace(self.network, example_input, self.in_place)
        self.shortcuts = _shortcuts(self.trace)
        if not self.shortcuts:
            raise UsageError(
                f"{type(network).__name__} has no shortcut: no addition joins a longer and a shorter path"
            )
        self.alpha = 1.0

    @property
    def alpha(self) -> float:
        """The weight of the shortcuts."""
        return self._alpha

    @alpha.setter
    def alpha(self, value: float) -> None:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            raise UsageError(f"alpha {value!r} is not a number in [0, 1]")
        self._alpha = float(value)
        self._graphs = {mode: self._weighted(mode) for mode in (True, False)}

    def _weighted(self, training: bool) -> fx.GraphModule:
        """main + alpha * shortcut at every shortcut; at alpha = 0 what only shortcuts need is left out."""
        graph = fx.Graph()
        graph.output(graph.graph_copy(self.trace.graphs[training], {}))
        # Which operand is the shortcut, before what stands for a sum takes its place in the next one.
        first = {
            node: node.args[0].name == self.shortcuts[node.name]
            for node in graph.nodes
            if node.name in self.shortcuts
        }
        for node, is_first in first.items():
            shortcut, main = node.args if is_first else reversed(node.args)
            with graph.inserting_before(node):
                weighted = main
                if self._alpha > 0:
                    scaled = graph.call_function(operator.mul, (shortcut, self._alpha))
                    weighted = graph.call_function(operator.add, (main, scaled))
            node.replace_all_uses_with(weighted)
            graph.erase_node(node)
        for node in reversed(graph.nodes):
            if not node.users and node.op not in ("placeholder", "output"):
                graph.erase_node(node)
        return fx.GraphModule(self.network, graph, type(self.network).__name__)

    def forward(self, *inputs: Tensor) -> Any:
        """What the network gives with its shortcuts weighted by alpha."""
        return self._graphs[self.training](*inputs)


@torch.no_grad()
def remove_skips(
    model: SkipModel, images: Tensor | tuple[Tensor, ...], force: bool = False
) -> tuple[nn.Module, Certificate]:
    """Take the shortcuts out at alpha = 0.

    Args:
        model: the model; it is not changed.
        images: what the certificate is measured on.
        force: remove them at an alpha above 0 too; the certificate then says how far off that is.

    Returns:
        The network without shortcuts, in eval mode: a `torch.fx.GraphModule` with the network's own layers, those
        that only shortcuts used left out, and generated code for forward(). And the certificate.

    Raises:
        UsageError: if alpha is not 0 and `force` is not set.
    """
    if model.alpha != 0 and not force:
        raise UsageError(
            f"alpha is {model.alpha}, the shortcuts still count; set model.alpha = 0, or remove_skips(..., force=True)"
        )
    bare = copy.deepcopy(model)
    bare.alpha = 0.0
    plain = bare._graphs[False]
    plain.delete_all_unused_submodules()
    for name in model.in_place:
        if name in dict(plain.named_modules()):
            plain.get_submodule(name).inplace = True
    inputs = as_inputs(images)
    with in_eval_mode(model), full_float32():
        outputs, found = (real_tensors(f(*inputs)) for f in (model, plain.eval()))
    return plain.requires_grad_(True), compare(plain, outputs, found, (), len(inputs[0]), model.alpha)


def _shortcuts(traced: Trace) -> dict[str, str]:
    """By addition the operand that passes fewer mixers behind the point where both paths part."""
    before: dict[str, frozenset[str]] = {}  # mixers that a node's value went through
    found: dict[str, str] = {}
    for node in traced.nodes:
        own = {node.name} if isinstance(traced.module(node), MIXING_LAYERS) else set()
        before[node.name] = frozenset(own).union(*(before[n.name] for n in node.all_input_nodes))
        tensors = [n for n in node.all_input_nodes if isinstance(traced.values[n.name], Tensor)]
        plain = (
            node.op != "output" and node.target in ADDITIONS and not node.kwargs
        )  # torch.add takes a factor
        if plain and len(tensors) == 2:
            a, b = tensors
            only_a, only_b = (len(before[x.name] - before[y.name]) for x, y in ((a, b), (b, a)))
            if only_a != only_b:
                found[node.name] = (a if only_a < only_b else b).name
    return found
