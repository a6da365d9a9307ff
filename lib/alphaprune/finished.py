"""The finished models of a preset: the pretrained networks, and what folding left of each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from alphaprune.errors import UsageError
from alphaprune.experiment import Experiment
from alphaprune.provenance import merged
from alphaprune.prune import folded
from alphaprune.pruned import load_pruned, pruned_provenance
from alphaprune.settings import load_settings, project_root

ORIGINAL = "original"
# By the kind of network the experiments whose final models are folded.
EXPERIMENTS = {
    "VGG-16": {"pruned": "pruned"},
    "ResNet-20": {"narrow": "resnet20_narrow", "no skips": "resnet20_plain"},
}
TARGETS = {"VGG-16": "pruned", "ResNet-20": "skips"}  # of the Makefile, that finish them


@dataclass(frozen=True)
class Finished:
    """The finished models of a preset.

    Attributes:
        networks: in eval mode on the CPU, by kind and name, the original first.
        sources: what the folded ones were made from.
        missing: those that are not finished, as "kind, name", with the command that finishes them.
    """

    networks: dict[str, dict[str, nn.Module]]
    sources: dict[str, Any]
    missing: dict[str, str]


def finished(preset: str, root: Path | None = None) -> Finished:
    """What is recorded of a preset; nothing is trained.

    Args:
        preset: a folder in params/.
        root: the project's folder; found from the working directory if None.

    Raises:
        UsageError: if there is not even a pretrained network.
    """
    root = root or project_root()
    networks: dict[str, dict[str, nn.Module]] = {}
    sources = []
    missing: dict[str, str] = {}
    for kind, names in EXPERIMENTS.items():
        missing |= {f"{kind}, {name}": f"make {TARGETS[kind]} PRESET={preset}" for name in (ORIGINAL, *names)}
        base = load_settings(preset, next(iter(names.values())), root).base
        if not (root / base).is_file():
            continue
        runs = {label: Experiment(preset, name, root) for label, name in names.items()}
        networks[kind] = {ORIGINAL: next(iter(runs.values())).base_network()}
        for label, run in runs.items():
            if _is_recorded(run):
                networks[kind][label] = folded(run)[0]
                sources.append(pruned_provenance(run))
        for label in networks[kind]:
            del missing[f"{kind}, {label}"]
    if not networks:
        raise UsageError(
            f"preset '{preset}' has no finished model yet; run `make pruned PRESET={preset}` first"
        )
    return Finished(networks, merged(sources), missing)


def _is_recorded(run: Experiment) -> bool:
    try:
        return load_pruned(run) is not None
    except UsageError:  # the stage to fold is the best of those that have run, and none has
        return False
