"""What Eval Protocol's tracing proxy offers, by a gateway: model calls under the five ids of a
rollout, its logs and status, and its calls as traces with token data. So Eval Protocol's own
`RemoteRolloutProcessor(include_payloads=True)` brings back rows to train on, unmodified.

Invariant: a rollout's traces are the calls on the path of its last answer, in order, and no others:
Eval Protocol puts traces and messages together by their number alone, so a retry or a sub-agent
among them would hand a message the ids of another answer. A rollout that is rolled out again under
the same id begins anew. However many rollouts there are, those that are kept are bounded.
"""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import msgspec

from eval_protocol_rft.episodes.gateway._call import CallError
from eval_protocol_rft.episodes.gateway._payloads import encode_payloads
from eval_protocol_rft.episodes.gateway._session import Session
from eval_protocol_rft.episodes.gateway._tree import Node
from eval_protocol_rft.rollout import GATEWAY_KEY
from eval_protocol_rft.sampling import Completion, Failure, TokenIds

IDS = ("rollout_id", "invocation_id", "experiment_id", "run_id", "row_id")
"""Of a rollout, in the order in which its address has them."""

MOST_ROLLOUTS = 4096
"""Kept at once; then one is dropped that was fetched, or that only logs told of, or else the one
that was heard of the longest ago."""
MOST_FETCHED = 64
"""Of those whose traces were fetched: Eval Protocol does so once, when a rollout is over."""
IDLE_SECONDS = 4 * 3600.0
"""A rollout that nothing was heard of for so long is dropped."""
MOST_LOGS = 256
"""Log entries of a rollout; the oldest go first."""
MOST_LOG_BYTES = 64 * 1024
"""Of one entry; what is longer is refused."""
MOST_KEPT_LOG_BYTES = 64 * 1024 * 1024
"""Of the entries of all rollouts, each with `LOG_ENTRY_BYTES`; the oldest go first."""
LOG_ENTRY_BYTES = 1024
"""What an entry takes beside its text."""
MOST_TAG_LENGTH = 1024
"""Of a log entry's tag that tells an id, in characters; what is longer is refused."""

_RUNNING = 101
_UNAVAILABLE = 14
_SUCCESSES = frozenset({0, 100, 102})
"""Codes of `Status` that end a rollout well. At others the processor raises, and Eval Protocol may
roll the row out again."""


class _Status(msgspec.Struct):
    code: int
    message: str | None = None
    details: list[Any] = []


class _Log(msgspec.Struct):
    """An entry, as `FireworksTracingHttpHandler` sends it. Further fields are passed over."""

    tags: list[str]
    message: str = ""
    status: _Status | None = None
    extras: dict[str, Any] | None = None
    severity: str | None = None


@dataclass(slots=True, kw_only=True, eq=False)
class Rollout:
    """What is known of one rollout."""

    rollout_id: str
    tags: tuple[str, ...]
    """`NAME:ID` of the ids that were told, one of a name: a call's, or else the first log's."""
    session: Session | None = None
    """None where no model call has come yet."""
    logs: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=MOST_LOGS))
    code: int | None = None
    """Of the newest status that was logged."""
    is_told: bool = False
    """Whether that code, an end, was handed out."""
    attempts: int = 0
    """That failed before."""
    touched: float = 0.0


