"""Token data of a call as Eval Protocol's tracing decodes them: the `payloads` of a trace.

Each is one zstd frame with the size of its content, in base64. Integers are little-endian.

    prompt_token_ids (pti/v1)  a JSON array
    logprobs (LP01)            header of 24 bytes, then an id (int32) and a logprob (float32) for
                               each sampled token
    router_replay (R3V1)       header of 32 bytes, then a bit for each token of prompt and answer
                               that says whether there is a matrix, then the matrices, of one size

Invariant: what Eval Protocol decodes is what was given here, or there is a `PayloadError`. Its
decoders drop a payload that they cannot read with a warning, which nobody would see.
"""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
import zstandard

from eval_protocol_rft._errors import EvalProtocolRftError
from eval_protocol_rft.sampling import token_data_problem

LOGPROBS_HEADER = struct.Struct("<4sBBHIIQ")
LOGPROBS_ENTRY = np.dtype([("id", "<i4"), ("logprob", "<f4")])
ROUTING_HEADER = struct.Struct("<4sBBBBIIIIQ")
SUFFIX, BITMAP = 1, 2
"""Selectors: all from one token on; a bit for each."""
UINT8, UINT16 = 1, 2
"""What numbers of experts a matrix holds."""


class PayloadError(EvalProtocolRftError, ValueError):
    """Token data that no payload can hold."""


def encode_payloads(
    prompt_ids: Sequence[int],
    completion_ids: Sequence[int],
    logprobs: Sequence[float],
    routing_matrices: Sequence[str | None] | None = None,
    *,
    routing_dtype: int = UINT8,
) -> dict[str, dict[str, Any]]:
    """The `payloads` of a trace.

    Args:
        prompt_ids: [P]
        completion_ids: [T] sampled.
        logprobs: [T] of sampling, nats.
        routing_matrices: [P + T] base64, None or "" where there is none; None: no payload of them.
        routing_dtype: what the matrices hold.

    Raises:
        PayloadError: lengths differ, a number is no id or no logprob, matrices differ in size.
    """
    if problem := token_data_problem(list(completion_ids), list(logprobs), None):
        raise PayloadError(problem)
    payloads = {
        "prompt_token_ids": _prompt_ids(prompt_ids),
        "logprobs": _logprobs(completion_ids, logprobs),
    }
    if routing_matrices is not None:
        size = len(prompt_ids) + len(completion_ids)
        if len(routing_matrices) != size:
            raise PayloadError(f"{len(routing_matrices)} routing matrices for {size} tokens")
        payloads["router_replay"] = _routing(routing_matrices, routing_dtype)
    return {kind: {"manifest": {}, "data": _packed(raw)} for kind, raw in payloads.items()}


def _packed(raw: bytes) -> str:
    # One shot: the frame then holds the size of its content, without which it is not read.
    return base64.b64encode(zstandard.ZstdCompressor().compress(raw)).decode()


def _prompt_ids(ids: Sequence[int]) -> bytes:
    return json.dumps([int(token) for token in ids], separators=(",", ":")).encode()


def _logprobs(ids: Sequence[int], logprobs: Sequence[float]) -> bytes:
    entries = np.empty(len(ids), LOGPROBS_ENTRY)
    entries["id"], entries["logprob"] = ids, logprobs
    body = entries.tobytes()
    return LOGPROBS_HEADER.pack(b"LP01", 1, 0, 0, len(ids), len(body), 0) + body


def _routing(matrices: Sequence[str | None], dtype: int) -> bytes:
    try:
        blocks = [base64.b64decode(matrix, validate=True) for matrix in matrices if matrix]
    except ValueError as error:
        raise PayloadError(f"a routing matrix is no base64: {error}") from error
    if len({len(block) for block in blocks}) > 1:
        raise PayloadError("routing matrices differ in size, and a payload holds them in one")
    places = [place for place, matrix in enumerate(matrices) if matrix]
    start = places[0] if places else len(matrices)
    is_suffix = places == list(range(start, len(matrices)))
    bits = np.zeros(len(matrices), np.uint8)
    bits[places] = 1
    selector = b"" if is_suffix else np.packbits(bits, bitorder="little").tobytes()
    body = b"".join(blocks)
    header = ROUTING_HEADER.pack(
        b"R3V1",
        1,
        SUFFIX if is_suffix else BITMAP,
        dtype,
        0,
        len(matrices),
        len(places),
        start if is_suffix else 0,
        len(selector),
        len(body),
    )
    return header + selector + body
