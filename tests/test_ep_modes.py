"""The processor under the real `@evaluation_test`: every mode, both schedulers, several cases on
one instance. That pytest passes says little, as Eval Protocol passes where it loses rows; so the
rows themselves are looked at."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import pytest
from eval_protocol.models import EvaluationRow

from tests.programs import Zygote
from tests.rollouts import assert_is_what_the_server_sampled, record_of_row, text_of
from tests.stub_server import Seen, Status, StubServer

BEGAN_WITH = {"row-0": 1, "row-1": 1, "row-2": 3, "row-again": 1}
"""Messages of each row."""
N = {"case-a": 4, "case-b": 2, "case-c": 1, "case-d": 1}
MODELS = {"pointwise": ("case-a", "case-b"), "groupwise": ("case-c", "case-d")}
PYTEST = ("-q", "-p", "eval_protocol_rft.pytest_plugin", "tests/ep_modes.py")


@dataclass
class Run:
    """What one run of pytest on `ep_modes.py` left."""

    rows: dict[str, list[EvaluationRow]]
    """Per test: each row as it was logged last."""
    output: str
    processes: int
    requests: list[Seen]


def refuse_once(seen: Seen) -> Status | None:
    """The first request for each completion of the row that says so in its prompt."""
    text = text_of(seen.prompt)
    return Status(400, b"not yet") if "refused" in text and seen.attempt == 1 else None


def run_pytest(
    zygote: Zygote, tmp: Path, tokenizer: Path, *arguments: str, **environment: str
) -> Run:
    with StubServer() as server:
        server.script = refuse_once
        done = zygote.run(
            *PYTEST,
            *arguments,
            program="pytest",
            env={
                "EP_MODES_OUTPUT": str(tmp),
                "EP_MODES_TOKENIZER": str(tokenizer),
                "EP_MODES_SERVER": server.url,
                "HOME": str(tmp),
                **environment,
            },
        )
        requests = server.requests
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    logs = list(tmp.glob("*.jsonl"))
    last: dict[tuple[str, str], EvaluationRow] = {}
    for log in logs:
        for line in log.read_text().splitlines():
            row = EvaluationRow(**json.loads(line))
            last[row.eval_metadata.name, row.execution_metadata.rollout_id] = row
    rows = defaultdict(list)
    for (test, _), row in last.items():
        rows[test].append(row)
    return Run(rows, output, len(logs), requests)


@pytest.fixture(scope="module")
def default_run(zygote, tmp_path_factory, tokenizer_folder) -> Run:
    return run_pytest(zygote, tmp_path_factory.mktemp("default"), tokenizer_folder)


@pytest.fixture(scope="module")
def priority_run(zygote, tmp_path_factory, tokenizer_folder) -> Run:
    tmp = tmp_path_factory.mktemp("priority")
    # mode="all" is never evaluated there, which fails a test unless it is allowed.
    allowed = "--ep-rft-allow-unscored"
    return run_pytest(zygote, tmp, tokenizer_folder, allowed, EP_USE_PRIORITY_SCHEDULER="1")


def finished(rows: list[EvaluationRow]) -> list[EvaluationRow]:
    return [row for row in rows if row.evaluation_result is not None]


def assert_complete(row: EvaluationRow) -> None:
    """Finished, n completions and n rewards that are the server's, one answer more."""
    model = row.input_metadata.completion_params["model"]
    record = record_of_row(row)
    assert row.rollout_status.is_finished()
    assert record.sampling.model == model
    assert record.failures == []
    assert len(record) == N[model]
    assert_is_what_the_server_sampled(record)
    assert record.rewards == [float(len(text)) for text in record.completions_text]
    assert row.evaluation_result.score == pytest.approx(sum(record.rewards) / N[model])
    began_with = BEGAN_WITH[row.input_metadata.row_id]
    assert len(row.messages) == began_with + 1
    assert [message.role for message in row.messages] == (["user", "assistant"] * 2)[
        : began_with + 1
    ]
    assert row.messages[-1].content == record.completions_text[0]


def cases(rows: list[EvaluationRow]) -> Counter[tuple[str, str]]:
    """How often each (row, model) is there."""
    return Counter(
        (row.input_metadata.row_id, row.input_metadata.completion_params["model"]) for row in rows
    )


def each_of(times: int, *row_ids: str, mode: str = "pointwise") -> dict[tuple[str, str], int]:
    return {(row_id, model): times for row_id in row_ids for model in MODELS[mode]}


THREE = ("row-0", "row-1", "row-2")


