"""Where a result came from: kept in its record, and carried by every figure and page that is made from it.

    python -m alphaprune.provenance results/quick/figures/figure4.png

prints it. Recorded, never part of an identity. What a figure carries is made of the records alone, with no time of day,
so that the same records give the same file:

    {"command": [what makes it again], "parameters": [files],
     "runs": [{"commit", "lock_sha256", "data_checksum", "hardware", "versions", "records": [{"stage", "identity", "path"}]}]}

A run is what records have in common that were made at one commit, on one machine. All paths are from the project's folder.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from html.parser import HTMLParser
from importlib.metadata import version
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from PIL import Image, UnidentifiedImageError

from alphaprune import yaml_text
from alphaprune.errors import UsageError

# Where it stands: the PNG's text chunk, the SVG's Dublin Core element, the page's <meta>.
PNG_KEY = "Source"
SVG_ELEMENT = "{http://purl.org/dc/elements/1.1/}source"
META_NAME = "provenance"
OF_A_RUN = ("commit", "lock_sha256", "data_checksum", "hardware", "versions")


def provenance(root: Path, command: str) -> dict[str, Any]:
    """Commit, lock, versions and hardware of this process, for a record, with the command that makes the record again."""
    import torch  # whoever only reads what a figure carries need not wait for it

    git = shutil.which("git") and subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"], cwd=root, capture_output=True, text=True
    )
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    lock = root / "requirements.lock"
    return {
        "commit": (git and git.stdout.strip()) or None,
        "command": command,
        "lock_sha256": hashlib.sha256(lock.read_bytes()).hexdigest() if lock.is_file() else None,
        "versions": {name: version(name) for name in ("torch", "torchvision", "accelerate")}
        | {"python": platform.python_version()},
        "hardware": {
            "machine": platform.machine(),
            "cpu": _cpu(),
            "cores": os.cpu_count(),
            "gpu": gpu,
            "threads": torch.get_num_threads(),
        },
    }


def _cpu() -> str | None:
    """What the processor calls itself, None where it does not say."""
    with suppress(OSError):
        said = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(errors="replace"), re.M)
        if said:
            return said[1].strip()
    return platform.processor() or None


def papermill_command(notebook: str, file: str, changed: Mapping[str, Any]) -> str:
    """The command that runs a notebook with a parameter file, and with what is changed against it.

    Args:
        notebook: its name in notebooks/, without the ending.
        file: the parameter file, from the project's folder.
        changed: parameters by name.

    >>> papermill_command("12_how_cost_grows", "params/quick/how_cost_grows.yaml", {"batch": 8, "axes": {"depth": [8]}})
    "papermill notebooks/12_how_cost_grows.ipynb out.ipynb -f params/quick/how_cost_grows.yaml -p batch 8 -y 'axes: {depth: [8]}'"
    """
    words = ["papermill", f"notebooks/{notebook}.ipynb", "out.ipynb", "-f", file]
    for name, value in changed.items():
        text = yaml_text.in_yaml(value)
        # Of -p papermill makes a number or a text, and of true or a list a text.
        as_it_is = text == value or (isinstance(value, int | float) and not isinstance(value, bool))
        words += ["-p", name, text] if as_it_is else ["-y", f"{name}: {text}"]
    return shlex.join(words)


def changed_parameters(variables: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """Of a notebook's variables those that a parameter file names and gives another value, by name (raises UsageError for a file that cannot be read)."""
    given = yaml_text.read(file)
    return {name: variables[name] for name, value in given.items() if variables[name] != value}


def of_records(
    root: Path, records: Iterable[Path], command: str, parameters: Iterable[str]
) -> dict[str, Any]:
    """What a figure that is made of records carries.

    Args:
        root: the project's folder.
        records: the `run.json` files; of two of the same stage and identity the first is named.
        command: what makes the figure's numbers again.
        parameters: the parameter files, from `root`.
    """
    runs = []
    for path in records:
        content = json.loads(path.read_text())
        stage = content.get("stage", {}).get("name") or "folded"
        name = {"stage": f"{content['experiment']}/{stage}", "identity": content["identity"]}
        record = name | {"path": path.relative_to(root).as_posix()}
        runs.append({key: content.get(key) for key in OF_A_RUN} | {"records": [record]})
    return merged([{"command": [command], "parameters": list(parameters), "runs": runs}])


def made_here(
    root: Path, command: str, parameters: Iterable[str], data_checksum: str | None
) -> dict[str, Any]:
    """What a figure carries that comes from no record but from this very process; arguments as of `of_records`."""
    here = provenance(root, command) | {"data_checksum": data_checksum}
    run = {key: here[key] for key in OF_A_RUN} | {"records": []}
    return {"command": [command], "parameters": list(parameters), "runs": [run]}


