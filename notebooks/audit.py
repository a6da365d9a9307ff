"""Known vulnerabilities of what the lock names, by pip-audit.

    python notebooks/audit.py requirements.lock

Ends with 0 if every package was looked up and none has any, 1 if some have, 2 if that cannot be said. pip-audit itself
counts a package that it could not look up as harmless.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
from pathlib import Path


def findings(report: dict) -> tuple[list[str], list[str]]:
    """pip-audit's JSON -> what is vulnerable, a line each, and the packages that were not looked up."""
    packages = report["dependencies"]
    skipped = [p["name"] for p in packages if "skip_reason" in p]
    vulnerable = [
        f"{p['name']} {p['version']}: {v['id']}, mended in {', '.join(v['fix_versions']) or 'no version yet'}"
        for p in packages
        for v in p.get("vulns", ())
    ]
    return vulnerable, skipped


def audit(lock: Path) -> int:
    """Look up all that `lock` names for this platform and say what is known; the exit code."""
    if importlib.util.find_spec("pip_audit") is None:
        return _cannot("pip-audit is not installed; run `make environment`")
    command = [
        sys.executable,
        "-m",
        "pip_audit",
        "--requirement",
        str(lock),
        "--require-hashes",
        "--disable-pip",
    ]
    command += ["--format", "json", "--progress-spinner", "off"]
    done = subprocess.run(command, capture_output=True, text=True)
    try:
        vulnerable, skipped = findings(json.loads(done.stdout))
    except (ValueError, LookupError, TypeError):
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        return _cannot(
            f"the advisory service cannot be asked about {lock}: {last[:200]}; try again with a network"
        )
    for line in vulnerable:
        print(line)
    if skipped:
        return _cannot(
            f"the advisory service had no answer for {len(skipped)} packages of {lock}, {skipped[0]} first; try again with a network that reaches it"
        )
    print(f"{lock}: {len(vulnerable)} known vulnerabilities")
    return 1 if vulnerable else 0


def _cannot(why: str) -> int:
    print(f"alphaprune: {why}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Known vulnerabilities of what a lock names.")
    parser.add_argument("lock", type=Path)
    sys.exit(audit(parser.parse_args().lock))
