"""Timing in turns: what is compared with what, and when it is believed."""

import subprocess
import sys
import time
from collections import namedtuple

import pytest
import torch

from alphaprune import UsageError
from alphaprune.timing import alternate, cores_of_others, moment


class Clock:
    """Stands in for the machine's clock: time passes only where a function says so, and other processes have their share."""

    def __init__(self, monkeypatch, others=0.0):
        self.now = 0.0
        times = namedtuple("times", ["user", "idle"])
        monkeypatch.setattr("alphaprune.timing.clock", lambda: self.now)
        monkeypatch.setattr("alphaprune.timing.time.monotonic", lambda: self.now)
        monkeypatch.setattr("alphaprune.timing.time.process_time", lambda: self.now)
        monkeypatch.setattr(
            "alphaprune.timing.psutil.cpu_times",
            lambda: times((1 + others) * self.now, (1 - others) * self.now),
        )

    def takes(self, *seconds):
        turns = iter(range(10**9))
        return lambda: setattr(self, "now", self.now + seconds[next(turns) % len(seconds)])


def test_the_first_is_what_the_others_are_compared_with(monkeypatch):
    clock = Clock(monkeypatch)
    table = alternate({"wide": clock.takes(0.4), "narrow": clock.takes(0.1)}, seconds=10)
    assert list(table.index) == ["wide", "narrow"]
    assert table["median"].tolist() == pytest.approx([0.4, 0.1])
    assert table["ratio"].tolist() == pytest.approx([1, 4])
    assert table["runs"].tolist() == [10, 10] and table["trusted"].all()


def test_all_have_their_turn_when_the_machine_slows_down(monkeypatch):
    clock, calls = Clock(monkeypatch), []

    def slower_and_slower(name, share):
        def call():
            calls.append(name)
            clock.now += share * (1 + clock.now)

        return call

    table = alternate({"a": slower_and_slower("a", 0.05), "b": slower_and_slower("b", 0.05)}, seconds=4)
    in_turns = calls[6:]  # behind three of each that set the number of calls
    there_and_back = ["a", "a", "b", "b", "b", "b", "a", "a"]  # the first of two does not count
    assert in_turns == (there_and_back * len(in_turns))[: len(in_turns)]
    assert table.at["b", "ratio"] == pytest.approx(1, abs=0.15) and not table["trusted"].any()


def test_a_spread_above_15_percent_is_not_trusted(monkeypatch):
    clock = Clock(monkeypatch)
    table = alternate({"quiet": clock.takes(1.0, 1.05, 1.1), "busy": clock.takes(1.0, 1.2, 1.4)}, seconds=48)
    assert table["trusted"].tolist() == [True, False]
    assert table.at["busy", "spread"] == pytest.approx(table.at["busy", "iqr"] / 1.2)


def test_nor_is_what_another_process_computed_beside(monkeypatch):
    monkeypatch.setattr("alphaprune.timing.psutil.cpu_count", lambda: 2)
    alone, beside, elsewhere = (
        alternate({"f": Clock(monkeypatch, others).takes(1.0)}, seconds=10, threads=threads)
        for others, threads in ((0.1, 2), (0.9, 2), (0.9, 1))
    )
    assert alone.at["f", "others"] == pytest.approx(0.1) and alone.at["f", "trusted"]
    assert beside.at["f", "others"] == pytest.approx(0.9) and not beside.at["f", "trusted"]
    assert elsewhere.at["f", "trusted"]  # one of two cores was left free


def test_what_it_started_itself_is_none_of_the_others():
    busy = "import time\nwhile time.process_time() < 1.0: pass"
    before = moment()
    subprocess.run([sys.executable, "-c", busy], check=True)
    after = moment()
    assert after[2] - before[2] >= 0.5  # the system counts in ticks, and may miss some
    blamed = cores_of_others(before, (*after[:2], before[2])) - cores_of_others(before, after)
    assert blamed > 0


def test_what_is_short_is_timed_in_blocks(monkeypatch):
    clock, calls = Clock(monkeypatch), []
    tick = clock.takes(0.001)
    table = alternate({"short": lambda: calls.append(tick())}, seconds=0.01)
    assert table.at["short", "median"] == pytest.approx(0.001) and table.at["short", "runs"] == 5
    assert len(calls) in (3 + 5 * 20, 3 + 5 * 21)  # 19 or 20 a block, as rounding has it, and one before


def test_threads_are_those_asked_for_and_afterwards_those_of_before():
    before, seen = torch.get_num_threads(), []
    table = alternate(
        {"f": lambda: seen.append(torch.get_num_threads()) or time.sleep(0.02)}, 0.01, threads=2
    )
    assert set(seen) == {2} and table.at["f", "threads"] == 2 and torch.get_num_threads() == before
    with pytest.raises(ZeroDivisionError):
        alternate({"f": lambda: 1 / 0}, threads=2)
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    "wrong", [{"alternatives": {}}, {"seconds": 0}, {"seconds": float("nan")}, {"threads": 0}]
)
def test_what_cannot_be_timed_is_refused(wrong):
    with pytest.raises(UsageError):
        alternate(**{"alternatives": {"f": int}} | wrong)
