"""The example of the README runs as it stands, but for the weights, which would be downloaded, and the images."""

import re

import pytest
import torch
from conftest import ROOT


@pytest.mark.filterwarnings("ignore:too few images")
def test_the_example_prunes_a_network_and_leaves_a_bundle(tmp_path, monkeypatch, capsys):
    code, at_once = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[:2]
    assert 'weights="DEFAULT"' in code
    torch.manual_seed(0)
    loader = [(torch.randn(16, 3, 32, 32), torch.randint(0, 1000, (16,))) for _ in range(2)]
    monkeypatch.chdir(tmp_path)
    names = {"loader": loader}
    exec(compile(code.replace('weights="DEFAULT"', "weights=None"), "README.md", "exec"), names)
    small, certificate = names["small"], names["certificate"]
    assert certificate.exact and small.layer4[0].conv1.out_channels < 512
    assert "multiply-adds" in capsys.readouterr().out
    assert {"model.py", "model.onnx", "certificate.json"} <= {f.name for f in (tmp_path / "small").iterdir()}

    exec(compile(at_once, "README.md", "exec"), names)
    images, labels = loader[0]
    before = {k: v.clone() for k, v in names["small"].named_parameters()}
    names["loss_of"](images, labels)[0].backward()
    names["optimizer"].step()
    assert names["small"].training and all(
        not torch.equal(v, before[k]) for k, v in names["small"].named_parameters()
    )
