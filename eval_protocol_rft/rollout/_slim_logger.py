"""A logger for `@evaluation_test(logger=...)` that keeps token arrays and credentials out of Eval
Protocol's database.

Invariant: what is logged is a copy. The row that the trainer gets is never changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from eval_protocol.dataset_logger import default_logger
from eval_protocol.dataset_logger.dataset_logger import DatasetLogger
from eval_protocol.models import EvaluationRow

from eval_protocol_rft.record import ARRAY_KEYS, has_record
from eval_protocol_rft.rollout._redaction import redact_params


class SlimLogger(DatasetLogger):
    """Logs rows through another logger, without what makes them large or secret.

    Everything of a row is kept except the token arrays of its rollout record, which become
    `extra["token_counts"]`, and credentials in the completion parameters.
    """

    def __init__(self, *, logger: DatasetLogger | None = None) -> None:
        """
        Args:
            logger: where slim rows go; Eval Protocol's default logger (its SQLite database)
                unless given.
        """
        self._logger = default_logger if logger is None else logger

    def log(self, row: EvaluationRow) -> None:
        """Log a slim copy of `row`."""
        self._logger.log(slim_copy(row))

    def read(self, row_id: str | None = None) -> list[EvaluationRow]:
        """Rows as they were logged, slim; `row_id` selects by whatever id the wrapped logger goes
        by (the rollout id, in Eval Protocol's database)."""
        return list(self._logger.read(row_id))


def slim_copy(row: EvaluationRow) -> EvaluationRow:
    """A copy of `row` without token arrays and credentials; what is not cut is shared."""
    execution = row.execution_metadata
    metadata = row.input_metadata
    return row.model_copy(
        update={
            "execution_metadata": execution.model_copy(update={"extra": _slim(execution.extra)}),
            "input_metadata": metadata.model_copy(
                update={"completion_params": redact_params(metadata.completion_params)}
            ),
        }
    )


def _slim(extra: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if extra is None:
        return None
    slim = {key: value for key, value in extra.items() if key not in ARRAY_KEYS}
    if isinstance(extra.get("sampling"), Mapping):
        slim["sampling"] = redact_params(extra["sampling"])
    if has_record(extra) and "completion_ids" in extra:
        slim["token_counts"] = {
            "prompt": len(extra["prompt_ids"]),
            "completions": [len(ids) for ids in extra["completion_ids"]],
        }
    return slim
