"""Choosing what is narrowed and by how much, and saying so before any training."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchvision.models import mobilenet_v3_small, resnet18, resnext50_32x4d, vit_b_16

from alphaprune import ParallelModel, UsageError, fold, plan
from alphaprune.measure import multiply_adds, parameters
from alphaprune.models import resnet20, vgg16

IMAGES = torch.zeros(2, 3, 32, 32)


def planned(network, **options):
    return plan(network, example_input=IMAGES, latency=False, **options)


@settings(max_examples=12, deadline=None)
@given(
    st.sampled_from([lambda: resnet20(), lambda: vgg16(0.25), lambda: mobilenet_v3_small(num_classes=10)]),
    st.one_of(
        st.fixed_dictionaries({"keep_ratio": st.sampled_from([0.25, 0.34375, 0.7, 1.0])}),
        st.fixed_dictionaries({"for_macs": st.floats(0.1, 0.9)}),
        st.fixed_dictionaries({"for_params": st.floats(0.1, 0.9)}),
    ),
    st.sampled_from([1, 4]),
)
def test_the_plan_is_what_folding_gives(build, how_much, round_to):
    network = build()
    p = planned(network, round_to=round_to, **how_much)
    model = ParallelModel(network, example_input=IMAGES, round_to=round_to, **how_much)
    model.alpha = 0.0
    small, certificate = fold(model)
    assert certificate.exact and model.keep_ratio == p.keep_ratio
    assert p.table["parameters"].sum() == parameters(network)
    assert p.table["parameters_folded"].sum() == parameters(small)
    assert p.table["multiply_adds"].sum() == multiply_adds(network, IMAGES[:1])
    assert p.table["multiply_adds_folded"].sum() == multiply_adds(small, IMAGES[:1])
    for cost, share in (
        ("multiply_adds", how_much.get("for_macs")),
        ("parameters", how_much.get("for_params")),
    ):
        if share is not None:
            assert p.share(cost) <= share
            wider = p.keep_ratio + 1 / 1024
            assert wider >= 1 or planned(network, keep_ratio=wider, round_to=round_to).share(cost) > share
    for row in p.table.itertuples():
        module = small.get_submodule(row.layer)
        if isinstance(module, nn.Conv2d | nn.Linear):
            assert row.out_folded == getattr(module, "out_channels", getattr(module, "out_features", None))
            assert (row.out_folded < row.out) != bool(row.why_wide)


def test_nothing_stays_wide_without_a_reason():
    table = planned(resnet20(), exclude=["blocks.0.conv1", "blocks.8.*"]).table.set_index("layer")
    assert table.loc["classifier", "why_wide"] == "it is the network's output"
    assert table.loc["blocks.0.conv1", "why_wide"] == "'blocks.0.conv1' is excluded"
    assert "blocks.8" in table.loc["blocks.8.conv2", "why_wide"]
    assert "blocks.8" in table.loc["blocks.7.conv2", "why_wide"]  # the same sum of channels
    assert table.loc["blocks.1.conv1", "why_wide"] == ""
    wide = table["out"] == table["out_folded"]
    assert (table.loc[wide, "why_wide"] != "").all() and (table.loc[~wide, "why_wide"] == "").all()


def test_channels_that_meet_in_an_addition_stay_equal():
    ratios = {"*": 0.5, "blocks.1": 0.75}
    table = planned(resnet20(), keep_ratio=ratios).table.set_index("layer")
    stream = ["conv", "blocks.0.conv2", "blocks.1.conv2", "blocks.2.conv2"]
    assert set(table.loc[stream, "out_folded"]) == {12}  # tied layers keep the largest of their shares
    assert table.loc["blocks.1.conv1", "out_folded"] == 12 and table.loc["blocks.2.conv1", "out_folded"] == 8


def test_layers_that_no_ratio_names_stay_wide():
    table = planned(vgg16(0.25), keep_ratio={"features.0": 0.5}).table.set_index("layer")
    assert table.loc["features.0", "out_folded"] == 8 and table.loc["features.3", "out_folded"] == 16


def test_ratios_of_layers_are_counted_and_not_written_out():
    said = planned(vgg16(0.25), keep_ratio={"features.0": 0.5, "features.3": 0.5}).totals()
    assert "keep_ratio     one a layer, 2 given" in said and "features" not in said


@pytest.mark.parametrize("keep_ratio", [0.34375, 0.5, 0.2])
def test_channels_are_rounded_to_a_multiple(keep_ratio):
    table = plan(resnet18(), keep_ratio, torch.zeros(1, 3, 64, 64), round_to=8, latency=False).table
    assert all(n % 8 == 0 for n in table[table["kind"] == "Conv2d"]["out_folded"])


def test_groups_of_a_convolution_keep_equal_shares():
    table = plan(resnext50_32x4d(), 0.34375, torch.zeros(1, 3, 64, 64), latency=False).table.set_index(
        "layer"
    )
    assert table.loc["layer1.0.conv2", ["in_folded", "out_folded"]].tolist() == [32, 32]
    assert table.loc["layer4.0.conv2", "out_folded"] == 32 * (32 * 11 // 32)


def test_latency_is_measured():
    p = plan(vgg16(1.0), 0.34375, torch.zeros(4, 3, 32, 32))
    assert 0 < p.milliseconds_folded < p.milliseconds and "ms" not in str(p)
    assert f"{p.milliseconds:.1f} ->" in str(p)
    assert f"keep_ratio     {p.keep_ratio}" in str(p)


class TwoShapes(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.pool, self.b = nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(2), nn.Linear(8, 8)
        self.first, self.scale = nn.Conv2d(3, 8, 1), nn.PReLU(8)

    def forward(self, x):
        once = self.b(self.scale(self.a(x)).mean((2, 3)))
        return self.b(self.first(x)[:, :, 0, 0]) + self.b(once) + self.b(torch.ones(2, 8))


class Fixed(nn.Module):
    """Counts on 8 channels."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8 * 1024, 4)

    def forward(self, x):
        return self.b(torch.relu(self.a(x)).view(-1, 8 * 1024))


