"""Rows to scored prompt groups, through a rollout processor and an evaluator, outside a test.

Invariant: what `@evaluation_test` says holds here too (processor, completion params, data set
adapter, keyword arguments of the evaluator), the caller's row is never changed, and whatever goes
wrong is raised by `RowRunner`. `roll_out` gives one group of a row, whatever happens to it: what
went wrong is in the group, as a failure or a failed row. Rows of one wave give the same bits in
whatever order their tasks run.
"""

from __future__ import annotations

import asyncio
import contextlib
import warnings
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar

from eval_protocol.human_id import generate_id, num_combinations
from eval_protocol.models import EPParameters, EvaluationRow, Status
from eval_protocol.pytest.rollout_processor import RolloutProcessor
from eval_protocol.pytest.types import RolloutProcessorConfig

from eval_protocol_rft import rollout, sampling, scoring, training
from eval_protocol_rft.loop._setup import Slots, merged_params
from eval_protocol_rft.record import is_failure

if TYPE_CHECKING:
    from eval_protocol_rft.local import LocalSampler

_T = TypeVar("_T")

PROBE_TOKENS = 32
"""Most tokens of a completion that is sampled for a comparison alone."""
PROBE_RETRY = sampling.RetryPolicy(max_attempts=2, max_seconds=60.0)
"""A step waits for it."""
GATHERING_SECONDS = 30.0
"""How long a wave waits for the next of its requests to be at the sampler. A row that asks for
fewer than expected would otherwise keep it waiting."""
EVALUATION_RUN = 1 << 20
"""The number of evaluation's runs: no epoch of training has its seeds."""

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
        max_concurrency: completions in flight, and environments alive; default the test's
            `max_concurrent_rollouts`. `Slots` are shared with others.

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
        max_concurrency: int | Slots | None = None,
    ) -> None:
        if isinstance(max_concurrency, int) and max_concurrency < 1:
            raise ValueError(f"max_concurrency must be at least 1, got {max_concurrency}")
        test = scoring.parameters_of(evaluator)
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
        self._completion_params = merged_params(evaluator, completion_params)
        self._kwargs = _kwargs(self._test, evaluation_test_kwargs)
        request = rollout.parse_completion_params(self._completion_params)
        if request.tokenizer is None and not getattr(chosen, "names_tokenizer", True):
            problem = rollout.lost_tokenizer(evaluator, self._test.completion_params)
            if problem is not None:
                raise ValueError(problem)
        self.n = request.n
        """Completions per row."""
        if request.params.temperature == 0 or sampling.support_truncated(request.params):
            warnings.warn(
                "completion_params sample greedily or from a truncated support (temperature, "
                "top_p, top_k): importance ratios over such completions are biased",
                training.BiasedSamplingWarning,
                stacklevel=3,
            )
        stragglers = getattr(chosen, "stragglers", None)
        if isinstance(stragglers, sampling.StragglerPolicy) and stragglers:
            warnings.warn(
                "the rollout processor cancels slow completions (over_sample, straggler_seconds), "
                "which favours short ones",
                training.BiasedSamplingWarning,
                stacklevel=3,
            )
        slots = max_concurrency or self._test.max_concurrent_rollouts
        self._slots = slots if isinstance(slots, Slots) else Slots(slots)
        self._experiment_id = generate_id()
        self._calls: Counter[str] = Counter()
        self._is_set_up = False

    async def __call__(
        self, row: EvaluationRow | Mapping[str, Any], *, run: int | None = None
    ) -> EvaluationRow:
        """Roll out and score a copy of `row`.

        Args:
            row: an `EvaluationRow`, or a line of the data set, which goes through the evaluation
                test's `dataset_adapter` and `preprocess_fn`. Where it has `prompt_token_ids`, its
                prompt is these, whatever its messages say. Calls with one row are its runs,
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
        scored = await scoring.ascore_rows(
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
        logger = {} if self._test.logger is None else {"logger": self._test.logger}
        return RolloutProcessorConfig(
            completion_params=dict(self._completion_params),
            mcp_config_path=self._test.mcp_config_path or "",
            semaphore=self._slots.semaphore(),
            server_script_path=self._test.server_script_path,
            steps=self._test.steps,
            kwargs={**(self._test.rollout_processor_kwargs or {}), rollout.RUN_KEYWORD: run},
            exception_handler_config=self._test.exception_handler_config,
            **logger,
        )

    def _prepared(self, given: EvaluationRow | Mapping[str, Any], run: int | None) -> EvaluationRow:
        """A row of our own, with the ids that Eval Protocol would give it."""
        row = self._adapted(given)
        row_id = give_id(row)
        if run is None:
            run, self._calls[row_id] = self._calls[row_id], self._calls[row_id] + 1
        row.input_metadata.completion_params = rollout.redact_params(self._completion_params)
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
        rows = scoring.adapt(self._test, [given])
        if self._test.preprocess_fn is not None:
            rows = self._test.preprocess_fn(rows)
        if len(rows) != 1:
            raise ValueError(
                f"the data set adapter made {len(rows)} rows of one: pass EvaluationRows"
            )
        # An adapter may return rows that it keeps.
        row = rows[0].model_copy(deep=True)
        ids = given.get(rollout.PROMPT_IDS_KEY)
        if ids is not None and rollout.prompt_ids_of(row) is None:
            # Made for messages, it does not know of them; the prompt is these ids all the same.
            info = row.input_metadata.dataset_info or {}
            row.input_metadata.dataset_info = {**info, rollout.PROMPT_IDS_KEY: ids}
        return row


def _mode(evaluator: Callable[..., Any], test: EPParameters | None) -> scoring.Mode:
    parameter = scoring.inner_evaluator(evaluator).parameter
    if test is not None and test.mode == "all":
        raise ValueError(
            'the evaluation test has mode="all": it judges a whole data set in one call, and here '
            "rows come one at a time"
        )
    return "pointwise" if parameter == "row" else "groupwise"


def _kwargs(test: EPParameters, given: Mapping[str, Any] | None) -> Mapping[str, Any]:
    sets = scoring.sets_of(test, "evaluation_test_kwargs")
    if given is None and len(sets) > 1:
        raise ValueError(
            f"the evaluation test has {len(sets)} sets of evaluation_test_kwargs: pass the one to "
            "score with as evaluation_test_kwargs="
        )
    return dict(given if given is not None else sets[0] if sets else {})


def give_id(row: EvaluationRow) -> str:
    """The row's id; a row without one is given the one that Eval Protocol would give it."""
    if row.input_metadata.row_id is None:
        index = abs(hash(row)) % num_combinations()
        row.input_metadata.row_id = generate_id(seed=0, index=index)
    return row.input_metadata.row_id


