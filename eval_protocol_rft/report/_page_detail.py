"""What the page shows of a prompt group once it is opened: every completion, token by token.

Invariant: token arrays that are not exact are an error that names row, completion and index. What
the page's script reads is what `GroupDetail` holds, field by field.

What the page carries for its script: a line per prompt group, and each group packed.

Invariant: whatever model output holds, the embedded data cannot end the element it stands in. A
group is unpacked when it is opened and not before.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from eval_protocol_rft.data import ChatMessages, CompletionRow, Score
from eval_protocol_rft.report._page_stats import GroupStats, broken
from eval_protocol_rft.report._page_tokens import TokenTexts, Vocabulary
from eval_protocol_rft.sampling import token_data_problem

LOGPROB_UNIT = 0.001
"""Logprobs stand on the page as whole multiples of this."""


class Scoring(msgspec.Struct, omit_defaults=True):
    """What one evaluator said of a completion."""

    column: str
    reward: float | None = None
    reason: str | None = None
    metrics: str | None = None
    """JSON text."""
    error: str | None = None


class FailureDetail(msgspec.Struct, omit_defaults=True):
    """Why there is no completion."""

    message: str
    kind: str | None = None
    status: int | None = None
    attempts: int | None = None


class PartDetail(msgspec.Struct, omit_defaults=True):
    """Consecutive tokens of a segment that were all sampled, or all not."""

    tokens: list[int]
    """[T] numbers in the page's vocabulary."""
    logprobs: list[int] | None = None
    """[T] in units of -`LOGPROB_UNIT`; there exactly where they were sampled."""
    raw_logprobs: list[int] | None = None
    """[T] of the first turn alone, where the server gave them."""
    turn: int | None = None
    """From 1. None where nothing was sampled, or the turns cannot be told apart."""
    reward: float | None = None
    """The step's."""


class RewriteDetail(msgspec.Struct):
    """Where the chat template rendered history anew: the first characters that differ."""

    kept: str
    rendered: str


class EpisodeDetail(msgspec.Struct, omit_defaults=True):
    """The turns of a completion that is an episode."""

    turns: int
    stop_reason: str
    segments: list[list[PartDetail]]
    """[S] parts of each segment, in order; the first lacks the prompt, which stands above."""
    rewrites: list[RewriteDetail] = []
    """[S - 1] why each further segment begins; empty where the episode does not say."""
    metrics: str | None = None
    """JSON text."""
    conversation: str | None = None
    """What was said in it, where there are no texts of tokens."""


class CompletionDetail(msgspec.Struct, omit_defaults=True):
    """One completion that was asked for."""

    index: int
    prompt: int | None = None
    """Which of the group's prompts it continues."""
    tokens: list[int] = []
    """[T] numbers in the page's vocabulary."""
    logprobs: list[int] | None = None
    """[T] in units of -`LOGPROB_UNIT`."""
    raw_logprobs: list[int] | None = None
    """[T] in the same unit, where the server gave them."""
    response: str | None = None
    """The stored text, where the tokens cannot show it or do not."""
    finish_reason: str | None = None
    truncated: bool = False
    seed: int | None = None
    seconds: float | None = None
    policy_version: str | None = None
    scores: list[Scoring] = []
    failure: FailureDetail | None = None
    episode: EpisodeDetail | None = None
    """Of a completion of several turns, in place of `tokens` and their logprobs; `finish_reason`
    and `truncated` are of its last turn, `response` of its first."""


class GroupDetail(msgspec.Struct, omit_defaults=True):
    """A prompt and its completions."""

    prompts: list[list[int]]
    """[P][T] the different prompts as numbers in the vocabulary; more than one only where
    completions of the group continue different tokens."""
    completions: list[CompletionDetail]
    prompt_text: str | None = None
    """The prompt as the data set has it, where there are no tokens or no texts of them."""
    ground_truth: str | None = None


