"""Data sets of trainers with the completions in them: verl's and TRL's. What reads them passes over
columns that it does not know, so what a rollout file holds besides stands beside what they need.

verl's for reinforcement learning has one row per data row, or one for each prompt where completions
of a data row were sampled behind several. `data_source`, `prompt` (messages), `ability`,
`reward_model` and `extra_info` are what verl's `RLHFDataset` and reward functions read, `responses`
what its `main_generation` writes and its `main_eval` scores (verl 0.7;
docs/preparation/prepare_data.rst). Where the data set had one of these columns itself, it is passed
on.

TRL's conversational prompt-completion data set has one row per completion. `prompt` and
`completion` are lists of messages (of raw text, text), `tools` is JSON text, as TRL's trainers read
them (huggingface.co/docs/trl/dataset_formats); `prompt_ids`, `completion_ids` and `logprobs` have
the names of what a `rollout_func` returns. The data set's columns stand beside them under their own
names, as its trainers pass them on to reward functions.

Invariant: the text is as sampled; ids and logprobs beside it are exact. Where it was read as more
than text (calls, thinking), `message` says as what. Lists of verl's rows are of one length and
order, one entry for each completion that did not fail; an entry of `rewards` is null where the
completion has no valid score. An episode of several turns is refused, as there is a place for one
answer.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa

from eval_protocol_rft.data import _format as file_format
from eval_protocol_rft.data import _plain_file as plain_file
from eval_protocol_rft.data._files import JobError
from eval_protocol_rft.data._format import ChatMessages, CompletionRow, FileMetadata, PromptKind
from eval_protocol_rft.data._plain_file import Rollouts, Survey, Written
from eval_protocol_rft.data._records import as_messages, by_prompt
from eval_protocol_rft.record import UNSCORED, Score

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
_NEEDED_OF_VERL = ("row_id", "data_idx", "prompt_ids", "response_ids", "response_logprobs")


def write_verl(rollouts: Rollouts, target: Path, *, data_source: str | None) -> Written:
    """One row per data row, or per prompt of it, of which a completion did not fail."""
    survey = Survey.of(rollouts)
    metadata = rollouts.metadata
    rewards = {_rewards_column(name): name for name in ("reward", *metadata.rewards)}
    passed_on = _passed_on(rollouts.schema, survey.held)
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
    types |= {
        name: rollouts.schema.field(file_format.ORIGINAL_PREFIX + name).type for name in passed_on
    }
    name = data_source or (metadata.data.name if metadata.data else rollouts.path.stem)
    data_rows = completions = without = split = 0

    def rows() -> Iterator[dict[str, Any]]:
        nonlocal data_rows, completions, without, split
        for survivors in _survivors(rollouts, "verl"):
            without += not survivors
            data_rows += bool(survivors)
            completions += len(survivors)
            parts = by_prompt(survivors) if survivors else []
            split += len(parts) > 1
            for part in parts:
                yield {
                    "data_source": name,
                    **_verl_row(part[0], metadata),
                    **{each: _verl_list(each, part, rewards) for each in lists},
                    **{each: part[0].original[each] for each in passed_on},
                }

    written = metadata
    if "reward_model" in passed_on:
        written = msgspec.structs.replace(metadata, json_columns=[])
    lost = plain_file.write_rows(target, pa.schema(list(types.items())), written, rows())
    carried = [*_ONCE, *_SAMPLED, *(column for column, _ in _LISTS.values()), *rewards.values()]
    carried += [file_format.ORIGINAL_PREFIX + name for name in passed_on]
    if metadata.sampling is None or target.suffix != ".parquet":
        carried = [name for name in carried if name not in _SAMPLED]
    notes = [*survey.notes(carried, written), *lost, *plain_file.split_note(split)]
    if without:
        notes.append(f"data rows without a completion ({without}) are not in the output")
    if "tools" in survey.held:
        notes.append("verl takes tools from its own configuration, not from the column tools")
    return data_rows, completions, tuple(notes)


def read_verl(path: Path) -> Rollouts:
    """The completions of a file that `write_verl` made.

    Raises:
        JobError: it has no token ids, or does not say how they were sampled.
    """
    schema, metadata = plain_file.open_converted(path, needed=_NEEDED_OF_VERL)
    if metadata.sampling is None:
        raise JobError(
            f"{path}: its completions were sampled in different ways, which a file for verl does "
            "not hold: convert the file that it was made of"
        )
    kind = schema.field("reward_model").type
    place = kind.get_field_index("ground_truth") if pa.types.is_struct(kind) else -1
    truth = None if place < 0 else kind.field(place).type
    completions = functools.partial(_verl_completions, metadata)
    return plain_file.rollouts_in(path, metadata, completions, ground_truth=truth)


def _survivors(rollouts: Rollouts, trainer: str) -> Iterator[list[CompletionRow]]:
    """Of each data row, the completions that did not fail.

    Raises:
        JobError: one is the first of several turns: a trainer's row has a place for one prompt and
            one answer, and the reward is that of all turns.
    """
    for group in rollouts.groups():
        survivors = [row for row in group if not row.failed]
        for row in survivors:
            if row.episode is not None and row.episode["turns"] > 1:
                raise JobError(
                    f"{rollouts.path}: data row {row.data_idx}, completion {row.sample_idx}: an "
                    f"episode of {row.episode['turns']} turns, and a row for {trainer} is a prompt "
                    "with one answer; the reward is that of all turns. Train on `ep-rft datums` of "
                    "the file, which hold every turn, or convert to Eval Protocol's rows (--to ep)"
                )
        yield survivors


def _verl_row(first: CompletionRow, metadata: FileMetadata) -> dict[str, Any]:
    """What completions behind one prompt have in common."""
    truth = _stored(first.ground_truth, "ground_truth", metadata)
    return {
        "prompt": as_messages(first.prompt),
        "reward_model": {"style": "rule", "ground_truth": truth},
        "extra_info": {"index": first.data_idx, "row_id": first.row_id},
        "row_id": first.row_id,
        "data_idx": first.data_idx,
        "prompt_ids": first.prompt_ids,
        "tools": _json_text(first.tools),
    }


def _verl_list(
    name: str, survivors: Sequence[CompletionRow], rewards: Mapping[str, str]
) -> list[Any]:
    if name in rewards:
        return [row.scores.get(rewards[name], UNSCORED).reward for row in survivors]
    column = _LISTS[name][0]
    values = [getattr(row, column) for row in survivors]
    return list(map(_json_text, values)) if column == "message" else values


def _verl_completions(metadata: FileMetadata, row: dict[str, Any]) -> Iterator[CompletionRow]:
    truth = (row["reward_model"] or {}).get("ground_truth")
    once = {
        "row_id": row["row_id"],
        "data_idx": row["data_idx"],
        "prompt": _as_prompt(row["prompt"], metadata.prompt_kind),
        "prompt_ids": np.array(row["prompt_ids"], np.int32),
        "tools": _from_json_text(row.get("tools")),
        "ground_truth": _read(truth, "ground_truth", metadata),
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
        message = _from_json_text(lists.pop("message", None))
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
        column = file_format.ORIGINAL_PREFIX + name
        return column in held and pa.types.is_struct(schema.field(column).type) == struct

    names = [name for name in ("data_source", "ability") if has(name, struct=False)]
    names += [name for name in ("extra_info",) if has(name, struct=True)]
    if "ground_truth" not in held and has("reward_model", struct=True):
        names.append("reward_model")
    return names


_KEPT = (
    "row_id", "data_idx", "sample_idx", "prompt_ids", "completion_ids", "logprobs",
    "raw_logprobs", "finish_reason", "truncated", "temperature", "top_p", "top_k", "max_tokens",
    "seed", "policy_version", "first_policy_version", "past_end",
)  # fmt: skip
"""Columns that are the same there."""
_NEEDED_OF_TRL = ("prompt_ids", "completion_ids", "logprobs", "prompt", "completion", *_KEPT[:3])
_ARRAYS = dict.fromkeys(("prompt_ids", "completion_ids", "past_end"), np.int32) | dict.fromkeys(
    ("logprobs", "raw_logprobs"), np.float32
)


def write_trl(rollouts: Rollouts, target: Path) -> Written:
    """One row per completion that did not fail."""
    survey = Survey.of(rollouts)
    metadata = rollouts.metadata
    rewards = dict.fromkeys(("reward", *metadata.rewards))
    carried = [*_KEPT, "prompt", "response", "message", "tools", "ground_truth", *rewards]
    asked, answered = plain_file.talk_types(survey, metadata)
    fields = [pa.field("prompt", asked), pa.field("completion", answered)]
    own = [name for name in carried if name not in ("prompt", "response")]
    fields += [rollouts.schema.field(name) for name in own if name in survey.held]
    columns = _data_columns(rollouts, survey.held, {*carried, "completion"})
    for name, column in columns.items():
        kind = rollouts.schema.field(file_format.ORIGINAL_PREFIX + column).type
        fields.append(plain_file.data_field(name, kind, column))
    data_rows = completions = 0

    def rows() -> Iterator[dict[str, Any]]:
        nonlocal data_rows, completions
        for survivors in _survivors(rollouts, "TRL"):
            data_rows += bool(survivors)
            completions += len(survivors)
            yield from (_trl_row(row, columns, metadata) for row in survivors)

    lost = plain_file.write_rows(target, pa.schema(fields), metadata, rows())
    carried += [file_format.ORIGINAL_PREFIX + column for column in columns.values()]
    carried += _stands_there_anyway(metadata)
    notes = [*survey.notes(carried, metadata), *lost]
    notes += [f"column {column} is {name}" for name, column in columns.items() if name != column]
    texts = {file_format.ORIGINAL_PREFIX + column: column for column in columns.values()}
    if as_text := [texts[name] for name in metadata.json_columns if name in texts]:
        notes.append(f"columns of JSON text: {', '.join(as_text)}")
    return data_rows, completions, tuple(notes)


def _stands_there_anyway(metadata: FileMetadata) -> list[str]:
    """The data set's columns that are the prompt, the tools and the ground truth by name."""
    data = metadata.data
    if data is None:
        return []
    places = {"prompt": data.prompt_key, "tools": data.tools_key}
    places["ground_truth"] = data.ground_truth_key
    return [file_format.ORIGINAL_PREFIX + name for name, key in places.items() if name == key]


