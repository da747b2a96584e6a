"""`ep-rft show`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from eval_protocol_rft import report
from eval_protocol_rft.cli._common import fail, say
from eval_protocol_rft.cli._flags import Takes


def show(
    paths: list[Path], options: Annotated[dict[str, Any], Takes(report.rollout_table)]
) -> None:
    """Show rollouts: prompts, completions, rewards, sums.

    Args:
        paths: Rows of Eval Protocol (.jsonl, or a folder of them), or rollouts, also of a job that
            is not finished.

    Examples:
      EP_OUTPUT_DIR=results pytest examples/arithmetic && ep-rft show results
      ep-rft show rollouts.parquet --limit 50
    """
    from rich.console import Console

    console = Console()
    for path in paths:
        file = report.newest_rows_file(path)
        rows = list(report.read_rows(file))
        if not rows and file.is_file():
            fail(f"{file}: it holds no rows")
        if not file.is_file():
            say(f"{path}: the job is not finished: this is what is stored of it so far", err=True)
        console.print(report.rollout_table(rows, **options))
