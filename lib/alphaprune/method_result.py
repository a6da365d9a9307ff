"""What a method of a comparison comes to: its last network's costs and scores, measured once and recorded as `final.json`, and those of the original."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from alphaprune import data, pretrained
from alphaprune.certificate import Certificate
from alphaprune.course import FOLD_NOW_RUNNING
from alphaprune.experiment import Experiment
from alphaprune.fold import fold
from alphaprune.measure import multiply_adds, parameters
from alphaprune.methods import final, final_file
from alphaprune.parallel import ParallelModel
from alphaprune.records import OriginalRecord, read_if_whole, write_record
from alphaprune.train import evaluate


@torch.no_grad()
def of_trained(of: Experiment) -> dict[str, Any]:
    """What the last stage's network, folded if it has branches, costs and scores; the test images are read once.

    Args:
        of: a method's experiment, all of whose stages are recorded.

    Returns:
        The columns of `comparison.COLUMNS` from `images` to `start_accuracy`; accuracies in percent.
    """
    last = of.stages[-1]
    outcomes = [of.record(n.name)["outcome"] for n in of.stages]
    seconds = sum(o["seconds"] + o.get("start_seconds", 0.0) for o in outcomes) + of.seconds_for_widths()
    measured = final(of)
    if measured is None:
        model = of.model(last.name)
        measured = _costs(fold(model)[0] if isinstance(model, ParallelModel) else model, of)
        write_record(final_file(of), measured | {"weights_sha256": of.record(last.name)["weights_sha256"]})
    begun = of.stage_history(of.stages[0].name)
    at_first = begun[(begun["split"] == "val") & (begun["epoch"] == 0)].set_index("metric")["value"]
    start = at_first.get(FOLD_NOW_RUNNING, at_first["accuracy"])  # of what would be left
    return {
        "start_accuracy": 100 * start,
        "images": sum(o["images"] for o in outcomes),
        "seconds": seconds,
        "val_accuracy": 100 * of.record(last.name)["metrics"]["val_accuracy"],
        **measured,
    }


def folded(of: Experiment, images: Tensor) -> tuple[nn.Module, Certificate | None]:
    """The plain narrow network that a method ends in, trained anew where its weights are not there.

    Args:
        of: the method's experiment.
        images: (N, C, H, W), for the certificate.

    Returns:
        As of `fold`; without a certificate where the network was folded before it trained.
    """
    last = of.stages[-1]
    of.run(print, weights=True)
    model = of.model(last.name)
    return (model, None) if last.stage.alpha is None else fold(model, images)


def of_original(of: Experiment) -> dict[str, float]:
    """The network that all methods of a comparison begin with: params, macs, and val_accuracy and test_accuracy in percent; measured
    once and recorded as `original.json` beside its weights, which need not be there any more then.

    Args:
        of: the experiment of a preset that the comparison has its settings from.
    """
    s = of.settings
    val = data.load(s.data).val.first(s.val_images)
    made_of = {"weights_sha256": pretrained.digest(s, of.root), "val_images": len(val)}
    file = (of.root / s.base).with_name("original.json")
    content = read_if_whole(file, OriginalRecord)
    if content is None or any(content[k] != v for k, v in made_of.items()):
        network = of.base_network()
        content = _costs(network, of) | {"val_accuracy": 100 * evaluate(network, val)[1]} | made_of
        write_record(file, content)
    return {k: content[k] for k in ("params", "macs", "val_accuracy", "test_accuracy")}


def _costs(network: nn.Module, of: Experiment) -> dict[str, Any]:
    return {
        "params": parameters(network),
        "macs": multiply_adds(network, of.example_image()),
        "test_accuracy": 100 * evaluate(network, data.load_test(of.settings.data))[1],
    }
