"""The turns of a rollout as Eval Protocol's readers have them: ours, as `token_turn_traces` and
`assistant_turn_payloads` say them; and those that its remote processors bring back from a tracing
proxy (`RemoteRolloutProcessor(include_payloads=True)`), as segments.

Invariant: a turn's ids and logprobs are those that went over the wire. What came back is one turn
for each of the agent's messages, in order, each with the ids of its prompt and its answer and as
many logprobs, or an error that names turn and token; nothing is aligned, and nothing guessed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np

from eval_protocol_rft import _segments, sampling
from eval_protocol_rft._segments import IntArray, RecordError, Segment, turn_trace


def turn_runs(loss_mask: Iterable[float]) -> Iterator[tuple[bool, int, int]]:
    """(sampled, start, stop) of each run of tokens that were all sampled, or all not. Something is
    always said between two turns, so a run that was sampled is one turn."""
    start = 0
    for sampled, run in groupby(loss_mask):
        stop = start + sum(1 for _ in run)
        yield bool(sampled), start, stop
        start = stop


def episode_traces(
    segments: Sequence[Segment], last: sampling.FinishReason
) -> list[dict[str, Any]]:
    """`token_turn_traces` of an episode: each run of sampled tokens, behind all of its segment
    before it. `last` is the finish reason of its last turn."""
    traces = []
    for segment in segments:
        tokens, logprobs = segment.tokens.tolist(), segment.logprobs.tolist()
        for sampled, start, stop in turn_runs(segment.loss_mask.tolist()):
            if sampled:
                trace = turn_trace(tokens[:start], tokens[start:stop], logprobs[start:stop], "stop")
                traces.append(trace)
    traces[-1]["finish_reason"] = last
    return traces


def turn_payloads(
    traces: Sequence[Mapping[str, Any]], messages: Sequence[Any]
) -> list[dict[str, Any]]:
    """`assistant_turn_payloads` of turns whose answers are the last assistant messages of a row.

    Args:
        traces: the turns, in order, as in `token_turn_traces`.
        messages: of the row, as objects or as JSON.
    """
    roles = [m.get("role") if isinstance(m, Mapping) else m.role for m in messages]
    first = max(roles.count("assistant") - len(traces), 0)
    return [
        {
            "assistant_turn_index": index,
            "completion_ids": trace["completion_ids"],
            "completion_logprobs": trace["completion_logprobs"],
        }
        for index, trace in enumerate(traces, start=first)
    ]


PAYLOADS_KEY = "assistant_turn_payloads"
REMOTE_KEYS = (
    "prompt_token_ids",
    "completion_token_ids",
    "completion_logprobs",
    "routing_matrices",
    "prompt_token_ids_metadata",
    "logprobs_metadata",
    "routing_metadata",
)
"""What Eval Protocol's remote processors put into `extra` of a turn; at its top level that of the
last one. No key of ours is among them."""
_COMPARED = REMOTE_KEYS[:4]


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteTurn:
    """One turn, as a tracing proxy recorded it. P prompt tokens, T sampled ones."""

    index: int
    """Which of the row's assistant messages it is."""
    prompt_ids: IntArray
    """[P]"""
    completion_ids: IntArray
    """[T]"""
    logprobs: list[float]
    """[T]"""
    routing_matrices: list[str] | None
    """[P + T] see `Segment`."""

    @property
    def name(self) -> str:
        """How messages call it."""
        return f"turn {self.index}"


def has_remote_turns(extra: Mapping[str, Any] | None) -> bool:
    """Whether a remote processor of Eval Protocol has left payloads in `extra`."""
    if extra is None:
        return False
    payloads = extra.get(PAYLOADS_KEY)
    entries = payloads if isinstance(payloads, list) else ()
    return any(
        key in values
        for values in (extra, *(e for e in entries if isinstance(e, Mapping)))
        for key in REMOTE_KEYS
    )


def remote_turns(extra: Mapping[str, Any], *, first: int, messages: int) -> list[RemoteTurn]:
    """The turns of a row that a remote processor of Eval Protocol brought back.

    Args:
        extra: of the row.
        first: how many of its assistant messages were there before anything was sampled.
        messages: how many it has.

    Raises:
        RecordError: a turn is missing, doubled, out of order or not whole, or a number is no token
            id or no logprob; the message names turn and token.
    """
    if messages <= first:
        raise RecordError("it has payloads, and no message of the agent's that they could be of")
    payloads = extra.get(PAYLOADS_KEY)
    if payloads is None:  # a row of a single trace
        payloads = [{**_remote(extra), _INDEX: messages - 1}]
    if not isinstance(payloads, list) or not all(isinstance(p, Mapping) for p in payloads):
        raise RecordError(f"{PAYLOADS_KEY} is no list of objects")
    _check_order([payload.get(_INDEX) for payload in payloads], first, messages)
    turns = [_remote_turn(payload) for payload in payloads]
    for key in _COMPARED:  # extras of a log may replace them
        if key in extra and extra[key] != payloads[-1].get(key):
            raise RecordError(
                f"{key} of the row is not that of its last turn, {turns[-1].name}: these are two "
                "answers"
            )
    return turns


