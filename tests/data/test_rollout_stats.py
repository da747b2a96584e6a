"""The numbers of a rollout file, against sums over plain lists."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from eval_protocol_rft._statistics import BARS, MetricMeans, distribution, mean_pass_at_k
from eval_protocol_rft.data._files import write_rows
from eval_protocol_rft.data._format import FormatError
from eval_protocol_rft.data._stats import (
    MOST_REASONS,
    OTHER_REASONS,
    RolloutStats,
    rollout_stats,
    summarize_tables,
)
from eval_protocol_rft.report._terminal import stats_table
from tests.data.rollout_files import write_rollouts
from tests.data.servers import ep_rft, succeed
from tests.scored_files import (
    FAILED,
    SCHEMA,
    Sampled,
    cut,
    groups_of_completions,
    rows_of,
    table_of,
    write,
)


def summed(
    groups: list[list[Sampled]], cuts: list[int] | None = None, threshold: float = 1.0
) -> RolloutStats:
    return _summed(cut(table_of(groups), cuts or []), threshold)


def _summed(tables: Iterable[pa.Table], threshold: float = 1.0) -> RolloutStats:
    return summarize_tables(
        tables,
        path="f",
        finished=True,
        model="m",
        reward="reward",
        pass_threshold=threshold,
    )


def shown(stats: RolloutStats, *, width: int = 120, **options: int) -> str:
    console = Console(record=True, width=width, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(stats_table(stats, **options))
    return console.export_text()


@settings(deadline=None)
@given(groups_of_completions(), st.lists(st.integers(0, 30)), st.sampled_from([0.2, 1.0]))
def test_sums_are_those_of_plain_lists_wherever_row_groups_end(groups, cuts, threshold):
    stats = summed(groups, cuts, threshold)
    everything = [one for group in groups for one in group]
    sampled = [one for one in everything if not one.failed]
    rewards = [one.reward for one in sampled if one.reward is not None]
    lengths = [len(one.tokens) for one in sampled]

    assert stats.completions == len(everything) == stats.failed + stats.scored + stats.unscored
    assert stats.failed == len(everything) - len(sampled)
    assert stats.scored == len(rewards)
    assert stats.tokens == sum(lengths)
    assert stats.truncated == sum(one.truncated for one in sampled)
    assert stats.truncation_rate == (stats.truncated / len(sampled) if sampled else None)
    for found, values in ((stats.rewards, rewards), (stats.lengths, lengths)):
        assert (found is None) == (not values)
        if found is not None:
            assert found.mean == pytest.approx(statistics.fmean(values))
            assert found.std == pytest.approx(statistics.pstdev(values))
            assert (found.min, found.max, found.count) == (min(values), max(values), len(values))
            assert sum(bar.count for bar in found.histogram) == len(values)
    whys = [one.why for one in sampled if one.reward is None]
    reasons = Counter(why and why.splitlines()[0] for why in whys)
    assert {reason.text: reason.count for reason in stats.unscored_reasons} == reasons
    assert sum(stats.failures.values()) == stats.failed


@settings(deadline=None)
@given(groups_of_completions(), st.lists(st.integers(0, 30)))
def test_pass_at_k_is_the_share_of_all_draws_that_hold_a_pass(groups, cuts):
    scored = [[o.reward >= 1 for o in group if o.reward is not None] for group in groups]
    found = summed(groups, cuts).pass_at_k
    assert [estimate.k for estimate in found] == list(range(1, max(map(len, scored)) + 1))
    for estimate in found:
        shares = [
            statistics.fmean(any(draw) for draw in combinations(group, estimate.k))
            for group in scored
            if len(group) >= estimate.k
        ]
        assert estimate.groups == len(shares)
        assert estimate.value == pytest.approx(statistics.fmean(shares))


@settings(deadline=None)
@given(groups_of_completions(), st.lists(st.integers(0, 30)))
def test_every_prompt_is_listed_hardest_first_with_its_own_numbers(groups, cuts):
    lines = summed(groups, cuts).per_group
    assert sorted(line.data_idx for line in lines) == list(range(len(groups)))
    for line in lines:
        group = groups[line.data_idx]
        rewards = [one.reward for one in group if one.reward is not None]
        lengths = [len(one.tokens) for one in group if not one.failed]
        assert (line.row_id, line.prompt_start) == (
            f"row-{line.data_idx}",
            f"question {line.data_idx}",
        )
        assert (line.completions, line.scored) == (len(group), len(rewards))
        assert line.passed == sum(reward >= 1 for reward in rewards)
        assert line.failed == sum(one.failed for one in group)
        assert line.truncated == sum(one.truncated for one in group)
        assert line.mean_tokens == (pytest.approx(statistics.fmean(lengths)) if lengths else None)
        assert line.mean_reward == (pytest.approx(statistics.fmean(rewards)) if rewards else None)
    keys = [
        (math.inf, math.inf, line.data_idx)
        if line.pass_rate is None
        else (line.pass_rate, line.mean_reward, line.data_idx)
        for line in lines
    ]
    assert keys == sorted(keys)


@settings(deadline=None)
@given(groups_of_completions())
def test_prompts_are_all_passed_mixed_none_passed_or_unscored(groups):
    stats = summed(groups)
    kinds = Counter(
        "unscored"
        if not rewards
        else "all"
        if min(rewards) >= 1
        else "none"
        if max(rewards) < 1
        else "mixed"
        for rewards in ([o.reward for o in group if o.reward is not None] for group in groups)
    )
    assert kinds == +Counter(
        all=stats.groups_all_passed,
        none=stats.groups_none_passed,
        mixed=stats.groups_mixed,
        unscored=stats.groups_unscored,
    )


def test_pass_at_k_of_larger_groups_counts_those_that_have_as_many():
    found = mean_pass_at_k(np.array([2, 4]), np.array([1, 1]))
    # 1 - C(n-1, k) / C(n, k) is k / n where one of n passes.
    assert [(e.k, e.value, e.groups) for e in found] == [
        (1, pytest.approx((1 / 2 + 1 / 4) / 2), 2),
        (2, pytest.approx((1 + 2 / 4) / 2), 2),
        (3, pytest.approx(3 / 4), 1),
        (4, pytest.approx(1), 1),
    ]


@settings(deadline=None)
@given(st.lists(st.integers(-50, 50), min_size=1, max_size=60), st.integers(0, 100))
def test_a_quantile_is_the_least_value_with_that_share_at_or_below(values, percent):
    points, counts = np.unique(values, return_counts=True)
    found = distribution(points, counts, percents=[percent])
    shares = [
        value
        for value in sorted(values)
        if 100 * sum(other <= value for other in values) >= percent * len(values)
    ]
    assert found.quantiles == {f"p{percent}": shares[0]}


@settings(deadline=None)
@given(st.lists(st.integers(0, 400), min_size=1, max_size=200))
def test_bars_hold_every_number_once(values):
    points, counts = np.unique(values, return_counts=True)
    bars = distribution(points, counts, percents=[]).histogram
    for i, bar in enumerate(bars):
        last = i == len(bars) - 1
        inside = [v for v in values if bar.low <= v < bar.high or (v == bar.high and last)]
        if bar.low == bar.high:
            inside = [v for v in values if v == bar.low]
        assert bar.count == len(inside)
    assert len(bars) == min(len(points), BARS)


def test_different_reasons_beyond_a_bound_are_counted_together():
    groups = [[Sampled(why=f"at {i}")] for i in range(MOST_REASONS + 5)]
    first, *_ = summed(groups).unscored_reasons
    assert (first.text, first.count) == (OTHER_REASONS, 5)


@pytest.mark.parametrize("name", ["rollouts.parquet", "rollouts.jsonl"])
def test_a_file_is_read_by_any_of_its_rewards(tmp_path: Path, name: str):
    groups = [[Sampled(1.0, style=0.5), Sampled(0.0)], [FAILED, Sampled(0.0, style=0.25)]]
    file = write(tmp_path / name, groups)
    assert rollout_stats(file).rewards.mean == pytest.approx(1 / 3)
    style = rollout_stats(file, reward="style", pass_threshold=0.5)
    assert (style.scored, style.unscored, style.failed) == (2, 1, 1)
    assert style.rewards.mean == pytest.approx(0.375)
    assert [line.passed for line in style.per_group] == [0, 1]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"reward": "taste"}, "no reward 'taste'.*'style'"),
        ({"pass_threshold": math.nan}, "pass_threshold must be finite"),
    ],
)
def test_what_cannot_be_asked_is_refused(tmp_path: Path, options, words: str):
    file = write(tmp_path / "f.parquet", [[Sampled(1.0)]])
    with pytest.raises(ValueError, match=words):
        rollout_stats(file, **options)


def test_a_reward_that_is_no_number_is_named_by_its_place():
    with pytest.raises(FormatError, match=r"data row 1, completion 1: reward nan is no finite"):
        summed([[Sampled(1.0)], [Sampled(0.5), Sampled(math.nan)]])


def test_a_failed_completion_with_a_reward_is_refused():
    table = table_of([[Sampled(1.0), FAILED]])
    place = table.schema.get_field_index("reward")
    table = table.set_column(place, "reward", pa.array([1.0, 0.0]))
    with pytest.raises(FormatError, match=r"data row 0, completion 1: .* completion which failed"):
        _summed([table])


def test_completions_of_a_data_row_that_are_scattered_are_refused(tmp_path: Path):
    rows = rows_of([[Sampled(1.0), Sampled(0.0)], [Sampled(1.0)]])
    write_rows(tmp_path / "f.parquet", SCHEMA, [rows[0], rows[2], rows[1]])
    with pytest.raises(FormatError, match=r"f\.parquet: .* data row 0 do not stand together"):
        rollout_stats(tmp_path / "f.parquet")


def test_the_table_says_what_is_missing_and_lists_the_hardest():
    groups = [
        [Sampled(1.0), Sampled(1.0)],
        [Sampled(0.0), Sampled(why="crash"), FAILED],
        [Sampled(0.0), Sampled(1.0, truncated=True)],
    ]
    text = shown(summed(groups), limit_groups=2)
    assert "3 prompts, 7 completions, 6 tokens" in text
    assert "1 all passed, 1 mixed, 1 none passed, 0 unscored" in text
    assert "1 truncated (16.7%), 1 unscored, 1 failed" in text
    assert "@1 0.500  @2 1.000 (2 prompts)" in text
    assert "1  timeout" in text
    assert "1  crash" in text
    assert text.index("row-1") < text.index("row-2")
    assert "row-0" not in text
    assert "... and 1 easier ones" in text


def test_the_bars_of_a_histogram_are_as_long_as_their_counts():
    text = shown(summed([[Sampled(0.0)] * 4 + [Sampled(1.0)] * 2]), limit_groups=0)
    lines = [line for line in text.splitlines() if "█" in line]
    assert [line.count("█") for line in lines[:2]] == [32, 16]


def test_a_narrow_terminal_shows_bars_in_proportion_and_all_of_the_rest_in_lines():
    groups = [
        [Sampled(0.0), Sampled(0.0, truncated=True), Sampled(1.0), Sampled(why="why " * 12)],
        [Sampled(0.0), Sampled(0.0), Sampled(1.0), FAILED],
    ]
    text = shown(summed(groups), width=40)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 40
    none, one = [line.count("█") for line in text.splitlines() if "█" in line][:2]
    assert 20 < none < 40
    assert none - 2 * one in (-1, 0, 1)
    for part in (
        "mean 0.3333",
        "p95 1",
        "@1 0.333",
        "truncated  1",
        "1 truncated (14.3%)",
        "row-1",
    ):
        assert part in " ".join(text.split("\n"))
    # What is counted stands below each other.
    lines = text.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("       1  why why"))
    assert lines[first + 1].startswith(" " * 10 + "why")


def test_nothing_from_the_file_can_draw_on_the_terminal():
    groups = [[Sampled(why="[red]why[/red]\x1b[2J")]]
    stats = replace(summed(groups), model="[b]\x1b]0;m")
    text = shown(
        replace(
            stats,
            per_group=[
                replace(stats.per_group[0], row_id="[i]\x9b1m", prompt_start="\x07[u]p\u202e")
            ],
        )
    )
    for plain in ("[red]why[/red]\\x1b[2J", "[b]\\x1b]0;m", "[i]\\x9b1m", "\\x07[u]p\\u202e"):
        assert plain in text
    assert not {"\x1b", "\x9b", "\x07", "\u202e"} & set(text)


def test_an_unscored_file_has_lengths_and_no_rewards(tmp_path: Path):
    stats = rollout_stats(write(tmp_path / "f.parquet", [[Sampled(), FAILED]]))
    assert (stats.rewards, stats.pass_at_k, stats.per_group[0].pass_rate) == (None, [], None)
    assert stats.lengths.count == 1
    assert "never scored" in shown(stats)


def test_the_command_prints_a_table_or_all_of_it_as_json(tmp_path: Path):
    file = write(tmp_path / "f.parquet", [[Sampled(1.0), Sampled(0.0)]] * 3)
    table = ep_rft("stats", str(file), "--limit-groups", "1")
    assert table.exit_code == 0
    assert "... and 2 easier ones" in table.stdout
    printed = ep_rft("stats", str(file), "--json", "--pass-threshold", "2")
    values = json.loads(printed.stdout)
    assert values["groups_none_passed"] == len(values["per_group"]) == 3
    assert values["pass_at_k"][1] == {"k": 2, "value": 0.0, "groups": 3}


def test_the_command_ends_with_one_line_where_there_is_no_such_file(tmp_path: Path):
    result = ep_rft("stats", str(tmp_path / "none.parquet"))
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("ep-rft: ")
    assert result.stderr.count("\n") == 1


def test_a_metric_is_averaged_over_the_completions_for_which_it_is_valid():
    means = MetricMeans()
    for metrics in (
        {"format": {"score": 1.0, "is_score_valid": True}, "length": 4, "note": "text"},
        {"format": {"score": 0.0, "is_score_valid": True}, "length": 8, "right": True},
        {"format": {"score": 7.0, "is_score_valid": False}, "length": math.inf},
        None,
    ):
        means.add(metrics)
    for text in ('{"length": 3}', None, "null"):
        means.add_json(text)
    assert means.means == {"format": 0.5, "length": 5.0}


def test_the_evaluators_own_metrics_are_averaged_wherever_scores_are(tmp_path: Path):
    path = write_rollouts(tmp_path / "r.parquet", [["0", "aa"], ["b", None]])
    grader = f"{Path(__file__).with_name('score_graders.py')}::right"
    succeed("score", path, "-e", grader, "--quiet")
    assert rollout_stats(path).metrics == {"size": 0.5}
    assert "size 0.5" in succeed("stats", path).stdout
    assert "size 0.500" in succeed("show", path).stdout
    succeed("report", path, "-o", tmp_path / "r.html")
    assert re.search(r"mean size\b.*?0\.500", (tmp_path / "r.html").read_text(), re.DOTALL)
