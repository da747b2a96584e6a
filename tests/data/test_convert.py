"""Rollout files and rows of Eval Protocol, converted into each other."""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from eval_protocol.models import EvaluationRow
from hypothesis import given, settings
from hypothesis import strategies as st

from eval_protocol_rft.data._convert import convert
from eval_protocol_rft.data._convert_ep import read_rows
from eval_protocol_rft.data._dataset import RolloutDataset
from eval_protocol_rft.data._files import JobError, write_rows
from eval_protocol_rft.data._filter import FilterRules, filter_rollouts
from eval_protocol_rft.data._format import (
    CompletionRow,
    FileMetadata,
    FormatError,
    metadata_of,
    schema,
)
from eval_protocol_rft.data._job_store import JobStore, parts_folder, row_keys
from eval_protocol_rft.data._row_groups import to_record_batch
from eval_protocol_rft.data._score import score
from eval_protocol_rft.data._stats import rollout_stats
from eval_protocol_rft.training._batch import build_batch
from eval_protocol_rft.training._prompt_groups import group_rows
from eval_protocol_rft.training._types import TrainingDataError
from tests.convert_rows import (
    REWARD_B,
    SAMPLING,
    evaluated,
    files,
    rounded,
    same,
    through_json,
)
from tests.data.rollout_files import write_rollouts
from tests.data.servers import ep_rft, refused, succeed
from tests.training_rows import failed_row, record, scored
from tests.training_rows import row as numbered

Row = dict[str, Any]
GRADERS = Path(__file__).with_name("score_graders.py")


def write_lines(path: Path, rows: Iterable[Any]) -> Path:
    path.write_bytes(msgspec.json.Encoder().encode_lines(rows))
    return path


def lines_of(path: Path) -> list[Row]:
    return [msgspec.json.decode(line) for line in path.read_bytes().splitlines()]


def row(**fields: Any) -> CompletionRow:
    values: dict[str, Any] = {
        "row_id": "r", "data_idx": 0, "sample_idx": 0, "prompt": "q", "response": "a",
        "prompt_ids": np.array([1], np.int32), "completion_ids": np.array([2], np.int32),
        "logprobs": np.array([-1], np.float32), "finish_reason": "stop", "truncated": False,
        "temperature": 1.0, "top_p": 1.0, "top_k": 0,
    }  # fmt: skip
    return CompletionRow(**(values | fields))


def rollout_file(path: Path, *rows: CompletionRow, **types: pa.DataType) -> Path:
    write_rows(path, schema(FileMetadata(sampling=SAMPLING), types), rows or [row()])
    return path


@settings(max_examples=25, deadline=None)
@given(files())
def test_parquet_survives_being_json_lines(tmp_path_factory: Any, file: Any) -> None:
    folder = tmp_path_factory.mktemp("files")
    write_rows(folder / "a.parquet", *file)
    convert(folder / "a.parquet", folder / "b.jsonl")
    summary = convert(folder / "b.jsonl", folder / "c.parquet")
    before, after = (pq.read_table(folder / name) for name in ("a.parquet", "c.parquet"))
    assert after.equals(before, check_metadata=True)
    assert summary.completions == len(file[1])
    assert summary.data_rows == len({row.data_idx for row in file[1]})
    assert summary.notes == ()


@settings(max_examples=25, deadline=None)
@given(files())
def test_rollouts_survive_being_rows_of_eval_protocol(tmp_path_factory: Any, file: Any) -> None:
    folder = tmp_path_factory.mktemp("files")
    write_rows(folder / "a.parquet", *file)
    there = convert(folder / "a.parquet", folder / "b.jsonl", to_format="ep")
    back = convert(folder / "b.jsonl", folder / "c.parquet")
    assert back.from_format == "ep"
    assert there.completions == back.completions == len(file[1])
    assert there.notes == back.notes == ()
    found = list(RolloutDataset(folder / "c.parquet"))
    assert len(found) == len(file[1])
    assert all(map(same, found, file[1]))
    before, after = metadata_of(file[0]), RolloutDataset(folder / "c.parquet").metadata
    for name in ("prompt_kind", "sampling", "data", "rewards"):
        assert getattr(after, name) == getattr(before, name)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 3).flatmap(lambda size: st.tuples(*map(evaluated, range(size)))))
