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

from alphaprune.errors import Damaged, UsageError

if TYPE_CHECKING:
    from torch import Tensor


# Names a file in the environment that takes a line, in the form of sha256sum, for all that this process and those it starts write.
JOURNAL = "ALPHAPRUNE_JOURNAL"


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
        if journal := os.environ.get(JOURNAL):
            with open(journal, "a") as f:
                f.write(f"{hashlib.sha256(content).hexdigest()}  {path.resolve()}\n")
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


def json_bytes(content: Any) -> bytes:
    """`content` as JSON with sorted keys, the same for the same content; NaN and infinities are refused."""
    return (json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()


def write_json(path: Path, content: Any) -> None:
    """Write `content` as `json_bytes` has it."""
    write_bytes(path, json_bytes(content))


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
    write_digest(path, digest)
    return digest


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read tensors and metadata written by `save_tensors`, checked against the SHA-256 beside them.

    Raises:
        Damaged: if the file or its checksum is missing, they disagree, or the file holds no tensors.
    """
    check_digest(path)
    try:
        with safe_open(path, "pt") as f:
            return {k: f.get_tensor(k) for k in f.keys()}, dict(f.metadata() or {})  # noqa: SIM118 (not a dict)
    except SafetensorError as e:
        raise Damaged(f"{path} is not a readable safetensors file ({e})") from None


def digest_file(path: Path) -> Path:
    """The file beside `path` that holds its SHA-256, in the form of `sha256sum`."""
    return path.with_name(path.name + ".sha256")


def write_digest(path: Path, digest: str) -> None:
    """Write the SHA-256 of `path` beside it (raises UsageError where the disk does not take it)."""
    write_bytes(digest_file(path), f"{digest}  {path.name}\n".encode())


def digest_of(path: Path) -> str:
    """The SHA-256 of what is in `path` now."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def check_digest(path: Path, recorded: str | None = None) -> str:
    """The SHA-256 of `path`, found equal to the one beside it, and to the one of its record where that is given.

    Raises:
        Damaged: if they differ, or one is missing.
    """
    for needed in (path, digest_file(path)):
        if not needed.is_file():
            raise Damaged(f"{needed} is missing")
    found = digest_of(path)
    if read_digest(path) != found:
        raise Damaged(f"{path} is damaged: its SHA-256 differs from {digest_file(path).name}")
    if recorded not in (None, found):
        raise Damaged(f"{path} is damaged: its SHA-256 is not the one in its record")
    return found


def read_digest(path: Path) -> str:
    """The SHA-256 that is recorded beside `path`, not compared with its content.

    Raises:
        Damaged: if the file beside it is not as `write_digest` writes it.
    """
    beside = digest_file(path)
    try:
        with beside.open("rb") as f:
            content = f.read(64 + len(path.name.encode()) + 4)
    except OSError as e:
        raise Damaged(f"{beside} cannot be read ({e.strerror})") from None
    if not re.fullmatch(rb"[0-9a-f]{64}  " + re.escape(path.name.encode()) + rb"\n", content):
        raise Damaged(f"{beside} is damaged: it does not hold the SHA-256 of {path.name} alone")
    return content[:64].decode()
