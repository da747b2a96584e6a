"""`ep-rft datums`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from eval_protocol_rft.cli._common import one_line, rollout_file, say

if TYPE_CHECKING:
    from eval_protocol_rft.training import BatchArguments


@one_line
def datums(
    file: Annotated[Path, typer.Argument(help="Scored rollout file, or what a test wrote.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Where to: .npz, .safetensors or .jsonl.")
    ],
    algorithm: Annotated[
        str | None,
        typer.Option(
            help="grpo, dapo, dr_grpo, cispo, gspo, rloo, importance_sampling, reinforce or dro.",
            show_default="grpo",
        ),
    ] = None,
    format: Annotated[  # noqa: A002
        Literal["npz", "safetensors", "jsonl", "rl-step"] | None,
        typer.Option(
            help="rl-step: text for a Fireworks RL step.", show_default="what the extension says"
        ),
    ] = None,
    reward: Annotated[
        str | None, typer.Option(help="Name of a further reward.", show_default="the main one")
    ] = None,
    normalization: Annotated[
        Literal["none", "token", "sequence", "constant"] | None,
        typer.Option(help="The division that goes into the weights.", show_default="none"),
    ] = None,
    constant_length: Annotated[
        int | None, typer.Option(min=1, help="L of --normalization constant, in tokens.")
    ] = None,
    truncated: Annotated[
        Literal["keep", "mask", "drop"] | None,
        typer.Option(
            help="Completions cut off at max_tokens. mask: they count in their group and train "
            "nothing.",
            show_default="keep",
        ),
    ] = None,
    mixed_versions: Annotated[
        Literal["keep", "drop"] | None,
        typer.Option(
            help="Completions in whose midst the server swapped its weights.", show_default="keep"
        ),
    ] = None,
    max_groups: Annotated[
        int | None, typer.Option(min=1, help="Most prompt groups of a batch.")
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Most tokens of a batch, prompts included; no group is split."),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace outputs that are there.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
) -> None:
    """Turn scored rollouts into training data: tokens, logprobs, advantages, weights.

    All of it is one batch, in memory, unless --max-groups or --max-tokens bound it.
    Then each batch is a file of its own, NAME-00000.npz and so on; JSON lines stay
    one file, and each says which batch it is of.

    \b
    Examples:
      ep-rft datums rollouts.parquet -o grpo.npz
      ep-rft datums rollouts.parquet -o dapo.npz --algorithm dapo --max-groups 64
      ep-rft datums rollouts.parquet -o step.jsonl --format rl-step
    """
    import warnings

    from eval_protocol_rft.data import write_datums
    from eval_protocol_rft.training import DROP_REASONS, BiasedSamplingWarning, Filters

    options: BatchArguments = {}
    if algorithm is not None:
        options["algorithm"] = algorithm
    if normalization is not None:
        options["normalization"] = normalization
    if constant_length is not None:
        options["constant_length"] = constant_length
    if truncated is not None or mixed_versions is not None:
        options["filters"] = Filters(
            truncated=truncated or "keep", mixed_versions=mixed_versions or "keep"
        )
    with rollout_file(file, quiet=quiet) as source, warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", BiasedSamplingWarning)
        summary = write_datums(
            source,
            output,
            format=format,
            reward=reward,
            max_groups=max_groups,
            max_tokens=max_tokens,
            overwrite=overwrite,
            progress=not quiet,
            **options,
        )
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
        say(f"dropped {count:>8}  {reason}: {DROP_REASONS[reason]}")
    first, *others = summary.files
    say(f"{first} to {others[-1].name}" if others else str(first))
