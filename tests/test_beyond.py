"""The notebooks beyond the report, by the Makefile at smoke."""

import re
import signal
import subprocess
import sys

from conftest import make


def test_skip_connections(whole_project):
    done = make(whole_project, "skips")
    assert done.returncode == 0, done.stderr[-2000:]
    results = whole_project / "results" / "smoke"
    assert len(re.findall(r"(?:narrow|plain), resnet20_\w+/a0-lr[\d.]+: exact", done.stdout)) == 2
    for figure in ("skips_narrow", "skips_plain", "skips", "pretraining_resnet20"):
        assert (results / "figures" / f"{figure}.png").is_file()
    page = (results / "html" / "skips.html").read_text()
    assert [
        re.search(rf"ResNet-20\s+{way}", page) is not None for way in ("original", "narrow", "plain")
    ] == [True] * 3
    assert re.search(r"VGG-16\s+narrow", page)
    assert re.search(r"conv, blocks\.0\.conv2", page)
    # The same block of both, whose first layer halves the image; only the narrow one still has a projection.
    blocks = re.findall(r"^\(3\): \w+\(.*?^\)", done.stdout, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 2 and all("stride=(2, 2)" in b.partition("conv2")[0] for b in blocks)
    assert ["shortcut" in b for b in blocks] == [True, False]


def test_own_network(whole_project):
    done = make(whole_project, "own-network")
    assert done.returncode == 0, done.stderr[-2000:]
    course = whole_project / "results" / "smoke" / "figures" / "own_network_course"
    assert "if it were folded: " in course.with_suffix(".txt").read_text()
    assert course.with_suffix(".png").is_file()
    bundle = whole_project / "results" / "smoke" / "bundle"
    assert {f.name for f in bundle.iterdir()} >= {
        "weights.safetensors", "model.py", "model.onnx", "certificate.json", "record.json", "SHA256SUMS",
    }  # fmt: skip
    assert "it is the network's output" in (whole_project / "results/smoke/html/own_network.html").read_text()
    made = (bundle / "weights.safetensors").stat().st_mtime_ns
    # A folder of one's own leaves what make has made alone.
    run = [sys.executable, "notebooks/execute.py", "notebooks/07_your_own_network.ipynb", "out.ipynb"]
    own = ["-f", "params/own_network/smoke.yaml", "-p", "images", "results/smoke/own_images"]
    misspelt = subprocess.run([*run, "-p", "image", "x"], cwd=whole_project, capture_output=True, text=True)
    assert (misspelt.returncode, misspelt.stderr.count("\n")) == (2, 1)
    assert (
        "'image' is unknown in notebooks/07_your_own_network.ipynb; did you mean 'images'?" in misspelt.stderr
    )
    misspelt = subprocess.run(
        [*run, "-p", "preset", "smok"], cwd=whole_project, capture_output=True, text=True
    )
    assert misspelt.returncode == 2 and "preset 'smok' is unknown; there are: " in misspelt.stderr
    assert not (whole_project / "results" / "smok").exists()
    subprocess.run(run + own, cwd=whole_project, check=True)
    weights = whole_project / "results" / "own" / "bundle" / "weights.safetensors"
    expected, stopped = weights.read_bytes(), whole_project / "results" / "own" / "own_network_stopped"
    assert not stopped.exists()
    with subprocess.Popen(run + own, cwd=whole_project, stdout=subprocess.PIPE, text=True) as running:
        while "pruned: epoch 1/" not in running.stdout.readline():
            assert running.poll() is None
        running.send_signal(signal.SIGTERM)
    assert running.returncode == 128 + signal.SIGTERM and stopped.is_dir()
    weights.unlink()
    rest = subprocess.run(run + own, cwd=whole_project, check=True, capture_output=True, text=True).stdout
    assert "original: epoch" not in rest and "pruned: epoch 1/" not in rest
    assert weights.read_bytes() == expected and not stopped.exists()
    again = make(whole_project, "own-network")
    assert again.returncode == 0 and "damaged" not in again.stdout + again.stderr
    assert (bundle / "weights.safetensors").stat().st_mtime_ns == made
