"""How fast is it? Ratios that were taken in one run, and how long the whole `quick` reproduction takes.

python notebooks/benchmark.py            # writes docs/benchmark.json and docs/benchmark.md
python notebooks/benchmark.py --gpu      # on a GPU: docs/benchmark_gpu.json and docs/benchmark_gpu.md
python notebooks/benchmark.py --check    # the ratios alone, nothing written; ends with 1 where one falls short, with 2 where the
                                         # machine was too busy to tell
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pandas as pd
from verify import copy_project, end_at_signals, reproduce

from alphaprune.benchmark import measure
from alphaprune.benchmark_device import measure_gpu
from alphaprune.benchmark_rows import Target, as_line, as_table, run_once
from alphaprune.errors import UsageError
from alphaprune.provenance import provenance
from alphaprune.storage import write_bytes, write_json
from alphaprune.timing import moment

ROOT = Path(__file__).resolve().parents[1]
COMMAND = "make benchmark"
PRETRAINED = ROOT / "results" / "quick" / "pretrained"  # what the reproduction starts from
REPRODUCTION = Target(at_most=600)  # seconds


def whole_reproduction() -> dict[str, object]:
    """Seconds for `make reproduce-figures` in a copy of the project without results but for the pretrained networks."""
    with tempfile.TemporaryDirectory(prefix="alphaprune-benchmark-") as temporary:
        project = Path(temporary) / "project"
        copy_project(project)
        shutil.copytree(PRETRAINED, project / PRETRAINED.relative_to(ROOT))
        before = moment()
        reproduce(project, "quick")
        return run_once("make reproduce-figures, quick", REPRODUCTION, before, os.cpu_count() or 1)


def page(table: pd.DataFrame, source: dict[str, object], command: str, gpu: bool) -> str:
    """A page of docs/."""
    title, about = "How fast it is", ""
    if gpu:
        title = "On a GPU"
        about = (
            "\n\nTraining in bf16, images on the card, keep_ratio 0.34375; *eager* is without a CUDA graph. The share of the peak counts multiply-adds forward and "
            "twice as many backward. The data path, images mirrored and cropped, is timed alone, so its share is at most that. Inference in eval mode, by plain torch."
        )
    hardware = ", ".join(f"{k} {v}" for k, v in source["hardware"].items() if v and k != "threads")
    versions = ", ".join(f"{k} {v}" for k, v in source["versions"].items())
    return f"""# {title}

Written by `{command}` at commit {source["commit"]}; {hardware}; {versions}. All ratios are of alternatives that took turns in one run; the spread is
the interquartile range as a share of the median. Above 15 %, or where other programs kept cores busy, a figure is not to be trusted.{about}

{as_table(table)}
"""


def write(table: pd.DataFrame, source: dict[str, object], command: str, name: str = "benchmark") -> None:
    """docs/<name>.json and docs/<name>.md."""
    rows = [{k: v for k, v in r.items() if not pd.isna(v)} for r in table.to_dict("records")]
    write_json(ROOT / "docs" / f"{name}.json", source | {"figures": rows})
    write_bytes(ROOT / "docs" / f"{name}.md", page(table, source, command, name == "benchmark_gpu").encode())


def of_gpu() -> int:
    """What is measured on a GPU, written."""
    command = f"{COMMAND}-gpu"
    try:
        table = measure_gpu(say=lambda line: print(line, flush=True))
    except UsageError as e:
        print(f"alphaprune: {e}", file=sys.stderr)
        return 2
    write(table, provenance(ROOT, command), command, "benchmark_gpu")
    print("docs/benchmark_gpu.md")
    return 0


def verdict(table: pd.DataFrame) -> int:
    """0 if all targets hold, 1 if one falls short, 2 if one that falls short was measured on a busy machine."""
    short = table[table["holds"].eq(False)]
    if short.empty:
        return 0
    return 2 if short["trusted"].eq(False).all() else 1


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measure how fast alphaprune is.")
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--check", action="store_true", help="ratios alone; fail where one falls short")
    either.add_argument("--gpu", action="store_true", help="what is measured on a GPU, alone")
    args = parser.parse_args(arguments)
    end_at_signals()
    if args.gpu:
        return of_gpu()
    if not args.check and not PRETRAINED.is_dir():  # before minutes of timing
        print(
            f"alphaprune: {PRETRAINED} is missing; check it out again (git checkout -- {PRETRAINED})",
            file=sys.stderr,
        )
        return 2
    source = provenance(ROOT, COMMAND)  # of the tree before these pages change it
    reproduction = None if args.check else _reproduction()  # first: what is timed below leaves memory behind
    table = measure(say=lambda line: print(line, flush=True))
    if args.check:
        found = verdict(table)
        said = {
            0: "All targets hold.",
            1: "A target is not reached.",
            2: "The machine was too busy to tell; try again when it is quiet.",
        }
        busy = int(table["trusted"].eq(False).sum())
        print(said[found], *([f"Of {len(table)} figures {busy} are not to be trusted."] if busy else []))
        return found
    write(pd.concat([table, pd.DataFrame(reproduction)], ignore_index=True), source, COMMAND)
    print("docs/benchmark.md")
    return 0 if reproduction else 2


def _reproduction() -> list[dict[str, object]]:
    """The row of `whole_reproduction`; none, and a line, where it fails: the ratios are measured whatever becomes of it."""
    try:
        row = whole_reproduction()
    except RuntimeError as e:
        print(f"alphaprune: {e}", file=sys.stderr)
        return []
    print(as_line(row), flush=True)
    return [row]


if __name__ == "__main__":
    sys.exit(main())
