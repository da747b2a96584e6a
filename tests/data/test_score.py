"""`ep-rft score`: completions get rewards, or the reason why not, and nothing else changes."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import random
import threading
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from eval_protocol.models import EvaluateResult

from eval_protocol_rft.data._dataset import RolloutDataset
from eval_protocol_rft.data._files import JobError, write_rows
from eval_protocol_rft.data._format import CompletionRow, FileMetadata, reward_columns, schema
from eval_protocol_rft.data._from_ep import from_row
from eval_protocol_rft.data._job_file import BusyError
from eval_protocol_rft.data._job_store import JobStore, parts_folder, row_keys
from eval_protocol_rft.data._row_groups import to_record_batch
from eval_protocol_rft.data._score import score
from tests.data.rollout_files import SCHEMA, write_rollouts
from tests.data.servers import (
    Pair,
    refused,
    rows_by_pair,
    stored_rows,
    succeed,
)
from tests.waiting import wait_until

GRADERS = Path(__file__).with_name("score_graders.py")
SAID: list[list[str | None]] = [
    ["0", "zero", "12345"],
    ["1", None, "one"],
    [None, None, None],
    ["2", "", "3"],
]
PLACES = [(i, k) for i, row in enumerate(SAID) for k, text in enumerate(row) if text is not None]
TEXTS = sorted((i, text) for i, row in enumerate(SAID) for text in row if text is not None)


def grader(name: str) -> str:
    return f"{GRADERS}::{name}"


@pytest.fixture
def rollouts(tmp_path: Path) -> Path:
    return write_rollouts(tmp_path / "rollouts.parquet", SAID)


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A line per call of a grader that runs in this process: data row, completion's text."""
    path = tmp_path / "calls"
    path.touch()
    monkeypatch.setenv("CALLS", str(path))
    return path


def called(calls: Path) -> list[tuple[int, str]]:
    lines = [line.partition(" ") for line in calls.read_text().splitlines()]
    return sorted((int(i), text) for i, _, text in lines)


def rewards(path: Path, column: str = "reward") -> dict[Pair, float | None]:
    return {pair: row[column] for pair, row in rows_by_pair(path).items()}


def run(path: Path, which: str, **options: Any) -> Any:
    return score(path, grader(which), workers=2, progress=False, **options)


def by_hand(of: Any) -> dict[Pair, float | None]:
    """What each completion should get; those that failed nothing."""
    return {
        (i, k): None if text is None else of(text, i)
        for i, row in enumerate(SAID)
        for k, text in enumerate(row)
    }


LENGTHS = by_hand(lambda text, i: float(len(text)))
RIGHT = by_hand(lambda text, i: float(text == str(i)))


def unchanged(path: Path, before: pa.Table, *columns: str) -> None:
    """Every value but those of the rewards is as it was."""
    table = pa.concat_tables(RolloutDataset(path).tables())
    added = {name for column in columns for name in reward_columns(column)}
    assert set(before.schema.names) == set(table.schema.names) - (
        added - set(reward_columns("reward"))
    )
    for field in before.schema:
        if field.name not in added:
            assert table.column(field.name).combine_chunks() == (
                before.column(field.name).combine_chunks()
            ), field.name


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_several_evaluators_side_by_side_leave_everything_else_as_it_was(suffix, tmp_path):
    path = write_rollouts(tmp_path / f"rollouts.{suffix}", SAID)
    before = pa.concat_tables(RolloutDataset(path).tables())
    result = succeed("score", path, "-e", grader("right"), "--quiet")
    assert result.stdout.splitlines() == [
        f"{path}: 8 of 12 completions of 4 rows have reward, mean 0.3750 (8 graded by this run)",
        "4 could not be sampled, so there is nothing to grade",
    ]
    succeed("score", path, "-e", grader("length"), "--name", "length", "--quiet", "--workers", 2)
    assert rewards(path) == RIGHT
    assert rewards(path, "reward_length") == LENGTHS
    row = rows_by_pair(path)[0, 1]
    assert row["reward_reason"] == "zero against 0"
    assert json.loads(row["metrics"])["size"]["score"] == 0.5
    assert row["reward_length_reason"] is None
    unchanged(path, before, "reward", "reward_length")
    metadata = RolloutDataset(path).metadata
    assert {name: who.evaluator for name, who in metadata.rewards.items()} == {
        "reward": grader("right"),
        "reward_length": grader("length"),
    }
    assert (
        metadata.rewards["reward"].fingerprint == hashlib.sha256(GRADERS.read_bytes()).hexdigest()
    )
    left = {name.name for name in tmp_path.iterdir()}
    assert left <= {path.name, f"{path.name}.metadata.json"}


