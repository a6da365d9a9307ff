"""Verdicts follow from the rules, whatever the numbers."""

import pytest
import yaml
from conftest import ROOT

from alphaprune import UsageError
from alphaprune.results import PRUNED, TRAINED
from alphaprune.scorecard import Claim, load_claims, score
from alphaprune.settings import load_settings

CLAIMS = load_claims(ROOT / "params" / "claims.yaml")


def claim(rule, reported=None, of=("e/a",), **rest):
    return Claim(id="x", experiment="e", claim="c", of=of, rule=rule, reported=reported, **rest)


@pytest.mark.parametrize(
    ("made", "accuracies", "ours", "verdict"),
    [
        (claim({"within": 5}, 88.0), {"e/a": 83.0}, 83.0, "reproduced"),
        (claim({"within": 5}, 88.0), {"e/a": 82.9}, 82.9, "not reproduced"),
        (claim({"within": 5}, 88.0), {"e/a": 99.0}, 99.0, "not reproduced"),
        (claim({"below": 0}, minus="e/b"), {"e/a": 50.0, "e/b": 60.0}, -10.0, "reproduced"),
        (claim({"below": 0}, minus="e/b"), {"e/a": 60.0, "e/b": 50.0}, 10.0, "not reproduced"),
        (claim({"below": 0}, minus="e/b"), {"e/a": 60.0, "e/b": 60.0}, 0.0, "not reproduced"),
        (claim({"above": 1}, minus="e/b"), {"e/a": 60.0, "e/b": 50.0}, 10.0, "reproduced"),
        (
            claim({"above": 1}, of=("e/a", "e/c"), take="lowest"),
            {"e/a": 60.0, "e/c": 0.5},
            0.5,
            "not reproduced",
        ),
        (
            claim({"above": 1}, of=("e/a", "e/c"), take="highest"),
            {"e/a": 60.0, "e/c": 0.5},
            60.0,
            "reproduced",
        ),
        (claim("left_open"), {"e/a": 60.0}, 60.0, "report left open"),
        (claim({"above": 1}), {}, None, "not run"),
        (claim({"above": 1}, minus="e/b"), {"e/a": 60.0}, None, "not run"),
    ],
)
def test_verdicts(made, accuracies, ours, verdict):
    row = score([made], accuracies.get).iloc[0]
    assert row["verdict"] == verdict
    assert (row["ours"] == ours) if ours is not None else row["ours"] is None or row["ours"] != row["ours"]


def test_every_claim_names_stages_that_exist():
    stages = {f"{e}/{s.name}" for e in TRAINED for s in load_settings("quick", e, ROOT).stages}
    stages |= {f"{PRUNED}/folded", f"{PRUNED}/alpha 0", f"{PRUNED}/original"}
    named = {n for c in CLAIMS for n in (*c.of, *([c.minus] if c.minus else []))}
    assert named <= stages
    assert len(CLAIMS) >= 15 and len({c.id for c in CLAIMS}) == len(CLAIMS)
    assert {c.experiment for c in CLAIMS} == {*TRAINED, PRUNED}


def test_nothing_run_gives_no_verdict():
    assert set(score(CLAIMS, lambda name: None)["verdict"]) == {"not run"}


@pytest.mark.parametrize(
    "broken", [{"rule": {"near": 3}}, {"rule": {"within": 5}}, {"rule": {}}, {"of": []}, {"extra": 1}]
)
def test_incomplete_claims_are_refused(tmp_path, broken):
    path = tmp_path / "claims.yaml"
    path.write_text(
        yaml.safe_dump(
            [{"id": "x", "experiment": "e", "claim": "c", "of": ["e/a"], "rule": {"below": 0}} | broken]
        )
    )
    with pytest.raises(UsageError, match=r"claims\.yaml does not hold claims"):
        load_claims(path)
