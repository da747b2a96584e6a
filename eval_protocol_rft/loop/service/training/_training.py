"""Trainer jobs at work: sessions, models in training, and their calls one after the other.

Invariant: calls of one model are carried out in the order of their numbers, whatever order they
come in, each once. What a call made is on record in the same moment as its answer. When the process
starts again, all of it goes on where it was, to the last bit.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import msgspec

from eval_protocol_rft._errors import EvalProtocolRftError
from eval_protocol_rft.loop._run_options import LoraSettings
from eval_protocol_rft.loop.service._errors import Code, ServiceError
from eval_protocol_rft.loop.service._names import now
from eval_protocol_rft.loop.service._store import Resource, Store
from eval_protocol_rft.loop.service._weights import Weights
from eval_protocol_rft.loop.service.training._checkpoints import JOBS, Checkpoints, Owner, job_name
from eval_protocol_rft.loop.service.training._operations import Operation, Operations

if TYPE_CHECKING:
    from eval_protocol_rft.loop.service.training._model_in_training import ModelInTraining

MODELS = "trainingModels"
"""Kind of the store."""
NO_JOB = "training-api"
"""Whose checkpoints they are where a client trains without a job, at `/api/v1`."""
logger = logging.getLogger(__name__)

_CAPABILITIES = {"supports_reinforce": True, "supports_router_replay": False}
"""What a client may ask of a model that older trainers do not have; others are not there."""
_MOST_LIVE = 8
"""Models in training that are kept in memory; others are built again when they are called."""
_REPLAY_SHARE = 4.0
"""A state is saved when going there again would take so many times as long as saving it."""


UNLOADED = "unloaded"
"""Ends the name of the future of an `unload_model`, which is answered at once."""
_MOST_CALLS = 10**12
"""Of a model: the largest number of a call."""


class _LoraConfig(msgspec.Struct, frozen=True):
    rank: Annotated[int, msgspec.Meta(ge=0, le=4096)] = 0
    alpha: Annotated[int, msgspec.Meta(ge=0, le=2**31)] | None = None
    seed: Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)] | None = None


class CreateModel(msgspec.Struct, frozen=True):
    """A `create_model`, as far as it is read."""

    session_id: str
    model_seq_id: Annotated[int, msgspec.Meta(ge=0, le=_MOST_CALLS)]
    base_model: str
    lora_config: _LoraConfig = _LoraConfig()
    base_only: bool = False
    """Frozen, to compare with."""


class Call(msgspec.Struct, frozen=True):
    """What all calls of a model have."""

    model_id: str
    seq_id: Annotated[int, msgspec.Meta(ge=1, le=_MOST_CALLS)] | None = None


@dataclass(slots=True)
class _Live:
    """A model in memory, and how long it would take to get there again."""

    trained: ModelInTraining
    owner: Owner
    replay_seconds: float = 0.0
    save_seconds: float = 0.0


class Training:
    """Models in training of all jobs. `say` prints a line."""

    def __init__(self, store: Store, weights: Weights, *, say: Callable[[str], None]) -> None:
        self._store = store
        self._weights = weights
        self._say = say
        self._operations = Operations(store)
        self.checkpoints = Checkpoints(store, weights)
        # One thread: torch's number of threads belongs to it, and two models at a time are no
        # faster on the cores of one.
        self._thread = ThreadPoolExecutor(1, "training")
        self._live: dict[str, _Live] = {}
        """The last one called is the last."""
        self._working: dict[str, asyncio.Task[None]] = {}
        self._answered: dict[str, asyncio.Event] = {}

    @property
    def base_models(self) -> list[str]:
        return list(self._weights.models)

    def start(self) -> None:
        """Go on with what was sent before the process ended. For the event loop."""
        for model in self._operations.unfinished_models():
            self._work_on(model)

    async def aclose(self) -> None:
        """Stop after the call that is being carried out; the others wait on disk. Idempotent."""
        tasks = list(self._working.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.to_thread(self._thread.shutdown)

    # Sessions and models

    def create_session(self, job: str | None) -> str:
        session = f"session-{secrets.token_hex(8)}"
        self._store.put("sessions", session, {"job": job, "createTime": now()})
        return session

    def create_model(self, job: str | None, request: CreateModel) -> str:
        """A model in training, or the frozen base; returns its id.

        Raises:
            ServiceError: unknown session, job or base model; the job is of another model.
        """
        session = self._store.get("sessions", request.session_id)
        if session is None or session["job"] != job:
            raise ServiceError.not_found(f"session {request.session_id}")
        model = f"{request.session_id}:{request.model_seq_id}"
        before = self._store.get(MODELS, model)
        base, start = self._beginning(job, request.base_model)
        lora = request.lora_config
        described = {
            "job": job,
            "base": base,
            "start": start,
            "rank": lora.rank,
            "alpha": lora.alpha,
            "seed": lora.seed or 0,
            "frozen": request.base_only,
        }
        if before is not None and {name: before[name] for name in described} == described:
            return model  # sent twice
        if before is not None:
            raise ServiceError(
                f"{model} is there and is another: give this one its own model_seq_id",
                code=Code.ALREADY_EXISTS,
            )
        self._store.put(MODELS, model, described)
        kind = "the frozen base" if request.base_only else "a model in training"
        rank = f", LoRA of rank {lora.rank}" if lora.rank and not request.base_only else ""
        self._say(f"{_title(job)}: {kind}, {base}{rank}")
        return model

    def _beginning(self, job: str | None, asked: str) -> tuple[str, str]:
        """Name of the base model, and the set of weights that training begins with."""
        base = self._weights.base(asked)
        if job is None:
            return base.name, base.weights_id
        row = self.running_job(job)
        wanted = row.get("_base") or row.get("trainingConfig", {}).get("baseModel") or base.name
        if self._weights.base(wanted) is not base:
            raise ServiceError(f"{job_name(job)} trains {wanted}, not {asked}")
        return base.name, row.get("_weights") or base.weights_id

    def running_job(self, job: str) -> Resource:
        """Its resource.

        Raises:
            ServiceError: there is none, or it is not running.
        """
        found = self._store.get(JOBS, job_name(job))
        if found is None:
            raise ServiceError.not_found(job_name(job))
        if found.get("state") != "JOB_STATE_RUNNING":
            raise ServiceError(
                f"{job_name(job)} is {found.get('state')}: resume it, or make another",
                code=Code.FAILED_PRECONDITION,
            )
        return found

    def model(self, job: str | None, model: str) -> Resource:
        """What is known of a model in training.

        Raises:
            ServiceError: there is none in this job.
        """
        found = self._store.get(MODELS, model)
        if found is None or found["job"] != job:
            raise ServiceError.not_found(f"model {model}")
        return found

    def unload(self, job: str | None, model: str) -> None:
        """Forget a model in training; what it saved stays."""
        self.model(job, model)
        self._drop(model)

    def drop_job(self, job: str) -> None:
        """Forget the models in training of a job that is deleted; what they saved stays."""
        for model in self._store.names(MODELS):
            described = self._store.get(MODELS, model)
            if described is not None and described["job"] == job:
                self._drop(model)

    def _drop(self, model: str) -> None:
        with self._store.change():
            self._store.delete(MODELS, model)
            self._operations.drop(model)
        self._live.pop(model, None)
        self.checkpoints.running_state_path(model).unlink(missing_ok=True)
        self._wake(model)

    # Calls

    def submit(self, job: str | None, name: str, call: Call, body: bytes) -> str:
        """Take a call; returns the name of its future.

        Raises:
            ServiceError: it names no model of this job, or the place of another call.
        """
        if job is not None:
            self.running_job(job)
        self.model(job, call.model_id)
        seq = self._operations.add(call.model_id, call.seq_id, name, body)
        self._work_on(call.model_id)
        return f"{call.model_id}:{seq}"

    async def answer(self, future: str, *, patience: float) -> bytes | None:
        """The answer of a call, as JSON, as soon as it is there; None after `patience` seconds.

        Raises:
            ServiceError: there is no such future, or not any more.
        """
        model, _, number = future.rpartition(":")
        seq = int(number) if number.isdecimal() and len(number) < 16 else -1
        if number == UNLOADED:
            return msgspec.json.encode({"model_id": model, "type": "unload_model"})
        if seq == 0:  # the model itself
            if self._store.get(MODELS, model) is None:
                raise ServiceError.not_found(f"model {model}")
            return msgspec.json.encode({"model_id": model, **_CAPABILITIES})
        deadline = time.monotonic() + patience
        while (answer := self._operations.answer(model, seq)) is None:
            answered = self._answered.setdefault(model, asyncio.Event())
            try:
                async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                    await answered.wait()
            except TimeoutError:
                return None
        return answer

    def _wake(self, model: str) -> None:
        answered = self._answered.pop(model, None)
        if answered is not None:
            answered.set()

    def _work_on(self, model: str) -> None:
        before = self._working.get(model)
        if before is None or before.done():
            task = asyncio.get_running_loop().create_task(self._carry_out_all(model))
            self._working[model] = task
            task.add_done_callback(lambda task: self._left(model, task))

    def _left(self, model: str, task: asyncio.Task[None]) -> None:
        if self._working.get(model) is task:
            del self._working[model]
        if not task.cancelled() and (error := task.exception()) is not None:
            self._say(f"training {model} stopped: {type(error).__name__}: {error}")

    async def _carry_out_all(self, model: str) -> None:
        """All calls that follow on those that were carried out."""
        seq = self._operations.last_answered(model)
        while (operation := self._operations.waiting(model, seq + 1)) is not None:
            job = asyncio.get_running_loop().run_in_executor(
                self._thread, self._carry_out, model, operation
            )
            try:
                await asyncio.shield(job)
            except asyncio.CancelledError:
                with suppress(Exception):
                    await job
                raise
            self._wake(model)
            seq += 1

    # In the thread of training

    def _carry_out(self, model: str, operation: Operation) -> None:
        """Do it, and write down what came of it, all at once."""
        from eval_protocol_rft.loop.service.training import _calls as calls

        described = self._store.get(MODELS, model)
        if described is None:
            return  # it was dropped, and its calls with it
        done = calls.Done({})
        try:
            live = self._live_model(model, described)
            started = time.monotonic()
            done = self._do(operation, live, frozen=described["frozen"])
            live.replay_seconds += time.monotonic() - started
            if operation.name == "load_weights":
                # Before it is on record: it is not carried out again, as what it read may change.
                self._save_state(model, live, operation.seq)
        except EvalProtocolRftError as error:
            done = calls.Done({"error": str(error), "category": "user"})
        except Exception as error:
            logger.exception("%s of %s failed", operation.name, model)
            reason = f"{type(error).__name__}: {error}"
            done = calls.Done({"error": reason, "category": "server"})
            # What it did by then is unknown: without it, from what is on disk.
            self._live.pop(model, None)
        again = operation.name in calls.REPLAYED and done.answer.get("category") != "server"
        try:
            with self._store.change():
                for row in done.made:
                    self._store.put(*row)
                answer = msgspec.json.encode(done.answer)
                self._operations.finish(model, operation.seq, answer, again=again)
                if operation.name == "load_weights" and "error" not in done.answer:
                    self._note_saved(model, operation.seq)
        except BaseException:
            self._live.pop(model, None)  # or it would be done twice
            raise
        if "error" in done.answer:
            self._say(f"{_title(described['job'])}: {operation.name}: {done.answer['error']}")
        if done.shown is not None:
            self._say(f"{_title(described['job'])}: {done.shown}")
        if operation.name in calls.ENDING:
            self._shorten_replay(model, operation)
        if done.made:
            self.checkpoints.free_deltas(described["job"] or NO_JOB)

    def _do(self, operation: Operation, live: _Live, *, frozen: bool) -> Any:
        from eval_protocol_rft.loop.service.training import _calls as calls

        if frozen and operation.name != "forward":
            raise ServiceError(f"the frozen base model takes no {operation.name}")
        base = self._weights.base(live.owner.base)
        place = calls.Place(
            trained=live.trained,
            owner=live.owner,
            checkpoints=self.checkpoints,
            vocabulary=base.vocabulary,
            context=base.context_length,
        )
        return calls.CALLS[operation.name](place, operation.body)

    def _live_model(self, model: str, described: Resource) -> _Live:
        live = self._live.pop(model, None) or self._built(model, described)
        self._live[model] = live
        while len(self._live) > _MOST_LIVE:
            del self._live[next(iter(self._live))]
        return live

    def _built(self, model: str, described: Resource) -> _Live:
        """From its saved state, and the calls after that."""
        from eval_protocol_rft.loop.service.training._model_in_training import ModelInTraining

        rank, frozen = described["rank"], described["frozen"]
        lora = LoraSettings(rank=rank, alpha=described["alpha"] or 2 * rank) if rank else None
        trained = ModelInTraining(
            self._weights.module(described["start"]),
            lora=None if frozen else lora,
            seed=described["seed"],
            start=described["start"],
        )
        live = _Live(trained, Owner(described["job"] or NO_JOB, described["base"], rank))
        path = self.checkpoints.running_state_path(model)
        seq = trained.load(path, optimizer=True) if path.exists() else 0
        if seq < described.get("saved", 0):
            raise ServiceError(
                f"what {model} was trained to until its call {described['saved']} is not in "
                f"{path} any more: make another model, and load a checkpoint into it",
                code=Code.GONE,
            )
        for operation in self._operations.answered(model, after=seq):
            with suppress(EvalProtocolRftError):  # it was refused then, too
                self._do(operation, live, frozen=frozen)
        return live

    def _shorten_replay(self, model: str, operation: Operation) -> None:
        """Save the model's state, where it is time to, and give up what led there."""
        live = self._live.get(model)
        if live is None or live.trained.has_gradient:  # a gradient is no part of a state
            return
        if live.replay_seconds < _REPLAY_SHARE * live.save_seconds:
            return
        try:
            self._save_state(model, live, operation.seq)
        except (OSError, RuntimeError) as error:  # of a full disk; torch has its own
            self._say(f"the state of {model} cannot be saved: {error}")
            return
        with self._store.change():
            self._operations.forget(model, until=operation.seq)
            self._note_saved(model, operation.seq)

    def _note_saved(self, model: str, seq: int) -> None:
        """The file is there, and from here on nothing else knows of the calls until `seq`."""
        described = self._store.get(MODELS, model)
        if described is not None:
            self._store.put(MODELS, model, {**described, "saved": seq})

    def _save_state(self, model: str, live: _Live, seq: int) -> None:
        started = time.monotonic()
        live.trained.save(self.checkpoints.running_state_path(model), seq=seq)
        live.save_seconds = time.monotonic() - started
        live.replay_seconds = 0.0


def _title(job: str | None) -> str:
    return f"job {job}" if job is not None else "training"
