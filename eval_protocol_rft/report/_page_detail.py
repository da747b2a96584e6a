"""What the page carries of a prompt group for its script: its line in the table, and every
completion token by token, for when it is opened.

Invariant: token arrays that are not exact are an error that names row, completion and index. Tokens
are numbers in the page's vocabulary; logprobs are whole multiples of -`LOGPROB_UNIT`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from eval_protocol_rft.data import ChatMessages, CompletionRow, Score
from eval_protocol_rft.report._page_stats import broken
from eval_protocol_rft.report._page_tokens import TokenTexts, Vocabulary
from eval_protocol_rft.sampling import token_data_problem

LOGPROB_UNIT = 0.001
"""Logprobs stand on the page as whole multiples of this."""
_PROMPT_START = 200
"""Characters of a prompt that its line in the table has, and that the filter searches."""


Json = dict[str, Any]
"""An object of the page's data: what is not known, or none, is left out."""


def group_detail(
    group: Sequence[CompletionRow],
    *,
    vocabulary: Vocabulary,
    texts: TokenTexts | None,
    columns: Sequence[str],
) -> Json:
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
    completions: list[Json] = []
    for row in group:
        prompt = None
        if row.prompt_ids is not None and len(row.prompt_ids):
            prompt = prompts.setdefault(row.prompt_ids.tobytes(), len(prompts))
            if prompt == len(prompt_numbers):
                prompt_numbers.append(vocabulary.numbers(row.prompt_ids.tolist(), texts))
        completions.append(_completion(row, prompt, vocabulary, texts, columns))
    truth = group[0].ground_truth
    return _known(
        # More than one only where completions of the group continue different tokens.
        prompts=prompt_numbers,
        # The prompt as the data set has it, where there are no tokens or no texts of them.
        prompt_text=None if prompt_numbers and texts else plain_text(group[0].prompt),
        ground_truth=None if truth is None else plain_text(truth),
        completions=completions,
    )


def _known(**fields: Any) -> Json:
    return {name: value for name, value in fields.items() if value is not None}


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
) -> Json:
    detail = _known(
        index=row.sample_idx,
        prompt=prompt,
        finish_reason=row.finish_reason,
        truncated=row.truncated or None,
        seed=row.seed,
        seconds=row.seconds,
        policy_version=row.policy_version,
        scores=[_scoring(name, row.scores[name]) for name in columns if name in row.scores] or None,
    )
    if row.error is not None:
        kind, status = row.error_kind, row.error_status
        failure = _known(message=row.error, kind=kind, status=status, attempts=row.attempts)
        return detail | {"failure": failure}
    if row.completion_ids is None:
        return detail | _known(response=row.response)
    if row.prompt_ids is not None and len(row.prompt_ids) and row.prompt_ids.min() < 0:
        place = int((row.prompt_ids < 0).argmax())
        raise broken(row, f"prompt_ids[{place}] is {row.prompt_ids[place]}: not a token id")
    ids = row.completion_ids.tolist()
    logprobs = None if row.logprobs is None else row.logprobs.tolist()
    raw = None if row.raw_logprobs is None else row.raw_logprobs.tolist()
    problem = token_data_problem(ids, [0.0] * len(ids) if logprobs is None else logprobs, raw)
    if problem:
        raise broken(row, problem)
    stored = row.response
    if stored is not None and texts and "".join(texts.pieces(ids)).startswith(stored):
        stored = None  # the tokens show it
    return detail | _known(
        tokens=vocabulary.numbers(ids, texts) or None,
        logprobs=in_units(logprobs),
        raw_logprobs=in_units(raw),
        response=stored,
    )


def in_units(logprobs: list[float] | None) -> list[int] | None:
    """[T] as whole multiples of -`LOGPROB_UNIT`."""
    if logprobs is None:
        return None
    whole: list[int] = np.rint(np.array(logprobs) / -LOGPROB_UNIT).astype(np.int64).tolist()
    return whole


def _scoring(column: str, score: Score) -> Json:
    finite = score.reward is None or np.isfinite(score.reward)
    return _known(
        column=column,
        reward=score.reward if finite else None,
        reason=score.reason,
        metrics=msgspec.json.encode(score.metrics).decode() if score.metrics else None,
        error=score.error if finite else f"the reward is {score.reward}, no finite number",
    )


def prompt_start(prompt: str | ChatMessages) -> str:
    """How the question starts: the last message of the user, as those before are often all alike.
    On one line."""
    if not isinstance(prompt, str):
        asked = [message for message in prompt if message.get("role") == "user"] or prompt
        prompt = plain_text(asked[-1].get("content") or "") if asked else ""
    line = " ".join(prompt.split())
    return line if len(line) <= _PROMPT_START else line[: _PROMPT_START - 1] + "…"
