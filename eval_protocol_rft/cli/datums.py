"""`ep-rft datums`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from eval_protocol_rft import data, training
from eval_protocol_rft._options import Flag
from eval_protocol_rft.cli._common import rollout_file, say
from eval_protocol_rft.cli._flags import Takes


def datums(
    file: Path,
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
        file: Scored rollout file, or what a test wrote.
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