def test_rows_of_eval_protocol_survive_being_rollouts(
    tmp_path_factory: Any, rows: list[Row]
) -> None:
    folder = tmp_path_factory.mktemp("files")
    write_lines(folder / "a.jsonl", rows)
    convert(folder / "a.jsonl", folder / "b.parquet")
    convert(folder / "b.parquet", folder / "c.jsonl", to_format="ep")
    found = lines_of(folder / "c.jsonl")
    # Runs of a data row come together.
    found.sort(key=lambda row: row["execution_metadata"]["run_id"])
    assert [rounded(row) for row in found] == [rounded(row) for row in rows]
    for line in (folder / "c.jsonl").read_bytes().splitlines():
        EvaluationRow.model_validate_json(line)


def run(number: int, row_id: str, *rewards: float, **fields: Any) -> Row:
    made = numbered(row_id, record(rewards, **fields), run=number)
    made["messages"] = [
        {"role": "user", "content": f"What is {row_id}?"},
        {"role": "assistant", "content": "-"},
    ]
    for failure in made["execution_metadata"]["extra"]["failures"]:
        failure |= {"seed": None, "status": None}
    return made


RUNS = [
    run(0, "a", 1.0, 0.0, failures=1),
    run(0, "b", 1.0),
    run(1, "a", 0.0, 0.0),
    run(1, "b", 0.0),
    run(2, "a", 0.0),
]
"""Runs of two rows, in the order in which they ended."""


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    write_lines(tmp_path / "runs.jsonl", RUNS)
    convert(tmp_path / "runs.jsonl", tmp_path / "runs.parquet")
    return tmp_path / "runs.parquet"


def test_runs_of_one_row_are_its_completions(runs: Path, tmp_path: Path) -> None:
    groups = list(RolloutDataset(runs).groups())
    assert [(group[0].row_id, group[0].data_idx) for group in groups] == [("a", 0), ("b", 1)]
    assert [[row.reward for row in group] for group in groups] == [
        [1.0, 0.0, None, 0.0, 0.0, 0.0],
        [1.0, 0.0],
    ]
    assert [[row.sample_idx for row in group] for group in groups] == [[*range(6)], [0, 1]]
    stats = rollout_stats(runs)
    assert (stats.groups, stats.groups_mixed, stats.completions, stats.failed) == (2, 2, 8, 1)
    assert {p.k: (round(p.value, 9), p.groups) for p in stats.pass_at_k} == {
        1: (0.35, 2), 2: (0.7, 2), 3: (0.6, 1), 4: (0.8, 1), 5: (1.0, 1)
    }  # fmt: skip
    summary = filter_rollouts(runs, tmp_path / "f.parquet", FilterRules(drop_zero_variance=True))
    assert (summary.kept, summary.dropped) == (8, {})
    summary = filter_rollouts(runs, tmp_path / "g.parquet", FilterRules(dedupe_prompts=True))
    assert (summary.kept, summary.dropped) == (8, {})


def test_runs_train_from_a_file_as_from_their_rows(runs: Path) -> None:
    expected = build_batch(RUNS)
    data = RolloutDataset(runs)
    for found in (build_batch(data.training_rows()), build_batch(group_rows(data.prompt_groups()))):
        assert found.stats.groups == expected.stats.groups == 2
        assert [datum.completion for datum in found.datums] == [
            datum.completion for datum in expected.datums
        ]
        for a, b in zip(found.datums, expected.datums, strict=True):
            assert (a.row_id, a.completion, a.reward) == (b.row_id, b.completion, b.reward)
            assert a.target_tokens.tolist() == b.target_tokens.tolist()
            assert a.advantages.tolist() == b.advantages.tolist()


