"""A convolution and what follows it in one kernel of oneDNN, where the CPU has that.

    y = max(0, W x + b)        instead of z = W x + b, written to memory, then read again for max(0, z)
    y = max(0, W x + b + r)    at the end of a residual block

The narrower a network, the more of its time goes to passes over what lies between the convolutions: those of n channels cost n where a
convolution costs n^2.
"""

from __future__ import annotations

import operator
from functools import cache

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

SIZES = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
_RELU = {F.relu, torch.relu, torch.relu_, "relu", "relu_"}
# In place only on what nobody reads later: `trace` refuses the rest.
_ADD = {operator.add, operator.iadd, torch.add, "add", "add_"}
_IN_PLACE = {"iadd", "isub", "imul", "itruediv", "setitem"}  # of the module operator; torch's end with _


class ConvRelu(nn.Conv2d):
    """`relu(conv(x))`, or `relu(conv(x) + residual)`, in one kernel for images on a CPU, else one after the other.

    Gradients with respect to the images, compilers and exporters get the two operations, which are what they know.

    Args:
        conv: the convolution; its weights are shared.
    """

    def __init__(self, conv: nn.Conv2d):
        sizes = {name: getattr(conv, name) for name in SIZES}
        super().__init__(**sizes, bias=conv.bias is not None, device="meta")  # it makes no weights of its own
        self.weight, self.bias = conv.weight, conv.bias
        self.train(conv.training)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if not self._has_kernel(x, residual):
            z = super().forward(x)
            return F.relu(z if residual is None else z + residual)
        kernel = torch.ops.mkldnn._convolution_pointwise
        how = (self.weight, self.bias, self.padding, self.stride, self.dilation, self.groups)
        if residual is None:
            return kernel(x, *how, "relu", [], None)
        return kernel.binary(x, residual, *how, "add", 1.0, "relu", [], None)

    def _has_kernel(self, x: Tensor, residual: Tensor | None) -> bool:
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return False
        if not isinstance(x, Tensor) or x.dim() != 4 or x.numel() == 0:  # such as what torch.fx traces with
            return False
        if residual is not None and (not isinstance(residual, Tensor) or residual.shape != self._shape(x)):
            return False  # the kernel does not broadcast
        tensors = [t for t in (x, residual, self.weight, self.bias) if t is not None]
        return (
            all(t.device.type == "cpu" and t.dtype == x.dtype for t in tensors)
            and not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))
            and _knows(x.dtype)
        )

    def _shape(self, x: Tensor) -> tuple[int, ...]:
        """Of what the convolution gives for x."""
        sides = zip(x.shape[2:], self.kernel_size, self.stride, self.padding, self.dilation, strict=True)
        return (
            len(x),
            self.out_channels,
            *((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sides),
        )


@cache
def _knows(dtype: torch.dtype) -> bool:
    """Whether this machine's oneDNN has the kernel for numbers of this type."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_convolution_pointwise"):
        return False
    return dtype == torch.float32 or (
        dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def in_one_kernel(network: fx.GraphModule) -> None:
    """Put every convolution that a ReLU alone follows, also behind the addition of a residual, into one layer with it.

    Args:
        network: in eval mode; it is changed.
    """
    for node in list(network.graph.nodes):
        if not _is_relu(node, network):
            continue
        before = node.args[0]
        if _is_conv(before, network):
            _merge(network, before, before, node)
        elif _is_sum(before):
            place = {n: i for i, n in enumerate(network.graph.nodes)}
            for conv in sorted(before.args, key=place.__getitem__, reverse=True):
                if _is_conv(conv, network) and not _changes_in_between(network, conv, before):
                    _merge(network, conv, before, node)
                    break
    network.graph.lint()
    network.recompile()


def _merge(network: fx.GraphModule, conv: fx.Node, last: fx.Node, relu: fx.Node) -> None:
    """One layer in the place of the convolution, or of the sum behind it, where all that it reads is there."""
    network.set_submodule(conv.target, ConvRelu(network.get_submodule(conv.target)))
    residual = () if last is conv else tuple(a for a in last.args if a is not conv)
    with network.graph.inserting_before(last):
        merged = network.graph.call_module(conv.target, (*conv.args, *residual))
    relu.replace_all_uses_with(merged)
    for node in dict.fromkeys((relu, last, conv)):
        network.graph.erase_node(node)


def _is_relu(node: fx.Node, network: fx.GraphModule) -> bool:
    if not node.args or not isinstance(node.args[0], fx.Node):
        return False
    if node.op == "call_module":
        layer = network.get_submodule(node.target)
        return type(layer) is nn.ReLU and not _hooked(layer)
    return node.target in _RELU


def _is_conv(node: fx.Node, network: fx.GraphModule) -> bool:
    """Whether a node is a convolution that the kernel knows, called here alone, and that one node alone reads."""
    if node.op != "call_module" or len(node.users) != 1 or len(node.args) != 1:
        return False
    layer = network.get_submodule(node.target)
    known = type(layer) is nn.Conv2d and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    return (
        known
        and not _hooked(layer)  # which spectral_norm and the like compute the weight with
        and sum(n.op == "call_module" and n.target == node.target for n in network.graph.nodes) == 1
    )


def _is_sum(node: fx.Node) -> bool:
    """Whether a node, which one node alone reads, adds what two others give, and nothing else."""
    added = [a for a in node.args if isinstance(a, fx.Node)]
    return (
        node.target in _ADD
        and len(node.users) == 1
        and not node.kwargs
        and len(set(added)) == len(node.args) == 2
    )


def _changes_in_between(network: fx.GraphModule, first: fx.Node, last: fx.Node) -> bool:
    """Whether anything in place runs between two nodes: the first, moved to the last, could read something else."""
    nodes = list(network.graph.nodes)
    for node in nodes[nodes.index(first) + 1 : nodes.index(last)]:
        if node.op == "call_module":
            parts = network.get_submodule(node.target).modules()
            changes = any(getattr(m, "inplace", False) for m in parts)
        else:
            name = getattr(node.target, "__name__", str(node.target))
            changes = name.rstrip("_") != name or name in _IN_PLACE or "inplace" in node.kwargs
        if changes:
            return True
    return False


def _hooked(layer: nn.Module) -> bool:
    return bool(layer._forward_hooks or layer._forward_pre_hooks)