def merged(parts: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Several provenances as one: each command, file, run and record named once, in the order of their first mention."""
    commands: dict[str, None] = {}
    parameters: set[str] = set()
    runs: dict[str, dict[str, Any]] = {}
    seen: set[tuple[str, str]] = set()
    for part in parts:
        commands |= dict.fromkeys(part["command"])
        parameters |= set(part["parameters"])
        for run in part["runs"]:
            made = {key: run[key] for key in OF_A_RUN}
            new = [r for r in run["records"] if (r["stage"], r["identity"]) not in seen]
            seen |= {(r["stage"], r["identity"]) for r in new}
            if new or not run["records"]:
                runs.setdefault(json.dumps(made, sort_keys=True), made | {"records": []})["records"] += new
    return {"command": list(commands), "parameters": sorted(parameters), "runs": list(runs.values())}


# ---- reading it back


def read(file: Path) -> dict[str, Any]:
    """The provenance that a figure or page carries.

    Args:
        file: a PNG, an SVG or an HTML page.

    Raises:
        UsageError: if the file is not readable or carries none.
    """
    readers = {".png": in_png, ".svg": _in_svg, ".html": _in_html}
    if file.suffix.lower() not in readers:
        raise UsageError(f"{file} is neither PNG, SVG nor HTML; name a figure or a page of results/")
    try:
        found = readers[file.suffix.lower()](file.read_bytes())
    except OSError as e:
        raise UsageError(f"{file} cannot be read: {e.strerror or e}") from None
    if found is None:
        raise UsageError(f"{file} carries no provenance; draw it again with `make figures` or `make html`")
    return found


def in_png(content: bytes) -> dict[str, Any] | None:
    """The provenance inside a PNG, None if there is none."""
    try:
        with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
            return _parsed(image.info.get(PNG_KEY))
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, ValueError, SyntaxError):
        return None


def _in_svg(content: bytes) -> dict[str, Any] | None:
    try:
        return _parsed(next((e.text for e in ElementTree.fromstring(content).iter(SVG_ELEMENT)), None))
    except (ElementTree.ParseError, ValueError, LookupError):
        return None


def _in_html(content: bytes) -> dict[str, Any] | None:
    found: list[str | None] = []

    class Metas(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            if tag == "meta" and dict(attrs).get("name") == META_NAME:
                found.append(dict(attrs).get("content"))

    Metas().feed(content.decode(errors="replace"))
    return _parsed(found[0]) if found else None


def _parsed(text: Any) -> dict[str, Any] | None:
    """JSON of the expected form, None for anything else: files come from anywhere."""
    try:
        content = json.loads(text)
        runs = content["runs"]
        texts = [*content["command"], *content["parameters"]]
        texts += [r[key] for run in runs for r in run["records"] for key in ("stage", "identity", "path")]
        texts += [run[key] or "" for run in runs for key in ("commit", "lock_sha256", "data_checksum")]
        tables = [run[key] or {} for run in runs for key in ("hardware", "versions")]
        if all(isinstance(t, str) for t in texts) and all(isinstance(t, dict) for t in tables):
            return merged([content])
    except (TypeError, ValueError, LookupError, AttributeError, RecursionError):
        pass
    return None


def as_text(found: dict[str, Any]) -> str:
    """A provenance for people, a line each for what there is one of and for every record."""
    lines = [f"command     {command}" for command in found["command"]]
    lines.append(f"parameters  {', '.join(found['parameters']) or 'none'}")
    for run in found["runs"]:
        hardware = ", ".join(
            f"{k} {v if v is not None else 'none'}" for k, v in (run["hardware"] or {}).items()
        )
        lines += [
            f"commit      {run['commit'] or 'not recorded'}",
            f"lock        {_digest(run['lock_sha256'], 'requirements.lock, ')}",
            f"data        {_digest(run['data_checksum'])}",
            f"hardware    {hardware or 'not recorded'}",
            f"versions    {', '.join(f'{k} {v}' for k, v in (run['versions'] or {}).items()) or 'not recorded'}",
            f"records     {len(run['records'])}",
        ]
        lines += [f"  {r['stage']}  {r['identity'][:8]}  {r['path']}" for r in run["records"]]
    # A file from elsewhere may hold control characters, which a terminal would obey.
    return "\n".join("".join(c if c.isprintable() else "?" for c in line) for line in lines)


def summary_line(found: dict[str, Any]) -> str:
    """A provenance in one line, for the foot of a page."""
    records = sum(len(run["records"]) for run in found["runs"])
    commits = dict.fromkeys(run["commit"] or "not recorded" for run in found["runs"])
    locks = dict.fromkeys((run["lock_sha256"] or "not recorded")[:12] for run in found["runs"])
    commands = found["command"][0] if found["command"] else "none"
    if more := len(found["command"]) - 1:
        commands += f" and {more} more"
    return (
        f"Made from {records} records. Commit {', '.join(commits)}; lock {', '.join(locks)}; command: {commands}. "
        "All of it: python -m alphaprune.provenance, with this file."
    )


def _digest(value: str | None, of: str = "") -> str:
    return f"{of}SHA-256 {value}" if value else "not recorded"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m alphaprune.provenance", description="What a figure or a page was made from."
    )
    parser.add_argument("file", type=Path, help="a PNG, an SVG or an HTML page")
    args = parser.parse_args(arguments)
    try:
        print(as_text(read(args.file)), flush=True)
    except BrokenPipeError:  # whoever reads has seen enough, such as head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except UsageError as e:
        print(f"alphaprune: {e}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
