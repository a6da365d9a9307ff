"""What `make benchmark` measures, and what it says of it. How fast anything is, is no test."""

import sys

import pandas as pd
import pytest
from conftest import ROOT

from alphaprune.benchmark import COLUMNS, Sizes, Target, as_line, as_table, measure

sys.path.insert(0, str(ROOT / "notebooks"))
import benchmark


@pytest.fixture(scope="module")
def measured():
    lines = []
    small = Sizes(
        0.125, 0.125, batch=4, resnet_batch=1, resnet_side=32, fit_images=100, threads=1, seconds=0.1
    )
    return measure(small, lines.append), lines


def test_everything_is_measured_with_its_target(measured):
    table, lines = measured
    assert list(table.columns) == COLUMNS and (table["value"] > 0).all()
    with_target = table[table["target"] != ""]
    parts = (
        "alpha 1",
        "alpha 0.5",
        "alpha 0",
        "images given",
        "folded, optimised",
        "of 16, optimised",
        "least squares",
    )
    for part in parts:
        assert with_target["what"].str.contains(part, regex=False).any(), part
    assert with_target["holds"].isin([True, False]).all()
    assert len([line for line in lines if not line.startswith("[")]) == len(table)
    plain = table[table["what"].str.endswith(": plain") | table["what"].str.endswith("original, as it is")]
    assert len(plain) == 4 and (plain["value"] == 1).all()  # what the others are compared with
    assert len(as_table(table).splitlines()) == len(table) + 2


def row(holds, trusted):
    return {"what": "w", "milliseconds": 1.0, "value": 0.5, "unit": "u", "target": "at most 0.4", "holds": holds,
            "spread": 0.3, "others": 1.0, "trusted": trusted, "threads": 1}  # fmt: skip


@pytest.mark.parametrize(
    ("rows", "code"),
    [
        ([row(True, True), row(None, True)], 0),
        ([row(True, False)], 0),
        ([row(False, True), row(True, True)], 1),
        ([row(False, False), row(True, True)], 2),
        ([row(False, False), row(False, True)], 1),
        ([row(False, None)], 1),
    ],
)
def test_a_ratio_that_falls_short_fails_unless_the_machine_was_busy(rows, code):
    assert benchmark.verdict(pd.DataFrame(rows)) == code


def test_what_is_not_to_be_trusted_says_so():
    line = as_line(row(False, False))
    assert "FALLS SHORT" in line and "not to be trusted: spread 30%, others kept 1.00 cores busy" in line
    assert "trusted" not in as_line(row(True, True))
    assert "not to be trusted" in as_table(pd.DataFrame([row(True, False)]))


def test_a_target_is_a_bound():
    assert Target(at_most=0.5).holds(0.5) and not Target(at_most=0.5).holds(0.51)
    assert Target(at_least=0.5).holds(0.5) and not Target(at_least=0.5).holds(0.49)
    assert str(Target(at_least=2)) == "at least 2"
