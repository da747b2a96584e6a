"""`ep-rft report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from eval_protocol_rft.cli.failing import fail


def report(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="Rollout file: Parquet or JSONL.")],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="The page.", show_default="FILE with .html for its suffix"
        ),
    ] = None,
    pass_threshold: Annotated[
        float, typer.Option(help="Reward from which on a completion counts as passed.")
    ] = 1.0,
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
) -> None:
    """Write rollouts as one HTML page: numbers, difficulty, every completion token by token.

    \b
    Examples:
      ep-rft report rollouts.parquet -o report.html
      ep-rft report rollouts.parquet --pass-threshold 0.5 --limit 100
      ep-rft report rollouts.parquet --tokenizer Qwen/Qwen3-0.6B
    """
    from eval_protocol_rft.batch.dataset import RolloutDataset
    from eval_protocol_rft.batch.rollouts.format import FormatError
    from eval_protocol_rft.report.page import write_report
    from eval_protocol_rft.report.page_detail import ReportError

    output = output or path.with_suffix(".html")
    try:
        written = write_report(
            RolloutDataset(path),
            output,
            pass_threshold=pass_threshold,
            limit=limit,
            tokenizer=tokenizer,
        )
    except (FormatError, ReportError) as error:
        fail(str(error))
    except OSError as error:
        fail(f"cannot write {output}: {error.strerror or error}")
    for problem in written.problems:
        typer.echo(f"ep-rft: tokens are shown as ids: {problem}", err=True)
    if written.shown_prompts < written.prompts:
        typer.echo(
            f"Texts of the first {written.shown_prompts:,} of {written.prompts:,} prompts are in "
            "the page; --limit takes more. Its statistics are of all."
        )
    typer.echo(
        f"Report of {written.completions:,} completions: {written.path} "
        f"({written.size / 1e6:.1f} MB)"
    )
