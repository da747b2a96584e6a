"""`ep-rft filter`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from eval_protocol_rft.cli._common import one_line, rollout_file, say


@one_line
def filter(  # noqa: A001
    file: Annotated[Path, typer.Argument(help="Rollout file, or what a test wrote.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to: .parquet or .jsonl.")],
    prompts: Annotated[
        bool,
        typer.Option("--prompts", help="Write the data set's own rows of what is left, once each."),
    ] = False,
    reward: Annotated[
        str | None, typer.Option(help="Name of a further reward.", show_default="the main one")
    ] = None,
    pass_threshold: Annotated[
        float, typer.Option(help="Reward from which on a completion counts as passed.")
    ] = 1.0,
    dedupe_prompts: Annotated[
        bool, typer.Option("--dedupe-prompts", help="Of equal prompts keep the first.")
    ] = False,
    pass_rate: Annotated[
        str | None,
        typer.Option(
            metavar="LOW:HIGH",
            help="Prompts of whose scored completions such a share passes, ends included.",
        ),
    ] = None,
    reward_percentile: Annotated[
        str | None,
        typer.Option(
            metavar="LOW:HIGH",
            help="Prompts whose mean reward lies between these percentiles, ends included.",
        ),
    ] = None,
    drop_zero_variance: Annotated[
        bool, typer.Option("--drop-zero-variance", help="Drop prompts whose rewards are all equal.")
    ] = False,
    drop_failed: Annotated[
        bool, typer.Option("--drop-failed", help="Drop completions that could not be sampled.")
    ] = False,
    drop_unscored: Annotated[
        bool, typer.Option("--drop-unscored", help="Drop completions without a reward.")
    ] = False,
    drop_truncated: Annotated[
        bool, typer.Option("--drop-truncated", help="Drop completions cut off at max_tokens.")
    ] = False,
    min_tokens: Annotated[
        int | None, typer.Option(min=1, help="Fewest sampled tokens of a completion.")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Most sampled tokens of a completion.")
    ] = None,
    reward_min: Annotated[float | None, typer.Option(help="Least reward of a completion.")] = None,
    reward_max: Annotated[float | None, typer.Option(help="Most reward of a completion.")] = None,
    dedupe_completions: Annotated[
        bool,
        typer.Option(
            "--dedupe-completions", help="Of a prompt's completions with equal tokens keep one."
        ),
    ] = False,
    min_completions: Annotated[
        int | None,
        typer.Option(min=1, help="Fewest completions of a prompt, after everything above."),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an output that is there.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
) -> None:
    """Keep the completions, or prompts, that are worth it.

    Options apply in the order below, whatever order they are given in.
    Those on prompts (pass rate, percentile, variance) see all scored completions,
    also those that options on completions then drop. What lacks a number that an
    option asks for is dropped: an unscored completion has no reward, which is not 0.

    \b
    Examples:
      ep-rft filter in.parquet -o out.parquet --pass-rate 0.1:0.9 --drop-truncated
      ep-rft filter in.parquet -o middle.jsonl --reward-percentile 25:75
      ep-rft filter in.parquet -o prompts.jsonl --prompts --pass-rate :0.9
    """
    from eval_protocol_rft.data import REASONS, FilterRules, filter_rollouts, parse_band

    rules = FilterRules(
        reward=reward,
        pass_threshold=pass_threshold,
        dedupe_prompts=dedupe_prompts,
        pass_rate=None if pass_rate is None else parse_band(pass_rate),
        reward_percentile=None if reward_percentile is None else parse_band(reward_percentile),
        drop_zero_variance=drop_zero_variance,
        drop_failed=drop_failed,
        drop_unscored=drop_unscored,
        drop_truncated=drop_truncated,
        min_tokens=min_tokens,
        max_tokens=max_tokens,
        reward_min=reward_min,
        reward_max=reward_max,
        dedupe_completions=dedupe_completions,
        min_completions=min_completions,
    )
    with rollout_file(file, quiet=quiet) as source:
        summary = filter_rollouts(
            source, output, rules, prompts=prompts, overwrite=overwrite, progress=not quiet
        )
    if not summary.finished:
        say(f"ep-rft: {file}: its job is not finished; this is of what is stored so far", err=True)
    say(
        f"kept {summary.kept} of {summary.completions} completions, {summary.groups_kept} of "
        f"{summary.groups} prompts"
    )
    if summary.mean_band is not None:
        say(f"those percentiles are the mean rewards {summary.mean_band}")
    for reason, count in summary.dropped.items():
        say(f"dropped {count:>8}  {reason}: {REASONS[reason]}")
    what = f"{summary.groups_kept} prompts" if prompts else f"{summary.kept} completions"
    say(f"{output}: {what}")
