"""Rollout files of format version 1, and what every command made of them when that was the latest.

`tests/fixtures/version_1` was written by the release before version 2: `single.parquet` by `ep-rft
generate` and `score`, `episodes.parquet` by `ep-rft convert` from rows of Eval Protocol, the lines
by `ep-rft convert` from these, and `results.json` by `results` below.
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from typer.testing import CliRunner

from eval_protocol_rft.cli import app
from tests.report_page_rows import Page

FOLDER = Path(__file__).parents[1] / "fixtures" / "version_1"
FILES = ("single.parquet", "single.jsonl", "episodes.parquet")


def results(name: str) -> dict[str, Any]:
    """What the commands make of a file, in the current folder, to which its folder is copied."""
    shutil.copytree(FOLDER, ".", dirs_exist_ok=True)
    judge = f"{FOLDER / 'judge.py'}::{'whole' if name.startswith('episodes') else 'close'}"
    found: dict[str, Any] = {
        "stats": msgspec.json.decode(_run("stats", name, "--json")),
        "show": _run("show", name).splitlines(),
    }
    _run("report", name, "-o", "report.html")
    page = Page(Path("report.html").read_text(encoding="utf-8"))
    groups = page.index["groups"]
    vocabulary = page.packed("vocabulary")
    found["report"] = {
        "groups": groups,
        "details": [with_tokens(page.packed(f"group-{i}"), vocabulary) for i in range(len(groups))],
        "facts": [fact for fact in page.facts if "version" not in fact[0]],
    }
    found["score"] = _run("score", name, "-o", "s.parquet", "-e", judge, "--name", "n", "--quiet")
    asked = (
        "select data_idx, sample_idx, reward_n, reward_n_reason, reward_n_error from completions"
    )
    found["scores"] = _lines(_run("sql", "s.parquet", "--json", asked))
    rules = ("--min-tokens", "2", "--drop-truncated", "--dedupe-completions", "--drop-failed")
    found["filter"] = _run("filter", name, "-o", "f.jsonl", *rules).splitlines()
    found["filtered"] = _lines(Path("f.jsonl").read_text())
    _run("datums", name, "-o", "d.npz", "--algorithm", "grpo", "--overwrite")
    with np.load("d.npz") as arrays:
        found["datums"] = {key: _digest(arrays[key]) for key in arrays.files if key != "metadata"}
    for to, target in (("rollouts", "c.jsonl"), ("ep", "e.jsonl")):
        found[f"convert to {to}"] = _run("convert", name, target, "--to", to).splitlines()
        found[to] = _lines(Path(target).read_text())
    for to in ("verl", "trl"):
        found[f"convert to {to}"] = _run("convert", name, f"{to}.json", "--to", to, code=None)
        found[to] = _lines(Path(f"{to}.json").read_text()) if Path(f"{to}.json").exists() else None
    asked = {"completions": "select * from completions", "rollouts": "select * from rollouts"}
    found["sql"] = {t: _lines(_run("sql", name, "--json", query)) for t, query in asked.items()}
    return found


def with_tokens(value: Any, vocabulary: list[Any], *, numbers: bool = False) -> Any:
    """What a page shows, with tokens in the place of their numbers, whose order is its own."""
    if isinstance(value, dict):
        return {
            key: with_tokens(item, vocabulary, numbers=key in ("tokens", "prompts"))
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [with_tokens(item, vocabulary, numbers=numbers) for item in value]
    return vocabulary[value] if numbers else value


def _run(*arguments: str, code: int | None = 0) -> str:
    runner = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1"})
    result = runner.invoke(app, list(arguments))
    assert code is None or result.exit_code == code, result.output
    return result.output


def _lines(text: str) -> list[Any]:
    return [msgspec.json.decode(line) for line in text.splitlines() if line]


def _digest(values: np.ndarray) -> str:
    described = f"{values.dtype} {values.shape} ".encode()
    return hashlib.sha256(described + np.ascontiguousarray(values).tobytes()).hexdigest()[:16]
