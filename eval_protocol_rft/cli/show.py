"""`ep-rft show`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from eval_protocol_rft.cli._common import fail, one_line, say


@one_line
def show(
    paths: Annotated[
        list[Path],
        typer.Argument(
            help="Rows of Eval Protocol (.jsonl, or a folder of them), or rollouts, also of a job "
            "that is not finished."
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

    from eval_protocol_rft.report import newest_rows_file, read_rows, rollout_table

    console = Console()
    for path in paths:
        file = newest_rows_file(path)
        rows = list(read_rows(file))
        if not rows and file.is_file():
            fail(f"{file}: it holds no rows")
        if not file.is_file():
            say(f"{path}: the job is not finished: this is what is stored of it so far", err=True)
        console.print(rollout_table(rows, limit=limit, pass_threshold=pass_threshold))