def test_runs_come_back_as_the_rows_that_they_were(runs: Path, tmp_path: Path) -> None:
    for _ in range(2):
        convert(runs, tmp_path / "back.jsonl", to_format="ep", overwrite=True)
        found = [rounded(row) for row in lines_of(tmp_path / "back.jsonl")]
        assert found == [rounded(RUNS[i]) for i in (0, 2, 4, 1, 3)]
        convert(tmp_path / "back.jsonl", tmp_path / "again.parquet", overwrite=True)
        again, before = (list(RolloutDataset(f)) for f in (tmp_path / "again.parquet", runs))
        assert [(r.data_idx, r.sample_idx, r.reward) for r in again] == [
            (r.data_idx, r.sample_idx, r.reward) for r in before
        ]
        runs = tmp_path / "again.parquet"


def test_a_groupwise_evaluator_sees_all_runs_of_a_row(runs: Path) -> None:
    summary = score(runs, f"{GRADERS}::test_best", name="best", progress=False)
    assert summary.unscored == {}
    seen = [row.scores["reward_best"] for row in RolloutDataset(runs) if not row.failed]
    assert [score.reason for score in seen] == ["5"] * 5 + ["2"] * 2


def test_answers_of_two_models_to_a_row_are_two_groups(tmp_path: Path) -> None:
    """As a groupwise test leaves them in one experiment."""
    rows = [through_json(scored("a", reward)) for reward in (1.0, 0.0)]
    for row, model in zip(rows, ("m", "n"), strict=True):
        row["input_metadata"]["completion_params"] = {"model": model}
    file = write_lines(tmp_path / "a.jsonl", rows)
    assert [len(group.trajectories) for group in group_rows(rows)] == [1, 1]
    assert "2 prompts, 2 completions" in succeed("show", file).output
    convert(file, tmp_path / "b.parquet")
    data = RolloutDataset(tmp_path / "b.parquet")
    assert [len(group) for group in data.groups()] == [1, 1]
    assert len(group_rows(data.prompt_groups())) == 2
    assert "2 prompts, 2 completions" in succeed("show", data.path).output


def test_rows_train_as_the_rollouts_they_were_made_of(tmp_path: Path) -> None:
    rows = [scored(name, 1.0, 0.0, None) for name in "abc"]
    convert(write_lines(tmp_path / "a.jsonl", rows), tmp_path / "b.parquet")
    convert(tmp_path / "b.parquet", tmp_path / "c.jsonl", to_format="ep")
    expected = build_batch(rows)
    for found in (
        build_batch(read_rows(tmp_path / "c.jsonl")),
        build_batch(RolloutDataset(tmp_path / "b.parquet").training_rows()),
    ):
        assert len(found) == len(expected) == 6
        for a, b in zip(found.datums, expected.datums, strict=True):
            assert a.target_tokens.tolist() == b.target_tokens.tolist()
            assert a.advantages.tolist() == b.advantages.tolist()
            assert a.logprobs.tolist() == b.logprobs.tolist()


def test_settings_that_all_rows_share_are_the_files(tmp_path: Path) -> None:
    rows = [scored("a", 1.0, seed=3, max_tokens=7), scored("b", 0.0, seed=3, max_tokens=7)]
    convert(write_lines(tmp_path / "a.jsonl", rows), tmp_path / "b.parquet")
    sampling = RolloutDataset(tmp_path / "b.parquet").metadata.sampling
    assert sampling is not None
    assert (sampling.model, sampling.tokenizer, sampling.seed) == ("m", "tok", 3)
    assert (sampling.max_tokens, sampling.n) == (7, 1)

    rows[1]["execution_metadata"]["extra"]["sampling"]["top_p"] = 0.5
    convert(write_lines(tmp_path / "a.jsonl", rows), tmp_path / "c.parquet")
    data = RolloutDataset(tmp_path / "c.parquet")
    assert data.metadata.sampling is None
    assert [row.top_p for row in data] == [1.0, 0.5]


