"""Ways to run a network side by side, layer by layer, and which networks of a preset are finished."""

import pytest
import torch

from alphaprune import ParallelModel, UsageError, fold
from alphaprune.deployment import deployment
from alphaprune.finished import finished
from alphaprune.layer_times import layer_times
from alphaprune.models import vgg16

IMAGES = torch.randn(2, 3, 32, 32)


@pytest.fixture(scope="module")
def pair():
    model = ParallelModel(vgg16(0.25), 0.34375, IMAGES)
    model.alpha = 0.0
    return {"original": vgg16(0.25).eval(), "pruned": fold(model)[0]}


def test_every_network_is_run_in_every_way(pair):
    table = deployment(pair, IMAGES, ["as it is", "optimised"], seconds=0.1, threads=1)
    assert list(zip(table["network"], table["way"], strict=True)) == [
        (network, way) for network in ("original", "pruned") for way in ("as it is", "optimised")
    ]
    assert table["predicted"].tolist() == pytest.approx([1, 1, 8.373, 8.373], rel=1e-3)
    optimised, pruned = table.iloc[1], table.iloc[3]
    assert table.at[0, "faster"] == table.at[0, "faster_than_same"] == optimised["faster_than_same"] == 1
    assert pruned["faster_than_same"] == pytest.approx(pruned["faster"] / optimised["faster"])
    assert (table["start"] > 0).all() and (table["batch"] == 2).all()


def test_an_unknown_way_is_refused(pair):
    with pytest.raises(UsageError, match="way 'optimized' is unknown; use as it is, optimised,"):
        deployment(pair, IMAGES, ["optimized"])


def test_layers_are_listed_with_what_their_multiply_adds_predict(pair):
    table = layer_times(pair["original"], pair["pruned"], IMAGES, seconds=0.1, threads=1).set_index("layer")
    assert len(table) == 13 + 1 + 1 and table.index[-1] == "all else"
    first, second = table.iloc[0], table.iloc[1]
    assert (first["channels"], first["channels_pruned"]) == ("3 -> 16", "3 -> 5")
    assert first["predicted"] == pytest.approx(16 / 5) and second["predicted"] == pytest.approx((16 / 5) ** 2)
    assert (table["milliseconds"].iloc[:-1] > 0).all()
    assert second["reached"] == pytest.approx(second["faster"] / second["predicted"])


def test_a_preset_without_a_pretrained_network_has_nothing_finished(project):
    with pytest.raises(
        UsageError, match="preset 'smoke' has no finished model yet; run `make pruned PRESET=smoke` first"
    ):
        finished("smoke", project)
