"""An evaluator as the `async rollout_fn(row)` that training recipes call.

    from training.utils.rl.rollout.types import RolloutRun, RolloutSample

    def rollout_fn_factory(setup):
        return make_rollout_fn(
            test_answer,
            completion_params=recipe_params(setup) | {"n": 1},
            types=CookbookTypes(sample=RolloutSample, run=RolloutRun),
        )

So it is called by `training.recipes.async_rl_loop` of fw-ai/cookbook at commit 76821fa1, and at
2507496b, whose recipes take `policy_loss` and `synchronous_training`.

Invariant: a call returns the exact tokens and sampling logprobs of its rollout with the evaluator's
score, or the error is seen: raised, or handed to `on_error` by who chose to go on without that
rollout. None is returned in that case alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, Unpack

from eval_protocol.models import EvaluationRow

from eval_protocol_rft._errors import EvalProtocolRftError
from eval_protocol_rft.loop._rollouts import RowRunner, RunnerOptions
from eval_protocol_rft.sampling import is_direct_route
from eval_protocol_rft.training import PromptGroup, TokenBuffer, Trajectory, read_row
from eval_protocol_rft.training.export.cookbook import DICTS, CookbookTypes, to_run


class RolloutFnError(EvalProtocolRftError, RuntimeError):
    """A row, or one completion of it, from which there is nothing to train on."""

    def __init__(
        self, message: str, *, row_id: str | None = None, completion: int | None = None
    ) -> None:
        super().__init__(message)
        self.row_id = row_id
        self.completion = completion
        """Place among the completions asked for; None where the whole row failed."""


OnError = Callable[[Any, RolloutFnError], object]
"""Gets the row as it was passed in, and the error, whose `__cause__` is what was raised."""


def make_rollout_fn(
    evaluator: Callable[..., Any],
    *,
    types: CookbookTypes = DICTS,
    on_error: OnError | None = None,
    **options: Unpack[RunnerOptions],
) -> RolloutFn:
    """`async rollout_fn(row) -> RolloutRun | None`, for recipes that call it once per completion.

    Args:
        evaluator: a function under `@evaluation_test`, or a plain evaluator of `row`.
        types: the recipe's classes; default plain dicts of their fields.
        on_error: called with what went wrong, and the call then returns None, which recipes take
            as a dropped completion. Default: it is raised.
        **options: of `RowRunner`: `processor`, `completion_params`, `evaluation_test_kwargs`,
            `max_concurrency`.

    Raises:
        ValueError: an option is wrong; n is not 1; the evaluator compares the completions of a
            group, which this form never sees together.
    """
    runner = RowRunner(evaluator, **options)
    if runner.n != 1:
        raise ValueError(
            f"completion_params ask for n={runner.n} and a RolloutRun is one trajectory: pass "
            'completion_params={"n": 1}, or use make_group_rollout_fn'
        )
    if runner.mode == "groupwise":
        raise ValueError(
            "the evaluator judges groups of completions, and here each comes alone: use "
            "make_group_rollout_fn"
        )
    return RolloutFn(runner=runner, types=types, on_error=on_error, grouped=False)


def make_group_rollout_fn(
    evaluator: Callable[..., Any],
    *,
    types: CookbookTypes = DICTS,
    on_error: OnError | None = None,
    **options: Unpack[RunnerOptions],
) -> RolloutFn:
    """`async rollout_fn(row) -> Rollout | None`: all n completions of a row, one run each.

    As `make_rollout_fn`, for any n and for groupwise evaluators too. `on_error` is called once for
    each completion that failed or has no score, and the rollout holds the others; the call returns
    None where none is left. Failures that the processor's over-sampling made up for are no errors;
    stragglers at its deadline are.
    """
    runner = RowRunner(evaluator, **options)
    return RolloutFn(runner=runner, types=types, on_error=on_error, grouped=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutFn:
    """Made by `make_rollout_fn` and `make_group_rollout_fn`. Calls may run concurrently."""

    runner: RowRunner
    types: CookbookTypes
    on_error: OnError | None
    grouped: bool
    """A call returns a `Rollout` of all completions, not one `RolloutRun`."""

    async def __call__(self, row: EvaluationRow | Mapping[str, Any]) -> Any:
        """Roll out and score a copy of `row`; see `RowRunner` for what it may be.

        Raises:
            RolloutFnError: something went wrong, and there is no `on_error`.
        """
        runs, errors = await self._outcome(row)
        for error in errors:
            if self.on_error is None:
                if len(errors) > 1:
                    error.add_note(
                        f"{len(errors) - 1} more completions of this row have no run either"
                    )
                raise error
            self.on_error(row, error)
        if not runs:
            return None
        return self.types.rollout(runs=runs, row_meta=None) if self.grouped else runs[0]

    async def aclose(self) -> None:
        """Close what the processor opened in this event loop, before the loop's own end does."""
        await self.runner.aclose()

    async def _outcome(self, given: Any) -> tuple[list[Any], list[RolloutFnError]]:
        """Runs of the scored completions, and an error for each of the others."""
        try:
            row, rollout = await self._scored(given)
        except RolloutFnError as error:
            return [], [error]
        row_id, extra = row.input_metadata.row_id, _extra(row)
        # With over-sampling, others may have made up for those that failed.
        complete = len(rollout.trajectories) >= rollout.asked
        errors = [
            RolloutFnError(
                f"{rollout.name}, completion {failure.index}: {failure.kind}: {failure.message}",
                row_id=row_id,
                completion=failure.index,
            )
            for failure in (() if complete else rollout.failures)
        ]
        runs: list[Any] = []
        for i, trajectory in enumerate(rollout.trajectories):
            if trajectory.reward is None:
                result = extra["completion_results"][i]
                errors.append(
                    RolloutFnError(
                        f"{rollout.name}, completion {trajectory.completion}: not scored: "
                        f"{result.get('error') or 'the evaluator gave no valid score'}",
                        row_id=row_id,
                        completion=trajectory.completion,
                    )
                )
            else:
                runs.append(self._run(row, trajectory, i))
        return runs, errors

    async def _scored(self, given: Any) -> tuple[EvaluationRow, PromptGroup]:
        try:
            row = await self.runner(given)
            rollout = read_row(row, TokenBuffer(0))
        except Exception as error:
            raise RolloutFnError(f"{type(error).__name__}: {error}") from error
        if rollout.failed_rows:
            raise RolloutFnError(
                f"{rollout.name}: {rollout.failed_rows[0]}", row_id=row.input_metadata.row_id
            )
        return row, rollout

    def _run(self, row: EvaluationRow, trajectory: Trajectory, place: int) -> Any:
        extra = _extra(row)
        raw = extra.get("raw_logprobs")
        # Of an episode these are of the first turn alone.
        one_turn = extra.get("trajectories") is None
        return to_run(
            [trajectory],
            types=self.types,
            texts=[extra["completions_text"][place]] if one_turn else None,
            raw_logprobs=[raw[place]] if raw and one_turn else None,
            run_id=f"{row.execution_metadata.rollout_id}/{trajectory.completion}",
            metadata={
                "row_id": row.input_metadata.row_id,
                "completion": trajectory.completion,
                "policy_version": trajectory.policy_version,
            },
        )


