"""What a filter keeps of a rollout file, against the rules in plain Python."""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eval_protocol_rft._statistics import percentile
from eval_protocol_rft.data._dataset import RolloutDataset
from eval_protocol_rft.data._files import JobError
from eval_protocol_rft.data._filter import Band, FilterRules, decide, filter_rollouts, parse_band
from eval_protocol_rft.data._format import FileMetadata, FormatError, schema
from tests.data.servers import ep_rft
from tests.scored_files import (
    FAILED,
    Sampled,
    cut,
    groups_of_completions,
    rows_of,
    table_of,
    write,
)

Place = tuple[int, int]
"""Data row and completion."""


def run(
    groups: list[list[Sampled]],
    rules: FilterRules,
    cuts: list[int] | None = None,
    prompts: list[str] | None = None,
) -> tuple[set[Place], dict[str, int]]:
    """What is kept and what is dropped, over tables that end anywhere."""
    table = table_of(groups, prompts=prompts)
    column = "reward" if rules.reward is None else f"reward_{rules.reward}"
    codes, summary = decide(cut(table, cuts or []), rules, column, where="f")
    left = table.filter(pa.array(codes == 0))
    places = zip(left["data_idx"].to_pylist(), left["sample_idx"].to_pylist(), strict=True)
    return set(places), summary.dropped


def kept(groups: list[list[Sampled]], **rules: Any) -> set[Place]:
    return run(groups, FilterRules(**rules))[0]


def rewarded(*groups: list[float | None]) -> list[list[Sampled]]:
    return [[Sampled(reward) for reward in group] for group in groups]


def scores(group: list[Sampled]) -> list[float]:
    return [one.reward for one in group if one.reward is not None]


def in_band(value: float, band: Band) -> bool:
    return band.low <= value <= band.high


@st.composite
def bands(draw: Any, most: float) -> Band:
    low, high = sorted(draw(st.tuples(*[st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.75, 1.0])] * 2)))
    open_end = draw(st.sampled_from(["none", "low", "high"]))
    return Band(
        -math.inf if open_end == "low" else low * most,
        math.inf if open_end == "high" else high * most,
    )


@settings(deadline=None)
@given(groups_of_completions(), st.lists(st.integers(0, 30)), bands(1.0))
def test_a_pass_rate_band_keeps_prompts_by_their_scored_completions(groups, cuts, band):
    expected = {
        (i, k)
        for i, group in enumerate(groups)
        if scores(group) and in_band(sum(r >= 1 for r in scores(group)) / len(scores(group)), band)
        for k in range(len(group))
    }
    assert run(groups, FilterRules(pass_rate=band), cuts)[0] == expected


@settings(deadline=None)
@given(
    st.lists(st.lists(st.sampled_from([None, 0.0, 1.0, 2.0]), min_size=1, max_size=3), max_size=12),
    st.lists(st.integers(0, 30)),
    bands(100.0),
)
def test_a_percentile_band_keeps_prompts_by_their_mean_reward(rewards, cuts, band):
    means = {
        i: statistics.fmean(r for r in group if r is not None)
        for i, group in enumerate(rewards)
        if any(r is not None for r in group)
    }
    if not rewards:
        return
    expected = set()
    if means:
        # Of one mean, all percentiles are that mean.
        twice = sorted(means.values()) if len(means) > 1 else list(means.values()) * 2
        inside = statistics.quantiles(twice, n=100, method="inclusive")
        ends = [min(twice), *inside, max(twice)]
        low = -math.inf if math.isinf(band.low) else ends[int(band.low)]
        high = math.inf if math.isinf(band.high) else ends[int(band.high)]
        close = 1e-12
        expected = {i for i, mean in means.items() if low - close <= mean <= high + close}
    found, _ = run(rewarded(*rewards), FilterRules(reward_percentile=band), cuts)
    assert {i for i, _ in found} == expected


@settings(deadline=None)
@given(st.lists(st.integers(-5, 5), min_size=1, max_size=30), st.integers(0, 100))
def test_a_percentile_is_numpys(values, q):
    ordered = np.sort(np.array(values, np.float64))
    assert percentile(ordered, q) == pytest.approx(np.percentile(ordered, q))


def test_a_percentile_that_falls_on_a_value_is_that_value():
    # 0.07 * 100 is 7.000000000000001 in floating point.
    ordered = np.arange(101) / 3
    assert [percentile(ordered, q) for q in range(101)] == ordered.tolist()


