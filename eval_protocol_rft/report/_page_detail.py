"""What the page carries of a prompt group for its script: its line in the table, and every
completion token by token, for when it is opened; of an episode of several turns, the whole of it.

Invariant: token arrays that are not exact are an error that names row, completion and index, and an
episode that breaks the record one that names its segment. Every token of every segment is shown
once, in order, but for the prompt that stands above. Tokens are numbers in the page's vocabulary;
logprobs are whole multiples of -`LOGPROB_UNIT`.

Each token is shown in its place by its text: the pieces of a sequence, joined, are the text that
the tokenizer gives for the whole of it. Ids become text and never the reverse.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import msgspec
import numpy as np

from eval_protocol_rft._segments import EpisodeRecord, RecordError, Segment
from eval_protocol_rft._turn_payloads import turn_runs
from eval_protocol_rft.data import ChatMessages, CompletionRow, checked_episode
from eval_protocol_rft.local import LoadedTokenizer, load_tokenizer
from eval_protocol_rft.record import Score
from eval_protocol_rft.report._html import ReportError
from eval_protocol_rft.sampling import token_data_problem

LOGPROB_UNIT = 0.001
"""Logprobs stand on the page as whole multiples of this."""
_PROMPT_START = 200
"""Characters of a prompt that its line in the table has, and that the filter searches."""

Json = dict[str, Any]
"""An object of the page's data: what is not known, or none, is left out."""
Episode = tuple[EpisodeRecord, list[Segment]]
"""How it went, and its segments in order."""


def broken(row: CompletionRow, problem: str) -> ReportError:
    """The error that a completion is for which the file breaks its format."""
    return ReportError(
        f"row {row.data_idx} ({row.row_id!r}), completion {row.sample_idx}: {problem}. "
        "The file breaks its format: make it anew, or leave this row out"
    )


def group_episodes(group: Sequence[CompletionRow]) -> dict[int, Episode]:
    """The episodes among the completions of one prompt, by `sample_idx`.

    Raises:
        ReportError: one of them breaks the record.
    """
    episodes = {}
    for row in group:
        if row.episode is not None:
            try:
                record, segments = checked_episode(row)
            except RecordError as error:
                raise broken(row, str(error)) from error
            episodes[row.sample_idx] = record, segments
    return episodes


def group_detail(
    group: Sequence[CompletionRow],
    episodes: Mapping[int, Episode],
    *,
    vocabulary: Vocabulary,
    texts: TokenTexts | None,
    columns: Sequence[str],
) -> Json:
    """What to show of the completions of one prompt.

    Args:
        group: in the order of `sample_idx`.
        episodes: those among them, as `group_episodes` gives them.
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
        episode = episodes.get(row.sample_idx)
        completions.append(_completion(row, episode, prompt, vocabulary, texts, columns))
    truth = group[0].ground_truth
    return _known(
        # More than one only where completions of the group continue different tokens.
        prompts=prompt_numbers,
        # The prompt as the data set has it, where there are no tokens or no texts of them.
        prompt_text=None if prompt_numbers and texts else _plain_text(group[0].prompt),
        ground_truth=None if truth is None else _plain_text(truth),
        completions=completions,
    )


def _known(**fields: Any) -> Json:
    return {name: value for name, value in fields.items() if value is not None}


def _plain_text(value: Any) -> str:
    """Text as it is, chat messages one after the other, anything else as JSON."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(m, Mapping) and "role" in m for m in value):
        return "\n\n".join(f"{message['role']}: {_content(message)}" for message in value)
    return msgspec.json.encode(value).decode()


def _content(message: Mapping[str, Any]) -> str:
    others = {k: v for k, v in message.items() if k not in ("role", "content")}
    content = message.get("content") or ""
    return f"{content} {msgspec.json.encode(others).decode()}".lstrip() if others else content