def test_with_an_output_the_source_stays_as_it_is(rollouts, tmp_path):
    before, table = rollouts.read_bytes(), pa.concat_tables(RolloutDataset(rollouts).tables())
    output = tmp_path / "scored.jsonl"
    succeed("score", rollouts, "-e", grader("right"), "-o", output, "--quiet")
    assert rollouts.read_bytes() == before
    assert rewards(output) == RIGHT
    unchanged(output, table, "reward")
    message = refused("score", rollouts, "-e", grader("right"), "-o", output, "--quiet")
    assert "scored.jsonl: exists" in message
    succeed("score", rollouts, "-e", grader("length"), "-o", output, "--overwrite", "--quiet")
    assert rewards(output) == LENGTHS


def test_scored_again_nothing_is_graded_and_the_file_is_not_touched(rollouts, calls):
    run(rollouts, "right")
    before, state = rollouts.read_bytes(), rollouts.stat()
    assert called(calls) == TEXTS
    assert run(rollouts, "right").graded == 0
    assert called(calls) == TEXTS
    assert rollouts.read_bytes() == before
    assert rollouts.stat().st_ino == state.st_ino


@pytest.mark.parametrize("seed", range(3))
def test_the_order_of_the_file_does_not_matter_and_stays(seed, tmp_path):
    rng = random.Random(seed)
    said = [[str(rng.randrange(5)) for _ in range(rng.randrange(1, 4))] for _ in range(30)]
    order = rng.sample(range(30), 30)
    path = write_rollouts(tmp_path / "shuffled.parquet", said, order=order)
    run(path, "right")
    got = rewards(path)
    assert list(got) == [(i, k) for i in order for k in range(len(said[i]))]
    assert got == {(i, k): float(said[i][k] == str(i)) for i, k in got}


def test_what_gets_no_reward_has_the_reason_and_is_not_zero(tmp_path):
    said = [["hang", "fail", "nothing"], ["nan", "good", ""]]
    path = write_rollouts(tmp_path / "rollouts.parquet", said)
    summary = run(path, "length", timeout=1.0)
    assert rewards(path) == {
        **dict.fromkeys([(0, 0), (0, 1), (0, 2), (1, 0)]),
        (1, 1): 4.0,
        (1, 2): 0.0,
    }
    errors = {pair: row["reward_error"] for pair, row in rows_by_pair(path).items()}
    assert "1" in errors[0, 0]
    assert "LookupError" in errors[0, 1]
    assert "no such word" in errors[0, 1]
    assert errors[0, 2]
    assert errors[1, 0]
    assert errors[1, 1] is errors[1, 2] is None
    assert (summary.scored, summary.unscored.total(), summary.mean) == (2, 4, 2.0)


def test_unscored_ones_are_graded_again_only_when_asked(rollouts, calls, tmp_path, monkeypatch):
    go = tmp_path / "go"
    monkeypatch.setenv("GO", str(go))
    summary = run(rollouts, "flaky")
    assert (summary.scored, summary.unscored.total()) == (0, 8)
    go.touch()
    assert run(rollouts, "flaky").graded == 0
    summary = run(rollouts, "flaky", retry_unscored=True)
    assert (summary.graded, summary.scored, summary.unscored.total()) == (8, 8, 0)
    assert rewards(rollouts) == by_hand(lambda text, i: 1.0)
    assert run(rollouts, "flaky", retry_unscored=True).graded == 0
    assert called(calls) == sorted(2 * TEXTS)


def test_a_changed_or_another_evaluator_is_refused_unless_it_may_replace(rollouts, tmp_path):
    own = tmp_path / "changing_grader.py"
    own.write_text("def grade(row):\n    return 1.0\n")
    asked = ["score", rollouts, "-e", f"{own}::grade", "--quiet", "--workers", 1]
    succeed(*asked)
    before = rollouts.read_bytes()
    own.write_text("def grade(row):\n    return 2.0\n")
    message = refused(*asked)
    assert "rewards of an earlier version of its file (changed: changing_grader.py)" in message
    assert "--name" in message
    assert "--overwrite" in message
    assert f"rewards of {own}::grade" in refused("score", rollouts, "-e", grader("right"))
    assert rollouts.read_bytes() == before
    own.write_text("# anew\ndef other(row):\n    return 2.0\ndef grade(row):\n    return 1.0\n")
    assert "(0 graded by this run)" in succeed(*asked).stdout
    own.write_text("def grade(row):\n    return 2.0\n")
    succeed("score", rollouts, "-e", grader("right"), "--overwrite", "--quiet")
    assert rewards(rollouts) == RIGHT
    assert {row["metrics"] is None for row in rows_by_pair(rollouts).values()} == {True, False}


