"""Does the same command give the same numbers? Three smoke reproductions, compared file by file.

    python notebooks/verify.py

Two copies of the project in a temporary folder, with one thread, must end with the same histories, weights, figures and
scorecard, bit for bit; a third, with two threads, shows what another thread count changes. `results/` is not touched. What
is compared leaves out what cannot be equal: seconds, and pages and notebooks, which show them.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import yaml
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
PRESET = "smoke"
KINDS = {
    "histories": "stages/**/history.csv",
    "weights": "**/weights.safetensors",
    "figures, PNG": "figures/**/*.png",
    "figures, SVG": "figures/**/*.svg",
    "scorecard": "scorecard.csv",
}
# A stage's folder ends with its identity, which follows the pretrained weights: other weights, another name.
IDENTITY = re.compile(r"-[0-9a-f]{8}(?=/)")


@dataclass(frozen=True)
class Compared:
    """What a comparison of two results folders found of one kind of file.

    Attributes:
        kind: a key of `KINDS`.
        files: how many there are in either folder.
        identical: how many are there in both, bit for bit the same.
        missing: those that one of the folders lacks, by name.
        largest: the largest absolute difference of a number, by what it measures; empty for figures.
    """

    kind: str
    files: int
    identical: int
    missing: tuple[str, ...]
    largest: dict[str, float]


def compare(a: Path, b: Path) -> list[Compared]:
    """Compare two results folders of a preset, kind by kind."""
    return [_compare(kind, _files(a, pattern), _files(b, pattern)) for kind, pattern in KINDS.items()]


def _files(folder: Path, pattern: str) -> dict[str, Path]:
    return {IDENTITY.sub("", p.relative_to(folder).as_posix()): p for p in sorted(folder.glob(pattern))}


def _compare(kind: str, a: dict[str, Path], b: dict[str, Path]) -> Compared:
    both = sorted(set(a) & set(b))
    different = [name for name in both if a[name].read_bytes() != b[name].read_bytes()]
    largest: dict[str, float] = {}
    for name in different:
        for measure, value in _differences(a[name], b[name]).items():
            largest[measure] = max(largest.get(measure, 0.0), value)
    missing = tuple(sorted(set(a) ^ set(b)))
    return Compared(kind, len(set(a) | set(b)), len(both) - len(different), missing, largest)


def _differences(a: Path, b: Path) -> dict[str, float]:
    """The largest absolute difference of the numbers in two files, by what they measure."""
    if a.suffix == ".safetensors":
        one, other = load_file(a), load_file(b)
        if {k: t.shape for k, t in one.items()} != {k: t.shape for k, t in other.items()}:
            return {"tensors of another shape": float("inf")}
        return {"weight": max((one[k].double() - other[k].double()).abs().max().item() for k in one)}
    if a.suffix != ".csv":
        return {}
    one, other = pd.read_csv(a), pd.read_csv(b)
    if len(one) != len(other) or list(one.columns) != list(other.columns):
        return {"rows or columns": float("inf")}
    if "metric" not in one:
        numbers = one.select_dtypes("number").columns
        return {c: float((one[c] - other[c]).abs().max()) for c in numbers}
    difference = (one["value"] - other["value"]).abs()
    found = difference.groupby(one["metric"].str.partition(":")[0]).max()
    return {str(metric): float(value) for metric, value in found.items()}


def same(found: list[Compared]) -> bool:
    """Whether everything that was compared is there in both folders and identical."""
    return all(c.files and c.identical == c.files for c in found)


def as_text(title: str, found: list[Compared]) -> str:
    """The findings as a small table."""
    lines = [title]
    for c in found:
        lines.append(f"  {c.kind:<13} {c.identical:>3} of {c.files:>3} identical")
        if c.largest:
            by_much = ", ".join(f"{measure} {value:.2g}" for measure, value in c.largest.items() if value)
            lines[-1] += f"; differ by at most: {by_much or 'text alone'}"
        lines += [f"    only in one of them: {name}" for name in c.missing]
    return "\n".join(lines)


def copy_project(folder: Path) -> None:
    """The project without results, in a new folder, with the environment that runs this."""
    folder.mkdir()
    for name in ("notebooks", "params", "lib"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_*"))
    for name in ("Makefile", "requirements.lock", "pyproject.toml"):
        shutil.copy2(ROOT / name, folder / name)
    (folder / ".venv").symlink_to(Path(sys.prefix))
    (folder / "results").mkdir()


def reproduce(folder: Path, preset: str, **variables: str) -> Path:
    """`make reproduce-figures` in a copy of the project, with these environment variables; its results folder."""
    # The copy's own library and this run of make's nothing: neither its variables nor its job server.
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "PYTHON"))}
    environment |= {"PYTHONPATH": str(folder / "lib"), **variables}
    command = ["make", "--old-file=.venv/.ready", f"PRESET={preset}", "reproduce-figures"]
    with subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as run:
        try:
            _, errors = run.communicate()
        except BaseException:  # whoever stops this stops what it has started
            run.terminate()
            raise
    if run.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {' '.join(errors.split())[-300:]}")
    return folder / "results" / preset


def end_at_signals() -> None:
    """SIGTERM and Ctrl-C end the command by unwinding it, so that its temporary folder goes too."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: sys.exit(128 + number))


def _with_threads(folder: Path, threads: int) -> Path:
    copy_project(folder)
    file = folder / "params" / PRESET / "preset.yaml"
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | {"threads": threads}))
    return reproduce(folder, PRESET, OMP_NUM_THREADS=str(threads))


def main() -> int:
    end_at_signals()
    with tempfile.TemporaryDirectory(prefix="alphaprune-verify-") as temporary:
        results = []
        for n, threads in enumerate((1, 1, 2), 1):
            print(f"run {n} of 3: PRESET={PRESET}, threads {threads}", flush=True)
            try:
                results.append(_with_threads(Path(temporary) / f"run{n}", threads))
            except RuntimeError as e:
                print(f"alphaprune: {e}", file=sys.stderr)
                return 2
        again, other = compare(results[0], results[1]), compare(results[0], results[2])
    print(as_text("The same again, one thread both times:", again))
    print(as_text("One thread against two:", other))
    print("Identical: the same command gives the same." if same(again) else "DIFFERENT: see above.")
    return 0 if same(again) else 1


if __name__ == "__main__":
    sys.exit(main())
