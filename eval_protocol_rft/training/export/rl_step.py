"""The data set of a Fireworks reinforcement fine-tuning step: JSONL, one prompt group a line.

    {"samples": [{"messages": [...], "evals": {"score": 1.0}}, ...]}

`rewardWeights: ["score=1.0"]` of the step names the key of `evals`.

Invariant: every completion of a group is a sample of its line, with its own text and its own score,
or it is counted in `dropped`; a completion without a score is never a sample with score 0.

This format carries text, and the trainer tokenizes it anew: use it where token ids cannot travel.
An assistant message holds the completion's whole text, reasoning included, as it was sampled. An
episode of several turns has no such text and is refused.
"""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping
from typing import Any, Literal, NamedTuple

import msgspec

from eval_protocol_rft._durable import replacing
from eval_protocol_rft._segments import TokenBuffer
from eval_protocol_rft.training import _prompt_groups as reading
from eval_protocol_rft.training._prompt_groups import GroupKey, Row, field_of
from eval_protocol_rft.training._types import (
    BiasedSamplingWarning,
    EmptyBatchError,
    ExportError,
    PromptGroup,
    TrainingDataError,
    several_models,
)

Unscored = Literal["error", "drop"]


class RLStepData(NamedTuple):
    """What goes into the file, and what does not."""

    lines: list[dict[str, Any]]
    """One prompt group each, in order of appearance."""
    dropped: Mapping[str, int]
    """Reason (see `training.DROP_REASONS`) -> completions that are no sample."""


def to_lines(
    rows: Iterable[Row], *, unscored: Unscored = "error", key: GroupKey | None = None
) -> RLStepData:
    """Bring scored rows into the format. Holds the text of all rows, and no tokens.

    Args:
        rows: as for `group_rows`.
        unscored: what a completion without a valid score is: an error, or dropped and counted.
            Completions and rows that failed are always dropped and counted.
        key: names the group of a row; default experiment id, row id and model.

    Raises:
        TrainingDataError: a row is wrong, as for `group_rows`; an unscored completion, if asked
            for; rows of one group that differ in their prompt (with the default key).
        ExportError: an episode of several turns.
        EmptyBatchError: no completion is left.

    Warns:
        BiasedSamplingWarning: the samples are of several models.
    """
    data, problem = _read(rows, unscored, key)
    if problem:
        warnings.warn(problem, BiasedSamplingWarning, stacklevel=2)
    return data


def _read(
    rows: Iterable[Row], unscored: Unscored, key: GroupKey | None
) -> tuple[RLStepData, str | None]:
    """The lines, and why they are no samples of one policy, where they are not."""
    groups: dict[Hashable, list[dict[str, Any]]] = {}
    prompts: dict[Hashable, list[dict[str, Any]]] = {}
    dropped: Counter[str] = Counter()
    models: Counter[str] = Counter()
    for row in rows:
        rollout = reading.read_row(row, TokenBuffer(0))
        dropped.update(
            failed=len(rollout.failures),
            failed_row=len(rollout.failed_rows),
            unscored=sum(t.reward is None for t in rollout.trajectories),
        )
        if not rollout.trajectories:
            continue
        scored = (t for t in rollout.trajectories if t.reward is not None)
        models.update(t.model for t in scored if t.model)
        _check_turns(row, rollout)
        group_key = (key or reading.row_key)(row)
        prompt = _prompt(row, rollout)
        if prompts.setdefault(group_key, prompt) != prompt and key is None:
            raise TrainingDataError(
                f"{rollout.name}: its messages differ from those of another row with the key "
                f"{group_key!r}: pass key= to tell them apart"
            )
        groups.setdefault(group_key, []).extend(_samples(row, rollout, prompt, unscored))
    lines = [{"samples": samples} for samples in groups.values() if samples]
    if not lines:
        raise EmptyBatchError(+dropped)
    return RLStepData(lines, dict(+dropped)), several_models(models)


def write_jsonl(
    rows: Iterable[Row],
    path: str | os.PathLike[str],
    *,
    unscored: Unscored = "error",
    key: GroupKey | None = None,
) -> RLStepData:
    """Write `to_lines(rows)` as a JSONL file, in place of one that is there, and return it."""
    data, problem = _read(rows, unscored, key)
    if problem:
        warnings.warn(problem, BiasedSamplingWarning, stacklevel=2)
    with replacing(path) as unfinished:
        for line in data.lines:
            unfinished.write(msgspec.json.encode(line) + b"\n")
    return data


def _check_turns(row: Row, rollout: PromptGroup) -> None:
    episodes = field_of(field_of(row, "execution_metadata"), "extra").get("episodes") or ()
    for trajectory, episode in zip(rollout.trajectories, episodes, strict=False):
        if episode["turns"] > 1:
            raise ExportError(
                f"{rollout.name}, completion {trajectory.completion}: an episode of "
                f"{episode['turns']} turns, and a sample of the RL step is a prompt with one "
                "answer. Train on tokens instead (fireworks, tinker, cookbook)"
            )


def _samples(
    row: Row, rollout: PromptGroup, prompt: list[dict[str, Any]], unscored: Unscored
) -> list[dict[str, Any]]:
    texts = field_of(field_of(row, "execution_metadata"), "extra")["completions_text"]
    tools = field_of(row, "tools")
    samples: list[dict[str, Any]] = []
    for trajectory, text in zip(rollout.trajectories, texts, strict=True):
        if trajectory.reward is None:
            if unscored == "error":
                raise TrainingDataError(
                    f"{rollout.name}, completion {trajectory.completion}: it has no score. Score "
                    'it, or pass unscored="drop"'
                )
            continue
        sample: dict[str, Any] = {
            "messages": [*prompt, {"role": "assistant", "content": text}],
            "evals": {"score": float(trajectory.reward)},
        }
        if tools:
            sample["tools"] = reading.plain(tools)
        samples.append(sample)
    return samples


def _prompt(row: Row, rollout: PromptGroup) -> list[dict[str, Any]]:
    """The messages that were answered: those of the row without the answer at their end."""
    messages = field_of(row, "messages") or []
    if len(messages) < 2 or field_of(messages[-1], "role") != "assistant":
        raise TrainingDataError(
            f"{rollout.name}: its messages do not end in the rollout's answer after a prompt; "
            "leave row.messages as the rollout left them"
        )
    return [reading.plain_message(message) for message in messages[:-1]]
