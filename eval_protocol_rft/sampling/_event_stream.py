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


_id, _object, _model, _usage = map(attrgetter, ("id", "object", "model", "usage"))
_text, _token_ids, _prompt_token_ids, _raw_output = map(
    attrgetter, ("text", "token_ids", "prompt_token_ids", "raw_output")
)
_finish_reason, _stop_reason, _matched_stop = map(
    attrgetter, ("finish_reason", "stop_reason", "matched_stop")
)
_COLUMNS = tuple(map(attrgetter, Logprobs.__struct_fields__))


def is_done(body: bytearray, new: int) -> bool:
    """Whether the last event is among the `new` last bytes."""
    # Found by its words first: the pattern alone would cost more than parsing the events.
    at = body.rfind(b"[DONE]", max(0, len(body) - new - _LONGEST_DONE))
    return at >= 0 and _DONE.search(body, max(0, at - _LONGEST_DONE)) is not None


def parse_stream(body: bytes) -> tuple[Reply, dict[int, list[str]]]:
    """Parse a whole event stream and put its chunks together.

    Returns:
        The reply, and what a whole reply could not say: choice index -> the models that the events
        with its tokens name, in order, each as often as it took over from another.

    Raises: as `parse_reply`; a stream without `[DONE]` is a failed connection, one whose
    events contradict each other a ContractError.
    """
    events = _events(body)
    if not events or events[-1] != b"[DONE]":
        if not events and body.lstrip().startswith(b"{"):
            # Some servers answer errors and even replies unstreamed.
            return parse_reply(body), {}
        raise SamplingError(
            f"the event stream ends after {len(events)} events without [DONE]", kind="connection"
        )
    del events[-1]
    chunks = _chunks(events)
    if not chunks:
        raise ContractError("the event stream holds no reply, only [DONE]")
    parts: dict[int, list[Choice]] = {}
    for chunk in chunks:
        for choice in chunk.choices:
            if choice.index in parts:
                parts[choice.index].append(choice)
            else:
                parts[choice.index] = [choice]
    models = list(map(_model, chunks))
    reply = Reply(
        [_joined_choice(of_one) for of_one in parts.values()],
        id=_one("id", map(_id, chunks)),
        object=_one("object", map(_object, chunks)),
        model=next(filter(None, reversed(models)), None),
        usage=next(filter(None, map(_usage, reversed(chunks))), None),
    )
    return reply, _models_of_choices(chunks, models, parts)


def _chunks(events: list[bytes]) -> list[Reply]:
    """What each event says, without those that say nothing."""
    try:
        chunks = list(map(DECODER.decode, events))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return [parse_reply(event) for event in events if not _says_nothing(event)]
    if any(chunk.error is not ABSENT for chunk in chunks):
        return list(map(parse_reply, events))
    return chunks


def _models_of_choices(
    chunks: list[Reply], models: list[str | None], parts: dict[int, list[Choice]]
) -> dict[int, list[str]]:
    names = list(filter(None, dict.fromkeys(models)))
    if len(names) == 1:
        return {index: names for index, of_one in parts.items() if any(map(_has_tokens, of_one))}
    named: dict[int, list[str]] = {}
    for chunk in chunks:
        if chunk.model:
            _note_model(chunk.model, chunk.choices, named)
    return named


def _note_model(model: str, choices: list[Choice], models: dict[int, list[str]]) -> None:
    for choice in choices:
        if _has_tokens(choice):
            named = models.setdefault(choice.index, [])
            if not named or named[-1] != model:
                named.append(model)


def _has_tokens(choice: Choice) -> bool:
    """Else its event may come from weights that sampled none of them."""
    return bool(choice.token_ids or choice.text or choice.logprobs is not None)


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
    cost more than reading their JSON."""
    texts = list(map(_text, parts))
    logprobs = [part.logprobs for part in parts if part.logprobs is not None]
    finish_reasons = list(map(_finish_reason, parts))
    index = parts[0].index
    if _goes_on(parts, finish_reasons):
        raise ContractError(f"choices[{index}]: tokens after finish_reason in the stream")
    return Choice(
        index,
        finish_reason=_one("finish_reason", finish_reasons),
        text=None if texts.count(None) == len(texts) else "".join(filter(None, texts)),
        stop_reason=_one("stop_reason", map(_stop_reason, parts)),
        matched_stop=_one("matched_stop", map(_matched_stop, parts)),
        token_ids=_joined(map(_token_ids, parts)),
        prompt_token_ids=_one_prompt(map(_prompt_token_ids, parts)),
        logprobs=Logprobs(*(_joined(map(column, logprobs)) for column in _COLUMNS))
        if logprobs
        else None,
        raw_output=next(filter(None, map(_raw_output, reversed(parts))), None),
    )


def _goes_on(parts: list[Choice], finish_reasons: list[str | None]) -> bool:
    """Whether tokens come after an end."""
    ends = len(parts) - finish_reasons.count(None)
    if not ends:
        return False
    end = next(i for i, reason in enumerate(finish_reasons) if reason is not None)
    return any(part.token_ids or _content(part) for part in parts[end + 1 :])


def _one(name: str, values: Iterable[Any]) -> Any:
    """What the events say of the whole reply, where they say it; two values are one too many."""
    different = [value for value in dict.fromkeys(values) if value not in (None, "")]
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
    """One after the other; None where none is there."""
    there = [column for column in columns if column is not None]
    return list(chain.from_iterable(there)) if there else None
