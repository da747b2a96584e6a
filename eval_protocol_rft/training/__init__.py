"""From scored rows to training datums: small, pure and fast.

Arrows inside: rows -> groups -> filters -> advantages -> batch. Nothing here imports Eval
Protocol, torch or a trainer's package; names load on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eval_protocol_rft.training import advantages
    from eval_protocol_rft.training.algorithms import ALGORITHMS, Algorithm
    from eval_protocol_rft.training.batch import TrainingBatch, build_batch, iter_batches
    from eval_protocol_rft.training.datums import TrainingDatum
    from eval_protocol_rft.training.errors import (
        BiasedSamplingError,
        BiasedSamplingWarning,
        EmptyBatchError,
        TrainingDataError,
    )
    from eval_protocol_rft.training.filters import Filters, SoftOverlong
    from eval_protocol_rft.training.groups import group_rows, iter_groups
    from eval_protocol_rft.training.stats import BatchStats
    from eval_protocol_rft.training.trajectory import PromptGroup, Segment, Trajectory

_HOMES = {
    "ALGORITHMS": "algorithms",
    "Algorithm": "algorithms",
    "BatchStats": "stats",
    "BiasedSamplingError": "errors",
    "BiasedSamplingWarning": "errors",
    "EmptyBatchError": "errors",
    "Filters": "filters",
    "PromptGroup": "trajectory",
    "Segment": "trajectory",
    "SoftOverlong": "filters",
    "TrainingBatch": "batch",
    "TrainingDataError": "errors",
    "TrainingDatum": "datums",
    "Trajectory": "trajectory",
    "build_batch": "batch",
    "group_rows": "groups",
    "iter_batches": "batch",
    "iter_groups": "groups",
}

__all__ = [
    "ALGORITHMS",
    "Algorithm",
    "BatchStats",
    "BiasedSamplingError",
    "BiasedSamplingWarning",
    "EmptyBatchError",
    "Filters",
    "PromptGroup",
    "Segment",
    "SoftOverlong",
    "TrainingBatch",
    "TrainingDataError",
    "TrainingDatum",
    "Trajectory",
    "advantages",
    "build_batch",
    "group_rows",
    "iter_batches",
    "iter_groups",
]


def __getattr__(name: str) -> Any:
    if name == "advantages":
        return importlib.import_module(f"{__name__}.advantages")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
