"""A small, real run to plan a large one from: a few rows of an evaluation test, sampled and scored
as `train` would.

Invariant: nothing is trained and nothing is written. What fails is counted, not hidden.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge

from eval_protocol_rft import data as room
from eval_protocol_rft import sampling
from eval_protocol_rft._options import Flag
from eval_protocol_rft.loop._measured import Measured, measure_groups
from eval_protocol_rft.loop._setup import merged_params, sampled_request

if TYPE_CHECKING:
    from eval_protocol_rft.loop._rollouts import RowRunner

DRY_ROWS = 16


def dry_run(
    evaluator: Callable[..., Any],
    *,
    dry_rows: Annotated[int, Ge(1), Flag(panel="The dry run")] = DRY_ROWS,
    data: Annotated[
        Sequence[room.PathOrGlob] | None, Flag(panel="The dry run", unset="the test's")
    ] = None,
    completion_params: Mapping[str, Any] | None = None,
    seed: Annotated[int, Flag(panel="The dry run")] = 0,
    source: str = "dry run",
    progress: bool | None = None,
) -> Measured:
    """Sample and score a few rows, and measure what they took.

    Args:
        evaluator: a function under `@evaluation_test`.
        dry_rows: rows to sample.
        data: in place of the test's data set; repeatable.
        completion_params: joined with the test's, and before them.
        seed: draws the rows, and the completions of a local model.
        source: what the plan calls it.
        progress: False for none; None for what stderr can show.

    Raises:
        SetupError, SourceError, ParamsError: something given is wrong; nothing was asked.
        RunStoppedError: nothing answers where it samples, or everything is refused.
        PlanError: no completion came back.
    """
    # Eval Protocol takes seconds to import, and the options above are read for `--help`, too.
    from eval_protocol_rft.loop._data import load_rows
    from eval_protocol_rft.loop._rollouts import RowRunner

    rows = load_rows(evaluator, data)
    if len(rows) > dry_rows:
        rows = random.Random(seed).sample(rows, dry_rows)  # noqa: S311 - no secret
    params = merged_params(evaluator, completion_params)
    request = sampled_request(params)
    if request.in_process:
        # A seed draws the same tokens here; other servers may not take one.
        params.setdefault("seed", seed)
    runner = RowRunner(evaluator, completion_params=params)
    return asyncio.run(_measured(runner, rows, source, progress, request.endpoint))


async def _measured(
    runner: RowRunner,
    rows: Sequence[Any],
    source: str,
    progress: bool | None,
    endpoint: sampling.Endpoint | None,
) -> Measured:
    from eval_protocol_rft.loop._rollouts import roll_out

    if endpoint is not None:
        await sampling.reach(endpoint)
    began = time.perf_counter()
    done = 0
    with room.reporter("dry run", len(rows), show=progress, stays=False) as shown:

        async def one(row: Any) -> Any:
            nonlocal done
            group = await roll_out(runner, row, run=0)
            done += 1
            shown.update(done, detail=f"n={runner.n}")
            return group

        tasks = [asyncio.ensure_future(one(row)) for row in rows]
        try:
            groups = await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await runner.aclose()
    return measure_groups(groups, source=source, seconds=time.perf_counter() - began)
