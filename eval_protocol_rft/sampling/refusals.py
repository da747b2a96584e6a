"""When final failures say that the run is lost, not only the prompt. Pure.

Invariant: evidence is of one streak. A success ends it, but only one that began after the streak
did: what the server accepted before the key expired says nothing about the key.
"""

from __future__ import annotations

from collections.abc import Hashable

from eval_protocol_rft.sampling.attempts import Attempt

ACCOUNT_STATUSES = frozenset({401, 402, 403, 404, 405, 407, 412})
"""Key, bill, access, model, path, proxy, suspended account: no prompt makes a difference."""

ACCOUNT_STREAK = 8
"""So many of them in a row end the run, or half of those in flight where that is more: with one of
several replicas misconfigured, as many come back at once while the others are still sampling."""

PROMPT_STREAK = 16
"""So many different prompts in a row, refused before anything succeeded or answered with what is no
exact token data, end the run; the n completions of one prompt are one piece of evidence. Once the
settings have proven to work, a refusal is of the prompt: data sets have long stretches of prompts
that are too long."""


class Refusals:
    """The present streak of final failures."""

    def __init__(self, *, proven: bool = False) -> None:
        """`proven`: the same settings have brought completions before this run."""
        self._proven = proven
        self._since: float | None = None
        self._count = 0
        self._account = 0
        self._prompts: set[Hashable] = set()
        self._slowest_success = 0.0

    def succeeded(self, attempt: Attempt) -> None:
        self._proven = True
        self._slowest_success = max(self._slowest_success, attempt.seconds)
        if self._since is not None and attempt.started >= self._since:
            self._since, self._count, self._account = None, 0, 0
            self._prompts.clear()

    def failed(self, attempt: Attempt, *, in_flight: int) -> str | None:
        """Record a failure that no other attempt would mend; the reason to stop the run, or None.

        `in_flight`: requests that have not ended.
        """
        of_the_prompt = attempt.kind == "refused" and attempt.status not in ACCOUNT_STATUSES
        if of_the_prompt and self._proven:
            return None
        self._since = attempt.ended if self._since is None else self._since
        self._count += 1
        self._account += attempt.status in ACCOUNT_STATUSES
        # The refusals that have been counted are enough; the set must not grow with the data set.
        if len(self._prompts) < PROMPT_STREAK:
            self._prompts.add(self._count if attempt.prompt is None else ("id", attempt.prompt))
        if self._account >= max(ACCOUNT_STREAK, in_flight / 2):
            return self._stop(self._account, "requests", attempt)
        # Refusals are quick and completions slow: for as long as the slowest took, a stretch of
        # bad prompts looks the same as a server that refuses them all.
        age = attempt.ended - self._since
        if len(self._prompts) >= PROMPT_STREAK and age >= self._slowest_success:
            return self._stop(self._count, "requests for different prompts", attempt)
        return None

    def _stop(self, count: int, what: str, last: Attempt) -> str:
        return (
            f"{count} {what} in a row failed for good and none that began since then succeeded; "
            f"the last one: {last.cause}: {last.message or 'no message'}. The rest of the data set "
            "would fare no better: mend the cause and run again"
        )
