"""One step: groups to a batch, forward and backward, the optimiser, new weights to the sampler.

Invariant: where tokens of the very weights in training are in a batch, sampler and trainer are
compared before anything is learnt from it; and the version grows by one when, and only when, the
sampler has the new weights.
"""

from __future__ import annotations

import asyncio
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from eval_protocol_rft._errors import EvalProtocolRftError
from eval_protocol_rft.loop._metrics import Line, step_line
from eval_protocol_rft.loop._options import LoopOptions
from eval_protocol_rft.loop._rollouts import sample_prompts
from eval_protocol_rft.loop._setup import Parts
from eval_protocol_rft.loop._trainer import ForwardBackward, NamedLoss
from eval_protocol_rft.loop._watch import Trouble, Watch
from eval_protocol_rft.training import (
    BiasedSamplingWarning,
    Mismatch,
    PromptGroup,
    TrainingBatch,
    Trajectory,
    build_batch,
    comparable,
    filter_group,
    looks_shifted,
    measure,
    missing_eos,
    sampled_pairs,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

PROBED_PROMPTS = 4


class TrainingStoppedError(EvalProtocolRftError, RuntimeError):
    """Training on would teach the wrong thing; the message says why and what to do."""

    def __init__(self, trouble: Trouble) -> None:
        super().__init__(trouble.message)
        self.trouble = trouble


@contextmanager
def timed(seconds: dict[str, float], what: str) -> Iterator[None]:
    """Put how long the block takes under `what`."""
    began = time.perf_counter()
    try:
        yield
    finally:
        seconds[what] = time.perf_counter() - began


class StepRunner:
    """Takes the steps of one run."""

    def __init__(
        self,
        *,
        parts: Parts,
        options: LoopOptions,
        steps: int,
        warn: Callable[[str], None] = print,
    ) -> None:
        """`steps`: of the whole run, for the learning rate's schedule."""
        self._parts, self._options, self._steps, self._warn = parts, options, steps, warn
        self.watch = Watch()
        self._probe: asyncio.Task[list[Trajectory]] | None = None
        """Completions of the weights in training, for the next step: where sampling runs ahead, a
        batch may hold nothing that they sampled."""

    async def __call__(
        self,
        version: int,
        groups: Sequence[PromptGroup],
        staleness: Sequence[int],
        seconds: dict[str, float],
    ) -> Line:
        """Train on `groups` and publish `version` + 1.

        Args:
            version: that of the weights in training.
            groups: all that came in, dropped ones included.
            staleness: versions behind, of each group that trains, in order.
            seconds: gets what took how long, by what it went into.

        Raises:
            TrainingStoppedError: sampler and trainer disagree, or completions do not end.
        """
        step, trainer = version + 1, self._parts.trainer
        with timed(seconds, "batch"):
            batch = self._batch(groups)
        loss = NamedLoss(
            loss_fn=batch.loss_fn, config=batch.loss_fn_config, kl_beta=self._options.kl_beta
        )
        with timed(seconds, "train"):
            reference = None
            if self._options.kl_beta:
                reference = await trainer.forward(batch.datums, reference=True)
            passes: list[ForwardBackward] = []
            for number in range(self._options.passes):
                result = await trainer.forward_backward(
                    batch.datums, loss, reference_logprobs=reference
                )
                if not number:
                    difference = await self._compare(step, batch, result, staleness)
                    self._check_versions(step, groups, staleness)
                passes.append(result)
                optimizer = await trainer.optim_step(
                    learning_rate=self._options.learning_rate_at(step, self._steps)
                )
        with timed(seconds, "publish"):
            await trainer.publish(step)
        if self._options.max_staleness and step < self._steps:
            probe = sample_prompts(self._parts.processor, self._parts.params, _prompts(groups))
            self._probe = asyncio.create_task(probe)
        line = step_line(
            step,
            batch,
            groups=groups,
            first=passes[0],
            last=passes[-1],
            optimizer=optimizer,
            staleness=staleness,
            mismatch=_mismatch_fields(difference),
        )
        self._say(
            self.watch.reward(step, line.get("reward_mean"), optimizer.get("learning_rate", 0.0))
        )
        return line

    def end(self) -> None:
        """No further step is taken."""
        if self._probe is not None:
            self._probe.cancel()

    def seen(self, line: Line) -> None:
        """A line of this run from before it was stopped: what the watch knows, it knows again."""
        self.watch.agreed(line.get("mismatch_k3"))
        self.watch.reward(line["step"], line.get("reward_mean"), line.get("learning_rate", 0.0))

    def _batch(self, groups: Sequence[PromptGroup]) -> TrainingBatch:
        options = self._options.batch
        with warnings.catch_warnings():
            # Said once, when the run began; here it would come with every step.
            warnings.simplefilter("ignore", BiasedSamplingWarning)
            return build_batch(
                groups,
                algorithm=options.algorithm,
                loss_fn_config=options.loss_fn_config,
                normalization=options.normalization,
                constant_length=options.constant_length,
                filters=options.filters,
                pass_threshold=options.pass_threshold,
            )

    async def _compare(
        self,
        step: int,
        batch: TrainingBatch,
        result: ForwardBackward,
        staleness: Sequence[int],
    ) -> Mismatch | None:
        trainer, sampling = self._parts.trainer, self._parts.request.params
        on_policy = {group for group, behind in enumerate(staleness) if behind == 0}
        pairs = sampled_pairs(batch.datums, result.logprobs, on_policy)
        probed = comparable(await self._probed(step))
        if probed:
            pairs += sampled_pairs(probed, await trainer.forward(probed), {0})
        difference = measure(pairs)
        if difference is None:
            self._say(self.watch.uncompared(step))
        missing = missing_eos(batch.datums, self._parts.eos_token_ids, stops=bool(sampling.stop))
        self._say(self.watch.endings(step, missing, len(batch.datums)))
        if difference is not None and difference.verdict != "pass":
            raw = None
            if sampling.temperature != 1.0:
                logprobs = await trainer.forward(batch.datums, temperature=1.0)
                raw_pairs = sampled_pairs(batch.datums, logprobs, on_policy)
                if probed:
                    logprobs = await trainer.forward(probed, temperature=1.0)
                    raw_pairs += sampled_pairs(probed, logprobs, {0})
                raw = measure(raw_pairs)
            trouble = self.watch.mismatch(step, difference, shifted=looks_shifted(pairs), raw=raw)
            self._say(trouble)
        else:
            self.watch.mismatch(step, difference)
        return difference

    async def _probed(self, step: int) -> list[Trajectory]:
        """What was sampled since the last step published its weights."""
        task, self._probe = self._probe, None
        if task is None:
            return []
        completions = await task
        self._say(self.watch.versions(step, completions, step - 1))
        return completions

    def _check_versions(
        self, step: int, groups: Sequence[PromptGroup], staleness: Sequence[int]
    ) -> None:
        """Nothing is older than the sampler's weights were when its row was started."""
        behind = iter(staleness)
        options = self._options.batch
        for group in groups:
            if filter_group(group, options.filters, relative=options.relative)[0] is not None:
                oldest = step - 1 - next(behind)
                self._say(self.watch.versions(step, group.trajectories, oldest))

    def _say(self, trouble: Trouble | None) -> None:
        if trouble is None:
            return
        if trouble.fatal and self._options.on_mismatch == "stop":
            raise TrainingStoppedError(trouble)
        self._warn(trouble.message)


def _prompts(groups: Sequence[PromptGroup]) -> list[list[int]]:
    """Token ids of a few prompts."""
    firsts = [group.trajectories[0] for group in groups if group.trajectories]
    return [first.tokens[: first.prompt_length].tolist() for first in firsts[:PROBED_PROMPTS]]


def _mismatch_fields(mismatch: Mismatch | None) -> dict[str, float]:
    if mismatch is None:
        return {"mismatch_tokens": 0}
    return {
        "mismatch_tokens": mismatch.tokens,
        "mismatch_k1": mismatch.k1,
        "mismatch_k3": mismatch.k3,
        "mismatch_max": mismatch.max_difference,
    }
