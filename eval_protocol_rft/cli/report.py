"""`ep-rft report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from eval_protocol_rft.cli._common import fail, one_line, reason_of, rollout_file, say


@one_line
def report(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            help="Rollout file, what a test wrote, or folder of a training run.",
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="The page.",
            show_default="FILE with .html for its suffix; in a run, report.html",
        ),
    ] = None,
    pass_threshold: Annotated[
        float | None,
        typer.Option(
            help="Reward from which on a completion counts as passed.", show_default="1.0"
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Prompts to show with their texts, the first of the file. Statistics are always "
            "of all.",
            show_default="2000, fewer where they hold 4 million tokens",
        ),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            help="Folder or hub id of the tokenizer to show tokens with.",
            show_default="the one the file names",
        ),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
) -> None:
    """Write rollouts as one HTML page: numbers, difficulty, every completion token by token.

    Of a training run: its curves, from the run's folder (`ep-rft train` writes the page, too).

    \b
    Examples:
      ep-rft report rollouts.parquet -o report.html
      ep-rft report rollouts.parquet --pass-threshold 0.5 --limit 100
      ep-rft report rollouts.parquet --tokenizer Qwen/Qwen3-0.6B
      ep-rft report run -o training.html
    """
    from eval_protocol_rft.data import RolloutDataset
    from eval_protocol_rft.report import is_run_folder, write_report

    if is_run_folder(path):
        for name, value in (
            ("--pass-threshold", pass_threshold),
            ("--limit", limit),
            ("--tokenizer", tokenizer),
        ):
            if value is not None:
                fail(f"{name} is for rollout files, and {path} is the folder of a training run")
        _report_run(path, output)
        return
    output = output or path.with_suffix(".html")
    try:
        with rollout_file(path, quiet=quiet) as file:
            written = write_report(
                RolloutDataset(file),
                output,
                pass_threshold=1.0 if pass_threshold is None else pass_threshold,
                limit=limit,
                tokenizer=tokenizer,
                progress=not quiet,
            )
    except OSError as error:
        fail(f"cannot write {output}: {reason_of(error)}")
    for problem in written.problems:
        say(f"ep-rft: tokens are shown as ids: {problem}", err=True)
    if written.shown_prompts < written.prompts:
        say(
            f"Texts of the first {written.shown_prompts:,} of {written.prompts:,} prompts are in "
            "the page; --limit takes more. Its statistics are of all."
        )
    say(
        f"Report of {written.completions:,} completions: {written.path} "
        f"({written.size / 1e6:.1f} MB)"
    )


def _report_run(folder: Path, output: Path | None) -> None:
    from eval_protocol_rft.report import write_training_report

    try:
        written = write_training_report(folder, output)
    except OSError as error:
        fail(f"cannot write {output or folder / 'report.html'}: {reason_of(error)}")
    curve = "" if written.curve is None else f", {written.curve}"
    say(
        f"Report of {written.steps:,} steps and {written.evaluations:,} evaluations: "
        f"{written.page} ({written.size / 1e6:.1f} MB){curve}"
    )
