"""Rollouts as the fw-ai/cookbook's recipes take them: samples, runs, and a rollout per prompt.

    from training.utils.rl.rollout.types import Rollout, RolloutRun, RolloutSample

    types = cookbook.CookbookTypes(sample=RolloutSample, run=RolloutRun, rollout=Rollout)
    rollout = cookbook.to_rollout(group, types=types)

Invariant: the rules that the recipes check hold: `tokens`, `logprobs` and `loss_mask` of equal
length, at least 2, something sampled, one finite reward per run. The cookbook is on no package
index, so its classes are passed in; without them the fields come as plain dicts.

The recipes compute advantages, packing and division by themselves.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from eval_protocol_rft._segments import Segment
from eval_protocol_rft.training._types import ExportError, PromptGroup, Trajectory


@dataclass(frozen=True, slots=True, kw_only=True)
class CookbookTypes:
    """What to build, each called with its fields as keyword arguments."""

    sample: Callable[..., Any] = dict
    run: Callable[..., Any] = dict
    rollout: Callable[..., Any] = dict


DICTS = CookbookTypes()


def to_sample(
    trajectory: Trajectory,
    *,
    types: CookbookTypes = DICTS,
    text: str = "",
    raw_logprobs: Sequence[float] | None = None,
) -> Any:
    """A `RolloutSample`: one trainable segment, N tokens.

    Args:
        trajectory: scored, of one segment; `to_run` takes those of several.
        types: the classes to build.
        text: what the assistant said, for logs.
        raw_logprobs: [num_sampled] the model's own logprobs of the sampled tokens, where known.

    Raises:
        ExportError: not scored, of several segments, or other than one raw logprob per sampled
            token.
    """
    if trajectory.more:
        raise ExportError(
            f"{trajectory.name}: its episode has {len(trajectory.segments)} segments, and a "
            "sample is one: use to_run"
        )
    return _sample(trajectory, 0, types, text, raw_logprobs)


def _sample(
    trajectory: Trajectory,
    place: int,
    types: CookbookTypes,
    text: str,
    raw_logprobs: Sequence[float] | None,
) -> Any:
    if trajectory.reward is None:
        raise ExportError(
            f"{trajectory.name}: it has no score, and a run without a reward cannot be trained "
            "on; nor is its reward 0"
        )
    segment = trajectory.segments[place]
    routing = segment.routing_matrices
    optional: dict[str, Any] = {}
    if routing is not None:
        # As the recipes align them: one for each input position.
        optional["routing_matrices"] = list(routing[1:])
    if _has_field(types.sample, "raw_logprobs"):
        optional["raw_logprobs"] = _aligned(trajectory, segment, raw_logprobs)
    return types.sample(
        **optional,
        tokens=segment.tokens.tolist(),
        logprobs=segment.logprobs.tolist(),
        loss_mask=segment.loss_mask.astype(int).tolist(),
        reward=float(trajectory.reward),
        # A turn that is cut off is the last of its episode: earlier segments ended by themselves.
        finish_reason=trajectory.finish_reason if place == len(trajectory.more) else "stop",
        text=text,
    )


def _has_field(kind: Callable[..., Any], name: str) -> bool:
    """Whether a recipe's class has a place for it. Older ones have none for raw logprobs, which
    are for plots alone."""
    return not dataclasses.is_dataclass(kind) or any(
        field.name == name for field in dataclasses.fields(kind)
    )


def to_run(
    segments: Sequence[Trajectory],
    *,
    types: CookbookTypes = DICTS,
    texts: Sequence[str] | None = None,
    raw_logprobs: Sequence[Sequence[float] | None] | None = None,
    run_id: str | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> Any:
    """A `RolloutRun`: the segments of one rollout, which share its reward.

    Args:
        segments: one trajectory, with all its segments; or several turns as trajectories of
            their own.
        types: the classes to build.
        texts, raw_logprobs: per segment, as for `to_sample`.
        run_id, metadata: passed on.

    Raises:
        ExportError: no segments, one is not scored, their rewards differ, or there are other than
            one text or list of raw logprobs per segment.
    """
    if not segments:
        raise ExportError("a run needs at least one segment")
    for segment in segments[1:]:
        if segment.reward != segments[0].reward:
            raise ExportError(
                f"{segment.name}: a segment with reward {segment.reward} in a run with reward "
                f"{segments[0].reward}; a run has one, on every segment"
            )
    parts = [(t, place) for t in segments for place in range(len(t.segments))]
    for name, values in (("texts", texts), ("raw_logprobs", raw_logprobs)):
        if values and len(values) != len(parts):
            raise ExportError(
                f"{segments[0].name}: {len(values)} {name} for a run of {len(parts)} segments"
            )
    aligned = zip(
        parts, texts or [""] * len(parts), raw_logprobs or [None] * len(parts), strict=True
    )
    return types.run(
        segments=[_sample(*part, types, text, raw) for part, text, raw in aligned],
        run_id=run_id,
        metadata=None if metadata is None else dict(metadata),
    )


def to_rollout(
    group: PromptGroup,
    *,
    types: CookbookTypes = DICTS,
    unscored: Literal["error", "drop"] = "error",
) -> Any:
    """A `Rollout`: a prompt group, one run per completion, or per episode with all its segments.

    Args:
        group: what was sampled for one prompt.
        types: the classes to build.
        unscored: what a completion without a valid score is: an error, or left out. What is left
            out or failed is counted in `row_meta["dropped"]`.

    Raises:
        ExportError: an unscored completion, if asked for; or no run is left.
    """
    scored = [t for t in group.trajectories if unscored == "error" or t.reward is not None]
    dropped = {
        "unscored": len(group) - len(scored),
        "failed": len(group.failures),
        "failed_row": len(group.failed_rows),
    }
    if not scored:
        raise ExportError(f"group {group.key!r}: no completion is left for a run ({dropped})")
    return types.rollout(
        runs=[to_run([trajectory], types=types) for trajectory in scored],
        row_meta={
            "row_id": scored[0].row_id,
            "dropped": {reason: count for reason, count in dropped.items() if count},
        },
    )


def _aligned(
    trajectory: Trajectory, segment: Segment, values: Sequence[float] | None
) -> list[float] | None:
    """[N] `values` at the sampled tokens, 0.0 elsewhere."""
    if values is None:
        return None
    if len(values) != segment.num_sampled:
        raise ExportError(
            f"{trajectory.name}: {len(values)} raw logprobs for {segment.num_sampled} "
            "sampled tokens"
        )
    aligned = np.zeros(len(segment))
    aligned[segment.loss_mask != 0] = values
    return aligned.tolist()
