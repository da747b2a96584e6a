"""verl's data set for reinforcement learning with the completions in it: one row per data row, or
one for each prompt where completions of a data row were sampled behind several.

`data_source`, `prompt` (messages), `ability`, `reward_model` and `extra_info` are what verl's
`RLHFDataset` and reward functions read, `responses` what its `main_generation` writes and its
`main_eval` scores (verl 0.7; docs/preparation/prepare_data.rst). verl passes over further columns.
Where the data set had one of these columns itself, it is passed on.

Invariant: lists of a row are of one length and order, one entry for each completion that did not
fail; an entry of `rewards` is null where the completion has no valid score. An episode of several
turns is refused, as there is a place for one answer.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa

from eval_protocol_rft.data._files import JobError
from eval_protocol_rft.data.conversion import _plain_file as plain_file
from eval_protocol_rft.data.conversion._plain_file import (
    as_prompt,
    check_one_turn,
    from_json_text,
    json_text,
    read_truth,
    stored_truth,
)
from eval_protocol_rft.data.conversion._types import Rollouts, Survey, Written, split_note
from eval_protocol_rft.data.rollouts._format import ORIGINAL_PREFIX, FileMetadata
from eval_protocol_rft.data.rollouts._records import as_messages
from eval_protocol_rft.data.rollouts._rows import UNSCORED, CompletionRow, Score, by_prompt

_IDS = pa.list_(pa.int32())
_LOGPROBS = pa.list_(pa.float32())
_LISTS: dict[str, tuple[str, pa.DataType]] = {
    "sample_idx": ("sample_idx", pa.int32()),
    "responses": ("response", pa.string()),
    "response_messages": ("message", pa.string()),
    "response_ids": ("completion_ids", _IDS),
    "response_logprobs": ("logprobs", _LOGPROBS),
    "response_raw_logprobs": ("raw_logprobs", _LOGPROBS),
    "finish_reasons": ("finish_reason", pa.string()),
    "past_ends": ("past_end", _IDS),
    "seeds": ("seed", pa.int64()),
    "policy_versions": ("policy_version", pa.string()),
    "first_policy_versions": ("first_policy_version", pa.string()),
}
"""Column -> column of the rollout file of which it holds a list per data row, and its type."""
_ONCE = ("row_id", "data_idx", "prompt", "tools", "ground_truth", "prompt_ids", "truncated")
_SAMPLED = ("temperature", "top_p", "top_k", "max_tokens")
_NEEDED = ("row_id", "data_idx", "prompt_ids", "response_ids", "response_logprobs")


def write(rollouts: Rollouts, target: Path, *, data_source: str | None) -> Written:
    """One row per data row, or per prompt of it, of which a completion did not fail."""
    survey = Survey.of(rollouts)
    metadata = rollouts.metadata
    rewards = {_rewards_column(name): name for name in ("reward", *metadata.rewards)}
    passed_on = _passed_on(rollouts.schema, survey.held)
    if "reward_model" in passed_on:
        metadata = msgspec.structs.replace(metadata, json_columns=[])
    lists = {name: kind for name, (column, kind) in _LISTS.items() if column in survey.held}
    lists |= {name: pa.float64() for name, column in rewards.items() if column in survey.held}
    truth = rollouts.schema.field("ground_truth").type
    types = {
        "data_source": pa.string(),
        "prompt": survey.messages,
        "ability": pa.string(),
        "reward_model": pa.struct([("style", pa.string()), ("ground_truth", truth)]),
        "extra_info": pa.struct([("index", pa.int64()), ("row_id", pa.string())]),
        "row_id": pa.string(),
        "data_idx": pa.int64(),
        "prompt_ids": _IDS,
        **({"tools": pa.string()} if "tools" in survey.held else {}),
        **{name: pa.list_(kind) for name, kind in lists.items()},
    }
    types |= {name: rollouts.schema.field(ORIGINAL_PREFIX + name).type for name in passed_on}
    name = data_source or (metadata.data.name if metadata.data else rollouts.path.stem)
    writer = _Writer(rollouts, name, passed_on, tuple(lists), rewards)
    lost = plain_file.write_rows(target, pa.schema(list(types.items())), metadata, writer.rows())
    carried = [*_ONCE, *_SAMPLED, *(column for column, _ in _LISTS.values()), *rewards.values()]
    carried += [ORIGINAL_PREFIX + name for name in passed_on]
    if metadata.sampling is None or target.suffix != ".parquet":
        carried = [name for name in carried if name not in _SAMPLED]
    notes = [*survey.notes(carried, metadata), *lost, *split_note(writer.split)]
    if writer.without:
        notes.append(f"data rows without a completion ({writer.without}) are not in the output")
    if "tools" in survey.held:
        notes.append("verl takes tools from its own configuration, not from the column tools")
    return writer.data_rows, writer.completions, tuple(notes)


def read(path: Path) -> Rollouts:
    """The completions of a file that `write` made.

    Raises:
        JobError: it has no token ids, or does not say how they were sampled.
    """
    file = plain_file.ConvertedFile.open(path, needed=_NEEDED)
    if file.metadata.sampling is None:
        raise JobError(
            f"{path}: its completions were sampled in different ways, which a file for verl does "
            "not hold: convert the file that it was made of"
        )
    kind = file.schema.field("reward_model").type
    place = kind.get_field_index("ground_truth") if pa.types.is_struct(kind) else -1
    return file.rollouts(
        functools.partial(_completions, file.metadata),
        ground_truth=None if place < 0 else kind.field(place).type,
    )


@dataclass(slots=True)
class _Writer:
    rollouts: Rollouts
    data_source: str
    passed_on: Sequence[str]
    lists: Sequence[str]
    rewards: dict[str, str]
    data_rows: int = 0
    completions: int = 0
    without: int = 0
    """Data rows of which nothing survived."""
    split: int = 0
    """Data rows that became several, one for each of their prompts."""

    def rows(self) -> Iterator[dict[str, Any]]:
        for group in self.rollouts.groups():
            survivors = [row for row in group if not row.failed]
            check_one_turn(survivors, self.rollouts.path, "verl")
            if not survivors:
                self.without += 1
                continue
            self.data_rows += 1
            self.completions += len(survivors)
            parts = by_prompt(survivors)
            self.split += len(parts) > 1
            yield from map(self._row, parts)

    def _row(self, survivors: Sequence[CompletionRow]) -> dict[str, Any]:
        first = survivors[0]
        truth = stored_truth(first.ground_truth, self.rollouts.metadata)
        return {
            "data_source": self.data_source,
            "prompt": as_messages(first.prompt),
            "reward_model": {"style": "rule", "ground_truth": truth},
            "extra_info": {"index": first.data_idx, "row_id": first.row_id},
            "row_id": first.row_id,
            "data_idx": first.data_idx,
            "prompt_ids": first.prompt_ids,
            "tools": json_text(first.tools),
            **{name: self._list(name, survivors) for name in self.lists},
            **{name: first.original[name] for name in self.passed_on},
        }

    def _list(self, name: str, survivors: Sequence[CompletionRow]) -> list[Any]:
        if name in self.rewards:
            column = self.rewards[name]
            return [row.scores.get(column, UNSCORED).reward for row in survivors]
        column = _LISTS[name][0]
        values = [getattr(row, column) for row in survivors]
        return list(map(json_text, values)) if column == "message" else values


def _completions(metadata: FileMetadata, row: dict[str, Any]) -> Iterator[CompletionRow]:
    truth = (row["reward_model"] or {}).get("ground_truth")
    once = {
        "row_id": row["row_id"],
        "data_idx": row["data_idx"],
        "prompt": as_prompt(row["prompt"], metadata.prompt_kind),
        "prompt_ids": np.array(row["prompt_ids"], np.int32),
        "tools": from_json_text(row.get("tools")),
        "ground_truth": read_truth(truth, metadata),
        **{name: getattr(metadata.sampling, name) for name in _SAMPLED},
    }
    for i in range(len(row["response_ids"])):
        lists = {
            column: _entry(row[name], i, kind)
            for name, (column, kind) in _LISTS.items()
            if name in row
        }
        scores = {
            name: Score(reward=row[_rewards_column(name)][i])
            for name in ("reward", *metadata.rewards)
            if _rewards_column(name) in row
        }
        message = from_json_text(lists.pop("message", None))
        yield CompletionRow(
            **once,
            **lists,
            message=message,
            truncated=lists["finish_reason"] == "length",
            scores={name: score for name, score in scores.items() if score != UNSCORED},
        )


def _entry(values: Sequence[Any], i: int, kind: pa.DataType) -> Any:
    if values[i] is None or not pa.types.is_list(kind):
        return values[i]
    return np.array(values[i], kind.value_type.to_pandas_dtype())


def _rewards_column(name: str) -> str:
    """`reward` -> `rewards`, `reward_b` -> `rewards_b`."""
    return name.replace("reward", "rewards", 1)


def _passed_on(schema: pa.Schema, held: set[str]) -> list[str]:
    """Which of verl's columns the data set had itself, in a form that verl takes."""

    def has(name: str, *, struct: bool) -> bool:
        column = ORIGINAL_PREFIX + name
        return column in held and pa.types.is_struct(schema.field(column).type) == struct

    names = [name for name in ("data_source", "ability") if has(name, struct=False)]
    names += [name for name in ("extra_info",) if has(name, struct=True)]
    if "ground_truth" not in held and has("reward_model", struct=True):
        names.append("reward_model")
    return names
