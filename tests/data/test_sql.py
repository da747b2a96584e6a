"""SQL over rollout files: what it sees, what it may do, and how it ends."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eval_protocol_rft.data import run_query
from eval_protocol_rft.data._filter import FilterRules, filter_rollouts
from eval_protocol_rft.data._sql import plain_rows
from eval_protocol_rft.data._stats import rollout_stats
from tests.data.servers import refused, succeed
from tests.scored_files import FAILED, Sampled, groups_of_completions, write

GROUPS = [
    [Sampled(1.0, (1, 2)), Sampled(0.0, (3,), truncated=True), FAILED],
    [Sampled(0.5, (4, 5, 6), style=1.0), Sampled(why="crash")],
]


def ask(path: Path, query: str, **options: Any) -> list[tuple[Any, ...]]:
    with run_query(path, query, **options) as batches:
        return [row for batch in batches for row in plain_rows(batch)]


@pytest.mark.parametrize("name", ["rollouts.parquet", "rollouts.jsonl", "odd [1]*'s.parquet"])
def test_completions_have_the_columns_of_the_file_and_rollouts_the_numbers_of_prompts(
    tmp_path: Path, name: str
) -> None:
    path = write(tmp_path / name, GROUPS)
    assert ask(
        path, "select data_idx, sample_idx, reward, tokens, passed, original_level from completions"
    ) == [
        (0, 0, 1.0, 2, True, 0),
        (0, 1, 0.0, 1, False, 0),
        (0, 2, None, None, None, 0),
        (1, 0, 0.5, 3, False, 1),
        (1, 1, None, 1, None, 1),
    ]
    assert ask(path, "select * exclude (ground_truth, tools) from rollouts order by data_idx") == [
        ("row-0", 0, "question 0", 0, '{"all":["a",0]}', 3, 1, 2, 1, 1, 3, 0.5, 0.5, 0.0, 1.0),
        ("row-1", 1, "question 1", 1, '{"all":["a",1]}', 2, 0, 1, 0, 0, 4, 0.0, 0.5, 0.5, 0.5),
    ]


def test_a_further_reward_and_a_threshold_are_those_of_the_numbers(tmp_path: Path) -> None:
    path = write(tmp_path / "f.parquet", GROUPS)
    query = "select num_scored, num_passed, mean_reward from rollouts order by data_idx"
    assert ask(path, query, pass_threshold=0.5) == [(2, 1, 0.5), (1, 1, 0.5)]
    assert ask(path, query, reward="style") == [(0, 0, None), (1, 1, 1.0)]
    with pytest.raises(ValueError, match="no reward 'taste'"):
        ask(path, query, reward="taste")


@settings(deadline=None, max_examples=20)
@given(groups_of_completions(), st.sampled_from([0.2, 1.0]))
def test_statistics_are_what_sql_says_of_the_same_file(
    tmp_path_factory: pytest.TempPathFactory, groups: list[list[Sampled]], threshold: float
) -> None:
    path = write(tmp_path_factory.mktemp("sql") / "f.parquet", groups)
    stats = rollout_stats(path, pass_threshold=threshold)
    [found] = ask(
        path,
        "select count(*), count(*) filter (error is not null), count(reward), sum(len("
        "completion_ids)), avg(reward), stddev_pop(reward), count(*) filter (truncated) "
        "from completions",
    )
    rewards = stats.rewards
    assert found[:3] == (stats.completions, stats.failed, stats.scored)
    assert (found[3] or 0, found[6]) == (stats.tokens, stats.truncated)
    assert found[4:6] == (
        (None, None)
        if rewards is None
        else (pytest.approx(rewards.mean, abs=1e-12), pytest.approx(rewards.std, abs=1e-12))
    )
    per_group = ask(
        path,
        "select data_idx, count(*), count(reward), count(*) filter (passed), avg(reward) "
        "from completions group by data_idx order by data_idx",
        pass_threshold=threshold,
    )
    lines = sorted(stats.per_group, key=lambda line: line.data_idx)
    assert [row[:4] for row in per_group] == [
        (line.data_idx, line.completions, line.scored, line.passed) for line in lines
    ]
    for row, line in zip(per_group, lines, strict=True):
        assert row[4] == (None if line.mean_reward is None else pytest.approx(line.mean_reward))


@pytest.mark.parametrize(
    "query",
    [
        "select * from '{other}'",
        "select * from read_csv('{other}')",
        "select content from read_text('{other}')",
        "select * from glob('{folder}/*')",
    ],
)
def test_a_query_reads_no_other_file_unless_it_may(tmp_path: Path, query: str) -> None:
    path, other = write(tmp_path / "f.parquet", GROUPS), tmp_path / "other.csv"
    other.write_text("secret\n1\n")
    query = query.format(other=other, folder=tmp_path)
    said = refused("sql", path, query)
    assert said.startswith("ep-rft: sql: Permission Error")
    assert said.count("\n") == 1
    assert ask(path, query, other_files=True)


@pytest.mark.parametrize(
    "query",
    [
        "drop view completions",
        "create table t (a int)",
        "copy (select 1) to '{folder}/f.parquet'",
        "copy (select 1) to '{folder}/new.csv'",
        "attach '{folder}/new.db'",
        "set enable_external_access = true",
        "install httpfs",
        "select 1; select 2",
        "",
    ],
)
def test_a_query_only_reads(tmp_path: Path, query: str) -> None:
    path = write(tmp_path / "f.parquet", GROUPS)
    before = path.read_bytes()
    said = refused("sql", "--other-files", path, query.format(folder=tmp_path))
    assert "one query that reads is needed" in said
    assert [found.name for found in tmp_path.iterdir()] == ["f.parquet"]
    assert path.read_bytes() == before


def test_a_variable_of_this_program_is_no_table(tmp_path: Path) -> None:
    assert "numbers" not in refused("sql", write(tmp_path / "f.parquet", GROUPS), "from dataset")


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("select rewrd from completions", 'Referenced column "rewrd" not found.*"reward"'),
        ("selec 1", 'syntax error at or near "selec"'),
        ("select cast(response as int) from completions", "Could not convert string '--' to INT32"),
    ],
)
def test_a_wrong_query_is_one_line(tmp_path: Path, query: str, words: str) -> None:
    said = refused("sql", write(tmp_path / "f.parquet", GROUPS), query)
    assert said.count("\n") == 1
    assert re.search(words, said)


def test_a_file_whose_rows_are_out_of_order_is_refused_as_everywhere(tmp_path: Path) -> None:
    from eval_protocol_rft.data._files import write_rows
    from tests.scored_files import SCHEMA, rows_of

    rows = rows_of(GROUPS)
    write_rows(tmp_path / "f.parquet", SCHEMA, [rows[0], rows[3], rows[1]])
    assert "do not stand together" in refused("sql", tmp_path / "f.parquet", "select 1")


def test_a_table_json_or_csv_is_printed(tmp_path: Path) -> None:
    path = write(tmp_path / "f.parquet", GROUPS)
    query = (
        "select row_id, sum(num_tokens) as tokens, any_value('nan'::double) as odd, "
        "list(prompt) as texts from rollouts group by row_id order by row_id"
    )
    table = succeed("sql", path, query).stdout
    assert "row-0" in table
    lines = succeed("sql", path, query, "--json").stdout.splitlines()
    assert [json.loads(line) for line in lines] == [
        {"row_id": "row-0", "tokens": 3, "odd": "NaN", "texts": ["question 0"]},
        {"row_id": "row-1", "tokens": 4, "odd": "NaN", "texts": ["question 1"]},
    ]
    cells = list(csv.reader(io.StringIO(succeed("sql", path, query, "--csv").stdout)))
    assert cells == [
        ["row_id", "tokens", "odd", "texts"],
        ["row-0", "3", "NaN", '["question 0"]'],
        ["row-1", "4", "NaN", '["question 1"]'],
    ]
    short = succeed("sql", path, "select * from completions", "--limit", 1).stdout
    assert "... and more rows" in short
    assert "choose one of them" in refused("sql", path, query, "--csv", "--json")


def test_nothing_from_the_file_can_draw_on_the_terminal(tmp_path: Path) -> None:
    path = write(tmp_path / "f.parquet", [[Sampled(1.0)]], prompts=["[red]a\x1b[2J\x9b1m"])
    for options in ([], ["--csv"], ["--json"]):
        out = succeed("sql", path, "select prompt from rollouts", *options).stdout
        assert "[red]a" in out
        assert not {"\x1b", "\x9b"} & set(out)


@pytest.mark.parametrize("name", ["in.parquet", "in.jsonl"])
@pytest.mark.parametrize(
    ("where", "kept"),
    [
        ("reward > mean_reward", [(0, 0)]),
        ("reward < 1", [(0, 1), (1, 0)]),
        ("not passed", [(0, 1), (1, 0)]),
        ("error is null and original_level = 1", [(1, 0), (1, 1)]),
        ("tokens = 1 or pass_rate = 0 -- a comment", [(0, 1), (1, 0), (1, 1)]),
        ("data_idx in (select data_idx from rollouts where num_failed = 0)", [(1, 0), (1, 1)]),
    ],
)
def test_a_filter_keeps_what_an_expression_is_true_for(
    tmp_path: Path, name: str, where: str, kept: list[tuple[int, int]]
) -> None:
    path, output = write(tmp_path / name, GROUPS), tmp_path / "out.parquet"
    summary = filter_rollouts(path, output, FilterRules(where=where))
    assert ask(output, "select data_idx, sample_idx from completions") == kept
    assert summary.dropped == {"where": 5 - len(kept)}


def test_an_expression_is_asked_after_the_rules_on_numbers_and_before_those_on_what_is_left(
    tmp_path: Path,
) -> None:
    groups = [[Sampled(1.0, (1,)), Sampled(0.0, (1,)), Sampled(0.0, (1,))], [Sampled(0.0), FAILED]]
    path = write(tmp_path / "in.parquet", groups)
    said = refused(
        "filter", path, "-o", tmp_path / "out.parquet", "--reward-min", 0.0, "--where",
        "reward < 1", "--dedupe-completions", "--min-completions", 2,
    )  # fmt: skip
    assert "failed 1, where 1, duplicate_completion 1, small_group 2" in said


@pytest.mark.parametrize(
    "where",
    ["rewrd > 1", "reward >", "true) from x; drop table x; select (1", "response::int > 0", "1, 2"],
)
def test_a_wrong_expression_is_one_line_and_nothing_is_written(tmp_path: Path, where: str) -> None:
    path = write(tmp_path / "in.parquet", GROUPS)
    said = refused("filter", path, "-o", tmp_path / "out.parquet", "--where", where)
    assert said.startswith(f"ep-rft: where {where!r}: ")
    assert said.count("\n") == 1
    assert [found.name for found in tmp_path.iterdir()] == ["in.parquet"]


def test_only_sql_needs_duckdb(tmp_path: Path) -> None:
    path = write(tmp_path / "f.parquet", GROUPS)
    code = f"""
import sys
sys.modules["duckdb"] = None
from eval_protocol_rft.cli import app
from typer.testing import CliRunner
for arguments in (
    ["stats"], ["show"], ["filter", "-o", {str(tmp_path / "o.parquet")!r}],
    ["sql", "select 1"], ["filter", "-o", {str(tmp_path / "p.parquet")!r}, "--where", "true"],
):
    result = CliRunner().invoke(app, [arguments[0], {str(path)!r}, *arguments[1:]])
    print(result.exit_code, result.stderr.strip())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    install = "needs DuckDB, which is not installed: pip install 'eval-protocol-rft[bulk]'"
    assert done.stdout.splitlines() == [
        "0 ", "0 ", "0 ", f"1 ep-rft: SQL {install}", f"1 ep-rft: a filter with `where` {install}",
    ]  # fmt: skip


def test_numbers_of_no_completions_are_none(tmp_path: Path) -> None:
    path = write(tmp_path / "f.parquet", [[FAILED]])
    assert ask(path, "select pass_rate, mean_reward, num_tokens from rollouts") == [(None, None, 0)]
    assert not any(map(math.isnan, ask(path, "select num_scored from rollouts")[0]))
