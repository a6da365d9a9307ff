"""Ways to run a network side by side, layer by layer, and which networks of a preset are finished."""

import shutil

import pytest
import torch
from conftest import ROOT

from alphaprune import UsageError
from alphaprune.deployment import deployment, pair, rounded
from alphaprune.finished import finished
from alphaprune.footprint import footprint
from alphaprune.layer_times import layer_times
from alphaprune.measure import multiply_adds
from alphaprune.models import vgg16

IMAGES = torch.randn(2, 3, 32, 32)


@pytest.fixture(scope="module")
def both():
    return pair(vgg16(0.25), IMAGES, 0.34375)


def test_every_network_is_run_in_every_way(both):
    table = deployment(both, IMAGES, ["as it is", "optimised"], seconds=0.1, threads=1)
    assert list(zip(table["network"], table["way"], strict=True)) == [
        (network, way) for network in ("original", "pruned") for way in ("as it is", "optimised")
    ]
    assert table["predicted"].tolist() == pytest.approx([1, 1, 8.373, 8.373], rel=1e-3)
    optimised, pruned = table.iloc[1], table.iloc[3]
    assert table.at[0, "faster"] == table.at[0, "faster_than_same"] == optimised["faster_than_same"] == 1
    assert pruned["faster_than_same"] == pytest.approx(pruned["faster"] / optimised["faster"])
    assert pruned["reached"] == pytest.approx(pruned["faster_than_same"] / pruned["predicted"])
    assert (table["start"] > 0).all() and (table["batch"] == 2).all()


def test_an_unknown_way_is_refused(both):
    with pytest.raises(UsageError, match="way 'optimized' is unknown; use as it is, optimised,"):
        deployment(both, IMAGES, ["optimized"])


def test_layers_are_listed_with_what_their_multiply_adds_predict(both):
    table = layer_times(both["original"], both["pruned"], IMAGES, seconds=0.1, threads=1).set_index("layer")
    assert len(table) == 13 + 1 + 1 and table.index[-1] == "all else"
    first, second = table.iloc[0], table.iloc[1]
    assert (first["channels"], first["channels_pruned"]) == ("3 -> 16", "3 -> 5")
    assert first["predicted"] == pytest.approx(16 / 5) and second["predicted"] == pytest.approx((16 / 5) ** 2)
    third = table.iloc[5]  # where 22 channels become 24 on some CPUs
    assert third["channels_pruned"] == "22 -> 22" and third["predicted"] == pytest.approx((64 / 22) ** 2)
    assert (table["milliseconds"].iloc[:-1] > 0).all()
    assert second["reached"] == pytest.approx(second["faster"] / second["predicted"])


def test_channels_come_in_multiples_at_no_more_cost_by_sensitivity():
    network, share = vgg16(0.125), 0.5
    layers = [n for n, m in network.named_modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)][:-1]
    damages = {name: {0.25: 2.0 + i, 0.5: 1.0, 0.75: 0.1} for i, name in enumerate(layers)}
    networks = pair(network, IMAGES, share) | rounded(network, damages, IMAGES, share, [4])
    cost = {name: multiply_adds(n, IMAGES[:1]) for name, n in networks.items()}
    by_sensitivity = "pruned, widths by sensitivity"
    names = ["original", "pruned", "pruned, round_to 4", by_sensitivity, f"{by_sensitivity}, round_to 4"]
    assert list(networks) == names
    assert max(cost[n] for n in names[2:]) <= cost["pruned"] < cost["original"]
    for name in (names[2], names[4]):
        widths = [m.out_channels for m in networks[name].modules() if isinstance(m, torch.nn.Conv2d)]
        assert all(w % 4 == 0 for w in widths)


def test_networks_are_measured_where_they_are_asked_to_be(both):
    table = footprint({"VGG-16": both}, IMAGES[:1], [2], seconds=0.1, threads=1, device="cpu")
    assert list(table["network"]) == ["original", "pruned"] and (table["device"] == "cpu").all()
    assert (table[["milliseconds", "images_per_second", "memory_peak"]] > 0).all(axis=None)
    with pytest.raises(RuntimeError):  # no such device: it is not passed over
        footprint({"VGG-16": both}, IMAGES[:1], [2], seconds=0.1, device="nowhere")


def test_what_is_not_finished_is_named_with_what_finishes_it(project):
    shutil.copytree(ROOT / "results" / "quick" / "pretrained", project / "results" / "quick" / "pretrained")
    models = finished("quick", project)
    assert {kind: list(own) for kind, own in models.networks.items()} == {"VGG-16": ["original"]}
    assert models.missing == {"VGG-16, pruned": "make pruned PRESET=quick"} | {
        f"ResNet-20, {name}": "make skips PRESET=quick" for name in ("original", "narrow", "no skips")
    }


def test_a_preset_without_a_pretrained_network_has_nothing_finished(project):
    with pytest.raises(
        UsageError, match="preset 'smoke' has no finished model yet; run `make pruned PRESET=smoke` first"
    ):
        finished("smoke", project)
