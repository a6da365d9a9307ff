"""What `prune` recorded: the folded network in numbers, read without torch, which takes seconds to load."""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from alphaprune.certificate import Certificate
from alphaprune.errors import Damaged, UsageError
from alphaprune.experiment import Experiment
from alphaprune.provenance import merged, of_records, papermill_command
from alphaprune.records import FoldRecord, read_record
from alphaprune.settings import parameter_files
from alphaprune.stages import OF_ONE_EXPERIMENT
from alphaprune.storage import check_digest, digest_file

# Raise it when what `prune` measures or records changes; older records are then made anew.
PRUNING_VERSION = 3
COLUMNS = ["network", "val_accuracy", "test_accuracy", "parameters", "multiply_adds"]
DEAD = ["network", "layer", "dead"]
WEIGHTS = "weights.safetensors"
ORIGINAL, UNFOLDED, FOLDED = "original", "alpha 0", "folded"


@dataclass(frozen=True)
class Pruned:
    """What folding gave.

    Attributes:
        network: the folded network, as it prints.
        certificate: measured on validation images.
        table: a row each for the original, the unfolded model at alpha 0 and the folded network; columns
            `COLUMNS`, accuracies in 0..1.
        dead: a row a ReLU of the original and of the folded network, columns `network`, `layer` and `dead` as of `dead.dead_channels`, on
            validation images.
    """

    network: str
    certificate: Certificate
    table: pd.DataFrame
    dead: pd.DataFrame

    def layer(self, name: str) -> str:
        """How a layer of the folded network prints, with all that is in it; `name` as of `get_submodule`, such as blocks.3."""
        lines = self.network.splitlines()
        for depth, part in enumerate(name.split("."), 1):
            indent = "  " * depth
            begins = [i for i, line in enumerate(lines) if line.startswith(f"{indent}({part}): ")]
            if not begins:
                raise UsageError(f"the folded network has no layer '{name}'")
            lines = lines[begins[0] :]
            # What holds others ends with a bracket of its own, in line with its name.
            lines = lines[: lines.index(f"{indent})") + 1 if lines[0].endswith("(") else 1]
        return textwrap.dedent("\n".join(lines))


def load_pruned(experiment: Experiment) -> Pruned | None:
    """What `prune` recorded for this very model, None if it has not run, or its record or weights are damaged."""
    record, weights = (folder_of(experiment) / name for name in ("run.json", WEIGHTS))
    if not record.is_file():
        if weights.exists():  # it was folded, then
            warnings.warn(f"{record} is missing; it is folded again", stacklevel=2)
        return None
    try:
        content = read_record(record, FoldRecord)
        if weights.exists() or digest_file(weights).exists():  # else the record suffices
            check_digest(weights, content["weights_sha256"])
    except Damaged as e:
        warnings.warn(f"{e}; it is folded again", stacklevel=2)
        return None
    made = content["identity"], content.get("pruning_version")
    if made != (experiment.find(experiment.to_fold()).identity, PRUNING_VERSION):
        return None
    certificate = Certificate.from_record(content["certificate"])
    tables = pd.DataFrame(content["table"], columns=COLUMNS), pd.DataFrame(content["dead"], columns=DEAD)
    return Pruned(content["network"], certificate, *tables)


def side_by_side(networks: Mapping[str, Mapping[str, Pruned]]) -> pd.DataFrame:
    """Original and folded networks in one table, a row a network.

    Args:
        networks: by a network's name what it was folded to, by way; all of a network from the same original.

    Returns:
        The columns `COLUMNS`; `network` is the name and, on a second line, "original" or the way.
    """
    rows = []
    for name, ways in networks.items():
        tables = {way: pruned.table.set_index("network") for way, pruned in ways.items()}
        rows.append(next(iter(tables.values())).loc[[ORIGINAL]].assign(network=f"{name}\n{ORIGINAL}"))
        rows += [t.loc[[FOLDED]].assign(network=f"{name}\n{way}") for way, t in tables.items()]
    return pd.concat(rows, ignore_index=True)[COLUMNS]


def pruned_provenance(experiment: Experiment) -> dict[str, Any]:
    """What figures of `prune`'s table were made from: the folded network's record, that of the stage it was folded from, and
    all that this comes from."""
    s, of = experiment.settings, experiment
    folded_from, _, _ = experiment.to_fold().rpartition("/")
    if folded_from not in ("", s.experiment):
        shared = {k: v for k, v in experiment.given.items() if k not in OF_ONE_EXPERIMENT}
        of = Experiment(s.preset, folded_from, experiment.root, **shared)
    record = folder_of(experiment) / "run.json"
    own = of_records(
        experiment.root,
        [record] if record.is_file() else [],
        fold_command(experiment),
        parameter_files(s.preset, s.experiment, experiment.root),
    )
    return merged([of.provenance(), own])


def fold_command(experiment: Experiment) -> str:
    """The command that folds the experiment's final model."""
    s = experiment.settings
    file = f"params/{s.preset}/{s.experiment}.yaml"
    return papermill_command("03_fold_and_verify", file, experiment.changed)


def folder_of(experiment: Experiment) -> Path:
    """Where the record and the weights of the folded network lie."""
    s = experiment.settings
    identity = experiment.find(experiment.to_fold()).identity
    return experiment.root / "results" / s.preset / "stages" / s.experiment / f"folded-{identity[:8]}"