def group_detail(
    group: Sequence[CompletionRow],
    *,
    vocabulary: Vocabulary,
    texts: TokenTexts | None,
    columns: Sequence[str],
) -> GroupDetail:
    """What to show of the completions of one prompt.

    Args:
        group: in the order of `sample_idx`.
        vocabulary: takes up the tokens.
        texts: None shows tokens as ids.
        columns: reward columns, in the order to show them.

    Raises:
        ReportError: token data of a completion are not exact.
    """
    prompts: dict[bytes, int] = {}
    prompt_numbers: list[list[int]] = []
    completions: list[CompletionDetail] = []
    for row in group:
        prompt = None
        if row.prompt_ids is not None and len(row.prompt_ids):
            prompt = prompts.setdefault(row.prompt_ids.tobytes(), len(prompts))
            if prompt == len(prompt_numbers):
                prompt_numbers.append(vocabulary.numbers(row.prompt_ids.tolist(), texts))
        completions.append(_completion(row, prompt, vocabulary, texts, columns))
    return GroupDetail(
        prompts=prompt_numbers,
        prompt_text=None if prompt_numbers and texts else plain_text(group[0].prompt),
        ground_truth=None if group[0].ground_truth is None else plain_text(group[0].ground_truth),
        completions=completions,
    )


def plain_text(value: Any) -> str:
    """Text as it is, chat messages one after the other, anything else as JSON."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(m, Mapping) and "role" in m for m in value):
        return "\n\n".join(f"{message['role']}: {_content(message)}" for message in value)
    return msgspec.json.encode(value).decode()


def _content(message: Mapping[str, Any]) -> str:
    rest = {k: v for k, v in message.items() if k not in ("role", "content")}
    content = message.get("content") or ""
    return f"{content} {msgspec.json.encode(rest).decode()}".lstrip() if rest else content


def _completion(
    row: CompletionRow,
    prompt: int | None,
    vocabulary: Vocabulary,
    texts: TokenTexts | None,
    columns: Sequence[str],
) -> CompletionDetail:
    detail = CompletionDetail(
        index=row.sample_idx,
        prompt=prompt,
        finish_reason=row.finish_reason,
        truncated=bool(row.truncated),
        seed=row.seed,
        seconds=row.seconds,
        policy_version=row.policy_version,
        scores=[_scoring(name, row.scores[name]) for name in columns if name in row.scores],
    )
    if row.error is not None:
        detail.failure = FailureDetail(row.error, row.error_kind, row.error_status, row.attempts)
        return detail
    if row.completion_ids is None:
        detail.response = row.response
        return detail
    if row.prompt_ids is not None and len(row.prompt_ids) and row.prompt_ids.min() < 0:
        place = int((row.prompt_ids < 0).argmax())
        raise broken(row, f"prompt_ids[{place}] is {row.prompt_ids[place]}: not a token id")
    ids = row.completion_ids.tolist()
    logprobs = None if row.logprobs is None else row.logprobs.tolist()
    raw = None if row.raw_logprobs is None else row.raw_logprobs.tolist()
    problem = token_data_problem(ids, [0.0] * len(ids) if logprobs is None else logprobs, raw)
    if problem:
        raise broken(row, problem)
    detail.tokens = vocabulary.numbers(ids, texts)
    detail.logprobs = in_units(logprobs)
    detail.raw_logprobs = in_units(raw)
    if row.response is not None and not (
        texts and "".join(texts.pieces(ids)).startswith(row.response)
    ):
        detail.response = row.response
    return detail


def in_units(logprobs: list[float] | None) -> list[int] | None:
    """[T] as whole multiples of -`LOGPROB_UNIT`."""
    if logprobs is None:
        return None
    whole: list[int] = np.rint(np.array(logprobs) / -LOGPROB_UNIT).astype(np.int64).tolist()
    return whole


def _scoring(column: str, score: Score) -> Scoring:
    finite = score.reward is None or np.isfinite(score.reward)
    return Scoring(
        column=column,
        reward=score.reward if finite else None,
        reason=score.reason,
        metrics=msgspec.json.encode(score.metrics).decode() if score.metrics else None,
        error=score.error if finite else f"the reward is {score.reward}, no finite number",
    )


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
