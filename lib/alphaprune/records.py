"""Records: written with the SHA-256 of what they say, and read back as they were written, or they count as damaged.

A record lies in a folder that anything may have happened to. What is not JSON, is of another type, lacks a key,
holds what is no finite number or has another SHA-256 is named as damaged, and whoever asked makes it again.

    {..., "record_format": 2, "record_sha256": that of the file as it would be without this line}

Records made before there was a format carry no SHA-256. They are taken for what they say; those in git are safe there.
"""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from alphaprune.errors import Damaged
from alphaprune.storage import json_bytes, write_bytes

COLUMNS = ["experiment", "stage", "alpha", "lr", "step", "epoch", "split", "metric", "value"]
BYTES = 64 * 1024 * 1024  # no record is nearly as large
FORMAT = 2  # of records with a SHA-256; it stands in them, so that one that has lost it is not taken for an older one
SEAL = ("record_format", "record_sha256")

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Whole = Annotated[int, Field(ge=0, lt=2**63)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]


class _Form(BaseModel):
    # What more stands in a record is for people; nothing is computed from it.
    model_config = ConfigDict(strict=True, extra="allow")


class _Metrics(_Form):
    __pydantic_extra__: dict[str, Finite]
    val_accuracy: Share


class _Outcome(_Form):
    epochs: Whole
    steps: Whole
    images: Whole
    seconds: Seconds
    start_seconds: Seconds = 0.0  # not in the oldest records
    diverged: bool


class StageRecord(_Form):
    """`run.json` of a stage."""

    identity: Digest
    metrics: _Metrics
    outcome: _Outcome
    weights_sha256: Digest
    history_sha256: Digest | None = None  # not in those without a format


class _Row(_Form):
    network: str
    val_accuracy: Share
    test_accuracy: Share
    parameters: Whole
    multiply_adds: Whole


def _as_tuple(row: Any) -> Any:
    return tuple(row) if isinstance(row, list) else row  # JSON has no tuples


class _Certificate(_Form):
    layers: list[Annotated[tuple[str, Finite, Finite], BeforeValidator(_as_tuple)]]
    logits: Finite
    largest_logit: Finite
    agreement: Share
    spread: Finite
    images: Whole
    dtype: Annotated[str, Field(pattern="^(float16|bfloat16|float32|float64)$")]
    alpha: Share | list[Share]


class _Dead(_Form):
    network: str
    layer: str
    dead: Share


class FoldRecord(_Form):
    """`run.json` of a folded network, see `prune`."""

    identity: Digest
    weights_sha256: Digest
    pruning_version: int | None = None
    network: str
    table: Annotated[list[_Row], Field(min_length=1)]
    certificate: _Certificate
    dead: list[_Dead] = []  # of version 3 on


class SensitivityRecord(_Form):
    """What narrowing single layers does: damage by keep_ratio, by layer."""

    identity: Digest
    damages: dict[
        str, Annotated[dict[Annotated[str, Field(pattern=r"^0\.\d+$")], Finite], Field(min_length=1)]
    ]
    seconds: Seconds


class FinalRecord(_Form):
    """`final.json` of a comparison: what a method's last network costs and scores."""

    params: Whole
    macs: Whole
    test_accuracy: Annotated[float, Field(ge=0, le=100)]
    weights_sha256: Digest | None = None  # that scored so


class OriginalRecord(FinalRecord):
    """`original.json` beside pretrained weights: the same of the network that they are."""

    val_accuracy: Annotated[float, Field(ge=0, le=100)]
    val_images: Whole
    weights_sha256: Digest


class _Pace(_Form):
    before: Seconds
    an_image: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    spread: Seconds
    others: Seconds
    trusted: bool


class PaceRecord(_Form):
    """How long the methods of a comparison take, by method, see `pace`."""

    keep_ratio: Share
    methods: dict[str, _Pace]


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """A record's content with its format and its SHA-256."""
    whole = {**content, SEAL[0]: FORMAT}
    return whole | {SEAL[1]: hashlib.sha256(json_bytes(whole)).hexdigest()}


def write_record(path: Path, content: Mapping[str, Any]) -> None:
    """Write a record as JSON, sealed (raises UsageError where the disk does not take it)."""
    write_bytes(path, json_bytes(sealed(content)))


