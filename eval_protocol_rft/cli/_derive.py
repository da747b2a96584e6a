"""Another file of a rollout file: `ep-rft filter`, `convert`, `datums`. What did not come along is
told.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from eval_protocol_rft import data, training
from eval_protocol_rft._options import Flag
from eval_protocol_rft.cli._common import Input, rollout_file, say
from eval_protocol_rft.cli._flags import Takes


def filter(  # noqa: A001
    file: Input,
    rules: data.FilterRules,
    options: Annotated[dict[str, Any], Takes(data.filter_rollouts)],
    *,
    output: Annotated[Path, Flag("-o")],
) -> None:
    r"""Keep the completions, or prompts, that are worth it.

    Options apply in the order below, whatever order they are given in.
    Those on prompts (pass rate, percentile, variance) see all scored completions,
    also those that options on completions then drop. What lacks a number that an
    option asks for is dropped: an unscored completion has no reward, which is not 0.

    Args:
        file: Rollout file, or what a test wrote; also a URL.
        output: Where to: .parquet or .jsonl.

    Examples:
      ep-rft filter in.parquet -o out.parquet --pass-rate 0.1:0.9 --drop-truncated
      ep-rft filter in.parquet -o middle.jsonl --reward-percentile 25:75
      ep-rft filter in.parquet -o prompts.jsonl --prompts --pass-rate :0.9
      ep-rft filter in.parquet -o out.parquet \
        --where "response not like '%sorry%'"
    """
    with rollout_file(file, progress=options["progress"]) as source:
        summary = data.filter_rollouts(source, output, rules, **options)
    if not summary.finished:
        text = "its job is not finished; this is of what is stored so far"
        say(f"ep-rft: {source}: {text}", err=True)
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


def convert(
    source: Annotated[Input, Flag(metavar="IN")],
    target: Annotated[Path, Flag(metavar="OUT")],
    options: Annotated[dict[str, Any], Takes(data.convert)],
) -> None:
    r"""Convert rollouts: our Parquet or JSON lines, rows of Eval Protocol, files for verl and TRL.

    What OUT has no place for is listed. Text is never made into tokens: files of verl and TRL can
    be converted back only where `ep-rft convert` wrote them as Parquet.

    Args:
        source: File to convert, or its URL.
        target: File to write: .parquet, .jsonl or .json.

    Examples:
      ep-rft convert rollouts.parquet rollouts.jsonl
      ep-rft convert rollouts.parquet rows.jsonl --to ep
      ep-rft convert results/run.jsonl rollouts.parquet --drop-failed-rows
      ep-rft convert rollouts.parquet train.parquet --to verl \
        --data-source openai/gsm8k
      ep-rft convert rollouts.parquet sft.parquet --to trl
    """
    say(data.convert(source, target, **options))


def datums(
    file: Input,
    batch: Annotated[dict[str, Any], Takes(training.BatchOptions)],
    filters: Annotated[dict[str, Any], Takes(training.Filters)],
    options: Annotated[dict[str, Any], Takes(data.write_datums)],
    *,
    output: Annotated[Path, Flag("-o")],
) -> None:
    """Turn scored rollouts into training data: tokens, logprobs, advantages, weights.

    All of it is one batch, in memory, unless --max-groups or --max-tokens bound it.
    Then each batch is a file of its own, NAME-00000.npz and so on; JSON lines stay
    one file, and each says which batch it is of.

    Args:
        file: Scored rollout file, or what a test wrote; also a URL.
        output: Where to: .npz, .safetensors or .jsonl.

    Examples:
      ep-rft datums rollouts.parquet -o grpo.npz
      ep-rft datums rollouts.parquet -o dapo.npz --algorithm dapo --max-groups 64
      ep-rft datums rollouts.parquet -o step.jsonl --format rl-step
    """
    import warnings

    if filters:
        batch["filters"] = training.Filters(**filters)
    with (
        rollout_file(file, progress=options["progress"]) as source,
        warnings.catch_warnings(record=True) as seen,
    ):
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", training.BiasedSamplingWarning)
        summary = data.write_datums(source, output, **options, **batch)
    for warning in seen[:1]:
        say(f"ep-rft: warning: {warning.message}", err=True)
    if summary.sampled_tokens is None:
        say(f"{summary.datums} samples of {summary.groups} prompts")
    else:
        batches = f" in {summary.batches} batches" if summary.batches > 1 else ""
        say(
            f"{summary.datums} datums of {summary.groups} prompts{batches}, "
            f"{summary.sampled_tokens} sampled tokens"
        )
    for reason, count in sorted(summary.dropped.items()):
        say(f"dropped {count:>8}  {reason}: {training.DROP_REASONS[reason]}")
    first, *others = summary.files
    say(f"{first} to {others[-1].name}" if others else str(first))
