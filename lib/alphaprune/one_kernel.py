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
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn import functional as F

SIZES = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
_RELU = {F.relu, torch.relu, torch.relu_, "relu", "relu_"}
_ADD = {operator.add, operator.iadd, torch.add, "add", "add_"}


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
        tensors = [t for t in (x, residual, self.weight) if t is not None]
        return (
            x.dim() == 4
            and x.numel() > 0
            and all(t.device.type == "cpu" and t.dtype == x.dtype for t in tensors)
            and _knows(x.dtype)
            and not torch.compiler.is_compiling()
            and not torch.jit.is_tracing()
            and not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))
        )


@cache
def _knows(dtype: torch.dtype) -> bool:
    """Whether this machine's oneDNN has the kernel for numbers of this type."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_convolution_pointwise"):
        return False
    return dtype == torch.float32 or (
        dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


@torch.no_grad()
def in_one_kernel(network: fx.GraphModule, inputs: tuple[Tensor, ...]) -> None:
    """Put every convolution that a ReLU alone follows, also behind the addition of a residual, into one layer with it.

    Args:
        network: in eval mode; it is changed.
        inputs: examples, by which shapes are known.
    """
    ShapeProp(network).propagate(*inputs)
    for node in list(network.graph.nodes):
        if not _is_relu(node, network):
            continue
        before = node.args[0]
        if (conv := _conv(before, network)) is not None:
            _merge(network, conv, node, (conv.args[0],), ())
        elif _is_sum(before):
            pairs = [before.args, before.args[::-1]]
            for z, residual in sorted(pairs, key=lambda pair: _place(network, pair[0]), reverse=True):
                if z is not residual and (conv := _conv(z, network)) is not None:
                    _merge(network, conv, node, (conv.args[0], residual), (before,))
                    break
    network.graph.lint()
    network.recompile()


def _merge(
    network: fx.GraphModule,
    conv: fx.Node,
    relu: fx.Node,
    reads: tuple[fx.Node, ...],
    between: tuple[fx.Node, ...],
) -> None:
    """One layer in the place of the last of its parts, where all that it reads is there."""
    network.set_submodule(conv.target, ConvRelu(network.get_submodule(conv.target)))
    with network.graph.inserting_before(relu):
        merged = network.graph.call_module(conv.target, reads)
    merged.meta = dict(relu.meta)
    relu.replace_all_uses_with(merged)
    for node in (relu, *between, conv):
        network.graph.erase_node(node)


def _is_relu(node: fx.Node, network: fx.GraphModule) -> bool:
    if not node.args or not isinstance(node.args[0], fx.Node):
        return False
    if node.op == "call_module":
        return type(network.get_submodule(node.target)) is nn.ReLU
    return node.target in _RELU


def _conv(node: fx.Node, network: fx.GraphModule) -> fx.Node | None:
    """The node if it is a convolution that the kernel knows and that one node alone reads."""
    if (
        not isinstance(node, fx.Node)
        or node.op != "call_module"
        or len(node.users) != 1
        or len(node.args) != 1
    ):
        return None
    layer = network.get_submodule(node.target)
    known = type(layer) is nn.Conv2d and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    calls = sum(n.op == "call_module" and n.target == node.target for n in network.graph.nodes)
    return node if known and calls == 1 else None


def _is_sum(node: fx.Node) -> bool:
    """Whether a node, which one node alone reads, adds two tensors of the same shape and type, and nothing else."""
    if node.target not in _ADD or len(node.users) != 1 or node.kwargs or len(node.args) != 2:
        return False
    seen = [a.meta.get("tensor_meta") if isinstance(a, fx.Node) else None for a in node.args]
    return None not in seen and seen[0].shape == seen[1].shape and seen[0].dtype == seen[1].dtype


def _place(network: fx.GraphModule, node: fx.Node) -> int:
    return list(network.graph.nodes).index(node)