def test_equal_means_stay_together_whatever_the_order_of_rewards():
    groups = rewarded([0.1, 0.2, 0.3], [0.3, 0.2, 0.1], [0.3, 0.1, 0.2], [5.0])
    found = kept(groups, reward_percentile=Band(0, 50))
    assert {i for i, _ in found} == {0, 1, 2}


def test_means_of_equal_rewards_are_equal_whatever_their_number():
    # The sum of three 0.1 divided by 3 is not 0.1 in floating point.
    groups = rewarded([0.1], [0.1, 0.1, 0.1], [0.0], [1.0], [1.0])
    assert {i for i, _ in kept(groups, reward_percentile=Band(25, 25))} == {0, 1}


def rules_of_all_kinds() -> st.SearchStrategy[FilterRules]:
    small = st.none() | st.integers(1, 2)
    return st.builds(
        FilterRules,
        pass_rate=st.none() | bands(1.0),
        drop_zero_variance=st.booleans(),
        drop_failed=st.booleans(),
        drop_unscored=st.booleans(),
        drop_truncated=st.booleans(),
        dedupe_prompts=st.booleans(),
        dedupe_completions=st.booleans(),
        min_tokens=small,
        max_tokens=st.none() | st.integers(2, 3),
        reward_min=st.sampled_from([None, 0.1]),
        reward_max=st.sampled_from([None, 1.0]),
        min_completions=small,
    )


def reason_by_the_rules(
    groups: list[list[Sampled]], prompts: list[str], rules: FilterRules
) -> dict[Place, str | None]:
    """The documented order, one completion after the other."""
    reasons: dict[Place, str | None] = {}
    for i, group in enumerate(groups):
        got = scores(group)
        rate = sum(r >= rules.pass_threshold for r in got) / len(got) if got else math.nan
        whole = None
        if rules.dedupe_prompts and prompts[i] in prompts[:i]:
            whole = "duplicate_prompt"
        elif (rules.pass_rate or rules.drop_zero_variance) and not got:
            whole = "group_unscored"
        elif rules.pass_rate and not in_band(rate, rules.pass_rate):
            whole = "pass_rate"
        elif rules.drop_zero_variance and len(set(got)) == 1:
            whole = "zero_variance"
        seen: set[tuple[int, ...]] = set()
        for k, one in enumerate(group):
            reason = whole or own_reason(one, rules)
            if not reason and rules.dedupe_completions and not one.failed:
                reason = "duplicate_completion" if one.tokens in seen else None
                seen.add(one.tokens)
            reasons[i, k] = reason
        left = [k for k, one in enumerate(group) if not reasons[i, k] and not one.failed]
        for k in range(len(group)):
            if not reasons[i, k] and len(left) < (rules.min_completions or 0):
                reasons[i, k] = "small_group"
    return reasons


def own_reason(one: Sampled, rules: FilterRules) -> str | None:
    by_reward = rules.drop_unscored or rules.reward_min is not None or rules.reward_max is not None
    by_length = rules.min_tokens is not None or rules.max_tokens is not None
    if one.failed:
        return "failed" if rules.drop_failed or by_length or by_reward else None
    if by_reward and one.reward is None:
        return "unscored"
    if rules.drop_truncated and one.truncated:
        return "truncated"
    if rules.min_tokens is not None and len(one.tokens) < rules.min_tokens:
        return "too_short"
    if rules.max_tokens is not None and len(one.tokens) > rules.max_tokens:
        return "too_long"
    if rules.reward_min is not None and one.reward < rules.reward_min:
        return "reward"
    if rules.reward_max is not None and one.reward > rules.reward_max:
        return "reward"
    return None


@settings(max_examples=200, deadline=None)
@given(groups_of_completions(), st.data(), rules_of_all_kinds(), st.lists(st.integers(0, 30)))
def test_every_completion_is_kept_or_counted_once_under_its_first_reason(groups, data, rules, cuts):
    size = len(groups)
    prompts = data.draw(st.lists(st.sampled_from("abc"), min_size=size, max_size=size))
    expected = reason_by_the_rules(groups, prompts, rules)
    found, dropped = run(groups, rules, cuts, prompts)
    assert found == {place for place, reason in expected.items() if reason is None}
    assert dropped == Counter(reason for reason in expected.values() if reason)
    assert len(found) + sum(dropped.values()) == sum(map(len, groups))


def test_rules_on_prompts_see_completions_that_are_dropped_afterwards():
    # Half of them pass; of those that are not truncated, none.
    groups = [[Sampled(1.0, truncated=True), Sampled(0.0)]]
    assert kept(groups, pass_rate=Band(0.5, 0.5), drop_truncated=True) == {(0, 1)}


