"""Rows of Eval Protocol as rows of a rollout file, through the record. Pure; on plain dicts, so
without importing Eval Protocol.

Invariant: see `_to_ep`. What no column holds is in `evaluation_row`, or the row is refused. No two
completions of a row have the same `sample_idx`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from eval_protocol_rft import record as rollout_record
from eval_protocol_rft._segments import Segment, TokenBuffer
from eval_protocol_rft._turn_payloads import episode_traces, turn_payloads
from eval_protocol_rft.data import _to_ep as to_ep
from eval_protocol_rft.data._episodes import Imported, as_arrays, as_read
from eval_protocol_rft.data._format import CompletionRow, PromptKind
from eval_protocol_rft.data._records import SAMPLING_BY_PLACE
from eval_protocol_rft.record import UNSCORED, RecordError, RolloutRecord, SamplingRecord, Score
from eval_protocol_rft.rollout import answer_fields

_DERIVED = frozenset(RolloutRecord.__struct_fields__)
"""Keys of `extra` that the columns hold."""
_PER_COMPLETION = (
    "indices", "seeds", "policy_versions", "first_policy_versions", "request_ids", "attempts",
    "seconds", "past_end",
)  # fmt: skip
_MESSAGE_FIELDS = ("role", "content", "reasoning_content", "name", "tool_calls", "tool_call_id")
"""What the file's prompt column holds of a message."""
_OF_A_GENERATED_ROW = frozenset(
    {"messages", "tools", "ground_truth", "input_metadata", "execution_metadata", "rollout_status"}
    | {"created_at", "pid"}
)
_OF_ITS_METADATA = frozenset(
    {"row_id", "dataset_info", "extra", "finish_reason", "tool_call_count"}
    | {"invocation_id", "experiment_id", "rollout_id"}
)
"""What `to_row` writes, and what Eval Protocol's models add by themselves."""


class FailedRolloutError(RecordError):
    """The rollout of the row failed, or it never had one."""


def read_file_part(extra: Mapping[str, Any]) -> to_ep.FilePart | None:
    """What `to_row` left in the row of a file; None where it did not, or where the row was rolled
    out anew since.

    Raises:
        RecordError: it is broken.
    """
    if extra.get(to_ep.FILE_KEY) is None:
        return None
    try:
        part = msgspec.convert(extra[to_ep.FILE_KEY], to_ep.FilePart)
    except msgspec.ValidationError as error:
        raise RecordError(f"broken {to_ep.FILE_KEY!r} in extra: {error}") from error
    own = (
        (extra["completion_ids"], extra.get("trajectories"))
        if rollout_record.has_record(extra)
        else ([], None)
    )
    return part if to_ep.checksum(*own) == part.tokens else None


def from_row(
    row: Mapping[str, Any],
    data_idx: int,
    *,
    prompt_kind: PromptKind,
    first: int = 0,
    keep_row: bool = False,
) -> list[CompletionRow]:
    """The completions of one row of Eval Protocol, given as its JSON, by `sample_idx`.

    Args:
        row: with a rollout record, or one that `to_row` made of completions that all failed.
        data_idx: its number, where it did not come from a rollout file.
        prompt_kind: of the file to be; `text` needs prompts of a single user message.
        first: `sample_idx` of the first completion that was asked for, where it did not come from a
            rollout file: earlier runs of the same data row have those before it.
        keep_row: keep in `evaluation_row` also what the file that the row came from says of all
            its rows, where the file to be does not say so.

    Raises:
        FailedRolloutError: there is no record, or it is not of this row's last rollout.
        RecordError: the record is invalid, or the prompt has no place in the file.
    """
    try:
        return _completions(row, data_idx, prompt_kind, first, keep_row=keep_row)
    except RecordError as error:
        raise type(error)(f"row {row_id_of(row)!r}: {error}") from error


def extra_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """`execution_metadata.extra`."""
    return (row.get("execution_metadata") or {}).get("extra") or {}


def row_id_of(row: Mapping[str, Any]) -> str | None:
    """`input_metadata.row_id`."""
    return (row.get("input_metadata") or {}).get("row_id")


