"""Bands of difficulty: what is in them, as a column and as files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval_protocol_rft import data
from eval_protocol_rft.data._buckets import BucketRules, bucket_rollouts, percentiles
from eval_protocol_rft.data._dataset import RolloutDataset
from eval_protocol_rft.data._files import JobError
from tests.scored_files import FAILED, Sampled, write

GROUPS = [
    [Sampled(1.0), Sampled(1.0)],
    [Sampled(0.0), Sampled(1.0), FAILED],
    [Sampled(0.0), Sampled(0.0), Sampled(None)],
    [Sampled(None), FAILED],
    [Sampled(0.0), Sampled(0.5), Sampled(0.0), Sampled(1.0)],
]
DIFFICULTIES = ["easy", "medium", "hard", None, "hard"]


@given(st.lists(st.sampled_from([float("nan"), -1.0, 0.0, 0.1 + 0.2, 0.3, 1.0]), max_size=9))
def test_a_percentile_is_the_share_of_lower_and_half_of_the_equal_means(means: Any) -> None:
    found = percentiles(np.array(means, np.float64))
    there = [round(mean, 9) for mean in means if mean == mean]
    for mean, rank in zip(means, found.tolist(), strict=True):
        lower = sum(other < round(mean, 9) for other in there)
        same = sum(other == round(mean, 9) for other in there)
        if mean == mean:
            assert rank == pytest.approx((lower + same / 2) / len(there) * 100)
        else:
            assert rank != rank


@pytest.mark.parametrize("name", ["b.parquet", "b.jsonl"])
def test_every_completion_has_the_band_of_its_prompt(tmp_path: Path, name: str) -> None:
    source = write(tmp_path / "a.parquet", GROUPS)
    summary = bucket_rollouts(source, tmp_path / name, progress=False)
    [table] = RolloutDataset(tmp_path / name).tables(["data_idx", "difficulty"])
    expected = [DIFFICULTIES[i] for i, group in enumerate(GROUPS) for _ in group]
    assert table["difficulty"].to_pylist() == expected
    numbers = [(b.name, b.prompts, b.completions, b.low, b.high) for b in summary.buckets]
    assert numbers == [
        ("hard", 2, 7, 0.0, 0.25), ("medium", 1, 3, 0.5, 0.5), ("easy", 1, 2, 1.0, 1.0),
    ]  # fmt: skip
    assert summary.unscored == 1
    before, after = RolloutDataset(source), RolloutDataset(tmp_path / name)
    assert after.metadata == before.metadata
    assert after.schema.names == [*before.schema.names, "difficulty"]
    again = bucket_rollouts(
        tmp_path / name, tmp_path / "c.parquet", BucketRules(by="percentile"), progress=False
    )
    assert [bucket.prompts for bucket in again.buckets] == [1, 2, 1]
    assert RolloutDataset(tmp_path / "c.parquet").schema.names == after.schema.names


def test_equal_means_are_in_one_band_however_many(tmp_path: Path) -> None:
    source = write(tmp_path / "a.parquet", [[Sampled(0.0)]] * 6 + [[Sampled(1.0)]] * 3)
    rules = BucketRules(by="percentile")
    summary = bucket_rollouts(source, tmp_path / "b.parquet", rules, progress=False)
    assert [bucket.prompts for bucket in summary.buckets] == [0, 6, 3]
    same = write(tmp_path / "c.parquet", [[Sampled(0.5)]] * 4)
    summary = bucket_rollouts(same, tmp_path / "d.parquet", rules, progress=False)
    assert [bucket.prompts for bucket in summary.buckets] == [0, 4, 0]


def test_a_file_for_each_band_that_has_prompts(tmp_path: Path) -> None:
    source = write(tmp_path / "a.parquet", GROUPS)
    rules = BucketRules(names=("unsolved", "mixed", "solved"), edges=(0.001, 1.0))
    summary = bucket_rollouts(
        source, tmp_path / "b.jsonl", rules, split=True, prompts=True, progress=False
    )
    paths = [bucket.path for bucket in summary.buckets]
    assert paths == [tmp_path / f"b-{name}.jsonl" for name in ("unsolved", "mixed", "solved")]
    rows = [[json.loads(line) for line in path.read_text().splitlines()] for path in paths if path]
    assert [[row["level"] for row in band] for band in rows] == [[2], [1, 4], [0]]
    first = rows[0][0]
    assert first == {"level": 2, "tags": {"all": ["a", 2]}, "difficulty": "unsolved"}
    easiest = BucketRules(names=("a", "b"), edges=(1.0,), pass_threshold=0.0)
    summary = bucket_rollouts(source, tmp_path / "c.parquet", easiest, split=True, progress=False)
    assert [bucket.path for bucket in summary.buckets] == [None, tmp_path / "c-b.parquet"]
    assert not (tmp_path / "c-a.parquet").exists()


def test_the_prompts_of_medium_difficulty_alone(tmp_path: Path) -> None:
    source = write(tmp_path / "a.parquet", GROUPS)
    bucket_rollouts(
        source, tmp_path / "b.parquet", only=("medium",), prompts=True, column="band",
        progress=False,
    )  # fmt: skip
    [row] = pq.read_table(tmp_path / "b.parquet").to_pylist()
    assert (row["level"], row["band"]) == (1, "medium")
    rules = BucketRules(names=("x", "y"), edges=(0.0001,), pass_threshold=-9)
    with pytest.raises(JobError, match="no prompt is x, so nothing"):
        bucket_rollouts(source, tmp_path / "c.parquet", rules, only=("x",), progress=False)
    with pytest.raises(JobError, match="no band is called 'soft': there are hard, medium, easy"):
        bucket_rollouts(source, tmp_path / "c.parquet", only=("soft",), progress=False)
    assert not (tmp_path / "c.parquet").exists()


def test_the_column_can_be_asked_for(tmp_path: Path) -> None:
    pytest.importorskip("duckdb")
    source = write(tmp_path / "a.parquet", GROUPS)
    bucket_rollouts(source, tmp_path / "b.parquet", progress=False)
    rules = data.FilterRules(where="difficulty = 'hard'")
    summary = data.filter_rollouts(
        tmp_path / "b.parquet", tmp_path / "c.parquet", rules, progress=False
    )
    assert (summary.kept, summary.groups_kept) == (7, 2)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"edges": (0.5,)}, "3 bands .* have 2 edges between them, not 1"),
        ({"edges": (0.5, 0.5)}, "they must rise, above 0 and up to 1"),
        ({"edges": (0.0, 0.5)}, "they must rise"),
        ({"edges": (0.5, 1.5)}, "up to 1 .by pass-rate"),
        ({"edges": (50.0, 101.0), "by": "percentile"}, "up to 100"),
        ({"names": ("a", "a")}, "one stands there twice"),
        ({"by": "luck"}, "by must be one of"),
    ],
)
def test_rules_that_make_no_bands_are_refused(rules: Any, message: str) -> None:
    with pytest.raises(JobError, match=message):
        BucketRules(**rules)


@pytest.mark.parametrize(
    ("options", "column"),
    [({}, "reward"), ({}, "original_level"), ({}, "turns"), ({"prompts": True}, "level"), ({}, "")],
)
def test_a_column_that_is_something_else_is_not_replaced(
    tmp_path: Path, options: Any, column: str
) -> None:
    source = write(tmp_path / "a.parquet", GROUPS)
    with pytest.raises(JobError, match="is something else there: choose another name"):
        bucket_rollouts(source, tmp_path / "b.parquet", column=column, progress=False, **options)


def test_rollouts_without_a_reward_have_no_bands(tmp_path: Path) -> None:
    source = write(tmp_path / "a.parquet", [[Sampled(None)]])
    with pytest.raises(JobError, match="no completion has a reward in the column 'reward'"):
        bucket_rollouts(source, tmp_path / "b.parquet", progress=False)
