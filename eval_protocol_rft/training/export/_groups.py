"""What trainers that estimate advantages by themselves ask of prompt groups.

Invariant: such a trainer counts what it gets. A completion that is missing, or has no score, would
change the baseline of its group without a word, and so would an episode that stands there twice;
each is refused by name, and never left out or made up.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from eval_protocol_rft._segments import Segment
from eval_protocol_rft.training._types import (
    ExportError,
    PromptGroup,
    Trajectory,
    several_models,
)


class Response(NamedTuple):
    """One segment as prompt and response: R tokens from the first sampled one to the last.

    What an environment said behind the last turn is left out. Nothing is predicted from it, and
    trainers put the reward on the last token of the response, which must be a sampled one.
    """

    prompt_ids: list[int]
    """[P]"""
    ids: list[int]
    """[R]"""
    mask: list[int]
    """[R] 1 on sampled tokens."""
    logprobs: list[float]
    """[R] sampling logprobs (nats), 0.0 where nothing was sampled."""


def response_of(segment: Segment) -> Response:
    """Split a segment where its first sampled token stands."""
    start, stop = segment.prompt_length, end_of_sampled(segment)
    return Response(
        segment.tokens[:start].tolist(),
        segment.tokens[start:stop].tolist(),
        segment.loss_mask[start:stop].astype(int).tolist(),
        segment.logprobs[start:stop].tolist(),
    )


def end_of_sampled(segment: Segment) -> int:
    """Tokens up to the last sampled one, included."""
    return int(np.flatnonzero(segment.loss_mask)[-1]) + 1


def check_groups(groups: Sequence[PromptGroup], consumer: str) -> None:
    """Refuse groups that the consumer would count wrongly, or that hold what it reads wrongly.

    Raises:
        ExportError: there are no groups; they are of several tokenizers or models; a completion is
            missing, not scored, or to count in a baseline alone; its logprobs are not those of the
            whole distribution.
    """
    if not groups:
        raise ExportError(f"there are no prompt groups for {consumer}")
    check_one_policy(groups)
    for group in groups:
        check_complete(group, consumer)
        if not group.trajectories:
            raise ExportError(f"group {group.key!r}: it has no completions")
        for trajectory in group.trajectories:
            _check_trajectory(trajectory, consumer)


def check_one_policy(groups: Sequence[PromptGroup]) -> None:
    """Refuse what one policy cannot have sampled.

    Raises:
        ExportError: the groups are of several tokenizers, or of several models.
    """
    named = [group for group in groups if group.tokenizer is not None]
    for group in named[1:]:
        if group.tokenizer != named[0].tokenizer:
            raise ExportError(
                f"group {named[0].key!r} was tokenized with {named[0].tokenizer!r}, group "
                f"{group.key!r} with {group.tokenizer!r}: their token ids mean different things"
            )
    if problem := several_models(
        Counter(t.model for group in groups for t in group.trajectories if t.model)
    ):
        raise ExportError(problem)


def check_complete(group: PromptGroup, consumer: str) -> None:
    """Refuse a group of which completions failed, unless over-sampling made up for them.

    Raises:
        ExportError: a completion is missing.
    """
    made_up_for = bool(group.asked) and len(group) >= group.asked
    failures = () if made_up_for else group.failures
    messages = [*(failure.message for failure in failures), *group.failed_rows]
    if messages:
        raise ExportError(
            f"group {group.key!r}: {len(messages)} of its completions or rows failed, and "
            f"{consumer} has no place for a missing completion; the first: {messages[0]}"
        )


def check_segments(group: PromptGroup, consumer: str) -> None:
    """Refuse episodes that would be several sequences.

    Raises:
        ExportError: a completion has several segments.
    """
    for trajectory in group.trajectories:
        if trajectory.more:
            raise ExportError(
                f"{trajectory.name}: its episode has "
                f"{len(trajectory.segments)} segments, and {consumer} takes one sequence per "
                "completion. Sample with a chat template that does not rewrite history, or train "
                "where episodes may have several (fireworks, tinker, cookbook, skyrl, prime_rl)"
            )


def check_same_size(groups: Sequence[PromptGroup], consumer: str, setting: str) -> None:
    """Refuse groups of several sizes, where the consumer cuts its batch into equal ones.

    Raises:
        ExportError: a group has more or fewer completions than the first.
    """
    for group in groups:
        if len(group) != len(groups[0]):
            raise ExportError(
                f"group {group.key!r} has {len(group)} completions, group {groups[0].key!r} has "
                f"{len(groups[0])}: {consumer} cuts the batch into groups of {setting}, and would "
                "compare completions of different prompts. Leave out whole groups, or sample what "
                "is missing"
            )


def _check_trajectory(trajectory: Trajectory, consumer: str) -> None:
    if trajectory.reward is None:
        reason = f" ({trajectory.score_error})" if trajectory.score_error else ""
        raise ExportError(
            f"{trajectory.name}: it has no score{reason}, and {consumer} needs one of each; no "
            "score is not 0. Score it, or leave its whole group out"
        )
    if not trajectory.trains:
        raise ExportError(
            f"{trajectory.name}: it counts in the baseline of its group alone, which {consumer} "
            "cannot be told"
        )
    if trajectory.bias is not None:
        raise ExportError(
            f"{trajectory.name}: {trajectory.bias}, and {consumer} takes its logprobs for those of "
            "the whole distribution. Sample with temperature > 0, top_p=1 and top_k=0"
        )