def test_percentiles_do_not_count_duplicates_of_a_prompt():
    groups = rewarded([0.0], [1.0], [2.0], [2.0], [2.0])
    rules = FilterRules(dedupe_prompts=True, reward_percentile=Band(0, 50))
    assert run(groups, rules, prompts=["a", "b", "c", "c", "c"])[0] == {(0, 0), (1, 0)}


def test_a_completion_that_is_dropped_anyway_makes_no_other_a_duplicate():
    groups = [[Sampled(0.0, (1, 2)), Sampled(1.0, (1, 2)), Sampled(1.0, (1, 2))]]
    assert kept(groups, reward_min=0.5, dedupe_completions=True) == {(0, 1)}


def test_a_failure_is_no_completion_that_is_left():
    groups = [[FAILED, FAILED, Sampled(1.0)], [FAILED, Sampled(1.0), Sampled(1.0)]]
    assert kept(groups, min_completions=2) == {(1, 0), (1, 1), (1, 2)}


def test_a_further_reward_decides_where_it_is_named():
    groups = [[Sampled(1.0, style=0.0), Sampled(0.0, style=1.0)]]
    assert kept(groups, reward="style", reward_min=0.5) == {(0, 1)}


@pytest.mark.parametrize("text", ["0.5", ":", "a:b", "nan:1", "1:0", "0:1.5", "-1:"])
def test_what_is_no_band_is_refused(text: str):
    with pytest.raises(JobError):
        FilterRules(pass_rate=parse_band(text))


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens 5 is above max_tokens 4"),
        ({"reward_min": math.nan}, "reward_min must be finite"),
        ({"min_completions": 0}, "min_completions must be at least 1"),
    ],
)
def test_rules_that_contradict_themselves_are_refused(rules, words: str):
    with pytest.raises(JobError, match=words):
        FilterRules(**rules)


SMALL = [
    [Sampled(1.0, (1, 2)), Sampled(0.0, (1, 2)), FAILED],
    [Sampled(0.0, (3,)), Sampled(0.0, (4,), truncated=True), Sampled(why="crash")],
]


@pytest.mark.parametrize("source", ["in.parquet", "in.jsonl"])
@pytest.mark.parametrize("output", ["out.parquet", "out.jsonl"])
def test_what_is_kept_is_as_it_was_in_either_format(tmp_path: Path, source: str, output: str):
    file = write(tmp_path / source, SMALL)
    rules = FilterRules(drop_truncated=True, drop_failed=True)
    summary = filter_rollouts(file, tmp_path / output, rules)
    assert (summary.completions, summary.kept, summary.groups_kept) == (6, 4, 2)
    assert summary.dropped == {"failed": 1, "truncated": 1}
    before, after = RolloutDataset(file), RolloutDataset(tmp_path / output)
    assert after.schema.equals(before.schema)
    assert after.metadata == before.metadata
    places = [(0, 0), (0, 1), (1, 0), (1, 2)]
    whole = pa.concat_tables(before.tables())
    rows = [i for i, row in enumerate(rows_of(SMALL)) if (row.data_idx, row.sample_idx) in places]
    assert pa.concat_tables(after.tables()).equals(whole.take(rows))


def test_surviving_prompts_are_the_data_sets_own_rows(tmp_path: Path):
    file = write(tmp_path / "in.parquet", [*SMALL, [Sampled(1.0)]])
    rules = FilterRules(pass_rate=Band(0.5, 1))
    summary = filter_rollouts(file, tmp_path / "prompts.jsonl", rules, prompts=True)
    assert (summary.kept, summary.groups_kept) == (4, 2)
    lines = (tmp_path / "prompts.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"level": 0, "tags": {"all": ["a", 0]}},
        {"level": 2, "tags": {"all": ["a", 2]}},
    ]
    filter_rollouts(file, tmp_path / "prompts.parquet", rules, prompts=True)
    table = pq.read_table(tmp_path / "prompts.parquet")
    assert table.schema.equals(pa.schema({"level": pa.int64(), "tags": pa.string()}))
    assert table["level"].to_pylist() == [0, 2]
    assert json.loads(table["tags"][1].as_py()) == {"all": ["a", 2]}
    assert not list(tmp_path.glob("*.metadata.json"))


def test_prompts_can_be_read_as_a_data_set_again(tmp_path: Path):
    from eval_protocol_rft.data.source._opening import open_source

    file = write(tmp_path / "in.parquet", SMALL)
    filter_rollouts(file, tmp_path / "p.jsonl", FilterRules(), prompts=True)
    values = [row.values for row in open_source(tmp_path / "p.jsonl").rows()]
    assert values == [row.original for row in rows_of(SMALL) if row.sample_idx == 0]


