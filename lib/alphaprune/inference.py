"""After folding, before deployment: the same function in fewer and faster operations.

In eval mode a BatchNorm multiplies and adds numbers that stay the same,

    y = (W x + b - mean) / sqrt(var + eps) * gamma + beta = W' x + b'

so it goes into the layer before it and never runs again. What is left runs in channels_last memory format, where the kernels for convolutions need no
other order of the numbers, with the ReLU behind a convolution in one kernel with it (see `one_kernel`), on CPUs with AVX2 with channels of
zeros up to a whole register (see `padding`), and in fewer bits if asked.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.optimization import fuse
from torch.utils._pytree import tree_map

from alphaprune.compare import close, real_tensors, run
from alphaprune.errors import UsageError
from alphaprune.exact import full_float32
from alphaprune.memory_format import channels_last
from alphaprune.one_kernel import in_one_kernel
from alphaprune.padding import padded
from alphaprune.trace import Trace, as_inputs, check_network, trace

# Largest difference, relative to the largest value, that rounding explains, by the bits that are left. In so few
# as bfloat16's 8 it adds up over the layers.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@torch.no_grad()
@full_float32()
def optimise_for_inference(
    network: nn.Module,
    example_input: Tensor | tuple[Tensor, ...],
    dtype: torch.dtype | None = None,
    pad_to: int | None = None,
) -> nn.Module:
    """A network for eval mode alone that computes what `network` does, faster.

    BatchNorm is folded into the convolution or linear layer before it wherever nothing else reads that layer, by
    torch's own fuser; a convolution and the ReLU behind it, also that behind the sum of a residual block, become one layer; weights and images are brought
    into channels_last memory format, and weights, images and all between them into `dtype`; layers get channels of zeros up to a multiple of
    `pad_to`, where that adds no more than a tenth and all that reads them can take them. What it takes and gives has the types it had before.
    A NaN among the images need not reach the answer: in one kernel with a convolution, ReLU makes 0 of it.

    Args:
        network: what `fold` gave, or any network that `torch.fx` can trace. It is not changed.
        example_input: a batch as the network expects it, (N, C, H, W), or a tuple of tensors; what is computed is compared on it.
        dtype: a floating-point type, such as torch.bfloat16, to compute in; that of the weights if None.
        pad_to: channels of a layer become a multiple of this where that adds a tenth of them at most (see `padding.MOST`) and what reads them can take
            them; 1 leaves them as they are. None takes what was measured to be faster: 8 in float32
            on a CPU with AVX2 and without AVX-512, else 1. Give one where weights of what comes out are to be loaded on another machine.

    Returns:
        A `torch.fx.GraphModule` in eval mode, on the same device, whose weights require no gradient.

    Raises:
        UsageError: if pad_to is no whole number above 0, if the network cannot be traced or does not take the example, or if it does not compute the same to rounding:
            1e-4 of the largest value in float32, 0.1 in bfloat16 (see `TOLERANCE`).

    Source:
        Jacob et al., "Quantization and training of neural networks for efficient integer-arithmetic-only inference" (2018),
        section 3.2, for the folded BatchNorm; `torch.fx.experimental.optimization.fuse`.

    Example:
        >>> import torch
        >>> from alphaprune.models import vgg16
        >>> fast = optimise_for_inference(vgg16(0.25), torch.randn(2, 3, 32, 32))
        >>> any(isinstance(m, torch.nn.BatchNorm2d) for m in fast.modules())
        False
    """
    check_network(network)
    if dtype is not None and dtype not in TOLERANCE:
        raise UsageError(f"dtype is {dtype}; use one of {', '.join(str(t) for t in TOLERANCE)}, or None")
    if pad_to is not None and (isinstance(pad_to, bool) or not isinstance(pad_to, int) or pad_to < 1):
        raise UsageError(f"pad_to is {pad_to!r}; give a multiple of channels, such as 8, or 1 to leave them")
    inputs = as_inputs(example_input)
    before = next((p.dtype for p in network.parameters() if p.is_floating_point()), torch.float32)
    multiple = _faster_multiple(network, dtype or before) if pad_to is None else pad_to
    own = padded(network, inputs, multiple, TOLERANCE[before])
    traced = trace(own, inputs)
    fast = fx.GraphModule(own, traced.graphs[False], type(network).__name__)
    _layer_a_call(fast)
    _convert_at_the_ends(fast, traced, dtype or before, before)
    fast = fuse(fast, no_trace=True)
    fast = channels_last(fast.to(dtype or before)).eval().requires_grad_(False)
    in_one_kernel(fast)
    tolerance = max(TOLERANCE[dtype or before], TOLERANCE[before])
    found, expected = (
        real_tensors(run(n, inputs, what))
        for n, what in (
            (fast, "the optimised network"),
            (copy.deepcopy(network).eval(), type(network).__name__),
        )
    )
    if not close(found, expected, tolerance):
        raise UsageError(
            f"{type(network).__name__} does not compute the same once it is optimised in {str(dtype or before).removeprefix('torch.')}; "
            f"{'leave dtype out' if dtype else 'use it as it is'}"
        )
    return fast


def _faster_multiple(network: nn.Module, dtype: torch.dtype) -> int:
    """Of channels, where it was measured: a register of AVX2 holds 8 numbers of float32."""
    on_cpu = all(p.device.type == "cpu" for p in network.parameters())
    return 8 if on_cpu and dtype == torch.float32 and torch.backends.cpu.get_cpu_capability() == "AVX2" else 1


def _layer_a_call(network: fx.GraphModule) -> None:
    """A copy of its own for every further call of a layer: a BatchNorm behind one call is no part of the others."""
    seen: set[str] = set()
    for node in network.graph.nodes:
        if node.op != "call_module":
            continue
        if node.target in seen:
            name = f"{node.target}_as_{node.name}"
            network.add_submodule(name, copy.deepcopy(network.get_submodule(node.target)))
            node.target = name
        seen.add(node.target)
    network.recompile()


def _convert_at_the_ends(
    network: fx.GraphModule, traced: Trace, dtype: torch.dtype, before: torch.dtype
) -> None:
    """Type and memory format of what comes in; the type it had of what goes out."""
    graph = network.graph
    for node in graph.nodes:
        x = traced.values.get(node.name)
        if node.op == "placeholder" and isinstance(x, Tensor):
            changes = {"memory_format": torch.channels_last} if x.dim() == 4 else {}
            changes |= {"dtype": dtype} if x.is_floating_point() else {}
            with graph.inserting_after(node):
                converted = graph.call_method("to", (node,), changes)
            node.replace_all_uses_with(converted, lambda user, own=converted: user is not own)
        elif node.op == "output" and dtype != before:
            with graph.inserting_before(node):
                node.args = fx.node.map_arg(
                    node.args, lambda n: _back(graph, n, traced.values[n.name], before)
                )
    network.recompile()


def _back(graph: fx.Graph, node: fx.Node, value: Any, dtype: torch.dtype) -> fx.Node:
    """A node of the output, brought back to the type it had."""
    if isinstance(value, Tensor):
        return graph.call_method("to", (node,), {"dtype": dtype}) if value.is_floating_point() else node
    return graph.call_function(_leaves_to, (node, dtype)) if real_tensors(value) else node


def _leaves_to(output: Any, dtype: torch.dtype) -> Any:
    """What several tensors are given in, such as the tuple of a chunk, with those of floating-point numbers in this type."""
    return tree_map(lambda t: t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t, output)
