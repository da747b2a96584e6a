"""`ep-rft score`."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from eval_protocol_rft import data
from eval_protocol_rft._options import Flag
from eval_protocol_rft.cli._common import fail, rollout_file, say
from eval_protocol_rft.cli._flags import Takes

if TYPE_CHECKING:
    from eval_protocol_rft.data import ScoreSummary

_SHOWN_REASONS = 5


def score(
    rollouts: Path,
    options: Annotated[dict[str, Any], Takes(data.score)],
    *,
    evaluator: Annotated[str, Flag("-e")],
    allow_unscored: bool = False,
) -> None:
    """Grade every completion of a file with your own evaluator.

    A grader that hangs, raises or dies costs its completion, which is then unscored, not 0. Stop it
    in any way: the same command goes on with what is not graded yet.

    Args:
        rollouts: A rollout file, or what a test wrote (then with -o).
        evaluator: tests/test_x.py::test_x (an evaluation test or a plain function of `row`), or
            package.module:function.
        allow_unscored: Exit with 0 though no completion has a reward.

    Examples:
      ep-rft score rollouts.parquet -e tests/test_math.py::test_math
      ep-rft score rollouts.parquet -e my_package.rewards:short_answer --name short
      ep-rft score rollouts.parquet -e judge.py::judge --concurrency 16 -o judged.parquet
    """
    with rollout_file(rollouts) as source:
        if source != rollouts and "output" not in options:
            fail(f"{rollouts}: a test wrote this, and it stays as it is: name another file with -o")
        try:
            summary = data.score(source, evaluator, **options)
        except KeyboardInterrupt:
            what = "The same command goes on with what is not graded"
            raise KeyboardInterrupt(f". {what}") from None
    _show(summary)
    if not summary.scored and not allow_unscored:
        fail("no completion has a reward (--allow-unscored if that is right)")


def _show(summary: ScoreSummary) -> None:
    mean = "" if summary.mean is None else f", mean {summary.mean:.4f}"
    say(
        f"{summary.output}: {summary.scored} of {summary.completions} completions of "
        f"{summary.rows} rows have {summary.column}{mean} ({summary.graded} graded by this run)"
    )
    if summary.failed:
        say(f"{summary.failed} could not be sampled, so there is nothing to grade")
    _show_reasons(summary.unscored, "unscored")
    _show_reasons(summary.remarks, "scored, but")
    for warning in summary.warnings:
        say(f"ep-rft: warning: {warning}", err=True)


def _show_reasons(reasons: Counter[str], what: str) -> None:
    if reasons:
        say(f"{reasons.total()} {what}:", err=True)
        for reason, count in reasons.most_common(_SHOWN_REASONS):
            say(f"  {count} x {reason}", err=True)
