"""What every peer of the rollout benchmark works on: the same prompts, the same replies.

Invariant: the replies to a row depend on nothing but how many rows the server saw before it, so the
sum over all completions is one number, and a peer that loses, repeats or mixes up tokens shows.
"""

from __future__ import annotations

import math
import random
import resource
import struct
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

VARIANTS = 16
"""Different replies: enough that no parser sees the same bytes all the time."""
WARM_UP_ROWS = 2
"""Rows that every peer rolls out before the clock starts: lazy imports, caches, connections."""


class CannedReply(msgspec.Struct, frozen=True):
    """One completion as the stub sends it. T = number of tokens."""

    token_ids: list[int]
    tokens: list[str]
    logprobs: list[float]
    """[T] as Fireworks rounds them."""
    sampling_logprobs: list[float]
    """[T] float32 values in full."""


class Workload(msgspec.Struct, frozen=True, kw_only=True):
    """R rows (the first `WARM_UP_ROWS` are not timed), n completions each."""

    tokenizer: str
    questions: list[str]
    """[R] user messages, all different."""
    prompt_ids: list[list[int]]
    """[R][P] the same, rendered."""
    n: int
    max_tokens: int
    concurrency: int
    """Requests in flight."""
    replies: list[CannedReply]

    def save(self, path: Path) -> None:
        path.write_bytes(msgspec.json.encode(self))

    @classmethod
    def load(cls, path: str | Path) -> Workload:
        return msgspec.json.decode(Path(path).read_bytes(), type=cls)


class Measurement(msgspec.Struct, frozen=True, kw_only=True):
    """What one peer did with the timed rows, in a process of its own."""

    completions: int
    tokens: int
    checksum: float
    """Sum of all token ids and sampling logprobs."""
    wall_s: float
    cpu_s: float
    """User and system time of this process, all threads, from first to last timed row."""
    start_mb: float
    """Peak resident set before the timed rows: interpreter, imports, tokenizer."""
    peak_mb: float


class Meter:
    """Wall time, CPU time and memory of this process between `start` and `stop`."""

    def start(self) -> None:
        self.start_mb = _peak_mb()
        self._cpu = _cpu_seconds()
        self._wall = time.perf_counter()

    def stop(self) -> None:
        self.wall_s = time.perf_counter() - self._wall
        self.cpu_s = _cpu_seconds() - self._cpu
        self.peak_mb = _peak_mb()

    @contextmanager
    def running(self) -> Iterator[None]:
        self.start()
        yield
        self.stop()

    def measurement(
        self, completions: Iterable[tuple[Sequence[int], Sequence[float]]]
    ) -> Measurement:
        """`completions`: token ids and sampling logprobs of each."""
        pairs = list(completions)
        sums = [sum(ids) + math.fsum(logprobs) for ids, logprobs in pairs]
        return Measurement(
            completions=len(pairs),
            tokens=sum(len(ids) for ids, _ in pairs),
            checksum=round(math.fsum(sums), 3),
            wall_s=self.wall_s,
            cpu_s=self.cpu_s,
            start_mb=self.start_mb,
            peak_mb=self.peak_mb,
        )


def build_workload(
    tokenizer_path: str,
    *,
    rows: int,
    n: int,
    tokens: int,
    prompt_characters: int,
    concurrency: int,
) -> Workload:
    """Render `rows` prompts and make up replies from the tokenizer's ordinary tokens."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
    questions = [_question(i, prompt_characters) for i in range(WARM_UP_ROWS + rows)]
    prompt_ids: Any = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
        )
        for question in questions
    ]
    rng = random.Random(0)
    vocabulary = _ordinary_tokens(tokenizer)
    return Workload(
        tokenizer=tokenizer_path,
        questions=questions,
        prompt_ids=prompt_ids,
        n=n,
        max_tokens=tokens,
        concurrency=concurrency,
        replies=[_reply(rng, vocabulary, tokens) for _ in range(VARIANTS)],
    )


def _question(index: int, characters: int) -> str:
    """A sum of its own for each row, filled up to `characters`."""
    question = f"{index}+{7919 * index}="
    filler = "Add the two numbers and write down every step. "
    return (filler * (characters // len(filler) + 1))[
        : max(0, characters - len(question))
    ] + question


def _ordinary_tokens(tokenizer: Any) -> list[tuple[int, str]]:
    """(id, text) of tokens that decode to whole printable ASCII."""
    special = set(tokenizer.all_special_ids)
    texts = [(i, tokenizer.decode([i])) for i in range(min(len(tokenizer), 20_000))]
    return [
        (i, text) for i, text in texts if i not in special and text.isascii() and text.isprintable()
    ]


def _reply(rng: random.Random, vocabulary: list[tuple[int, str]], tokens: int) -> CannedReply:
    sampled = rng.choices(vocabulary, k=tokens)
    exact = [-rng.expovariate(2.0) for _ in range(tokens)]
    return CannedReply(
        token_ids=[i for i, _ in sampled],
        tokens=[text for _, text in sampled],
        logprobs=[round(value, 8) for value in exact],
        sampling_logprobs=[struct.unpack("f", struct.pack("f", value))[0] for value in exact],
    )


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _peak_mb() -> float:
    """Peak resident set of this program. On Linux `ru_maxrss` would start at what the parent held
    when it forked."""
    if sys.platform == "linux":
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) / 1e3
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # macOS counts bytes
