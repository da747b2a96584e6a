"""The table shows every completion with its reward and counts what is missing as missing."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from eval_protocol_rft.record import RolloutRecord, SamplingRecord
from eval_protocol_rft.report._html import ReportError
from eval_protocol_rft.report._reading import newest_rows_file, read_rows
from eval_protocol_rft.report._terminal import rollout_table
from eval_protocol_rft.sampling._types import Failure


def _row(
    texts: list[str],
    rewards: list[float | None] | None,
    *,
    failures: list[Failure] | None = None,
    began_at: float = 100.0,
    seconds: float = 2.0,
    row_id: str = "r",
    prompt_ids: list[int] | None = None,
) -> dict[str, Any]:
    size = len(texts)
    record = RolloutRecord(
        prompt_ids=prompt_ids or [1, 2],
        completion_ids=[[5] * (len(text) + 1) for text in texts],
        inference_logprobs=[[-0.5] * (len(text) + 1) for text in texts],
        completions_text=texts,
        truncated=[False] * size,
        finish_reasons=["stop"] * size,
        failures=failures or [],
        rewards=rewards,
        sampling=SamplingRecord(
            model="m",
            temperature=1.0,
            top_p=1.0,
            top_k=0,
            n=size + len(failures or []),
            began_at=began_at,
            indices=list(range(size)),
            seeds=[None] * size,
            policy_versions=[None] * size,
            request_ids=[None] * size,
            attempts=[1] * size,
            seconds=[0.1] * size,
        ),
    )
    return {
        "messages": [
            {"role": "user", "content": "1+1="},
            {"role": "assistant", "content": texts[0]},
        ],
        "input_metadata": {"row_id": row_id},
        "execution_metadata": {
            "extra": {"run_index": 0, **record.to_extra()},
            "rollout_duration_seconds": seconds,
        },
    }


FAILED = {
    "messages": [{"role": "user", "content": "1+1="}],
    "rollout_status": {"message": "HTTP 401: no key"},
}


def _write(folder: Path, rows: list[dict[str, Any]], name: str = "rows.jsonl") -> Path:
    file = folder / name
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def _shown(file: Path, *, width: int = 160) -> str:
    console = Console(record=True, width=width, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(rollout_table(list(read_rows(file))))
    return console.export_text()


def test_sums_count_unscored_and_failed_apart(tmp_path: Path) -> None:
    failure = Failure(index=3, kind="refused", message="no", attempts=1, seconds=0.1)
    rows = [
        _row(["2", "3", "22"], [1.0, 0.0, None], failures=[failure]),
        _row(["2", "2"], [1.0, 1.0], began_at=101.0, seconds=4.0, row_id="s"),
        FAILED,
    ]
    shown = _shown(_write(tmp_path, rows))
    # 2 + 2 + 3 and 2 + 2 tokens, from second 100 to second 105.
    assert "3 prompts, 5 completions, 11 tokens" in shown
    assert "   2 tokens/s" in shown
    assert "1 unscored, 1 completions failed, 1 rows failed" in shown
    # Row 1 has one right answer of two scored: pass@1 1/2, pass@2 1. Row 2: 1 and 1.
    assert "mean reward 0.750   pass@1 0.750   pass@2 1.000" in shown
    assert "m, temperature 1" in shown


def test_rows_with_one_id_are_one_prompt_in_the_sums(tmp_path: Path) -> None:
    """As a data row has that went on with another date in its prompt, or that ran several times."""
    rows = [
        _row(["2", "3"], [1.0, 0.0]),
        _row(["4", "5"], [0.0, 0.0], prompt_ids=[1, 3]),
        _row(["2", "2"], [1.0, 1.0], row_id="s"),
    ]
    shown = _shown(_write(tmp_path, rows))
    assert "2 prompts, 6 completions" in shown
    # One of four and two of two, (0.25 + 1) / 2; no prompt but the first has four.
    assert "pass@1 0.625   pass@4 1.000" in shown


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('"rewards": [1.0', '"rewards": [1e300', "completion 0: reward 1e+300 is beyond 1e+150"),
        ('"rewards": [1.0', '"rewards": [1e400', "out of range"),
        ('"prompt_ids": [1', '"prompt_ids": [-1', "prompt_ids[0] is -1: not a token id"),
    ],
)
def test_a_number_that_cannot_be_is_named_with_its_place(
    tmp_path: Path, old: str, new: str, words: str
) -> None:
    file = _write(tmp_path, [_row(["2"], [1.0]), _row(["2"], [1.0])])
    first, second = file.read_text().splitlines()
    file.write_text(f"{first}\n{second.replace(old, new, 1)}\n")
    with pytest.raises(ReportError, match=rf"rows\.jsonl:2: .*{re.escape(words)}"):
        list(read_rows(file))


def test_rows_without_scores_have_no_mean(tmp_path: Path) -> None:
    shown = _shown(_write(tmp_path, [_row(["2"], None)]))
    assert "mean reward unknown" in shown
    assert "pass@" not in shown
    assert "1 unscored" in shown


def test_the_table_groups_equal_answers_and_names_what_failed(tmp_path: Path) -> None:
    shown = _shown(_write(tmp_path, [_row(["2", "2", "7"], [1.0, 1.0, 0.0]), FAILED]))
    assert "2×2→1" in shown
    assert "1×7→0" in shown
    assert "HTTP 401: no key" in shown
    assert "1 rows failed" in shown


def test_completions_cannot_draw_on_the_terminal(tmp_path: Path) -> None:
    shown = _shown(_write(tmp_path, [_row(["[red]a[/red] \x1b[2Jb"], [0.0])]))
    assert "[red]a[/red]" in shown
    assert "\x1b" not in shown
    assert "\\x1b[2Jb" in shown


@pytest.mark.parametrize("width", [30, 40, 59])
def test_a_narrow_terminal_shows_all_of_it_in_lines(tmp_path: Path, width: int) -> None:
    row = _row(["2", "2", "7"], [1.0, 1.0, 0.0])
    row["messages"][0]["content"] = "a question of many words that is long"
    shown = _shown(_write(tmp_path, [row, FAILED]), width=width)
    assert max(map(len, shown.splitlines())) <= width
    assert "…" not in shown
    words = " ".join(shown.replace("│", " ").split())
    for part in (
        "question",
        "2×2→1",
        "1×7→0",
        "mean reward 0.667",
        "pass@3 1.000",
        "1 rows failed",
    ):
        assert part in words
    assert "mean 0.67" in words
    assert "pass@3 1.000" in shown  # no line ends between a number and what it is of


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"a": 1}', "no row of Eval Protocol: it has no messages"),
        (b'{"messages": [], "input_metadata": {"row_id": 5}}', "input_metadata.row_id: Expected"),
        (b'{"messages": [{"content": 5}]}', "content: Expected"),
        (b'{"messages": [', "truncated"),
        (b'{"messages": 5}', "Expected `array`"),
        (b'\xff{"messages": []}', "malformed"),
        (
            json.dumps({**_row(["2"], [1.0, 0.0][:1])}).replace("-0.5", "0.5", 1).encode(),
            "not a finite logprob",
        ),
    ],
)
def test_a_broken_line_is_named_by_file_and_number(tmp_path: Path, line: bytes, words: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(json.dumps(FAILED).encode() + b"\n\n" + line + b"\n")
    with pytest.raises(ReportError, match=rf"rows\.jsonl:3: .*{words}"):
        list(read_rows(file))


def test_a_folder_stands_for_its_newest_file(tmp_path: Path) -> None:
    import os

    older = _write(tmp_path, [FAILED], "older.jsonl")
    newer = _write(tmp_path, [FAILED], "newer.jsonl")
    os.utime(older, (1, 1))
    assert newest_rows_file(tmp_path) == newer
    with pytest.raises(ReportError, match="no such file"):
        newest_rows_file(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ReportError, match="EP_OUTPUT_DIR"):
        newest_rows_file(tmp_path / "empty")
