"""Files that are whole or not there: a temporary name, sync, rename. Weights as safetensors with a SHA-256."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from alphaprune.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` so that `path` holds either what it held before or all of the new content.

    Raises:
        UsageError: where the system does not let it, as on a full disk.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as f:
            f.write(content)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as e:
        raise UsageError(
            f"{path} cannot be written ({e.strerror}); what was there is as it was; mend that and run the same command again"
        ) from None
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Until then a new name may be lost with the power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, content: Any) -> None:
    """Write `content` as JSON with sorted keys; NaN and infinities are refused."""
    write_bytes(path, (json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n").encode())


def as_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """Tensors as the content of a safetensors file: the same for the same names and values, on any device."""
    from safetensors.torch import save  # brings torch, which who only reads records need not wait for

    # Cloned, since safetensors takes no two tensors that share memory.
    return save({k: t.detach().cpu().clone().contiguous() for k, t in tensors.items()}, metadata)


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> str:
    """Write tensors as safetensors, and beside them a file `<name>.sha256`. Returns the SHA-256."""
    content = as_bytes(tensors, dict(metadata or {}))
    digest = hashlib.sha256(content).hexdigest()
    write_bytes(path, content)
    write_bytes(path.with_name(path.name + ".sha256"), f"{digest}  {path.name}\n".encode())
    return digest


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read tensors and metadata written by `save_tensors`, checked against the SHA-256 beside them.

    Raises:
        UsageError: if the file or its checksum is missing, or they disagree.
    """
    check_digest(path)
    try:
        with safe_open(path, "pt") as f:
            return {k: f.get_tensor(k) for k in f.keys()}, dict(f.metadata() or {})  # noqa: SIM118 (not a dict)
    except SafetensorError as e:
        raise UsageError(
            f"{path} is not a readable safetensors file ({e}); delete it and run the same command again"
        ) from None


def check_digest(path: Path) -> str:
    """The SHA-256 of `path`, found equal to the one recorded beside it (raises UsageError otherwise)."""
    beside = path.with_name(path.name + ".sha256")
    if not path.is_file() or not beside.is_file():
        raise UsageError(
            f"{path} or its .sha256 is missing; make it again (for pretrained weights: `make pretrain`)"
        )
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if read_digest(path) != found:
        raise UsageError(
            f"{path} is damaged: its SHA-256 differs from {beside.name}; delete both and run the same command again"
        )
    return found


def read_digest(path: Path) -> str:
    """The SHA-256 that is recorded beside `path`, not compared with its content.

    Raises:
        UsageError: if the file beside it does not hold one.
    """
    beside = path.with_name(path.name + ".sha256")
    try:
        with beside.open("rb") as f:
            digest = f.read(64)
    except OSError as e:
        raise UsageError(f"{beside} cannot be read ({e.strerror})") from None
    if not re.fullmatch(rb"[0-9a-f]{64}", digest):
        raise UsageError(
            f"{beside} is damaged: it holds no SHA-256; delete it and {path.name} and run the same command again"
        )
    return digest.decode()
