"""The end of the line: fold an experiment's final model and read the test set, once, for the table."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from alphaprune import data as images
from alphaprune.certificate import Certificate
from alphaprune.dead import dead_channels
from alphaprune.errors import UsageError
from alphaprune.experiment import Experiment
from alphaprune.fold import fold
from alphaprune.measure import multiply_adds, parameters
from alphaprune.provenance import provenance
from alphaprune.pruned import (
    COLUMNS,
    DEAD,
    FOLDED,
    ORIGINAL,
    PRUNING_VERSION,
    UNFOLDED,
    WEIGHTS,
    Pruned,
    fold_command,
    folder_of,
    load_pruned,
)
from alphaprune.records import write_record
from alphaprune.skips import SkipModel, remove_skips
from alphaprune.storage import save_tensors
from alphaprune.train import evaluate

CERTIFIED = 1000  # validation images that the certificate is measured on, at most
LOOKED_AT = 500  # validation images that dead channels are looked for in, at most


def prune(experiment: Experiment) -> Pruned:
    """Fold the model that the experiment's `folds` names and compare it with what it came from, or take the record.

    Writes `run.json` and `weights.safetensors`, the folded network, beside the records of the stages. A model that
    is recorded is not folded again, and the test images are not read again.

    Raises:
        UsageError: if the experiment folds nothing, or the stage it folds has not run.
    """
    s = experiment.settings
    if s.folds is None:
        raise UsageError(
            f"experiment '{s.experiment}' has no `folds`; name the stage to fold, such as fig4/a0-lr0.1"
        )
    return load_pruned(experiment) or _prune(experiment)


def _prune(experiment: Experiment) -> Pruned:
    s = experiment.settings
    if s.threads:
        torch.set_num_threads(s.threads)
    model = experiment.model(experiment.to_fold())
    val = images.load(s.data).val.first(s.val_images)
    x, _ = next(images.batches(val, CERTIFIED))
    small, certificate = _folded(model, x)
    model.composed = False  # the table compares with the plain form too
    test = images.load_test(s.data)
    rows = []
    original = experiment.base_network()
    for name, network in ((ORIGINAL, original), (UNFOLDED, model), (FOLDED, small)):
        validation, final = (evaluate(network, split)[1] for split in (val, test))
        costs = parameters(network), multiply_adds(network, torch.zeros(1, 3, 32, 32))
        rows.append(dict(zip(COLUMNS, (name, validation, final, *costs), strict=True)))
    both = ((ORIGINAL, original), (FOLDED, small))
    dead = pd.concat(dead_channels(n, x[:LOOKED_AT]).assign(network=name) for name, n in both)[DEAD]
    folder = folder_of(experiment)
    digest = save_tensors(folder / WEIGHTS, small.state_dict())
    record: dict[str, Any] = {
        "experiment": s.experiment,
        "folds": experiment.to_fold(),
        "identity": experiment.find(experiment.to_fold()).identity,
        "pruning_version": PRUNING_VERSION,
        "network": str(small),
        "table": rows,
        "test_images": len(test),
        "certificate": asdict(certificate),
        "dead": dead.to_dict("records"),
        "weights_sha256": digest,
        "data_checksum": experiment.data_checksum,
        **provenance(experiment.root, fold_command(experiment)),
    }
    write_record(folder / "run.json", record)
    return Pruned(str(small), certificate, pd.DataFrame(rows, columns=COLUMNS), dead)


def folded(experiment: Experiment) -> tuple[nn.Module, Certificate]:
    """The network that the experiment's final model folds to, in eval mode, with a certificate on one image.

    Raises:
        UsageError: if the stage it is folded from has not run, or its weights are gone.
    """
    return _folded(experiment.model(experiment.to_fold()), experiment.example_image())


def _folded(model: nn.Module, x: Tensor) -> tuple[nn.Module, Certificate]:
    return remove_skips(model, x) if isinstance(model, SkipModel) else fold(model, x)