class Half(Fixed):
    def forward(self, x):
        return self.b(self.a(x)[:, :4].repeat(1, 2, 1, 1).flatten(1))


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)

    def forward(self, x):
        return self.b(torch.softmax(self.a(x), dim=1))


def model(network, **options):
    return lambda: ParallelModel(network, **({"example_input": IMAGES} | options))


BAD = {
    "pattern": (model(resnet20(), exclude=["blocks.9"]), r"exclude 'blocks\.9' matches no convolution or linear layer; did you mean 'blocks\.\d"),
    "text": (model(resnet20(), exclude="conv"), r"exclude is the text 'conv'; give a list"),
    "all": (model(resnet20(), exclude=["*"]), r"nothing to narrow.*not all of them excluded"),
    "ratio name": (model(resnet20(), keep_ratio={"block": 0.5}), r"names 'block', which matches no convolution or linear layer; there are: conv"),
    "ratio value": (model(resnet20(), keep_ratio={"*": 2}), r"keep_ratio is 2; give a number in \(0, 1\]"),
    "two targets": (model(resnet20(), for_macs=0.5, keep_ratio=0.5), r"exclude each other"),
    "target": (model(resnet20(), for_macs=1.5), r"for_macs is 1\.5; give a share"),
    "out of reach": (model(resnet20(), for_params=1e-6), r"for_params=1e-06 is out of reach"),
    "round_to": (model(resnet20(), round_to=0), r"round_to is 0; give a whole number"),
    "dtype": (model(resnet20(), example_input=IMAGES.double()), r"is torch\.float64, the network's weights are torch\.float32"),
    "device": (model(resnet20(), example_input=IMAGES.to("meta")), r"is on meta, the network on cpu"),
    "two shapes": (model(TwoShapes()), r"layer 'b' is used under two shapes"),
    "fixed number": (model(Fixed()), r"'view' \(view\).*it counts on a fixed number of them"),
    "half": (model(Half()), r"'getitem' \(getitem\) takes a fixed number of channels"),
    "softmax": (model(Mixed()), r"'softmax' \(softmax\) is covered by no rule.*exclude=\['a'\]"),
    "weight norm": (
        model(nn.Sequential(nn.Conv2d(3, 8, 3), nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 3)), nn.Conv2d(8, 2, 1))),
        r"'1' .*remove_parametrizations",
    ),
    "transformer": (
        lambda: ParallelModel(vit_b_16(), example_input=torch.zeros(1, 3, 224, 224)),
        r"self_attention' \(MultiheadAttention\) is covered by no rule",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    make, message = BAD[name]
    with pytest.raises(UsageError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_what_the_error_tells_to_exclude_can_be_excluded():
    network = Mixed()
    network.b = nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    m = ParallelModel(network, 0.5, IMAGES, exclude=["a"])
    m.alpha = 0.0
    small, certificate = fold(m)
    assert certificate.exact and small.b[0].in_channels == 8 and small.b[0].out_channels == 4