@pytest.mark.parametrize(
    ("truths", "kind", "is_json"),
    [
        (["4", "x"], pa.string(), False),
        (["4", None], pa.string(), False),
        ([4, 5], pa.int64(), False),
        ([True, None], pa.bool_(), False),
        ([4, 5.5], pa.string(), True),
        (["4", 4], pa.string(), True),
        ([{"a": [1]}, None], pa.string(), True),
        ([2**63], pa.string(), True),
        ([None], pa.string(), False),
    ],
)
def test_ground_truths_keep_their_type(
    tmp_path: Path, truths: list[Any], kind: pa.DataType, is_json: bool
) -> None:
    rows = [scored(str(i), 1.0) | {"ground_truth": truth} for i, truth in enumerate(truths)]
    convert(write_lines(tmp_path / "a.jsonl", rows), tmp_path / "b.parquet")
    data = RolloutDataset(tmp_path / "b.parquet")
    assert data.schema.field("ground_truth").type == kind
    assert ("ground_truth" in data.metadata.json_columns) == is_json
    found = [row.ground_truth for row in data]
    assert [(type(value), value) for value in found] == [(type(t), t) for t in truths]


def test_a_row_without_a_rollout_is_refused_by_line_or_dropped_and_counted(tmp_path: Path) -> None:
    rows = [scored("a", 1.0), failed_row("b"), scored("c", 0.0)]
    source = write_lines(tmp_path / "a.jsonl", rows)
    source.write_text("\n" + source.read_text())
    with pytest.raises(JobError, match=r"a\.jsonl:3: row 'b': .*'no server'.*--drop-failed"):
        convert(source, tmp_path / "b.parquet")
    assert not (tmp_path / "b.parquet").exists()
    summary = convert(source, tmp_path / "b.parquet", drop_failed_rows=True)
    assert summary.notes == ("1 rows whose rollout failed are not in the output",)
    found = [(row.row_id, row.data_idx) for row in RolloutDataset(tmp_path / "b.parquet")]
    assert found == [("a", 0), ("c", 2)]


def test_what_an_earlier_rollout_left_on_a_row_that_failed_is_no_rollout(tmp_path: Path) -> None:
    stale = through_json(scored("a", 1.0, 0.0))
    stale["rollout_status"] = {"code": 4, "message": "too late", "details": []}
    file = write_lines(tmp_path / "a.jsonl", [stale, scored("b", 1.0, 0.0)])
    with pytest.raises(JobError, match=r"a.jsonl:1: row 'a': it has no rollout.*too late"):
        convert(file, tmp_path / "b.parquet")
    assert "2 prompts, 2 completions" in succeed("show", file).output


def test_a_broken_row_is_named_even_where_failed_ones_are_dropped(tmp_path: Path) -> None:
    broken = scored("b", 1.0)
    broken["execution_metadata"]["extra"]["completion_ids"][0].append(7)
    source = write_lines(tmp_path / "a.jsonl", [scored("a", 1.0), broken])
    with pytest.raises(JobError, match=r"a\.jsonl:2: row 'b': .*completion 0: 3 token ids and"):
        convert(source, tmp_path / "b.parquet", drop_failed_rows=True)


def test_files_that_were_put_together_are_numbered_anew(tmp_path: Path) -> None:
    first = rollout_file(tmp_path / "a.parquet", row(response="1"))
    convert(first, tmp_path / "a.jsonl", to_format="ep")
    second = tmp_path / "b.parquet"
    how = msgspec.structs.replace(SAMPLING, model="n", temperature=0.5)
    other = FileMetadata(rewards={"reward_b": REWARD_B}, sampling=how)
    write_rows(second, schema(other, {}), [row(response="2", temperature=0.5)])
    convert(second, tmp_path / "b.jsonl", to_format="ep")
    both = tmp_path / "both.jsonl"
    both.write_bytes((tmp_path / "a.jsonl").read_bytes() + (tmp_path / "b.jsonl").read_bytes())
    summary = convert(both, tmp_path / "both.parquet")
    assert summary.notes == ("rows of several files: data_idx is their number in this one",)
    data = RolloutDataset(tmp_path / "both.parquet")
    assert [(r.response, r.data_idx, r.temperature) for r in data] == [("1", 0, 1.0), ("2", 1, 0.5)]
    assert data.metadata.rewards == {"reward_b": REWARD_B}
    models = [r["execution_metadata"]["extra"]["sampling"]["model"] for r in data.training_rows()]
    assert models == ["m", "n"]


