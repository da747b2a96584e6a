"""Reinforcement fine-tuning steps: a job that trains a model on a data set of text, by itself.

    {"samples": [{"messages": [...], "evals": {"score": 1.0}}, ...]}       one prompt group a row

Rows to prompt groups (`_step_rows`), groups to advantages and datums, and as many passes of AdamW
over them as the job has epochs: by the parts that train everything else here. Ratios are to the
model that the step begins with. With `loraRank`, a new adapter of that rank is trained on it.

Invariant: a model is there when its job is COMPLETED, and not before; what died in between begins
again, with the same random numbers, and ends with the same weights.
"""

from __future__ import annotations

import asyncio
import logging
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import numpy as np

from eval_protocol_rft import training
from eval_protocol_rft._errors import EvalProtocolRftError
from eval_protocol_rft.loop._run_options import LoraSettings, Optimizer
from eval_protocol_rft.loop._trainer import NamedLoss
from eval_protocol_rft.loop.service import _names as names
from eval_protocol_rft.loop.service._store import Resource, Store
from eval_protocol_rft.loop.service._weights import Weights
from eval_protocol_rft.loop.service.control import _resources as resources
from eval_protocol_rft.loop.service.control._datasets import Datasets
from eval_protocol_rft.loop.service.control._jobs import (
    COMPLETED,
    KIND,
    PENDING,
    RUNNING,
    read_weights,
)
from eval_protocol_rft.loop.service.control._models import Models
from eval_protocol_rft.loop.service.control._step_rows import end_ids, prompt_group, with_template

if TYPE_CHECKING:
    from eval_protocol_rft.loop._local_trainer import LocalTrainer

LEARNING_RATE = 1e-4
BATCH_TOKENS = 32768
"""Both where the job does not say: as the older client's `reinforcement_step` sends them."""

MICROBATCH_TOKENS = 4096
"""Of one forward pass. With 50,000 words their logits take a gigabyte or two."""

logger = logging.getLogger(__name__)


class Method(NamedTuple):
    """What `lossConfig.method` stands for, as documented."""

    algorithm: str
    """A name in `training.ALGORITHMS`, with its bounds on the ratio."""
    normalization: training.Normalization
    kl_beta: float
    """Where the job gives none."""


METHODS = {
    "METHOD_UNSPECIFIED": Method("grpo", "token", 0.001),
    "GRPO": Method("grpo", "token", 0.001),
    "DAPO": Method("dapo", "token", 0.0),
    "GSPO_TOKEN": Method("gspo", "sequence", 0.0),
}


class Trained(NamedTuple):
    """What came of a step."""

    weights: str
    """The id of the set."""
    losses: Sequence[float]
    """Of each epoch; none where there was nothing to learn."""
    left_out: Mapping[str, int]
    """Reason (see `training.DROP_REASONS`) -> samples that were not trained on."""


