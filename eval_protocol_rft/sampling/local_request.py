"""One request while it is being sampled: what was asked, what was drawn, and when it ends.

Invariant: drawn tokens are only ever appended. Where a completion ends is decided on token ids,
or on text decoded from them; text is never turned back into ids.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from eval_protocol_rft.sampling.local_draw import Settings
from eval_protocol_rft.sampling.types import Completion, FinishReason, SamplingError

Decode = Callable[[Sequence[int]], str]

TAIL_MARGIN = 4
"""Tokens decoded beyond a stop string's bytes: the first ones of a window may decode differently
out of context (a leading space dropped, half a character)."""


@dataclass(eq=False, slots=True, kw_only=True)
class Request:
    """A prompt, its limits, and the tokens drawn so far. Only the worker thread changes it."""

    prompt_ids: tuple[int, ...]
    settings: Settings
    seed: int
    """64 bits."""
    limit: int
    """Most tokens to draw."""
    ends: frozenset[int]
    """Token ids that end the completion."""
    stops: tuple[str, ...]
    """Strings that end the completion."""
    future: asyncio.Future[Completion]
    session: str | None = None
    """Where its keys and values are kept for the next turn; None: they are not."""
    policy_version: str | None = None
    """The weights that sample it now."""
    first_policy_version: str | None = None
    """Those that drew its first tokens, where they are others."""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    raw_logprobs: list[float] = field(default_factory=list)
    abandoned: bool = False
    """Set by the caller when it no longer waits."""

    @property
    def most_tokens(self) -> int:
        """Tokens that it may come to hold in the caches."""
        return len(self.prompt_ids) + self.limit

    def order(self) -> tuple[tuple[int, ...], int, str]:
        """Where it stands among requests that began together, whichever was submitted first."""
        return self.prompt_ids, self.seed, self.session or ""

    def sampled_by(self, policy_version: str | None) -> None:
        """From now on these weights draw its tokens."""
        if self.token_ids and self.first_policy_version is None:
            self.first_policy_version = self.policy_version
        self.policy_version = policy_version

    @property
    def dropped(self) -> bool:
        """Nobody waits for it: its caller gave up, or its event loop is gone."""
        return self.abandoned or self.future.get_loop().is_closed()

    def add(self, token: int, logprob: float, raw_logprob: float) -> None:
        """Take a drawn token.

        Raises:
            SamplingError: its logprob is not finite, so the model's logits were not.
        """
        if not math.isfinite(logprob + raw_logprob):
            raise SamplingError(
                f"the model gave logprob {logprob} (raw {raw_logprob}) at completion token "
                f"{len(self.token_ids)}: its logits are not finite; check its weights and dtype"
            )
        self.token_ids.append(token)
        self.logprobs.append(logprob)
        self.raw_logprobs.append(raw_logprob)

    def ending(self, decode: Decode) -> Completion | None:
        """The completion, if the last token ended it. An ending token wins over a stop string, and
        either over the limit."""
        ids = self.token_ids
        if ids[-1] in self.ends:
            return self._complete(decode(ids[:-1]), "stop", ids[-1])
        hit = stop_hit(ids, self.stops, decode) if self.stops else None
        if hit:
            text, stop = hit
            return self._complete(text, "stop", stop)
        if len(ids) >= self.limit:
            return self._complete(decode(ids), "length", None)
        return None

    def _complete(
        self,
        text: str,
        finish_reason: FinishReason,
        stop_reason: str | int | None,
    ) -> Completion:
        return Completion(
            token_ids=self.token_ids,
            logprobs=self.logprobs,
            raw_logprobs=self.raw_logprobs,
            finish_reason=finish_reason,
            text=text,
            stop_reason=stop_reason,
            policy_version=self.policy_version,
            first_policy_version=self.first_policy_version,
        )


def stop_hit(ids: Sequence[int], stops: Sequence[str], decode: Decode) -> tuple[str, str] | None:
    """The text before the first stop string, and that string, if the last token completed one.

    Only a tail is decoded at each token, long enough for the longest stop string even at one byte
    a token; the whole is decoded when the tail holds a hit.
    """
    tail = max(len(stop.encode()) for stop in stops) + TAIL_MARGIN
    if not any(stop in decode(ids[-tail:]) for stop in stops):
        return None
    text = decode(ids)
    hits = [(text.find(stop), -len(stop), stop) for stop in stops if stop in text]
    if not hits:
        return None
    start, _, stop = min(hits)
    return text[:start], stop
