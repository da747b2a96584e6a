"""What checks find: a verdict, a number, the bar, and what to do about it. All findings on a setup
are its diagnosis, shown as a table or as JSON.

Invariant: what a server or a model said is shown as text: no markup, control characters escaped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import msgspec
from rich.table import Table
from rich.text import Text

from eval_protocol_rft._text import visible

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


def verdict_on(value: float, *, warn_above: float, fail_above: float) -> Verdict:
    """The verdict on a number that should be small. NaN fails."""
    if value <= warn_above:
        return "pass"
    return "warn" if value <= fail_above else "fail"


def p_value_verdict(p_value: float) -> Verdict:
    """The verdict on a p-value, at the two levels above."""
    if p_value >= WARN_LEVEL:
        return "pass"
    return "warn" if p_value >= FAIL_LEVEL else "fail"


def p_value_finding(
    name: str, p_value: float, *, measured: str, advice: str, numbers: Mapping[str, float]
) -> Finding:
    """What a statistical test found. `advice`: where it does not pass."""
    verdict = p_value_verdict(p_value)
    return Finding(
        name=name,
        verdict=verdict,
        measured=measured,
        bar=f"p >= {WARN_LEVEL:g}; fails below {FAIL_LEVEL:g}",
        advice="" if verdict == "pass" else advice,
        numbers=numbers,
    )


def unfit(findings: Sequence[Finding]) -> bool:
    """Whether any check failed."""
    return any(finding.verdict == "fail" for finding in findings)


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """All findings on a setup, in the order of the checks."""

    model: str
    base_url: str | None
    """None: a model in this process."""
    temperature: float
    findings: list[Finding]


_STYLES: dict[Verdict, str] = {
    "pass": "green",
    "warn": "yellow",
    "fail": "bold red",
    "skipped": "dim",
}
_LONGEST = 400
"""Characters of a message that are shown; JSON has all of it."""


def diagnosis_table(diagnosis: Diagnosis) -> Table:
    """One row a check: verdict, number, bar, advice."""
    table = Table(header_style="bold", show_lines=True, expand=False)
    table.add_column("check", no_wrap=False, max_width=26)
    table.add_column("verdict", no_wrap=True)
    table.add_column("measured, bar and advice")
    for finding in diagnosis.findings:
        table.add_row(
            Text(visible(finding.name)),
            Text(finding.verdict, style=_STYLES[finding.verdict]),
            _cell(finding),
        )
    return table


def _cell(finding: Finding) -> Text:
    measured = visible(finding.measured)
    if len(measured) > _LONGEST:
        measured = measured[: _LONGEST - 3] + "..."
    cell = Text(measured)
    if finding.bar:
        cell.append(f"\nbar: {visible(finding.bar)}", style="dim")
    if finding.advice:
        cell.append(f"\n→ {visible(finding.advice)}", style=_STYLES[finding.verdict])
    return cell


def summary(diagnosis: Diagnosis) -> str:
    """The whole in one line."""
    verdicts = [finding.verdict for finding in diagnosis.findings]
    order: tuple[tuple[Verdict, str], ...] = (
        ("pass", "passed"),
        ("warn", "warned"),
        ("fail", "failed"),
        ("skipped", "skipped"),
    )
    counts = ", ".join(f"{verdicts.count(v)} {word}" for v, word in order if v in verdicts)
    where = f" on {diagnosis.base_url}" if diagnosis.base_url else ""
    fitness = "not fit to train" if unfit(diagnosis.findings) else "fit to train"
    if "fail" not in verdicts and "warn" in verdicts:
        fitness = "fit to train, with the warnings above"
    return (
        f"{visible(diagnosis.model)}{where}, temperature {diagnosis.temperature:g}: {fitness} "
        f"({counts})"
    )


def diagnosis_json(diagnosis: Diagnosis) -> bytes:
    """The same for machines: `fit`, and every finding with its numbers."""
    value = {
        "model": diagnosis.model,
        "base_url": diagnosis.base_url,
        "temperature": diagnosis.temperature,
        "fit": not unfit(diagnosis.findings),
        "findings": diagnosis.findings,
    }
    return msgspec.json.format(msgspec.json.encode(value), indent=2)