def _completions(
    row: Mapping[str, Any], data_idx: int, prompt_kind: PromptKind, first: int, *, keep_row: bool
) -> list[CompletionRow]:
    extra = extra_of(row)
    asked, status = row.get("input_metadata") or {}, row.get("rollout_status") or {}
    failed = rollout_record.is_failure(status.get("code"))
    known = read_file_part(extra)
    first = first if known is None else known.first
    record = None
    if rollout_record.has_record(extra) and not failed:
        record, segments = rollout_record.read_record(
            extra, asked.get("completion_params"), TokenBuffer()
        )
        own = _survivors(record, segments, known, extra.get("episodes") or ())
        result = row.get("evaluation_result")
        if (
            result is not None
            and len(own) == 1
            and not (record.rewards is not None or record.completion_results is not None)
        ):
            own[0]["scores"]["reward"] = rollout_record.score_of_result(result)
    elif known is None or not failed or known.survived:
        raise FailedRolloutError(
            f"it has no rollout; its rollout status is {status.get('message')!r}"
        )
    else:
        own = []
    own += _failed(record, known)
    for values in own:
        values["sample_idx"] += first
    places = [values["sample_idx"] for values in own]
    if not own:
        raise RecordError("the record holds no completions")
    if len(set(places)) < len(places):
        double = next(place for place in places if places.count(place) > 1)
        raise RecordError(f"two completions have the index {double}")
    answered = record is not None and [m.get("role") for m in row.get("messages") or []][-1:] == [
        "assistant"
    ]
    generated = known is not None and known.generated and not keep_row and _is_bare(row)
    generated = generated and not (record is not None and _odd_episodes(extra, record, first))
    number = data_idx if known is None else known.data_idx
    shared = {
        "row_id": row_id_of(row) or str(number),
        "data_idx": number,
        "prompt": _prompt(row, record, prompt_kind, answered=answered),
        "tools": row.get("tools"),
        "ground_truth": row.get("ground_truth"),
        "original": dict(asked.get("dataset_info") or {}) if known and known.has_original else {},
        "evaluation_row": None if generated else _rest(row, record, first, answered=answered),
    }
    rows = [CompletionRow(**shared, **values) for values in own]
    return sorted(rows, key=lambda completion: completion.sample_idx)


def _survivors(
    record: RolloutRecord,
    segments: Sequence[tuple[Segment, ...]],
    known: to_ep.FilePart | None,
    episodes: Sequence[dict[str, Any]],
) -> list[dict[str, Any]]:
    """The fields of each completion; `episodes` as `extra` has them."""
    sampling = record.sampling
    shared = np.array(record.prompt_ids, np.int32)
    lists: dict[str, Sequence[Any] | None] = {
        "sample_idx": sampling.indices,
        "response": record.completions_text,
        "message": record.completion_messages,
        "finish_reason": record.last_finish_reasons,
        "truncated": record.ends_truncated,
        "seed": sampling.seeds,
        "policy_version": sampling.policy_versions,
        "first_policy_version": sampling.first_policy_versions,
        "request_id": sampling.request_ids,
        "attempts": sampling.attempts,
        "seconds": sampling.seconds,
    }
    rows = []
    for i, (segment, *further) in enumerate(segments):
        own = record.episodes[i].prompt_ids if record.episodes is not None else None
        prompt_ids = shared if own is None else np.array(own, np.int32)
        first = len(prompt_ids)
        stop = first + len(record.completion_ids[i])
        raw = record.raw_logprobs[i] if record.raw_logprobs is not None else None
        past_end = sampling.past_end[i] if sampling.past_end else []
        scores = _file_scores(known, i) if known else {}
        rows.append(
            {
                **{name: values[i] if values else None for name, values in lists.items()},
                "prompt_ids": prompt_ids,
                "completion_ids": segment.tokens[first:stop].astype(np.int32),
                "logprobs": segment.logprobs[first:stop],
                "raw_logprobs": None if raw is None else np.array(raw, np.float32),
                "past_end": _ids(past_end, f"completion {i}: past_end") if past_end else None,
                **(
                    {
                        "segments": as_arrays([segment, *further]),
                        "episode": episodes[i] | {"prompt_ids": None},
                        "first_finish_reason": record.finish_reasons[i],
                    }
                    if record.episodes is not None
                    else {}
                ),
                "scores": {
                    name: score
                    for name, score in {"reward": _main_score(record, i), **scores}.items()
                    if score != UNSCORED
                },
                **(_sampled_with(sampling) if known is None else known.survived[i]),
            }
        )
    return rows


