"""A network as an ONNX file, checked with ONNX Runtime."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from torch import Tensor, nn

from alphaprune.compare import close, run
from alphaprune.errors import UsageError

# Largest difference, relative to the largest value: another library's kernels.
TOLERANCE = 1e-4


def check_installed() -> None:
    """Raise a UsageError if a package that `save_onnx` needs is missing."""
    missing = [n for n in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(n) is None]
    if missing:
        raise UsageError(
            f"model.onnx needs {', '.join(missing)}; pip install {' '.join(missing)}, or save_bundle(..., onnx=False)"
        )


def save_onnx(network: nn.Module, inputs: tuple[Tensor, ...], path: Path) -> None:
    """Write a network as ONNX that takes any number of images, and run that with ONNX Runtime on two numbers of them.

    Args:
        network: on the CPU, in eval mode.
        inputs: what it takes; the first dimension of the first counts the images.
        path: of the file, which holds the weights too.

    Raises:
        UsageError: if it cannot be exported, or differs by more than 1e-4 of the largest value.
    """
    import onnxruntime

    images = len(inputs[0])
    several = inputs if images > 1 else _images(inputs, images, 2)  # one image would be taken for a constant
    batch = torch.export.Dim.DYNAMIC
    shapes = tuple({0: batch} if x.dim() and len(x) == len(several[0]) else None for x in several)
    try:
        program = torch.onnx.export(
            network, several, dynamo=True, dynamic_shapes=shapes, external_data=False, verbose=False
        )
        for node in program.model.graph.all_nodes():
            node.metadata_props.clear()  # lines and paths of this machine
        program.save(str(path), external_data=False)
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        for n in (len(several[0]), len(several[0]) + 1):
            given = _images(several, len(several[0]), n)
            names = [i.name for i in session.get_inputs()]
            values = session.run(None, dict(zip(names, (x.numpy() for x in given), strict=True)))
            expected = run(network, given, "small")
            if not close([torch.from_numpy(v) for v in values], expected, TOLERANCE):
                raise UsageError(f"ONNX Runtime computes something else for {n} images")
    except Exception as e:
        raise UsageError(
            f"{type(network).__name__} cannot be written as model.onnx ({' '.join(str(e).split())[:200]}); "
            "save_bundle(..., onnx=False) leaves it out"
        ) from e


def _images(inputs: tuple[Tensor, ...], images: int, n: int) -> tuple[Tensor, ...]:
    """n images from those given, over and over."""
    places = torch.arange(n) % images
    return tuple(x[places] if x.dim() and len(x) == images else x for x in inputs)