def _data_columns(rollouts: Rollouts, held: set[str], taken: set[str]) -> dict[str, str]:
    """Column of the output -> column of the data set; with a prefix where its name is taken."""
    columns: dict[str, str] = {}
    anyway = _stands_there_anyway(rollouts.metadata)
    for column in rollouts.schema.names:
        if column.startswith(file_format.ORIGINAL_PREFIX) and column in held - set(anyway):
            name = own = column.removeprefix(file_format.ORIGINAL_PREFIX)
            while name in taken or name in columns:
                name = file_format.ORIGINAL_PREFIX + name
            columns[name] = own
    return columns


def read_trl(path: Path) -> Rollouts:
    """The completions of a file that `write_trl` made.

    Raises:
        JobError: it has no token ids, or does not say how they were sampled.
    """
    schema, metadata = plain_file.open_converted(path, needed=_NEEDED_OF_TRL)
    truth = schema.field("ground_truth").type if "ground_truth" in schema.names else None
    columns = plain_file.data_columns(schema)
    return plain_file.rollouts_in(
        path,
        metadata,
        lambda row: [_trl_completion(row, columns, metadata)],
        ground_truth=truth,
        original={column: schema.field(name).type for name, column in columns.items()},
    )


def _trl_row(
    row: CompletionRow, columns: Mapping[str, str], metadata: FileMetadata
) -> dict[str, Any]:
    prompt, answer = plain_file.talk(row, metadata)
    return {
        "prompt": prompt,
        "completion": answer,
        **{name: getattr(row, name) for name in _KEPT},
        "tools": _json_text(row.tools),
        "message": _json_text(row.message),
        "ground_truth": _stored(row.ground_truth, "ground_truth", metadata),
        **{name: score.reward for name, score in row.scores.items()},
        **{
            name: _stored(row.original.get(column), file_format.ORIGINAL_PREFIX + column, metadata)
            for name, column in columns.items()
        },
    }


