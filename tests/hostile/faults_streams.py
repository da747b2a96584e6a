"""Event streams that lose, repeat or mix up their events. Framing is right."""

from __future__ import annotations

import json
import random
from typing import Any

from tests.hostile.exchange import Exchange
from tests.hostile.faults import STREAM, fault, pieces
from tests.hostile.replies import DONE, event


def _tokens(events: list[bytes]) -> list[int]:
    """Where the events that carry tokens are."""
    return [at for at, one in enumerate(events) if b'"token_ids"' in one]


@pieces("connection", says="\\[DONE\\]", modes=STREAM)
def no_done(events: list[bytes], rng: random.Random) -> list[bytes]:
    return events[:-1]


@pieces("connection", says="\\[DONE\\]", modes=STREAM)
def done_cut_off(events: list[bytes], rng: random.Random) -> list[bytes]:
    return [*events[:-1], DONE[: rng.randrange(len(DONE) - 1)]]


@pieces("connection", says="\\[DONE\\]", modes=STREAM)
def stream_cut_off(events: list[bytes], rng: random.Random) -> list[bytes]:
    body = b"".join(events[:-1])
    return [body[: rng.randrange(1, len(body))]]


@pieces("contract", says=".", modes=STREAM)
def event_dropped(events: list[bytes], rng: random.Random) -> list[bytes]:
    del events[rng.choice(_tokens(events))]
    return events


@pieces("contract", says=".", modes=STREAM)
def event_doubled(events: list[bytes], rng: random.Random) -> list[bytes]:
    at = rng.choice(_tokens(events))
    return [*events[:at], events[at], *events[at:]]


@pieces("contract", says="prompt|out of order|finish_reason|usage|differs", modes=STREAM)
def events_reversed(events: list[bytes], rng: random.Random) -> list[bytes]:
    """A stream of one token cannot be reversed: it gets a second one that came from nowhere."""
    tokens = [events[at] for at in _tokens(events)]
    if len(tokens) == 1:
        return [tokens[0], *events]
    return [*reversed(tokens), *events[len(tokens) :]]


@pieces("contract", "connection", says=".", modes=STREAM)
def event_cut_off(events: list[bytes], rng: random.Random) -> list[bytes]:
    """One event ends in the middle of its JSON; the stream goes on."""
    at = rng.choice(_tokens(events))
    events[at] = events[at][: rng.randrange(7, len(events[at]) - 3)] + b"\n\n"
    return events


@pieces("contract", says=".", modes=STREAM)
def event_without_its_name(events: list[bytes], rng: random.Random) -> list[bytes]:
    """A reader of event streams skips lines of unknown fields: the event is gone."""
    at = rng.choice(_tokens(events))
    events[at] = events[at].replace(b"data:", b"dada:")
    return events


@pieces("contract", "connection", says=".", modes=STREAM)
def done_in_the_middle(events: list[bytes], rng: random.Random) -> list[bytes]:
    """A client may stop reading at the first one: then the reply is cut off."""
    return [events[0], DONE, *events[1:]]


@pieces("unavailable", says="not today", modes=STREAM)
def error_event(events: list[bytes], rng: random.Random) -> list[bytes]:
    at = rng.choice(_tokens(events))
    return [*events[:at], event({"error": {"message": "not today"}}), DONE]


@fault("contract", says="id", modes=STREAM)
async def event_of_another_reply(exchange: Exchange) -> None:
    """One token's event is another stream's: same prompt, same place, another token."""
    events = exchange.pieces()
    at = exchange.rng.choice(_tokens(events))
    [choice] = json.loads(events[at][6:])["choices"]
    foreign = {**exchange.reply, "id": "cmpl-of-another", "choices": [_other_token(choice)]}
    foreign.pop("usage")
    events[at] = event(foreign)
    await exchange.answer(events)


def _other_token(choice: Any) -> Any:
    choice["token_ids"] = [token ^ 1 for token in choice["token_ids"]]
    for entry in choice["logprobs"].get("content", []):
        entry["token_id"] ^= 1
    if choice["logprobs"].get("tokens", [""])[0].startswith("token_id:"):
        [value] = choice["logprobs"]["token_logprobs"]
        names = [f"token_id:{token}" for token in choice["token_ids"]]
        choice["logprobs"] = {
            **choice["logprobs"],
            "tokens": names,
            "top_logprobs": [{names[0]: value}],
        }
    return choice


@fault("contract", says="finish_reason", modes=STREAM)
async def two_finish_reasons(exchange: Exchange) -> None:
    [choice] = exchange.reply["choices"]
    other = "length" if choice["finish_reason"] == "stop" else "stop"
    again = {"index": 0, "text": "", "finish_reason": other, "token_ids": [], "logprobs": None}
    events = [*exchange.chunks(), {"id": exchange.reply["id"], "choices": [again]}]
    await exchange.answer([*map(event, events), DONE])
