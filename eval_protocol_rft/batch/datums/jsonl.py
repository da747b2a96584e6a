"""Datums as JSON lines, for readers in any language.

Invariant: a line holds one datum, number for number: float32 values are written so that they read
back as the same float32. What all datums share stands in `<file>.metadata.json` beside them.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

from eval_protocol_rft.batch.rollouts.jsonl import replacing_lines
from eval_protocol_rft.training.batch import TrainingBatch
from eval_protocol_rft.training.datums import TrainingDatum

_ARRAYS = ("input_tokens", "target_tokens", "logprobs", "advantages", "weights")
_VALUES = ("row_id", "completion", "segment", "group", "reward", "truncated", "prompt_length")
_SHARED = ("algorithm", "loss_fn", "loss_fn_config", "normalization", "tokenizer")


def write_datums_jsonl(path: Path, batches: Iterable[TrainingBatch]) -> None:
    """Write the datums of at least one batch as they come, in place of a file that is there."""
    encoder = msgspec.json.Encoder()
    shared: dict[str, Any] = {}
    count = 0
    with replacing_lines(path) as lines:
        for number, batch in enumerate(batches):
            for datum in batch.datums:
                lines.write(encoder.encode(_line(number, datum)) + b"\n")
            shared = {name: getattr(batch, name) for name in _SHARED}
            shared |= {"batches": number + 1, "datums": (count := count + len(batch))}
        lines.metadata = shared


def _line(batch: int, datum: TrainingDatum) -> dict[str, Any]:
    values = {name: getattr(datum, name) for name in _VALUES}
    arrays = {name: getattr(datum, name).tolist() for name in _ARRAYS}
    return {"batch": batch, **values, **arrays}
