"""Whatever happens to a reply on its way, it is the original completion or a typed error.

Random single damage anywhere in a reply's JSON: a value dropped, duplicated, nulled, made NaN or of
another type, a list put in another order. What tells the damage is everything a reply says twice.
One kind cannot be told: plain vLLM replies say ids once and logprobs once, so the same values in
another order are just as good a reply. Those are left out of that base; with tokens written as ids
(`return_tokens_as_token_ids`, which we ask vLLM for whenever `logprobs_mode` is set) they are told.
"""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from eval_protocol_rft.sampling._exactness import decode_reply, decode_stream
from eval_protocol_rft.sampling._types import Completion, SamplingError, SamplingParams, TokenIds
from tests.test_wire import ALL, PROMPT, RAW, fireworks_reply

Path = tuple[str | int, ...]


def _fireworks_content_only() -> dict[str, Any]:
    reply = fireworks_reply()
    for key in ("token_ids", "raw_output", "prompt_token_ids"):
        del reply["choices"][0][key]
    return reply


def _recorded(name: str) -> tuple[dict[str, Any], TokenIds]:
    recorded = next(r for r in ALL if r.name == name and r.folder == RAW)
    return json.loads(recorded.body), recorded.prompt


BASES: dict[str, tuple[dict[str, Any], TokenIds]] = {
    "fireworks": (fireworks_reply(), PROMPT),
    "fireworks, content[] and usage alone": (_fireworks_content_only(), PROMPT),
    "vllm": _recorded("01_n1_t1"),
    "vllm, tokens as ids": _recorded("09_tokens_as_ids"),
}
SAID_ONCE = {
    "vllm": {
        ("choices", 0, "token_ids"),
        ("choices", 0, "logprobs", "token_logprobs"),
    }
}
PARAMS = SamplingParams(model="m")
OTHER_TYPES: list[Any] = ["7", True, 1.5, [], {}, "NaN", {"a": 1}, [[1]]]


def _paths(value: Any, at: Path = ()) -> list[Path]:
    found = [at] if at else []
    if isinstance(value, dict):
        for key, inner in value.items():
            found += _paths(inner, (*at, key))
    if isinstance(value, list):
        for index, inner in enumerate(value):
            found += _paths(inner, (*at, index))
    return found


def _get(value: Any, path: Path) -> Any:
    for step in path:
        value = value[step]
    return value


def _damage(reply: dict[str, Any], path: Path, data: st.DataObject) -> None:
    """Damage the value at `path` in place."""
    parent, last, value = _get(reply, path[:-1]), path[-1], _get(reply, path)
    kinds = ["drop", "null", "nan", "type"]
    if isinstance(parent, list):
        kinds.append("duplicate")
    if isinstance(value, list) and len(value) > 1:
        kinds.append("reorder")
    kind = data.draw(st.sampled_from(kinds), label="damage")
    if kind == "drop":
        del parent[last]
    elif kind == "null":
        parent[last] = None
    elif kind == "nan":
        parent[last] = data.draw(st.sampled_from([float("nan"), float("inf"), float("-inf")]))
    elif kind == "type":
        parent[last] = data.draw(st.sampled_from(OTHER_TYPES), label="value")
    elif kind == "duplicate":
        parent.insert(int(last), copy.deepcopy(value))
    else:
        parent[last] = data.draw(st.permutations(value), label="order")


def _exact(completion: Completion) -> tuple[Any, ...]:
    """What a trainer reads of a completion."""
    return (
        completion.token_ids,
        completion.logprobs,
        completion.raw_logprobs,
        completion.finish_reason,
    )


@pytest.mark.parametrize("base", BASES)
@settings(max_examples=1500, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_one_damage_gives_the_original_or_a_typed_error(base: str, data: st.DataObject) -> None:
    original, prompt = BASES[base]
    [whole] = decode_reply(json.dumps(original).encode(), prompt, PARAMS)
    reply = copy.deepcopy(original)
    path = data.draw(st.sampled_from(_paths(reply)), label="path")
    _damage(reply, path, data)
    if path in SAID_ONCE.get(base, ()) and _only_order_differs(original, reply, path):
        return
    try:
        [completion] = decode_reply(json.dumps(reply).encode(), prompt, PARAMS)
    except SamplingError:
        return
    assert _exact(completion) == _exact(whole)


def _only_order_differs(original: Any, reply: Any, path: Path) -> bool:
    try:
        return sorted(_get(original, path)) == sorted(_get(reply, path))
    except (KeyError, TypeError):
        return False


@settings(max_examples=1000, deadline=None)
@given(data=st.data())
def test_a_damaged_stream_gives_the_original_or_a_typed_error(data: st.DataObject) -> None:
    recorded = next(r for r in ALL if r.name == "10_stream_n1" and r.folder == RAW)
    [whole] = decode_stream(recorded.body, recorded.prompt, recorded.params)
    *blocks, end = recorded.body.split(b"\n\n")
    at = data.draw(st.integers(0, len(blocks) - 1), label="event")
    kind = data.draw(st.sampled_from(["drop", "duplicate", "cut", "swap"]))
    if kind == "drop":
        del blocks[at]
    elif kind == "duplicate":
        blocks.insert(at, blocks[at])
    elif kind == "cut":
        blocks[at] = blocks[at][: data.draw(st.integers(0, len(blocks[at]) - 1), label="length")]
    else:
        other = data.draw(st.integers(0, len(blocks) - 1), label="other")
        blocks[at], blocks[other] = blocks[other], blocks[at]
    try:
        [completion] = decode_stream(b"\n\n".join([*blocks, end]), recorded.prompt, recorded.params)
    except SamplingError:
        return
    assert _exact(completion) == _exact(whole)


@settings(max_examples=1000, deadline=None)
@given(junk=st.binary(max_size=200), cut=st.integers(0, 400), where=st.integers(0, 400))
def test_bytes_put_in_or_cut_out_never_crash_the_decoder(junk: bytes, cut: int, where: int) -> None:
    body = json.dumps(fireworks_reply()).encode()
    try:
        decode_reply(body[:where] + junk + body[where + cut :], PROMPT, PARAMS)
    except SamplingError:
        return
