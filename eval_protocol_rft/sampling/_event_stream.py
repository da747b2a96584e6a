"""Event streams of `/v1/completions`: bytes to events, events to one `Reply`. Pure.

Invariant: a stream is put together to what the same server would have sent whole, or it is an
error. A long completion is thousands of events, one per token: what is done for each is done by a
compiled loop, over all events at once.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import chain
from operator import attrgetter
from typing import Any

import msgspec

from eval_protocol_rft.sampling._replies import (
    ABSENT,
    DECODER,
    Choice,
    Entry,
    Logprobs,
    Reply,
    loads,
    parse_reply,
)
from eval_protocol_rft.sampling._types import ContractError, SamplingError

_DONE = re.compile(rb"(?:\A|[\r\n])data: ?\[DONE\](?:\r\n|\n|\r){2}")
"""The last event, whole: as a line of its own, and with the blank line that ends it. A text may
hold the same words."""
_LONGEST_DONE = 20
_KEEPALIVES = frozenset({"ping", "keepalive", "keep-alive", "keep_alive", "heartbeat"})
"""Names of events, and `type`s of their data, that gateways send to keep an idle connection open.
Where one stood in place of tokens, the usage and the ids would show it."""
_OTHER_FIELDS = frozenset({b"", b"event", b"id", b"retry"})
"""What may stand in an event beside its data. The empty name: a comment, or a line left blank."""


_choices, _id, _object, _model, _usage, _error = map(
    attrgetter, ("choices", "id", "object", "model", "usage", "error")
)
_index, _text, _token_ids, _prompt_token_ids, _raw_output = map(
    attrgetter, ("index", "text", "token_ids", "prompt_token_ids", "raw_output")
)
_finish_reason, _stop_reason, _matched_stop = map(
    attrgetter, ("finish_reason", "stop_reason", "matched_stop")
)
BATCH_BYTES = 1 << 15
"""So much is waited for before events are read: about a hundred of one token each, or as many
tokens in fewer."""
BATCH_EVENTS = 128
"""Put together at a time: the objects of more would leave the processor's cache."""
_COLUMNS = tuple(map(attrgetter, Logprobs.__struct_fields__))