def _ids(values: Sequence[int], where: str) -> Any:
    try:
        return np.array(values, np.int32)
    except OverflowError as error:
        raise RecordError(f"{where}: {max(values, key=abs)} is no token id") from error


def _file_scores(known: to_ep.FilePart, i: int) -> dict[str, Score]:
    try:
        return {
            name: msgspec.convert({**values[i], "score": values[i].get("reward")}, Score)
            for name, values in known.scores.items()
        }
    except msgspec.ValidationError as error:
        raise RecordError(f"broken {to_ep.FILE_KEY!r} in extra: scores: {error}") from error


def _main_score(record: RolloutRecord, i: int) -> Score:
    if record.completion_results is not None:
        said = record.completion_results[i]
        return msgspec.structs.replace(said, metrics=said.metrics or None)
    return UNSCORED if record.rewards is None else Score(reward=record.rewards[i])


def _failed(record: RolloutRecord | None, known: to_ep.FilePart | None) -> Iterator[dict[str, Any]]:
    if known is not None:
        failed = known.failed
    elif record is not None:
        shared = _sampled_with(record.sampling)
        failed = [{**msgspec.to_builtins(failure), **shared} for failure in record.failures]
    for values in failed:
        ids = values.get("prompt_ids")
        yield {
            **{k: v for k, v in values.items() if k not in ("index", "message", "kind", "status")},
            "sample_idx": values["index"],
            "error": values["message"],
            "error_kind": values["kind"],
            "error_status": values["status"],
            "prompt_ids": None if ids is None else _ids(ids, "prompt_ids"),
        }


def _sampled_with(sampling: SamplingRecord) -> dict[str, Any]:
    values = {name: getattr(sampling, name) for name in to_ep.SHARED_COLUMNS}
    return {**values, "began_at": sampling.began_at or None}


def _prompt(
    row: Mapping[str, Any], record: RolloutRecord | None, kind: PromptKind, *, answered: bool
) -> Any:
    """What was asked before anything was sampled, as the prompt column has it."""
    messages = row.get("messages") or []
    if record is not None and record.episodes and record.episodes[0].row_messages is not None:
        messages = messages[: record.episodes[0].row_messages]
    elif answered:
        messages = messages[:-1]
    prompt = []
    for message in messages:
        kept = {name: message[name] for name in _MESSAGE_FIELDS if message.get(name) is not None}
        if isinstance(kept.get("content"), list):
            kept["content"] = "".join(map(_text, kept["content"]))
        prompt.append(kept)
    if kind == "messages":
        return prompt
    if len(prompt) != 1 or set(prompt[0]) != {"role", "content"} or prompt[0]["role"] != "user":
        raise RecordError(
            f"its prompt is {len(prompt)} messages, and the file's prompts are text: one "
            "message of the user"
        )
    return str(prompt[0]["content"])


def _text(part: Mapping[str, Any]) -> str:
    if not isinstance(part.get("text"), str):
        raise RecordError(
            f"a message holds {part.get('type')!r}, and the file's prompts are text: keep "
            "such rows as Eval Protocol wrote them"
        )
    return str(part["text"])