def test_a_value_that_has_no_column_leaves_no_file(tmp_path: Path) -> None:
    rows = [scored("a", 1.0), scored("b", 1.0, seeds=[2**63])]
    source = write_lines(tmp_path / "a.jsonl", rows)
    with pytest.raises(JobError, match="a value does not fit its column"):
        convert(source, tmp_path / "b.parquet")
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_what_json_cannot_hold_is_said(tmp_path: Path) -> None:
    numbers = (1.0, float("nan"), float("inf"))
    rows = [row(data_idx=i, original={"x": value}) for i, value in enumerate(numbers)]
    source = rollout_file(tmp_path / "a.parquet", *rows, x=pa.float64())
    summary = convert(source, tmp_path / "a.jsonl", to_format="ep")
    said = "2 values of original_x are NaN or infinite, which is null in JSON"
    assert summary.notes == (said,)

    days = [datetime.date(2020, 1, 2)]
    source = rollout_file(
        tmp_path / "b.parquet", row(original={"x": days}), x=pa.list_(pa.date32())
    )
    summary = convert(source, tmp_path / "b.jsonl", to_format="ep")
    assert summary.notes == (
        "column original_x is list<element: date32[day]>, which is text in JSON",
    )
    [line] = lines_of(tmp_path / "b.jsonl")
    assert line["input_metadata"]["dataset_info"] == {"x": ["2020-01-02"]}


def test_a_file_is_not_written_over_by_accident(tmp_path: Path) -> None:
    source = rollout_file(tmp_path / "a.jsonl")
    link = tmp_path / "link.jsonl"
    link.symlink_to(source)
    for target in (source, link):
        with pytest.raises(JobError, match="that is the file to be read"):
            convert(source, target, overwrite=True)
    there = tmp_path / "b.parquet"
    there.write_text("mine")
    with pytest.raises(JobError, match="say --overwrite"):
        convert(source, there)
    assert there.read_text() == "mine"
    convert(source, there, overwrite=True)
    assert len(RolloutDataset(there)) == 1


def test_a_file_that_cannot_be_told_apart_is_asked_about(tmp_path: Path) -> None:
    cases = {
        "x.jsonl": (b'{"question": "q"}\n', JobError, "which format is this.*question"),
        "y.jsonl": (b"\n\nno json\n", JobError, "y.jsonl:3: neither Parquet nor JSON"),
        "z.jsonl": (b"", JobError, "an empty file"),
        "p.parquet": (b"PAR1 and no more", JobError, "not a whole Parquet file"),
        "e.jsonl": (
            b'{"messages": [], "execution_metadata": {}}\n[]\n',
            JobError,
            "e.jsonl:1: row None: it has no rollout",
        ),
        "f.jsonl": (b'{"data_idx": 0, "sample_idx": 0, "completion_ids": [], "response": ""}\n',
                    FormatError, "f.jsonl.metadata.json is not beside it"),
    }  # fmt: skip
    for name, (content, kind, message) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(kind, match=message):
            convert(tmp_path / name, tmp_path / "out.parquet")
    with pytest.raises(JobError, match="no such file"):
        convert(tmp_path / "none.jsonl", tmp_path / "out.parquet")
    with pytest.raises(JobError, match="a folder"):
        convert(tmp_path, tmp_path / "out.parquet")
    write_lines(tmp_path / "g.jsonl", [scored("a", 1.0), []])
    with pytest.raises(TrainingDataError, match=r"g\.jsonl, line 2"):
        convert(tmp_path / "g.jsonl", tmp_path / "out.parquet")