def read_record(path: Path, form: type[_Form]) -> dict[str, Any]:
    """A record's content, without format and SHA-256.

    Args:
        path: a file that `write_record` wrote, or an older one.
        form: what must stand in it.

    Raises:
        Damaged: naming the file and what is wrong with it.
    """
    try:
        read = _read(path)
        content = parse_json(read)
        form.model_validate(content)
        told = {k: v for k, v in content.items() if k not in SEAL}
        if len(told) < len(content) and read != json_bytes(sealed(told)):
            raise ValueError("its content is not that of the SHA-256 it carries")
    except ValidationError as e:
        first = e.errors()[0]
        key = ".".join(str(part) for part in first["loc"])[:80]
        raise Damaged(f"{path} is damaged ({key}: {first['msg'][:120]})") from None
    except (OSError, ValueError, RecursionError) as e:
        raise Damaged(f"{path} is damaged ({str(e)[:120]})") from None
    return told


def read_if_whole(path: Path, form: type[_Form]) -> dict[str, Any] | None:
    """The same of what is measured again where it is lost: None where nothing is, or, with a warning, what is damaged."""
    if not path.is_file():
        return None
    try:
        return read_record(path, form)
    except Damaged as e:
        warnings.warn(f"{e}; it is measured again", stacklevel=3)
        return None


def read_history(
    path: Path, experiment: str | None = None, stage: str | None = None, sha256: str | None = None
) -> pd.DataFrame:
    """The measurements in a `history.csv`, one a row, in the columns `COLUMNS`.

    Args:
        path: the file.
        experiment, stage: whose measurements they must be; any one's if None.
        sha256: of the file, as its record has it; None where that is an older one, which has none.

    Raises:
        Damaged: naming the file and what is wrong with it.
    """
    text = dict.fromkeys(("experiment", "stage", "split", "metric"), str)
    try:
        content = _read(path)
        if sha256 is not None and hashlib.sha256(content).hexdigest() != sha256:
            raise ValueError("its SHA-256 is not the one in its record")
        # Only an empty alpha means none: a stage may be called "nan".
        table = pd.read_csv(path, dtype=text, na_values={"alpha": [""]}, keep_default_na=False)
        if list(table.columns) != COLUMNS or table.empty:
            raise ValueError(f"the columns are not {', '.join(COLUMNS)}")
        for name in COLUMNS:
            if name not in text and table[name].dtype.kind not in (
                "i" if name in ("step", "epoch") else "if"
            ):
                raise ValueError(f"{name} holds what is no number")
        finite = all(table[name].map(math.isfinite).all() for name in ("lr", "value"))
        if not finite or (table[["step", "epoch"]] < 0).any(axis=None):
            raise ValueError("a number is out of range")
        for name, expected in (("experiment", experiment), ("stage", stage)):
            if expected is not None and not (table[name] == expected).all():
                raise ValueError(f"it belongs to another {name}")
    except (OSError, ValueError, OverflowError) as e:  # pandas' parser errors are ValueErrors
        raise Damaged(f"{path} is damaged ({str(e)[:120]})") from None
    return table


def parse_json(text: str | bytes, infinity: bool = False) -> Any:
    """What a JSON text holds, strictly: no NaN, no key twice, no depth that exhausts the stack.

    Args:
        text: the JSON.
        infinity: whether `Infinity`, which Python writes, is taken.

    Raises:
        ValueError: saying what is wrong with it.
    """

    def constant(name: str) -> float:
        if infinity and name == "Infinity":
            return math.inf
        return refuse(name)

    def refuse(constant: str) -> float:
        raise ValueError(f"{constant} is no number")

    def finite(number: str) -> float:
        value = float(number)
        return value if math.isfinite(value) else refuse(number)

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a key stands twice")
        return found

    try:
        return json.loads(text, parse_constant=constant, parse_float=finite, object_pairs_hook=once)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def _read(path: Path) -> bytes:
    if not path.is_file():
        raise ValueError("it is missing, or no regular file")
    with path.open("rb") as f:
        content = f.read(BYTES + 1)
    if len(content) > BYTES:
        raise ValueError(f"it is larger than {BYTES // 1024**2} MiB")
    return content
