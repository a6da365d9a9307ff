"""A folded network as a folder that loads without this library.

`model.py` in it is plain PyTorch: `load()` gives the network with its weights. Where forward() cannot be written
out, `apply_widths(network)` there narrows an instance of the user's own class instead, to which the weights then fit.
Every way that the folder offers is tried before it gets its name.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import os
import shutil
import types
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from alphaprune.certificate import Certificate
from alphaprune.compare import close, first_difference, run
from alphaprune.errors import UsageError
from alphaprune.model_file import model_source
from alphaprune.onnx_file import check_installed, save_onnx
from alphaprune.parallel import ParallelModel
from alphaprune.storage import as_bytes, write_bytes, write_json
from alphaprune.trace import MIXING_LAYERS, NORMS, as_inputs

WEIGHTS, SUMS, ONNX = "weights.safetensors", "SHA256SUMS", "model.onnx"
FILES = {WEIGHTS, SUMS, ONNX, "model.py", "widths.json", "certificate.json", "record.json"}
# Largest difference, relative to the largest value: the same operations, in another order at most.
# The layers count too, since a dead network gives the same whatever they compute.
TOLERANCE, LAYER_TOLERANCE = 1e-5, 1e-4
NUMBERS = (
    "in_channels", "out_channels", "groups", "in_features", "out_features", "num_features", "num_channels", "num_groups",
    "num_parameters", "normalized_shape",
)  # fmt: skip


@torch.no_grad()
def save_bundle(
    small: nn.Module,
    folder: str | Path,
    example_input: Tensor | tuple[Tensor, ...],
    certificate: Certificate | None = None,
    record: dict[str, Any] | None = None,
    onnx: bool = True,
) -> Path:
    """Write a folded network so that it loads with torch and safetensors alone, or with ONNX Runtime.

    The folder holds `weights.safetensors`; `model.py` with load(), build(), weights() and apply_widths();
    `widths.json`; `model.onnx` with any number of images; `certificate.json` and `record.json` if given; and
    `SHA256SUMS`, for `sha256sum -c`. It appears whole or not at all.

    Args:
        small: what `fold` gave, or any network. It is not changed; what is written is on the CPU and in eval mode.
        folder: a new one, or a bundle, which is replaced.
        example_input: a batch as the network expects it, (N, C, H, W); a tuple of tensors for several inputs.
        certificate: of the fold. `weights_as_certified` in its file says whether it is of these very weights: true, false,
            as after more training, with a warning, or null where an older certificate does not tell.
        record: anything JSON holds.
        onnx: whether to write `model.onnx`.

    Returns:
        The folder.

    Raises:
        UsageError: if the folder holds anything else, the network does not take the example, or what was written does
            not compute what the network does: 1e-5 of the largest value for model.py, 1e-4 for model.onnx.

    A network that `torch.fx` cannot trace, or that calls functions from elsewhere than torch, has no build(); its
    `model.py` says so and offers apply_widths() for the original class.
    """
    if not isinstance(small, nn.Module) or not isinstance(folder, str | Path):
        raise UsageError(
            f"small is a {type(small).__name__} and folder a {type(folder).__name__}; give the folded network, then a folder's name"
        )
    folder = Path(folder)
    if not isinstance(certificate, Certificate | None):
        raise UsageError(f"certificate is a {type(certificate).__name__}; give the one that fold returned")
    if isinstance(small, ParallelModel):
        raise UsageError("small is a ParallelModel; fold it first: small, certificate = fold(model)")
    if any(not isinstance(x, Tensor) for x in as_inputs(example_input)):
        raise UsageError("example_input is no tensor; give a batch of images, or a tuple of tensors")
    _check_folder(folder)
    if onnx:
        check_installed()
    network = copy.deepcopy(small).cpu().eval()
    inputs = tuple(x.detach().cpu() for x in as_inputs(example_input))
    expected = run(network, inputs, "small")
    if odd := [k for k, t in network.state_dict().items() if not isinstance(t, Tensor)]:
        raise UsageError(f"'{odd[0]}' in the state dict is no tensor; drop get_extra_state() from its class")
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
    except OSError as e:
        raise UsageError(
            f"{folder} cannot be made ({e.strerror}); give a folder that can be written"
        ) from None
    try:
        weights = as_bytes(network.state_dict())
        write_bytes(temporary / WEIGHTS, weights)
        widths = _widths(network)
        write_json(temporary / "widths.json", widths)
        source, reason = model_source(network)
        if reason is not None:
            warnings.warn(f"{reason}; model.py offers apply_widths() instead", stacklevel=2)
        write_bytes(temporary / "model.py", source.encode())
        if certificate is not None:
            as_certified = _as_certified(certificate, weights)
            content = dataclasses.asdict(certificate) | {"weights_as_certified": as_certified}
            write_json(temporary / "certificate.json", content)
            if as_certified is False:
                warnings.warn(
                    "the certificate is of other weights than these, of earlier ones or of another network; "
                    "certificate.json says so",
                    stacklevel=2,
                )
        if record is not None:
            _write_record(temporary / "record.json", record)
        if onnx:
            save_onnx(network, inputs, temporary / ONNX)
        sums = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(temporary.iterdir())}
        write_bytes(temporary / SUMS, "".join(f"{d}  {name}\n" for name, d in sums.items()).encode())
        with torch.random.fork_rng(devices=[]):  # making layers draws their first weights
            _check_model(temporary, network, widths, inputs, expected, reason)
        _put_in_place(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _check_folder(folder: Path) -> None:
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise UsageError(f"{folder} is no folder; give the name of a new one")
    if folder.is_dir():
        found = {p.name for p in folder.iterdir()} - {"__pycache__"}
        if SUMS not in found or found - FILES:
            other = sorted(found - FILES)
            what = f"it holds {other[0]}" if other else "it is no bundle"
            raise UsageError(f"{folder} exists and {what}; give a new folder, or delete it first")


def _put_in_place(temporary: Path, folder: Path) -> None:
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    if folder.exists():
        os.replace(folder, old)
    try:
        os.replace(temporary, folder)
    except BaseException:
        if old.exists():
            os.replace(old, folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _as_certified(certificate: Certificate, weights: bytes) -> bool | None:
    """Whether a certificate is of these weights; None for one of a time when certificates did not say of which."""
    if certificate.weights_sha256 is None:
        return None
    return certificate.weights_sha256 == hashlib.sha256(weights).hexdigest()


def _write_record(path: Path, record: dict[str, Any]) -> None:
    try:
        write_json(path, record)
    except (TypeError, ValueError) as e:
        raise UsageError(f"record cannot be written as JSON ({e}); give plain, finite values") from None


def _widths(network: nn.Module) -> dict[str, dict[str, Any]]:
    """By the name of a layer the numbers its constructor takes for channels, the shapes of its tensors, and the names
    of those that an earlier layer holds too."""
    kept, found, first = network.state_dict(), {}, {}
    for name, module in network.named_modules():
        numbers = {}
        if isinstance(module, (*MIXING_LAYERS, *NORMS, nn.PReLU)):
            values = {n: getattr(module, n) for n in NUMBERS if hasattr(module, n)}
            numbers = {n: list(v) if isinstance(v, tuple) else v for n, v in values.items()}
        tensors = {**module._parameters, **module._buffers}
        prefix = f"{name}." if name else ""
        shapes = {n: list(t.shape) for n, t in tensors.items() if f"{prefix}{n}" in kept and t.dim()}
        names = {n: first.setdefault(id(tensors[n]), f"{prefix}{n}") for n in shapes}
        shared = {n: other for n, other in names.items() if other != f"{prefix}{n}"}
        if numbers or shapes:
            found[name] = numbers | {"shapes": shapes, "shared": shared}
    return found


def _check_model(
    folder: Path,
    network: nn.Module,
    widths: dict[str, dict[str, Any]],
    inputs: tuple[Tensor, ...],
    expected: list[Tensor],
    reason: str | None,
) -> None:
    """Run model.py: load() has to give what the network gives, and a network of other widths after resize() too."""
    module = types.ModuleType("model")
    module.__file__ = str(folder / "model.py")
    try:
        exec(compile((folder / "model.py").read_text(), module.__file__, "exec"), vars(module))
        if reason is None:
            loaded = module.load()
            same = close(run(loaded, inputs, "load()"), expected, TOLERANCE)
            difference = first_difference(network, loaded, inputs, LAYER_TOLERANCE)
            if not same or difference:
                raise UsageError(f"it computes something else{difference}")
    except Exception as e:
        text = " ".join(str(e).split())[:200]
        raise UsageError(f"model.py for {type(network).__name__} does not work: {text}") from e
    try:
        other = module.resize(copy.deepcopy(network), _doubled(widths))
        other = module.apply_widths(other)
        other.load_state_dict(module.weights())
        same = close(run(other, inputs, "apply_widths()"), expected, TOLERANCE)
    except Exception as e:
        same, reason = False, reason or " ".join(str(e).split())[:200]
    if not same:
        raise UsageError(
            f"{type(network).__name__} cannot be given its weights again by apply_widths()"
            f"{f' ({reason})' if reason else ''}; register tensors that forward() reads with register_buffer()"
        )


def _doubled(widths: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Numbers of a network that is wider everywhere."""

    def twice(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: twice(v) for k, v in value.items()}
        if isinstance(value, list):
            return [2 * n for n in value]
        return value if isinstance(value, str) else 2 * value

    return {name: twice(numbers) for name, numbers in widths.items()}
