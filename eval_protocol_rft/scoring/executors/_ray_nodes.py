"""One actor on every node of a Ray cluster, for as long as there is work.

Invariant: a node has at most one actor of ours. One that dies is replaced where its node is alive,
and a node that joins gets one, while the others go on. Nothing outlives this process: actors end
with the driver that made them, however it ends.

Plain actors, not Ray Data: that gives a batch back when the last of it is done, so that a long
completion would hold up the ones beside it, and samples all of a batch again when an actor dies.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args

from eval_protocol_rft._errors import EvalProtocolRftError

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


@dataclass(slots=True)
class NodeActors:
    """Actors for `work`. Not for several threads at once.

    Args:
        address: of the cluster; None: that of RAY_ADDRESS, else of the cluster that runs here, else
            one is started here. A process that is connected already stays with its cluster.
        work: what the actor of a node is made of.
    """

    address: str | None
    work: Callable[[Node], Work]
    _ray: Any = field(init=False, default_factory=require_ray)
    _connected_here: bool = False
    _ready: dict[str, NodeActor] = field(default_factory=dict)
    _starting: dict[str, NodeActor] = field(default_factory=dict)
    _start_deaths: Counter[str] = field(default_factory=Counter)
    _looked: float = -LOOK_SECONDS
    _last_ready: float = field(default_factory=time.monotonic)

    def connect(self) -> None:
        """Join the cluster, if this process has not yet. Blocks.

        Raises:
            RayEngineError: there is no cluster at the address.
        """
        if self._ray.is_initialized():
            return
        _check_reachable(self.address or os.environ.get("RAY_ADDRESS", ""))
        on_sigterm = signal.getsignal(signal.SIGTERM)
        try:
            # What the actors print stays in Ray's own logs: it would tear the progress bar.
            self._ray.init(self.address, log_to_driver=False, logging_level=logging.WARNING)
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
            node = Node(
                entry["NodeID"],
                entry["NodeManagerAddress"],
                int(entry["Resources"].get("CPU", 0)) if entry["Alive"] else 0,
            )
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

        work = self.work(node)
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
