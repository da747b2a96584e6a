"""The rows of an evaluation test, and which of them a prompt is of.

Invariant: no held-out row is ever trained on.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from eval_protocol.common_utils import load_jsonl
from eval_protocol.models import EPParameters, EvaluationRow, Message
from pydantic import ValidationError

from eval_protocol_rft import data as room
from eval_protocol_rft.episodes import EpisodeRolloutProcessor
from eval_protocol_rft.loop._rollouts import give_id
from eval_protocol_rft.loop._run_options import SetupError
from eval_protocol_rft.rollout import PROMPT_IDS_KEY, messages_to_answer
from eval_protocol_rft.scoring import adapt, adapter_of, parameters_of


def load_rows(
    evaluator: Callable[..., Any], data: Sequence[room.PathOrGlob] | room.Source | None = None
) -> list[EvaluationRow]:
    """The rows that `@evaluation_test` would run: its data set, adapter and preprocessing.

    Args:
        evaluator: the function under `@evaluation_test`.
        data: files, folders, patterns or URLs in place of the test's own data, as `open_source`
            takes them, or what it gave. Rows are those of the same data in JSONL; messages that
            are JSON text, as in CSV, are read by the default adapter.

    Raises:
        SetupError: there are no rows, the adapter takes them not, or the test has several data sets
            and none was chosen.
        SourceError: `data` cannot be read.
    """
    test = parameters_of(evaluator)
    if test is None and data is None:
        raise SetupError(
            "the evaluator is no @evaluation_test, so it brings no data set: pass one with --data"
        )
    test = test or EPParameters()
    source = data if data is None or isinstance(data, room.Source) else room.open_source(data)
    rows = _own_rows(test) if source is None else _rows_of(source, test)
    if test.filtered_row_ids is not None and data is None:
        rows = [row for row in rows if row.input_metadata.row_id in test.filtered_row_ids]
    if test.preprocess_fn is not None and (data is not None or not test.data_loaders):
        rows = test.preprocess_fn(rows)
    if not rows:
        raise SetupError(f"no rows in {source.name if source else 'the test`s data set'}")
    for row in rows:
        give_id(row)
    return rows


def _rows_of(source: room.Source, test: EPParameters) -> list[EvaluationRow]:
    """The rows that the test's adapter makes of a data set's."""
    records = list(source.records())
    if adapter_of(test) is not None:
        try:
            return adapt(test, [record.values for record in records])
        except Exception as error:
            raise SetupError(
                f"{source.name}: the test's dataset_adapter raised {type(error).__name__}: "
                f"{error}. The data has {_listed(source)}"
            ) from error
    rows = [_evaluation_row(record) for record in records]
    prompted = any(row.messages or PROMPT_IDS_KEY in (row.model_extra or {}) for row in rows)
    if not prompted and not isinstance(test.rollout_processor, EpisodeRolloutProcessor):
        raise SetupError(
            f"{source.name}: no row has messages. It has {_listed(source)}: give the test a "
            "dataset_adapter that makes messages of them"
        )
    return rows


def _listed(source: room.Source) -> str:
    return f"the columns {', '.join(column.name for column in source.columns)}"


def _evaluation_row(record: room.SourceRow) -> EvaluationRow:
    values = record.values
    messages = values.get("messages")
    if isinstance(messages, str):
        values = {**values, "messages": room.messages_in(messages) or messages}
    try:
        return EvaluationRow(**values)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise SetupError(
            f"{record.where}: no row of an evaluation test: {place}: {first['msg']}, not "
            f"{room.type_name(first['input'])}. Rows of other data are made by a dataset_adapter "
            "of the test"
        ) from error


def _own_rows(test: EPParameters) -> list[EvaluationRow]:
    most = test.max_dataset_rows
    if test.input_dataset:
        lines: list[dict[str, Any]] = []
        for path in _one(test.input_dataset, "input_dataset", test.combine_datasets):
            try:
                read = load_jsonl(path)
            except (OSError, ValueError) as error:
                raise SetupError(f"{path}: {error}") from error
            if not read:
                raise SetupError(f"{path} has no lines")
            lines += read
        return adapt(test, lines[:most])
    if test.data_loaders:
        loaders = test.data_loaders
        loaders = loaders if isinstance(loaders, Sequence) else [loaders]
        loaded = [row for loader in loaders for result in loader.load() for row in result.rows]
        return loaded[:most]
    if test.input_rows:
        chosen = _one(test.input_rows, "input_rows", combine=False)
        return [row.model_copy(deep=True) for row in chosen]
    chosen = _one(test.input_messages or [], "input_messages", combine=False)
    if chosen and isinstance(chosen[0], Message | dict):
        chosen = [chosen]
    return [EvaluationRow(messages=messages) for messages in chosen]


def _one(sets: Sequence[Any], name: str, combine: bool) -> Sequence[Any]:
    """The one data set; `input_dataset` is a list of files that may be read as one."""
    if combine and all(isinstance(item, str) for item in sets):
        return sets
    if len(sets) > 1:
        raise SetupError(f"the evaluation test has {len(sets)} sets of {name}: choose with --data")
    if not sets:
        raise SetupError("the evaluation test has no data set: pass one with --data")
    return [sets[0]] if isinstance(sets[0], str) else sets[0]


def split_rows(
    rows: Sequence[EvaluationRow], held_out: float, seed: int
) -> tuple[list[EvaluationRow], list[EvaluationRow]]:
    """Rows to train on and rows held out, each in the order given.

    Args:
        rows: all rows.
        held_out: a share below 1, or a number of rows from 1 on.
        seed: of the choice.

    Raises:
        SetupError: nothing would be left to train on.
    """
    count = round(held_out * len(rows)) if held_out < 1 else int(held_out)
    if held_out < 0 or count >= len(rows):
        raise SetupError(
            f"{held_out:g} of {len(rows)} rows cannot be held out: some must be left to train on"
        )
    chosen = set(random.Random(f"held out {seed}").sample(range(len(rows)), count))  # noqa: S311
    train = [row for i, row in enumerate(rows) if i not in chosen]
    return train, [rows[i] for i in sorted(chosen)]


def prompt_of(row: EvaluationRow, *, drop_trailing_assistant: bool) -> list[dict[str, Any]]:
    """The messages that a row's completions answer, as a data set of prompts holds them."""
    messages = messages_to_answer(row, drop_trailing_assistant=drop_trailing_assistant)
    return [message.model_dump(mode="json", exclude_none=True) for message in messages]


