"""Event streams come to what the same server would have sent whole, however they are written."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eval_protocol_rft.sampling import _event_stream
from eval_protocol_rft.sampling._event_stream import EventStream
from eval_protocol_rft.sampling._exactness import decode_reply, decode_stream
from eval_protocol_rft.sampling._replies import Choice, Reply
from eval_protocol_rft.sampling._types import ContractError, SamplingParams, TokenIds
from tests.hostile.replies import DONE, chunks_of, dumps, event, truth_of, whole_reply

PROMPT = TokenIds([5, 6, 151644])
PARAMS = SamplingParams(model="m", max_tokens=64, temperature=1.0)
SILENT = (
    b": comment\n\n",
    b"retry: 3000\n\n",
    b"data:\n\n",
    b"data: \n\n",
    b"event: ping\ndata: {}\n\n",
    b'data: {"type": "ping"}\n\n',
)


def parse_stream(body: bytes) -> tuple[Reply, dict[int, list[str]]]:
    stream = EventStream()
    stream.feed(body)
    return stream.reply()


def reply_of(dialect: Any, seed: int, index: int = 0) -> dict[str, Any]:
    """One whole reply with one choice, told to be choice `index`."""
    request = {"model": "m", "prompt": PROMPT}
    reply = whole_reply(request, truth_of(PROMPT, seed, 64), name="cmpl-1", dialect=dialect)
    reply["choices"][0]["index"] = index
    return reply


def events_of(reply: dict[str, Any]) -> list[bytes]:
    events = []
    for chunk in chunks_of(reply, counts=False):
        for choice in chunk["choices"]:
            choice["index"] = reply["choices"][0]["index"]
        events.append(event(chunk))
    return events


@given(
    st.sampled_from(["fireworks", "vllm"]), st.integers(0, 50), st.data(),
    st.sampled_from([b"\n", b"\r\n", b"\r"]),
)  # fmt: skip
def test_two_choices_between_each_other_and_among_silent_events(
    dialect: str, seed: int, data: st.DataObject, line_end: bytes
) -> None:
    replies = [reply_of(dialect, seed + index, index) for index in (0, 1)]
    whole = {**replies[0], "choices": [reply["choices"][0] for reply in replies], "usage": None}
    expected = decode_reply(dumps(whole), PROMPT, PARAMS, n=2)
    left = [events_of(reply) for reply in replies]
    stream = []
    while any(left):
        which = data.draw(st.sampled_from([i for i, events in enumerate(left) if events]))
        stream.append(left[which].pop(0))
        if data.draw(st.booleans()):
            stream.append(data.draw(st.sampled_from(SILENT)))
    body = b"".join([*stream, DONE]).replace(b"\n", line_end)
    assert decode_stream(body, PROMPT, PARAMS, n=2) == expected


@pytest.mark.parametrize("batch", [1, 300])
@given(st.integers(0, 9999), st.sampled_from([b"\n", b"\r\n", b"\r"]))
@settings(max_examples=30)
def test_how_the_bytes_arrive_makes_no_difference(batch: int, seed: int, line_end: bytes) -> None:
    rng = random.Random(seed)
    body = b"".join([SILENT[0], *events_of(reply_of("fireworks", 7)), SILENT[4], DONE])
    body = body.replace(b"\n", line_end)
    [expected] = decode_stream(body, PROMPT, PARAMS)
    stream, at, done = EventStream(), 0, False
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_event_stream, "BATCH_BYTES", batch)
        while at < len(body):
            assert not done
            size = rng.choice([1, 2, 3, 50, 400])
            done = stream.feed(body[at : at + size])
            at += size
    assert done
    assert stream.size == len(body)
    assert decode_stream(stream, PROMPT, PARAMS) == [expected]


def test_a_long_stream_is_read_while_it_arrives() -> None:
    """Neither its bytes nor an object per event wait for the end."""
    token = {"index": 0, "text": "a", "token_ids": [7], "logprobs": {"token_logprobs": [-0.5]}}
    one, stream, most = event({"model": "m", "choices": [token]}), EventStream(), 0
    for _ in range(2000):
        stream.feed(one)
        most = max(most, len(stream._unread))
    assert most < _event_stream.BATCH_BYTES + len(one)
    stream.feed(event({"choices": [{"index": 0, "finish_reason": "length"}]}) + DONE)
    [completion] = decode_stream(stream, PROMPT, SamplingParams(model="m", max_tokens=2000))
    assert completion.token_ids == [7] * 2000
    assert completion.logprobs == [-0.5] * 2000


@given(st.integers(0, 50), st.data())
def test_events_of_many_tokens_are_as_good_as_events_of_one(seed: int, data: st.DataObject) -> None:
    """As servers send them that are asked for fewer."""
    reply = reply_of("vllm", seed)
    singles = [chunk["choices"][0] for chunk in chunks_of(reply, counts=False)]
    events, rest = [], singles
    while rest:
        size = data.draw(st.integers(1, len(rest)))
        some, rest = rest[:size], rest[size:]
        whole = {**some[-1], "text": "".join(one["text"] for one in some)}
        whole["token_ids"] = [token for one in some for token in one["token_ids"]]
        whole["logprobs"] = {
            name: [value for one in some for value in one["logprobs"][name]]
            for name in some[0]["logprobs"]
        }
        events.append(event({"id": "cmpl-1", "model": "m", "choices": [whole]}))
    [completion] = decode_stream(b"".join([*events, DONE]), PROMPT, PARAMS)
    [expected] = decode_reply(dumps(reply), PROMPT, PARAMS)
    assert (completion.token_ids, completion.logprobs) == (expected.token_ids, expected.logprobs)
    assert (completion.text, completion.finish_reason) == (expected.text, expected.finish_reason)


@pytest.mark.parametrize(
    ("name", "first", "second"),
    [
        ("id", {"id": "a"}, {"id": "b"}),
        ("object", {"object": "text_completion"}, {"object": "chat"}),
        ("finish_reason", {"finish_reason": "stop"}, {"finish_reason": "length"}),
        ("stop_reason", {"stop_reason": 3}, {"stop_reason": "3"}),
        ("matched_stop", {"matched_stop": 3}, {"matched_stop": 4}),
        ("prompt_token_ids", {"prompt_token_ids": [1]}, {"prompt_token_ids": [1, 2]}),
    ],
)
def test_events_that_contradict_each_other_are_refused(
    name: str, first: dict[str, Any], second: dict[str, Any]
) -> None:
    def of(said: dict[str, Any]) -> bytes:
        whole = {key: said[key] for key in ("id", "object") if key in said}
        return event({"choices": [{"index": 0, **said}], **whole})

    with pytest.raises(ContractError, match=name):
        parse_stream(of(first) + of({}) + of(second) + DONE)


def test_what_no_event_says_is_not_said() -> None:
    reply, models = parse_stream(event({"choices": [{"index": 0}]}) * 2 + DONE)
    assert reply.choices == [Choice(0)]
    assert (reply.id, reply.usage, models) == (None, None, {})


def test_an_event_of_two_lines_is_one_payload() -> None:
    body = b'data: {"choices":\ndata: [{"index": 0, "text": "a"}]}\n\n' + DONE
    reply, _ = parse_stream(body)
    assert reply.choices == [Choice(0, text="a")]


def test_json_cut_in_two_events_is_not_put_together() -> None:
    """What two events hold must not become one."""
    with pytest.raises(Exception, match="cut off"):
        parse_stream(b'data: {"choices": [{"index": 0}\n\ndata: , {"index": 1}]}\n\n' + DONE)
