"""A run's page: what was measured is drawn where it belongs, and what was not is a gap."""

from __future__ import annotations

import json
import math
import re
import xml.etree.ElementTree as ElementTree
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from eval_protocol_rft.cli import app
from eval_protocol_rft.report._charts import Chart, Series, binned, curves, layers, smoothed
from eval_protocol_rft.report._html import ReportError
from eval_protocol_rft.report._reading import Measured, read_run
from eval_protocol_rft.report._training_page import curve_svg, training_page, write_training_report
from tests.drawings import BOTTOM, LEFT, RIGHT, TOP, Drawing
from tests.loop.runs import options, run

NAN = math.nan
VALUES = st.lists(st.floats(-1e6, 1e6) | st.just(NAN), min_size=1, max_size=60)


def evaluation(step: int, **values: Any) -> dict[str, Any]:
    return {"kind": "eval", "step": step, "rows": 8, **values}


def step(number: int, **values: Any) -> dict[str, Any]:
    return {"kind": "step", "step": number, "reward_mean": 0.25, **values}


@given(VALUES, st.integers(0, 6))
def test_a_smoothed_value_is_the_mean_of_the_known_ones_around_it(
    values: list[float], half: int
) -> None:
    found = smoothed(np.array(values), 2 * half + 1)
    for i, value in enumerate(values):
        around = [v for v in values[max(0, i - half) : i + half + 1] if not math.isnan(v)]
        if math.isnan(value):
            assert math.isnan(found[i])
        else:
            assert found[i] == pytest.approx(sum(around) / len(around), rel=1e-6, abs=1e-4)


@given(VALUES, st.integers(1, 9))
def test_bins_are_means_of_neighbours(values: list[float], size: int) -> None:
    found = binned(np.array(values), size)
    expected = []
    for begin in range(0, len(values), size):
        known = [v for v in values[begin : begin + size] if not math.isnan(v)]
        expected.append(sum(known) / len(known) if known else NAN)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-6)


def line(values: Any, steps: Any = None, **options: Any) -> Drawing:
    """A drawing of one series, of steps 1 to N."""
    array = np.array(values)
    steps = steps or range(1, len(array) + 1)
    evaluated = options.pop("evaluated", False)
    series = Series("x", steps, array, evaluated=evaluated)
    span = (steps[0], max(steps[-1], steps[0] + 1))
    return Drawing(curves("c", "C", "score", [series], span, nothing="", **options).svg)


@settings(max_examples=15)
@given(VALUES.filter(lambda values: not all(map(math.isnan, values))))
def test_a_curve_breaks_where_a_value_is_missing_and_nowhere_else(values: list[float]) -> None:
    drawn = line(values)
    runs = "".join("-" if math.isnan(v) else "x" for v in values).replace("-", " ").split()
    assert [len(piece) for piece in drawn.pieces("c-0")] == [len(r) for r in runs if len(r) > 1]
    assert len(drawn.dots("c-0")) == sum(len(r) == 1 for r in runs)
    points = [p for piece in drawn.pieces("c-0") for p in piece] + drawn.dots("c-0")
    for x, y in points:
        assert LEFT - 0.01 <= x <= RIGHT + 0.01
        assert TOP - 0.01 <= y <= BOTTOM + 0.01


def test_a_step_that_is_not_there_is_a_gap_in_training_and_none_between_evaluations() -> None:
    for evaluated, pieces in ((False, 2), (True, 1)):
        drawn = line(np.ones(4), [1, 2, 10, 11], evaluated=evaluated)
        assert len(drawn.pieces("c-0")) == pieces


def test_values_stand_where_the_labels_say() -> None:
    values = [0.1, 0.7, 0.2, 0.6]
    drawn = line(values)
    assert list(drawn.y_labels) == ["0", "0.2", "0.4", "0.6", "0.8"]
    [corners] = drawn.pieces("c-0")
    assert [drawn.value(y) for _, y in corners] == pytest.approx(values, abs=1e-4)
    assert [x for x, _ in corners] == pytest.approx(np.linspace(LEFT, RIGHT, 4), abs=0.01)


@pytest.mark.parametrize(
    "values", [[1.7e308, -1.7e308], [5e-324, 0], [1e300] * 2, [1, 1 + 2**-52], [-3.0, -3.0]]
)
def test_values_at_the_ends_of_floats_are_drawn_inside_the_plot(values: list[float]) -> None:
    [corners] = line(values).pieces("c-0")
    assert len(corners) == 2
    assert all(TOP - 0.01 <= y <= BOTTOM + 0.01 for _, y in corners)