class StepRunner:
    """Carries out the account's steps, one after the other."""

    def __init__(
        self,
        store: Store,
        weights: Weights,
        datasets: Datasets,
        catalogue: Models,
        say: Callable[[str], None],
    ) -> None:
        self._store = store
        self._weights = weights
        self._datasets = datasets
        self._models = catalogue
        self._say = say
        self._turn = asyncio.Semaphore(1)
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def start(self, name: str) -> None:
        """Begin a job that is PENDING, once those before it have ended."""
        before = self._tasks.get(name)
        task = asyncio.get_running_loop().create_task(self._run(name, before))
        self._tasks[name] = task
        task.add_done_callback(lambda task: self._ended(name, task))

    def _ended(self, name: str, task: asyncio.Task[None]) -> None:
        if self._tasks.get(name) is task:
            del self._tasks[name]

    def stop(self, name: str) -> None:
        """Give it up, where it is under way."""
        if task := self._tasks.get(name):
            task.cancel()

    def resume(self) -> None:
        """Begin what was under way when the process ended."""
        for row in self._store.list(KIND):
            if row["state"] in (PENDING, RUNNING) and not row.get("serviceMode"):
                self.start(row["name"])

    async def aclose(self) -> None:
        """Stop, as if the process had ended."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self, name: str, before: asyncio.Task[None] | None) -> None:
        if before is not None:
            await asyncio.wait([before])
        async with self._turn:
            row = self._store.get(KIND, name)
            if row is None or row["state"] not in (PENDING, RUNNING):
                return
            self._change(name, state=RUNNING)
            self._say(f"job {names.last(name)}: RUNNING")
            try:
                await self._complete(row, await self.train(row))
            except (EvalProtocolRftError, OSError, RuntimeError, ValueError) as error:
                self._fail(name, error)
            except Exception as error:
                logger.exception("job %s", name)
                self._fail(name, error)

    async def train(self, row: Resource) -> Trained:
        """Train as the job's row says; what came of it is not on record yet.

        Raises:
            EvalProtocolRftError: it cannot be trained on these rows, or in this way.
        """
        config = row["trainingConfig"]
        method = METHODS[row.get("lossConfig", {}).get("method", "METHOD_UNSPECIFIED")]
        batches, left_out = await asyncio.to_thread(self._batches, row, method)
        if not batches:
            return Trained(row["_weights"], [], left_out)
        epochs = config.get("epochs") or 1
        losses: list[float] = []
        trainer = await asyncio.to_thread(self._trainer, row)
        try:
            step = Epochs(trainer, method, row)
            await step.prepare(batches)
            for epoch in range(epochs):
                losses.append(await step.epoch(batches))
                progress = {"epoch": epoch, "percent": 100 * (epoch + 1) // epochs}
                self._change(row["name"], jobProgress=progress)
            state = trainer.weights()
            weights = await asyncio.to_thread(self._weights.save, state, base=row["_base"])
        finally:
            await trainer.aclose()
        return Trained(weights, losses, left_out)

    def _batches(
        self, row: Resource, method: Method
    ) -> tuple[list[training.TrainingBatch], Mapping[str, int]]:
        """The step's batches, in order, and how many samples are in none, by reason. Blocks."""
        config = row["trainingConfig"]
        base = self._weights.base(row["_base"])
        length = min(config.get("maxContextLength") or base.context_length, base.context_length)
        tokenizer = with_template(base.tokenizer, config.get("jinjaTemplate"))
        ends = end_ids(base.tokenizer, base.module)
        weights = read_weights(row.get("rewardWeights", []))
        groups = [
            prompt_group(number, line["samples"], tokenizer, ends, weights)
            for number, line in enumerate(self._datasets.lines(row["dataset"]), 1)
        ]
        # N accumulated batches are one batch N times as large.
        times = config.get("gradientAccumulationSteps") or 1
        samples = config.get("batchSizeSamples")
        try:
            batches = list(
                training.iter_batches(
                    groups,
                    max_tokens=(config.get("batchSize") or BATCH_TOKENS) * times,
                    max_groups=samples * times if samples else None,
                    algorithm=method.algorithm,
                    normalization=method.normalization,
                    filters=training.Filters(max_sequence_tokens=length),
                )
            )
        except training.EmptyBatchError as error:
            if "zero_variance" not in error.dropped:
                raise
            return [], error.dropped
        dropped: dict[str, int] = {}
        for batch in batches:
            for reason, count in batch.dropped.items():
                dropped[reason] = dropped.get(reason, 0) + count
        return batches, dropped

    def _trainer(self, row: Resource) -> LocalTrainer:
        from eval_protocol_rft.loop._local_trainer import LocalTrainer
        from eval_protocol_rft.loop._lora import seeded

        config = row["trainingConfig"]
        rank = config["loraRank"]
        module = self._weights.module(row["_weights"])
        with seeded(zlib.crc32(row["name"].encode())):
            return LocalTrainer(
                module,
                sink=_Nowhere(),
                lora=LoraSettings(rank=rank, alpha=2 * rank) if rank else None,
                optimizer=Optimizer(
                    beta2=0.95,
                    weight_decay=config.get("optimizerWeightDecay", 0.0),
                    microbatch_tokens=MICROBATCH_TOKENS,
                ),
                keep_reference=kl_beta(row) > 0,
                entropies=False,
            )

    async def _complete(self, row: Resource, trained: Trained) -> None:
        weights, losses, left_out = trained
        name, config = row["name"], row["trainingConfig"]
        model = await self._models.made(
            config["outputModel"],
            weights=weights,
            base=row["_base"],
            lora_rank=config["loraRank"],
            fineTuningJob=name,
        )
        now = self._store.get(KIND, name)
        if now is None or now["state"] != RUNNING:  # cancelled while the weights were written
            return
        if self._store.get("models", model["name"]) is not None:  # promoted to that name meanwhile
            self._fail(name, resources.exists(model["name"]))
            return
        row = now
        row |= {
            "state": COMPLETED, "completedTime": names.now(), "updateTime": names.now(),
            "jobProgress": {"percent": 100},
        }  # fmt: skip
        if not losses:
            row["status"] = {
                "code": "OK",
                "message": "Warning: all scores of every row are equal, so that there was nothing "
                "to learn; the model is the one that the step began with",
            }
        with self._store.change():
            self._store.put("models", model["name"], model)
            self._store.put(KIND, name, row)
        epochs = f"{len(losses)} epoch{'s' * (len(losses) != 1)}"
        learnt = f"{epochs}, loss {_shown(losses[0])} -> {_shown(losses[-1])}" if losses else (
            "nothing to learn"
        )  # fmt: skip
        unused = "".join(
            f", {count} samples left out ({reason})" for reason, count in left_out.items()
        )
        self._say(
            f"job {names.last(name)}: COMPLETED, {learnt}{unused}, "
            f"model {names.last(model['name'])}"
        )

    def _fail(self, name: str, error: Exception) -> None:
        row = self._store.get(KIND, name)
        if row is None or row["state"] != RUNNING:
            return
        code = "INVALID_ARGUMENT" if isinstance(error, ValueError) else "INTERNAL"
        message = str(error) or type(error).__name__
        self._change(name, state="JOB_STATE_FAILED", status={"code": code, "message": message})
        self._say(f"job {names.last(name)}: FAILED, {message}")

    def _change(self, name: str, **values: Any) -> None:
        row = self._store.get(KIND, name)
        if row is not None and row["state"] in (PENDING, RUNNING):
            self._store.put(KIND, name, {**row, **values, "updateTime": names.now()})


