"""Records of episodes: several turns in one or several segments, as plain dicts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from hypothesis import strategies as st

from tests.training_rows import record, row

Shape = Sequence[Sequence[tuple[int, int]]]
"""[segments][turns] of an episode: tokens that were given, then tokens that were sampled."""

PROMPT = [1, 2, 3]
TWO_SEGMENTS: Shape = [[(3, 2), (2, 3)], [(4, 1)]]
"""Three turns, 6 sampled tokens; segments of 10 and 5 tokens."""


def segment(turns: Sequence[tuple[int, int]], rng: np.random.Generator) -> dict[str, Any]:
    """Random tokens and logprobs."""
    mask = [m for given, sampled in turns for m in [0] * given + [1] * sampled]
    return {
        "tokens": rng.integers(0, 9999, len(mask)).tolist(),
        "logprobs": [float(-rng.random() * 3) if m else 0.0 for m in mask],
        "loss_mask": mask,
    }


def episodes_extra(
    shapes: Sequence[Shape],
    rewards: Sequence[float | None],
    *,
    stop_reasons: Sequence[str] | None = None,
    seed: int = 0,
    **options: Any,
) -> dict[str, Any]:
    """What a rollout of an episode per shape leaves in `extra`. The first turn of each begins with
    `PROMPT`, whatever its shape says."""
    rng = np.random.default_rng(seed)
    trajectories = []
    for (first, *further), *others in shapes:
        opening = [(len(PROMPT), first[1]), *further]
        segments = [segment(turns, rng) for turns in (opening, *others)]
        segments[0]["tokens"][: len(PROMPT)] = PROMPT
        trajectories.append(segments)
    starts = [slice(len(PROMPT), len(PROMPT) + first[1]) for (first, *_further), *_others in shapes]
    reasons = stop_reasons or ["done"] * len(shapes)
    completions = [
        (segments[0]["tokens"][at], segments[0]["logprobs"][at])
        for segments, at in zip(trajectories, starts, strict=True)
    ]
    cut = [
        i
        for i, (shape, reason) in enumerate(zip(shapes, reasons, strict=True))
        if reason == "length" and sum(map(len, shape)) == 1
    ]
    extra = record(rewards, completions=completions, truncated=cut, **options)
    extra["trajectories"] = trajectories
    extra["episodes"] = [
        {
            "turns": sum(map(len, shape)),
            "stop_reason": reason,
            "step_rewards": [None] * sum(map(len, shape)),
            "metrics": {},
            "messages": [{"role": "user", "content": "2+2?"}],
        }
        for shape, reason in zip(shapes, reasons, strict=True)
    ]
    return extra


def episodes_row(
    row_id: str, shapes: Sequence[Shape], rewards: Sequence[float | None], **options: Any
) -> dict[str, Any]:
    return row(row_id, episodes_extra(shapes, rewards, **options))


shapes = st.lists(
    st.lists(st.tuples(st.integers(1, 4), st.integers(1, 5)), min_size=1, max_size=3),
    min_size=1,
    max_size=3,
)
"""Of any episode."""
