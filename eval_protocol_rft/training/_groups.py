"""Prompt groups from rows, however they came.

Invariant: n completions in one row, n rows of one completion from `num_runs`, and any mix of both
give the same group. Run and rollout ids play no part: their meaning differs between Eval
Protocol's schedulers. No row is left out. Each completion stands behind the prompt ids that it was
sampled behind, though rows of a group may have different ones.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence

import numpy as np

from eval_protocol_rft.training._buffers import TokenBuffer
from eval_protocol_rft.training._errors import TrainingDataError
from eval_protocol_rft.training._rows import Row, RowRollout, read_row, row_key
from eval_protocol_rft.training._trajectory import PromptGroup

GroupKey = Callable[[Row], Hashable]


def group_rows(rows: Iterable[Row], *, key: GroupKey | None = None) -> list[PromptGroup]:
    """Read all rows and put together what belongs to one prompt, in order of appearance.

    Args:
        rows: evaluated rows, as objects or as dicts of Eval Protocol's JSONL.
        key: names the group of a row. Default: experiment id and row id. Rows with identical
            content have the same row id, and so share a group.

    Raises:
        TrainingDataError: a row without an id, record or rewards, or with invalid ones; rows of
            one group that differ in tokenizer, or in what they ask (with the default key).
    """
    buffer = TokenBuffer()
    found: dict[Hashable, list[RowRollout]] = {}
    for row in rows:
        found.setdefault((key or row_key)(row), []).append(read_row(row, buffer))
    return [_group(k, rollouts, same_prompt=key is None) for k, rollouts in found.items()]


def iter_groups(
    rows: Iterable[Row], *, key: GroupKey | None = None, completions_per_group: int | None = None
) -> Iterator[PromptGroup]:
    """As `group_rows`, lazily: holds the groups that are not complete yet, and nothing else.

    Args:
        rows: evaluated rows. Without `completions_per_group`, those of one group stand together.
        key: names the group of a row.
        completions_per_group: a group is complete when that many completions were asked for,
            failed ones included, the surplus of over-sampling not; its rows may then stand
            anywhere. Groups that are still incomplete at the end come last.

    Raises:
        TrainingDataError: as `group_rows`; or a row of a group that was complete already.
    """
    buffer = TokenBuffer()
    incomplete: dict[Hashable, list[RowRollout]] = {}
    complete: set[int] = set()  # hashes: keys of a long run would not fit in memory either

    def close(group_key: Hashable) -> PromptGroup:
        complete.add(hash(group_key))
        return _group(group_key, incomplete.pop(group_key), same_prompt=key is None)

    for row in rows:
        group_key = (key or row_key)(row)
        rollout = read_row(row, buffer)
        if hash(group_key) in complete:
            raise TrainingDataError(_came_late(rollout, completions_per_group))
        if completions_per_group is None:
            for other in [k for k in incomplete if k != group_key]:
                yield close(other)
        rollouts = incomplete.setdefault(group_key, [])
        rollouts.append(rollout)
        if completions_per_group and sum(r.asked for r in rollouts) >= completions_per_group:
            yield close(group_key)
    for group_key in list(incomplete):
        yield close(group_key)


def _came_late(rollout: RowRollout, completions_per_group: int | None) -> str:
    if completions_per_group is None:
        return (
            f"{rollout.name} belongs to a group whose rows ended before it: sort the rows by "
            "row id, or pass completions_per_group=, or use group_rows() if they fit in memory"
        )
    return (
        f"{rollout.name} belongs to a group that had its {completions_per_group} completions "
        "already: completions_per_group must be completions per row times runs"
    )


def _group(key: Hashable, rollouts: Sequence[RowRollout], *, same_prompt: bool) -> PromptGroup:
    sampled = [rollout for rollout in rollouts if rollout.trajectories]
    if same_prompt:
        _check_prompts(key, sampled)
    return PromptGroup(
        key=key,
        trajectories=tuple(t for rollout in sampled for t in rollout.trajectories),
        failures=tuple(f for rollout in rollouts for f in rollout.failures),
        cancelled=sum(rollout.cancelled for rollout in rollouts),
        failed_rows=tuple(r.failed for r in rollouts if r.failed is not None),
        tokenizer=_common_tokenizer(sampled),
    )


def _common_tokenizer(rollouts: Sequence[RowRollout]) -> str | None:
    named = [rollout for rollout in rollouts if rollout.tokenizer is not None]
    for rollout in named[1:]:
        if rollout.tokenizer != named[0].tokenizer:
            raise TrainingDataError(
                f"{named[0].name} was tokenized with {named[0].tokenizer!r}, {rollout.name} with "
                f"{rollout.tokenizer!r}: their token ids mean different things"
            )
    return named[0].tokenizer if named else None


def _check_prompts(key: Hashable, rollouts: Sequence[RowRollout]) -> None:
    """Refuse a group of several questions. One question may have several prompts: chat templates
    that say the date render another one the next day, and each trajectory has its own."""
    prompts = [r.trajectories[0].tokens[: r.trajectories[0].prompt_length] for r in rollouts]
    for prompt, rollout in zip(prompts[1:], rollouts[1:], strict=True):
        if not (np.array_equal(prompt, prompts[0]) or _same_question(rollouts[0], rollout)):
            raise TrainingDataError(
                f"two rows have the key {key!r} but different prompts ({len(prompts[0])} and "
                f"{len(prompt)} tokens), and they do not ask the same by the same chat template: "
                "row ids of Eval Protocol can collide; pass key= to tell them apart"
            )


def _same_question(one: RowRollout, other: RowRollout) -> bool:
    return (
        one.question is not None
        and other.question is not None
        and one.question.same(other.question)
    )