def test_a_value_that_json_has_no_word_for_is_an_error_that_says_so(tmp_path: Path):
    from eval_protocol_rft.data._files import write_rows

    rows = rows_of([[Sampled(1.0)]])
    rows[0].original = {"level": math.nan}
    write_rows(tmp_path / "in.parquet", schema(FileMetadata(), {"level": pa.float64()}), rows)
    with pytest.raises(FormatError, match=r"Write .parquet instead"):
        filter_rollouts(tmp_path / "in.parquet", tmp_path / "p.jsonl", FilterRules(), prompts=True)
    assert not (tmp_path / "p.jsonl").exists()


def test_rollouts_that_came_from_no_data_set_have_no_prompts_to_give(tmp_path: Path):
    from eval_protocol_rft.data._files import write_rows

    write_rows(tmp_path / "in.parquet", schema(FileMetadata(), {}), rows_of([[Sampled(1.0)]]))
    with pytest.raises(FormatError, match="no columns original_"):
        filter_rollouts(tmp_path / "in.parquet", tmp_path / "p.jsonl", FilterRules(), prompts=True)


@pytest.mark.parametrize(
    "rules",
    [
        FilterRules(pass_rate=Band(0, 1)),
        FilterRules(reward_percentile=Band(0, 50)),
        FilterRules(drop_zero_variance=True),
        FilterRules(reward_min=0.5),
        FilterRules(drop_unscored=True),
    ],
)
def test_rules_on_rewards_are_refused_where_nothing_is_scored(tmp_path: Path, rules: FilterRules):
    file = write(tmp_path / "in.parquet", [[Sampled(), FAILED]])
    with pytest.raises(JobError, match="ep-rft score"):
        filter_rollouts(file, tmp_path / "out.parquet", rules)


def test_nothing_is_written_where_nothing_is_left(tmp_path: Path):
    file = write(tmp_path / "in.parquet", SMALL)
    with pytest.raises(JobError, match=r"of 6 completions.* failed 1, too_short 5"):
        filter_rollouts(file, tmp_path / "out.parquet", FilterRules(min_tokens=99))
    assert [found.name for found in tmp_path.iterdir()] == ["in.parquet"]


def test_the_input_is_never_the_output(tmp_path: Path):
    file = write(tmp_path / "in.parquet", SMALL)
    before = file.read_bytes()
    (tmp_path / "link.parquet").symlink_to(file)
    for output in (file, tmp_path / "link.parquet", tmp_path / "x" / ".." / "in.parquet"):
        with pytest.raises(JobError, match="to be read"):
            filter_rollouts(file, output, FilterRules(), overwrite=True)
    assert file.read_bytes() == before


def test_an_output_that_is_there_is_replaced_only_when_asked(tmp_path: Path):
    file = write(tmp_path / "in.parquet", SMALL)
    other = write(tmp_path / "other.parquet", [[Sampled(1.0)]])
    with pytest.raises(JobError, match="is there already"):
        filter_rollouts(file, other, FilterRules())
    filter_rollouts(file, other, FilterRules(), overwrite=True)
    assert len(RolloutDataset(other)) == 6


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ("out.csv", "must end in .parquet, .jsonl or .ndjson"),
        ("no/out.parquet", "no folder"),
    ],
)
def test_an_output_that_cannot_be_is_refused(tmp_path: Path, output: str, words: str):
    file = write(tmp_path / "in.parquet", SMALL)
    with pytest.raises(JobError, match=words):
        filter_rollouts(file, tmp_path / output, FilterRules())


def test_the_command_says_what_became_of_every_completion(tmp_path: Path):
    file = write(tmp_path / "in.parquet", SMALL)
    arguments = [str(file), "-o", str(tmp_path / "out.parquet"), "--reward-percentile", "50:"]
    result = ep_rft("filter", *arguments, "--dedupe-completions")
    assert result.exit_code == 0, result.output
    assert "kept 2 of 6 completions, 1 of 2 prompts" in result.stdout
    assert "mean rewards 0.25:" in result.stdout
    assert "3  reward_percentile" in result.stdout
    assert "1  duplicate_completion" in result.stdout
    again = ep_rft("filter", *arguments)
    assert (again.exit_code, again.stdout) == (1, "")
    assert again.stderr.startswith("ep-rft: ")
    assert again.stderr.count("\n") == 1
