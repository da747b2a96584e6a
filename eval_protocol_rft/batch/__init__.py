"""Rollouts in bulk: generate once, score many times, filter, and look at them.

    from eval_protocol_rft import batch

    batch.generate("problems.jsonl", "rollouts.parquet", {"model": "local/arithmetic", "n": 8})
    batch.score("rollouts.parquet", "tests/test_math.py::test_math")

Names load on first use. In a notebook, where an event loop runs, `await batch.agenerate(...)`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eval_protocol_rft.batch.conversion import convert
    from eval_protocol_rft.batch.dataset import RolloutDataset
    from eval_protocol_rft.batch.datums.write import write_datums
    from eval_protocol_rft.batch.files import write_rows
    from eval_protocol_rft.batch.filtering.filters import filter_rollouts
    from eval_protocol_rft.batch.filtering.rules import FilterRules
    from eval_protocol_rft.batch.generation.generate import agenerate, generate
    from eval_protocol_rft.batch.grading.score import score
    from eval_protocol_rft.batch.rollouts.rows import CompletionRow, Score
    from eval_protocol_rft.batch.stats.rollout_stats import rollout_stats

_HOMES = {
    "CompletionRow": "rollouts.rows",
    "FilterRules": "filtering.rules",
    "RolloutDataset": "dataset",
    "Score": "rollouts.rows",
    "agenerate": "generation.generate",
    "convert": "conversion",
    "filter_rollouts": "filtering.filters",
    "generate": "generation.generate",
    "rollout_stats": "stats.rollout_stats",
    "score": "grading.score",
    "write_datums": "datums.write",
    "write_rows": "files",
}

__all__ = [
    "CompletionRow",
    "FilterRules",
    "RolloutDataset",
    "Score",
    "agenerate",
    "convert",
    "filter_rollouts",
    "generate",
    "rollout_stats",
    "score",
    "write_datums",
    "write_rows",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