def test_an_evaluation_test_gets_the_columns_through_its_adapter(rollouts):
    run(rollouts, "test_level")
    assert rewards(rollouts) == by_hand(lambda text, i: 10.0 * i)
    assert rows_by_pair(rollouts)[1, 0]["reward_reason"] == "level 10"
    run(rollouts, "test_level", name="without", adapt=False)
    assert rows_by_pair(rollouts)[1, 0]["reward_without_reason"] == "1"


def test_a_groupwise_evaluator_sees_the_completions_of_a_row_that_were_sampled(rollouts):
    run(rollouts, "test_best")
    assert rewards(rollouts) == {
        **LENGTHS,
        (0, 0): 0.0,
        (0, 1): 0.0,
        (0, 2): 1.0,
        (1, 0): 0.0,
        (1, 2): 1.0,
        (3, 0): 1.0,
        (3, 1): 0.0,
        (3, 2): 1.0,
    }
    assert [rows_by_pair(rollouts)[place]["reward_reason"] for place in PLACES] == (
        ["3"] * 3 + ["2"] * 2 + ["3"] * 3
    )


def test_an_evaluator_of_everything_sees_everything(rollouts):
    run(rollouts, "test_share")
    assert rewards(rollouts) == by_hand(lambda text, i: 0.125)


@pytest.mark.parametrize(
    ("evaluator", "said"),
    [
        ("nothing.py::f", "there is no file"),
        ("nowhere_at_all:f", "importing nowhere_at_all failed: ModuleNotFoundError"),
        (grader("lenght"), "has no function 'lenght'; evaluators there:"),
        (grader("GRADERS"), "has no function"),
        ("no spec", "names no evaluator"),
    ],
)
def test_an_evaluator_that_cannot_be_had_is_an_error_in_one_line(evaluator, said, rollouts):
    before = rollouts.read_bytes()
    assert said in refused("score", rollouts, "-e", evaluator)
    assert rollouts.read_bytes() == before
    assert [path.name for path in rollouts.parent.iterdir()] == [rollouts.name]


@pytest.mark.parametrize("name", ["a b", "x_error", "é", "-"])
def test_a_name_that_would_make_no_column_is_refused(name, rollouts):
    message = refused("score", rollouts, "-e", grader("right"), f"--name={name}")
    assert "cannot name a reward" in message


@pytest.mark.parametrize("finished", [False, True], ids=["first run", "failures again"])
def test_what_an_unfinished_job_writes_is_refused(finished, tmp_path):
    """Also a finished file some of which is sampled again: both would write it."""
    path = write_rollouts(tmp_path / "rollouts.parquet", SAID)
    keys = functools.partial(row_keys, position=None)
    with contextlib.closing(JobStore(parts_folder(path), SCHEMA, keys)) as store:
        store.append(to_record_batch(list(RolloutDataset(path))[:2], SCHEMA))
    if not finished:
        path.unlink()
    before = sorted(tmp_path.rglob("*"))
    assert "the job that writes it is not finished" in refused("score", path, "-e", grader("right"))
    assert sorted(tmp_path.rglob("*")) == before


def test_a_file_of_something_else_is_refused(tmp_path):
    other = tmp_path / "other.parquet"
    other.write_bytes(b"no")
    assert "not a whole Parquet file" in refused("score", other, "-e", grader("right"))
    assert "no such file or folder" in refused("score", tmp_path / "no", "-e", grader("right"))


def test_rows_that_came_from_eval_protocol_keep_theirs_without_the_old_result(tmp_path):
    """Files that were converted hold what no column does of the evaluation rows."""
    [whole] = RolloutDataset(write_rollouts(tmp_path / "a.parquet", [["0", "x"]])).evaluation_rows()
    whole.evaluation_result = EvaluateResult(score=0.25, reason="another evaluator's")
    whole.execution_metadata.extra["mine"] = [1, None]
    rows = from_row(whole.model_dump(mode="json"), 0, prompt_kind="messages")
    path = tmp_path / "converted.parquet"
    write_rows(path, SCHEMA, rows)

    def kept() -> list[dict[str, Any]]:
        return [json.loads(row["evaluation_row"]) for row in rows_by_pair(path).values()]

    before = kept()
    assert before[0]["evaluation_result"]["score"] == 0.25
    run(path, "right", name="side")
    assert kept() == before
    run(path, "right")
    assert rewards(path) == rewards(path, "reward_side") == {(0, 0): 1.0, (0, 1): 0.0}
    for row in before:
        del row["evaluation_result"]
    assert kept() == before
    [scored] = RolloutDataset(path).evaluation_rows()
    assert scored.execution_metadata.extra["mine"] == [1, None]