def test_means_are_drawn_over_many_values_and_the_pointer_is_told_the_values() -> None:
    values = np.arange(100) % 2.0
    series = Series("x", range(100), values)
    chart = curves("c", "C", "score", [series], (0, 99), window=5, nothing="")
    assert chart.note == "Strong: means over 5 steps."
    assert chart.series[0].values is values
    drawn = Drawing(chart.svg)
    [each], [means] = drawn.pieces("c-0-each"), drawn.pieces("c-0")
    assert {round(drawn.value(y), 3) for _, y in each} == {0, 1}
    assert {round(drawn.value(y), 3) for _, y in means[2:-2]} == {0.4, 0.6}


def test_a_logarithmic_axis_has_its_bars_and_keeps_rounding_at_its_foot() -> None:
    drawn = line([0.0, 1e-13, 1e-4, 2e-3], log=True, bars=[(1e-3, "warn 0.001")])
    [corners] = drawn.pieces("c-0")
    heights = [BOTTOM - y for _, y in corners]
    assert heights[:2] == [0, 0]
    assert next(iter(drawn.y_labels)) == "≤1e-8"
    # Four decades from 1e-8 to 1e-4, of six up to 1e-2, where the axis ends.
    assert heights[2] == pytest.approx((BOTTOM - TOP) * 4 / 6, abs=0.01)
    assert "warn 0.001" in "".join(drawn.root.itertext())
    assert next(iter(line([1e-4, 2e-3], log=True).y_labels)) == "1e-4"


@pytest.mark.parametrize("from_left", [True, False])
def test_the_name_of_a_bar_stands_where_no_line_passes(from_left: bool) -> None:
    """Values lie around the bar in one half of the run, and far above it in the other."""
    values = np.where(np.arange(200) % 2, 1.2e-3, 2.4e-3)
    half = slice(None, 100) if from_left else slice(100, None)
    values[half] = 0.5
    drawn = line(values, log=True, bars=[(2e-3, "warn 0.002"), (0.02, "stop 0.02")])
    [corners] = drawn.pieces("c-0")
    boxes = []
    for text in drawn.root.iter("text"):
        if (text.text or "").startswith(("warn", "stop")):
            x, y = float(text.attrib["x"]), float(text.attrib["y"])  # of its base line
            boxes.append((x, x + 7 * len(text.text or ""), y - 11, y + 3))
    assert len(boxes) == 2
    for left, right, top, bottom in boxes:
        assert LEFT <= left < right <= RIGHT
        for (x, y), (u, v) in pairwise(corners):
            passes = x <= right and u >= left and min(y, v) <= bottom and max(y, v) >= top
            assert not passes, ((x, y), (u, v), (left, right, top, bottom))


def stack(parts: dict[str, Any], steps: Any, **options: Any) -> Chart:
    series = [
        Series(name, steps, np.array(v), colour=i) for i, (name, v) in enumerate(parts.items())
    ]
    return layers("s", "S", "share", series, (0, steps[-1]), nothing="", **options)


def test_layers_of_a_stack_fill_the_whole_height_and_leave_gaps() -> None:
    drawn = Drawing(stack({"a": [1, NAN, 3], "b": [1, NAN, 1]}, [1, 2, 3], shares=True).svg)
    low, high = drawn.pieces("s-0"), drawn.pieces("s-1")
    assert len(low) == len(high) == 2  # the second step is a gap
    middle = (TOP + BOTTOM) / 2
    assert {y for _, y in high[0]} == {TOP, middle}
    assert {y for _, y in low[0]} == {middle, BOTTOM}
    assert drawn.value(min(y for _, y in low[1])) == pytest.approx(0.75, abs=1e-4)


def test_a_step_that_is_not_there_is_a_gap_in_a_stack() -> None:
    drawn = Drawing(stack({"a": [1, 1, 1, 1]}, [1, 2, 5, 6], shares=False).svg)
    first, second = drawn.pieces("s-0")
    unit = (RIGHT - LEFT) / 6
    assert sorted({x for x, _ in first}) == pytest.approx(
        [LEFT + u * unit for u in (0.5, 1.5, 2.5)], abs=0.01
    )
    assert max(x for x, _ in second) == RIGHT


