"""Turn any Eval Protocol evaluator into exact, fully scored token data for reinforcement learning.

Public names load on first use: importing Eval Protocol costs seconds, and what does not need it
(sampling, training, the command line's help) must not pay for it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eval_protocol_rft.episode_processor import EpisodeRolloutProcessor
    from eval_protocol_rft.processor import FireworksTrainingRolloutProcessor
    from eval_protocol_rft.record import RecordError, RolloutRecord
    from eval_protocol_rft.rollout_fn import make_group_rollout_fn, make_rollout_fn
    from eval_protocol_rft.sampling.local import LocalSampler
    from eval_protocol_rft.sampling.retry import RetryPolicy
    from eval_protocol_rft.sampling.types import (
        Completion,
        Failure,
        Sampler,
        SamplingError,
        SamplingParams,
    )
    from eval_protocol_rft.scoring import ascore_rows, score_each_completion, score_rows
    from eval_protocol_rft.slim_logger import SlimLogger

_HOMES = {
    "EpisodeRolloutProcessor": "episode_processor",
    "FireworksTrainingRolloutProcessor": "processor",
    "RolloutRecord": "record",
    "RecordError": "record",
    "LocalSampler": "sampling.local",
    "RetryPolicy": "sampling.retry",
    "Completion": "sampling.types",
    "Failure": "sampling.types",
    "Sampler": "sampling.types",
    "SamplingError": "sampling.types",
    "SamplingParams": "sampling.types",
    "make_rollout_fn": "rollout_fn",
    "make_group_rollout_fn": "rollout_fn",
    "ascore_rows": "scoring",
    "score_each_completion": "scoring",
    "score_rows": "scoring",
    "SlimLogger": "slim_logger",
}

__all__ = [
    "Completion",
    "EpisodeRolloutProcessor",
    "Failure",
    "FireworksTrainingRolloutProcessor",
    "LocalSampler",
    "RecordError",
    "RetryPolicy",
    "RolloutRecord",
    "Sampler",
    "SamplingError",
    "SamplingParams",
    "SlimLogger",
    "ascore_rows",
    "make_group_rollout_fn",
    "make_rollout_fn",
    "score_each_completion",
    "score_rows",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