def _rest(
    row: Mapping[str, Any], record: RolloutRecord | None, first: int, *, answered: bool
) -> str:
    """The row without what the columns hold, as JSON text. Its own `FILE_KEY` says which optional
    keys the record had, and whose text the last message is."""
    extra = extra_of(row)
    kept = {k: v for k, v in extra.items() if k not in _DERIVED and k != to_ep.FILE_KEY}
    sampling: Mapping[str, Any] | None = extra.get("sampling")
    if record is not None and not rollout_record.is_marked(extra):
        split = _splits_reasoning(row, record) if answered else True
        sampling = {**msgspec.to_builtins(record.sampling), "split_reasoning": split}
    if sampling is not None:
        # An empty list says that no completion has one, and no column would.
        kept["sampling"] = {
            k: v for k, v in sampling.items() if k not in _PER_COMPLETION or v == []
        }
    if record is not None:
        # By place, as completions may be filtered out of the file.
        places = [str(first + index) for index in record.sampling.indices]
        for name in SAMPLING_BY_PLACE:
            if values := getattr(record.sampling, name):
                kept["sampling"][name] = dict(zip(places, values, strict=True))
        if odd := _odd_episodes(extra, record, first):
            kept["episodes"] = odd
        traces = extra.get("token_turn_traces") or _own_traces(extra, record)
        if not _same_turns(traces, _own_traces(extra, record)):
            kept["token_turn_traces"] = traces
        payloads = extra.get("assistant_turn_payloads")
        if payloads is not None and payloads != turn_payloads(traces, row.get("messages") or []):
            kept["assistant_turn_payloads"] = payloads
        kept[to_ep.FILE_KEY] = Imported(
            keys=[key for key in to_ep.OPTIONAL_KEYS if extra.get(key) is not None],
            answer=first + record.sampling.indices[0] if answered or record.episodes else None,
            row_messages=record.episodes[0].row_messages if record.episodes else None,
            first=first,
            routing_matrices=_routing(record, places),
        )
    metadata = {**(row.get("execution_metadata") or {}), "extra": kept}
    return msgspec.json.encode({**row, "execution_metadata": metadata}).decode()


def _routing(record: RolloutRecord, places: Sequence[str]) -> dict[str, Any] | None:
    """By place, the routing matrices of each segment; None where there are none."""
    routing = {
        place: [segment.routing_matrices for segment in segments]
        for place, segments in zip(places, record.trajectories or (), strict=False)
    }
    return {place: held for place, held in routing.items() if any(held)} or None


def _odd_episodes(extra: Mapping[str, Any], record: RolloutRecord, first: int) -> dict[str, Any]:
    """By place, the episodes of `extra` that their columns would not give back as they are."""
    places = (str(first + index) for index in record.sampling.indices)
    return {
        place: raw
        for place, raw, read in zip(
            places, extra.get("episodes") or (), record.episodes or (), strict=False
        )
        if raw != as_read(read)
    }


def _own_traces(extra: Mapping[str, Any], record: RolloutRecord) -> list[dict[str, Any]]:
    """The turns of the first completion, as the columns say them."""
    if record.trajectories is None:
        return [to_ep.first_trace(extra)]
    return episode_traces(record.trajectories[0], record.last_finish_reasons[0])


def _same_turns(traces: Any, own: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the columns say these turns too: their logprobs are float32."""

    def rounded(trace: Mapping[str, Any]) -> dict[str, Any]:
        logprobs = np.array(trace["completion_logprobs"], np.float32).tolist()
        return {**trace, "completion_logprobs": logprobs}

    try:
        return bool(list(map(rounded, traces)) == list(map(rounded, own)))
    except (KeyError, TypeError, ValueError):
        return False


def _splits_reasoning(row: Mapping[str, Any], record: RolloutRecord) -> bool:
    """Whether the row's answer has its thoughts apart."""
    split = answer_fields(record.completions_text[0], split_reasoning=True)
    answer = row["messages"][-1]
    return all(answer.get(k) == split.get(k) for k in ("content", "reasoning_content"))


def _is_bare(row: Mapping[str, Any]) -> bool:
    """Whether the row says nothing but what `to_row` wrote, so that the columns hold it all."""
    metadata, asked = row.get("execution_metadata") or {}, row.get("input_metadata") or {}
    return (
        _said(row) <= _OF_A_GENERATED_ROW
        and _said(metadata) <= _OF_ITS_METADATA
        and _said(metadata["extra"]) <= _DERIVED | {to_ep.FILE_KEY}
        and (_said(asked) - {"row_id", "dataset_info"} <= {"completion_params"})
        and not asked.get("completion_params")
        and (row.get("rollout_status") or {}).get("code") in (to_ep.FINISHED, to_ep.INTERNAL)
    )


def _said(values: Mapping[str, Any]) -> set[str]:
    return {key for key, value in values.items() if value is not None}
