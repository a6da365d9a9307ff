"""Records as they are read back: in the form they were written in, or they count as damaged.

A record lies in a folder that anything may have happened to. What is not JSON, is of another type, lacks a key or
holds what is no finite number is named as damaged, and whoever asked makes it again.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from alphaprune.errors import UsageError

COLUMNS = ["experiment", "stage", "alpha", "lr", "step", "epoch", "split", "metric", "value"]
BYTES = 64 * 1024 * 1024  # no record is nearly as large

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Whole = Annotated[int, Field(ge=0, lt=2**63)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]


class DamagedRecord(UsageError):
    """A record that is there, but not in the form it was written in."""


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


class FoldRecord(_Form):
    """`run.json` of a folded network, see `prune`."""

    identity: Digest
    pruning_version: int | None = None
    network: str
    table: Annotated[list[_Row], Field(min_length=1)]
    certificate: _Certificate


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


def read_record(path: Path, form: type[_Form]) -> dict[str, Any]:
    """A record's content.

    Args:
        path: a JSON file.
        form: what must stand in it.

    Raises:
        DamagedRecord: naming the file and what is wrong with it.
    """
    try:
        content = parse_json(_read(path))
        form.model_validate(content)
    except ValidationError as e:
        first = e.errors()[0]
        key = ".".join(str(part) for part in first["loc"])[:80]
        raise DamagedRecord(f"{path} is damaged ({key}: {first['msg'][:120]})") from None
    except (OSError, ValueError) as e:
        raise DamagedRecord(f"{path} is damaged ({str(e)[:120]})") from None
    return content


def read_history(path: Path, experiment: str | None = None, stage: str | None = None) -> pd.DataFrame:
    """The measurements in a `history.csv`, one a row, in the columns `COLUMNS`.

    Args:
        path: the file.
        experiment, stage: whose measurements they must be; any one's if None.

    Raises:
        DamagedRecord: naming the file and what is wrong with it.
    """
    text = dict.fromkeys(("experiment", "stage", "split", "metric"), str)
    try:
        _read(path)
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
        raise DamagedRecord(f"{path} is damaged ({str(e)[:120]})") from None
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
