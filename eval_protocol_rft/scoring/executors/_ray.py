"""A Ray cluster: one actor on each node while there is work, and scoring with workers of theirs.

Invariant: a node has at most one actor of ours. One that dies is replaced where its node is alive,
and a node that joins gets one, while the others go on. Nothing outlives this process: actors end
with the driver that made them, however it ends. Of scoring, as for `score_items`: every item comes
back exactly once, scored by the same workers with the same time limit. An item whose node is lost
is scored again elsewhere; it comes back unscored if that happens to it again and again.

Plain actors, not Ray Data: that gives a batch back when the last of it is done, so that a long
completion would hold up the ones beside it, and samples all of a batch again when an actor dies.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import queue
import signal
import socket
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

from eval_protocol_rft._errors import EvalProtocolRftError
from eval_protocol_rft.scoring.executors import _messages
from eval_protocol_rft.scoring.executors._loading import LoadedEvaluator, load_evaluator
from eval_protocol_rft.scoring.executors._messages import ScoredItem, ScoringError, ScoringItem
from eval_protocol_rft.scoring.executors._pool import Pool, score_items

LOOK_SECONDS = 5.0
"""How often it is looked for nodes that joined, and for actors that are ready meanwhile."""
EAGER_SECONDS = 0.1
"""The same, while there is no actor that is ready."""
PATIENCE_SECONDS = 30.0
"""For so long it is normal that no node is ready: processes start, those of others end."""
MOST_START_DEATHS = 3

Engine = Literal["local", "ray"]
"""Where the work is done: in this process, or on the nodes of a Ray cluster."""

RAY_ADDRESS = "RAY_ADDRESS, else this machine"
"""Which cluster it is unless one is named."""

CONNECT_SECONDS = 10.0

logger = logging.getLogger(__name__)


class RayEngineError(EvalProtocolRftError, RuntimeError):
    """Ray is not there, or the cluster cannot do the work; the message says which node."""


class Node(NamedTuple):
    """A node that takes work: Ray's convention for one that does not is that it has no CPU."""

    id: str
    address: str
    cpus: int


class Work(NamedTuple):
    """What an actor is made of."""

    actor: type
    """Its class; `ready()` returns when it can do work, or raises why it cannot."""
    arguments: dict[str, Any]
    cpus: int
    """What it claims of its node. It starts when they are free."""
    calls: int
    """What it does at once."""
    queued: int = 0
    """Further calls that may wait there for their turn."""


@dataclass(slots=True)
class NodeActor:
    """An actor and how much it has to do."""

    node: Node
    handle: Any
    ready: Any
    """Resolves when it can do work."""
    room: int
    busy: int = 0
    """Calls that are not answered yet."""


def check_engine(engine: str) -> None:
    """Look whether there is such an engine, before there is work for it.

    Raises:
        ValueError: there is not.
        RayEngineError: it is not installed.
    """
    if engine not in get_args(Engine):
        raise ValueError(f"engine must be {' or '.join(get_args(Engine))}, got {engine!r}")
    if engine == "ray":
        require_ray()


def require_ray() -> Any:
    """The `ray` module.

    Raises:
        RayEngineError: it is not installed.
    """
    try:
        import ray
    except ImportError as error:
        raise RayEngineError(
            "the ray engine needs Ray: pip install 'eval-protocol-rft[ray]'"
        ) from error
    return ray


