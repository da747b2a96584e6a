"""What `ep-rft score` says at its end: rewards that cannot mean anything do not pass in silence."""

from __future__ import annotations

from pathlib import Path

import pytest

from eval_protocol_rft.data._dataset import RolloutDataset
from eval_protocol_rft.data._files import write_rows
from eval_protocol_rft.data._score import score
from tests.data.rollout_files import write_rollouts
from tests.data.servers import ep_rft, succeed

GRADERS = """
from eval_protocol.models import EvaluateResult, MetricResult

async def right(row):
    return float(row.messages[-1].content == row.ground_truth)

async def fails(row):
    raise LookupError("no judge \\x1b]0;PWNED\\x07 here")

async def doubtful(row):
    nan = MetricResult(score=float("nan"), reason="r")
    return EvaluateResult(score=float(len(row.messages[-1].content)), metrics={"m": nan})
"""


@pytest.fixture(scope="module")
def graders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("graders") / "summary_graders.py"
    file.write_text(GRADERS)
    return file


@pytest.fixture
def rollouts(tmp_path: Path) -> Path:
    return write_rollouts(tmp_path / "rollouts.parquet", [["0", "5"], ["1", None]])


def test_it_counts_rows_completions_rewards_and_failures(rollouts, graders):
    result = succeed("score", rollouts, "-e", f"{graders}::right", "--quiet")
    assert result.stdout.splitlines() == [
        f"{rollouts}: 3 of 4 completions of 2 rows have reward, mean 0.6667 (3 graded by this run)",
        "1 could not be sampled, so there is nothing to grade",
    ]
    assert result.stderr == ""


def test_when_nothing_was_scored_it_says_why_and_fails_unless_told_otherwise(rollouts, graders):
    arguments = ("score", rollouts, "-e", f"{graders}::fails", "--quiet")
    result = ep_rft(*arguments)
    assert result.exit_code == 1
    assert "3 unscored:" in result.stderr
    assert r"  3 x LookupError: no judge \x1b]0;PWNED\x07 here (" in result.stderr
    assert result.stderr.rstrip().endswith(
        "ep-rft: no completion has a reward (--allow-unscored if that is right)"
    )
    assert ep_rft(*arguments, "--allow-unscored").exit_code == 0


def test_a_ground_truth_that_no_row_has_is_warned_of_where_the_evaluator_reads_it(
    rollouts, graders
):
    dataset = RolloutDataset(rollouts)
    rows = list(dataset)
    for row in rows:
        row.ground_truth = None
    write_rows(rollouts, dataset.schema, rows)
    result = succeed("score", rollouts, "-e", f"{graders}::right", "--quiet")
    truth, equal = result.stderr.splitlines()
    assert truth.startswith("ep-rft: warning: ground_truth is absent in every row, and ")
    assert equal == "ep-rft: warning: all 3 rewards are 0: nothing can be learned from them"


def test_what_was_left_out_of_a_scored_completion_is_told_apart_from_unscored(rollouts, graders):
    summary = score(rollouts, f"{graders}::doubtful", progress=False)
    assert (summary.scored, summary.unscored.total(), summary.remarks.total()) == (3, 0, 3)
    result = succeed("score", rollouts, "-e", f"{graders}::doubtful", "--quiet")
    assert "3 scored, but:" in result.stderr
    assert "metric 'm' is left out: its score is not a finite number" in result.stderr
