"""The script of the README runs as it stands, but for the weights, which would be downloaded, and for smaller images and batches."""

import re
import shutil

import pytest
import torch
from conftest import ROOT
from torchvision.transforms.functional import to_pil_image

SMALLER = {
    "resnet18(weights=weights)": "resnet18()",
    "weights.transforms()": "Compose([Resize(32), ToTensor()])",
    ", 128, shuffle=True": ", 16, shuffle=True",
    "epochs=6": "epochs=2",
}


@pytest.mark.filterwarnings("ignore:too few images")
def test_the_script_prunes_a_network_and_leaves_a_bundle(tmp_path, monkeypatch, capsys):
    code, at_once, optimised = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    for part, smaller in SMALLER.items():
        assert part in code
        code, at_once = (text.replace(part, smaller) for text in (code, at_once))
    torch.manual_seed(0)
    for part in ("train", "val"):
        for label in ("cat", "dog", "frog"):
            (tmp_path / "images" / part / label).mkdir(parents=True)
            for i in range(12):
                picture = torch.randint(0, 256, (3, 36, 40), dtype=torch.uint8)
                to_pil_image(picture).save(tmp_path / "images" / part / label / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec("from torchvision.transforms import Compose, Resize, ToTensor", names)
    exec(compile(code, "README.md", "exec"), names)
    small, certificate = names["small"], names["certificate"]
    assert certificate.exact and small.layer4[0].conv1.out_channels < 512 and small.fc.out_features == 3
    said = capsys.readouterr().out
    for line in (
        "epoch 3/3: loss",
        "original: ",
        "multiply-adds",
        "epoch 2/2: loss",
        "alpha 0.00",
        "pruned: ",
    ):
        assert line in said
    assert {"model.py", "model.onnx", "certificate.json"} <= {f.name for f in (tmp_path / "small").iterdir()}

    exec(compile(optimised, "README.md", "exec"), names)
    with torch.no_grad():
        assert torch.allclose(names["logits"], small(names["x"]), atol=1e-3)

    shutil.rmtree("small")
    _, said, _ = code.partition("print(plan(network, ratios, x))")
    assert said
    del names["model"], names["small"]  # what the other way needs it makes itself
    exec(compile(at_once, "README.md", "exec"), names)
    assert names["small"].fc.out_features == 3 and (tmp_path / "small" / "model.py").is_file()
    assert "epoch 2/2: loss" in capsys.readouterr().out


def test_a_loop_of_ones_own_trains_as_it_says():
    code = next(
        text
        for text in re.findall(
            r"```python\n(.*?)```", (ROOT / "docs" / "own_network.md").read_text(), re.DOTALL
        )
        if "Loss(" in text
    )
    from alphaprune import ParallelModel
    from alphaprune.models import vgg16

    torch.manual_seed(0)
    network = vgg16(0.25)
    loader = [(torch.randn(4, 3, 32, 32), torch.randint(10, (4,))) for _ in range(2)]
    model = ParallelModel(network, 0.5, loader[0][0])
    before = {k: v.clone() for k, v in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    names = {
        "model": model,
        "network": network,
        "loader": loader,
        "optimizer": optimizer,
        "epochs": 2,
        "device": "cpu",
        "torch": torch,
    }
    exec(compile(code, "own_network.md", "exec"), names)
    assert model.alpha == 0 and not all(torch.equal(v, before[k]) for k, v in model.named_parameters())
