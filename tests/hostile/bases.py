"""Replies to be damaged: recorded ones and generated ones, each with what it truly says."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from eval_protocol_rft.sampling._exactness import decode_reply, decode_stream
from eval_protocol_rft.sampling._types import Completion, SamplingParams, TokenIds
from tests.hostile.replies import DONE, Dialect, chunks_of, dumps, event, truth_of, whole_reply

Path = tuple[str | int, ...]
Exact = tuple[tuple[tuple[int, ...], tuple[float, ...], tuple[float, ...] | None, str], ...]
"""Of each completion: ids, sampling logprobs, raw logprobs, finish reason."""
Decode = Callable[..., list[Completion]]


def exact(completions: list[Completion]) -> Exact:
    """What a trainer reads of completions."""
    return tuple(
        (
            tuple(one.token_ids),
            tuple(one.logprobs),
            None if one.raw_logprobs is None else tuple(one.raw_logprobs),
            one.finish_reason,
        )
        for one in completions
    )


@dataclass(frozen=True)
class Base:
    """One whole, right reply."""

    name: str
    body: bytes
    prompt: TokenIds
    params: SamplingParams
    n: int = 1
    stream: bool = False
    said_once: bool = False
    """Ids and logprobs stand in one place each (plain vLLM): the same values in another order are
    just as good a reply."""

    def __str__(self) -> str:
        return self.name

    @functools.cached_property
    def events(self) -> list[bytes]:
        """The events of a stream, `[DONE]` the last."""
        return [block + b"\n\n" for block in self.body.split(b"\n\n") if block.strip()]

    @functools.cached_property
    def documents(self) -> list[bytes]:
        """The JSON of the whole reply, or of each event."""
        if not self.stream:
            return [self.body]
        return [one.removeprefix(b"data: ").strip() for one in self.events[:-1]]

    @functools.cached_property
    def paths(self) -> list[list[Path]]:
        """Of each document the paths to its values."""
        return [paths_in(json.loads(document)) for document in self.documents]

    @functools.cached_property
    def truth(self) -> Exact:
        return exact(self.decoded(self.body))

    def decoded(self, body: bytes) -> list[Completion]:
        decode: Decode = decode_stream if self.stream else decode_reply
        return decode(body, self.prompt, self.params, n=self.n)


def paths_in(value: Any, at: Path = ()) -> list[Path]:
    found = [at] if at else []
    if isinstance(value, dict):
        for key, inner in value.items():
            found += paths_in(inner, (*at, key))
    if isinstance(value, list):
        for index, inner in enumerate(value):
            found += paths_in(inner, (*at, index))
    return found


def recorded(names: str) -> list[Base]:
    """Recorded vLLM replies; a name that begins with `processed/` is of that folder."""
    from tests.test_wire import ALL, PROCESSED, RAW

    bases = []
    for name in names.split():
        folder = PROCESSED if name.startswith("processed/") else RAW
        found = next(r for r in ALL if r.name == name.rpartition("/")[2] and r.folder == folder)
        bases.append(
            Base(
                name=f"recorded {name}",
                body=found.body,
                prompt=found.prompt,
                params=found.params,
                n=found.request.get("n", 1),
                stream=found.stream,
                said_once=not found.request.get("return_tokens_as_token_ids"),
            )
        )
    return bases


def generated(
    name: str, *, dialect: Dialect, seed: int, stream: bool = False, as_ids: bool = False
) -> Base:
    """A reply as the hostile server sends it when it is honest."""
    prompt, max_tokens = TokenIds([5, 6, 151644]), 64
    request = {"model": "m", "prompt": prompt, "return_tokens_as_token_ids": as_ids}
    reply = whole_reply(
        request, truth_of(prompt, seed, max_tokens), name=f"cmpl-{name}-{seed}", dialect=dialect
    )
    events = b"".join([*map(event, chunks_of(reply, counts=True)), DONE]) if stream else b""
    params = SamplingParams(
        model="m",
        max_tokens=max_tokens,
        # Where raw and sampling logprobs differ, as here, the one must not stand for the other.
        temperature=0.8 if dialect == "fireworks" else 1.0,
        logprobs_mode="processed_logprobs" if as_ids else None,
    )
    return Base(
        name=f"{name}, seed {seed}",
        body=events or dumps(reply),
        prompt=prompt,
        params=params,
        stream=stream,
        said_once=dialect == "vllm" and not as_ids,
    )


def content_only(base: Base) -> Base:
    """A Fireworks reply with `content[]` and `usage` alone."""
    reply = json.loads(base.body)
    for key in ("token_ids", "raw_output", "prompt_token_ids"):
        del reply["choices"][0][key]
    return Base(f"{base.name}, content alone", dumps(reply), base.prompt, base.params)


@functools.cache
def bases() -> tuple[Base, ...]:
    """All of them, the names unique."""
    made = recorded(
        "01_n1_t1 02_n4_t1 09_tokens_as_ids 15_max_tokens_1 10_stream_n1 11_stream_n4 "
        "processed/03_n1_t07 processed/12_eos_forced processed/13_stop_string"
    )
    for seed in range(6):
        fireworks = generated("fireworks", dialect="fireworks", seed=seed)
        made += [
            fireworks,
            content_only(fireworks),
            generated("fireworks stream", dialect="fireworks", seed=seed, stream=True),
            generated("vllm", dialect="vllm", seed=seed),
            generated("vllm as ids", dialect="vllm", seed=seed, as_ids=True),
            generated("vllm stream", dialect="vllm", seed=seed, stream=True),
            generated("vllm as ids, stream", dialect="vllm", seed=seed, stream=True, as_ids=True),
        ]
    assert len({base.name for base in made}) == len(made)
    return tuple(made)
