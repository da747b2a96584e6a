"""`ep-rft filter`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from eval_protocol_rft import data
from eval_protocol_rft._options import Flag
from eval_protocol_rft.cli._common import rollout_file, say
from eval_protocol_rft.cli._flags import Takes


def filter(  # noqa: A001
    file: Path,
    rules: data.FilterRules,
    options: Annotated[dict[str, Any], Takes(data.filter_rollouts)],
    *,
    output: Annotated[Path, Flag("-o")],
) -> None:
    """Keep the completions, or prompts, that are worth it.

    Options apply in the order below, whatever order they are given in.
    Those on prompts (pass rate, percentile, variance) see all scored completions,
    also those that options on completions then drop. What lacks a number that an
    option asks for is dropped: an unscored completion has no reward, which is not 0.

    Args:
        file: Rollout file, or what a test wrote.
        output: Where to: .parquet or .jsonl.

    Examples:
      ep-rft filter in.parquet -o out.parquet --pass-rate 0.1:0.9 --drop-truncated
      ep-rft filter in.parquet -o middle.jsonl --reward-percentile 25:75
      ep-rft filter in.parquet -o prompts.jsonl --prompts --pass-rate :0.9
      ep-rft filter in.parquet -o out.parquet --where "response not like '%sorry%'"
    """
    with rollout_file(file, progress=options["progress"]) as source:
        summary = data.filter_rollouts(source, output, rules, **options)
    if not summary.finished:
        say(f"ep-rft: {file}: its job is not finished; this is of what is stored so far", err=True)
    say(
        f"kept {summary.kept} of {summary.completions} completions, {summary.groups_kept} of "
        f"{summary.groups} prompts"
    )
    if summary.mean_band is not None:
        say(f"those percentiles are the mean rewards {summary.mean_band}")
    for reason, count in summary.dropped.items():
        say(f"dropped {count:>8}  {reason}: {data.REASONS[reason]}")
    prompts = options.get("prompts")
    what = f"{summary.groups_kept} prompts" if prompts else f"{summary.kept} completions"
    say(f"{output}: {what}")
