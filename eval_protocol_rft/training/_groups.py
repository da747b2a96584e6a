"""Prompt groups from rows, however they came.

Invariant: n completions in one row, n rows of one completion from `num_runs`, and any mix of both
give the same group. Run and rollout ids play no part: their meaning differs between Eval
Protocol's schedulers. No row is left out. Each completion stands behind the prompt ids that it was
sampled behind, though rows of a group may have different ones.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence

import numpy as np

from eval_protocol_rft._segments import TokenBuffer
from eval_protocol_rft.training._errors import TrainingDataError
from eval_protocol_rft.training._rows import Row, read_row, row_key, same_question
from eval_protocol_rft.training._trajectory import PromptGroup

GroupKey = Callable[[Row], Hashable]


def group_rows(
    rows: Iterable[Row | PromptGroup], *, key: GroupKey | None = None
) -> list[PromptGroup]:
    """Read all rows and put together what belongs to one prompt, in order of appearance.

    Args:
        rows: evaluated rows, as objects or as dicts of Eval Protocol's JSONL; or parts of groups,
            as `RolloutDataset.prompt_groups` reads them, which have a key already.
        key: names the group of a row. Default: experiment id, row id and model. Rows with identical
            content have the same row id, and so share a group.

    Raises:
        TrainingDataError: a row without an id, record or rewards, or with invalid ones; rows of
            one group that differ in tokenizer, or in what they ask (with the default key).
    """
    groups: dict[Hashable, list[PromptGroup]] = {}
    for part in _parts(rows, key):
        groups.setdefault(part.key, []).append(part)
    return [_joined(parts, same_prompt=key is None) for parts in groups.values()]


def iter_groups(
    rows: Iterable[Row | PromptGroup],
    *,
    key: GroupKey | None = None,
    completions_per_group: int | None = None,
) -> Iterator[PromptGroup]:
    """As `group_rows`, lazily: holds the groups that are not complete yet, and nothing else.

    Args:
        rows: as for `group_rows`. Without `completions_per_group`, those of one group stand
            together.
        key: names the group of a row.
        completions_per_group: a group is complete when that many completions were asked for,
            failed ones included, the surplus of over-sampling not; its rows may then stand
            anywhere. Groups that are still incomplete at the end come last.

    Raises:
        TrainingDataError: as `group_rows`; or a row of a group that was complete already.
    """
    incomplete: dict[Hashable, list[PromptGroup]] = {}
    complete: set[int] = set()  # hashes: keys of a long run would not fit in memory either

    def close(group_key: Hashable) -> PromptGroup:
        complete.add(hash(group_key))
        return _joined(incomplete.pop(group_key), same_prompt=key is None)

    for part in _parts(rows, key):
        if hash(part.key) in complete:
            raise TrainingDataError(_came_late(part, completions_per_group))
        if completions_per_group is None:
            for other in [k for k in incomplete if k != part.key]:
                yield close(other)
        parts = incomplete.setdefault(part.key, [])
        parts.append(part)
        if completions_per_group and sum(p.asked for p in parts) >= completions_per_group:
            yield close(part.key)
    for group_key in list(incomplete):
        yield close(group_key)


def _parts(rows: Iterable[Row | PromptGroup], key: GroupKey | None) -> Iterator[PromptGroup]:
    buffer = TokenBuffer()
    for row in rows:
        if isinstance(row, PromptGroup):
            yield row
        else:
            yield read_row(row, buffer, key=(key or row_key)(row))


def _came_late(part: PromptGroup, completions_per_group: int | None) -> str:
    if completions_per_group is None:
        return (
            f"{part.name} belongs to a group whose rows ended before it: sort the rows by "
            "row id, or pass completions_per_group=, or use group_rows() if they fit in memory"
        )
    return (
        f"{part.name} belongs to a group that had its {completions_per_group} completions "
        "already: completions_per_group must be completions per row times runs"
    )


def _joined(parts: Sequence[PromptGroup], *, same_prompt: bool) -> PromptGroup:
    """One group of what each of its rows has of it."""
    if len(parts) == 1:
        return parts[0]
    sampled = [part for part in parts if part.trajectories]
    if same_prompt:
        _check_prompts(sampled)
    return PromptGroup(
        key=parts[0].key,
        trajectories=tuple(t for part in sampled for t in part.trajectories),
        failures=tuple(f for part in parts for f in part.failures),
        cancelled=sum(part.cancelled for part in parts),
        failed_rows=tuple(message for part in parts for message in part.failed_rows),
        tokenizer=_common_tokenizer(sampled),
        asked=sum(part.asked for part in parts),
        name=parts[0].name,
        question=parts[0].question,
    )


def _common_tokenizer(parts: Sequence[PromptGroup]) -> str | None:
    named = [part for part in parts if part.tokenizer is not None]
    for part in named[1:]:
        if part.tokenizer != named[0].tokenizer:
            raise TrainingDataError(
                f"{named[0].name} was tokenized with {named[0].tokenizer!r}, {part.name} with "
                f"{part.tokenizer!r}: their token ids mean different things"
            )
    return named[0].tokenizer if named else None


def _check_prompts(parts: Sequence[PromptGroup]) -> None:
    """Refuse a group of several questions. One question may have several prompts: chat templates
    that say the date render another one the next day, and each trajectory has its own."""
    prompts = [p.trajectories[0].tokens[: p.trajectories[0].prompt_length] for p in parts]
    for prompt, part in zip(prompts[1:], parts[1:], strict=True):
        if not (
            np.array_equal(prompt, prompts[0]) or same_question(parts[0].question, part.question)
        ):
            raise TrainingDataError(
                f"two rows have the key {part.key!r} but different prompts ({len(prompts[0])} and "
                f"{len(prompt)} tokens), and they do not ask the same by the same chat template: "
                "row ids of Eval Protocol can collide; pass key= to tell them apart"
            )
