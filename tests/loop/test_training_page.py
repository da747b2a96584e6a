"""A run's page: what was measured is drawn where it belongs, and what was not is a gap."""

from __future__ import annotations

import json
import math
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from typer.testing import CliRunner

from eval_protocol_rft.cli import app
from eval_protocol_rft.report._charts import FRAME
from eval_protocol_rft.report._page_stats import ReportError
from eval_protocol_rft.report._training_charts import (
    Series,
    Span,
    curve,
    line_chart,
    linear_scale,
    log_scale,
    stacked_chart,
)
from eval_protocol_rft.report._training_curve import curve_svg
from eval_protocol_rft.report._training_page import read_run, training_page, write_training_report
from eval_protocol_rft.report._training_series import Measured, binned, smoothed
from tests.loop.runs import options, run

NAN = math.nan
VALUES = st.lists(st.floats(-1e6, 1e6) | st.just(NAN), min_size=1, max_size=60)


def evaluation(step: int, **values: Any) -> dict[str, Any]:
    return {"kind": "eval", "step": step, "rows": 8, **values}


def step(number: int, **values: Any) -> dict[str, Any]:
    return {"kind": "step", "step": number, "reward_mean": 0.25, **values}


def points(path: str) -> list[list[tuple[float, float]]]:
    """Corners of each unbroken piece of an SVG path."""
    return [
        [(float(x), float(y)) for x, y in re.findall(r"([-\d.]+),([-\d.]+)", piece)]
        for piece in path.split("M")[1:]
    ]


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


@given(VALUES)
def test_a_curve_breaks_where_a_value_is_missing_and_nowhere_else(values: list[float]) -> None:
    array = np.array(values)
    span = Span.over([1, len(values)])
    drawn = curve(Series("x", range(1, len(values) + 1), array), span, linear_scale(array))
    runs = "".join("-" if math.isnan(v) else "x" for v in values).replace("-", " ").split()
    assert [len(piece) for piece in points(drawn.path)] == [len(r) for r in runs if len(r) > 1]
    assert len(drawn.dots) == sum(len(r) == 1 for r in runs)
    for x, y in [*drawn.dots, *(p for piece in points(drawn.path) for p in piece)]:
        assert FRAME.left - 0.01 <= x <= FRAME.right + 0.01
        assert FRAME.top - 0.1 <= y <= FRAME.bottom + 0.1


def test_a_step_that_is_not_there_is_a_gap_in_training_and_none_between_evaluations() -> None:
    for evaluated, pieces in ((False, 2), (True, 1)):
        series = Series("x", [1, 2, 10, 11], np.ones(4), evaluated=evaluated)
        drawn = curve(series, Span(1, 11), linear_scale(np.ones(4)))
        assert len(points(drawn.path)) == pieces


def test_heights_are_in_proportion_to_values() -> None:
    scale = linear_scale(np.array([0.1, 0.7]))
    foot = scale.y(0)
    assert foot == FRAME.bottom
    assert (foot - scale.y(0.6)) == pytest.approx(3 * (foot - scale.y(0.2)))
    assert [label for _, label in scale.ticks] == ["0", "0.2", "0.4", "0.6", "0.8"]


def test_a_logarithmic_axis_has_its_bars_and_keeps_rounding_at_its_foot() -> None:
    scale = log_scale(np.array([0.0, 1e-13, 1e-4, 2e-3]))
    assert scale.y(0.0) == scale.y(1e-13) == FRAME.bottom
    assert scale.ticks[0][1] == "≤1e-8"
    assert scale.y(1e-5) - scale.y(1e-4) == pytest.approx(scale.y(1e-4) - scale.y(1e-3))
    above = log_scale(np.array([1e-4, 2e-3]))
    assert above.ticks[0][1] == "1e-4"


def test_layers_of_a_stack_fill_the_whole_height_and_leave_gaps() -> None:
    parts = {"a": np.array([1.0, NAN, 3.0]), "b": np.array([1.0, NAN, 1.0])}
    chart = stacked_chart(parts, [1, 2, 3], Span(0, 3), shares=True)
    low, high = (points(area.path) for area in chart.areas)
    assert len(low) == len(high) == 2  # the second step is a gap
    middle = (FRAME.top + FRAME.bottom) / 2
    assert {y for _, y in high[0]} == {FRAME.top, middle}
    assert {y for _, y in low[0]} == {middle, FRAME.bottom}
    assert min(y for _, y in low[1]) == pytest.approx(FRAME.y(0.75), abs=0.1)


def test_a_long_stack_is_drawn_as_means() -> None:
    chart = stacked_chart({"a": np.ones(1000)}, range(1, 1001), Span(0, 1000), shares=False)
    assert chart.columns_of == 5
    assert len(chart.areas[0].path) < 20_000


def test_a_count_that_a_line_lacks_is_zero_and_a_line_without_counts_is_a_gap() -> None:
    lines = [step(1, dropped={"failed": 2}), step(2, dropped={"stale": 9}), step(3)]
    found = Measured.of(lines, "step").counts("dropped")
    assert list(found) == ["stale", "failed"]
    np.testing.assert_equal(found["failed"], [2, 0, NAN])


def test_a_share_of_nothing_is_a_gap() -> None:
    lines = [step(1, truncated=1, completions=4), step(2, truncated=0, completions=0), step(3)]
    np.testing.assert_equal(
        Measured.of(lines, "step").share("truncated", "completions"), [0.25, NAN, NAN]
    )


def test_what_is_not_measured_is_not_drawn_and_the_page_says_so() -> None:
    page = training_page([step(1), step(2)], {"evaluator": "e"})
    assert page.count("Nothing to draw") == 14  # all charts but the reward's
    assert training_page([], {}).count("Nothing to draw") == 15
    assert "Nothing to draw: nothing was dropped." in training_page([step(1, dropped={})], {})
    assert line_chart([Series("x", [1], np.array([NAN]))], Span(0, 1)).curves == []


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
    assert curve_svg([step(1)], {}) is None


@given(st.lists(st.floats(0, 1), min_size=2, max_size=2))
@example([0.0, 5e-324])
def test_names_in_the_picture_never_cover_each_other(last: list[float]) -> None:
    svg = curve_svg([evaluation(3, sampled_score=last[0], greedy_score=last[1])], {})
    assert svg is not None
    heights = [float(y) for y in re.findall(r'class="end" x="[\d.]+" y="([\d.]+)"', svg)]
    assert abs(heights[0] - heights[1]) >= 39
    assert max(heights) + 18 < 330
    assert min(heights) > 40


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
