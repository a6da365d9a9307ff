"""How each kind of operation treats channels: the tables that say which networks can be narrowed.

The narrow program runs the operations between mixers on fewer channels. That is right for an operation that treats
each channel on its own, and it says what happens to the channels of its operands:

    ELEMENTWISE   every operand has the same channels as the result: they are tied (x + y, x * scale, relu)
    SPATIAL       one operand, channels as they are, other dimensions may change (pooling, padding, resizing)
    REDUCTION     one operand, other dimensions are summed up (mean over height and width)
    RESHAPING     moves numbers without touching them (flatten, view, permute, chunk, an index)
    JOINING       channels of all operands one after the other (concatenation)
    NUMBER        gives no tensor (a size); each program computes its own

To cover an operation, add it to its table. What no table holds is an error that names it.
"""

from __future__ import annotations

import inspect
import operator
from enum import Enum, auto

import torch
from torch import fx, nn
from torch.nn import functional as F


class Rule(Enum):
    """What an operation does to the channels of its operands."""

    ELEMENTWISE = auto()
    SPATIAL = auto()
    REDUCTION = auto()
    RESHAPING = auto()
    JOINING = auto()
    NUMBER = auto()


_ACTIVATIONS = [
    "relu",
    "relu6",
    "leaky_relu",
    "elu",
    "selu",
    "celu",
    "silu",
    "gelu",
    "mish",
    "hardswish",
    "hardsigmoid",
    "hardtanh",
    "softplus",
    "softsign",
    "logsigmoid",
    "tanhshrink",
    "softshrink",
    "hardshrink",
    "threshold",
    "relu_",
    "sigmoid",
    "tanh",
]
_ARITHMETIC = [
    "add",
    "sub",
    "mul",
    "div",
    "neg",
    "abs",
    "sqrt",
    "rsqrt",
    "square",
    "exp",
    "log",
    "pow",
    "clamp",
    "clamp_min",
    "clamp_max",
    "maximum",
    "minimum",
    "sigmoid",
    "tanh",
    "relu",
    "reciprocal",
    "sign",
    "floor",
    "ceil",
    "round",
    "erf",
    "sin",
    "cos",
    "where",
]
_METHODS = ["float", "double", "half", "bfloat16", "to", "type_as", "clone", "contiguous", "detach"]
_MOVING = [
    "flatten",
    "reshape",
    "permute",
    "transpose",
    "squeeze",
    "unsqueeze",
    "movedim",
    "unflatten",
    "chunk",
    "split",
    "unbind",
    "swapaxes",
    "narrow",
]
_DROPOUTS = ["dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout"]
_POOLS = [
    f"{adaptive}{kind}_pool{d}d"
    for adaptive in ("", "adaptive_")
    for kind in ("max", "avg")
    for d in (1, 2, 3)
]


def _of(module: object, names: list[str]) -> set[object]:
    return {getattr(module, n) for n in names if hasattr(module, n)}


FUNCTIONS: dict[Rule, set[object]] = {
    Rule.ELEMENTWISE: _of(F, _ACTIVATIONS)
    | _of(torch, _ARITHMETIC)
    | _of(operator, ["add", "sub", "mul", "truediv", "neg", "pow", "iadd", "isub", "imul", "itruediv", "abs"])
    | _of(F, _DROPOUTS)
    | _of(torch, _DROPOUTS),
    Rule.SPATIAL: _of(F, _POOLS)
    | _of(torch, _POOLS)
    | _of(F, ["interpolate", "pad", "upsample", "lp_pool1d", "lp_pool2d"]),
    Rule.REDUCTION: _of(torch, ["mean", "sum", "amax", "amin", "var", "std"]),
    Rule.RESHAPING: _of(torch, _MOVING)
    | _of(F, ["pixel_shuffle", "pixel_unshuffle", "channel_shuffle"])
    | {operator.getitem},
    Rule.JOINING: _of(torch, ["cat", "concat", "concatenate"]),
    Rule.NUMBER: _of(operator, ["floordiv", "mod", "eq", "ne", "lt", "gt", "le", "ge"])
    | {getattr, torch.numel, torch._assert},
}