def test_a_long_stack_is_drawn_as_means() -> None:
    chart = stack({"a": np.ones(1000)}, range(1, 1001), shares=False)
    assert chart.note == "Drawn as means over 5 steps."
    assert len(chart.svg) < 20_000


def test_a_count_that_a_line_lacks_is_zero_and_a_line_without_counts_is_a_gap() -> None:
    lines = [step(1, dropped={"failed": 2}), step(2, dropped={"stale": 9}), step(3)]
    found = Measured(lines, "step").counts("dropped")
    assert list(found) == ["stale", "failed"]
    np.testing.assert_equal(found["failed"], [2, 0, NAN])


@pytest.mark.parametrize(
    "damage",
    [
        {"dropped": {"stale": "many"}, "staleness": {"new": 1}, "seconds": {"train": None}},
        {"dropped": 3, "staleness": [1], "scores": "none", "reward_mean": "high"},
        {"dropped": {"stale": math.inf}, "grad_norm": math.inf, "mismatch_k3": 1e308},
        {"dropped": {"stale": 10**30}, "seconds": {"train": 1e300}, "learning_rate": -1e308},
    ],
)
def test_values_that_a_loop_does_not_write_leave_gaps_and_the_page_is_written(
    damage: dict[str, Any],
) -> None:
    lines = [step(10**12), step(10**12 + 1, **damage), step(10**12 + 7)]
    page = training_page(lines, {})
    assert 'data-chart="reward"' in page
    assert "nan" not in page.partition("<main")[2].partition("</main")[0]


def test_a_share_of_nothing_is_a_gap() -> None:
    lines = [step(1, truncated=1, completions=4), step(2, truncated=0, completions=0), step(3)]
    np.testing.assert_equal(
        Measured(lines, "step").share("truncated", "completions"), [0.25, NAN, NAN]
    )


def test_what_is_not_measured_is_not_drawn_and_the_page_says_so() -> None:
    page = training_page([step(1), step(2)], {"evaluator": "e"})
    assert page.count("Nothing to draw") == 14  # all charts but the reward's
    assert training_page([], {}).count("Nothing to draw") == 15
    assert "Nothing to draw: nothing was dropped." in training_page([step(1, dropped={})], {})


def test_the_evaluators_metrics_are_drawn_where_there_are_any() -> None:
    lines = [step(1, scores={"brief": 0.25, "<b>": 1.0}), step(2, scores={"brief": 0.5})]
    page = training_page([*lines, evaluation(2, scores={"brief": 0.75})], {})
    assert "The evaluator&#39;s metrics, in training" in page
    assert "The evaluator&#39;s metrics, held out" in page
    assert "&lt;b&gt;" in page
    assert "<b>" not in page.partition("<main")[2]
    assert "The evaluator" not in training_page([step(1), evaluation(1)], {})


def test_the_head_says_what_came_of_it() -> None:
    lines = [
        evaluation(0, greedy_score=0.25, sampled_score=0.125, pass_at_k={"1": 0.1, "4": 0.5}),
        step(1, completions=1200),
        evaluation(1, greedy_score=0.75, sampled_score=0.5, pass_at_k={"1": 0.1, "4": 0.875}),
    ]
    page = training_page(lines, {"evaluator": "e", "steps": 2})
    for told in ("0.250 → 0.750", "0.125 → 0.500", "0.500 → 0.875", "1 of 2", "1,200"):
        assert f"<dd>{told}</dd>" in page, told
    assert "has not taken all of its steps" in page
    assert "was stopped: full disk" in training_page(lines, {"steps": 2}, stopped="full disk")


def test_settings_and_reasons_are_text_whatever_they_hold() -> None:
    hostile = "</script><img src=x onerror=alert(1)>\u202e"
    settings = {"evaluator": hostile, "completion_params": {"model": hostile, "stop": [hostile]}}
    line = step(1, dropped={hostile: 3})
    page = training_page([line, evaluation(1, pass_at_k={hostile: 1.0})], settings, stopped=hostile)
    assert "<img" not in page
    assert page.count("</script>") == 2
    assert "\u202e" not in page
    svg = curve_svg([evaluation(0, greedy_score=0.5)], settings)
    assert svg is not None
    assert "<img" not in svg
    ElementTree.fromstring(svg)  # noqa: S314


