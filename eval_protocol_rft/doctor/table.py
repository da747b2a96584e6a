"""A diagnosis as a terminal table, and as JSON.

Invariant: what a server or a model said is shown as text: no markup, control characters escaped.
"""

from __future__ import annotations

import msgspec
from rich.table import Table
from rich.text import Text

from eval_protocol_rft.doctor.findings import Finding, Verdict, unfit
from eval_protocol_rft.doctor.run import Diagnosis
from eval_protocol_rft.text import visible

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
    judged = "not fit to train" if unfit(diagnosis.findings) else "fit to train"
    if "fail" not in verdicts and "warn" in verdicts:
        judged = "fit to train, with the warnings above"
    return (
        f"{visible(diagnosis.model)}{where}, temperature {diagnosis.temperature:g}: {judged} "
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
