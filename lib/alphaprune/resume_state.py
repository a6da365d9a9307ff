"""A resume state as it is read back: of this very network and schedule, or it counts as damaged.

All of it is checked before any of it is used, so that a stage never goes on from half of a state.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

from alphaprune.errors import Damaged
from alphaprune.records import Seconds, Whole, parse_json

_Number = Annotated[float, Field(allow_inf_nan=False)]


class _Exact(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class _Row(_Exact):
    step: Whole
    epoch: Whole
    split: str
    metric: str
    value: _Number


class _Outcome(_Exact):
    history: list[_Row]
    best_epoch: Whole
    best_accuracy: _Number
    epochs: Whole
    steps: Whole
    images: Whole
    seconds: Seconds
    diverged: bool


class _State(_Exact):
    of: str
    saves: Whole
    step: Whole  # of the running epoch, 0 between epochs
    outcome: _Outcome
    scheduler: dict[str, Any]
    lr: list[Annotated[float, Field(ge=0, allow_inf_nan=False)]]
    lowest_loss: float  # infinite before the first epoch
    epochs_since_lowest: Whole


def read_state(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    of: str,
) -> dict[str, Any]:
    """What a resume state holds beside its tensors.

    Args:
        tensors, metadata: as `storage.load_tensors` gives them; the metadata has JSON under `state`.
        model, optimizer, scheduler: those that the state is for; they are not changed.
        of: what it was saved with. Two stages may have networks of one shape, and a state can be copied with its checksum.

    Raises:
        Damaged: if anything in it is of another form, of another network or of another stage.
    """
    try:
        rest = parse_json(metadata.get("state", ""), infinity=True)
        _State.model_validate(rest)
    except (ValidationError, ValueError) as e:
        raise Damaged(f"the resume state is damaged ({str(e)[:200]})") from None
    if rest["of"] != of:
        raise Damaged("the resume state is of another stage")
    expected: dict[str, Tensor] = {}
    for prefix in ("model/", "best/"):
        expected |= {prefix + name: value for name, value in model.state_dict().items()}
    expected |= {"meter/sums": torch.empty(3), "random/cpu": torch.get_rng_state()}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    optional = {f"momentum/{i}": p for i, p in enumerate(parameters)}
    if torch.cuda.is_available():
        optional["random/cuda"] = torch.cuda.get_rng_state()
    if not expected.keys() <= tensors.keys() <= expected.keys() | optional.keys():
        raise Damaged("the resume state is of another network")
    for name, value in tensors.items():
        like = expected.get(name, optional.get(name))
        if value.shape != like.shape or value.dtype != like.dtype:
            raise Damaged(f"the resume state is of another network ('{name}')")
    if len(rest["lr"]) != len(optimizer.param_groups):
        raise Damaged("the resume state has other learning rates")
    own = {k: v for k, v in scheduler.state_dict().items() if k != "_anneal_func_type"}
    if not _alike(rest["scheduler"], own):
        raise Damaged("the resume state is of another schedule")
    return rest


def _alike(found: Any, own: Any) -> bool:
    """Whether two values have the same keys and kinds of values, as far as JSON tells them apart."""
    if isinstance(own, dict):
        return (
            isinstance(found, dict)
            and found.keys() == own.keys()
            and all(_alike(found[k], own[k]) for k in own)
        )
    if isinstance(own, list | tuple):
        return isinstance(found, list) and len(found) == len(own) and all(map(_alike, found, own))
    if isinstance(own, bool) or own is None or isinstance(own, str):
        return type(found) is type(own)
    return isinstance(found, int | float) and not isinstance(found, bool) and not math.isnan(found)
