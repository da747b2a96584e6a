"""`ep-rft show`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from eval_protocol_rft.cli.failing import fail


def show(
    paths: Annotated[
        list[Path],
        typer.Argument(
            help="Rows of Eval Protocol (.jsonl, or a folder of them), or rollouts (.parquet)."
        ),
    ],
    limit: Annotated[int, typer.Option(min=0, help="Rows to show of each file.")] = 10,
    pass_threshold: Annotated[
        float, typer.Option(help="Reward from which on a completion counts as passed.")
    ] = 1.0,
) -> None:
    """Show rollouts: prompts, completions, rewards, sums.

    \b
    Examples:
      EP_OUTPUT_DIR=results pytest examples/arithmetic && ep-rft show results
      ep-rft show rollouts.parquet --limit 50
    """
    from rich.console import Console

    from eval_protocol_rft.report.rows import RowsFileError, newest_rows_file, read_rows
    from eval_protocol_rft.report.terminal import rollout_table

    console = Console()
    for path in paths:
        try:
            rows = list(read_rows(newest_rows_file(path)))
        except RowsFileError as error:
            fail(str(error))
        console.print(rollout_table(rows, limit=limit, pass_threshold=pass_threshold))
