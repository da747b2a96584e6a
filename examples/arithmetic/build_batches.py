"""The rows of `test_arithmetic.py` as a GRPO and a CISPO batch.

EP_OUTPUT_DIR=results pytest examples/arithmetic
python examples/arithmetic/build_batches.py results
"""

import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from eval_protocol_rft.data import read_rows
from eval_protocol_rft.report import newest_rows_file
from eval_protocol_rft.training import TrainingBatch, build_batch

console = Console()


def show(batch: TrainingBatch) -> None:
    """What is in the batch, and one datum token by token."""
    stats = batch.stats
    console.print(f"[bold]{batch.algorithm}[/]: loss {batch.loss_fn} {batch.loss_fn_config}")
    console.print(
        f"  {stats.datums} datums of {stats.groups_trained} groups, {stats.sampled_tokens} sampled "
        f"tokens; of {stats.groups} groups, {stats.all_correct} were all right and "
        f"{stats.none_correct} all wrong"
    )
    passes = ", ".join(f"pass@{k} {value:.3f}" for k, value in stats.pass_at_k.items())
    console.print(f"  mean reward {stats.reward_mean:.3f}, {passes}; dropped: {batch.dropped}")
    datum = batch.datums[0]
    table = Table("input", "target", "logprob", "advantage", "weight")
    for values in zip(
        datum.input_tokens,
        datum.target_tokens,
        datum.logprobs,
        datum.advantages,
        datum.weights,
        strict=True,
    ):
        table.add_row(*(f"{value:.4g}" for value in values))
    console.print(table)


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "results")
    rows = list(read_rows(newest_rows_file(folder)))
    for algorithm in ("grpo", "cispo"):
        show(build_batch(rows, algorithm=algorithm))


if __name__ == "__main__":
    main()