class Epochs:
    """Passes over a step's batches."""

    def __init__(self, trainer: LocalTrainer, method: Method, row: Resource) -> None:
        config = row["trainingConfig"]
        self._trainer = trainer
        self._method = method
        self._kl_beta = kl_beta(row)
        self._learning_rate = config.get("learningRate") or LEARNING_RATE
        self._warmup = config.get("learningRateWarmupSteps") or 0
        self._steps = 0
        self._datums: list[list[training.TrainingDatum]] = []
        self._reference: list[list[training.FloatArray] | None] = []

    async def prepare(self, batches: Sequence[training.TrainingBatch]) -> None:
        """Take the logprobs of the model that the step begins with for those that it was sampled
        with, which text does not tell."""
        for batch in batches:
            logprobs = await self._trainer.forward(batch.datums)
            self._datums.append(
                [
                    msgspec.structs.replace(
                        datum, logprobs=np.where(datum.mask, values, np.float32(0.0))
                    )
                    for datum, values in zip(batch.datums, logprobs, strict=True)
                ]
            )
            self._reference.append(
                await self._trainer.forward(batch.datums, reference=True) if self._kl_beta else None
            )

    async def epoch(self, batches: Sequence[training.TrainingBatch]) -> float:
        """One step of the optimiser on each; the mean of their losses."""
        losses = []
        for batch, datums, reference in zip(batches, self._datums, self._reference, strict=True):
            result = await self._trainer.forward_backward(
                datums,
                NamedLoss(
                    loss_fn=batch.loss_fn, config=batch.loss_fn_config, kl_beta=self._kl_beta
                ),
                reference_logprobs=reference,
            )
            self._steps += 1
            warm = min(self._steps / self._warmup, 1.0) if self._warmup else 1.0
            await self._trainer.optim_step(learning_rate=self._learning_rate * warm)
            losses.append(
                result.metrics["policy_loss:sum"] + result.metrics.get("kl_loss:sum", 0.0)
            )
        return float(np.mean(losses))


class _Nowhere:
    """Weights are read from the trainer at the end; none are published."""

    async def publish(self, *arguments: Any, **options: Any) -> None:
        raise AssertionError("a step publishes nothing")


def _shown(loss: float) -> str:
    """Without a sign where it is 0 but for rounding."""
    return f"{round(loss, 4) + 0.0:.4f}"


def kl_beta(row: Resource) -> float:
    """The weight of the penalty on the distance to the model that the step begins with."""
    loss = row.get("lossConfig", {})
    default = METHODS[loss.get("method", "METHOD_UNSPECIFIED")].kl_beta
    return float(loss.get("klBeta", default))
