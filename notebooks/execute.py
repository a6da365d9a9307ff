"""Run a notebook with papermill so that its result is whole or not there.

    python notebooks/execute.py notebooks/02_alpha_decay.ipynb OUT.ipynb -f params/quick/fig4.yaml -p seed 1

The output gets its name when the last cell is done. A notebook that fails is kept beside it, as OUT.failed.ipynb. SIGTERM and
Ctrl-C are passed on to the notebook, which saves what it is at and stops.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":
    from alphaprune.interrupt import while_importing

    while_importing()
import without_addresses  # noqa: F401

# isort: split

import argparse
import builtins
import keyword
import logging
import os
import signal
import tempfile
from pathlib import Path
from types import FrameType
from typing import Any

import papermill
import psutil
import seals
from traitlets.config import Config

from alphaprune import yaml_text
from alphaprune.errors import UsageError, like, shown
from alphaprune.storage import JOURNAL

SIGNALS = (signal.SIGINT, signal.SIGTERM)


def _parameters(file: Path | None, given: list[list[str]]) -> dict[str, Any]:
    """The parameters of a file and a command line; papermill writes them into the notebook as `name = value`."""
    found = yaml_text.read(file) if file else {}
    if not isinstance(found, dict):
        raise UsageError(f"{file} must hold parameters, one `name: value` a line")
    for name, value in given:
        try:
            found[name] = yaml_text.parse(value)
        except ValueError as e:
            raise UsageError(f"-p {name}: {shown(value)} is not a YAML value ({e})") from None
    for name in found:
        # Anything else than a plain, new name would be code that runs, or would replace what the notebook uses.
        plain = isinstance(name, str) and name.isidentifier() and name.isascii()
        if not plain or name.startswith("_") or keyword.iskeyword(name) or hasattr(builtins, name):
            raise UsageError(f"{shown(name)} is no name of a parameter{f'; see {file}' if file else ''}")
    return found


def _check_known(notebook: Path, parameters: dict[str, Any]) -> None:
    """Papermill sets names that a notebook never reads. One with `experiment` takes every setting, and checks them itself."""
    if not notebook.is_file():
        raise UsageError(f"{notebook} does not exist; the notebooks are in notebooks/")
    known = papermill.inspect_notebook(str(notebook))
    if known and "experiment" not in known:
        for name in parameters:
            if name not in known:
                raise UsageError(f"parameter {shown(name)} is unknown in {notebook}{like(name, known)}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Run a notebook; its output appears when it is done.")
    parser.add_argument("notebook", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("-f", "--file", type=Path, help="YAML file of parameters")
    parser.add_argument(
        "--seal", type=Path, metavar="RESULTS", help="folder whose seals take what is written"
    )
    parser.add_argument("-p", "--parameter", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"))
    args = parser.parse_args(arguments)
    try:
        parameters = _parameters(args.file, args.parameter)
        _check_known(args.notebook, parameters)
    except UsageError as e:
        print(f"alphaprune: {e}", file=sys.stderr)
        return 2
    args.output.parent.mkdir(parents=True, exist_ok=True)
    running = args.output.with_name(f".{args.output.stem}.{os.getpid()}.ipynb")
    failed = args.output.with_suffix(".failed.ipynb")
    logging.getLogger("papermill").setLevel(logging.ERROR)  # the notebook itself checks its parameters
    asked: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        kernels = psutil.Process().children()
        if asked or not kernels:  # it does not wait a second time, nor for what has not begun
            raise SystemExit(128 + number)
        asked.append(number)
        for kernel in kernels:
            kernel.send_signal(signal.SIGINT)

    for number in SIGNALS:
        signal.signal(number, pass_on)
    try:
        if args.seal:
            seals.begin(args.seal, args.output)
        with tempfile.TemporaryDirectory(prefix="kernel-") as folder:
            # Sockets in a folder of their own, not ports: notebooks can run side by side.
            manager = {"transport": "ipc", "connection_file": f"{folder}/kernel.json"}
            journal = Path(folder) / "journal"
            journal.touch()
            os.environ[JOURNAL] = str(journal)
            papermill.execute_notebook(
                args.notebook,
                running,
                parameters,
                progress_bar=False,
                stdout_file=sys.stdout,
                config=Config(KernelManager=manager),
                extra_arguments=["--IPKernelApp.log_level=CRITICAL"],
            )
            del os.environ[JOURNAL]
            written = journal.read_text()
    except Exception as e:
        name, text = getattr(e, "ename", type(e).__name__), getattr(e, "evalue", str(e))
        if asked:
            running.unlink(missing_ok=True)
            where = f" ({text})" if name == "Interrupted" else ""
            print(
                f"alphaprune: {args.output} was stopped{where}; the same command goes on from there",
                file=sys.stderr,
            )
            return 128 + asked[0]
        if running.exists():
            os.replace(running, failed)
        print(f"alphaprune: {' '.join(text.split())} ({name}; see {failed})", file=sys.stderr)
        return 2 if name == "UsageError" else 1
    except BaseException:  # interrupted
        running.unlink(missing_ok=True)
        raise
    if args.seal:
        seals.finish(args.seal, running, args.output, written)
    else:
        os.replace(running, args.output)
    failed.unlink(missing_ok=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
