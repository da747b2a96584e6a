"""Logprobs and ids that are no finite logprobs and no ids."""

from __future__ import annotations

import random
from typing import Any

from tests.hostile.faults import WHOLE, change, pieces

MORE = 600


def _set_logprob(reply: Any, rng: random.Random, value: Any) -> None:
    logprobs = reply["choices"][0]["logprobs"]
    if "content" in logprobs:
        rng.choice(logprobs["content"])["sampling_logprob"] = value
    else:
        values = logprobs["token_logprobs"]
        values[rng.randrange(len(values))] = value


def _set_every(reply: Any, value: Any) -> None:
    logprobs = reply["choices"][0]["logprobs"]
    if "content" in logprobs:
        for entry in logprobs["content"]:
            entry["sampling_logprob"] = entry["logprob"] = value
    else:
        logprobs["token_logprobs"] = [value] * len(logprobs["token_logprobs"])


def _set_id(reply: Any, value: Any) -> None:
    choice = reply["choices"][0]
    choice["token_ids"][0] = value
    if "content" in choice["logprobs"]:
        choice["logprobs"]["content"][0]["token_id"] = value
        choice["raw_output"]["completion_token_ids"][0] = value
    elif choice["logprobs"]["tokens"][0].startswith("token_id:"):
        choice["logprobs"]["tokens"][0] = f"token_id:{value}"
        choice["logprobs"]["top_logprobs"][0] = {}


@change("contract", says="null")
def one_logprob_null(reply: Any, rng: random.Random) -> None:
    # One token alone would be "all null", which a server may say where raw and sampling are equal.
    _set_logprob(reply, rng, None)
    reply["choices"][0]["logprobs"].get("content", [{}])[0]["logprob"] = None


@change("contract", says="null")
def every_logprob_null(reply: Any, rng: random.Random) -> None:
    _set_every(reply, None)


@change("contract", says="no logprobs", modes=WHOLE)
def no_logprobs(reply: Any, rng: random.Random) -> None:
    reply["choices"][0]["logprobs"] = None


@change("contract", says="not JSON|malformed|invalid")
def logprob_nan(reply: Any, rng: random.Random) -> None:
    _set_logprob(reply, rng, float("nan"))


@change("contract", says="not JSON|malformed|invalid")
def logprob_infinite(reply: Any, rng: random.Random) -> None:
    _set_logprob(reply, rng, float("-inf"))


@pieces("contract", says="out of range|not a completions reply|not JSON")
def logprob_beyond_float64(body: list[bytes], rng: random.Random) -> list[bytes]:
    names = (b'"sampling_logprob":', b'"token_logprobs":[')
    name = next(name for name in names if name in b"".join(body))
    return [piece.replace(name, name + b"-1e999,", 1) if name in piece else piece for piece in body]


@change("contract", says="logprob")
def logprobs_beyond_float32(reply: Any, rng: random.Random) -> None:
    """Finite here, minus infinity in every trainer's float32; their sum is infinite even here."""
    _set_every(reply, -1.7e308)


@change("contract", says="not a finite logprob")
def logprob_positive(reply: Any, rng: random.Random) -> None:
    _set_logprob(reply, rng, 0.25)


@change("contract", says="Expected `float")
def logprob_as_text(reply: Any, rng: random.Random) -> None:
    _set_logprob(reply, rng, "-0.5")


@change("contract", says="not a token id|differs")
def id_negative(reply: Any, rng: random.Random) -> None:
    _set_id(reply, -1)


@change("contract", says="not a token id|differs")
def id_beyond_32_bits(reply: Any, rng: random.Random) -> None:
    _set_id(reply, 2**31)


@change("contract", says="out of range|not a token id")
def id_beyond_64_bits(reply: Any, rng: random.Random) -> None:
    _set_id(reply, 2**70)


@change("contract", says="Expected `int`")
def id_as_text(reply: Any, rng: random.Random) -> None:
    _set_id(reply, "19")


@change("contract", says="Expected `int`")
def id_true(reply: Any, rng: random.Random) -> None:
    _set_id(reply, True)


@pieces("contract", says="Expected `int`|more than|JSON|differs|prompt", modes=WHOLE)
def ids_fractional(body: list[bytes], rng: random.Random) -> list[bytes]:
    return [body[0].replace(b'"token_ids":[', b'"token_ids":[0.5,')]


@change("contract", says="more than max_tokens", modes=WHOLE)
def more_tokens_than_allowed(reply: Any, rng: random.Random) -> None:
    """Consistent with itself, and longer than any `max_tokens` that a test asks for."""
    choice = reply["choices"][0]
    logprobs = choice["logprobs"]
    for values in [choice["token_ids"], *logprobs.values()]:
        values.extend(values[-1:] * MORE)
    if "content" in logprobs:
        choice["raw_output"]["completion_token_ids"] = choice["token_ids"]
    reply["usage"]["completion_tokens"] += MORE
