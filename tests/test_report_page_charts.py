"""Histograms count every value once, and draw counts in proportion."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from eval_protocol_rft.report._charts import (
    FRAME,
    Bin,
    bar_chart,
    curve_chart,
    length_bins,
    nice_step,
    reward_bins,
)
from eval_protocol_rft.report._page_stats import PassPoint

REWARDS = st.lists(st.floats(-1e9, 1e9) | st.sampled_from([0.0, 0.1, 0.3, 1.0]), min_size=1)


@given(REWARDS)
@example([i * 0.1 for i in range(30)])
@example([1.0 + i * 2**-52 for i in range(30)])
@example([float(10**15 + i) for i in range(30)])
def test_every_reward_is_counted_in_the_one_bin_that_holds_it(rewards: list[float]) -> None:
    bins = reward_bins(np.array(rewards))
    assert sum(b.count for b in bins) == len(rewards)
    for b in bins:
        inside = [r for r in rewards if (r == b.low if b.low == b.high else b.low <= r < b.high)]
        assert b.count == len(inside)
    assert [b.low for b in bins] == sorted({b.low for b in bins})


def test_a_few_values_get_a_bar_each() -> None:
    assert reward_bins(np.array([0.0, 1.0, 1.0, 0.5])) == [
        Bin(0.0, 0.0, 1),
        Bin(0.5, 0.5, 1),
        Bin(1.0, 1.0, 2),
    ]
    assert reward_bins(np.array([])) == []


def test_many_values_get_round_edges_that_the_values_themselves_lie_on() -> None:
    bins = reward_bins(np.array([k / 20 for k in range(21)]))
    assert [b.low for b in bins] == [k / 20 for k in range(21)]
    assert {b.count for b in bins} == {1}


@given(st.dictionaries(st.tuples(st.integers(0, 5000), st.booleans()), st.integers(1, 9)))
def test_every_length_is_counted_in_the_one_bin_that_holds_it(
    lengths: dict[tuple[int, bool], int],
) -> None:
    bins = length_bins(lengths)
    each = Counter(lengths)
    assert sum(b.count for b in bins) == each.total()
    for b in bins:
        inside = [key for key in lengths if b.low <= key[0] < b.high]
        assert b.count == sum(lengths[key] for key in inside)
        assert b.marked == sum(lengths[key] for key in inside if key[1])
        assert float(b.low).is_integer()


@given(st.floats(1e-6, 1e9), st.integers(1, 30))
def test_a_nice_step_is_round_and_the_smallest_that_does(span: float, parts: int) -> None:
    step = nice_step(span, parts)
    assert step * parts >= span * (1 - 1e-6)
    assert format(step, ".0e")[0] in "125"
    assert step == pytest.approx(float(format(step, ".0e")))
    assert step < 2.5 * span / parts * (1 + 1e-6)


@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 10**6)), min_size=1, max_size=40))
def test_bars_are_as_high_as_their_counts_and_stay_inside(pairs: list[tuple[int, int]]) -> None:
    bins = [Bin(i, i + 1, rest + cut, cut) for i, (rest, cut) in enumerate(pairs)]
    chart = bar_chart(bins)
    # The topmost label on the y axis says how much a unit of height counts.
    top = chart.y_ticks[-1]
    unit = (FRAME.bottom - top.at) / float(top.label.replace(",", ""))
    for bar, b in zip(chart.bars, bins, strict=True):
        assert bar.height + bar.marked_height == pytest.approx(b.count * unit)
        assert bar.marked_height == pytest.approx(b.marked * unit)
        assert bar.y + bar.height == pytest.approx(bar.marked_y)
        assert bar.y >= FRAME.top - 1e-6
        assert FRAME.left <= bar.x
        assert bar.x + bar.width <= FRAME.right
    for left, right in zip(chart.bars, chart.bars[1:], strict=False):
        assert left.x + left.width < right.x


def test_ranges_are_labelled_at_round_edges() -> None:
    chart = bar_chart(length_bins({(n, False): 1 for n in range(20, 201)}), whole_numbers=True)
    assert [tick.label for tick in chart.x_ticks] == ["50", "100", "150", "200"]
    assert chart.bars[0].label == "20 to 29"


@pytest.mark.parametrize("n", [1, 2, 5, 8, 64, 100])
def test_the_curve_runs_from_one_to_n(n: int) -> None:
    chart = curve_chart([PassPoint(k, k / n, 3) for k in range(1, n + 1)])
    assert len(chart.dots) == n
    assert [chart.x_ticks[0].label, chart.x_ticks[-1].label] == (
        ["1", str(n)] if n > 1 else ["1"] * 2
    )
    assert chart.dots[-1].y == pytest.approx(FRAME.top)
    xs = [dot.x for dot in chart.dots]
    assert xs == sorted(xs)
    assert all(FRAME.left <= x <= FRAME.right + 1e-6 for x in xs)


def test_nothing_makes_an_empty_chart() -> None:
    assert bar_chart([]).bars == []
    assert curve_chart([]).dots == []
