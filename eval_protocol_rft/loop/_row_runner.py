"""One row at a time through a rollout processor and an evaluator, outside a test.

Invariant: what `@evaluation_test` says holds here too (processor, completion params, data set
adapter, keyword arguments of the evaluator), the caller's row is never changed, and whatever goes
wrong is raised.
"""

from __future__ import annotations

import asyncio
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, TypedDict

from eval_protocol.human_id import generate_id, num_combinations
from eval_protocol.models import EPParameters, EvaluationRow, Status
from eval_protocol.pytest.rollout_processor import RolloutProcessor
from eval_protocol.pytest.types import RolloutProcessorConfig

from eval_protocol_rft.record import is_failure
from eval_protocol_rft.rollout import (
    RUN_KEYWORD,
    lost_tokenizer,
    parse_completion_params,
    redact_params,
)
from eval_protocol_rft.sampling import StragglerPolicy, support_truncated
from eval_protocol_rft.scoring import (
    Mode,
    adapt,
    ascore_rows,
    inner_evaluator,
    parameters_of,
    sets_of,
)
from eval_protocol_rft.training import BiasedSamplingWarning

DEFAULT_CONCURRENCY = 96
"""Completions in flight; Eval Protocol's own default."""


class RunnerOptions(TypedDict, total=False):
    """Options of `RowRunner` as keyword arguments."""

    processor: RolloutProcessor | None
    completion_params: Mapping[str, Any] | None
    evaluation_test_kwargs: Mapping[str, Any] | None
    max_concurrency: int | None


