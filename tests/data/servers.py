"""What the tests of `generate` and `score` share: data sets, the command, and what is in a file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
from typer.testing import CliRunner, Result

from eval_protocol_rft.cli import app
from eval_protocol_rft.data import _job_store as job_store
from eval_protocol_rft.data._dataset import RolloutDataset
from eval_protocol_rft.data._format import CompletionRow
from eval_protocol_rft.data._job_store import parts_folder, read_schema
from tests.stub_server import StubServer

Pair = tuple[int, int]
"""(data_idx, sample_idx)"""
SAMPLED = ("prompt_ids", "completion_ids", "logprobs", "response", "finish_reason", "seed", "error")
"""Columns that do not depend on when and how often a completion was asked for."""


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def texts(count: int) -> list[dict[str, Any]]:
    """Rows with a prompt each, all different."""
    return [{"prompt": f"question {i}", "ground_truth": str(i)} for i in range(count)]


def ep_rft(*arguments: object) -> Result:
    """Run a command in this process."""
    return CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1"}).invoke(app, list(map(str, arguments)))


def succeed(*arguments: object) -> Result:
    result = ep_rft(*arguments)
    assert result.exit_code == 0, result.output
    return result


def refused(*arguments: object) -> str:
    """Run a command that must fail with a message; what it says."""
    result = ep_rft(*arguments)
    assert result.exit_code == 1, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert result.stderr.startswith("ep-rft: "), result.stderr
    return result.stderr


def at(server: StubServer, tokenizer: Path, **options: Any) -> list[Any]:
    """Arguments that sample from `server`."""
    given = {"seed": 1, "max_tokens": 8, "concurrency": 8, **options}
    named = [("--" + key.replace("_", "-"), value) for key, value in given.items()]
    return [
        *("--model", "m", "--base-url", server.url, "--tokenizer", tokenizer, "--quiet"),
        *(part for name, value in named if value is not None for part in (name, value)),
    ]


def rows_by_pair(path: Path) -> dict[Pair, dict[str, Any]]:
    """A finished file; no pair may be there twice."""
    table = pa.concat_tables(RolloutDataset(path).tables())
    rows = {(row["data_idx"], row["sample_idx"]): row for row in table.to_pylist()}
    assert len(rows) == len(table)
    return rows


def sampled(path: Path) -> dict[Pair, dict[str, Any]]:
    """What was sampled, without what depends on when."""
    return {pair: {name: row[name] for name in SAMPLED} for pair, row in rows_by_pair(path).items()}


def pairs(prompts: int, n: int) -> list[Pair]:
    return [(i, k) for i in range(prompts) for k in range(n)]


def stored(output: Path) -> dict[Pair, CompletionRow]:
    """What is on disk of a job, in its file or in what it has so far."""
    if not output.exists() and read_schema(parts_folder(output)) is None:
        return {}
    return {(row.data_idx, row.sample_idx): row for row in RolloutDataset(output)}


def stored_rows(folder: Path) -> list[dict[str, Any]]:
    """What an unfinished job has in its folder."""
    schema = read_schema(folder)
    tables = [] if schema is None else job_store.stored_tables(folder, schema)
    return [row for table in tables for row in table.to_pylist()]
