"""What the page carries for its script: a line per prompt group, and each group packed.

Invariant: whatever model output holds, the embedded data cannot end the element it stands in. A
group is unpacked when it is opened and not before.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Sequence
from typing import Any

import msgspec

from eval_protocol_rft.batch.rollouts.rows import ChatMessages, CompletionRow
from eval_protocol_rft.report.page_detail import LOGPROB_UNIT, plain_text
from eval_protocol_rft.report.page_stats import GroupStats

_PROMPT_START = 200
"""Characters of a prompt that its line in the table has, and that the filter searches."""


class ColumnLine(msgspec.Struct):
    """One reward column in a group's line."""

    scored: int
    passed: int
    mean: float | None


class GroupLine(msgspec.Struct):
    """A prompt group as the table shows it."""

    data_idx: int
    row_id: str
    prompt: str
    """How it starts."""
    size: int
    failed: int
    truncated: int
    mean_length: float | None
    columns: list[ColumnLine]
    """In the order of `PageIndex.columns`."""


class PageIndex(msgspec.Struct, kw_only=True):
    """What the script needs from the start on."""

    columns: list[str]
    pass_threshold: float
    logprob_unit: float = LOGPROB_UNIT
    groups: list[GroupLine]


def group_line(
    group: Sequence[CompletionRow], stats: GroupStats, columns: Sequence[str]
) -> GroupLine:
    """The line of a group in the table."""
    rewards = [stats.columns[name] for name in columns]
    return GroupLine(
        data_idx=group[0].data_idx,
        row_id=group[0].row_id,
        prompt=prompt_start(group[0].prompt),
        size=stats.size,
        failed=stats.failed,
        truncated=stats.truncated,
        mean_length=stats.mean_length,
        columns=[ColumnLine(r.scored, r.passed, r.mean) for r in rewards],
    )


def prompt_start(prompt: str | ChatMessages) -> str:
    """How the question starts: the last message of the user, as those before are often all alike.
    On one line."""
    if not isinstance(prompt, str):
        asked = [message for message in prompt if message.get("role") == "user"] or prompt
        prompt = plain_text(asked[-1].get("content") or "") if asked else ""
    line = " ".join(prompt.split())
    return line if len(line) <= _PROMPT_START else line[: _PROMPT_START - 1] + "…"


def embedded_json(value: Any) -> str:
    """JSON that can stand in a script element as it is: no character of it means anything to an
    HTML parser."""
    text = msgspec.json.encode(value).decode()
    return text.translate(_ESCAPES)


def packed(value: Any) -> str:
    """JSON, deflated (RFC 1950), in base64."""
    return base64.b64encode(zlib.compress(msgspec.json.encode(value), 6)).decode()


_ESCAPES = str.maketrans({character: f"\\u{ord(character):04x}" for character in "<>&\u2028\u2029"})
