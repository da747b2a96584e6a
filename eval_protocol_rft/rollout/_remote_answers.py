"""What the ids of a remote turn say, compared with the message that its agent got.

Invariant: a turn is read as chat servers read it, with or without their parsers of thinking and of
calls; a message that says or calls something else than each of these readings is of other ids. What
servers and clients change of a message without another meaning is no difference: blanks around it,
control tokens, the spelling of a call's arguments.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec

from eval_protocol_rft import sampling
from eval_protocol_rft._turn_payloads import RemoteTurn
from eval_protocol_rft.local import LoadedTokenizer
from eval_protocol_rft.record import RecordError
from eval_protocol_rft.rollout import _answers

_PROMPT_TAIL = 64
"""Tokens of a prompt that tell whether its answer begins inside a think block."""


class Reading(msgspec.Struct, frozen=True):
    """A turn as text."""

    text: str
    message: dict[str, Any]
    finish_reason: sampling.FinishReason


class TurnReader:
    """Compares what a turn's ids say with its message."""

    def __init__(
        self,
        tokenizer: LoadedTokenizer,
        tools: Sequence[Mapping[str, Any]] | None,
        stops: Sequence[str],
    ) -> None:
        self._tokenizer = tokenizer
        self._format = _answers.tool_format(tokenizer)
        self._tools = tools
        self._stops = stops

    def read(self, turn: RemoteTurn, message: Mapping[str, Any]) -> Reading:
        """The turn's text, its message in full, and how it ended.

        Raises:
            RecordError: the message is of other ids.
        """
        text, reason = self._text(turn)
        readings = []
        for reading in self._readings(turn, text, calls=bool(message.get("tool_calls"))):
            if self._same(reading, message):
                return Reading(text, reading, reason)
            readings.append(reading)
        raise RecordError(self._difference(turn, text, readings, message))

    def _text(self, turn: RemoteTurn) -> tuple[str, sampling.FinishReason]:
        ids = turn.completion_ids.tolist()
        completion = sampling.Completion(
            token_ids=ids, logprobs=turn.logprobs, finish_reason="stop"
        )
        body = self._tokenizer.decode_body(completion)
        if self._tokenizer.ender(completion) is not None:
            return body, "stop"
        known = len(self._tokenizer.decode(ids[:-1]))
        for stop in self._stops:  # one that the last token completes
            at = body.find(stop, max(0, known - len(stop) + 1))
            if at >= 0:
                return body[:at], "stop"
        return body, "length"

    def _readings(self, turn: RemoteTurn, text: str, *, calls: bool) -> Iterator[dict[str, Any]]:
        """What chat servers make of it, with the parsers that they may be started with."""
        prompt = turn.prompt_ids[-_PROMPT_TAIL:].tolist()
        # Rows of some proxies have no tools; a message that calls some tells that there were.
        tools = (self._tools or ([{}] if calls else None)) if self._format else None
        for offered in dict.fromkeys((bool(tools), False)):
            for split in (True, False):
                reader = _answers.AnswerReader(
                    prompt,
                    self._tokenizer,
                    tools=tools if offered else None,
                    split_reasoning=split,
                )
                message = reader.read(text).message
                yield message
                if self._format == "llama3_json" and message.get("tool_calls"):
                    yield {**message, "content": ""}  # vLLM drops a text in front of them
        yield {"role": "assistant", "content": text}

    def _same(self, reading: Mapping[str, Any], message: Mapping[str, Any]) -> bool:
        thought = message.get("reasoning_content")
        return (
            self._shown(reading) == self._shown(message)
            and _calls(reading) == _calls(message)
            and (not thought or thought.strip() == (reading.get("reasoning_content") or "").strip())
        )

    def _shown(self, message: Mapping[str, Any]) -> str:
        """The content without what servers and clients leave out: control tokens, the blanks around
        it, and the rest of a character that was cut in two."""
        content = _text_of(message.get("content"))
        for token in self._tokenizer.special_texts:
            content = content.replace(token, "")
        return content.strip().rstrip("\ufffd").rstrip()

    def _difference(
        self,
        turn: RemoteTurn,
        text: str,
        readings: Sequence[Mapping[str, Any]],
        message: Mapping[str, Any],
    ) -> str:
        said, called = _text_of(message.get("content")), _calls(message)
        nearest = next((r for r in readings if _calls(r) == called), None)
        reason = "its client's retry, or another conversation, had as many messages before it"
        if nearest is None:
            shown = json.dumps(message.get("tool_calls"))[:160]
            if self._format is None:
                return f"{turn.name}: {_answers.unknown_format(self._tokenizer.name)}"
            return (
                f"{turn.name}: its ids decode to {text[:160]!r}, which does not read as the calls "
                f"of its message, {shown}: {reason}?"
            )
        other = _text_of(nearest.get("content"))
        at = next(
            (i for i, (a, b) in enumerate(zip(other, said, strict=False)) if a != b),
            min(len(other), len(said)),
        )
        token = self._token_at(turn, text, text.find(other) + at if other in text else at)
        return (
            f"{turn.name}: completion_token_ids[{token}] is not of its message: the ids say "
            f"{_around(other, at)}, the message {_around(said, at)}: {reason}?"
        )

    def _token_at(self, turn: RemoteTurn, text: str, at: int) -> int:
        """The token that the character `at` of the text is of."""
        ids = turn.completion_ids.tolist()
        shared = text[: at + 1]
        count = bisect_left(
            range(len(ids)),
            True,
            lo=1,
            key=lambda k: self._tokenizer.decode(ids[:k]).startswith(shared),
        )
        return min(count, len(ids)) - 1


def _around(text: str, at: int) -> str:
    start = max(0, at - 20)
    return f"{'...' if start else ''}{text[start : at + 40]!r}"


def _text_of(content: Any) -> str:
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) for part in content if isinstance(part, Mapping))
    return content if isinstance(content, str) else ""


def _calls(message: Mapping[str, Any]) -> list[tuple[Any, Any]]:
    """Names and arguments: these by their meaning, as clients write them anew."""
    functions = [call.get("function") or {} for call in message.get("tool_calls") or ()]
    return [(f.get("name"), _meaning(f.get("arguments"))) for f in functions]


def _meaning(arguments: Any) -> Any:
    """JSON text with its numbers and keys in one way; what is none, as it is."""
    try:
        value = json.loads(arguments, parse_float=_number)
        return json.dumps(value, sort_keys=True)
    except (ValueError, TypeError, RecursionError):
        return arguments


def _number(text: str) -> float:
    """JavaScript writes 1.0 as 1."""
    value = float(text)
    return int(value) if value.is_integer() else value
