"""Replies that are whole, well framed, and not the exact token data of this request.

Each function changes the reply's JSON; in a stream the same change shows in the chunks.
"""

from __future__ import annotations

import random
from typing import Any

from tests.hostile.faults import WHOLE, change, pieces
from tests.hostile.replies import Dialect

FIREWORKS: tuple[Dialect, ...] = ("fireworks",)
VLLM: tuple[Dialect, ...] = ("vllm",)


def entries(reply: Any) -> list[Any]:
    content: list[Any] = reply["choices"][0]["logprobs"]["content"]
    return content


@change("contract", says="indices \\[0, 1\\]", modes=WHOLE)
def two_choices(reply: Any, rng: random.Random) -> None:
    reply["choices"].append({**reply["choices"][0], "index": 1})


@change("contract", says="indices \\[0, 0\\]", modes=WHOLE)
def the_same_choice_twice(reply: Any, rng: random.Random) -> None:
    reply["choices"] *= 2


@change("contract", says="indices \\[\\]", modes=WHOLE)
def no_choices(reply: Any, rng: random.Random) -> None:
    reply["choices"] = []


@change("contract", says="indices \\[1\\]")
def choice_of_another_index(reply: Any, rng: random.Random) -> None:
    reply["choices"][0]["index"] = 1


@change("contract", says="missing required field `choices`", modes=WHOLE)
def choices_under_another_name(reply: Any, rng: random.Random) -> None:
    reply["choice"] = reply.pop("choices")


@change("contract", says="differs|token ids but|indices", dialects=FIREWORKS)
def entry_dropped(reply: Any, rng: random.Random) -> None:
    entries(reply).pop(rng.randrange(len(entries(reply))))


@change("contract", says="differs", dialects=FIREWORKS)
def entry_doubled(reply: Any, rng: random.Random) -> None:
    at = rng.randrange(len(entries(reply)))
    entries(reply).insert(at, entries(reply)[at])


@change("contract", says="token ids but|differs|no tokens")
def id_missing(reply: Any, rng: random.Random) -> None:
    reply["choices"][0]["token_ids"].pop(0)


@change("contract", says="token ids but|differs", dialects=VLLM)
def logprobs_shifted(reply: Any, rng: random.Random) -> None:
    reply["choices"][0]["logprobs"]["token_logprobs"].pop(0)


@change("contract", says="differs", dialects=FIREWORKS)
def entries_shifted(reply: Any, rng: random.Random) -> None:
    """As many entries as ids, each one place late."""
    entries(reply).insert(0, {**entries(reply)[0], "token_id": 5})
    entries(reply).pop()


@change("contract", says="differs", dialects=FIREWORKS)
def id_of_another_token(reply: Any, rng: random.Random) -> None:
    at = rng.randrange(len(reply["choices"][0]["token_ids"]))
    reply["choices"][0]["token_ids"][at] ^= 1


@change("contract", says="prompt_token_ids")
def prompt_of_another_request(reply: Any, rng: random.Random) -> None:
    choice = reply["choices"][0]
    choice["prompt_token_ids"] = [token + 1 for token in choice["prompt_token_ids"]]


@change("contract", says="prompt_token_ids.*index 0")
def prompt_ids_swapped(reply: Any, rng: random.Random) -> None:
    choice = reply["choices"][0]
    choice["prompt_token_ids"] = [-1, *choice["prompt_token_ids"][1:]]


@change("contract", says="raw_output.prompt_token_ids", dialects=FIREWORKS)
def raw_prompt_with_bos(reply: Any, rng: random.Random) -> None:
    raw_output = reply["choices"][0]["raw_output"]
    raw_output["prompt_token_ids"] = [1, *raw_output["prompt_token_ids"]]


@change("contract", "accept", says="model")
def wrong_model(reply: Any, rng: random.Random) -> None:
    """Honest servers answer under another name than they are asked by (an alias, a snapshot), so
    this shows only beside another reply."""
    reply["model"] = "quite-another-model"


@change("contract", says="usage.completion_tokens", dialects=VLLM, modes=WHOLE)
def usage_of_another_request(reply: Any, rng: random.Random) -> None:
    reply["usage"]["completion_tokens"] += 1


@change("contract", says="finish_reason is None|without finish_reason")
def no_finish_reason(reply: Any, rng: random.Random) -> None:
    reply["choices"][0]["finish_reason"] = None


@change("contract", says="finish_reason is 'tired'")
def unknown_finish_reason(reply: Any, rng: random.Random) -> None:
    reply["choices"][0]["finish_reason"] = "tired"


@change("unavailable", says="finish_reason 'abort'")
def generation_aborted(reply: Any, rng: random.Random) -> None:
    reply["choices"][0]["finish_reason"] = "abort"


@change("contract", says="object is 'chat.completion'")
def reply_of_a_chat(reply: Any, rng: random.Random) -> None:
    reply["object"] = "chat.completion"


@pieces("connection", says="cut off", modes=WHOLE)
def json_cut_off(body: list[bytes], rng: random.Random) -> list[bytes]:
    """With a length that fits what is left."""
    return [body[0][: rng.randrange(1, len(body[0]))]]


@pieces("contract", says="not JSON", modes=WHOLE)
def bytes_after_json(body: list[bytes], rng: random.Random) -> list[bytes]:
    return [body[0] + b"}"]


@pieces("contract", says="not JSON", modes=WHOLE)
def two_replies_in_one(body: list[bytes], rng: random.Random) -> list[bytes]:
    return body * 2


@pieces("contract", says="not JSON|not a completions reply", modes=WHOLE)
def mark_before_json(body: list[bytes], rng: random.Random) -> list[bytes]:
    return [b"\xef\xbb\xbf" + body[0]]


@pieces("contract", says="not JSON", modes=WHOLE)
def text_not_utf8(body: list[bytes], rng: random.Random) -> list[bytes]:
    return [body[0].replace(b'"text":"', b'"text":"\xff\xfe')]


@pieces("contract", says="nested too deeply", modes=WHOLE)
def nested_without_end(body: list[bytes], rng: random.Random) -> list[bytes]:
    return [b'{"perf_metrics":' + b"[" * 100_000]


@pieces("contract", says="not a completions reply", modes=WHOLE)
def json_of_another_shape(body: list[bytes], rng: random.Random) -> list[bytes]:
    return [rng.choice((b"null", b"[]", b'"reply"', b"17", b"true", b'{"choices":7}'))]


@pieces("contract", says="event stream|not JSON", modes=WHOLE)
def stream_not_asked_for(body: list[bytes], rng: random.Random) -> list[bytes]:
    return [b"data: " + body[0] + b"\n\ndata: [DONE]\n\n"]