class EventStream:
    """Puts a stream together while it arrives: its events are read a batch at a time, so neither
    their bytes nor an object for each of them is held until the last one."""

    def __init__(self) -> None:
        self.size = 0
        """Bytes that have arrived."""
        self._unread = bytearray()
        self._events = 0
        self._newest = b""
        """The newest event, not read yet: the last one is no reply, but `[DONE]`."""
        self._reply: Reply | None = None
        self._models: dict[int, list[str]] = {}
        self._problem: SamplingError | None = None

    def feed(self, data: bytes) -> bool:
        """Take what has arrived; say whether the last event is among it.

        Raises:
            ContractError: a line is no field of an event.
        """
        self.size += len(data)
        self._unread += data
        done = _is_done(self._unread, len(data))
        if len(self._unread) >= BATCH_BYTES:
            self._read(_end_of_events(self._unread))
        return done

    def reply(self) -> tuple[Reply, dict[int, list[str]]]:
        """The reply, of all that has arrived, and what a whole reply could not say: choice index ->
        the models that the events with its tokens name, in order, each as often as it took over
        from another.

        Raises: as `parse_reply`; a stream without `[DONE]` is a failed connection, one whose
        events contradict each other a ContractError.
        """
        body = bytes(self._unread)
        self._read(len(body))
        if self._newest != b"[DONE]":
            if not self._events and body.lstrip().startswith(b"{"):
                # Some servers answer errors and even replies unstreamed.
                return parse_reply(body), {}
            raise SamplingError(
                f"the event stream ends after {self._events} events without [DONE]",
                kind="connection",
            )
        if self._problem is not None:
            raise self._problem
        if self._reply is None:
            raise ContractError("the event stream holds no reply, only [DONE]")
        return self._reply, self._models

    def _read(self, end: int) -> None:
        """Read the events that end in the first `end` bytes."""
        with memoryview(self._unread) as unread:
            events = _events(bytes(unread[:end]))
        del self._unread[:end]
        if not events:
            return
        if self._events:
            events.insert(0, self._newest)
            self._events -= 1
        self._events += len(events)
        self._newest = events.pop()
        if self._problem is not None:
            return
        try:
            for start in range(0, len(events), BATCH_EVENTS):
                self._add(_chunks(events[start : start + BATCH_EVENTS]))
        except SamplingError as problem:
            # A stream that breaks off is a failed connection, whatever it held.
            self._problem = problem

    def _add(self, chunks: list[Reply]) -> None:
        if not chunks:
            return
        choices = list(chain.from_iterable(map(_choices, chunks)))
        self._note_models(chunks, choices)
        if self._reply is not None:
            chunks.insert(0, self._reply)
            choices[:0] = self._reply.choices
        parts = dict.fromkeys(map(_index, choices), choices)
        if len(parts) > 1:
            parts = {index: [] for index in parts}
            for choice in choices:
                parts[choice.index].append(choice)
        self._reply = Reply(
            [_joined_choice(of_one) for of_one in parts.values()],
            id=_one("id", map(_id, chunks)),
            object=_one("object", map(_object, chunks)),
            model=_newest(map(_model, reversed(chunks))),
            usage=_newest(map(_usage, reversed(chunks))),
        )

    def _note_models(self, chunks: list[Reply], choices: list[Choice]) -> None:
        named = set(map(_model, chunks))
        if (
            len(named) == 1
            and set(map(_index, choices)) <= self._models.keys()
            and all(known[-1] in named for known in self._models.values())
        ):
            return
        for chunk in chunks:
            for choice in chunk.choices:
                # One without tokens may come from weights that sampled none of them.
                if chunk.model and (choice.token_ids or choice.text or choice.logprobs is not None):
                    known = self._models.setdefault(choice.index, [])
                    if not known or known[-1] != chunk.model:
                        known.append(chunk.model)


def _is_done(body: bytearray, new: int) -> bool:
    """Whether the last event is among the `new` last bytes."""
    # Found by its words first: the pattern alone would cost more than parsing the events.
    at = body.rfind(b"[DONE]", max(0, len(body) - new - _LONGEST_DONE))
    return at >= 0 and _DONE.search(body, max(0, at - _LONGEST_DONE)) is not None


def _end_of_events(body: bytearray) -> int:
    """Where the last whole event ends, blank line included; 0 where none can be seen to."""
    at = body.rfind(b"\n\n")
    return at + 2 if at >= 0 else body.rfind(b"\r\n\r\n") + 4 if b"\r\n\r\n" in body else 0


def _chunks(events: list[bytes]) -> list[Reply]:
    """What each event says, without those that say nothing."""
    try:
        chunks = list(map(DECODER.decode, events))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return [parse_reply(event) for event in events if not _says_nothing(event)]
    if not _all_are(list(map(_error, chunks)), ABSENT):
        return list(map(parse_reply, events))
    return chunks


def _events(body: bytes) -> list[bytes]:
    """The data of each event that has some; several `data:` lines are one payload (HTML standard,
    9.2.6). An event that no blank line ends did not arrive whole."""
    lines = body.splitlines()
    if len(lines) % 2 == 0 and not any(lines[1::2]):
        # As servers write it: an event is one line, and behind it a blank one.
        data = [line[6:] for line in lines[::2] if line.startswith(b"data: ")]
        if len(data) * 2 == len(lines) and all(map(bytes.strip, data)):
            return data
    *whole, _unfinished = b"\n".join([*lines, b""]).split(b"\n\n")
    return [data for data in map(_data, whole) if data.strip()]


