"""Alpha schedules."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alphaprune import UsageError
from alphaprune.schedule import THRESHOLD, alphas, next_try, staggered


def test_step_of_a_tenth_is_the_reports_figure_4():
    assert alphas("step", 0.1) == [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0]


def test_multiplicative_stops_at_the_threshold():
    assert alphas("multiplicative", 0.5) == [0.5, 0.25, 0.125, 0.0625, 0.03125, 0.015625, 0.0]


def test_exponential():
    assert alphas("exponential", 1.0) == [math.exp(-t) for t in range(1, 5)] + [0.0]


def test_a_listed_schedule_is_taken_as_it_is():
    assert alphas("listed", [0.5, 0.01]) == [0.5, 0.01]


@given(
    st.one_of(
        st.tuples(st.just("step"), st.floats(0.01, 1)),
        st.tuples(st.just("multiplicative"), st.floats(0.01, 0.99)),
        st.tuples(st.just("exponential"), st.floats(0.01, 50)),
        st.tuples(st.just("cosine"), st.integers(1, 60)),
    ),
    st.floats(0.001, 0.9),
)
def test_schedules_fall_strictly_from_1_to_0_and_skip_what_is_below_the_threshold(kind_by, threshold):
    values = alphas(*kind_by, threshold)
    assert values[-1] == 0
    assert all(a > b for a, b in zip([1.0, *values], values, strict=False))
    assert all(v >= threshold for v in values[:-1])


@pytest.mark.parametrize(
    ("kind", "by", "threshold"),
    [("step", 0, THRESHOLD), ("step", -0.1, THRESHOLD), ("multiplicative", 1.0, THRESHOLD), ("exponential", math.inf, THRESHOLD),
     ("step", math.nan, THRESHOLD), ("step", 0.1, 0.0), ("cosine", 0.1, THRESHOLD), ("listed", [], THRESHOLD),
     ("listed", [0.5, 1.5], THRESHOLD), ("listed", 0.5, THRESHOLD), ("step", [0.5], THRESHOLD)],
)  # fmt: skip
def test_what_leads_nowhere_is_refused(kind, by, threshold):
    with pytest.raises(UsageError):
        alphas(kind, by, threshold)


@given(
    st.lists(st.floats(0, 1), min_size=2, max_size=20), st.integers(1, 30), st.sampled_from(["front", "back"])
)
def test_staggered_layers_fall_one_after_the_other_and_never_rise(alphas, layers, order):
    before = [1.0] * layers
    for alpha in sorted(alphas, reverse=True):
        values = staggered(alpha, layers, order)
        assert len(values) == layers and all(0 <= v <= b for v, b in zip(values, before, strict=True))
        assert values == sorted(values, reverse=order == "back")
        assert staggered(alpha, layers, "together") == [alpha] * layers
        before = values
    assert staggered(1.0, layers, order) == [1.0] * layers
    assert staggered(0.0, layers, order) == [0.0] * layers


@pytest.mark.parametrize("order", ["front", "back"])
def test_staggered_is_in_the_middle_of_the_way_at_one_half(order):
    assert staggered(0.5, 3, order) == ([0.0, 0.5, 1.0] if order == "front" else [1.0, 0.5, 0.0])


def adaptive(accuracy_at, before=0.9, survive=0.02, **options):
    """All tries of an adaptive schedule, where a stage from one alpha to another reaches `accuracy_at` of both."""
    tries, reached = [], []
    while (following := next_try(tries, reached, before, survive, **options)) is not None:
        start = 1.0 if following.start is None else tries[following.start].alpha
        tries.append(following)
        reached.append(accuracy_at(start, following.alpha))
        assert len(tries) < 500
    return tries, reached


def test_adaptive_goes_straight_where_nothing_is_lost():
    tries, _ = adaptive(lambda start, alpha: 0.9)
    assert [t.alpha for t in tries] == [0.5, 0.0]


def test_adaptive_goes_back_and_halves_until_it_survives():
    tries, _ = adaptive(lambda start, alpha: 0.9 if start - alpha <= 0.13 else 0.5)
    assert [t.alpha for t in tries[:4]] == [0.5, 0.75, 0.875, 0.625]
    assert [t.start for t in tries[:4]] == [None, None, None, 2]
    assert tries[-1].alpha == 0


@given(st.floats(0.02, 1), st.floats(0.02, 1), st.randoms(use_true_random=False))
def test_adaptive_ends_at_0_and_loses_more_than_allowed_only_in_smallest_steps(first, smallest, random):
    tries, reached = adaptive(lambda start, alpha: random.random(), first=first, smallest=smallest)
    accepted = [tries[-1]]
    while accepted[-1].start is not None:
        accepted.append(tries[accepted[-1].start])
    path = [1.0, *(t.alpha for t in reversed(accepted))]
    assert path[-1] == 0 and all(a > b for a, b in itertools.pairwise(path))
    for t in accepted:
        before = 0.9 if t.start is None else reached[t.start]
        assert t.step <= smallest or reached[tries.index(t)] >= before - 0.02