class NodeActors:
    """Actors for `work`. Not for several threads at once.

    Args:
        address: of the cluster; None: that of RAY_ADDRESS, else of the cluster that runs here, else
            one is started here. A process that is connected already stays with its cluster.
        work: what the actor of a node is made of.
    """

    def __init__(self, address: str | None, work: Callable[[Node], Work]) -> None:
        self._address, self._work = address, work
        self._ray = require_ray()
        self._connected_here = False
        self._ready: dict[str, NodeActor] = {}
        self._starting: dict[str, NodeActor] = {}
        self._start_deaths: Counter[str] = Counter()
        self._looked = -LOOK_SECONDS
        self._last_ready = time.monotonic()

    def connect(self) -> None:
        """Join the cluster, if this process has not yet. Blocks.

        Raises:
            RayEngineError: there is no cluster at the address.
        """
        if self._ray.is_initialized():
            return
        _check_reachable(self._address or os.environ.get("RAY_ADDRESS", ""))
        on_sigterm = signal.getsignal(signal.SIGTERM)
        try:
            # What the actors print stays in Ray's own logs: it would tear the progress bar.
            self._ray.init(self._address, log_to_driver=False, logging_level=logging.WARNING)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise RayEngineError(f"cannot join the Ray cluster: {error}") from error
        finally:
            if threading.current_thread() is threading.main_thread():
                # Ray's own would leave at once; what is finished has to be stored first.
                signal.signal(signal.SIGTERM, on_sigterm)
        self._connected_here = True

    def free(self) -> NodeActor | None:
        """The actor with the least to do that has room; None: none has, or none is ready yet.

        Raises:
            RayEngineError: a node cannot do the work.
        """
        now = time.monotonic()
        if now - self._looked >= (LOOK_SECONDS if self._ready else EAGER_SECONDS):
            self._looked = now
            self._look()
        actor = min(self._ready.values(), key=lambda actor: actor.busy, default=None)
        return actor if actor is not None and actor.busy < actor.room else None

    def lost(self, actor: NodeActor) -> None:
        """Its calls fail: make an end of it. Its node gets another."""
        if self._ready.get(actor.node.id) is actor:
            del self._ready[actor.node.id]
            self._last_ready = time.monotonic()
            # It may only be out of reach, and must not work on beside the next one.
            self._ray.kill(actor.handle)

    def close(self) -> None:
        """End the actors and what they are doing, and leave the cluster. Idempotent. Blocks."""
        for actor in (*self._ready.values(), *self._starting.values()):
            self._ray.kill(actor.handle)
        self._ready.clear()
        self._starting.clear()
        if self._connected_here:
            self._ray.shutdown()
            self._connected_here = False

    @property
    def gone(self) -> tuple[type[Exception], ...]:
        """What a call raises when its actor, its node or its answer was lost."""
        errors = self._ray.exceptions
        return (errors.RayActorError, errors.ActorUnschedulableError, errors.ObjectLostError)

    def _look(self) -> None:
        for actor in tuple(self._starting.values()):
            if self._ray.wait([actor.ready], timeout=0)[0]:
                self._started(actor)
        for entry in self._ray.nodes():
            cpus = int(entry["Resources"].get("CPU", 0)) if entry["Alive"] else 0
            node = Node(entry["NodeID"], entry["NodeManagerAddress"], cpus)
            if node.cpus and node.id not in self._ready and node.id not in self._starting:
                self._starting[node.id] = self._start(node)
        if self._ready:
            self._last_ready = time.monotonic()
        elif time.monotonic() - self._last_ready > PATIENCE_SECONDS:
            self._last_ready = time.monotonic()
            logger.warning(
                "still waiting for a node of the Ray cluster: none has the CPUs free, or they take "
                "long to start"
            )

    def _start(self, node: Node) -> NodeActor:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        work = self._work(node)
        handle = (
            self._ray.remote(work.actor)
            .options(
                num_cpus=min(work.cpus, node.cpus),
                max_concurrency=work.calls,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False),
            )
            .remote(**work.arguments)
        )
        return NodeActor(node, handle, handle.ready.remote(), room=work.calls + work.queued)

    def _started(self, actor: NodeActor) -> None:
        del self._starting[actor.node.id]
        try:
            self._ray.get(actor.ready)
        except self._ray.exceptions.RayTaskError as error:
            why = error.cause or error
            raise RayEngineError(f"Ray node {actor.node.address}: {why}") from error
        except self.gone as error:
            why = str(error).strip().splitlines()[-1].strip()
            if getattr(error, "actor_init_failed", False):
                raise RayEngineError(f"Ray node {actor.node.address}: {why}") from error
            self._start_deaths[actor.node.id] += 1
            if self._start_deaths[actor.node.id] >= MOST_START_DEATHS:
                raise RayEngineError(
                    f"Ray node {actor.node.address}: the actor died {MOST_START_DEATHS} times "
                    f"while it started; the last time: {why}"
                ) from error
        else:
            self._start_deaths.pop(actor.node.id, None)
            self._ready[actor.node.id] = actor