_INDEX = "assistant_turn_index"


def _remote(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: values[key] for key in REMOTE_KEYS if key in values}


def _check_order(indices: Sequence[Any], first: int, messages: int) -> None:
    """Refuse turns that are not those from `first` to the last message, one after the other."""
    for place, index in enumerate(indices):
        where = f"{PAYLOADS_KEY}[{place}]"
        if isinstance(index, bool) or not isinstance(index, int):
            raise RecordError(f"{where}: {_INDEX} is {index!r}, no number of a message")
        if index in indices[:place]:
            raise RecordError(
                f"turn {index} is there twice ({PAYLOADS_KEY}[{indices.index(index)}] and "
                f"[{place}]): another call had as many assistant messages before it (the client's "
                "retry, a sub-agent), and nothing says which answer the agent kept"
            )
        if index < first + place:
            raise RecordError(f"{where} is turn {index}, behind turn {indices[place - 1]}")
        if index > first + place:
            raise RecordError(_missing(first + place, leading=not place))
    if first + len(indices) < messages:
        raise RecordError(_missing(first + len(indices), leading=not indices))
    if first + len(indices) > messages:
        raise RecordError(f"turn {messages} has a payload and the row no such message")


def _missing(turn: int, *, leading: bool) -> str:
    why = (
        "was it sampled, the proxy did not give its trace (some give the last one alone), or its "
        "payloads could not be read"
    )
    if leading:
        why += "; was it in the row before the rollout, say so with row_messages"
    return f"turn {turn}, an assistant message, has no payload: {why}"


def _remote_turn(payload: Mapping[str, Any]) -> RemoteTurn:
    index = payload[_INDEX]
    name = f"turn {index}"
    for key in ("prompt_token_ids", "completion_token_ids", "completion_logprobs"):
        if payload.get(key) is None:
            raise RecordError(f"{name}: no {key}: {_why_none(key, payload)}")
    prompt = _segments.read_ids(payload["prompt_token_ids"], f"{name}: prompt_token_ids")
    ids = _segments.read_ids(payload["completion_token_ids"], f"{name}: completion_token_ids")
    logprobs = payload["completion_logprobs"]
    _segments.check_logprobs(logprobs, len(ids), f"{name}: completion_logprobs")
    routing = payload.get("routing_matrices")
    if routing is not None:
        if isinstance(routing, list):  # as the trainer has it, in place of null
            routing = ["" if matrix is None else matrix for matrix in routing]
        size = len(prompt) + len(ids)
        _segments.check_routing(routing, size, f"{name}: routing_matrices")
        routing = routing if any(routing) else None
    return RemoteTurn(
        index=index,
        prompt_ids=prompt,
        completion_ids=ids,
        logprobs=list(logprobs),
        routing_matrices=routing,
    )


def _why_none(key: str, payload: Mapping[str, Any]) -> str:
    about = payload.get("logprobs_metadata")
    known = about.get("all_token_ids_valid") if isinstance(about, Mapping) else None
    if key == "completion_token_ids" and known is False:
        return "an id among them is missing (-1), and then Eval Protocol hands out none"
    return "its trace had no such payload, or one that could not be read"


def remote_segments(turns: Sequence[RemoteTurn]) -> list[Segment]:
    """What to train on, in order. A turn whose prompt begins with all that was sent and sampled
    before goes on with its segment, at any other one a new segment begins.

    Of the routing, each turn gives what it added to its segment: its answer, and what was said
    since the turn before."""
    runs: list[list[RemoteTurn]] = []
    before = np.empty(0, np.int64)
    for turn in turns:
        size = len(before)
        goes_on = size < len(turn.prompt_ids) and np.array_equal(turn.prompt_ids[:size], before)
        if not (runs and goes_on):
            runs.append([])
        runs[-1].append(turn)
        before = np.concatenate([turn.prompt_ids, turn.completion_ids])
    return [_segment(run) for run in runs]


def _segment(turns: Sequence[RemoteTurn]) -> Segment:
    """Turns each of which begins with all of the one before."""
    tokens = np.concatenate([turns[-1].prompt_ids, turns[-1].completion_ids])
    logprobs = np.zeros(len(tokens), np.float32)
    mask = np.zeros(len(tokens), np.float32)
    routing = [""] * len(tokens)
    start = 0
    for turn in turns:
        sampled = slice(len(turn.prompt_ids), len(turn.prompt_ids) + len(turn.completion_ids))
        logprobs[sampled], mask[sampled] = turn.logprobs, 1.0
        if turn.routing_matrices is not None:
            routing[start : sampled.stop] = turn.routing_matrices[start:]
        start = sampled.stop
    routed = any(routing)
    return Segment(
        tokens=tokens,
        logprobs=logprobs,
        loss_mask=mask,
        routing_matrices=routing if routed else None,
    )
