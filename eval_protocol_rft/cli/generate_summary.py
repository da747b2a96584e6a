"""What `ep-rft generate` says at its end."""

from __future__ import annotations

from typing import TYPE_CHECKING

from eval_protocol_rft.cli.failing import say

if TYPE_CHECKING:
    from eval_protocol_rft.batch.generation.generate import GenerateSummary


def show(summary: GenerateSummary, *, verbose: bool) -> None:
    """Tell what was sampled, what it cost, and what failed. `verbose`: what became of the attempts
    too."""
    run = summary.run
    there = summary.total - run.completions - run.failed
    say(
        f"{summary.output}: {summary.prompts} prompts, {summary.total} completions"
        + (f", {summary.failed} of them failed" if summary.failed else "")
    )
    if run.completions or run.failed:
        rate = run.tokens / summary.seconds if summary.seconds else 0.0
        say(
            f"this run: {run.completions} sampled, {run.tokens} tokens, {rate:.0f} tokens/s, "
            f"{run.truncated} truncated, {run.attempts} requests"
            + (f"; {there} were there" if there else "")
        )
    else:
        say("nothing to do: all of them were there")
    cost = summary.attempts.cost
    if verbose:
        for line in summary.attempts.lines():
            say(line)
    elif cost is not None and (run.completions or run.failed):
        say(f"cost: {cost}")
    if run.failures:
        kinds = ", ".join(f"{count} {kind}" for kind, count in run.failures.most_common())
        say(f"failed: {kinds}; the first, {run.first_failure}", err=True)
    if summary.may_succeed:
        say("the same command with --retry-failed tries the failed ones again", err=True)
