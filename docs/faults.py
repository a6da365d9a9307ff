"""Write docs/faults.md: what `make test-faults` tried, and what came of it.

    python docs/faults.py REPORT.xml

The report is pytest's, in JUnit's form; the tests note in it what they tried (see `fault` in tests/conftest.py).
"""

from __future__ import annotations

import json
import os
import platform
import sys
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

HERE = Path(__file__).parent
TITLES = {
    "test_faults_make": "A whole reproduction, killed",
    "test_faults": "An experiment, killed, stopped, without room or rights",
    "test_damage": "Damage to what is recorded",
    "test_bad_input": "Bad input, as whole commands",
}
HEAD = """# Faults tried

Written by `make test-faults` on {when}: {passed} tests passed, {failed} failed, {skipped} skipped, in {minutes} on {machine}, with
{load:.1f} processes busy, these among them, in the last 15 minutes. A line is what a test noted when it had seen the outcome; what failed has none.
"""
AFTER = """
## Bad input, row by row

Each row of these tables ends with one line and exit code 2 before anything is trained, runs nothing that it carries and writes nothing outside
results/; a damaged record or state is named and made again. The rows stand in `tests/test_bad_input.py`.

| table | rows |
| --- | --- |
{rows}

## What is not promised

- Records from before there were checksums (those under results/quick in git) are taken for what they say; git knows their content.
- Weights that are gone together with their checksum count as left behind on purpose: records suffice, until something needs the weights.
- A disk that says a file is written when it is not, and the loss of power, cannot be tried here; every file is synced before it gets its name.
- Two changes at once can agree with each other: whoever can write both a file and its checksum can write anything.
"""


def render(report: Path) -> str:
    """The page for a report."""
    suite = next(ElementTree.parse(report).iter("testsuite"))
    cases = list(suite.iter("testcase"))
    bad = [c for c in cases if c.find("failure") is not None or c.find("error") is not None]
    skipped = [c for c in cases if c.find("skipped") is not None]
    minutes = float(suite.get("time")) / 60
    page = HEAD.format(
        when=suite.get("timestamp")[:10],
        passed=len(cases) - len(bad) - len(skipped),
        failed=len(bad),
        skipped=len(skipped),
        minutes=f"{minutes:.1f} minutes",
        load=os.getloadavg()[2],
        machine=f"{os.cpu_count()} CPU cores ({platform.machine()}, Python {platform.python_version()})",
    )
    for module, title in TITLES.items():
        page += f"\n## {title}\n\n| tried | times | outcome | seconds |\n| --- | --- | --- | --- |\n"
        for case in cases:
            if case.get("classname").rpartition(".")[2] == module:
                for noted in case.iter("property"):
                    what, times, outcome = json.loads(noted.get("value"))
                    page += f"| {what} | {times:,} | {outcome} | {float(case.get('time')):.0f} |\n"
    tables = Counter(
        case.get("name").partition("[")[0].removeprefix("test_").replace("_", " ")
        for case in cases
        if "test_bad_input" in case.get("classname") and "[" in case.get("name") and case not in bad
    )
    return page + AFTER.format(rows="\n".join(f"| {name} | {count} |" for name, count in tables.items()))


if __name__ == "__main__":
    (HERE / "faults.md").write_text(render(Path(sys.argv[1])))
    print(f"{HERE.name}/faults.md: what was tried and survived")
