"""Bundles: a folded network that loads, computes and exports the same without the library."""

import copy
import importlib.util
import json
import pickle
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
import torchvision
from test_any_network import PARTS, Random
from test_fold import scramble
from torch import nn
from torch.nn import functional as F
from torchvision.models.convnext import CNBlockConfig

from alphaprune import Certificate, ParallelModel, UsageError, fold, models, save_bundle

IMAGE = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def folded(network, images=IMAGE, keep_ratio=0.34375):
    torch.manual_seed(0)
    model = ParallelModel(network.eval(), keep_ratio, images)
    scramble(model, 0)
    model.alpha = 0.0
    return fold(model.eval())


def imported(folder):
    spec = importlib.util.spec_from_file_location("model", folder / "model.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["model"] = module  # where pickle looks the class up
    spec.loader.exec_module(module)
    return module


def same(a, b, tolerance=1e-6):
    return bool((a - b).abs().max() <= tolerance * b.abs().max())


@pytest.fixture(scope="module")
def resnet18(tmp_path_factory):
    """A folded ResNet-18, its certificate and its bundle, with ONNX."""
    torch.manual_seed(0)
    small, certificate = folded(torchvision.models.resnet18(num_classes=10))
    folder = tmp_path_factory.mktemp("bundles") / "resnet18"
    assert save_bundle(small, folder, IMAGE, certificate, {"seed": 0}) == folder
    return small, certificate, folder


ALONE = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("alphaprune", "torchvision"):
            raise ImportError(f"{name} is not to be had here")

sys.meta_path.insert(0, Refuse())
sys.path.insert(0, sys.argv[1])
import torch
import model
torch.set_num_threads(1)
with torch.no_grad():
    torch.save(model.load()(torch.load(sys.argv[2])), sys.argv[3])
assert not {"alphaprune", "torchvision"} & set(sys.modules)
"""


def test_it_loads_in_a_process_without_the_library(resnet18, tmp_path):
    small, _, folder = resnet18
    torch.save(IMAGE, tmp_path / "images.pt")
    subprocess.run(
        [sys.executable, "-I", "-B", "-c", ALONE, folder, tmp_path / "images.pt", tmp_path / "logits.pt"],
        check=True,
    )
    assert same(torch.load(tmp_path / "logits.pt"), small(IMAGE))


def test_the_folder_holds_what_it_says(resnet18):
    _, certificate, folder = resnet18
    listed = {line.split("  ")[1] for line in (folder / "SHA256SUMS").read_text().splitlines()}
    assert {p.name for p in folder.iterdir()} - {"__pycache__"} == listed | {"SHA256SUMS"}
    subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=folder, check=True)
    record = json.loads((folder / "certificate.json").read_text())
    assert Certificate.from_record(record) == certificate and record["weights_as_certified"] is True
    assert f"{certificate.weights_sha256}  weights.safetensors" in (folder / "SHA256SUMS").read_text()
    assert json.loads((folder / "record.json").read_text()) == {"seed": 0}
    widths = json.loads((folder / "widths.json").read_text())
    assert (widths["conv1"]["in_channels"], widths["conv1"]["out_channels"]) == (3, 22)


def test_a_certificate_of_other_weights_is_said_to_be_one(resnet18, tmp_path):
    small, certificate, folder = resnet18
    trained = copy.deepcopy(small)
    with torch.no_grad():
        trained.fc.bias[0] += 1
    with pytest.warns(UserWarning, match="certificate is of other weights than these"):
        save_bundle(trained, tmp_path / "trained", IMAGE, certificate, onnx=False)
    record = json.loads((folder / "certificate.json").read_text())
    older = Certificate.from_record({k: v for k, v in record.items() if not k.startswith("weights_")})
    save_bundle(small, tmp_path / "older", IMAGE, older, onnx=False)
    found = [json.loads((tmp_path / f / "certificate.json").read_text()) for f in ("trained", "older")]
    assert [f["weights_as_certified"] for f in found] == [False, None]


def test_onnx_runtime_gives_the_same_for_another_number_of_images(resnet18):
    import onnxruntime

    small, _, folder = resnet18
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    for n in (1, 5):
        images = torch.randn(n, 3, 64, 64)
        (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        assert isinstance(logits, np.ndarray) and same(torch.from_numpy(logits), small(images), 1e-4)
    assert b".py" not in (folder / "model.onnx").read_bytes()  # no lines of this machine's files


def test_a_folded_network_is_an_ordinary_one(resnet18):
    small, _, folder = resnet18
    expected = small(IMAGE)
    assert same(torch.export.export(small, (IMAGE,)).module()(IMAGE), expected)
    for network in (small, imported(folder).load()):
        assert same(copy.deepcopy(network)(IMAGE), expected)
        assert same(pickle.loads(pickle.dumps(network))(IMAGE), expected)
        network.train()(IMAGE).sum().backward()
        network.zero_grad()
        network.eval()
    small.load_state_dict(imported(folder).weights())


NETWORKS = {
    "mobilenet_v3_small": lambda: torchvision.models.mobilenet_v3_small(num_classes=10),
    "shufflenet_v2_x0_5": lambda: torchvision.models.shufflenet_v2_x0_5(num_classes=10),
    "densenet": lambda: torchvision.models.DenseNet(8, (3, 3), 16, num_classes=10),
    "convnext": lambda: torchvision.models.ConvNeXt(
        [CNBlockConfig(24, 48, 2), CNBlockConfig(48, None, 2)], stochastic_depth_prob=0.1, num_classes=10
    ),
    "googlenet": lambda: torchvision.models.googlenet(num_classes=10, aux_logits=False, init_weights=False),
    "squeezenet1_1": lambda: torchvision.models.squeezenet1_1(num_classes=10),
    "efficientnet_b0": lambda: torchvision.models.efficientnet_b0(num_classes=10),
    "mnasnet0_5": lambda: torchvision.models.mnasnet0_5(num_classes=10),  # looks at its state dict's version
    "vgg16": lambda: models.vgg16(0.125),
    "resnet20": lambda: models.resnet20(),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_build_gives_the_network(name, tmp_path):
    images = IMAGE[..., :32, :32] if name in models.NETWORKS else IMAGE
    small, _ = folded(NETWORKS[name](), images, 0.5 if name == "vgg16" else 0.34375)
    module = imported(save_bundle(small, tmp_path / name, images, onnx=False))
    assert "torchvision" not in (tmp_path / name / "model.py").read_text()
    network = module.build()
    network.load_state_dict(small.state_dict())
    assert list(network.state_dict()) == list(small.state_dict())
    assert type(network).__name__ == type(small).__name__
    for loaded in (network.eval(), module.load()):
        assert same(loaded(IMAGE[:1, :, : images.shape[2], : images.shape[3]]), small(images)[:1], 1e-5)


@pytest.mark.parametrize("seed", range(12))
def test_random_networks(seed, tmp_path):
    draw = random.Random(seed)
    parts = draw.choices(sorted(PARTS), k=4)
    head = draw.choice(["mean", "flatten", "maps"])
    torch.manual_seed(seed)
    dtype = torch.float64 if seed % 2 else torch.float32
    network = Random(parts, [12] * 5, head).to(dtype)
    images = torch.randn(2, 2, 8, 8, dtype=dtype)
    try:
        small, _ = folded(network, images, 0.5)
    except UsageError as e:
        pytest.skip(str(e))
    module = imported(save_bundle(small, tmp_path / "bundle", images, onnx=False))
    first = lambda y: y["maps"] if head == "maps" else y  # noqa: E731
    assert same(first(module.load()(images)), first(small(images)), 1e-5)
    wide = module.apply_widths(Random(parts, [12] * 5, head).to(dtype))
    wide.load_state_dict(module.weights())
    assert same(first(wide.eval()(images)), first(small(images)), 1e-5)


def test_apply_widths_narrows_torchvisions_own_class(resnet18):
    small, _, folder = resnet18
    module = imported(folder)
    network = module.apply_widths(torchvision.models.resnet18(num_classes=1000))
    network.load_state_dict(module.weights())
    assert type(network) is torchvision.models.ResNet and repr(network) == repr(small)
    assert same(network.eval()(IMAGE), small(IMAGE))
    for other, message in (
        (models.vgg16(0.125), "VGG has no layer 'bn1'; make it as"),
        (torchvision.models.resnet34(), r"ResNet has a layer 'layer1\.2\.conv1' that the narrowed"),
    ):
        before = {name: t.shape for name, t in other.state_dict().items()}
        with pytest.raises(ValueError, match=message):
            module.apply_widths(other)
        assert before == {name: t.shape for name, t in other.state_dict().items()}


def everything(x):
    return torch.relu(x)


torch.fx.wrap("everything")


class Mean(nn.Module):
    """Looks at the numbers, so it cannot be traced."""

    def forward(self, x):
        return x.mean((2, 3)) if x.sum() > 0 else x.mean((2, 3)) + 1


class Untraceable(nn.Module):
    def __init__(self, channels=16):
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, channels, 3), nn.BatchNorm2d(channels)
        self.b, self.mean = nn.Conv2d(channels, 5, 3), Mean()

    def forward(self, x):
        return self.mean(self.b(self.norm(self.a(x)).relu()))


class Foreign(Untraceable):
    def forward(self, x):
        return self.b(everything(self.norm(self.a(x)))).mean((2, 3))


@pytest.mark.parametrize(
    ("make", "reason"), [(Untraceable, "cannot be traced"), (Foreign, r"forward\(\) calls everything\(\)")]
)
def test_what_cannot_be_written_keeps_its_own_class(make, reason, tmp_path):
    small = make(7).eval()
    scramble(small, 0)
    with pytest.warns(UserWarning, match=reason):
        module = imported(save_bundle(small, tmp_path / "bundle", IMAGE, onnx=False))
    with pytest.raises(NotImplementedError, match=rf"{reason}.*apply_widths\(network\)"):
        module.load()
    network = module.apply_widths(make())
    network.load_state_dict(module.weights())
    assert same(network.eval()(IMAGE), small(IMAGE))


class Odd(nn.Module):
    """Everything that the source has to keep: ties, sharing, constants, functions, options that differ from the default."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 8, (3, 1), padding="same", padding_mode="circular", dtype=torch.float64)
        self.again = nn.ModuleList([nn.Conv2d(8, 8, 1, bias=False), nn.Conv2d(8, 8, 1, bias=False)]).double()
        self.again[1].weight = self.again[0].weight
        self.norm = nn.BatchNorm2d(8, eps=1e-3, momentum=None, affine=False, dtype=torch.float64)
        self.same_norm = self.norm
        self.up = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
        self.pool = nn.AvgPool2d(3, 2, 1, count_include_pad=False)
        self.scales = nn.ParameterList([torch.rand(8, 1, 1).double()])
        self.register_buffer("shift", torch.rand(8, 1, 1).double())
        self.register_buffer("mask", torch.rand(8, 1, 1).double(), persistent=False)
        self.plain = torch.rand(8, 1, 1).double()
        self.parts = nn.Sequential(nn.PReLU(8).double(), nn.Hardtanh(-2, 3), nn.Dropout(0.3), nn.Softmax(1))
        self.unused = nn.Linear(3, 4).double()

    def forward(self, x):
        x = self.same_norm(self.norm(self.again[1](self.again[0](self.a(x)))))
        x = self.parts(self.pool(self.up(x)) * self.scales[0] + self.shift) * self.mask - self.plain
        x = F.dropout(x, 0.5, self.training).clamp(min=float("-inf"))
        return {"maps": x, "sums": (x.sum((2, 3)) * torch.tensor([1.0, -2.0] * 4), x.argmax(1))}


def test_ties_constants_and_options_are_kept(tmp_path):
    small, images = Odd().eval(), IMAGE[..., :9, :9].double()
    module = imported(save_bundle(small, tmp_path / "bundle", images, onnx=False))
    network, expected = module.load(), small(images)
    assert network.again.get_submodule("1").weight is network.again.get_submodule("0").weight
    assert network.norm is network.same_norm and network.norm.momentum is None
    assert set(network.state_dict()) == set(small.state_dict())
    assert all(t.dtype == small.state_dict()[name].dtype for name, t in network.state_dict().items())
    wide = module.apply_widths(Odd())
    assert wide.again[1].weight is wide.again[0].weight and wide.norm is wide.same_norm
    found = network(images)
    assert torch.equal(found["sums"][1], expected["sums"][1])
    assert same(found["maps"], expected["maps"]) and same(found["sums"][0], expected["sums"][0])


class Tied(nn.Module):
    """Two layers with one weight, which the fold makes two."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.c.weight = self.b.weight
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.c(self.b(self.a(x).relu()).relu()).relu().mean((2, 3)))


def test_a_tie_that_the_fold_undoes_is_undone_in_the_wide_class_too(tmp_path):
    small, _ = folded(Tied(), keep_ratio=0.5)
    module = imported(save_bundle(small, tmp_path / "bundle", IMAGE, onnx=False))
    network = module.apply_widths(Tied())
    network.load_state_dict(module.weights())
    assert same(network.eval()(IMAGE), small(IMAGE)) and same(module.load()(IMAGE), small(IMAGE))


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return F.dropout(self.a(x), 0.5, True)


def test_nothing_is_left_behind_a_failure(resnet18, tmp_path):
    small = resnet18[0]
    folder = tmp_path / "bundle"
    with pytest.raises(UsageError, match="computes something else"):
        save_bundle(Noisy(), folder, IMAGE, onnx=False)
    with pytest.raises(UsageError, match="does not pass through small"):
        save_bundle(small, folder, IMAGE[:, :2], onnx=False)
    with pytest.raises(UsageError, match="record cannot be written"):
        save_bundle(small, folder, IMAGE, record={"loss": float("nan")}, onnx=False)
    assert list(tmp_path.iterdir()) == []
    save_bundle(models.resnet20(), folder, IMAGE, onnx=False)
    before = {p: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(UsageError):
        save_bundle(Noisy(), folder, IMAGE, onnx=False)
    assert {p: p.read_bytes() for p in folder.iterdir()} == before and list(tmp_path.iterdir()) == [folder]


def test_a_bundle_is_replaced_and_nothing_else_is(tmp_path):
    folder = tmp_path / "bundle"
    save_bundle(models.resnet20(), folder, IMAGE, record={}, onnx=False)
    save_bundle(models.resnet20(2), folder, IMAGE, onnx=False)
    assert not (folder / "record.json").exists()
    assert imported(folder).build().conv.out_channels == 32
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"holds notes\.txt"):
        save_bundle(models.resnet20(), folder, IMAGE, onnx=False)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="no bundle"):
        save_bundle(models.resnet20(), tmp_path / "empty", IMAGE, onnx=False)
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="no folder"):
        save_bundle(models.resnet20(), tmp_path / "file", IMAGE, onnx=False)


def test_a_damaged_file_of_weights_is_named(tmp_path):
    folder = save_bundle(models.resnet20(), tmp_path / "bundle", IMAGE, onnx=False)
    weights = folder / "weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ValueError, match=r"weights\.safetensors is damaged"):
        imported(folder).load()


def test_missing_onnx_packages_are_named(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *a: None if n == "onnxruntime" else find(n, *a)
    )
    with pytest.raises(UsageError, match=r"pip install onnxruntime, or save_bundle\(\.\.\., onnx=False\)"):
        save_bundle(models.resnet20(), tmp_path / "bundle", IMAGE)
    assert list(tmp_path.iterdir()) == []


def test_a_parallel_model_is_refused(tmp_path):
    model = ParallelModel(models.vgg16(0.125), example_input=IMAGE[..., :32, :32])
    with pytest.raises(UsageError, match="fold it first"):
        save_bundle(model, tmp_path / "bundle", IMAGE)


def test_random_numbers_go_on_as_if_nothing_had_been_saved(tmp_path):
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    network = models.resnet20()
    torch.manual_seed(3)
    save_bundle(network, tmp_path / "bundle", IMAGE, onnx=False)
    assert torch.equal(torch.rand(2), expected) and network.training


class WithNone(nn.Module):
    """Gives logits, and nothing beside them."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 6, 3), nn.Linear(6, 4)

    def forward(self, x):
        return self.head(torch.relu(self.conv(x)).mean((2, 3))), None


def test_a_network_that_gives_nothing_beside_its_logits(tmp_path):
    model = ParallelModel(WithNone(), 0.5, IMAGE)
    model.alpha = 0.0
    small, certificate = fold(model)
    folder = save_bundle(small, tmp_path / "b", IMAGE, certificate)
    logits, nothing = imported(folder).load()(IMAGE)
    assert nothing is None and torch.equal(logits, small(IMAGE)[0])
