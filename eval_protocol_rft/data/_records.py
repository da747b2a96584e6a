"""The rollout record of a data row's completions: what training, scoring and conversions read of a
rollout file.

Invariant: a record says what the columns say; where they say nothing, neither does it. Token data
are views of the columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

import msgspec

from eval_protocol_rft import training
from eval_protocol_rft._segments import turn_trace
from eval_protocol_rft.data import _format as file_format
from eval_protocol_rft.data._episodes import as_lists, stored_row
from eval_protocol_rft.data._format import ChatMessages, CompletionRow, FileMetadata, FormatError
from eval_protocol_rft.record import SCHEMA_VERSION, UNSCORED, RecordError
from eval_protocol_rft.sampling import FailureKind, SamplingParams, support_truncated
from eval_protocol_rft.training import PromptGroup, TokenBuffer, TrainingDataError

Tokens = Literal["lists", "arrays", "none"]
"""What token data a record is to have."""
SAMPLING_BY_PLACE = ("retry_causes",)
"""Lists of `sampling` that no column holds: they travel in `evaluation_row`, by place, empty where
there is nothing to say."""
_ONCE_BY_PLACE = "past_end"
"""In files from before it was a column."""
_NOT_RECORDED = ("model_fingerprint", "system", "seed_given")
_FAILURE_KINDS = frozenset(get_args(FailureKind))


def prompt_groups(
    groups: Iterable[Sequence[CompletionRow]], metadata: FileMetadata
) -> Iterator[PromptGroup]:
    """What the completions of each data row are of a prompt group, in one part for each record that
    they can be of: see `part_of`."""
    buffer = TokenBuffer()
    for group in groups:
        for part in by_record(group):
            yield part_of(part, metadata, buffer)


def part_of(
    group: Sequence[CompletionRow], metadata: FileMetadata, buffer: TokenBuffer
) -> PromptGroup:
    """What a data row's completions, of one run and behind the same prompt ids, are of a prompt
    group.

    Raises:
        TrainingDataError: they are no record; the message names row, completion and index.
        FormatError: `evaluation_row` is none that a conversion wrote.
    """
    first = group[0]
    stored = stored_row(first) if first.evaluation_row is not None else {}
    execution = stored.get("execution_metadata") or {}
    extra = execution.get("extra") or {}
    run = extra.get("run_index")
    name = f"row {first.row_id!r}" + (f", run {run}" if run is not None else "")
    params = (stored.get("input_metadata") or {}).get("completion_params") or {}
    key = (execution.get("experiment_id"), first.row_id, params.get("model"))
    survivors = [row for row in group if not row.failed]
    if not survivors:
        return PromptGroup(
            key=key,
            trajectories=(),
            failed_rows=(failed_message(group),),
            asked=len(group),
            name=name,
        )
    imported = extra.get("rollout_file") or {}
    try:
        fields = record_fields(group, survivors, extra, metadata, first=imported.get("first", 0))
    except RecordError as error:
        raise TrainingDataError(str(error)) from error
    record, segments = training.read_named(name, fields, None, buffer)
    return training.group_of(
        record,
        segments,
        fields["rewards"],
        key=key,
        name=name,
        row_id=first.row_id,
        question=training.question_of(as_messages(first.prompt), first.tools, record.sampling),
    )


def record_fields(
    group: Sequence[CompletionRow],
    survivors: Sequence[CompletionRow],
    stored: Mapping[str, Any],
    metadata: FileMetadata,
    *,
    first: int = 0,
    tokens: Tokens = "arrays",
) -> dict[str, Any]:
    """The keys of a rollout record, the optional ones too.

    Args:
        group: completions of one data row, of one run of it.
        survivors: those that did not fail, one at least.
        stored: what `evaluation_row` has of the record.
        metadata: of their file.
        first: `sample_idx` of the run's first completion.
        tokens: the form of the token data.

    Raises:
        RecordError: nothing says at which temperature they were sampled.
        FormatError: some of them are episodes, and others are not.
    """
    sampling = _sampling_of(stored.get("sampling"), group, metadata)
    for name in (*SAMPLING_BY_PLACE, _ONCE_BY_PLACE):
        if isinstance(values := sampling.get(name), Mapping):
            sampling[name] = [values.get(str(row.sample_idx), []) for row in survivors]
    if any(row.past_end is not None for row in survivors):
        sampling["past_end"] = [
            [] if row.past_end is None else row.past_end.tolist() for row in survivors
        ]
    firsts = [row.first_policy_version for row in survivors]
    scores = [row.scores.get("reward", UNSCORED) for row in survivors]
    first_reasons = [row.first_finish_reason or row.finish_reason for row in survivors]
    return {
        **(_token_data(survivors, tokens) if tokens != "none" else {}),
        "completions_text": [row.response for row in survivors],
        "completion_messages": [row.message for row in survivors],
        "truncated": [
            row.truncated if row.episode is None else reason == "length"
            for row, reason in zip(survivors, first_reasons, strict=True)
        ],
        "finish_reasons": first_reasons,
        "failures": [failure(row, first) for row in group if row.failed],
        "sampling": {
            **sampling,
            "indices": [row.sample_idx - first for row in survivors],
            "seeds": [row.seed for row in survivors],
            "policy_versions": [row.policy_version for row in survivors],
            **({"first_policy_versions": firsts} if any(f is not None for f in firsts) else {}),
            "request_ids": [row.request_id for row in survivors],
            "attempts": [_or(row.attempts, 1) for row in survivors],
            "seconds": [_or(row.seconds, 0.0) for row in survivors],
        },
        "rft_schema": SCHEMA_VERSION,
        "rewards": [score.reward for score in scores],
        "completion_results": [
            {**msgspec.to_builtins(score), "metrics": score.metrics or {}} for score in scores
        ],
        **_episodes_of(survivors, tokens),
    }


def _episodes_of(survivors: Sequence[CompletionRow], tokens: Tokens) -> dict[str, Any]:
    """`episodes` and `trajectories`, where the completions are some."""
    episodes = [row.episode for row in survivors]
    if all(episode is None for episode in episodes):
        return {}
    if None in episodes:
        row = survivors[episodes.index(None)]
        raise FormatError(
            f"data row {row.data_idx}, completion {row.sample_idx}: it is no episode, and others "
            "of its data row are"
        )
    if tokens == "none":
        return {"episodes": episodes}
    trajectories = [row.segments or [] for row in survivors]
    if tokens == "lists":
        trajectories = [list(map(as_lists, segments)) for segments in trajectories]
    return {"trajectories": trajectories, "episodes": episodes}


def _token_data(survivors: Sequence[CompletionRow], tokens: Tokens) -> dict[str, Any]:
    def numbers(array: Any) -> Any:
        return array if tokens == "arrays" or array is None else array.tolist()

    prompt_ids = numbers(survivors[0].prompt_ids)
    ids = [numbers(row.completion_ids) for row in survivors]
    logprobs = [numbers(row.logprobs) for row in survivors]
    first = survivors[0].first_finish_reason or survivors[0].finish_reason
    return {
        "prompt_ids": prompt_ids,
        "completion_ids": ids,
        "inference_logprobs": logprobs,
        "token_turn_traces": [turn_trace(prompt_ids, ids[0], logprobs[0], first)],
    }


def _sampling_of(
    own: Mapping[str, Any] | None, group: Sequence[CompletionRow], metadata: FileMetadata
) -> dict[str, Any]:
    """How the group was sampled, as the record says it, but for the lists per completion."""
    if own is not None:
        return dict(own)
    values: dict[str, Any] = msgspec.to_builtins(metadata.sampling or _settings_of(group))
    for name in _NOT_RECORDED:
        values.pop(name)
    values = file_format.without_news(values)
    began = [row.began_at for row in group if row.began_at is not None]
    return {**values, "n": len(group), "began_at": min(began, default=0.0)}


def _settings_of(group: Sequence[CompletionRow]) -> file_format.SamplingSettings:
    """What the rows themselves say, in a file that does not."""
    first = group[0]
    if first.temperature is None or first.top_p is None or first.top_k is None:
        raise RecordError(
            f"row {first.row_id!r}: neither the file's metadata nor the columns temperature, top_p "
            "and top_k say how it was sampled"
        )
    params = SamplingParams(
        model="unknown", temperature=first.temperature, top_p=first.top_p, top_k=first.top_k
    )
    return file_format.SamplingSettings(
        model=params.model,
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        n=len(group),
        support_truncated=support_truncated(params),
    )


def failure(row: CompletionRow, first: int) -> dict[str, Any]:
    """A failed completion, as the record of a run has it whose completions begin with `first`."""
    return {
        "index": row.sample_idx - first,
        "kind": row.error_kind if row.error_kind in _FAILURE_KINDS else "internal",
        "message": row.error,
        "attempts": _or(row.attempts, 0),
        "seconds": _or(row.seconds, 0.0),
        "seed": row.seed,
        "status": row.error_status,
    }


def failed_message(group: Sequence[CompletionRow]) -> str:
    """What is said of a data row all of whose completions failed."""
    return f"none of {len(group)} completions survived; the first: {group[0].error}"


def as_messages(prompt: str | ChatMessages) -> ChatMessages:
    """A text is what the user says."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def by_prompt(group: Sequence[CompletionRow]) -> list[list[CompletionRow]]:
    """The completions of a data row, apart by the prompt ids that they were sampled behind; in one
    list where these are the same, which they are unless a chat template that says the date rendered
    the row again when its job went on. A failure stands with the completions of its prompt, or with
    the first ones.
    """
    parts: dict[bytes | None, list[CompletionRow]] = {}
    for row in group:
        if not row.failed:
            parts.setdefault(_prompt_key(row), [])
    if len(parts) < 2:
        return [list(group)]
    first = next(iter(parts.values()))
    for row in group:
        parts.get(_prompt_key(row), first).append(row)
    return list(parts.values())


def by_record(group: Sequence[CompletionRow]) -> list[list[CompletionRow]]:
    """The completions of a data row, apart by the rollout record that they can be of: as
    `by_prompt`, and by the run of Eval Protocol that they came from."""
    runs: dict[str | None, list[CompletionRow]] = {}
    for row in group:
        runs.setdefault(row.evaluation_row, []).append(row)
    return [part for run in runs.values() for part in by_prompt(run)]


def _prompt_key(row: CompletionRow) -> bytes | None:
    return None if row.prompt_ids is None else row.prompt_ids.tobytes()