class RolloutStore:
    """The rollouts that a gateway keeps for Eval Protocol. Reads no clock: `now` is in seconds, of
    any one."""

    def __init__(self) -> None:
        self._rollouts: OrderedDict[str, Rollout] = OrderedDict()
        """The one that was heard of the longest ago first."""
        self._fetched: OrderedDict[str, None] = OrderedDict()
        self._bare: OrderedDict[str, None] = OrderedDict()
        """Those that only logs told of, for which no key is needed."""
        self._dropped: list[Session] = []
        self._logs: deque[tuple[dict[str, Any], int, list[deque[dict[str, Any]]]]] = deque()
        """Entries with their bytes and the logs that they are in, the oldest first."""
        self._log_bytes = 0

    def __len__(self) -> int:
        return len(self._rollouts)

    def close(self) -> None:
        """Keep nothing any more."""
        for rollout_id in list(self._rollouts):
            self._drop(rollout_id)

    def dropped(self) -> list[Session]:
        """Sessions that are no longer kept, each told once: to be ended."""
        dropped, self._dropped = self._dropped, []
        return dropped

    def session(
        self, ids: Mapping[str, str], begin: Callable[[str, int], Session], *, now: float
    ) -> Session:
        """The session of a rollout, which begins with its first call. `begin` makes one of its id
        and the number of attempts at it before this one."""
        rollout = self._heard(ids["rollout_id"], now)
        if rollout.session is None:
            rollout.session = begin(rollout.rollout_id, rollout.attempts)
            self._bare.pop(rollout.rollout_id, None)
        rollout.tags = tuple(f"{name}:{ids[name]}" for name in IDS)
        return rollout.session

    def log(self, body: bytes, *, now: float) -> None:
        """Take a log entry in, for each rollout that its tags name; without one it is not kept.

        Raises:
            CallError: it is none, or too long, or one of its ids is.
        """
        if len(body) > MOST_LOG_BYTES:
            raise CallError(f"a log entry has at most {MOST_LOG_BYTES} bytes", status=413)
        try:
            log = msgspec.json.decode(body, type=_Log)
        except msgspec.MsgspecError as error:
            raise CallError(f"no log entry: {error}") from error
        ids = [tag for tag in log.tags if tag.partition(":")[0] in IDS]
        if any(len(tag) > MOST_TAG_LENGTH for tag in ids):
            raise CallError(f"a tag with an id has at most {MOST_TAG_LENGTH} characters")
        entry = {
            "timestamp": (log.extras or {}).get("timestamp") or _timestamp(time.time()),
            "severity": log.severity or (log.extras or {}).get("level") or "INFO",
            **{name: getattr(log, name) for name in ("message", "tags", "status", "extras")},
        }
        rollouts = [self._heard(one, now) for one in dict.fromkeys(_named(ids, "rollout_id"))]
        for rollout in rollouts:
            # What was told first stays, so there are no more tags than names.
            told = {tag.partition(":")[0]: tag for tag in (*reversed(ids), *rollout.tags)}
            rollout.tags = tuple(told[name] for name in IDS if name in told)
            if log.status is not None:
                rollout.code, rollout.is_told = log.status.code, False
        if rollouts:
            self._keep(entry, len(body), rollouts)

    def status(self, rollout_id: str, *, now: float) -> dict[str, Any]:
        """What `GET /v1/status` answers: null while nothing was logged, 101 while it runs.

        A rollout with a call that got no completion has failed, whatever its agent made of it: what
        the agent did then says nothing of the policy.
        """
        rollout = self._rollouts.get(rollout_id)
        code = None
        if rollout is not None:
            self._heard(rollout_id, now)
            failure = rollout.session.failure if rollout.session is not None else None
            if failure is not None and rollout.code in _SUCCESSES:
                rollout.code = _UNAVAILABLE
                self._keep(_failed(rollout, failure), len(failure.message), [rollout])
            code, rollout.is_told = rollout.code, rollout.code not in (None, _RUNNING)
        status = None if code is None else {"code": code}
        return {"rollout_id": rollout_id, "status": status, "extras": None}

    def entries(
        self, tags: Sequence[str], tell: Callable[[Session], Mapping[str, Any]], *, limit: int = 100
    ) -> list[dict[str, Any]]:
        """What `GET /logs` answers, the newest first: entries that have all of `tags`, of which one
        at least tells an id. Where `tags` name the rollout and its newest status ends it well, the
        extras of this hold what `tell` says of the session, and its metrics under `GATEWAY_KEY`:
        Eval Protocol puts extras on the row. Other ids do not do: an agent's own address has those
        that it shares with other rollouts.

        A failure that was told, and is looked up now, has been heard of: the processor raises, and
        Eval Protocol may roll the row out again under the same id. It must not hear the same status
        again, so the rollout begins anew.
        """
        found = []
        is_named = any(_named(tags, "rollout_id"))
        for rollout in self._with([tag for tag in tags if tag.partition(":")[0] in IDS]):
            own = [entry for entry in rollout.logs if set(tags) <= set(entry["tags"])]
            last = next((entry for entry in own if entry["status"] is not None), None)
            if (
                is_named
                and last is not None
                and rollout.session is not None
                and rollout.code in _SUCCESSES
            ):
                told = {**tell(rollout.session), GATEWAY_KEY: rollout.session.metrics()}
                whole = {**last, "extras": {**(last["extras"] or {}), **told}}
                own = [whole if entry is last else entry for entry in own]
            found += own
            if is_named and rollout.is_told and rollout.code not in _SUCCESSES:
                self._restart(rollout)
        return found[:limit]

    def paths(
        self, tags: Sequence[str], *, is_final: bool, now: float
    ) -> list[tuple[Rollout, list[Node]]]:
        """The rollouts that have all of `tags`, each with the conversation of its last answer. With
        `is_final` they count as fetched from then on."""
        found = []
        for rollout in self._with(tags):
            self._heard(rollout.rollout_id, now)
            path = rollout.session.conversation() if rollout.session is not None else []
            if path:
                found.append((rollout, path))
            if path and is_final:
                self._fetched[rollout.rollout_id] = None
                self._fetched.move_to_end(rollout.rollout_id)
        self._bound(now)
        return found

    def _with(self, tags: Sequence[str]) -> list[Rollout]:
        """Those that have all tags; one of these names the rollout, or all are looked through."""
        wanted = set(tags)
        if not wanted:
            return []
        named = list(_named(tags, "rollout_id"))
        among: Iterable[Rollout] = self._rollouts.values()
        if named:
            among = filter(None, map(self._rollouts.get, named[:1]))
        return [rollout for rollout in among if wanted <= set(rollout.tags)]

    def _keep(self, entry: dict[str, Any], size: int, rollouts: Sequence[Rollout]) -> None:
        """Keep a log entry of `size` bytes, and let the oldest ones go that there is no room for.
        Those of rollouts that are dropped meanwhile count until then."""
        for rollout in rollouts:
            rollout.logs.appendleft(entry)
        size += LOG_ENTRY_BYTES
        self._logs.append((entry, size, [rollout.logs for rollout in rollouts]))
        self._log_bytes += size
        while self._log_bytes > MOST_KEPT_LOG_BYTES:
            oldest, size, holders = self._logs.popleft()
            self._log_bytes -= size
            for logs in holders:
                if logs and logs[-1] is oldest:
                    logs.pop()

    def _heard(self, rollout_id: str, now: float) -> Rollout:
        rollout = self._rollouts.get(rollout_id)
        if rollout is None:
            self._bound(now, room=1)
            rollout = Rollout(rollout_id=rollout_id, tags=(f"rollout_id:{rollout_id}",))
            self._rollouts[rollout_id] = rollout
            self._bare[rollout_id] = None
        rollout.touched = now
        self._rollouts.move_to_end(rollout_id)
        return rollout

    def _bound(self, now: float, *, room: int = 0) -> None:
        while len(self._fetched) > MOST_FETCHED:
            self._drop(next(iter(self._fetched)))
        while len(self._rollouts) > MOST_ROLLOUTS - room:
            some = (next(iter(kind), None) for kind in (self._fetched, self._bare, self._rollouts))
            self._drop(next(filter(None, some)))
        while self._rollouts:
            oldest = next(iter(self._rollouts.values()))
            if now - oldest.touched <= IDLE_SECONDS:
                break
            self._drop(oldest.rollout_id)

    def _drop(self, rollout_id: str) -> None:
        self._fetched.pop(rollout_id, None)
        self._bare.pop(rollout_id, None)
        rollout = self._rollouts.pop(rollout_id, None)
        if rollout is not None and rollout.session is not None:
            self._dropped.append(rollout.session)

    def _restart(self, rollout: Rollout) -> None:
        if rollout.session is not None:
            self._dropped.append(rollout.session)
        rollout.session, rollout.code, rollout.is_told = None, None, False
        rollout.attempts += 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One answer on the path of a rollout's last one, as a trace without its payloads, and the
    token data of these."""

    trace: dict[str, Any]
    prompt_ids: TokenIds
    completion: Completion

    def with_payloads(self) -> dict[str, Any]:
        """The whole trace. Touches nothing that changes, so a thread may do it."""
        completion, routing = self.completion, self.completion.routing_matrices
        payloads = encode_payloads(
            self.prompt_ids,
            completion.token_ids,
            completion.logprobs,
            None if routing is None else [""] * len(self.prompt_ids) + routing,
        )
        return {**self.trace, "payloads": payloads}


def calls_of(rollout: Rollout, path: Sequence[Node]) -> list[Call]:
    """A conversation as its calls, one for each answer that was sampled, in order.

    Args:
        rollout: that it is of.
        path: its messages.
    """
    session = rollout.session
    assert session is not None  # noqa: S101 - there is a conversation
    messages: list[dict[str, Any]] = []
    calls: list[Call] = []
    for node in path:
        message = {"content": None, **node.message}
        if node.turn is not None:
            tools, answered_at = session.asked_with(node)
            trace = {
                "id": f"{rollout.rollout_id}-{len(calls)}",
                "name": "chat",
                "tags": list(rollout.tags),
                "timestamp": _timestamp(answered_at),
                "input": {"messages": list(messages), "tools": tools},
                "output": message,
                "observations": [],
            }
            turn = node.turn
            call = Call(trace=trace, prompt_ids=turn.prompt.ids, completion=turn.completion)
            calls.append(call)
        messages.append(message)
    return calls


def _failed(rollout: Rollout, failure: Failure) -> dict[str, Any]:
    """The log entry of a rollout whose model could not be sampled."""
    message = f"a model call got no completion: {failure.message}"
    return {
        "timestamp": _timestamp(time.time()),
        "severity": "ERROR",
        "message": message,
        "tags": list(rollout.tags),
        "status": _Status(code=_UNAVAILABLE, message=message),
        "extras": None,
    }


def _named(tags: Sequence[str], name: str) -> Iterable[str]:
    return (tag.partition(":")[2] for tag in tags if tag.partition(":")[0] == name)


def _timestamp(seconds: float) -> str:
    """Unix seconds in the form that Eval Protocol writes."""
    return datetime.fromtimestamp(seconds, UTC).isoformat()
