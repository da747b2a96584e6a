"""A user's project in a process of its own: found as `ep upload` finds it, run as pytest runs it,
logged to Eval Protocol's own database."""

import json
import os
import sqlite3
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from eval_protocol.models import EvaluationRow

from eval_protocol_rft.record import RolloutRecord
from tests.scored_rows import rewards

PROJECT = '''
from eval_protocol.models import EvaluationRow
from eval_protocol.pytest import evaluation_test

from eval_protocol_rft import SlimLogger, score_each_completion
from tests.scored_rows import Canned, asked, give, said


@evaluation_test(
    input_rows=[[asked("1+1?"), asked("2+2?")]],
    completion_params=[{"model": "m", "extra_headers": {"Authorization": "Bearer hush"}}],
    rollout_processor=Canned({"1+1?": ("2", "3"), "2+2?": ("4", "x")}, first_token=777_000_000),
    logger=SlimLogger(),
)
@score_each_completion
def test_sums(row: EvaluationRow) -> EvaluationRow:
    """Is the sum right?"""
    return give(row, float(int(said(row)) == {"1+1?": 2, "2+2?": 4}[row.messages[0].content]))
'''

DISCOVER_AND_RUN = """
import json, os, sys
import pytest
from eval_protocol.cli_commands.utils import _build_entry_point, _discover_tests

found = [
    {"entry": _build_entry_point(os.getcwd(), test.file_path, "test_sums"), "line": test.lineno}
    for test in _discover_tests(os.getcwd())
]
with open("found.json", "w") as file:
    json.dump(found, file)
sys.exit(pytest.main(["-q", found[0]["entry"]]))
"""


@dataclass(frozen=True)
class Outcome:
    found: list[dict]
    saved: list[EvaluationRow]
    database: Path


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    root = tmp_path_factory.mktemp("project")
    (root / "evals").mkdir()
    (root / "evals" / "test_sums.py").write_text(PROJECT)
    environment = {
        **os.environ,
        "HOME": str(root),
        "EP_OUTPUT_DIR": str(root / "out"),
        "DISABLE_EP_SQLITE_LOG": "0",
        "PYTHONPATH": str(Path(__file__).parent.parent),
    }
    run = subprocess.run(
        [sys.executable, "-c", DISCOVER_AND_RUN],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    (saved,) = (root / "out").rglob("*.jsonl")
    (database,) = root.rglob("logs.db")
    return Outcome(
        found=json.loads((root / "found.json").read_text()),
        saved=[EvaluationRow(**json.loads(line)) for line in saved.read_text().splitlines()],
        database=database,
    )


def test_discovery_names_the_user_s_file_and_line(outcome):
    line = PROJECT.splitlines().index("@evaluation_test(") + 1
    assert outcome.found == [{"entry": "evals/test_sums.py::test_sums", "line": line}]


def test_the_rows_that_eval_protocol_saves_hold_every_reward_and_the_exact_tokens(outcome):
    assert {row.messages[0].content: rewards(row) for row in outcome.saved} == {
        "1+1?": [1.0, 0.0],
        "2+2?": [1.0, None],
    }
    for row in outcome.saved:
        record = RolloutRecord.from_extra(row.execution_metadata.extra)
        assert record.completion_ids[0][0] >= 777_000_000


def test_the_database_holds_the_rewards_and_neither_tokens_nor_credentials(outcome):
    connection = sqlite3.connect(outcome.database)
    tables = [name for (name,) in connection.execute("select name from sqlite_master")]
    rows = [json.loads(data) for (data,) in connection.execute("select data from evaluationrow")]
    connection.close()
    assert "event" in tables
    extras = [row["execution_metadata"]["extra"] for row in rows]
    assert sorted(extra["rewards"][1] is None for extra in extras) == [False, True]
    assert all(extra["token_counts"] == {"prompt": 3, "completions": [2, 2]} for extra in extras)
    # Every file of it, the journal too: rows were logged from before the rollout on.
    written = b"".join(path.read_bytes() for path in outcome.database.parent.glob("logs.db*"))
    assert b"1+1?" in written
    assert b"777000" not in written
    assert b"hush" not in written
