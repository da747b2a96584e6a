"""`ep-rft stats`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from eval_protocol_rft.cli._common import one_line, rollout_file, say_json


@one_line
def stats(
    file: Annotated[
        Path, typer.Argument(help="Rollout file, also of an unfinished job, or what a test wrote.")
    ],
    reward: Annotated[
        str | None, typer.Option(help="Name of a further reward.", show_default="the main one")
    ] = None,
    pass_threshold: Annotated[
        float, typer.Option(help="Reward from which on a completion counts as passed.")
    ] = 1.0,
    limit_groups: Annotated[
        int, typer.Option(min=0, help="Prompts to list, the hardest ones.")
    ] = 20,
    json: Annotated[
        bool, typer.Option("--json", help="Print JSON instead, with all prompts.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
) -> None:
    """Sum up a rollout file: rewards, pass@k, lengths, failures, the hardest prompts.

    \b
    Examples:
      ep-rft stats rollouts.parquet
      ep-rft stats rollouts.parquet --reward style --pass-threshold 0.5
      ep-rft stats rollouts.parquet --json | jq '.pass_at_k'
    """
    import dataclasses

    import msgspec

    from eval_protocol_rft.data import rollout_stats

    with rollout_file(file, quiet=quiet) as path:
        found = rollout_stats(
            path, reward=reward, pass_threshold=pass_threshold, progress=not quiet
        )
    found = dataclasses.replace(found, path=str(file))
    if json:
        say_json(msgspec.json.format(msgspec.json.encode(found), indent=2))
        return
    from rich.console import Console

    from eval_protocol_rft.report import stats_table

    Console().print(stats_table(found, limit_groups=limit_groups))
