"""Evaluators for the tests of `ep-rft score`. They write down each call in the file CALLS names."""

import asyncio
import os
import time
from pathlib import Path

from eval_protocol.models import EvaluateResult, EvaluationRow, InputMetadata, Message, MetricResult

from eval_protocol_rft.scoring._scorer import score_each_completion
from tests.data.graders import under_test
from tests.scored_rows import give, said


def note(row: EvaluationRow) -> None:
    if calls := os.environ.get("CALLS"):
        with Path(calls).open("a") as file:
            file.write(f"{row.ground_truth} {said(row)}\n")


def has_enough() -> bool:
    """Whether as many calls were made as a test waits for: then none ends any more."""
    most = os.environ.get("HANG_AFTER")
    return bool(most) and len(Path(os.environ["CALLS"]).read_bytes().splitlines()) > int(most)


def length(row: EvaluationRow) -> float:
    note(row)
    if said(row) == "hang":
        time.sleep(60)
    if said(row) == "fail":
        raise LookupError("no such word")
    if said(row) == "nothing":
        return None
    if said(row) == "nan":
        return float("nan")
    return float(len(said(row)))


async def right(row: EvaluationRow) -> EvaluateResult:
    note(row)
    await asyncio.sleep(0)
    return EvaluateResult(
        score=float(said(row) == row.ground_truth),
        reason=f"{said(row)} against {row.ground_truth}",
        metrics={"size": MetricResult(score=0.5, is_score_valid=True, reason="r")},
    )


async def slow(row: EvaluationRow) -> float:
    note(row)
    await asyncio.sleep(600 if has_enough() else 0.02)
    return float(len(said(row)))


def slow_sync(row: EvaluationRow) -> float:
    note(row)
    time.sleep(600 if has_enough() else 0.02)
    return float(len(said(row)))


async def gated(row: EvaluationRow) -> float:
    """What says `wait` is judged when the file GO is there."""
    note(row)
    if said(row) == "wait":
        await asyncio.to_thread(wait_for_go)
    return 1.0


def wait_for_go() -> None:
    while not may_go():
        time.sleep(0.01)


def may_go() -> bool:
    return Path(os.environ["GO"]).exists()


async def flaky(row: EvaluationRow) -> float:
    """Judges nothing until the file GO is there."""
    note(row)
    if not may_go():
        raise ConnectionError("the judge is away")
    return 1.0


def adapt(rows: list[dict]) -> list[EvaluationRow]:
    return [
        EvaluationRow(
            messages=[Message(role="user", content="not the one that was asked")],
            ground_truth=f"level {row['level']}",
            input_metadata=InputMetadata(dataset_info={"level": row["level"]}),
        )
        for row in rows
    ]


@under_test("pointwise", dataset_adapter=adapt)
@score_each_completion
def test_level(row: EvaluationRow) -> EvaluationRow:
    assert row.messages[0].content != "not the one that was asked"
    level = row.input_metadata.dataset_info["level"] if row.input_metadata.dataset_info else -1
    return give(row, float(level), reason=row.ground_truth)


@under_test("groupwise")
def test_best(rows: list[EvaluationRow]) -> list[EvaluationRow]:
    longest = max(len(said(row)) for row in rows)
    return [give(row, float(len(said(row)) == longest), reason=str(len(rows))) for row in rows]


@under_test("all")
def test_share(rows: list[EvaluationRow]) -> list[EvaluationRow]:
    return [give(row, 1 / len(rows)) for row in rows]