def _extra(row: EvaluationRow) -> dict[str, Any]:
    return row.execution_metadata.extra or {}


class RecipeSetup(Protocol):
    """What is read of the `RolloutSetup` that the cookbook's recipes hand a rollout factory."""

    sample_kwargs: dict[str, Any]
    inference_base_url: str
    api_key: str
    model: str
    tokenizer_id: str


def recipe_params(setup: RecipeSetup) -> dict[str, Any]:
    """completion_params that sample where and how a recipe says.

    Raises:
        ValueError: the recipe wants router replay, or its own sampler to be used: neither is done
            here.
    """
    if setup.sample_kwargs.get("include_routing_matrix"):
        raise ValueError(
            "the recipe asks for routing matrices (router replay), which this bridge does not "
            "return: turn router replay off"
        )
    if getattr(setup, "sampler", None) is not None:
        raise ValueError(
            "the recipe brings a sampler of its own, bound to its training session, and this "
            "bridge samples over HTTP: use a recipe with a deployment"
        )
    return {
        **setup.sample_kwargs,
        "model": setup.model,
        "api_base": _api_base(setup.inference_base_url),
        "api_key": setup.api_key,
        "tokenizer": setup.tokenizer_id,
    }


def _api_base(url: str) -> str:
    """Recipes give the gateway, whose completions are under /inference/v1; a direct route has no
    /inference."""
    base = url.rstrip("/")
    if is_direct_route(base) or base.endswith(("/inference", "/v1")):
        return base
    return f"{base}/inference"
