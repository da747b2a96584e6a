"""Both sides of a run in a few bytes per request: what the client did, and what the server saw.

Invariant: nothing of a run stays in memory but numbers, so that memory which grows is not the
book's. What a completion holds is compared with the truth, bit by bit, when it comes in.
"""

from __future__ import annotations

import threading
import time
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from eval_protocol_rft.sampling._types import FailureKind
from tests.hostile.faults import FAULTS
from tests.hostile.ledger import Entry, dialect_of
from tests.hostile.replies import truth_of

MAX_TOKENS = 64
GROUP = 4
"""Completions per prompt: siblings are the ones that a reply can be mistaken for."""

ENDS = ("", "accept", *dict.fromkeys((*get_args(FailureKind), "cancelled")))
"""How a completion, or an attempt at one, ends; a place in this is what the book holds. Empty: it
has not."""
_END_OF = {name: code for code, name in enumerate(ENDS)}
WHOLE, CUT, CROSSED = 1, 2, 4
"""Flags of a request, as in `Entry`."""
NEVER_CONNECTED = 1
"""Flag of an attempt: the server was not there."""


class Book:
    """One run of `completions`, numbered: number // GROUP is the prompt's number."""

    def __init__(self, completions: int, *, patience: float) -> None:
        self.patience = patience
        """Seconds after which an attempt may time out."""
        self.ends = bytearray(completions)
        """By completion."""
        self.tries = array("H", [0]) * completions
        """By completion: how many requests the package says it took."""
        self.ended = 0
        self.attempts = (array("l"), bytearray(), bytearray(), array("d"))
        """By attempt, each completion's in order: its number, how it ended, flags, when it did."""
        self.requests = (array("l"), array("H"), array("H"), bytearray(), array("d"))
        """By request: completion, which of its requests, fault, flags, when its answer had left.
        Times are of the monotonic clock."""
        self.fault_names = ("", *FAULTS)
        """By the number that stands for it."""
        self.at_accept: Counter[str] = Counter()
        self.problems: list[str] = []
        self._seeds = array("q", [-1]) * completions
        self._fault_of = {name: code for code, name in enumerate(self.fault_names)}
        self._prompts: dict[int, int] = {}
        """Hash of the ids -> number."""
        self._lock = threading.Lock()

    def asks(self, prompt: int, ids: Sequence[int], seeds: Sequence[int | None]) -> None:
        """A prompt is about to be asked, with these seeds by index."""
        self._prompts[hash(tuple(ids))] = prompt
        for index, seed in enumerate(seeds):
            assert seed is not None
            self._seeds[prompt * GROUP + index] = seed

    def tried(
        self, number: int, kind: str | None, *, seed: int | None, seconds: float, message: str
    ) -> None:
        """An attempt has ended; `kind` None: with a completion."""
        if seed != self._seeds[number]:
            self.wrong(number, f"tried with seed {seed}, not {self._seeds[number]}")
        if kind == "timeout" and seconds < 0.99 * self.patience:
            self.wrong(number, f"timed out after {seconds} s: {message}")
        of, ends, flags, times = self.attempts
        of.append(number)
        ends.append(_END_OF[kind or "accept"])
        flags.append(NEVER_CONNECTED if "Cannot connect" in message else 0)
        times.append(time.monotonic())

    def told(self, fields: Mapping[str, Any], number: int) -> None:
        """The same, as the package's log has it."""
        names = ("kind", "seed", "seconds", "message")
        self.tried(number, **{name: fields[name] for name in names})

    def accepted(
        self,
        number: int,
        ids: Sequence[int],
        logprobs: Sequence[float],
        finish_reason: str | None,
        *,
        raw: Sequence[float] | None,
        prompt_ids: Sequence[int],
        tries: int,
        single: bool = False,
    ) -> None:
        """A completion came out. `single`: its logprobs passed through float32."""
        truth = truth_of(prompt_ids, self._seeds[number], MAX_TOKENS)
        if self._prompts.get(hash(tuple(prompt_ids))) != number // GROUP:
            self.wrong(number, f"has the prompt {list(prompt_ids)}, which is not its own")
        kind = "f" if single else "d"
        # At temperature 1 the one value that the vLLM dialect sends is both.
        is_vllm = dialect_of(prompt_ids) == "vllm"
        true_raw = truth.logprobs if is_vllm else truth.raw_logprobs
        told = (list(ids), _bits(logprobs, kind), _bits(raw or (), kind), finish_reason)
        bits = (_bits(truth.logprobs, kind), _bits(true_raw, kind))
        if told != (list(truth.token_ids), *bits, truth.finish_reason):
            self.wrong(number, f"accepted {ids} {logprobs} {raw} {finish_reason}, truly {truth}")
        self._end(number, "accept", tries)

    def failed(self, number: int, kind: str, *, tries: int) -> None:
        """A completion failed for good, or was cancelled."""
        self._end(number, kind, tries)

    def saw(self, entry: Entry) -> None:
        """The server has finished with a request. Called from its thread."""
        request = entry.request
        if request is None:
            self.at_accept[entry.fault] += 1
            return
        prompt = self._prompts.get(hash(request.prompt), -1)
        seeds = self._seeds[prompt * GROUP : (prompt + 1) * GROUP] if prompt >= 0 else ()
        if request.seed not in seeds:
            self.wrong(prompt * GROUP, f"nobody asked {request.prompt} with seed {request.seed}")
            return
        of, which, faults, flags, times = self.requests
        of.append(prompt * GROUP + seeds.index(request.seed))
        which.append(request.attempt)
        faults.append(self._fault_of[entry.fault])
        flags.append(WHOLE * entry.whole + CUT * entry.cut + CROSSED * entry.crossed)
        times.append(entry.written_at)

    def wrong(self, number: int, what: str) -> None:
        """Note what must not be."""
        with self._lock:
            self.problems.append(f"completion {number}: {what}")

    def _end(self, number: int, how: str, tries: int) -> None:
        if self.ends[number]:
            self.wrong(number, f"ends as {how!r} after it ended as {ENDS[self.ends[number]]!r}")
        self.ends[number] = _END_OF[how]
        self.tries[number] = tries
        self.ended += 1


def _bits(values: Sequence[float], kind: str) -> bytes:
    """So that -0.0 is not 0.0, and a value that was rounded is another one."""
    return array(kind, values).tobytes()
