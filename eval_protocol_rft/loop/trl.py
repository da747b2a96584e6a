"""TRL's `GRPOTrainer` (1.0 or newer) on rollouts of an evaluation test.

    rollouts = trl_rollouts(test_answer)
    trainer = GRPOTrainer(
        model=rollouts.model,
        args=GRPOConfig(temperature=rollouts.temperature, max_completion_length=..., ...),
        train_dataset=rollouts.dataset,
        rollout_func=rollouts,
        reward_funcs=rollouts.reward,
    )

Invariant: every completion that TRL trains on was sampled for the row whose prompt it stands at, by
the very weights that TRL holds then, and scored by the evaluator with all that the row has. What
does not fit ends the run before anything is learnt from it.

The seam is TRL's `rollout_func(prompts, trainer)`, called for each batch of generations with the
prompts alone, each repeated `num_generations` times. TRL sends no weights to samplers other than
its own vLLM, so this does, before it samples.
"""

from __future__ import annotations

import asyncio
import os
import threading
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from importlib import metadata
from itertools import groupby
from typing import TYPE_CHECKING, Any, TypeVar

from eval_protocol.models import EvaluationRow

from eval_protocol_rft import training
from eval_protocol_rft.loop import _data as data
from eval_protocol_rft.loop import _setup as setup
from eval_protocol_rft.loop import _watch as watching
from eval_protocol_rft.loop._rollouts import EVALUATION_RUN, RowRunner, roll_out
from eval_protocol_rft.loop._run_options import SetupError
from eval_protocol_rft.loop._trainer import SamplerWeights, WeightSink, version_name
from eval_protocol_rft.rollout import FireworksTrainingRolloutProcessor, RolloutRequest
from eval_protocol_rft.scoring import adapt, parameters_of
from eval_protocol_rft.training.export.trl import recorded_reward, rollout_result

if TYPE_CHECKING:
    from torch import Tensor

    from eval_protocol_rft.local import LocalSampler

_T = TypeVar("_T")

INSTALL = "trl>=1.0"
COMPARED = 8
"""Completions of a batch on which sampler and trainer are compared."""
_RUNS_PER_STEP = 1 << 20
"""Numbers of runs that each step has for itself: a run that is resumed draws anew."""


def trl_rollouts(
    evaluator: Callable[..., Any],
    rows: Sequence[EvaluationRow | Mapping[str, Any]] | None = None,
    *,
    model: str | None = None,
    completion_params: Mapping[str, Any] | None = None,
    weights: str | os.PathLike[str] | None = None,
    seed: int = 0,
    trust_remote_code: bool = False,
    warn: Callable[[str], None] = warnings.warn,
) -> TrlRollouts:
    """Rollouts for `GRPOTrainer(rollout_func=...)`, with the rewards that belong to them.

    Args:
        evaluator: a function under `@evaluation_test`, or a plain evaluator of `row` or `rows`.
        rows: what is trained and evaluated on, as `EvaluationRow`s or lines of the data set, which
            go through the test's adapter; default the test's own data.
        model: in place of the test's: `local/...`, or the name a server knows.
        completion_params: joined with the test's, and before them. TRL's `num_generations` takes
            the place of `n`.
        weights: folder of the weights that a server serves, where sampling is over HTTP; the server
            takes new ones as vLLM in its development mode does, or `ep-rft serve --reloads`.
        seed: of every completion that a model in this process samples, unless completion_params
            have one.
        trust_remote_code: let the model's folder run its own code.
        warn: told what is wrong and not fatal.

    Raises:
        MissingPackageError: TRL is not installed, or older than 1.0.
        SetupError, ParamsError: sampling cannot be set up so; there are no rows, or two with one
            prompt and different answers.
        RefusedError: there is no such local model.
    """
    _require_trl()
    test = parameters_of(evaluator)
    if rows is None:
        chosen = data.load_rows(evaluator)
    else:
        made = (adapt(test, [r]) if not isinstance(r, EvaluationRow) else [r] for r in rows)
        chosen = [row for each in made for row in each]
    params = setup.merged_params(evaluator, completion_params, model=model)
    request = setup.sampled_request(params)
    processor = setup.own_processor(evaluator)
    params, source = setup.first_weights(
        params, processor, weights, hint="(weights=), which TRL trains and which are"
    )
    sampler: LocalSampler | None = None
    sink: WeightSink
    if request.endpoint is not None:
        sink = setup.served_weights(request.endpoint)
    elif request.needs_engine:
        processor, sink = setup.with_engine(processor, request.params.model, trust_remote_code)
    else:
        from eval_protocol_rft.local import LocalSampler

        # One of its own: others that sample from the model keep its weights.
        sampler = LocalSampler.from_pretrained(source, trust_remote_code=trust_remote_code)
        processor, sink = processor.sampling_from(sampler), SamplerWeights(sampler)
        params.setdefault("seed", seed)
    return TrlRollouts(
        evaluator,
        chosen,
        processor=processor,
        params=params,
        request=request,
        sink=sink,
        sampler=sampler,
        model=source,
        warn=warn,
    )