def test_two_thousand_steps_stay_a_small_page() -> None:
    everything = {
        "mismatch_k3": 1e-4, "sampler_kl_k3": 1e-3, "entropy": 0.5, "grad_norm": 1.0,
        "learning_rate": 1e-5, "clip_fraction": 0.1, "staleness": {"0": 3}, "staleness_max": 1,
        "completions": 8, "truncated": 1, "groups": 4, "all_correct": 1, "none_correct": 1,
        "dropped": {"zero_variance": 8}, "completion_tokens_mean": 12.0,
        "seconds": {"sampling": 1.0, "batch": 0.1, "train": 2.0, "publish": 0.1},
    }  # fmt: skip
    lines = [step(number, **everything) for number in range(1, 2001)]
    assert len(training_page(lines, {})) < 1_500_000


def test_the_picture_names_the_evaluator_and_the_last_scores() -> None:
    lines = [evaluation(0, greedy_score=0.5), evaluation(9, greedy_score=0.625)]
    svg = curve_svg(lines, {"evaluator": "test_sums"})
    assert svg is not None
    told = "".join(ElementTree.fromstring(svg).itertext())  # noqa: S314
    assert "test_sums" in told
    assert "greedy0.625" in told
    assert "sampled" not in told
    assert "prefers-color-scheme:dark" in svg
    assert curve_svg(lines, {"evaluator": "test_sums"}) == svg  # no dates, no chance
    assert curve_svg([step(1)], {}) is None


@settings(max_examples=15)
@given(st.lists(st.floats(0, 1), min_size=2, max_size=2))
@example([0.0, 5e-324])
@example([0.0, 1.0])
@example([1.0, 1.0])
def test_names_in_the_picture_never_cover_each_other(last: list[float]) -> None:
    svg = curve_svg([evaluation(3, sampled_score=last[0], greedy_score=last[1])], {})
    assert svg is not None
    # A name and a value each.
    heights = [float(y) for y in re.findall(r"translate\([\d.]+ ([\d.]+)\)", svg)]
    assert len(heights) == 4
    assert abs(heights[0] - heights[2]) >= 39
    assert max(heights) < 330
    assert min(heights) > 50  # below the title
    assert (heights[0] > heights[2]) == (last[0] <= last[1])


async def test_a_run_writes_its_page_when_it_ends_and_when_it_is_stopped(tmp_path: Path) -> None:
    class StopHereError(RuntimeError):
        pass

    def stop(line: dict[str, Any]) -> None:
        if line["step"] == 2:
            raise StopHereError("secret")

    folder = tmp_path / "run"
    with pytest.raises(StopHereError):
        await run(folder, options(), on_line=stop)
    page = (folder / "report.html").read_text()
    assert "was stopped: StopHereError" in page
    assert "secret" not in page
    assert "<dd>2 of 4</dd>" in page
    result = await run(folder, options())
    page = (folder / "report.html").read_text()
    assert "was stopped" not in page
    assert "<dd>4 of 4</dd>" in page
    assert "test_arithmetic" in (folder / "curve.svg").read_text()
    # The command writes the same page from the folder.
    done = CliRunner().invoke(app, ["report", str(result.folder), "-o", str(tmp_path / "p.html")])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "p.html").read_text() == page
    assert not (tmp_path / "curve.svg").exists()


def test_a_last_line_cut_off_by_a_crash_is_left_out_and_damage_is_named(tmp_path: Path) -> None:
    (tmp_path / "settings.json").write_text("{}")
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text(json.dumps(step(1)) + '\n{"kind": "st')
    assert read_run(tmp_path) == ([step(1)], {})
    metrics.write_text(json.dumps(step(1)) + "\n{]\n")
    with pytest.raises(ReportError, match=r"metrics.jsonl, line 2: no JSON"):
        write_training_report(tmp_path)
    metrics.write_text('{"reward": 1}\n')
    with pytest.raises(ReportError, match="line 1: no line of a training run"):
        write_training_report(tmp_path)
    with pytest.raises(ReportError, match="holds no training run"):
        write_training_report(tmp_path / "nowhere")


def test_options_for_rollout_files_are_refused_for_a_run(tmp_path: Path) -> None:
    (tmp_path / "settings.json").write_text("{}")
    done = CliRunner().invoke(app, ["report", str(tmp_path), "--limit", "3"])
    assert done.exit_code == 1
    assert "--limit is for rollout files" in done.output
