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

from eval_protocol_rft import training
from eval_protocol_rft.loop._metrics import Line, step_line
from eval_protocol_rft.loop._rollouts import sample_prompts
from eval_protocol_rft.loop._run_options import LoopOptions
from eval_protocol_rft.loop._setup import Parts
from eval_protocol_rft.loop._trainer import ForwardBackward, NamedLoss
from eval_protocol_rft.loop._watch import TrainingStoppedError, Trouble, Watch

if TYPE_CHECKING:
    from collections.abc import Iterator

PROBED_PROMPTS = 4


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
        self._correction = options.objective().correction
        sampler = parts.sampler
        exact = sampler is not None and sampler.is_float32
        self.watch = Watch(options.groups_per_step, exact=exact)
        self._probe: asyncio.Task[list[training.Trajectory]] | None = None
        """Completions of the weights in training, for the next step: where sampling runs ahead, a
        batch may hold nothing that they sampled."""

    async def __call__(
        self,
        version: int,
        groups: Sequence[training.PromptGroup],
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
            loss_fn=batch.loss_fn,
            config=batch.loss_fn_config,
            kl_beta=self._options.kl_beta,
            correction=self._correction,
        )
        with timed(seconds, "train"):
            if self._parts.rest is not None:
                await self._parts.rest()
            old = reference = None
            if self._correction is not None:
                old = await trainer.forward(batch.datums)
            if self._options.kl_beta:
                reference = await trainer.forward(batch.datums, reference=True)
            passes: list[ForwardBackward] = []
            for number in range(self._options.passes):
                result = await trainer.forward_backward(
                    batch.datums, loss, old_logprobs=old, reference_logprobs=reference
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

    def _batch(self, groups: Sequence[training.PromptGroup]) -> training.TrainingBatch:
        options = self._options.batch
        with warnings.catch_warnings():
            # Said once, when the run began; here it would come with every step.
            warnings.simplefilter("ignore", training.BiasedSamplingWarning)
            return training.build_batch(
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
        batch: training.TrainingBatch,
        result: ForwardBackward,
        staleness: Sequence[int],
    ) -> training.Mismatch | None:
        trainer, sampling = self._parts.trainer, self._parts.request.params
        on_policy = {group for group, behind in enumerate(staleness) if behind == 0}
        probed = training.comparable(await self._probed(step))

        async def pairs_of(
            logprobs: Sequence[training.FloatArray], temperature: float | None
        ) -> list[tuple[training.FloatArray, training.FloatArray]]:
            """(sampler, trainer) logprobs of the weights in training."""
            pairs = training.sampled_pairs(batch.datums, logprobs, on_policy)
            if probed:
                also = await trainer.forward(probed, temperature=temperature)
                pairs += training.sampled_pairs(probed, also, {0})
            return pairs

        pairs = await pairs_of(result.logprobs, None)
        difference = training.measure(pairs)
        if difference is None:
            self._say(self.watch.uncompared(step))
        stops = bool(sampling.stop)
        missing = training.missing_eos(batch.datums, self._parts.eos_token_ids, stops=stops)
        self._say(self.watch.endings(step, missing, len(batch.datums)))
        differs = difference is not None and self.watch.differs(difference)
        raw = None
        if differs and sampling.temperature != 1.0:
            raw_logprobs = await trainer.forward(batch.datums, temperature=1.0)
            raw = training.measure(await pairs_of(raw_logprobs, 1.0))
        shifted = differs and training.looks_shifted(pairs)
        self._say(self.watch.mismatch(step, difference, shifted=shifted, raw=raw))
        return difference

    async def _probed(self, step: int) -> list[training.Trajectory]:
        """What was sampled since the last step published its weights."""
        task, self._probe = self._probe, None
        if task is None:
            return []
        completions = await task
        self._say(self.watch.versions(step, completions, step - 1))
        return completions

    def _check_versions(
        self, step: int, groups: Sequence[training.PromptGroup], staleness: Sequence[int]
    ) -> None:
        """Nothing is older than the sampler's weights were when its row was started."""
        behind = iter(staleness)
        options = self._options.batch
        for group in groups:
            if options.filtered(group)[0] is not None:
                oldest = step - 1 - next(behind)
                self._say(self.watch.versions(step, group.trajectories, oldest))

    def _say(self, trouble: Trouble | None) -> None:
        if trouble is None:
            return
        if trouble.fatal and self._options.on_mismatch == "stop":
            raise TrainingStoppedError(trouble)
        self._warn(trouble.message)


def _prompts(groups: Sequence[training.PromptGroup]) -> list[list[int]]:
    """Token ids of a few prompts."""
    firsts = [group.trajectories[0] for group in groups if group.trajectories]
    return [first.tokens[: first.prompt_length].tolist() for first in firsts[:PROBED_PROMPTS]]


def _mismatch_fields(mismatch: training.Mismatch | None) -> dict[str, float]:
    if mismatch is None:
        return {"mismatch_tokens": 0}
    return {
        "mismatch_tokens": mismatch.tokens,
        "mismatch_k1": mismatch.k1,
        "mismatch_k3": mismatch.k3,
        "mismatch_max": mismatch.max_difference,
        "mismatch_beyond": mismatch.beyond,
    }
