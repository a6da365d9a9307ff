"""Two networks on the same inputs: whether they give the same, and where they first differ."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from alphaprune.errors import UsageError


def tensors(output: Any) -> list[Tensor]:
    """The tensors in what a network gives, in order; None and numbers beside them are left out."""
    return [t for t in tree_flatten(output)[0] if isinstance(t, Tensor)]


def real_tensors(output: Any) -> list[Tensor]:
    """Those that hold floating-point numbers."""
    return [t for t in tensors(output) if t.is_floating_point()]


def run(network: nn.Module, inputs: tuple[Tensor, ...], what: str) -> list[Tensor]:
    """The tensors that a network gives, in order.

    Raises:
        UsageError: if it does not take the inputs; `what` is its name in the text.
    """
    try:  # cloned, since a network may change its input in place
        return tensors(network(*(x.clone() for x in inputs)))
    except Exception as e:
        shapes = ", ".join(f"{tuple(x.shape)} {x.dtype}" for x in inputs)
        raise UsageError(
            f"example_input {shapes} does not pass through {what}: {str(e).strip().splitlines()[0][:160]}"
        ) from None


def close(found: list[Tensor], expected: list[Tensor], tolerance: float) -> bool:
    """Whether tensors differ by at most `tolerance` of the largest value in each."""
    pairs = [(a.double(), b.double()) for a, b in zip(found, expected, strict=True)]
    return all(
        a.shape == b.shape
        and torch.allclose(a, b, rtol=0, atol=tolerance * float(b.abs().max()), equal_nan=True)
        for a, b in pairs
    )


def first_difference(
    network: nn.Module, loaded: nn.Module, inputs: tuple[Tensor, ...], tolerance: float
) -> str:
    """The first layer, in the order of computation, behind which two networks differ; nothing if it is not known."""
    seen = [_behind_layers(each, inputs) for each in (network, loaded)]
    for name, value in seen[0].items():
        if name in seen[1] and not close(tensors(seen[1][name]), tensors(value), tolerance):
            return f", first behind '{name}' ({type(network.get_submodule(name)).__name__})"
    return ""


def _behind_layers(network: nn.Module, inputs: tuple[Tensor, ...]) -> dict[str, Any]:
    values: dict[str, Any] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            values.setdefault(name, copy.deepcopy(output))  # an operation in place may come next

        return hook

    layers = [(name, m) for name, m in network.named_modules() if not list(m.children())]
    hooks = [m.register_forward_hook(keep(name)) for name, m in layers]
    try:
        run(network, inputs, type(network).__name__)
    finally:
        for hook in hooks:
            hook.remove()
    return values
