"""Seals: what a notebook or an export wrote and the records it was made from, each file with its SHA-256.

    python notebooks/seals.py results/quick

names every file that is not as it was, and makes what wrote it or was made from it count as old, so that make runs it again. The notebook
then finds the records damaged, if they are, and trains those stages again.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from filelock import FileLock

from alphaprune.storage import digest_of, write_bytes

FOLDER = ".seals"  # of a preset's results; its files are in the form of sha256sum
MADE = ("notebooks/*.ipynb", "html/*.html", "report.html")
RECORDS = (
    "stages",
    "pretrained",
    "pretrained_resnet20",
    "pretrained_49500",
    "sensitivity",
)  # folders of what the library looks after


def _file(results: Path, target: Path) -> Path:
    return results / FOLDER / f"{target.relative_to(results).as_posix()}.sha256"


@contextmanager
def _alone(seal: Path) -> Iterator[None]:
    """A target and its seal change together, also where two runs make the same."""
    seal.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(seal.with_suffix(".lock")):
        yield


def begin(results: Path, target: Path) -> None:
    """Forget the seal of a target that is about to be made again."""
    _file(results.resolve(), target.resolve()).unlink(missing_ok=True)


def finish(results: Path, temporary: Path, target: Path, journal: str = "") -> None:
    """Give a target its name, and seal it with what was written on the way and the records that its figures name.

    Args:
        results: the preset's folder.
        temporary: the whole content, in a file beside the target.
        target: a file in `results` that make knows.
        journal: what `storage.write_bytes` noted meanwhile; of two lines about a file the later counts.
    """
    results, target = results.resolve(), target.resolve()
    noted = (line.partition("  ") for line in journal.splitlines())
    written = {Path(name): digest for digest, _, name in noted}
    kept = {target: digest_of(temporary)} | {
        path: digest
        for path, digest in written.items()
        if path.is_relative_to(results)
        and path.relative_to(results).parts[0] not in RECORDS
        and path.is_file()  # some were renamed with their folder
    }
    for record in _records(results, kept):
        kept |= {f: digest_of(f) for f in (record, record.with_name("history.csv")) if f.is_file()}
    lines = [f"{digest}  {path.relative_to(results).as_posix()}\n" for path, digest in kept.items()]
    seal = _file(results, target)
    with _alone(seal):
        os.replace(temporary, target)
        write_bytes(seal, "".join(lines).encode())


def _records(results: Path, files: Iterable[Path]) -> list[Path]:
    """The records in `results` that figures among these files say they were made from."""
    from alphaprune.provenance import in_png  # brings an image library, which a check need not wait for

    found: dict[Path, None] = {}
    for file in (f for f in files if f.suffix == ".png"):
        for run in (in_png(file.read_bytes()) or {"runs": []})["runs"]:
            paths = [results.parents[1] / r["path"] for r in run["records"]]
            found |= dict.fromkeys(p for p in paths if p.is_relative_to(results))
    return list(found)


def check(results: Path) -> list[str]:
    """Let every target count as old of which something is not as it was sealed.

    Returns:
        A line for each file that is damaged or missing.
    """
    results = results.resolve()
    damaged: dict[str, list[str]] = {}
    for target in sorted(path for pattern in MADE for path in results.glob(pattern)):
        if target.name.startswith(".") or target.name.endswith(".failed.ipynb"):
            continue
        seal = _file(results, target)
        if not _damage(results, seal):
            continue
        _digest.cache_clear()
        with _alone(seal):  # or another run was about to seal it
            for what in _damage(results, seal):
                os.utime(target, (0, 0))
                damaged.setdefault(what, []).append(target.relative_to(results.parents[1]).as_posix())
    return [
        f"{what}; {made[0]}{f' and {len(made) - 1} more' if len(made) > 1 else ''} counts as old"
        for what, made in damaged.items()
    ]


def _damage(results: Path, seal: Path) -> list[str]:
    shown = results.relative_to(results.parents[1])
    if not seal.is_file():
        return [f"{shown / seal.relative_to(results)} is missing, as after a run that failed or was stopped"]
    try:
        entries = [line.split("  ", 1) for line in seal.read_text().splitlines()]
        whole = bool(entries) and all(len(e) == 2 and len(e[0]) == 64 for e in entries)
    except (OSError, UnicodeDecodeError):
        whole = False
    if not whole:
        return [f"{shown / seal.relative_to(results)} is damaged"]
    found = []
    for digest, name in entries:
        path = results / name
        if not path.is_file():
            found.append(f"{shown / name} is missing")
        elif _digest(path) != digest:
            found.append(f"{shown / name} is damaged, or was changed since: its SHA-256 is another")
        elif path.suffix == ".json":
            found += [f"{w.relative_to(results.parents[1])} is damaged" for w in _damaged_weights(path)]
    return found


def _damaged_weights(record: Path) -> list[Path]:
    """The weights of a record that are not those it names; weights that were left behind are none."""
    named = json.loads(record.read_text()).get("weights_sha256")
    return [
        w
        for w in record.parent.glob("*.safetensors")
        if w.name[:6] != "resume" and named not in (None, _digest(w))
    ]


@cache
def _digest(path: Path) -> str:
    return digest_of(path)


if __name__ == "__main__":
    for line in check(Path(sys.argv[1])):
        print(f"alphaprune: {line}", file=sys.stderr)
