"""What a check found: the verdict, the number, the bar, and what to do about it. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

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
