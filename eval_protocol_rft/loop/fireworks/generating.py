"""The data of one step: rows rolled out against the deployment, scored, as the job's text lines.

Invariant: every completion that was asked for is in the lines or counted in the report.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from eval_protocol_rft.loop.fireworks.run_state import StepReport
from eval_protocol_rft.training.export import rl_step

if TYPE_CHECKING:
    from eval_protocol.models import EvaluationRow
    from eval_protocol.pytest.rollout_processor import RolloutProcessor

    from eval_protocol_rft.row_runner import RowRunner

Failures = Literal["raise", "drop"]


async def generate(
    evaluator: Callable[..., Any],
    rows: Sequence[EvaluationRow | Mapping[str, Any]],
    *,
    step: int,
    completion_params: Mapping[str, Any],
    processor: RolloutProcessor | None,
    failures: Failures,
) -> tuple[bytes, StepReport]:
    """Sample and score `rows`; return the lines of the data set, and what is in them.

    Raises:
        Exception: whatever a row raises, unless it is one that failed and may be dropped.
        TrainingDataError: a completion has no score, unless it may be dropped.
        EmptyBatchError: nothing is left.
    """
    from eval_protocol_rft.row_runner import RowRunner

    params = dict(completion_params)
    if params.get("seed") is not None:
        # Or every step would draw its completions with the same random numbers.
        params["seed"] += step
    runner = RowRunner(evaluator, processor=processor, completion_params=params)
    try:
        scored = await _roll_out(runner, rows, failures)
    finally:
        await runner.aclose()
    done = [row for row in scored if row is not None]
    unscored: rl_step.Unscored = "drop" if failures == "drop" else "error"
    data = rl_step.to_lines(done, unscored=unscored)
    scores = [sample["evals"]["score"] for line in data.lines for sample in line["samples"]]
    dropped = Counter(data.dropped)
    dropped["failed_row"] += len(scored) - len(done)
    report = StepReport(
        step=step,
        model=params["model"],
        groups=len(data.lines),
        completions=len(scores),
        mean_score=sum(scores) / len(scores),
        dropped=dict(+dropped),
    )
    return b"".join(msgspec.json.encode(line) + b"\n" for line in data.lines), report


async def _roll_out(
    runner: RowRunner, rows: Sequence[EvaluationRow | Mapping[str, Any]], failures: Failures
) -> list[EvaluationRow | None]:
    """The scored rows in their order; None for one that failed. The first error ends the rest."""
    from eval_protocol_rft.processor import RolloutError

    async def one(row: EvaluationRow | Mapping[str, Any]) -> EvaluationRow | None:
        try:
            return await runner(row)
        except RolloutError:
            if failures == "drop":
                return None
            raise

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(row)) for row in rows]
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]
