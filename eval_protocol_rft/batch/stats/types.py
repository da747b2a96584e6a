"""`RolloutStats`: what `rollout_stats` finds out. It is plain data: `msgspec.json.encode` takes it.

Invariant: None where there is nothing to compute a number from, never 0.
"""

from __future__ import annotations

from dataclasses import dataclass

from eval_protocol_rft.batch.stats.distribution import Distribution


@dataclass(frozen=True, slots=True)
class PassAtK:
    """The unbiased estimate of pass@k: Chen et al. 2021 (arXiv:2107.03374), equation 1."""

    k: int
    value: float
    """Mean over the data rows with at least k scored completions."""
    groups: int
    """How many those are."""


@dataclass(frozen=True, slots=True)
class Reason:
    """Why completions have no reward."""

    text: str | None
    """The first line of what the evaluator left, at most `REASON_CHARACTERS` of it. None: no word
    of it, as before scoring."""
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptStats:
    """The completions of one data row."""

    data_idx: int
    row_id: str
    prompt_start: str
    """The first `PROMPT_CHARACTERS` of the prompt, or of its last message."""
    completions: int
    """Asked for."""
    failed: int
    scored: int
    passed: int
    pass_rate: float | None
    """Of the scored ones."""
    mean_reward: float | None
    truncated: int
    mean_tokens: float | None
    """Sampled tokens of a completion."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutStats:
    """A rollout file in numbers."""

    path: str
    finished: bool
    """False where these are the parts of a job that is not done."""
    model: str | None
    reward: str
    """Column of the rewards."""
    pass_threshold: float
    """A completion passes where its reward is at least this."""
    completions: int
    """Asked for: failed + scored + unscored."""
    failed: int
    scored: int
    unscored: int
    """Sampled, without a reward."""
    truncated: int
    truncation_rate: float | None
    """Of the completions that were sampled."""
    tokens: int
    """Sampled tokens."""
    rewards: Distribution | None
    """Over scored completions."""
    lengths: Distribution | None
    """Sampled tokens, over completions that were sampled."""
    metrics: dict[str, float]
    """Mean of each of the evaluator's own metrics, over the completions for which it is valid."""
    pass_at_k: list[PassAtK]
    """For every k up to the most scored completions of a data row."""
    failures: dict[str, int]
    """Kind -> failed completions, the most frequent first."""
    unscored_reasons: list[Reason]
    """The most frequent first, at most `TOP_REASONS`."""
    groups: int
    """Data rows."""
    groups_all_passed: int
    """All scored completions passed, and there are some."""
    groups_none_passed: int
    groups_mixed: int
    groups_unscored: int
    """No completion has a reward."""
    per_group: list[PromptStats]
    """Hardest first: by pass rate, then mean reward, then place in the file. Data rows without a
    reward come last."""


REASON_CHARACTERS = 200
PROMPT_CHARACTERS = 80
TOP_REASONS = 10