def test_a_verdict_is_on_disk_while_the_next_one_is_waited_for(tmp_path, calls, monkeypatch):
    go = tmp_path / "go"
    monkeypatch.setenv("GO", str(go))
    path = write_rollouts(tmp_path / "rollouts.parquet", [["a", "wait", "b"]])
    thread = threading.Thread(target=run, args=(path, "gated"))
    thread.start()
    try:
        folder = tmp_path / "rollouts.parquet.reward.parts"
        wait_until(lambda: len(stored_rows(folder)) == 2)
    finally:
        go.touch()
        thread.join()
    assert rewards(path) == {(0, 0): 1.0, (0, 1): 1.0, (0, 2): 1.0}


def test_nobody_else_may_score_a_file_that_is_being_scored(tmp_path, calls, monkeypatch):
    """The second one would write the file without the first one's rewards."""
    go = tmp_path / "go"
    monkeypatch.setenv("GO", str(go))
    path = write_rollouts(tmp_path / "rollouts.parquet", [["wait"]])
    thread = threading.Thread(target=run, args=(path, "gated"))
    thread.start()
    try:
        wait_until(lambda: bool(called(calls)))
        with pytest.raises(BusyError, match="another process samples or scores it"):
            run(path, "right", name="other")
    finally:
        go.touch()
        thread.join()
    run(path, "right", name="other")
    row = rows_by_pair(path)[0, 0]
    assert (row["reward"], row["reward_other"]) == (1.0, 0.0)


def one_byte_in_the_middle(path):
    """Of a file that is longer than what one would look at of both its ends."""
    content = bytearray(path.read_bytes())
    assert len(content) > 2_500_000
    content[len(content) // 2] ^= 1
    other = path.with_suffix(".other")
    other.write_bytes(content)
    other.replace(path)


def suppressed(path):
    with contextlib.suppress(JobError):
        run(path, "gated")


def something_else(path):
    write_rollouts(path, [["something else"]])


@pytest.mark.parametrize("change", [something_else, one_byte_in_the_middle])
def test_a_file_that_changes_while_it_is_scored_is_not_overwritten(
    change, tmp_path, calls, monkeypatch
):
    go = tmp_path / "go"
    monkeypatch.setenv("GO", str(go))
    noise = random.Random(0).randbytes(3 << 20).hex()
    path = write_rollouts(tmp_path / "rollouts.parquet", [["wait", noise]])
    problems: list[BaseException] = []

    def scores() -> None:
        try:
            run(path, "gated")
        except JobError as error:
            problems.append(error)

    thread = threading.Thread(target=scores)
    thread.start()
    wait_until(lambda: bool(called(calls)))
    change(path)
    changed = path.read_bytes()
    go.touch()
    thread.join()
    assert "was changed while it was scored" in str(problems[0])
    assert path.read_bytes() == changed


def test_what_was_graded_of_a_file_that_was_replaced_is_forgotten(tmp_path, calls, monkeypatch):
    go = tmp_path / "go"
    monkeypatch.setenv("GO", str(go))
    path = write_rollouts(tmp_path / "rollouts.parquet", [["wait"]])
    thread = threading.Thread(target=suppressed, args=(path,))
    thread.start()
    wait_until(lambda: bool(called(calls)))
    something_else(path)
    go.touch()
    thread.join()
    run(path, "right")
    assert rewards(path) == {(0, 0): 0.0}


def test_a_file_with_columns_of_others_keeps_them(tmp_path):
    metadata = FileMetadata(prompt_kind="text")
    rows = [CompletionRow(row_id="r", data_idx=0, sample_idx=0, prompt="q", error="x")]
    path = tmp_path / "plain.parquet"
    write_rows(path, schema(metadata, {}), rows)
    table = pa.concat_tables(RolloutDataset(path).tables())
    pq.write_table(table.append_column("mine", pa.array([7])), path)
    summary = run(path, "right")
    assert (summary.scored, summary.failed) == (0, 1)
    assert rows_by_pair(path)[0, 0]["mine"] == 7
