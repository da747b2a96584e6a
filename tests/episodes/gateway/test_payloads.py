"""Payloads of traces: to the byte, and as Eval Protocol's own decoders read them."""

from __future__ import annotations

import base64
import struct
from typing import Any

import pytest
import zstandard
from eval_protocol.tracing import PayloadType, decode_payloads
from hypothesis import given
from hypothesis import strategies as st

from eval_protocol_rft.episodes.gateway._payloads import UINT16, PayloadError, encode_payloads


def raw(payload: dict[str, Any]) -> bytes:
    frame = base64.b64decode(payload["data"], validate=True)
    assert zstandard.frame_content_size(frame) > 0
    return zstandard.ZstdDecompressor().decompress(frame)


def matrix(*values: int) -> str:
    return base64.b64encode(bytes(values)).decode()


ONE, TWO = matrix(1, 2), matrix(3, 4)


def test_prompt_ids_are_a_json_array():
    assert raw(encode_payloads([7, 100], [5], [-0.5])["prompt_token_ids"]) == b"[7,100]"


def test_logprobs_to_the_byte():
    expected = (
        "4c503031 01000000 02000000 10000000 00000000 00000000 05000000 000000bf 06000000 000080be"
    )
    assert raw(encode_payloads([1], [5, 6], [-0.5, -0.25])["logprobs"]) == bytes.fromhex(expected)


@pytest.mark.parametrize(
    ("matrices", "expected"),
    [
        (
            [None, ONE, TWO],
            "52335631 01010100 03000000 02000000 01000000 00000000 04000000 00000000 01020304",
        ),
        (
            [ONE, "", TWO],
            "52335631 01020100 03000000 02000000 00000000 01000000 04000000 00000000 05010203 04",
        ),
    ],
)
def test_routing_to_the_byte(matrices: list[str | None], expected: str):
    payloads = encode_payloads([1], [5, 6], [-0.5, -0.25], matrices)
    assert raw(payloads["router_replay"]) == bytes.fromhex(expected)


@given(
    st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=30),
    st.lists(st.tuples(st.integers(0, 2**31 - 1), st.floats(-700, 0)), min_size=1, max_size=30),
    st.data(),
)
def test_what_eval_protocol_decodes_is_what_was_given(prompt, sampled, data):
    ids, logprobs = map(list, zip(*sampled, strict=True))
    size = len(prompt) + len(ids)
    width = data.draw(st.integers(1, 9))
    blocks = st.binary(min_size=width, max_size=width).map(lambda b: base64.b64encode(b).decode())
    matrices = data.draw(st.lists(st.none() | blocks, min_size=size, max_size=size))
    payloads = encode_payloads(prompt, ids, logprobs, matrices, routing_dtype=UINT16)

    def never(kind: PayloadType, error: Exception) -> None:
        raise error

    decoded = decode_payloads(payloads, on_error=never)
    assert decoded[PayloadType.PROMPT_TOKEN_IDS].value == prompt
    assert decoded[PayloadType.LOGPROBS].token_ids == ids
    rounded = list(struct.unpack(f"{len(ids)}f", struct.pack(f"{len(ids)}f", *logprobs)))
    assert decoded[PayloadType.LOGPROBS].value == rounded
    assert decoded[PayloadType.ROUTER_REPLAY].value == matrices
    assert decoded[PayloadType.ROUTER_REPLAY].metadata["routing_dtype"] == "uint16"


@pytest.mark.parametrize(
    ("ids", "logprobs", "routing", "message"),
    [
        ([5], [-0.5, -0.5], None, "1"),
        ([], [], None, "no"),
        ([5], [float("nan")], None, "nan"),
        ([-1], [-0.5], None, "-1"),
        ([5], [-0.5], [ONE], "1 routing matrices for 2 tokens"),
        ([5], [-0.5], [ONE, matrix(1)], "differ in size"),
        ([5], [-0.5], [ONE, "%%"], "no base64"),
    ],
)
def test_what_no_payload_can_hold_is_refused(ids, logprobs, routing, message):
    with pytest.raises(PayloadError, match=message):
        encode_payloads([1], ids, logprobs, routing)
