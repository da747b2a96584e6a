"""Values of rollout files in the form that trainers' data sets have them, and back. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from eval_protocol_rft.batch.conversion.types import ConvertError
from eval_protocol_rft.batch.evaluation_rows.rest import extra_of
from eval_protocol_rft.batch.evaluation_rows.to_row import stored_row
from eval_protocol_rft.batch.rollouts.format import FileMetadata, PromptKind
from eval_protocol_rft.batch.rollouts.rows import ChatMessages, CompletionRow


def as_messages(prompt: str | ChatMessages) -> ChatMessages:
    """A text is what the user says."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def as_prompt(messages: Sequence[Mapping[str, Any]], kind: PromptKind) -> str | ChatMessages:
    """`as_messages` undone, nulls of the file left out."""
    if kind == "text":
        return str(messages[0]["content"])
    return [{k: v for k, v in message.items() if v is not None} for message in messages]


def json_text(value: Any) -> str | None:
    """JSON of a value; null stays null."""
    return None if value is None else msgspec.json.encode(value).decode()


def from_json_text(text: str | None) -> Any:
    """`json_text` undone."""
    return None if text is None else msgspec.json.decode(text)


def stored_truth(value: Any, metadata: FileMetadata) -> Any:
    """A ground truth as the file's column holds it."""
    return json_text(value) if "ground_truth" in metadata.json_columns else value


def read_truth(value: Any, metadata: FileMetadata) -> Any:
    """`stored_truth` undone."""
    return from_json_text(value) if "ground_truth" in metadata.json_columns else value


def check_one_turn(rows: Sequence[CompletionRow], path: Path, target: str) -> None:
    """Refuse completions of a data row that are the first of several turns: `target` has a place
    for one prompt and one answer, and the reward is that of all turns.

    Raises:
        ConvertError: one of them is.
    """
    episodes: dict[str, Any] = {}
    for row in rows:
        text = row.evaluation_row
        if text is None or '"episodes"' not in text:
            continue
        if text not in episodes:
            episodes[text] = extra_of(stored_row(row)).get("episodes") or {}
        own = episodes[text].get(str(row.sample_idx))
        if own is not None and own["turns"] > 1:
            raise ConvertError(
                f"{path}: data row {row.data_idx}, completion {row.sample_idx}: an episode of "
                f"{own['turns']} turns, and a row for {target} is a prompt with one answer; the "
                "reward is that of all turns. Train on `ep-rft datums` of the file, which hold "
                "every turn, or convert to Eval Protocol's rows (--to ep)"
            )