def _completion(
    row: CompletionRow,
    episode: Episode | None,
    prompt: int | None,
    vocabulary: Vocabulary,
    texts: TokenTexts | None,
    columns: Sequence[str],
) -> Json:
    # Of an episode reason and truncation are those of its last turn.
    finish_reason = row.finish_reason if episode is None else episode[0].last_finish_reason
    truncated = row.truncated if episode is None else finish_reason == "length"
    detail = _known(
        index=row.sample_idx,
        prompt=prompt,
        finish_reason=finish_reason,
        truncated=truncated or None,
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
    if episode is not None:
        shown = _episode(episode, row, vocabulary, texts)
        # Its conversation, shown where there are no texts, has the first turn's.
        return detail | _known(episode=shown, response=stored if texts else None)
    return detail | _known(
        tokens=vocabulary.numbers(ids, texts) or None,
        logprobs=_in_units(logprobs),
        raw_logprobs=_in_units(raw),
        response=stored,
    )


def _episode(
    episode: Episode, row: CompletionRow, vocabulary: Vocabulary, texts: TokenTexts | None
) -> Json:
    """What to show of an episode, in parts of each segment: consecutive tokens that were all
    sampled, or all not; the first segment lacks the prompt, which stands above. Without `texts` it
    has the conversation as it is stored."""
    record, segments = episode
    runs = sum(one for s in segments for one, _, _ in turn_runs(s.loss_mask.tolist()))
    turns = iter(range(1, record.turns + 1)) if runs == record.turns else None
    shown: list[list[Json]] = []
    for k, segment in enumerate(segments):
        above = 0 if k or row.prompt_ids is None else len(row.prompt_ids)
        # Decoded as a whole: a character may have tokens on both sides of a turn's start.
        tokens = vocabulary.numbers(segment.tokens.tolist(), texts)
        shown.append(list(_parts(segment, tokens, above, record, turns)))
    first, raw = shown[0][0], row.raw_logprobs
    if raw is not None and len(raw) == len(first["tokens"]):
        first["raw_logprobs"] = _in_units(raw.tolist())
    detail: Json = {"turns": record.turns, "stop_reason": record.stop_reason, "segments": shown}
    metrics = dict(record.metrics)
    if rewrites := _rewrites(record.metrics, len(shown)):
        detail["rewrites"] = rewrites
        del metrics[_REWRITES]  # told where a segment begins, and not again
    if metrics:
        detail["metrics"] = msgspec.json.encode(metrics).decode()
    if texts is None:
        detail["conversation"] = _plain_text(record.messages[record.row_messages or 0 :])
    return detail


def _parts(
    segment: Segment,
    tokens: list[int],
    above: int,
    record: EpisodeRecord,
    turns: Iterator[int] | None,
) -> Iterator[Json]:
    """Runs of sampled tokens and of others, from token `above` on. `turns` gives each sampled
    run the number of its turn; None where they cannot be told apart."""
    for sampled, first, stop in turn_runs(segment.loss_mask.tolist()):
        start = max(first, above)
        if start == stop:
            continue
        part: Json = {"tokens": tokens[start:stop]}
        if sampled:
            part["logprobs"] = _in_units(segment.logprobs[start:stop].tolist())
            if turns is not None:
                part["turn"] = next(turns)
                reward = next(iter(record.step_rewards[part["turn"] - 1 : part["turn"]]), None)
                if reward is not None:
                    part["reward"] = reward
        yield part


def _rewrites(metrics: Mapping[str, Any], segments: int) -> list[dict[str, str]]:
    """Why each segment but the first begins, `kept` and `rendered`: the first characters at which
    the chat template rendered history anew. Empty where that is not told of all."""
    try:
        rewrites = [
            {name: msgspec.convert(entry[name], str) for name in ("kept", "rendered")}
            for entry in msgspec.convert(metrics.get(_REWRITES), list[dict[str, Any]])
        ]
    except (KeyError, msgspec.ValidationError):
        return []  # an environment may have a metric of this name
    return rewrites if len(rewrites) == segments - 1 else []


_REWRITES = "history_rewrites"


def _in_units(logprobs: list[float] | None) -> list[int] | None:
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
        questions = [message for message in prompt if message.get("role") == "user"] or prompt
        prompt = _plain_text(questions[-1].get("content") or "") if questions else ""
    line = " ".join(prompt.split())
    return line if len(line) <= _PROMPT_START else line[: _PROMPT_START - 1] + "…"


BROKEN = "\N{REPLACEMENT CHARACTER}"
"""What a tokenizer gives for bytes that are no whole character."""

TokenKind = Literal["text", "control", "partial", "unknown", "bare"]
"""`control`: an end-of-turn token or the like. `partial`: the first bytes of a character that a
later token ends. `unknown`: an id that the tokenizer does not have. `bare`: shown as its id."""


class TokenTexts:
    """Texts of the tokens of one tokenizer."""

    def __init__(self, tokenizer: LoadedTokenizer) -> None:
        self._tokenizer = tokenizer
        # Some tokenizers decode a token at the start otherwise than within a text.
        self._anchor: list[int] = tokenizer.tokenizer.encode("a", add_special_tokens=False)
        self._anchor_text = tokenizer.decode(self._anchor)
        self._first: dict[int, str] = {}
        self._inner: dict[int, str] = {}
        self._runs: dict[tuple[int, ...], list[str]] = {}

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """[T] text of each of T tokens. A character made of several tokens belongs to the last of
        them."""
        text = self._tokenizer.decode(list(ids))
        pieces = self._by_token(ids)
        return pieces if "".join(pieces) == text else self._by_prefix(ids, text)

    def kind(self, token: int, piece: str) -> TokenKind:
        """What `token` is, where `piece` is its text in its place."""
        if token in self._tokenizer.special_ids:
            return "control"
        if piece:
            return "text"
        return "partial" if self._text(token, first=False) else "unknown"

    def _by_token(self, ids: Sequence[int]) -> list[str]:
        """Pieces from the texts of single tokens: right for all common tokenizers, and fast."""
        pieces: list[str] = []
        at = 0
        while at < len(ids):
            piece = self._text(ids[at], first=at == 0)
            if BROKEN not in piece:
                pieces.append(piece)
                at += 1
                continue
            stop = at + 1
            while stop < len(ids) and BROKEN in self._text(ids[stop], first=False):
                stop += 1
            pieces += self._run(tuple(ids[at:stop]), first=at == 0)
            at = stop
        return pieces

    def _by_prefix(self, ids: Sequence[int], text: str) -> list[str]:
        """Pieces from the texts of all prefixes: right for every tokenizer, and quadratic."""
        pieces: list[str] = []
        shown = 0
        for stop in range(1, len(ids)):
            prefix = self._tokenizer.decode(list(ids[:stop])).rstrip(BROKEN)
            end = max(shown, _common_start(prefix, text))
            pieces.append(text[shown:end])
            shown = end
        return [*pieces, text[shown:]] if ids else []

    def _text(self, token: int, *, first: bool) -> str:
        known = self._first if first else self._inner
        if token not in known:
            known[token] = self._decode((token,), first=first)
        return known[token]

    def _run(self, run: tuple[int, ...], *, first: bool) -> list[str]:
        """Pieces of consecutive tokens none of which is whole characters."""
        if not first and run in self._runs:
            return self._runs[run]
        pieces: list[str] = []
        begin = shown = 0
        for stop in range(1, len(run) + 1):
            text = self._decode(run[begin:stop], first=first and begin == 0)
            # What is broken at the end may become a character with the next token.
            whole = text if stop == len(run) else text.rstrip(BROKEN)
            pieces.append(whole[shown:])
            shown = len(whole)
            if whole == text:
                begin, shown = stop, 0
        if not first:
            self._runs[run] = pieces
        return pieces

    def _decode(self, ids: tuple[int, ...], *, first: bool) -> str:
        if first:
            return self._tokenizer.decode(list(ids))
        return self._tokenizer.decode([*self._anchor, *ids]).removeprefix(self._anchor_text)


def _common_start(a: str, b: str) -> int:
    """How many characters both begin with alike."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))


def load_token_texts(name: str) -> TokenTexts:
    """The token texts of a tokenizer as a rollout file names it: a folder, a hub id, or a local
    model (`local/arithmetic`). A page is right without them, so it does not wait for a hub.

    Raises:
        TokenizerError: it cannot be loaded.
    """
    return TokenTexts(load_tokenizer(name, patient=False))


class Vocabulary:
    """The different tokens of a page: each (id, text, kind) has one number."""

    def __init__(self) -> None:
        self._numbers: dict[tuple[int, str, TokenKind], int] = {}
        self._kinds: dict[tuple[TokenTexts, int, str], TokenKind] = {}

    def numbers(self, ids: Sequence[int], texts: TokenTexts | None) -> list[int]:
        """[T] number of each of T tokens; without texts they are shown as their ids."""
        if texts is None:
            return [self._number(token, "", "bare") for token in ids]
        return [
            self._number(token, piece, self._kind(token, piece, texts))
            for token, piece in zip(ids, texts.pieces(ids), strict=True)
        ]

    def entries(self) -> list[tuple[int, str, TokenKind]]:
        """The tokens by number."""
        return list(self._numbers)

    def _number(self, token: int, piece: str, kind: TokenKind) -> int:
        return self._numbers.setdefault((token, piece, kind), len(self._numbers))

    def _kind(self, token: int, piece: str, texts: TokenTexts) -> TokenKind:
        key = (texts, token, piece)
        if key not in self._kinds:
            self._kinds[key] = texts.kind(token, piece)
        return self._kinds[key]
