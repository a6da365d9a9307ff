"""Seals: what a notebook or an export wrote, each file with its SHA-256, so that damage is found and made good.

    python notebooks/seals.py results/quick

names every file that is not as it was written, and makes what wrote it count as old, so that make makes it again. Records of
stages carry checksums of their own and are looked after by the library; no seal has them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from alphaprune.storage import digest_of, write_bytes

FOLDER = ".seals"  # of a preset's results; its files are in the form of sha256sum
MADE = ("notebooks/*.ipynb", "html/*.html", "report.html")
OWN_CHECKSUMS = ("stages", "pretrained", "pretrained_resnet20", "sensitivity")


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
    """Give a target its name, and seal it with what was written on the way.

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
        and path.relative_to(results).parts[0] not in OWN_CHECKSUMS
        and path.is_file()  # some were renamed with their folder
    }
    lines = [f"{digest}  {path.relative_to(results).as_posix()}\n" for path, digest in kept.items()]
    seal = _file(results, target)
    with _alone(seal):
        os.replace(temporary, target)
        write_bytes(seal, "".join(lines).encode())


def check(results: Path) -> list[str]:
    """Let every target count as old that is not as it was sealed, or something that was written with it.

    Returns:
        A line for each file that is damaged or missing.
    """
    results, lines = results.resolve(), []
    for target in sorted(path for pattern in MADE for path in results.glob(pattern)):
        if target.name.startswith(".") or target.name.endswith(".failed.ipynb"):
            continue
        seal = _file(results, target)
        if not _damage(results, seal):
            continue
        with _alone(seal):  # or another run was about to seal it
            if found := _damage(results, seal):
                os.utime(target, (0, 0))
                name = target.relative_to(results.parents[1])
                lines += [f"{what}; {name} is made again" for what in found]
    return lines


def _damage(results: Path, seal: Path) -> list[str]:
    try:
        entries = [line.split("  ", 1) for line in seal.read_text().splitlines()]
        whole = bool(entries) and all(len(e) == 2 and len(e[0]) == 64 for e in entries)
    except (OSError, UnicodeDecodeError):
        whole = False
    shown = results.relative_to(results.parents[1])
    if not whole:
        return [f"{shown / seal.relative_to(results)} is damaged or missing"]
    found = []
    for digest, name in entries:
        path = results / name
        if not path.is_file():
            found.append(f"{shown / name} is missing")
        elif digest_of(path) != digest:
            found.append(f"{shown / name} is damaged: its SHA-256 is not the one it was written with")
    return found


if __name__ == "__main__":
    for line in check(Path(sys.argv[1])):
        print(f"alphaprune: {line}", file=sys.stderr)
