"""The keep_ratio of each layer of an experiment: one for all, by sensitivity, measured once and recorded, or by Torch-Pruning's ranking."""

from __future__ import annotations

import hashlib
import json
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alphaprune import data, pretrained, sources
from alphaprune.errors import UsageError
from alphaprune.lock import only_here
from alphaprune.models import NETWORKS, example_image
from alphaprune.narrowing import ranked_shares
from alphaprune.records import SensitivityRecord, read_if_whole, write_record
from alphaprune.sensitivity import OtherLayers, allot, damages
from alphaprune.settings import Settings
from alphaprune.timing import torch_threads
from alphaprune.train import accelerator_for_this_machine

# Part of the identity of widths by sensitivity. Raise it when what is measured changes.
SENSITIVITY_VERSION = 1
SENSITIVITY_IMAGES = 1000  # at most


def ratios(settings: Settings, root: Path) -> float | dict[str, float]:
    """What the settings' keep_ratio means for each layer: one number for all, or by layer name (raises UsageError)."""
    if settings.widths == "uniform":
        return settings.keep_ratio
    if settings.widths != "sensitivity":
        return dict(_ranked(settings, root))
    damage = tuple((group, tuple(curve.items())) for group, curve in measured_damages(settings, root).items())
    s = settings
    try:
        return dict(_allotted(s.network, s.width, s.keep_ratio, s.round_to, s.damage_power, damage))
    except OtherLayers as e:
        where = f"results/{s.preset}/sensitivity"
        raise UsageError(f"{where}: {e}: delete that folder and run the same command again") from None
    except UsageError as e:
        raise UsageError(f"{s.experiment}, keep_ratio {s.keep_ratio:g}: {e}") from None


_RANKED: dict[tuple[Any, ...], dict[str, float]] = {}  # a comparison asks again for every rate and seed


def _ranked(settings: Settings, root: Path) -> dict[str, float]:
    """Shares by Torch-Pruning's ranking of the pretrained weights, which have to be there: quick to have, so not recorded."""
    s, importance = settings, settings.widths.rpartition("-")[2]
    key = s.network, s.width, pretrained.digest(s, root), s.keep_ratio, importance
    if key not in _RANKED:
        with torch.random.fork_rng(devices=[]), torch_threads(s.threads):
            network = pretrained.network(s, root).eval()
            try:
                _RANKED[key] = ranked_shares(network, s.keep_ratio, importance, example_image())
            except UsageError as e:
                raise UsageError(f"{s.experiment}: {e}") from None
    return _RANKED[key]


@lru_cache  # a second each, and a comparison asks for the same widths again for every seed
def _allotted(
    network: str,
    width: float,
    keep_ratio: float,
    round_to: int,
    power: float,
    damage: tuple[tuple[str, Any], ...],
) -> dict[str, float]:
    curves = {group: dict(curve) for group, curve in damage}
    network = NETWORKS[network](width).eval()
    return allot(network, curves, keep_ratio, example_image(), round_to=round_to, power=power)


def measured_damages(settings: Settings, root: Path) -> dict[str, dict[float, float]]:
    """What `sensitivity.damages` gives for the pretrained network, from the record where there is one."""
    found = measured(settings, root)["damages"]
    return {group: {float(r): d for r, d in curve.items()} for group, curve in found.items()}


def measured(settings: Settings, root: Path) -> dict[str, Any]:
    """What narrowing single layers does to the pretrained network, in the form of `records.SensitivityRecord`; measured where it is
    not recorded."""
    if (content := recorded(settings, root)) is not None:
        return content
    identity, file = _identity(settings, root)
    with only_here(file.parent, "the measurement of sensitivity", print), torch_threads(settings.threads):
        if (content := recorded(settings, root)) is not None:  # while this run waited
            return content
        started = time.monotonic()
        device = accelerator_for_this_machine().device
        seen = first_images(settings)[:SENSITIVITY_IMAGES].to(device)
        found = damages(pretrained.network(settings, root).eval().to(device), seen)
        content = {"identity": identity, "damages": found, "seconds": round(time.monotonic() - started, 1)}
        write_record(file, content)
    return content


def recorded(settings: Settings, root: Path) -> dict[str, Any] | None:
    """The same where it is recorded, otherwise None."""
    identity, file = _identity(settings, root)
    content = read_if_whole(file, SensitivityRecord)
    return content if content and content["identity"] == identity else None


def _identity(settings: Settings, root: Path) -> tuple[str, Path]:
    """What the measurement is a function of, hashed, and the file that it is recorded in."""
    determines = [
        SENSITIVITY_VERSION,
        pretrained.digest(settings, root),
        sources.checksum(settings.data),
        settings.train_images,
        settings.init_images,
    ]
    identity = hashlib.sha256(json.dumps(determines).encode()).hexdigest()
    return identity, root / "results" / settings.preset / "sensitivity" / f"{identity[:8]}.json"


def first_images(settings: Settings) -> Tensor:
    """The training images that branches are fitted to and widths measured on, (N, 3, H, W), normalised."""
    train = data.load(settings.data).train.first(settings.train_images)
    return next(data.batches(train, settings.init_images))[0]