def prompt_key(prompt: Any) -> str:
    """A prompt as one text. Data sets put nulls where other rows' messages have keys."""
    return json.dumps(_without_nulls(prompt), sort_keys=True, ensure_ascii=False, default=str)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_without_nulls(item) for item in value]
    return value


def rows_by_prompt(
    rows: Sequence[EvaluationRow], prompts: Sequence[list[dict[str, Any]]]
) -> dict[str, EvaluationRow]:
    """Rows by the keys of their prompts.

    Raises:
        SetupError: one prompt stands for two rows that differ otherwise; or there are none.
    """
    by_prompt: dict[str, EvaluationRow] = {}
    for row, prompt in zip(rows, prompts, strict=True):
        first = by_prompt.setdefault(prompt_key(prompt), row)
        if first is not row and _beside_prompt(first) != _beside_prompt(row):
            raise SetupError(
                f"rows {first.input_metadata.row_id} and {row.input_metadata.row_id} have the same "
                "prompt and differ otherwise (ground_truth, tools or columns), and TRL passes on "
                "prompts alone: leave one of them out, or make the prompts differ"
            )
    if not by_prompt:
        raise SetupError("no rows to train on")
    return by_prompt


def _beside_prompt(row: EvaluationRow) -> Any:
    return _without_nulls(
        [row.ground_truth, row.tools, row.input_metadata.dataset_info, row.evaluation_result]
    )
