"""Which run of its row a call of the processor is: the seeds of its completions come from that.

Invariant: two calls on a row never draw the same completions, unless one is Eval Protocol's retry
of the other, or their caller gave both the same number.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

from eval_protocol.models import EvaluationRow, Message
from eval_protocol.pytest.types import RolloutProcessorConfig

RUN_KEYWORD = "rft_run"
"""In `RolloutProcessorConfig.kwargs`: the number of the run, of callers that number their own."""
RETRY_KEYWORD = "start_server"
"""There too, and False: so Eval Protocol marks a retry."""


class RunNames:
    """Names the run of a row that a call is: successive calls on a row draw anew.

    Eval Protocol's retry of a rollout is the run that it was, and so is a run that its caller
    numbers (`RUN_KEYWORD`). All others are counted per row of an experiment, in order of call.
    Outside of Eval Protocol's tests rows may get a new experiment id each time they are made, or
    all have one; there the row alone counts, and one without an id by its messages.
    """

    def __init__(self) -> None:
        self._calls: Counter[tuple[Any, ...]] = Counter()
        self._rollouts: dict[str, int | str] = {}
        """Rollout id -> the run it was named, for retries."""

    def of(
        self, row: EvaluationRow, messages: Sequence[Message], config: RolloutProcessorConfig
    ) -> int | str:
        keywords = config.kwargs or {}
        if RUN_KEYWORD in keywords:
            run: int | str = keywords[RUN_KEYWORD]
            return run
        metadata = row.execution_metadata
        rollout = metadata.rollout_id or ""
        if keywords.get(RETRY_KEYWORD) is False and rollout in self._rollouts:
            return self._rollouts[rollout]
        index = (metadata.extra or {}).get("run_index")
        index = index if isinstance(index, int) else None
        experiment = metadata.experiment_id if row.eval_metadata is not None else None
        row_key = row.input_metadata.row_id or _digest(messages)
        # With another seed a call draws otherwise anyway, and repeats what that seed once drew.
        seed = (config.completion_params or {}).get("seed")
        key = (experiment, row_key, index, repr(seed))
        call, self._calls[key] = self._calls[key], self._calls[key] + 1
        # The priority scheduler numbers runs, but not the rows that are alike within one.
        run = call if index is None else f"{index}.{call}" if call else index
        self._rollouts[rollout] = run
        return run

    def forget_rollouts(self) -> None:
        """No rollout so far is tried again."""
        self._rollouts.clear()


def _digest(messages: Sequence[Message]) -> str:
    dumps = [message.model_dump_json(exclude_none=True) for message in messages]
    return hashlib.sha256("\0".join(dumps).encode(errors="surrogatepass")).hexdigest()