async def roll_out(
    runner: RowRunner, row: EvaluationRow, *, run: int, greedy: RowRunner | None = None
) -> training.PromptGroup:
    """Sample and score one row; `run` numbers its repetitions, and is part of the seeds. `greedy`
    samples the completion that the others are compared with, where there is one.

    Raises:
        RunStoppedError: the server refuses everything, or answers nothing.
        TrainingDataError: the processor left no rollout record.
    """
    if greedy is not None:
        group, compared = await asyncio.gather(
            roll_out(runner, row, run=run), roll_out(greedy, row, run=run)
        )
        (joined,) = training.group_rows([group, replace(compared, key=group.key)])
        return joined
    try:
        scored = await runner(row, run=run)
    except sampling.RunStoppedError:
        raise
    except Exception as error:  # noqa: BLE001 - the user's processor and evaluator raise anything
        message = f"row {row.input_metadata.row_id}: {type(error).__name__}: {error}"
        return training.PromptGroup(
            key=row.input_metadata.row_id, trajectories=(), failed_rows=(message,)
        )
    try:
        (group,) = training.group_rows([scored])
    except training.TrainingDataError as error:
        raise training.TrainingDataError(
            f"{error} (training needs a processor that leaves rollout records, such as "
            "FireworksTrainingRolloutProcessor)"
        ) from error
    return group


async def sample_prompts(
    processor: rollout.FireworksTrainingRolloutProcessor,
    completion_params: Mapping[str, Any],
    prompts: Sequence[Sequence[int]],
) -> list[training.Trajectory]:
    """A short completion of each prompt, unscored, from what `processor` samples from; those that
    fail are left out."""
    request = processor.request_of(completion_params)
    sampler = await processor.sampler_of(request)
    most = min(request.params.max_tokens or PROBE_TOKENS, PROBE_TOKENS)
    try:
        groups = await asyncio.gather(
            *(
                sampling.sample_group(
                    sampler,
                    sampling.TokenIds(prompt),
                    replace(request.params, max_tokens=most),
                    seeds=[None],
                    slots=contextlib.nullcontext(),
                    retry=PROBE_RETRY,
                )
                for prompt in prompts
            )
        )
    except sampling.RunStoppedError:
        return []  # rollouts meet the same server, and say so
    return [
        training.unscored(prompt, one.completion)
        for prompt, group in zip(prompts, groups, strict=True)
        for one in group.survivors
    ]


async def wave(
    rollouts: Sequence[Coroutine[Any, Any, _T]],
    *,
    sampler: LocalSampler | None,
    per_row: int,
    slots: int | Slots | None = None,
) -> list[_T]:
    """Run all of `rollouts` and return what they return, in order.

    Args:
        rollouts: one per row.
        sampler: where it samples in this process, all requests begin as one batch.
        per_row: requests that each makes at once.
        slots: so many of all these requests can be made at once.
    """
    most = slots.size if isinstance(slots, Slots) else slots or len(rollouts) * per_row
    tasks = [asyncio.ensure_future(one) for one in rollouts]
    try:
        if sampler is not None:
            with sampler.held():
                await _gathered(tasks, sampler, per_row, most)
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _gathered(
    tasks: Sequence[asyncio.Task[Any]], sampler: LocalSampler, per_row: int, most: int
) -> None:
    """Wait until every row that still runs has its requests at the sampler, or `most` are there."""
    loop = asyncio.get_running_loop()
    seen, end = -1, 0.0
    while sampler.pending < min(most, per_row * sum(not task.done() for task in tasks)):
        if sampler.pending != seen:
            seen, end = sampler.pending, loop.time() + GATHERING_SECONDS
        elif loop.time() > end:
            return
        await asyncio.sleep(0.0005)
