"""What the hostile server truly samples, and how honest servers would send it. Pure.

Two dialects: `fireworks` (`logprobs.content[]`, `raw_output`) and `vllm` (`token_ids` beside
`logprobs.token_logprobs`; tokens written as ids where the request asks for it). A stream is the
whole reply cut at its tokens, so a fault in the whole reply shows in the stream as well.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Dialect = Literal["fireworks", "vllm"]

END_OF_TURN = 151645
CREATED = 1760000000


@dataclass(frozen=True, slots=True)
class Truth:
    """One sampled continuation. T = number of tokens."""

    token_ids: tuple[int, ...]
    """[T]"""
    logprobs: tuple[float, ...]
    """[T] sampling logprobs."""
    raw_logprobs: tuple[float, ...]
    """[T] the model's own; what the vLLM dialect sends none of."""
    finish_reason: str

    @property
    def texts(self) -> list[str]:
        return ["" if token == END_OF_TURN else f"<{token}>" for token in self.token_ids]


def truth_of(prompt: Sequence[int], seed: int, max_tokens: int | None) -> Truth:
    """What the server samples for a prompt and a seed: floats of full length, so that a client that
    rounds shows."""
    rng = random.Random(f"{list(prompt)}/{seed}")
    ids = [rng.randrange(151000) for _ in range(rng.randint(1, 11))]
    ids = [*ids, END_OF_TURN][:max_tokens]
    logprobs = [rng.choice((-rng.expovariate(1.0), -rng.random() * 1e-9, -0.0)) for _ in ids]
    return Truth(
        token_ids=tuple(ids),
        logprobs=tuple(logprobs),
        raw_logprobs=tuple(1.25 * logprob for logprob in logprobs),
        finish_reason="stop" if ids[-1] == END_OF_TURN else "length",
    )


def whole_reply(body: Mapping[str, Any], truth: Truth, *, name: str, dialect: Dialect) -> Any:
    """The JSON value of a whole reply to the request `body`; `name` is its id."""
    prompt = list(body["prompt"])
    fill = _fireworks_choice if dialect == "fireworks" else _vllm_choice
    return {
        "id": name,
        "object": "text_completion",
        "created": CREATED,
        "model": body["model"],
        "choices": [
            {
                "index": 0,
                "text": "".join(truth.texts),
                "finish_reason": truth.finish_reason,
                "prompt_token_ids": prompt,
                "token_ids": list(truth.token_ids),
                **fill(body, truth, prompt),
            }
        ],
        "usage": {
            "prompt_tokens": len(prompt),
            "completion_tokens": len(truth.token_ids),
            "total_tokens": len(prompt) + len(truth.token_ids),
        },
    }


def _fireworks_choice(_: Mapping[str, Any], truth: Truth, prompt: list[int]) -> dict[str, Any]:
    offsets = _offsets(truth.texts)
    content = [
        {
            "token": text,
            "token_id": token,
            "logprob": raw,
            "sampling_logprob": logprob,
            "bytes": list(text.encode()),
            "text_offset": offset,
            "top_logprobs": [],
        }
        for text, token, raw, logprob, offset in zip(
            truth.texts, truth.token_ids, truth.raw_logprobs, truth.logprobs, offsets, strict=True
        )
    ]
    raw_output = {
        "completion": "".join(truth.texts),
        "prompt_fragments": [],
        "prompt_token_ids": prompt,
        "completion_token_ids": list(truth.token_ids),
        "completion_logprobs": None,
    }
    return {"logprobs": {"content": content}, "raw_output": raw_output}


def _vllm_choice(body: Mapping[str, Any], truth: Truth, _: list[int]) -> dict[str, Any]:
    as_ids = body.get("return_tokens_as_token_ids")
    tokens = [f"token_id:{token}" for token in truth.token_ids] if as_ids else truth.texts
    logprobs = {
        "text_offset": _offsets(tokens),
        "token_logprobs": list(truth.logprobs),
        "tokens": tokens,
        "top_logprobs": [
            {token: logprob} for token, logprob in zip(tokens, truth.logprobs, strict=True)
        ],
    }
    return {"logprobs": logprobs, "stop_reason": None, "prompt_logprobs": None}


def _offsets(texts: Sequence[str]) -> list[int]:
    return [sum(map(len, texts[:i])) for i in range(len(texts))]


def chunks_of(reply: Mapping[str, Any], *, counts: bool) -> list[Any]:
    """The chunks of a whole reply: one token each, the last with `raw_output` where the dialect has
    it; then the `counts`, which vLLM sends only on request."""
    [choice] = reply["choices"]
    names = ("id", "object", "created", "model", "system_fingerprint")
    shared = {name: reply[name] for name in names if name in reply}
    logprobs = choice["logprobs"]
    steps = max(len(choice["token_ids"]), *map(len, logprobs.values()))
    chunks = []
    for step in range(steps):
        last = step == steps - 1
        cut = slice(step, step + 1)
        chunk = {
            "index": choice["index"],
            "text": choice["text"] if step == 0 else "",
            "finish_reason": choice["finish_reason"] if last else None,
            "prompt_token_ids": choice["prompt_token_ids"] if step == 0 else None,
            "token_ids": choice["token_ids"][cut],
            "logprobs": {name: values[cut] for name, values in logprobs.items()},
        }
        if last and "raw_output" in choice:
            chunk["raw_output"] = choice["raw_output"]
        chunks.append({**shared, "choices": [chunk]})
    return [*chunks, {**shared, "choices": [], "usage": reply["usage"]}] if counts else chunks


def event(payload: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + dumps(payload) + b"\n\n"


DONE = b"data: [DONE]\n\n"


def dumps(value: Any) -> bytes:
    """Compact JSON; NaN and infinities are written as Python and many servers do."""
    return json.dumps(value, separators=(",", ":")).encode()
