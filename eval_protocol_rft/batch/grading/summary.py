"""What a column of rewards holds, and what looks wrong with it.

Invariant: rewards that cannot mean anything do not pass without a word.
"""

from __future__ import annotations

import inspect
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from eval_protocol_rft.batch.dataset import RolloutDataset
from eval_protocol_rft.batch.grading.evaluators import LoadedEvaluator
from eval_protocol_rft.batch.rollouts.format import reward_columns


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreSummary:
    """What a call of `score` did, and what the column holds now."""

    output: Path
    column: str
    graded: int
    """Completions graded by this call."""
    rows: int = 0
    """Rows of the data set."""
    completions: int = 0
    """All of the file, those that could not be sampled too."""
    scored: int
    """Completions with a reward."""
    mean: float | None
    """Of the rewards."""
    unscored: Counter[str] = field(default_factory=Counter)
    """Why a completion has none -> how many."""
    remarks: Counter[str] = field(default_factory=Counter)
    """What was wrong with completions that have a reward all the same -> how many."""
    failed: int = 0
    """Completions that could not be sampled, so there is nothing to grade."""
    warnings: tuple[str, ...] = ()
    """What makes the rewards doubtful."""


def summarize_rewards(
    target: Path, column: str, graded: int, evaluator: LoadedEvaluator, *, adapt: bool
) -> ScoreSummary:
    """Look at all rows of a file that was scored."""
    dataset = RolloutDataset(target)
    error_column = reward_columns(column)[3]
    columns = ["data_idx", column, error_column, "error", "ground_truth"]
    rows: set[int] = set()
    completions = scored = failed = truths = 0
    total = 0.0
    lowest, highest = float("inf"), float("-inf")
    unscored: Counter[str] = Counter()
    remarks: Counter[str] = Counter()
    for table in dataset.tables([name for name in columns if name in dataset.schema.names]):
        rewards = table.column(column)
        rows.update(pc.unique(table.column("data_idx")).to_pylist())
        completions += len(table)
        failed += len(table) - table.column("error").null_count
        if "ground_truth" in table.schema.names:
            truths += _present(table.column("ground_truth"))
        scored += len(rewards) - rewards.null_count
        total += float(pc.sum(rewards, min_count=0).as_py())
        if rewards.null_count < len(rewards):
            ends = pc.min_max(rewards).as_py()
            lowest, highest = min(lowest, ends["min"]), max(highest, ends["max"])
        has_none = rewards.is_null().to_pylist()
        errors = table.column(error_column).to_pylist()
        for error, is_unscored in zip(errors, has_none, strict=True):
            if error:
                (unscored if is_unscored else remarks)[error] += 1
    warnings = []
    uses_adapter = adapt and evaluator.dataset_adapter is not None
    if scored and not truths and not uses_adapter and _mentions_ground_truth(evaluator):
        warnings.append(
            f"ground_truth is absent in every row, and {evaluator.name} reads it: name the data "
            "set's column of right answers ground_truth, and sample again"
        )
    if scored > 1 and lowest == highest:
        warnings.append(f"all {scored} rewards are {lowest:g}: nothing can be learned from them")
    return ScoreSummary(
        output=target,
        column=column,
        graded=graded,
        rows=len(rows),
        completions=completions,
        scored=scored,
        mean=total / scored if scored else None,
        unscored=unscored,
        remarks=remarks,
        failed=failed,
        warnings=tuple(warnings),
    )


def _present(values: pa.ChunkedArray) -> int:
    """How many are there; JSON text may say null."""
    count = len(values) - values.null_count
    if pa.types.is_string(values.type):
        count -= pc.sum(pc.equal(values, "null"), min_count=0).as_py()
    return int(count)


def _mentions_ground_truth(evaluator: LoadedEvaluator) -> bool:
    file = inspect.getsourcefile(inspect.unwrap(evaluator.function))
    return file is not None and "ground_truth" in Path(file).read_text(errors="replace")