@pytest.mark.parametrize(
    ("name", "kind", "endings"),
    [
        ("b.txt", "rollouts", ".parquet, .jsonl or .ndjson"),
        ("b.parquet", "ep", ".jsonl"),
        ("b.jsonl", "verl", ".parquet or .json"),
    ],
)
def test_a_target_is_called_what_its_readers_expect(
    tmp_path: Path, name: str, kind: Any, endings: str
) -> None:
    source = rollout_file(tmp_path / "a.parquet")
    with pytest.raises(JobError, match=f"must end in {endings}$"):
        convert(source, tmp_path / name, to_format=kind)


def test_rollouts_of_an_unfinished_job_are_converted_and_called_that(tmp_path: Path) -> None:
    fields = schema(FileMetadata(sampling=SAMPLING), {})
    keys = functools.partial(row_keys, position=None)
    store = JobStore(parts_folder(tmp_path / "a.parquet"), fields, keys)
    store.append(to_record_batch([row()], fields))
    store.close()
    summary = convert(tmp_path / "a.parquet", tmp_path / "b.jsonl", to_format="ep")
    assert summary.notes == ("the job of this file is not finished",)
    assert summary.completions == 1


def test_the_command_says_what_it_did_and_what_is_wrong(tmp_path: Path) -> None:
    source = str(write_lines(tmp_path / "a.jsonl", [scored("a", 1.0, 0.0), failed_row("b")]))
    target = str(tmp_path / "b.parquet")
    assert refused("convert", source, target).count("\n") == 1
    done = ep_rft("convert", source, target, "--drop-failed-rows")
    assert done.exit_code == 0
    assert done.stdout == (
        f"{target} (rollouts): 2 completions of 1 data rows\n"
        "1 rows whose rollout failed are not in the output\n"
    )
    wrong = refused("convert", source, target, "--overwrite", "--from", "trl")
    assert "only Parquet that" in wrong
    assert ep_rft("convert", source, target, "--to", "tinker").exit_code == 2


def test_commands_on_rollouts_take_what_a_test_wrote(tmp_path: Path) -> None:
    results = tmp_path / "results" / "case"
    results.mkdir(parents=True)
    rollouts = write_rollouts(tmp_path / "r.parquet", [["0", "aa"], ["b", ""]])
    grader = f"{Path(__file__).with_name('score_graders.py')}::length"
    score = ("-e", grader, "--workers", 1, "--quiet", "--overwrite")
    succeed("score", rollouts, *score)
    convert(rollouts, results / "run.jsonl", to_format="ep")
    with (results / "run.jsonl").open("a") as lines:
        lines.write(json.dumps(failed_row("c")) + "\n")
    (results / "._run.jsonl").write_bytes(b"Mac")
    before = (results / "run.jsonl").read_bytes()
    for path in (tmp_path / "results", results / "run.jsonl"):
        done = succeed("stats", path)
        assert "2 prompts, 4 completions" in done.stdout
        assert "1 rows whose rollout failed" in done.stderr
        assert "4 completions" in succeed("report", path, "-o", tmp_path / "x.html").stdout
        assert "4 datums" in succeed("datums", path, "-o", tmp_path / "x.npz", "--overwrite").stdout
        kept = ("filter", path, "-o", tmp_path / "x.parquet", "--overwrite", "--reward-min", 1)
        assert "kept 3 of 4" in succeed(*kept).stdout
        assert "name another file with -o" in refused("score", path, *score)
        scored_again = succeed("score", path, *score, "-o", tmp_path / "s.parquet").stdout
        assert "4 of 4 completions" in scored_again
    assert (results / "run.jsonl").read_bytes() == before
    (tmp_path / "empty").mkdir()
    assert "no .jsonl file inside" in refused("stats", tmp_path / "empty")