def _check_reachable(address: str) -> None:
    """Knock at HOST:PORT: Ray itself tries for ten minutes before it says that nobody is there."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdecimal():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise RayEngineError(f"there is no Ray cluster at {address}: {error}") from error


MOST_LOSSES = 3
"""So many nodes are lost under an item before it is taken for the reason."""
_QUEUED_PER_WORKER = 1
"""Items that wait at a node, so that no worker waits for the way to the driver and back."""


def score_items_on_ray(
    items: Iterable[ScoringItem],
    evaluator: LoadedEvaluator,
    *,
    address: str | None = None,
    workers: int | None = None,
    timeout: float | None = 60.0,
    max_concurrency: int = 96,
) -> Generator[ScoredItem, None, None]:
    """`score_items`, on all nodes of a cluster.

    The evaluator's file has to be on every node at the same path, with the same contents.

    Args:
        items, evaluator, timeout: as for `score_items`.
        address: see `NodeActors`.
        workers: processes per node for a sync evaluator. None: as many as the node has CPUs.
        max_concurrency: calls of an async evaluator in flight, over all nodes.

    Raises:
        RayEngineError: Ray is not installed, there is no cluster, or a node cannot load the
            evaluator.
        ScoringError, ValueError: as for `score_items`.
    """
    # Checks the options; nothing runs until the first result is asked for.
    score_items(
        (), evaluator, workers=workers, timeout=timeout, max_concurrency=max_concurrency
    ).close()

    def work(node: Node) -> Work:
        evaluated = {"spec": evaluator.spec, "fingerprint": evaluator.fingerprint}
        size = node.cpus if workers is None else workers
        calls = max_concurrency if evaluator.is_async else size
        arguments = {**evaluated, "timeout": timeout, "cwd": os.getcwd(), "calls": calls}
        if evaluator.is_async:
            return Work(LoopScorer, arguments, cpus=1, calls=calls)
        return Work(PoolScorer, arguments, size, calls, queued=size * _QUEUED_PER_WORKER)

    most = max_concurrency if evaluator.is_async else None
    return _Run(NodeActors(address, work), most).run(iter(items))


class _Run:
    """Items, and where they are. All on the caller's thread."""

    def __init__(self, actors: NodeActors, most: int | None) -> None:
        self._actors = actors
        self._most = most
        """Calls in flight; None: as many as the actors have room for."""
        self._again: deque[tuple[ScoringItem, int]] = deque()
        """Items to be scored again, with how many nodes were lost under each."""
        self._sent: dict[Future[ScoredItem], tuple[ScoringItem, int, NodeActor]] = {}
        """The same of items that are at a node, and which."""
        self._done: queue.SimpleQueue[Future[ScoredItem]] = queue.SimpleQueue()

    def run(self, items: Iterator[ScoringItem]) -> Generator[ScoredItem, None, None]:
        try:
            self._actors.connect()
            while self._fill(items) or self._sent:
                try:
                    # Not for good: nodes may have joined or become ready.
                    answer = self._done.get(timeout=EAGER_SECONDS)
                except queue.Empty:
                    continue
                scored = self._take(answer)
                if scored is not None:
                    yield scored
        finally:
            self._actors.close()

    def _fill(self, items: Iterator[ScoringItem]) -> bool:
        """Hand out what there is room for; whether there may be more."""
        while self._most is None or len(self._sent) < self._most:
            actor = self._actors.free()
            if actor is None:
                return True
            if self._again:
                item, losses = self._again.popleft()
            elif (following := next(items, None)) is not None:
                item, losses = following, 0
            else:
                return False
            answer = actor.handle.score.remote(item.views).future()
            actor.busy += 1
            self._sent[answer] = item, losses, actor
            answer.add_done_callback(self._done.put)
        return True

    def _take(self, answer: Future[ScoredItem]) -> ScoredItem | None:
        """What became of an item; None: it has to be scored again."""
        item, losses, actor = self._sent.pop(answer)
        actor.busy -= 1
        try:
            scored = answer.result()
        except ScoringError as error:
            # Ray's error is of that type too, and its message a traceback.
            raise ScoringError(str(getattr(error, "cause", error))) from None
        except self._actors.gone as error:
            self._actors.lost(actor)
            if losses + 1 < MOST_LOSSES:
                self._again.append((item, losses + 1))
                return None
            how = f"its Ray node was lost {MOST_LOSSES} times ({type(error).__name__})"
            return _messages.all_unscored(item, how, 0.0)
        return dataclasses.replace(scored, key=item.key)