def _data(block: bytes) -> bytes:
    data, event = [], b""
    for line in block.split(b"\n"):
        name, _, value = line.partition(b":")
        if name == b"data":
            data.append(value.removeprefix(b" "))
        elif name == b"event":
            event = value.strip()
        elif name not in _OTHER_FIELDS:
            # The standard lets readers skip it; it may be what is left of an event with tokens.
            raise ContractError(
                f"the event stream holds a line that is no field of an event: {line[:80]!r}"
            )
    return b"" if event.decode("latin-1").lower() in _KEEPALIVES else b"\n".join(data)


def _says_nothing(event: bytes) -> bool:
    """Whether it is a keep-alive under no name of its own, such as `{"type": "ping"}`."""
    if b'"choices"' in event or b'"type"' not in event:
        return False
    value = loads(event)
    return isinstance(value, dict) and str(value.get("type")) in _KEEPALIVES


def _joined_choice(parts: list[Choice]) -> Choice:
    """The parts of one choice as one, column by column: a loop over fields for every event would
    cost more than reading their JSON. The lists of the first part become those of the whole."""
    index = parts[0].index
    finish_reasons = list(map(_finish_reason, parts))
    if _goes_on(parts, finish_reasons):
        raise ContractError(f"choices[{index}]: tokens after finish_reason in the stream")
    logprobs = [part.logprobs for part in parts if part.logprobs is not None]
    text = "".join(filter(None, map(_text, parts)))
    return Choice(
        index,
        finish_reason=_one("finish_reason", finish_reasons),
        text=text if text or any(part.text is not None for part in parts) else None,
        stop_reason=_one("stop_reason", map(_stop_reason, parts)),
        matched_stop=_one("matched_stop", map(_matched_stop, parts)),
        token_ids=_joined(map(_token_ids, parts)),
        prompt_token_ids=_one_prompt(map(_prompt_token_ids, parts)),
        logprobs=Logprobs(*(_joined(map(column, logprobs)) for column in _COLUMNS))
        if logprobs
        else None,
        raw_output=_newest(map(_raw_output, reversed(parts))),
    )


def _goes_on(parts: list[Choice], finish_reasons: list[str | None]) -> bool:
    """Whether tokens come after an end."""
    if not any(finish_reasons):
        return False
    end = next(i for i, reason in enumerate(finish_reasons) if reason)
    return any(part.token_ids or _content(part) for part in parts[end + 1 :])


def _all_are(values: list[Any], value: Any) -> bool:
    """Whether they are all the same object. Compares identities first, and so is fast."""
    return values == [value] * len(values)


def _one(name: str, values: Iterable[Any]) -> Any:
    """What the events say of the whole reply, where they say it; two values are one too many."""
    told = list(values)
    if _all_are(told, told[0]):
        return told[0]
    different = [value for value in dict.fromkeys(told) if value not in (None, "")]
    if len(different) > 1:
        known, new, *_ = different
        raise ContractError(
            f"the events of the stream tell two values of {name}: {known!r} and {new!r}"
        )
    return different[0] if different else None


def _one_prompt(echoes: Iterable[msgspec.Raw]) -> msgspec.Raw:
    prompt = ABSENT
    for echo in echoes:
        if echo in (prompt, ABSENT):
            continue
        if prompt is not ABSENT:
            raise ContractError("the events of the stream tell different prompt_token_ids")
        prompt = echo
    return prompt


def _content(choice: Choice) -> list[Entry] | None:
    return choice.logprobs.content if choice.logprobs is not None else None


def _joined(columns: Iterable[list[Any] | None]) -> list[Any] | None:
    """The first list, with the others added to it; None where there is none."""
    there = list(columns)
    if _all_are(there, None):
        return None
    first, *others = [column for column in there if column is not None]
    first.extend(chain.from_iterable(others))
    return first


def _newest(backwards: Iterable[Any]) -> Any:
    return next(filter(None, backwards), None)
