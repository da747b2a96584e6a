"""`ep-rft convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from eval_protocol_rft.cli._common import one_line, say


@one_line
def convert(
    source: Annotated[Path, typer.Argument(metavar="IN", help="File to convert.")],
    target: Annotated[
        Path, typer.Argument(metavar="OUT", help="File to write: .parquet, .jsonl or .json.")
    ],
    from_: Annotated[
        Literal["auto", "rollouts", "ep", "verl", "trl"],
        typer.Option("--from", help="Format of IN; auto: by its content."),
    ] = "auto",
    to: Annotated[
        Literal["rollouts", "ep", "verl", "trl"], typer.Option("--to", help="Format of OUT.")
    ] = "rollouts",
    drop_failed_rows: Annotated[
        bool,
        typer.Option("--drop-failed-rows", help="Leave out Eval Protocol rows without a rollout."),
    ] = False,
    data_source: Annotated[
        str | None, typer.Option(help="For verl: what it chooses its reward function by.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
) -> None:
    """Convert rollouts: our Parquet or JSON lines, rows of Eval Protocol, files for verl and TRL.

    What OUT has no place for is listed. Text is never made into tokens: files of verl and TRL can
    be converted back only where `ep-rft convert` wrote them as Parquet.

    \b
    Examples:
      ep-rft convert rollouts.parquet rollouts.jsonl
      ep-rft convert rollouts.parquet rows.jsonl --to ep
      ep-rft convert results/run.jsonl rollouts.parquet --drop-failed-rows
      ep-rft convert rollouts.parquet train.parquet --to verl --data-source openai/gsm8k
      ep-rft convert rollouts.parquet sft.parquet --to trl
    """
    from eval_protocol_rft.data import convert as run

    summary = run(
        source,
        target,
        from_format=None if from_ == "auto" else from_,
        to_format=to,
        drop_failed_rows=drop_failed_rows,
        data_source=data_source,
        overwrite=overwrite,
        progress=not quiet,
    )
    say(summary)