def _trl_completion(
    row: dict[str, Any], columns: Mapping[str, str], metadata: FileMetadata
) -> CompletionRow:
    values: dict[str, Any] = {name: row.get(name) for name in _KEPT}
    for name, dtype in _ARRAYS.items():
        values[name] = None if values[name] is None else np.array(values[name], dtype)
    scores = {name: Score(reward=row.get(name)) for name in ("reward", *metadata.rewards)}
    answer = row["completion"]
    return CompletionRow(
        **values,
        prompt=_as_prompt(row["prompt"], metadata.prompt_kind),
        response=answer if isinstance(answer, str) else answer[0]["content"],
        message=_from_json_text(row.get("message")),
        tools=_from_json_text(row.get("tools")),
        ground_truth=_read(row.get("ground_truth"), "ground_truth", metadata),
        scores={name: score for name, score in scores.items() if score != UNSCORED},
        original={
            column: _read(row[name], file_format.ORIGINAL_PREFIX + column, metadata)
            for name, column in columns.items()
        },
    )


def _as_prompt(messages: str | Sequence[Mapping[str, Any]], kind: PromptKind) -> str | ChatMessages:
    """`as_messages` undone, nulls of the file left out."""
    if isinstance(messages, str):
        return messages if kind == "text" else [{"role": "user", "content": messages}]
    if kind == "text":
        return str(messages[0]["content"])
    return [{k: v for k, v in message.items() if v is not None} for message in messages]


def _json_text(value: Any) -> str | None:
    """JSON of a value; null stays null."""
    return None if value is None else msgspec.json.encode(value).decode()


def _from_json_text(text: str | None) -> Any:
    """`_json_text` undone."""
    return None if text is None else msgspec.json.decode(text)


def _stored(value: Any, column: str, metadata: FileMetadata) -> Any:
    """A value of the ground truth or of the data set as the column of the rollout file holds it."""
    return _json_text(value) if column in metadata.json_columns else value


def _read(value: Any, column: str, metadata: FileMetadata) -> Any:
    """`_stored` undone."""
    return _from_json_text(value) if column in metadata.json_columns else value