METHODS: dict[Rule, set[str]] = {
    Rule.ELEMENTWISE: {
        *_ACTIVATIONS,
        *_ARITHMETIC,
        *_METHODS,
        *(f"{n}_" for n in (*_ACTIVATIONS, *_ARITHMETIC)),
    },
    Rule.REDUCTION: {"mean", "sum", "amax", "amin", "var", "std"},
    Rule.RESHAPING: {*_MOVING, "view", "expand", "view_as", "reshape_as", "expand_as"},
    Rule.NUMBER: {"size", "dim", "numel", "item", "ndimension"},
}

_MODULE_NAMES = {
    Rule.ELEMENTWISE: (
        "Identity ReLU ReLU6 LeakyReLU ELU SELU CELU SiLU GELU Mish Hardswish Hardsigmoid Hardtanh Sigmoid LogSigmoid Tanh "
        "Tanhshrink Softplus Softsign Softshrink Hardshrink Threshold Dropout Dropout1d Dropout2d Dropout3d AlphaDropout "
        "FeatureAlphaDropout"
    ),
    Rule.SPATIAL: (
        "MaxPool1d MaxPool2d MaxPool3d AvgPool1d AvgPool2d AvgPool3d LPPool1d LPPool2d AdaptiveAvgPool1d AdaptiveAvgPool2d "
        "AdaptiveAvgPool3d AdaptiveMaxPool1d AdaptiveMaxPool2d AdaptiveMaxPool3d Upsample UpsamplingNearest2d "
        "UpsamplingBilinear2d ZeroPad1d ZeroPad2d ZeroPad3d ConstantPad1d ConstantPad2d ConstantPad3d ReflectionPad1d "
        "ReflectionPad2d ReflectionPad3d ReplicationPad1d ReplicationPad2d ReplicationPad3d CircularPad1d CircularPad2d "
        "CircularPad3d"
    ),
    Rule.RESHAPING: "Flatten Unflatten PixelShuffle PixelUnshuffle ChannelShuffle",
}
MODULES: dict[Rule, tuple[type, ...]] = {
    rule: tuple(getattr(nn, n) for n in names.split()) for rule, names in _MODULE_NAMES.items()
}

# Both programs would draw numbers of their own.
DRAWING = _of(torch, ["rand_like", "randn_like", "randint_like", "bernoulli", "normal", "multinomial"])

# In place, a value that another program or the backward pass still needs would be overwritten.
OUT_OF_PLACE = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
    F.relu_: F.relu,
} | {f"{n}_": n for n in (*_ACTIVATIONS, *_ARITHMETIC)}


def is_stochastic_depth(target: object) -> bool:
    """Whether a function or a layer is torchvision's stochastic depth.

    Known by where it is defined: importing torchvision takes longer than importing torch, and who has such a layer has done it.
    """
    kinds = [target] if inspect.isfunction(target) else type(target).__mro__
    return any(kind.__module__ == "torchvision.ops.stochastic_depth" for kind in kinds)


def rule_of(node: fx.Node, module: nn.Module | None) -> Rule | None:
    """The rule that covers a node, None if there is none. `module` is the layer it calls, if it calls one."""
    if is_stochastic_depth(module if node.op == "call_module" else node.target):
        return Rule.ELEMENTWISE
    if node.op == "call_module":
        return next((rule for rule, types in MODULES.items() if isinstance(module, types)), None)
    table = {"call_function": FUNCTIONS, "call_method": METHODS}.get(node.op, {})
    return next((rule for rule, targets in table.items() if node.target in targets), None)


def describe(node: fx.Node, module: nn.Module | None) -> str:
    """A node for people: `'layer1.attention' (MultiheadAttention)`, `'softmax_1' (softmax)`."""
    if module is not None:
        return f"'{node.target}' ({type(module).__name__})"
    return f"'{node.name}' ({getattr(node.target, '__name__', node.target)})"
