"""`ep-rft stats`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge

from eval_protocol_rft import data, report
from eval_protocol_rft.cli._common import rollout_file, say_json
from eval_protocol_rft.cli._flags import Takes


def stats(
    file: Path,
    options: Annotated[dict[str, Any], Takes(data.rollout_stats)],
    *,
    limit_groups: Annotated[int, Ge(0)] = 20,
    json: bool = False,
) -> None:
    """Sum up a rollout file: rewards, pass@k, lengths, failures, the hardest prompts.

    Args:
        file: Rollout file, also of an unfinished job, or what a test wrote.
        limit_groups: Prompts to list, the hardest ones.
        json: Print JSON instead, with all prompts.

    Examples:
      ep-rft stats rollouts.parquet
      ep-rft stats rollouts.parquet --reward style --pass-threshold 0.5
      ep-rft stats rollouts.parquet --json | jq '.pass_at_k'
    """
    import dataclasses

    import msgspec

    with rollout_file(file, progress=options["progress"]) as path:
        found = data.rollout_stats(path, **options)
    found = dataclasses.replace(found, path=str(file))
    if json:
        say_json(msgspec.json.format(msgspec.json.encode(found), indent=2))
        return
    from rich.console import Console

    Console().print(report.stats_table(found, limit_groups=limit_groups))
