"""Episodes of several turns, as the page shows them.

Invariant: an episode that breaks the record is an error that names row, completion and segment. The
page shows every token of every segment once, in order, but for the prompt that stands above.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from eval_protocol_rft._segments import RecordError, Segment
from eval_protocol_rft._turns import EpisodeRecord, turn_runs
from eval_protocol_rft.data import CompletionRow, checked_episode
from eval_protocol_rft.report._page_detail import Json, in_units, plain_text
from eval_protocol_rft.report._page_stats import broken
from eval_protocol_rft.report._page_tokens import TokenTexts, Vocabulary


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredEpisode:
    """What a row says of its episode, checked."""

    row: CompletionRow
    record: EpisodeRecord
    segments: list[Segment]


def group_episodes(group: Sequence[CompletionRow]) -> dict[int, StoredEpisode]:
    """The episodes among the completions of one prompt, by `sample_idx`.

    Raises:
        ReportError: one of them breaks the record.
    """
    found = {}
    for row in group:
        if row.episode is not None:
            try:
                record, segments = checked_episode(row)
            except RecordError as error:
                raise broken(row, str(error)) from error
            found[row.sample_idx] = StoredEpisode(row=row, record=record, segments=segments)
    return found


def put_episodes(
    detail: Json,
    episodes: Mapping[int, StoredEpisode],
    vocabulary: Vocabulary,
    texts: TokenTexts | None,
) -> None:
    """Let the completions that are episodes be shown whole, where `detail` has first turns."""
    for completion in detail["completions"]:
        episode = episodes.get(completion["index"])
        if episode is None:
            continue
        # Reason and truncation are of the last turn; the conversation has the first one's text.
        gone = ["tokens", "logprobs", "raw_logprobs", "truncated"] + ["response"] * (texts is None)
        for name in gone:
            completion.pop(name, None)
        completion["episode"] = episode_detail(episode, vocabulary, texts)
        completion["finish_reason"] = episode.record.last_finish_reason
        if completion["finish_reason"] == "length":
            completion["truncated"] = True


def episode_detail(
    episode: StoredEpisode, vocabulary: Vocabulary, texts: TokenTexts | None
) -> Json:
    """What to show of an episode, in parts of each segment: consecutive tokens that were all
    sampled, or all not; the first segment lacks the prompt, which stands above. Without `texts` it
    has the conversation as it is stored."""
    record = episode.record
    runs = sum(one for s in episode.segments for one, _, _ in turn_runs(s.loss_mask.tolist()))
    numbers = iter(range(1, record.turns + 1)) if runs == record.turns else None
    segments = []
    for k, segment in enumerate(episode.segments):
        above = 0 if k or episode.row.prompt_ids is None else len(episode.row.prompt_ids)
        # Decoded as a whole: a character may have tokens on both sides of a turn's start.
        tokens = vocabulary.numbers(segment.tokens.tolist(), texts)
        segments.append(list(_parts(segment, tokens, above, record, numbers)))
    first, raw = segments[0][0], episode.row.raw_logprobs
    if raw is not None and len(raw) == len(first["tokens"]):
        first["raw_logprobs"] = in_units(raw.tolist())
    detail: Json = {"turns": record.turns, "stop_reason": record.stop_reason, "segments": segments}
    metrics = dict(record.metrics)
    if rewrites := _rewrites(record.metrics, len(segments)):
        detail["rewrites"] = rewrites
        del metrics[_REWRITES]  # told where a segment begins, and not again
    if metrics:
        detail["metrics"] = msgspec.json.encode(metrics).decode()
    if texts is None:
        detail["conversation"] = plain_text(record.messages[record.row_messages or 0 :])
    return detail


def _parts(
    segment: Segment,
    tokens: list[int],
    above: int,
    record: EpisodeRecord,
    numbers: Iterator[int] | None,
) -> Iterator[Json]:
    """Runs of sampled tokens and of others, from token `above` on. `numbers` gives each sampled
    run the number of its turn; None where they cannot be told apart."""
    for sampled, first, stop in turn_runs(segment.loss_mask.tolist()):
        start = max(first, above)
        if start == stop:
            continue
        part: Json = {"tokens": tokens[start:stop]}
        if sampled:
            part["logprobs"] = in_units(segment.logprobs[start:stop].tolist())
            if numbers is not None:
                part["turn"] = next(numbers)
                reward = next(iter(record.step_rewards[part["turn"] - 1 : part["turn"]]), None)
                if reward is not None:
                    part["reward"] = reward
        yield part


def _rewrites(metrics: Mapping[str, Any], segments: int) -> list[_Rewrite]:
    """Why each segment but the first begins; empty where that is not told of all."""
    try:
        told = msgspec.convert(metrics.get(_REWRITES), list[_Rewrite])
    except msgspec.ValidationError:
        return []  # an environment may have a metric of this name
    return told if len(told) == segments - 1 else []


_REWRITES = "history_rewrites"


class _Rewrite(msgspec.Struct):
    """Where the chat template rendered history anew: the first characters that differ."""

    kept: str
    rendered: str
