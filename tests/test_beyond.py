"""The notebooks beyond the report, by the Makefile at smoke."""

import re
import shutil

import pytest
from conftest import ROOT
from test_notebooks import make


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = tmp_path_factory.mktemp("beyond")
    for name in ("notebooks", "params", "lib"):
        shutil.copytree(
            ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
        )
    for name in ("Makefile", "requirements.lock", "pyproject.toml"):
        shutil.copy2(ROOT / name, folder / name)
    (folder / "results").mkdir()
    (folder / ".venv").symlink_to(ROOT / ".venv")
    return folder


def test_skip_connections(project):
    done = make(project, "skips")
    assert done.returncode == 0, done.stderr[-2000:]
    results = project / "results" / "smoke"
    assert len(re.findall(r"(?:narrow|plain), resnet20_\w+/a0-lr[\d.]+: exact", done.stdout)) == 2
    for figure in ("skips_narrow", "skips_plain", "skips", "pretraining_resnet20"):
        assert (results / "figures" / f"{figure}.png").is_file()
    page = (results / "html" / "skips.html").read_text()
    assert [
        re.search(rf"ResNet-20\s+{way}", page) is not None for way in ("original", "narrow", "plain")
    ] == [True] * 3
    assert re.search(r"conv, blocks\.0\.conv2", page)


def test_own_network(project):
    done = make(project, "own-network")
    assert done.returncode == 0, done.stderr[-2000:]
    bundle = project / "results" / "smoke" / "bundle"
    assert {f.name for f in bundle.iterdir()} >= {
        "weights.safetensors", "model.py", "model.onnx", "certificate.json", "record.json", "SHA256SUMS",
    }  # fmt: skip
    assert "it is the network's output" in (project / "results/smoke/html/own_network.html").read_text()
