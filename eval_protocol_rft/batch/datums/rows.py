"""Rows of a rollout file as `training` reads them, by any of the file's rewards.

Invariant: a row carries the rewards that were asked for and no others; a data row that was never
scored is an error, since its completions are not the evaluator's failures.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from eval_protocol_rft.batch.dataset import RolloutDataset
from eval_protocol_rft.batch.evaluation_rows.to_row import to_rows
from eval_protocol_rft.batch.numbers import chosen_reward
from eval_protocol_rft.batch.progress import Reading
from eval_protocol_rft.batch.rollouts.rows import UNSCORED
from eval_protocol_rft.training.errors import TrainingDataError


def scored_rows(
    dataset: RolloutDataset, *, reward: str | None = None, reading: Reading
) -> Iterator[dict[str, Any]]:
    """`dataset.training_rows()`, with a further reward in the place of the main one.

    Args:
        dataset: a scored file.
        reward: name of the further reward; None is the main one.
        reading: shows how far it is read.

    Raises:
        FormatError: at once, if there is no such reward.
        TrainingDataError: while iterating, at a data row that was never scored.
    """
    return _rows(dataset, chosen_reward(dataset, reward), reading)


def _rows(dataset: RolloutDataset, column: str, reading: Reading) -> Iterator[dict[str, Any]]:
    for group in reading(dataset.groups()):
        survivors = [row for row in group if not row.failed]
        if survivors and not any(column in row.scores for row in survivors):
            raise TrainingDataError(
                f"{dataset.path}: data row {group[0].data_idx} ({group[0].row_id!r}) has no "
                f"{column} and no reason why. Score the file with `ep-rft score`, or leave such "
                "completions out with `ep-rft filter --drop-unscored`"
            )
        for row in group:
            row.scores = {"reward": row.scores.get(column, UNSCORED)}
        yield from to_rows(group, dataset.metadata, arrays=True)