@pytest.mark.parametrize("num_runs", [1, 3])
@pytest.mark.parametrize("mode", ["pointwise", "all"])
def test_every_row_comes_out_whole_with_the_default_scheduler(default_run, mode, num_runs):
    rows = default_run.rows[f"test_{mode}_{num_runs}"]
    assert cases(rows) == each_of(num_runs, *THREE)
    for row in rows:
        assert_complete(row)


@pytest.mark.parametrize("num_runs", [1, 3])
def test_groupwise_rolls_out_every_case_in_every_case(default_run, num_runs):
    # Eval Protocol's own: groups are over completion_params, and each parametrized case rolls all
    # of them out. So both cases show up twice, once per experiment.
    rows = finished(default_run.rows[f"test_groupwise_{num_runs}"])
    assert cases(rows) == each_of(2 * num_runs, *THREE, mode="groupwise")
    experiments = Counter(row.execution_metadata.experiment_id for row in rows)
    assert sorted(experiments.values()) == [6 * num_runs, 6 * num_runs]
    for row in rows:
        assert_complete(row)


@pytest.mark.parametrize("num_runs", [1, 3])
@pytest.mark.parametrize("mode", ["pointwise", "groupwise"])
def test_every_row_comes_out_whole_with_the_priority_scheduler(priority_run, mode, num_runs):
    rows = finished(priority_run.rows[f"test_{mode}_{num_runs}"])
    assert cases(rows) == each_of(num_runs, *THREE, mode=mode)
    for row in rows:
        assert_complete(row)
    indices = Counter(row.execution_metadata.extra["run_index"] for row in rows)
    assert indices == dict.fromkeys(range(num_runs), 6)


@pytest.mark.parametrize("num_runs", [1, 3])
def test_mode_all_is_never_evaluated_by_the_priority_scheduler(priority_run, num_runs):
    # Eval Protocol rolls the rows out, never calls the evaluator, and the test passes without rows.
    rows = priority_run.rows[f"test_all_{num_runs}"]
    assert finished(rows) == []
    assert cases(rows) == each_of(num_runs, *THREE)
    for row in rows:
        assert row.rollout_status.is_finished()
        assert len(record_of_row(row)) == N[row.input_metadata.completion_params["model"]]
        assert record_of_row(row).rewards is None


@pytest.mark.parametrize("run", ["default_run", "priority_run"])
@pytest.mark.parametrize("mode", ["pointwise", "groupwise"])
def test_no_two_runs_of_a_row_draw_the_same_completion(run, mode, request):
    rows = finished(request.getfixturevalue(run).rows[f"test_{mode}_3"])
    seeds: dict[tuple[str, ...], list[int | None]] = defaultdict(list)
    for row in rows:
        params, metadata = row.input_metadata.completion_params, row.execution_metadata
        key = (metadata.experiment_id, row.input_metadata.row_id, params["model"])
        seeds[key] += record_of_row(row).sampling.seeds
    assert len(seeds) in (6, 12)
    for (_, _, model), drawn in seeds.items():
        assert len(set(drawn)) == len(drawn) == 3 * N[model]


@pytest.mark.parametrize("run", ["default_run", "priority_run"])
def test_a_row_that_eval_protocol_rolls_out_again_has_one_answer(run, request):
    # Each run of the row fails once for good; the evaluation test names our error as retryable.
    done = request.getfixturevalue(run)
    rows = finished(done.rows["test_retried"])
    assert cases(rows) == each_of(2, *THREE, "row-again")
    for row in rows:
        assert_complete(row)
    again = [seen for seen in done.requests if "refused" in text_of(seen.prompt)]
    assert Counter(seen.attempt for seen in again) == {1: 2 * (4 + 2), 2: 2 * (4 + 2)}


@pytest.mark.parametrize("run", ["default_run", "priority_run"])
def test_nothing_is_left_open_or_unawaited(run, request):
    output = request.getfixturevalue(run).output
    for complaint in ("never retrieved", "Unclosed", "loop is closed", "never awaited"):
        assert complaint not in output


def test_xdist_runs_the_cases_in_several_processes(zygote, tmp_path, tokenizer_folder):
    run = run_pytest(zygote, tmp_path, tokenizer_folder, "-n", "2", "-k", "pointwise_3")
    assert run.processes == 2
    told = re.findall(r"test_pointwise_3\S+: 9 rows, (\d+) completions, (\d+) scored", run.output)
    assert sorted(told) == [("18", "18"), ("36", "36")]
    rows = run.rows["test_pointwise_3"]
    assert cases(rows) == each_of(3, *THREE)
    for row in rows:
        assert_complete(row)