class _RayScorer:
    """What the actors have in common."""

    def __init__(
        self, spec: str, fingerprint: str, timeout: float | None, cwd: str, calls: int
    ) -> None:
        # No more than this: what an actor raises here reaches the driver as its death.
        self._spec, self._fingerprint, self._cwd = spec, fingerprint, cwd
        self._timeout, self._calls = timeout, calls

    def _load(self) -> LoadedEvaluator:
        os.chdir(self._cwd)
        loaded = load_evaluator(self._spec)
        if loaded.fingerprint != self._fingerprint:
            raise ScoringError(f"{self._spec} is not the same file as where the run was started")
        return loaded


class PoolScorer(_RayScorer):
    """Scores with a sync evaluator. Each of its threads has a worker process."""

    def ready(self) -> None:
        loaded = self._load()
        self._pools: queue.SimpleQueue[Pool] = queue.SimpleQueue()
        for _ in range(self._calls):
            self._pools.put(Pool(loaded, 1, self._timeout))

    def score(self, views: tuple[bytes, ...]) -> ScoredItem:
        pool = self._pools.get()
        try:
            items = iter([ScoringItem(None, views)])
            (scored,) = pool.run(lambda: next(items, None))
        finally:
            self._pools.put(pool)
        return scored


class LoopScorer(_RayScorer):
    """Scores with an async evaluator, all calls in the event loop of one worker process. A thread
    of the actor's own has the pool; its items' keys are what callers wait for."""

    async def ready(self) -> None:
        self._asked: queue.SimpleQueue[ScoringItem] = queue.SimpleQueue()
        self._pool = Pool(self._load(), 1, self._timeout, self._calls)
        threading.Thread(target=self._serve, name="scoring", daemon=True).start()

    async def score(self, views: tuple[bytes, ...]) -> ScoredItem:
        answer = Future[ScoredItem]()
        self._asked.put(ScoringItem(answer, views))
        self._pool.ring()
        return await asyncio.wrap_future(answer)

    def _serve(self) -> None:
        waiting: set[Future[ScoredItem]] = set()
        while True:
            first = [self._asked.get()]

            def arrived(first: list[ScoringItem] = first) -> ScoringItem | None:
                try:
                    item = first.pop() if first else self._asked.get_nowait()
                except queue.Empty:
                    return None
                waiting.add(item.key)
                return item

            try:
                for scored in self._pool.run(arrived):
                    waiting.discard(scored.key)
                    scored.key.set_result(dataclasses.replace(scored, key=None))
            except Exception as error:  # noqa: BLE001 - whoever waits must hear of it
                for answer in waiting:
                    answer.set_exception(ScoringError(str(error)))
                waiting.clear()
