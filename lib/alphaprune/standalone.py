"""A network as Python source that needs torch alone: its layers written out, and forward() from the traced graph.

A layer of torch.nn becomes the call that makes it: the arguments are read from its attributes, and the call counts only
if what it makes has the same text, shapes and types. Every other module is taken apart by the tracing: its layers and
parameters keep their names in a `Part`, its forward() becomes a stretch of the network's. The graph is that of eval
mode.
"""

from __future__ import annotations

import copy
import inspect
import math
import re
from typing import Any

import torch
from torch import Tensor, fx, nn

from alphaprune.rules import is_stochastic_depth

# Names the file uses itself.
_TAKEN = {
    "Part", "Path", "OrderedDict", "FOLDER", "torch", "nn", "json", "hashlib", "safetensors",
    "build", "load", "weights", "apply_widths", "resize",
}  # fmt: skip
# Tensors that are in no state dict are written as numbers, up to this many.
LONGEST_CONSTANT = 4096
_PLAIN = (bool, int, float, str, type(None))

PART = '''class Part(nn.Module):
    """Layers, parameters and buffers under the names that they have in the original network.

    An empty one stands for a module that forward() spells out or that does nothing in eval mode.
    """

    def __init__(self, entries, constants=()):
        super().__init__()
        for name, entry in entries.items():
            if isinstance(entry, nn.Module):
                self.add_module(name, entry)
            elif isinstance(entry, nn.Parameter):
                self.register_parameter(name, entry)
            else:
                self.register_buffer(name, entry, persistent=name not in constants)
'''


class Unwritable(Exception):
    """No source can be written; the text says why, and names the layer or function."""


class _Tracer(fx.Tracer):
    def __init__(self, calls: dict[nn.Module, str]):
        super().__init__()
        self.calls = calls

    def is_leaf_module(self, m: nn.Module, name: str) -> bool:
        return m in self.calls


def class_source(network: nn.Module) -> tuple[str, list[str], str]:
    """A class that computes what the network does in eval mode, with the same state dict.

    Args:
        network: any module, on the CPU, in eval mode; it is not changed.

    Returns:
        The source of the class and of `Part`, the import lines they need besides `torch` and `nn`, and the name of
        the class: that of the network's own.

    Raises:
        Unwritable: if the network cannot be traced, or holds or calls something that has no source in torch.
    """
    network = copy.deepcopy(network)  # tracing leaves tensors made in forward() behind as attributes
    # Found before the tracing, which would record what the constructors do.
    calls = {m: call for m in network.modules() if m is not network and (call := constructor(m)) is not None}
    graph = _graph(network, calls)
    tree = _Tree(network, _constants(network, graph), calls)
    entries = tree.part(network, "", 2)
    code = graph.python_code("self")
    name = type(network).__name__
    name = f"{name}_" if name in _TAKEN or not name.isidentifier() else name
    lines = code.src[code.src.index("def forward") :].strip().splitlines()
    forward = "\n".join(f"    {line}".rstrip() for line in lines)
    source = f"""{PART}

class {name}(Part):
    def __init__(self):
        super().__init__({entries})
{"".join(tree.shared)}
{forward}
"""
    return source, _imports(code.globals, source), name


def constructor(layer: nn.Module) -> str | None:
    """The call that makes a layer of torch.nn anew, such as `nn.Conv2d(3, 5, 3, padding=1)`; None if there is none.

    There is none for a class that torch.nn does not have, and for a layer with hooks or a forward() of its own.
    """
    cls = type(layer)
    if getattr(nn, cls.__name__, None) is not cls or "forward" in vars(layer):
        return None
    if any(m._forward_hooks or m._forward_pre_hooks for m in layer.modules()):
        return None
    arguments = _arguments(layer)
    if arguments is None:
        return None
    text = f"nn.{cls.__name__}({', '.join(arguments)})"
    try:
        with torch.device("meta"):
            made = eval(text, {"nn": nn, "torch": torch, "inf": math.inf, "nan": math.nan})
    except Exception:
        return None
    same = repr(made) == repr(layer) and _types(made) == _types(layer)
    return text if same else None


def _arguments(layer: nn.Module) -> list[str] | None:
    """What its constructor takes, read from attributes of the same names; what is as by default is left out."""
    arguments = []
    for p in inspect.signature(type(layer).__init__).parameters.values():
        if p.name in ("self", "device", "dtype") or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
            continue
        if p.name == "bias" and not getattr(layer, "affine", getattr(layer, "elementwise_affine", True)):
            continue
        value = getattr(layer, p.name, p.default)
        if isinstance(value, Tensor) or (p.name == "bias" and value is None):
            value = value is not None  # `bias` is a flag to the constructor, then a parameter
        if isinstance(layer, nn.modules.conv._ConvNd) and isinstance(value, tuple) and len(set(value)) == 1:
            value = value[0]
        if isinstance(value, tuple):
            value = tuple(value)  # not torch.Size
        if p.default is p.empty:
            if value is p.empty or not _is_plain(value):
                return None
            arguments.append(repr(value))
        elif value != p.default or type(value) is not type(p.default):
            if not _is_plain(value):
                return None
            arguments.append(f"{p.name}={value!r}")
    dtypes = {t.dtype for t in layer.state_dict().values() if t.is_floating_point()}
    if dtypes - {torch.float32}:
        arguments.append(f"dtype={dtypes.pop()}")
    return arguments


