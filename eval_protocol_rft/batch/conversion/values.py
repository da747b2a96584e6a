"""Values of rollout files in the form that trainers' data sets have them, and back. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from eval_protocol_rft.batch.rollouts.format import FileMetadata, PromptKind
from eval_protocol_rft.batch.rollouts.rows import ChatMessages


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
