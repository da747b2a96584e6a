"""`ep-rft score`."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from eval_protocol_rft.cli._common import fail, one_line, rollout_file, say, sigterm_interrupts

if TYPE_CHECKING:
    from eval_protocol_rft.data import ScoreSummary

_SHOWN_REASONS = 5


@one_line
def score(
    rollouts: Annotated[
        Path, typer.Argument(help="A rollout file, or what a test wrote (then with -o).")
    ],
    evaluator: Annotated[
        str,
        typer.Option(
            "-e",
            "--evaluator",
            help="tests/test_x.py::test_x (an evaluation test or a plain function of `row`), or "
            "package.module:function.",
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="A new file.", show_default="ROLLOUTS is replaced"),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(help="Column reward_NAME, beside other rewards.", show_default="reward"),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Processes.", show_default="processors; async evaluators: 1"),
    ] = None,
    timeout: Annotated[
        float,
        typer.Option(min=0.0, help="Seconds for one completion; 0: any time."),
    ] = 60.0,
    concurrency: Annotated[
        int, typer.Option(min=1, help="Calls in flight of an async evaluator.")
    ] = 96,
    retry_unscored: Annotated[
        bool, typer.Option("--retry-unscored", help="Grade again what got no reward.")
    ] = False,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Grade all anew, replacing rewards or the output."),
    ] = False,
    no_adapter: Annotated[
        bool,
        typer.Option(
            "--no-adapter", help="Do not use the evaluation test's dataset_adapter on the columns."
        ),
    ] = False,
    engine: Annotated[
        str, typer.Option(metavar="local|ray", help="ray: grade on every node of a Ray cluster.")
    ] = "local",
    ray_address: Annotated[
        str | None,
        typer.Option(
            help="HOST:PORT of the cluster, or auto.",
            show_default="RAY_ADDRESS, else this machine",
        ),
    ] = None,
    allow_unscored: Annotated[
        bool,
        typer.Option("--allow-unscored", help="Exit with 0 though no completion has a reward."),
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
) -> None:
    """Grade every completion of a file with your own evaluator.

    A grader that hangs, raises or dies costs its completion, which is then unscored, not 0. Stop it
    in any way: the same command goes on with what is not graded yet.

    \b
    Examples:
      ep-rft score rollouts.parquet -e tests/test_math.py::test_math
      ep-rft score rollouts.parquet -e my_package.rewards:short_answer --name short
      ep-rft score rollouts.parquet -e judge.py::judge --concurrency 16 -o judged.parquet
    """
    from eval_protocol_rft.data import score as run

    with sigterm_interrupts() as stopped, rollout_file(rollouts) as source:
        if source != rollouts and output is None:
            fail(f"{rollouts}: a test wrote this, and it stays as it is: name another file with -o")
        try:
            summary = run(
                source,
                evaluator,
                output=output,
                name=name,
                workers=workers,
                timeout=timeout or None,
                max_concurrency=concurrency,
                retry_unscored=retry_unscored,
                overwrite=overwrite,
                adapt=not no_adapter,
                engine=engine,  # type: ignore[arg-type]
                ray_address=ray_address,
                progress=not quiet,
            )
        except KeyboardInterrupt:
            what = "The same command goes on with what is not graded"
            say(f"ep-rft: stopped. {what}", err=True)
            raise typer.Exit(stopped.exit_code) from None
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
