"""What a check found: the verdict, the number, the bar, and what to do about it. Pure.

What the probes say, and the texts that a tokenizer has to bring back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Verdict = Literal["pass", "warn", "fail", "skipped"]

WARN_LEVEL = 1e-2
"""A statistical test warns below this p-value: so it does for one sound setup in a hundred."""
FAIL_LEVEL = 1e-4
"""It fails below this one: the false alarms of each test, one in ten thousand sound setups."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """The result of one check."""

    name: str
    verdict: Verdict
    measured: str
    """What came out, or why the check was skipped."""
    bar: str = ""
    """What passes."""
    advice: str = ""
    """What to do, one sentence or two; empty where there is nothing to do."""
    numbers: Mapping[str, float] = field(default_factory=dict)
    """The same as numbers, for machines."""


def skipped(name: str, why: str, advice: str = "") -> Finding:
    """A check that could not be made."""
    return Finding(name=name, verdict="skipped", measured=why, advice=advice)


def graded(value: float, *, warn_above: float, fail_above: float) -> Verdict:
    """The verdict on a number that should be small. NaN fails."""
    if value <= warn_above:
        return "pass"
    return "warn" if value <= fail_above else "fail"


def p_value_verdict(p_value: float) -> Verdict:
    """The verdict on a p-value, at the two levels above."""
    if p_value >= WARN_LEVEL:
        return "pass"
    return "warn" if p_value >= FAIL_LEVEL else "fail"


P_VALUE_BAR = f"p >= {WARN_LEVEL:g}; fails below {FAIL_LEVEL:g}"


def unfit(findings: Sequence[Finding]) -> bool:
    """Whether any check failed."""
    return any(finding.verdict == "fail" for finding in findings)


PROMPTS = (
    "51+29=",
    "64+78=",
    "Name an animal, any animal. Answer with one word.",
    "Pick a number between 1 and 100. Answer with the number only.",
)
"""Questions with short answers of which several are likely: where the first token is certain, no
test of probabilities can see anything."""

PLAIN_TEXTS = (
    "What is 17 + 25?",
    "The quick brown fox jumps over the lazy dog.",
    "if x == 0:\n    return {'a': [1, 2.5]}\n",
    "Two  spaces, a\ttab, and two\n\nlines.",
)
"""ASCII: a tokenizer that changes it shows the model another prompt than the data set holds."""

FURTHER_TEXTS = (
    "Où est la bibliothèque ? Straße, ñandú.",
    "二加二等于四。",
    "∀x ∈ ℝ: x² ≥ 0",
    "🙂👩‍👩‍👧 done",
)

THOUGHT = "<think>\nTen and ten is twenty.\n</think>\n\n"


def conversation(answer: str = "Twenty.") -> list[dict[str, Any]]:
    """Three turns; `answer` is the first one's."""
    return [
        {"role": "user", "content": "What is 10 plus 10?"},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": "And 20 plus 2?"},
        {"role": "assistant", "content": "Twenty-two."},
        {"role": "user", "content": "And 3 more?"},
    ]