class RowRunner:
    """Rolls out and scores rows, one a call; calls may run concurrently.

    Args:
        evaluator: a function under `@evaluation_test`, or a plain evaluator of `row` or `rows`.
        processor: in place of the one that the evaluation test names; needed without one. It must
            leave rollout records, as `FireworksTrainingRolloutProcessor` does.
        completion_params: joined with those of the evaluation test, and before them. A test with
            several sets needs them whole.
        evaluation_test_kwargs: further arguments of the evaluator; default the test's own.
        max_concurrency: completions in flight; default the test's `max_concurrent_rollouts`.

    Raises:
        ValueError: an option is missing, wrong, or one of several.
        EvaluatorError: the function cannot be an evaluator.
    """

    def __init__(
        self,
        evaluator: Callable[..., Any],
        *,
        processor: RolloutProcessor | None = None,
        completion_params: Mapping[str, Any] | None = None,
        evaluation_test_kwargs: Mapping[str, Any] | None = None,
        max_concurrency: int | None = None,
    ) -> None:
        if max_concurrency is not None and max_concurrency < 1:
            raise ValueError(f"max_concurrency must be at least 1, got {max_concurrency}")
        test = parameters_of(evaluator)
        self._test = test or EPParameters(max_concurrent_rollouts=DEFAULT_CONCURRENCY)
        self._evaluator = evaluator
        self.mode = _mode(evaluator, test)
        """`pointwise` or `groupwise`."""
        chosen = processor or self._test.rollout_processor
        if chosen is None:
            raise ValueError(
                "without @evaluation_test there is no rollout processor: pass "
                "processor=FireworksTrainingRolloutProcessor(...)"
            )
        self._processor: RolloutProcessor = chosen
        self._completion_params = _completion_params(self._test, completion_params)
        self._kwargs = _kwargs(self._test, evaluation_test_kwargs)
        request = parse_completion_params(self._completion_params)
        if request.tokenizer is None and not getattr(chosen, "names_tokenizer", True):
            problem = lost_tokenizer(evaluator, self._test.completion_params)
            if problem is not None:
                raise ValueError(problem)
        self.n = request.n
        """Completions per row."""
        if request.params.temperature == 0 or support_truncated(request.params):
            warnings.warn(
                "completion_params sample greedily or from a truncated support (temperature, "
                "top_p, top_k): importance ratios over such completions are biased",
                BiasedSamplingWarning,
                stacklevel=3,
            )
        stragglers = getattr(chosen, "stragglers", None)
        if isinstance(stragglers, StragglerPolicy) and stragglers:
            warnings.warn(
                "the rollout processor cancels slow completions (over_sample, straggler_seconds), "
                "which favours short ones",
                BiasedSamplingWarning,
                stacklevel=3,
            )
        self._slots = max_concurrency or self._test.max_concurrent_rollouts
        self._semaphore: tuple[asyncio.AbstractEventLoop, asyncio.Semaphore] | None = None
        self._experiment_id = generate_id()
        self._calls: Counter[str] = Counter()
        self._is_set_up = False

    async def __call__(
        self, row: EvaluationRow | Mapping[str, Any], *, run: int | None = None
    ) -> EvaluationRow:
        """Roll out and score a copy of `row`.

        Args:
            row: an `EvaluationRow`, or a line of the data set, which goes through the evaluation
                test's `dataset_adapter` and `preprocess_fn`. Calls with one row are its runs,
                numbered in order of call: each draws its own completions.
            run: the number of this run, in place of the order of call.

        Returns:
            The row with its rollout record and a reward per completion.

        Raises:
            ValueError: the adapter makes other than one row of it, or the processor other than one
                task.
            Exception: whatever the processor raises.
        """
        if not self._is_set_up:
            self._processor.setup()
            self._is_set_up = True
        prepared = self._prepared(row, run)
        number = (prepared.execution_metadata.extra or {})["run_index"]
        tasks = self._processor([prepared], self._config(number))
        if len(tasks) != 1:
            raise ValueError(f"the rollout processor made {len(tasks)} tasks of one row")
        rolled_out = await tasks[0]
        if not is_failure(rolled_out.rollout_status.code):
            rolled_out.rollout_status = Status.rollout_finished()
        scored = await ascore_rows(
            [rolled_out],
            self._evaluator,
            mode=self.mode,
            evaluation_test_kwargs=self._kwargs,
        )
        return scored[0]

    async def aclose(self) -> None:
        """Release what the processor holds in this event loop."""
        # Eval Protocol below 0.3.25 has none.
        acleanup = getattr(self._processor, "acleanup", None)
        if acleanup is not None:
            await acleanup()
        self._processor.cleanup()

    def _config(self, run: int) -> RolloutProcessorConfig:
        loop = asyncio.get_running_loop()
        if self._semaphore is None or self._semaphore[0] is not loop:
            self._semaphore = (loop, asyncio.Semaphore(self._slots))
        logger = {} if self._test.logger is None else {"logger": self._test.logger}
        return RolloutProcessorConfig(
            completion_params=dict(self._completion_params),
            mcp_config_path=self._test.mcp_config_path or "",
            semaphore=self._semaphore[1],
            server_script_path=self._test.server_script_path,
            steps=self._test.steps,
            kwargs={**(self._test.rollout_processor_kwargs or {}), RUN_KEYWORD: run},
            exception_handler_config=self._test.exception_handler_config,
            **logger,
        )

    def _prepared(self, given: EvaluationRow | Mapping[str, Any], run: int | None) -> EvaluationRow:
        """A row of our own, with the ids that Eval Protocol would give it."""
        row = self._adapted(given)
        if row.input_metadata.row_id is None:
            index = abs(hash(row)) % num_combinations()
            row.input_metadata.row_id = generate_id(seed=0, index=index)
        row_id = row.input_metadata.row_id
        if run is None:
            run, self._calls[row_id] = self._calls[row_id], self._calls[row_id] + 1
        row.input_metadata.completion_params = redact_params(self._completion_params)
        metadata = row.execution_metadata
        metadata.experiment_id = self._experiment_id
        metadata.rollout_id = generate_id()
        metadata.extra = {**(metadata.extra or {}), "run_index": run}
        return row

    def _adapted(self, given: EvaluationRow | Mapping[str, Any]) -> EvaluationRow:
        if isinstance(given, EvaluationRow):
            return given.model_copy(deep=True)
        if not isinstance(given, Mapping):
            raise ValueError(
                f"a row is an EvaluationRow or a dict of the data set, not {type(given).__name__}"
            )
        rows = adapt(self._test, [given])
        if self._test.preprocess_fn is not None:
            rows = self._test.preprocess_fn(rows)
        if len(rows) != 1:
            raise ValueError(
                f"the data set adapter made {len(rows)} rows of one: pass EvaluationRows"
            )
        # An adapter may return rows that it keeps.
        return rows[0].model_copy(deep=True)


def _mode(evaluator: Callable[..., Any], test: EPParameters | None) -> Mode:
    parameter = inner_evaluator(evaluator).parameter
    if test is not None and test.mode == "all":
        raise ValueError(
            'the evaluation test has mode="all": it judges a whole data set in one call, and here '
            "rows come one at a time"
        )
    return "pointwise" if parameter == "row" else "groupwise"


def _completion_params(test: EPParameters, given: Mapping[str, Any] | None) -> dict[str, Any]:
    sets = sets_of(test, "completion_params")
    if len(sets) > 1:
        if given is None:
            raise ValueError(
                f"the evaluation test has {len(sets)} sets of completion_params: pass the one to "
                "sample with as completion_params="
            )
        return dict(given)
    return {**(sets[0] if sets else {}), **(given or {})}


def _kwargs(test: EPParameters, given: Mapping[str, Any] | None) -> Mapping[str, Any]:
    sets = sets_of(test, "evaluation_test_kwargs")
    if given is None and len(sets) > 1:
        raise ValueError(
            f"the evaluation test has {len(sets)} sets of evaluation_test_kwargs: pass the one to "
            "score with as evaluation_test_kwargs="
        )
    return dict(given if given is not None else sets[0] if sets else {})
