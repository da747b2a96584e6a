"""Examples for supervised fine-tuning, preferences and reward models out of scored rollouts, as
TRL's trainers read them (huggingface.co/docs/trl/dataset_formats): `sft`, `dpo`, `kto`, `reward`.

`prompt`, `completion`, `chosen` and `rejected` are lists of messages, `tools` is JSON text. Beside
them stand the tokens as they were sampled, under the names that TRL's trainers give to what they
tokenize: `input_ids` and `completion_mask` (SFTTrainer) and the whole sequences `chosen_ids` and
`rejected_ids` (RewardTrainer) are taken as they are; `prompt_ids` with `chosen_ids` and
`rejected_ids`, or with `completion_ids`, are what DPOTrainer and KTOTrainer make of the messages
(trl 1.0 to 1.16, `_prepare_dataset`), and docs/preferences.md says how these take them too.

Invariant: a completion without a reward is no example, and what is left out is counted under one
reason. Completions that were sampled behind different tokens are no pair.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import pyarrow as pa

from eval_protocol_rft.data import _format as file_format
from eval_protocol_rft.data import _plain_file as plain_file
from eval_protocol_rft.data._example_rules import (
    ExampleKind,
    ExampleRules,
    Rewards,
    best_of,
    labels_of,
    pairs_of,
)
from eval_protocol_rft.data._files import JobError
from eval_protocol_rft.data._format import CompletionRow, FormatError
from eval_protocol_rft.data._plain_file import Rollouts, Survey
from eval_protocol_rft.data._records import by_prompt
from eval_protocol_rft.record import UNSCORED


class Examples(NamedTuple):
    """What a writer put into the target."""

    data_rows: int
    completions: int
    """That are in an example."""
    notes: tuple[str, ...]
    examples: int


def write_examples(
    rollouts: Rollouts, target: Path, kind: ExampleKind, rules: ExampleRules
) -> Examples:
    """Write the examples of all data rows.

    Raises:
        JobError: there is not one; a completion is an episode of several turns and `kind` is not
            sft; the file has no such reward.
        FormatError: a reward is not finite.
    """
    made = _Maker(rollouts, kind, rules)
    schema = pa.schema(list(made.types.items()))
    lost = plain_file.write_rows(target, schema, rollouts.metadata, made.rows())
    return Examples(made.data_rows, made.completions, (*made.notes(), *lost), made.examples)


_IDS = pa.list_(pa.int32())
_MASK = pa.list_(pa.int8())
_ANSWER = pa.null()  # see `talk_types`
_COLUMNS: Mapping[ExampleKind, Mapping[str, pa.DataType]] = {
    "sft": {
        "completion": _ANSWER, "input_ids": _IDS, "completion_mask": _MASK,
        "sample_idx": pa.int32(), "reward": pa.float64(),
    },
    "kto": {
        "completion": _ANSWER, "label": pa.bool_(), "prompt_ids": _IDS, "completion_ids": _IDS,
        "sample_idx": pa.int32(), "reward": pa.float64(),
    },
    "dpo": {
        "chosen": _ANSWER, "rejected": _ANSWER, "prompt_ids": _IDS, "chosen_ids": _IDS,
        "rejected_ids": _IDS, "chosen_sample_idx": pa.int32(), "rejected_sample_idx": pa.int32(),
        "score_chosen": pa.float64(), "score_rejected": pa.float64(),
    },
    "reward": {
        "chosen": _ANSWER, "rejected": _ANSWER, "chosen_ids": _IDS, "rejected_ids": _IDS,
        "chosen_sample_idx": pa.int32(), "rejected_sample_idx": pa.int32(),
        "score_chosen": pa.float64(), "score_rejected": pa.float64(),
    },
}  # fmt: skip
"""No column is called `margin`: RewardTrainer would take it off the difference of its scores."""
_CARRIED = (
    "row_id", "data_idx", "sample_idx", "prompt", "tools", "response", "message", "prompt_ids",
    "completion_ids", "finish_reason", "truncated",
)  # fmt: skip
_WHY_NOT = {
    "unscored": "without a reward",
    "truncated": "cut off at max_tokens (keep_truncated takes them)",
    "text": "with the text of an earlier completion of their prompt",
    "tokens": "with the tokens of an earlier completion of their prompt",
    "between": "with a reward between the thresholds",
}
_NO_EXAMPLE: Mapping[ExampleKind, str] = {
    "sft": "no completion that is left reaches reward_min",
    "kto": "the rewards of all that is left lie between the thresholds",
    "dpo": "no two completions that are left differ enough in their reward",
    "reward": "no two completions that are left differ enough in their reward",
}
_TOKENS: Mapping[ExampleKind, str] = {
    "sft": "SFTTrainer trains on input_ids, the tokens as they were sampled, up to its max_length "
    "(1,024 unless it is told otherwise)",
    "kto": "KTOTrainer tokenizes the messages again; the tokens as they were sampled are prompt_ids"
    " and completion_ids",
    "dpo": "DPOTrainer tokenizes the messages again; the tokens as they were sampled are "
    "prompt_ids, chosen_ids and rejected_ids",
    "reward": "RewardTrainer trains on chosen_ids and rejected_ids, the tokens as they were "
    "sampled, and leaves out pairs longer than its max_length (1,024 unless it is told otherwise)",
}


class _Maker:
    """Examples of one data row after the other, and what became of the completions."""

    def __init__(self, rollouts: Rollouts, kind: ExampleKind, rules: ExampleRules) -> None:
        self._rollouts, self._kind, self._rules = rollouts, kind, rules
        self._column = file_format.reward_column(rules.reward)
        if self._column not in rollouts.schema.names:
            raise JobError(f"{rollouts.path}: no reward {rules.reward!r}")
        self._survey = survey = Survey.of(rollouts)
        sampling = rollouts.metadata.sampling
        self._template_kwargs = None if sampling is None else sampling.chat_template_kwargs or None
        episodes = "turns" in survey.held
        asked, answered = plain_file.talk_types(survey, rollouts.metadata)
        answers = dict.fromkeys(("completion", "chosen", "rejected"), answered)
        self.types: dict[str, pa.DataType] = {
            "prompt": file_format.MESSAGES if episodes else asked,
            **{name: answers.get(name, type_) for name, type_ in _COLUMNS[kind].items()},
            **({"tools": pa.string()} if "tools" in survey.held else {}),
            **self._kwargs_type(),
            "row_id": pa.string(),
            "data_idx": pa.int64(),
        }
        if episodes and kind == "sft":
            self.types["completion"] = file_format.MESSAGES
        self.examples = 0
        self.data_rows = 0
        self.completions = 0
        self._truncated = 0
        self._left_out: Counter[str] = Counter()
        self._empty = 0
        self._labels = 0
        self._lowest = math.inf

    def _kwargs_type(self) -> dict[str, pa.DataType]:
        """TRL renders a row with the arguments in this column."""
        if self._template_kwargs is None:
            return {}
        try:
            return {"chat_template_kwargs": pa.array([self._template_kwargs]).type}
        except pa.ArrowException as error:
            raise JobError(
                f"{self._rollouts.path}: its chat_template_kwargs cannot be a column: {error}"
            ) from error

    def rows(self) -> Iterator[dict[str, Any]]:
        for group in self._rollouts.groups():
            usable = self._usable(group)
            used: set[int] = set()
            for row in self._examples(usable) if usable else ():
                self.examples += 1
                used.update(row[name] for name in row if name.endswith("sample_idx"))
                self._lowest = min(
                    self._lowest, row["reward" if "reward" in row else "score_chosen"]
                )
                yield row
            if used:
                self.data_rows += 1
                self.completions += len(used)
                self._truncated += sum(
                    bool(row.truncated) for row in usable if row.sample_idx in used
                )
            elif usable:
                self._empty += 1
        if not self.examples:
            raise JobError(
                f"{self._rollouts.path}: it has not one example for {self._kind}, so nothing was "
                f"written. {'; '.join(self._losses()) or 'It has no completion'}"
            )

    def notes(self) -> list[str]:
        """What was left out, and what a trainer does with the rest."""
        metadata = self._rollouts.metadata
        carried = (*_CARRIED, self._column, *file_format.EPISODE_COLUMNS)
        notes = [*self._losses(), *self._survey.notes(carried, metadata)]
        if self._kind == "kto":
            notes.append(f"{self._labels} desirable, {self.examples - self._labels} undesirable")
        else:
            what = "reward of an example" if self._kind == "sft" else "reward of a chosen one"
            notes.append(f"lowest {what}: {self._lowest:g}")
        if self._truncated:
            as_text = self._kind in ("dpo", "kto")
            end = (
                "trained on as text, they end as if the model had ended them"
                if as_text
                else ("they have no end-of-turn token")
            )
            notes.append(f"truncated completions ({self._truncated}) are among them: {end}")
        return [*notes, _TOKENS[self._kind]]

    def _losses(self) -> list[str]:
        notes = [
            f"completions {_WHY_NOT[why]} ({count}) are in no example"
            for why, count in self._left_out.items()
        ]
        if self._empty:
            notes.append(f"data rows ({self._empty}) give none: {_NO_EXAMPLE[self._kind]}")
        return notes

    def _usable(self, group: Sequence[CompletionRow]) -> list[CompletionRow]:
        """Those of a data row that may be in an example; each other one is counted once."""
        usable: list[CompletionRow] = []
        seen: set[bytes | str | None] = set()
        for row in group:
            if row.failed:  # the survey counts it
                continue
            why = None
            if self._reward(row) is None:
                why = "unscored"
            elif row.truncated and not self._rules.keep_truncated:
                why = "truncated"
            elif self._rules.dedupe != "none":
                key = _text_key(row) if self._rules.dedupe == "text" else _tokens_key(row)
                why = self._rules.dedupe if key in seen else None
                seen.add(key)
            if why is None:
                usable.append(row)
            else:
                self._left_out[why] += 1
        return usable

    def _reward(self, row: CompletionRow) -> float | None:
        reward = row.scores.get(self._column, UNSCORED).reward
        if reward is not None and not math.isfinite(reward):
            raise FormatError(
                f"{self._rollouts.path}: {_place(row)}: {self._column} {reward} is no finite "
                "number. Score the file again with `ep-rft score`"
            )
        return reward

    def _examples(self, usable: Sequence[CompletionRow]) -> Iterator[dict[str, Any]]:
        if self._kind == "sft":
            for i in best_of(self._rewards(usable), self._rules):
                yield from self._demonstrations(usable[i])
        elif self._kind == "kto":
            labels = labels_of(self._rewards(usable), self._rules)
            self._labels += sum(label for _, label in labels)
            if len(labels) < len(usable):
                self._left_out["between"] += len(usable) - len(labels)
            for i, label in labels:
                yield self._judged(usable[i], label)
        else:
            for part in by_prompt(usable):
                for i, j in pairs_of(self._rewards(part), self._rules, part[0].data_idx):
                    yield self._pair(part[i], part[j])

    def _rewards(self, rows: Sequence[CompletionRow]) -> Rewards:
        return np.array([self._reward(row) for row in rows], np.float64)

    def _said(self, row: CompletionRow) -> Any:
        return plain_file.talk(row, self._rollouts.metadata)[1]

    def _head(self, row: CompletionRow) -> dict[str, Any]:
        return {
            "prompt": plain_file.talk(row, self._rollouts.metadata)[0],
            "tools": None if row.tools is None else msgspec.json.encode(row.tools).decode(),
            "chat_template_kwargs": self._template_kwargs,
            "row_id": row.row_id,
            "data_idx": row.data_idx,
        }

    def _demonstrations(self, row: CompletionRow) -> Iterator[dict[str, Any]]:
        """Of an episode, an example for each of its segments."""
        head = {**self._head(row), "sample_idx": row.sample_idx, "reward": self._reward(row)}
        if row.segments is None:
            prompt, answer = row.prompt_ids, row.completion_ids
            assert prompt is not None  # noqa: S101 - `with_token_data` has seen to it
            assert answer is not None  # noqa: S101
            mask = np.repeat(np.array([0, 1], np.int8), [len(prompt), len(answer)])
            ids = np.concatenate([prompt, answer])
            yield {**head, "completion": self._said(row), "input_ids": ids, "completion_mask": mask}
            return
        assert row.episode is not None  # noqa: S101
        messages, own = row.episode["messages"], row.episode["row_messages"]
        talk = {"prompt": messages[:own], "completion": messages[own:]}
        for segment in row.segments:
            ids, mask = segment["tokens"], segment["loss_mask"]
            yield {**head, **talk, "input_ids": ids, "completion_mask": mask}

    def _judged(self, row: CompletionRow, label: bool) -> dict[str, Any]:
        self._check_single(row)
        return {
            **self._head(row),
            "completion": self._said(row),
            "label": label,
            "prompt_ids": row.prompt_ids,
            "completion_ids": row.completion_ids,
            "sample_idx": row.sample_idx,
            "reward": self._reward(row),
        }

    def _pair(self, chosen: CompletionRow, rejected: CompletionRow) -> dict[str, Any]:
        values = {**self._head(chosen), "prompt_ids": chosen.prompt_ids}
        for name, row in (("chosen", chosen), ("rejected", rejected)):
            self._check_single(row)
            prompt, ids = row.prompt_ids, row.completion_ids
            assert prompt is not None  # noqa: S101 - `with_token_data` has seen to it
            assert ids is not None  # noqa: S101
            values |= {
                name: self._said(row),
                f"{name}_ids": np.concatenate([prompt, ids]) if self._kind == "reward" else ids,
                f"{name}_sample_idx": row.sample_idx,
                f"score_{name}": self._reward(row),
            }
        return {name: values[name] for name in self.types if name in values}

    def _check_single(self, row: CompletionRow) -> None:
        if row.episode is not None and row.episode["turns"] > 1:
            raise JobError(
                f"{self._rollouts.path}: {_place(row)}: an episode of {row.episode['turns']} turns,"
                f" and an example for {self._kind} has one answer, all of which is trained on. "
                "Train on `ep-rft datums` of the file, or convert --to sft, which masks what the "
                "model did not say"
            )


def _place(row: CompletionRow) -> str:
    return f"data row {row.data_idx}, completion {row.sample_idx}"


def _text_key(row: CompletionRow) -> bytes | str | None:
    """Equal where two completions say the same."""
    return row.response if row.episode is None else msgspec.json.encode(row.episode["messages"])


def _tokens_key(row: CompletionRow) -> bytes:
    """Equal where two completions have the same tokens, in all their turns."""
    arrays = [row.completion_ids, *(segment["tokens"] for segment in row.segments or ())]
    sizes = [len(array) for array in arrays if array is not None]
    tokens = (array.tobytes() for array in arrays if array is not None)
    return b"".join(itertools.chain([repr(sizes).encode()], tokens))
