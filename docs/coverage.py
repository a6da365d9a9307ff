"""Fold every classification network of torchvision and write down how exact that is.

    make coverage                      # all of them, docs/coverage.csv and docs/coverage.md; 25 minutes on one core
    python docs/coverage.py resnet18   # some of them, to the terminal

The weights are random, nothing is downloaded. BatchNorm takes its statistics from one batch, so that a signal of
ordinary size arrives at the logits and agreement means something.
"""

from __future__ import annotations

import sys
import time
import warnings
from pathlib import Path

import pandas as pd
import torch
import torchvision
from torch import nn
from torchvision.models import get_model, list_models

from alphaprune import ParallelModel, UsageError, fold
from alphaprune.measure import multiply_adds, parameters
from alphaprune.storage import write_bytes

RATIOS = (0.5, 0.34375)
IMAGES = 2
TRANSFORMERS = ("vit", "swin", "maxvit")
WITHOUT_AUXILIARY_HEADS = {"googlenet": {"init_weights": False}, "inception_v3": {"init_weights": False}}
HERE = Path(__file__).parent


def build(name: str) -> tuple[nn.Module, torch.Tensor]:
    """The network with random weights in eval mode, and a batch of noise of the size it expects."""
    torch.manual_seed(0)
    options = {"aux_logits": False} | WITHOUT_AUXILIARY_HEADS[name] if name in WITHOUT_AUXILIARY_HEADS else {}
    network = get_model(name, weights=None, **options).eval()
    side = 299 if name == "inception_v3" else 224
    return network, torch.randn(IMAGES, 3, side, side)


@torch.no_grad()
def set_statistics(model: ParallelModel, images: torch.Tensor) -> None:
    """BatchNorm's running statistics := those of these images at alpha = 0."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for m in norms:
        m.momentum = 1.0
    model.alpha = 0.0
    for m in norms:
        m.train()
    model(images)
    model.eval()


def measure(name: str, keep_ratio: float) -> dict[str, object]:
    """One row of the table."""
    network, images = build(name)
    row: dict[str, object] = {"network": name, "keep_ratio": keep_ratio}
    row |= {"parameters": parameters(network), "multiply_adds": multiply_adds(network, images[:1])}
    started = time.perf_counter()
    try:
        model = ParallelModel(network, keep_ratio, images).eval()
    except UsageError as e:
        return row | {"refused": str(e)}
    set_statistics(model, images)
    small, certificate = fold(model, images)
    assert type(small) is type(network)
    return row | {
        "parameters_folded": parameters(small),
        "multiply_adds_folded": multiply_adds(small, images[:1]),
        "largest_difference": f"{certificate.relative:.1e}",
        "largest_difference_of_a_layer": f"{max(d / v for _, d, v in certificate.layers if v):.1e}",
        "exact": certificate.exact,
        "spread": f"{certificate.spread / certificate.largest_logit:.1e}",
        "agreement": certificate.agreement,
        "seconds": round(time.perf_counter() - started, 1),
        "refused": "",
    }


def page(table: pd.DataFrame) -> str:
    """The table as Markdown, with a summary above it."""
    cnns = table[~table["network"].str.startswith(TRANSFORMERS)]
    folded = cnns[cnns["refused"] == ""]
    close = folded[folded["largest_difference"].astype(float) <= 1e-3]
    lines = [
        "# Coverage",
        "",
        f"Every classification network of torchvision {torchvision.__version__.split('+')[0]}, random weights, {IMAGES} images of noise, float32, one thread;",
        "made by `make coverage`. GoogLeNet and Inception without their auxiliary heads. The largest difference is between folded and unfolded",
        "network, as a share of the largest logit; a layer's as a share of its largest value; exact means at most 1e-4. Spread: how far the logits",
        "of different images lie apart, likewise. Multiply-adds are of one image.",
        "",
        f"Of {cnns['network'].nunique()} convolutional networks at {len(RATIOS)} keep ratios, {len(folded)} of {len(cnns)} runs fold, {len(close)} of them to 1e-3 or better;",
        f"the largest difference is {folded['largest_difference'].astype(float).max():.1e}, the smallest agreement {folded['agreement'].astype(float).min():.0%}. In {len(folded) - folded['exact'].astype(str).eq('True').sum()} of them some layer in between differs by more than 1e-4:",
        "BatchNorm with the statistics of two images magnifies float32's rounding from layer to layer. Vision transformers are refused.",
        "",
        "| network | keep | parameters, M | folded | multiply-adds, M | folded | difference | of a layer | spread | agreement | seconds |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    million = lambda value: f"{float(value) / 1e6:,.2f}"  # noqa: E731
    for r in table.itertuples():
        if r.refused:
            continue
        lines.append(
            f"| {r.network} | {r.keep_ratio:g} | {million(r.parameters)} | {million(r.parameters_folded)} | {million(r.multiply_adds)} | "
            f"{million(r.multiply_adds_folded)} | {r.largest_difference} | {r.largest_difference_of_a_layer} | {r.spread} | {float(r.agreement):.0%} | {r.seconds} |"
        )
    lines += ["", "Refused:", "", "| network | what is said |", "| --- | --- |"]
    for r in table[table["refused"] != ""].drop_duplicates("network").itertuples():
        lines.append(f"| {r.network} | {r.refused[:220]}{'…' if len(r.refused) > 220 else ''} |")
    return "\n".join(lines) + "\n"


def main(names: list[str]) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    everything = list_models(module=torchvision.models)
    rows = []
    for name in names or everything:
        for keep_ratio in RATIOS:
            rows.append(measure(name, keep_ratio))
            print("  ".join(f"{k} {v}" for k, v in rows[-1].items()), flush=True)
    if not names:
        table = pd.DataFrame(rows)
        write_bytes(HERE / "coverage.csv", table.to_csv(index=False).encode())
        write_bytes(HERE / "coverage.md", page(table).encode())


if __name__ == "__main__":
    main(sys.argv[1:])