class TrlRollouts:
    """A `rollout_func`, its reward function, and what else `GRPOTrainer` is to be given. Made by
    `trl_rollouts`. Belongs to one trainer."""

    def __init__(
        self,
        evaluator: Callable[..., Any],
        rows: Sequence[EvaluationRow],
        *,
        processor: FireworksTrainingRolloutProcessor,
        params: Mapping[str, Any],
        request: RolloutRequest,
        sink: WeightSink,
        sampler: LocalSampler | None,
        model: str,
        warn: Callable[[str], None],
    ) -> None:
        self.model = model
        """Folder or hub id of the weights that training begins with."""
        self.temperature = request.params.temperature
        """The one sampled with, for `GRPOConfig(temperature=...)`."""
        self.last: training.Mismatch | None = None
        """Sampler against trainer on the last batch of training."""
        drop = processor.drop_trailing_assistant_messages
        self._prompts = [data.prompt_of(row, drop_trailing_assistant=drop) for row in rows]
        self._rows = data.rows_by_prompt(rows, self._prompts)
        self._evaluator, self._processor, self._params = evaluator, processor, params
        self._runners: dict[int, RowRunner] = {}
        """By the number of completions."""
        self._sink = sink
        self._sampler = sampler
        self._max_tokens = request.params.max_tokens
        self._warn = warn
        self._watch = watching.Watch()
        self._trainer: Any = None
        self._published: tuple[int, int] | None = None
        self._step = -1
        self._turns: Counter[str] = Counter()
        """Of each row within a step."""
        self._thread = _LoopThread()

    @property
    def dataset(self) -> Any:
        """The prompts of all rows, for `GRPOTrainer(train_dataset=...)`: a `datasets.Dataset`."""
        datasets = training.require("datasets", install="datasets")
        return datasets.Dataset.from_list([{"prompt": prompt} for prompt in self._prompts])

    def __call__(self, prompts: Sequence[Any], trainer: Any) -> dict[str, list[Any]]:
        """Roll out and score what TRL asks for, with the weights that it holds now.

        Raises:
            SetupError: the trainer's settings contradict how is sampled; or there is no row with
                such a prompt.
            TrainerError: the weights did not reach the sampler.
            TrainingStoppedError: the sampler has other weights than the trainer.
            NothingToTrainOnError: nothing could be scored.
            ExportError: a completion could not be had.
        """
        self._check(trainer)
        training = bool(trainer.model.training)
        count = trainer.num_generations
        if not training:
            count = getattr(trainer, "num_generations_eval", None) or count
        rows = self._find(prompts, count)
        step = int(trainer.state.global_step)
        self._publish(trainer, step)
        groups = self._thread.run(self._sample(rows, count, step, training=training))
        self._require_scores(groups)
        result = rollout_result(groups, prompts=prompts)
        completions = [t for group in groups for t in group.trajectories]
        self._require_version(step, completions)
        if training:
            self._compare(trainer, step, completions)
        return result

    def reward(
        self,
        *,
        reward: Sequence[float | None],
        log_metric: Callable[[str, float], None] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """The reward function: what the evaluator said of each completion."""
        if log_metric is not None and self.last is not None:
            log_metric("sampler/ratio", self.last.mean_ratio)
            log_metric("sampler/k3", self.last.k3)
            log_metric("sampler/compared_tokens", float(self.last.tokens))
        return recorded_reward(reward=reward, **columns)

    def close(self) -> None:
        """Release sampler and connections. Idempotent."""
        self._thread.close(self._aclose)

    def __enter__(self) -> TrlRollouts:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def _aclose(self) -> None:
        for runner in self._runners.values():
            await runner.aclose()
        if self._sampler is not None:
            await self._sampler.aclose()

    def _check(self, trainer: Any) -> None:
        """Once: that the trainer's settings and ours are the same run."""
        if trainer is self._trainer:
            return
        if self._trainer is not None:
            raise SetupError("trl_rollouts(...) belongs to one trainer: make another for this one")
        processes = trainer.accelerator.num_processes
        if processes > 1:
            raise SetupError(
                f"the trainer runs in {processes} processes, and trl_rollouts publishes weights "
                "from one: train in one process"
            )
        if self.reward not in trainer.reward_funcs:
            raise SetupError(
                "the evaluator's rewards are not used: pass reward_funcs=rollouts.reward"
            )
        if float(trainer.args.temperature) != self.temperature:
            raise SetupError(
                f"GRPOConfig has temperature={trainer.args.temperature}, and completions are "
                f"sampled at {self.temperature}: set temperature={self.temperature} there, or in "
                "completion_params"
            )
        most = trainer.args.max_completion_length
        if most is not None and (self._max_tokens is None or self._max_tokens > most):
            raise SetupError(
                f"GRPOConfig has max_completion_length={most}, and completions may have "
                f"{self._max_tokens or 'any number of'} tokens: set max_tokens in "
                f"completion_params to at most {most}, or raise it there"
            )
        self._trainer = trainer

    def _find(self, prompts: Sequence[Any], count: int) -> list[EvaluationRow]:
        """Rows behind `prompts`, one for each `count` repetitions."""
        rows: list[EvaluationRow] = []
        for key, same in groupby(data.prompt_key(prompt) for prompt in prompts):
            times = len(list(same))
            row = self._rows.get(key)
            if row is None:
                raise SetupError(
                    f"no row has the prompt {key[:200]}: train and evaluate on prompts of "
                    "rollouts.dataset, or give trl_rollouts(rows=...) the rows behind yours"
                )
            if times % count:
                raise SetupError(
                    f"TRL gave the prompt of row {row.input_metadata.row_id} {times} times, which "
                    f"is no multiple of the {count} generations of a prompt: set the batch size to "
                    "a multiple of num_generations (num_generations_eval)"
                )
            rows += [row] * (times // count)
        return rows

    def _publish(self, trainer: Any, step: int) -> None:
        model = trainer.accelerator.unwrap_model(trainer.model)
        # Writes in place count up: weights may change between steps too (`load_best_model_at_end`).
        state = (step, sum(parameter._version for parameter in model.parameters()))
        if state == self._published:
            return
        base, weights = _own_weights(model)
        self._thread.run(self._sink.publish(base, weights, step))
        self._published = state

    async def _sample(
        self, rows: Sequence[EvaluationRow], count: int, step: int, *, training: bool
    ) -> list[training.PromptGroup]:
        if step != self._step:
            self._step = step
            self._turns.clear()
        runner = self._runner(count)
        rollouts = [roll_out(runner, row, run=self._run(row, training)) for row in rows]
        return list(await asyncio.gather(*rollouts))

    def _runner(self, count: int) -> RowRunner:
        if count not in self._runners:
            params = {**self._params, "n": count}
            self._runners[count] = RowRunner(
                self._evaluator, processor=self._processor, completion_params=params
            )
        return self._runners[count]

    def _run(self, row: EvaluationRow, training: bool) -> int:
        """Number of a row's run: new in training, always the same one in evaluation."""
        if not training:
            return EVALUATION_RUN
        key = str(row.input_metadata.row_id)
        self._turns[key] += 1
        return (self._step + 2) * _RUNS_PER_STEP + self._turns[key]

    def _require_scores(self, groups: Sequence[training.PromptGroup]) -> None:
        scored = [any(t.reward is not None for t in group.trajectories) for group in groups]
        if self.last is None and not any(scored):
            raise watching.nothing_scored(len(groups), groups[-1])
        # They were sampled at once: failures in a row are those behind the last score, and those of
        # the next batches.
        last = max((i for i, one in enumerate(scored) if one), default=0)
        for group, trains in zip(groups[last:], scored[last:], strict=True):
            self._watch.group(group, trains=trains)

    def _require_version(self, step: int, completions: Sequence[training.Trajectory]) -> None:
        """Where the sampler names its weights, they are those that were published."""
        expected = version_name(step)
        for completion in completions:
            for version in (completion.policy_version, completion.first_policy_version):
                if version not in (None, expected):
                    raise watching.TrainingStoppedError(
                        watching.Trouble(
                            "stale_weights",
                            True,
                            f"step {step}: completion {completion.completion} of row "
                            f"{completion.row_id} was sampled by {version!r}, and {expected!r} "
                            "was published: does another process give this server weights?",
                        )
                    )

    def _compare(self, trainer: Any, step: int, completions: Sequence[training.Trajectory]) -> None:
        """Sampler against trainer on completions from all over the batch."""
        stride = max(1, len(completions) // COMPARED)
        datums = training.comparable(completions[::stride][:COMPARED])
        pairs = training.sampled_pairs(datums, _logprobs(trainer, datums, self.temperature), {0})
        self.last = difference = training.measure(pairs)
        raw = None
        if difference is not None and difference.verdict != "pass" and self.temperature != 1.0:
            raw = training.measure(
                training.sampled_pairs(datums, _logprobs(trainer, datums, 1.0), {0})
            )
        trouble = self._watch.mismatch(
            step, difference, shifted=training.looks_shifted(pairs), raw=raw
        )
        if trouble is not None and trouble.fatal:
            raise watching.TrainingStoppedError(trouble)
        if trouble is not None:
            self._warn(trouble.message)


def _require_trl() -> None:
    """Without importing it, which takes seconds and is the caller's to do."""
    try:
        version = metadata.version("trl")
    except metadata.PackageNotFoundError as error:
        raise training.MissingPackageError(
            f"TRL is not installed: pip install '{INSTALL}'"
        ) from error
    if int(version.split(".")[0]) < 1:
        raise training.MissingPackageError(
            f"trl {version} is installed, and GRPOTrainer's rollout_func is another one before "
            f"1.0: pip install '{INSTALL}'"
        )


def _own_weights(model: Any) -> tuple[Any, dict[str, Tensor]]:
    """A transformers model and its weights by its own names, adapters merged in."""
    if not hasattr(model, "peft_config"):
        return model, model.state_dict()
    from eval_protocol_rft.loop._lora import check_mergeable, merged_weights

    check_mergeable(model)
    return model.get_base_model(), merged_weights(model)


def _logprobs(
    trainer: Any, datums: Sequence[training.TrainingDatum], temperature: float
) -> list[training.FloatArray]:
    """[T_i] logprobs (nats) by the trainer's model, without dropout."""
    import torch

    from eval_protocol_rft.training.losses import token_logprobs

    model = trainer.accelerator.unwrap_model(trainer.model)
    model.train(False)
    try:
        with torch.no_grad(), trainer.compute_loss_context_manager():
            values = token_logprobs(model, datums, temperature=temperature).logprobs
    finally:
        model.train(True)
    return [value.float().cpu().numpy() for value in values]


class _LoopThread:
    """An event loop on a thread of its own: TRL's calls are synchronous, and come from notebooks
    too, whose thread has a running loop; samplers and clients belong to one loop for good."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: Callable[[], object] = lambda: None

    def run(self, work: Coroutine[Any, Any, _T]) -> _T:
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            threading.Thread(
                target=_serve, args=(self._loop,), name="trl-rollouts", daemon=True
            ).start()
            self._stop = weakref.finalize(self, self._loop.call_soon_threadsafe, self._loop.stop)
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()  # Ctrl-C: what is being sampled is not waited for
            raise

    def close(self, release: Callable[[], Coroutine[Any, Any, None]]) -> None:
        if self._loop is None:
            return
        self.run(release())
        self._stop()
        self._loop = None


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    try:
        loop.run_forever()
    finally:
        loop.close()
