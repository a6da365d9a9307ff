"""Run a notebook with papermill so that its result is whole or not there.

    python notebooks/execute.py notebooks/02_alpha_decay.ipynb OUT.ipynb -f params/quick/fig4.yaml -p seed 1

The output gets its name when the last cell is done. A notebook that fails is kept beside it, as OUT.failed.ipynb. SIGTERM and
Ctrl-C are passed on to the notebook, which saves what it is at and stops.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import tempfile
from pathlib import Path
from types import FrameType

import papermill
import psutil
import yaml
from traitlets.config import Config

SIGNALS = (signal.SIGINT, signal.SIGTERM)


def main() -> int:
    parser = argparse.ArgumentParser(description="Run a notebook; its output appears when it is done.")
    parser.add_argument("notebook", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("-f", "--file", type=Path, help="YAML file of parameters")
    parser.add_argument("-p", "--parameter", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"))
    args = parser.parse_args()
    try:
        parameters = yaml.safe_load(args.file.read_text()) if args.file else {}
        parameters |= {name: yaml.safe_load(value) for name, value in args.parameter}
    except (OSError, UnicodeDecodeError, yaml.YAMLError, TypeError) as e:
        print(
            f"alphaprune: {args.file} cannot be read as parameters: {' '.join(str(e).split())[:200]}",
            file=sys.stderr,
        )
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
        with tempfile.TemporaryDirectory(prefix="kernel-") as sockets:
            # Sockets in a folder of their own, not ports: notebooks can run side by side.
            manager = {"transport": "ipc", "connection_file": f"{sockets}/kernel.json"}
            papermill.execute_notebook(
                args.notebook,
                running,
                parameters,
                progress_bar=False,
                stdout_file=sys.stdout,
                config=Config(KernelManager=manager),
                extra_arguments=["--IPKernelApp.log_level=CRITICAL"],
            )
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
    os.replace(running, args.output)
    failed.unlink(missing_ok=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