def _is_plain(value: Any) -> bool:
    return isinstance(value, _PLAIN) or (isinstance(value, tuple | list) and all(map(_is_plain, value)))


def _types(layer: nn.Module) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (t.shape, t.dtype) for name, t in layer.state_dict().items()}


def _graph(network: nn.Module, calls: dict[nn.Module, str]) -> fx.Graph:
    try:
        graph = _Tracer(calls).trace(network)
    except Exception as e:
        raise Unwritable(f"it cannot be traced ({' '.join(str(e).split())[:160]})") from None
    for node in reversed(graph.nodes):
        node.type = None  # annotations would need the imports of the original file
        if is_stochastic_depth(node.target):  # which does nothing in eval mode
            node.replace_all_uses_with(node.args[0] if node.args else node.kwargs["input"])
        if not node.users and node.op not in ("placeholder", "output"):
            graph.erase_node(node)
    graph.lint()
    return graph


def _constants(network: nn.Module, graph: fx.Graph) -> dict[str, Tensor]:
    """Tensors that forward() reads and no state dict holds, by their names."""
    kept = network.state_dict(keep_vars=True)
    found = {}
    for node in graph.nodes:
        if node.op == "get_attr" and node.target not in kept:
            owner, _, last = node.target.rpartition(".")
            value = getattr(network.get_submodule(owner), last)
            if not isinstance(value, Tensor):
                raise Unwritable(f"forward() reads '{node.target}', a {type(value).__name__}")
            if value.numel() > LONGEST_CONSTANT:
                raise Unwritable(
                    f"forward() reads '{node.target}', {value.numel()} numbers that no state dict holds"
                )
            found[node.target] = value
    return found


class _Tree:
    """The nested source of a network's modules."""

    def __init__(self, network: nn.Module, constants: dict[str, Tensor], calls: dict[nn.Module, str]):
        self.constants, self.calls = constants, calls
        self.kept = network.state_dict(keep_vars=True)
        self.first: dict[int, str] = {
            id(network): ""
        }  # by module or parameter, the name it is met under first
        self.shared: list[str] = []  # lines that register what is met again

    def part(self, module: nn.Module, prefix: str, depth: int) -> str:
        """What a Part is made from: `{"name": entry, ...}` and, if there are any, which entries are constants."""
        entries: dict[str, str] = {}
        for name, child in module._modules.items():
            if child is not None and self._is_new(child, prefix, name, "module"):
                entries[name] = self._module(child, f"{prefix}{name}", depth)
        for name, t in module._parameters.items():
            if t is not None and self._is_new(t, prefix, name, "parameter"):
                zeros, trains = _zeros(t), t.is_floating_point()
                entries[name] = f"nn.Parameter({zeros}{'' if trains else ', requires_grad=False'})"
        for name, t in module._buffers.items():
            if t is not None and f"{prefix}{name}" in self.kept:
                entries[name] = _zeros(t)
        owned = {
            n[len(prefix) :]: t for n, t in self.constants.items() if n.rpartition(".")[0] == prefix[:-1]
        }
        entries |= {n: f"torch.tensor({t.tolist()}, dtype={t.dtype})" for n, t in owned.items()}
        indent = "    " * (depth + 1)
        text = "".join(f"{indent}{n!r}: {e},\n" for n, e in entries.items())
        text = "{\n" + text + "    " * depth + "}" if entries else "{}"
        return f"{text}, {sorted(owned)}" if owned else text

    def _module(self, module: nn.Module, name: str, depth: int) -> str:
        if module not in self.calls:
            return f"Part({self.part(module, f'{name}.', depth + 1)})"
        for part, t in module.named_parameters():
            owner, _, last = f"{name}.{part}".rpartition(".")
            self._is_new(t, f"{owner}.", last, "parameter")
        return self.calls[module]

    def _is_new(self, what: nn.Module | Tensor, prefix: str, name: str, kind: str) -> bool:
        first = self.first.setdefault(id(what), f"{prefix}{name}")
        if first == f"{prefix}{name}":
            return True
        owner = f"self.get_submodule({prefix[:-1]!r})" if prefix else "self"
        get = {"module": "get_submodule", "parameter": "get_parameter"}[kind]
        self.shared.append(f"        {owner}.register_{kind}({name!r}, self.{get}({first!r}))\n")
        return False


def _zeros(t: Tensor) -> str:
    dtype = "" if t.dtype == torch.float32 else f", dtype={t.dtype}"
    return f"torch.zeros({tuple(t.shape)}{dtype})"


def _imports(used: dict[str, Any], source: str) -> list[str]:
    """Import lines for the names that forward() uses besides torch and nn."""
    lines = []
    for name, value in used.items():
        if name == "torch" or not re.search(rf"\b{name}\b", source):
            continue
        if inspect.ismodule(value):
            module, line = value.__name__, f"import {value.__name__} as {name}"
        else:
            module, own = _home(value, name)
            line = f"from {module} import {own}" + (f" as {name}" if own != name else "")
        if module.split(".")[0] not in ("torch", "torchvision", "math", "types", "_operator", "builtins"):
            raise Unwritable(f"forward() calls {getattr(value, '__name__', name)}() of {module}")
        lines.append(line)
    return sorted(lines)


def _home(value: Any, name: str) -> tuple[str, str]:
    """The module and the name to import a function, class or number from."""
    if isinstance(value, float):
        return "math", name  # inf or nan
    if value is type(None):
        return "types", "NoneType"
    return value.__module__, value.__qualname__
