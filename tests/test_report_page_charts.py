"""Histograms count every value once, and draw counts in proportion."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter

import matplotlib
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from eval_protocol_rft._statistics import Bar, PassAtK
from eval_protocol_rft.report._charts import histogram, pass_curve
from eval_protocol_rft.report._page import length_bins, reward_bins
from eval_protocol_rft.report._svg import nice_step, theme
from tests.drawings import BOTTOM, LEFT, RIGHT, TOP, Drawing

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
        Bar(0.0, 0.0, 1),
        Bar(0.5, 0.5, 1),
        Bar(1.0, 1.0, 2),
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
    bins, marks = length_bins(lengths)
    each = Counter(lengths)
    assert sum(b.count for b in bins) == each.total()
    for b, marked in zip(bins, marks, strict=True):
        inside = [key for key in lengths if b.low <= key[0] < b.high]
        assert b.count == sum(lengths[key] for key in inside)
        assert marked == sum(lengths[key] for key in inside if key[1])
        assert float(b.low).is_integer()


@given(st.floats(1e-6, 1e9), st.integers(1, 30))
def test_a_nice_step_is_round_and_the_smallest_that_does(span: float, parts: int) -> None:
    step = nice_step(span, parts)
    assert step * parts >= span * (1 - 1e-6)
    assert format(step, ".0e")[0] in "125"
    assert step == pytest.approx(float(format(step, ".0e")))
    assert step < 2.5 * span / parts * (1 + 1e-6)


@settings(max_examples=15)
@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 10**6)), min_size=1, max_size=40))
def test_bars_are_as_high_as_their_counts_and_stay_inside(pairs: list[tuple[int, int]]) -> None:
    bins = [Bar(i, i + 1, rest + cut) for i, (rest, cut) in enumerate(pairs)]
    marks = [cut for _, cut in pairs]
    chart = histogram("h", "H", bins, label="x", marked=("cut", marks), nothing="")
    drawn = Drawing(chart.svg)
    rounding = 2e-4 * max(1, *(b.count for b in bins))
    right = LEFT - 0.01
    for i, (b, marked) in enumerate(zip(bins, marks, strict=True)):
        low, high = drawn.height(f"h-marked-{i}")
        assert (low, high) == pytest.approx((0, marked), abs=rounding)
        low, high = drawn.height(f"h-bar-{i}")
        if b.count > marked:
            assert (low, high) == pytest.approx((marked, b.count), abs=rounding)
        points = [p for part in ("marked", "bar") for c in drawn.pieces(f"h-{part}-{i}") for p in c]
        for x, y in points:
            assert right < x < RIGHT
            assert TOP - 0.01 <= y <= BOTTOM
        right = max([right, *(x for x, _ in points)])


def test_ranges_are_labelled_at_round_edges() -> None:
    bins, cut = length_bins({(n, n > 190): 1 for n in range(20, 201)})
    marked = ("truncated", cut)
    chart = histogram("h", "H", bins, label="tokens", marked=marked, whole_numbers=True, nothing="")
    drawn = Drawing(chart.svg)
    assert drawn.x_labels == ["50", "100", "150", "200"]
    assert chart.numbers[:2] == [["tokens", "completions", "truncated"], ["20 to 29", "10", "0"]]
    assert "190 to 199: 10, 9 of them truncated" in drawn.titles


@pytest.mark.parametrize("n", [1, 2, 5, 8, 64, 100])
def test_the_curve_runs_from_one_to_n(n: int) -> None:
    chart = pass_curve("p", [PassAtK(k, k / n, 3) for k in range(1, n + 1)], nothing="")
    drawn = Drawing(chart.svg)
    dots = drawn.dots("p-0")
    assert len(dots) == n
    assert [drawn.value(y) for _, y in dots] == pytest.approx(
        [k / n for k in range(1, n + 1)], abs=1e-4
    )
    assert [drawn.x_labels[0], drawn.x_labels[-1]] == (["1", str(n)] if n > 1 else ["1"] * 2)
    xs = [x for x, _ in dots]
    assert xs == sorted(xs)
    assert all(LEFT <= x <= RIGHT for x in xs)
    assert drawn.titles[-1] == f"pass@{n} = 1.0000 over 3 prompts"
    assert len(drawn.titles) == n


def test_nothing_makes_no_drawing_and_says_why() -> None:
    for chart in (
        histogram("h", "H", [], label="x", nothing="no rewards"),
        pass_curve("p", [], nothing="no rewards"),
    ):
        assert (chart.svg, chart.nothing) == ("", "no rewards")


def test_equal_numbers_give_equal_bytes_whatever_matplotlib_is_set_to() -> None:
    def draw() -> str:
        bins = [Bar(0, 0, 3), Bar(1, 1, 5)]
        return histogram("h", "H", bins, label="x", marked=("m", [0, 2]), nothing="").svg

    before = draw()
    with matplotlib.rc_context(
        {"font.size": 40, "axes.grid": False, "svg.fonttype": "path", "xtick.major.size": 9}
    ):
        assert draw() == before


def test_a_page_without_inline_styles_shows_drawings_whole_and_on_dark_screens() -> None:
    bins = [Bar(0, 0, 3), Bar(1, 1, 5)]
    svg = histogram("h", "H", bins, label="x", marked=("m", [0, 2]), nothing="").svg
    drawn = Drawing(svg)
    own = {name for element in drawn.root.iter() for name in element.attrib}
    assert not own & {"style", "font", "clip-path", "href"}
    assert {text.get("font-size") for text in drawn.root.iter("text")} == {"13px"}
    colours = {e.get(part) for e in drawn.root.iter() for part in ("fill", "stroke")}
    for colour in colours - {None, "none"}:
        assert f'[fill="{colour}"]' in theme()
        assert f'[stroke="{colour}"]' in theme()
    assert not any(
        element.tag in ("style", "defs", "use", "metadata") for element in drawn.root.iter()
    )


def test_who_cannot_see_a_drawing_is_told_what_it_shows() -> None:
    drawn = Drawing(histogram("h", "H", [Bar(0, 0, 3), Bar(1, 1, 5)], label="x", nothing="").svg)
    assert drawn.root.get("role") == "img"
    assert drawn.root.get("aria-labelledby") == "h-title"
    about = drawn.root.find(f"desc[@id='{drawn.root.get('aria-describedby')}']")
    assert about is not None
    assert about.text == "8 completions"


def test_matplotlib_is_silent_where_it_finds_no_folder_for_its_caches() -> None:
    code = """
from eval_protocol_rft.report._charts import histogram
from eval_protocol_rft._statistics import Bar
print(histogram("h", "H", [Bar(0, 0, 3)], label="x", nothing="").svg[:4])
"""
    environment = {**os.environ, "MPLCONFIGDIR": os.devnull}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == ("<svg\n", "")
