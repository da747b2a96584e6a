"""The rollout record of a data row's completions, as plain values. Pure.

Invariant: a record says what the columns say; where they say nothing, neither does it.

What a row of Eval Protocol carries for the rollout file, beside its rollout record:
`extra["rollout_file"]`. Pure.

Invariant: it is believed only while it is about the completions that are on the row.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import msgspec
import numpy as np

from eval_protocol_rft._episode_record import turn_runs
from eval_protocol_rft.data.rollouts._format import (
    DataSettings,
    FileMetadata,
    PromptKind,
    RewardSettings,
    SamplingSettings,
)
from eval_protocol_rft.data.rollouts._rows import UNSCORED, CompletionRow, Score
from eval_protocol_rft.record import SCHEMA_VERSION, RecordError, has_record, result_score
from eval_protocol_rft.sampling import FailureKind, FinishReason, SamplingParams, support_truncated

OPTIONAL_KEYS = (
    "failures",
    "token_turn_traces",
    "assistant_turn_payloads",
    "raw_logprobs",
    "rewards",
    "completion_results",
)
"""Keys that a record may be without."""
EPISODE_KEYS = ("trajectories", "episodes")
"""Lists per completion that no column holds: they travel in `evaluation_row`, by place."""
SAMPLING_BY_PLACE = ("retry_causes",)
"""The same of `sampling`: lists of lists, empty where there is nothing to say."""
_ONCE_BY_PLACE = "past_end"
"""In files from before it was a column."""
_NOT_RECORDED = ("model_fingerprint", "system", "seed_given")
_FAILURE_KINDS = frozenset(get_args(FailureKind))


def sampling_of(
    own: Mapping[str, Any] | None, group: Sequence[CompletionRow], metadata: FileMetadata
) -> dict[str, Any]:
    """How the group was sampled, as the record says it, but for the lists per completion."""
    if own is not None:
        return dict(own)
    settings = metadata.sampling or _settings_of(group)
    values: dict[str, Any] = msgspec.to_builtins(settings)
    for name in _NOT_RECORDED:
        values.pop(name)
    began = [row.began_at for row in group if row.began_at is not None]
    return {**values, "n": len(group), "began_at": min(began, default=0.0)}


def _settings_of(group: Sequence[CompletionRow]) -> SamplingSettings:
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
    return SamplingSettings(
        model=params.model,
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        n=len(group),
        support_truncated=support_truncated(params),
    )


def record_of(
    group: Sequence[CompletionRow],
    survivors: Sequence[CompletionRow],
    sampling: Mapping[str, Any],
    keys: Sequence[str] | None,
    *,
    arrays: bool,
) -> dict[str, Any]:
    """The keys of a rollout record; of an imported row, those among the optional ones that it had
    or that now have something to say."""

    def numbers(array: Any) -> Any:
        return array if arrays or array is None else array.tolist()

    prompt_ids = numbers(survivors[0].prompt_ids)
    told = dict(sampling)
    for name in (*SAMPLING_BY_PLACE, _ONCE_BY_PLACE):
        if isinstance(values := told.get(name), Mapping):
            told[name] = [values.get(str(row.sample_idx), []) for row in survivors]
    firsts = [row.first_policy_version for row in survivors]
    if any(row.past_end is not None for row in survivors):
        told["past_end"] = [
            [] if row.past_end is None else row.past_end.tolist() for row in survivors
        ]
    ids = [numbers(row.completion_ids) for row in survivors]
    logprobs = [numbers(row.logprobs) for row in survivors]
    record: dict[str, Any] = {
        "prompt_ids": prompt_ids,
        "completion_ids": ids,
        "inference_logprobs": logprobs,
        "completions_text": [row.response for row in survivors],
        "completion_messages": [row.message for row in survivors],
        "truncated": [row.truncated for row in survivors],
        "finish_reasons": [row.finish_reason for row in survivors],
        "failures": [failure(row) for row in group if row.failed],
        "token_turn_traces": [trace(prompt_ids, ids[0], logprobs[0], survivors[0].finish_reason)],
        "sampling": {
            **told,
            "indices": [row.sample_idx for row in survivors],
            "seeds": [row.seed for row in survivors],
            "policy_versions": [row.policy_version for row in survivors],
            **({"first_policy_versions": firsts} if any(f is not None for f in firsts) else {}),
            "request_ids": [row.request_id for row in survivors],
            "attempts": [_or(row.attempts, 1) for row in survivors],
            "seconds": [_or(row.seconds, 0.0) for row in survivors],
        },
        "rft_schema": SCHEMA_VERSION,
        "raw_logprobs": [numbers(row.raw_logprobs) for row in survivors],
        **_scores(survivors),
    }
    said = {
        "failures": any(row.failed for row in group),
        "token_turn_traces": False,
        "completion_messages": any(row.message is not None for row in survivors),
        "raw_logprobs": any(row.raw_logprobs is not None for row in survivors),
        "rewards": any("reward" in row.scores for row in survivors),
        "completion_results": any(_explained(row) for row in survivors),
    }
    if keys is None:
        keys = ["failures", "token_turn_traces"]
        said["completion_results"] = said["rewards"]
    return {k: v for k, v in record.items() if said.get(k, True) or k in keys}


def trace(prompt_ids: Any, ids: Any, logprobs: Any, finish_reason: str | None) -> dict[str, Any]:
    """The one turn that a completion was."""
    return {
        "prompt_ids": prompt_ids,
        "completion_ids": ids,
        "completion_logprobs": logprobs,
        "finish_reason": finish_reason,
    }


def episode_traces(
    trajectory: Sequence[Mapping[str, Any]], last: FinishReason
) -> list[dict[str, Any]]:
    """The turns of an episode: each run of sampled tokens, behind all of its segment before it.

    Args:
        trajectory: its segments, as the record has them.
        last: finish reason of its last turn.
    """
    traces = []
    for segment in trajectory:
        for sampled, start, stop in turn_runs(segment["loss_mask"]):
            if sampled:
                ids, logprobs = segment["tokens"][start:stop], segment["logprobs"][start:stop]
                traces.append(trace(segment["tokens"][:start], ids, logprobs, "stop"))
    traces[-1]["finish_reason"] = last
    return traces


def _scores(survivors: Sequence[CompletionRow]) -> dict[str, Any]:
    scores = [row.scores.get("reward", UNSCORED) for row in survivors]
    return {
        "rewards": [score.reward for score in scores],
        "completion_results": [
            {
                "score": score.reward,
                "reason": score.reason,
                "metrics": score.metrics or {},
                "error": score.error,
            }
            for score in scores
        ],
    }


def score_of_result(result: Mapping[str, Any]) -> Score:
    """What an `evaluation_result` says of a row's only completion: the evaluator judged the row as
    it is, and left no rewards in the record."""
    reward = result_score(result)
    error = None if reward is not None else "the evaluator marked the score as invalid"
    return Score(reward=reward, reason=result.get("reason"), error=error)


def _explained(row: CompletionRow) -> bool:
    score = row.scores.get("reward", UNSCORED)
    return not (score.reason is None and score.error is None and not score.metrics)


def failure(row: CompletionRow) -> dict[str, Any]:
    """A failed completion."""
    return {
        "index": row.sample_idx,
        "kind": row.error_kind if row.error_kind in _FAILURE_KINDS else "internal",
        "message": row.error,
        "attempts": _or(row.attempts, 0),
        "seconds": _or(row.seconds, 0.0),
        "seed": row.seed,
        "status": row.error_status,
    }


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


FILE_KEY = "rollout_file"
"""Key of `extra`. Inside the column `evaluation_row` it holds something else: see `Imported`."""
Trajectories = Sequence[Sequence[Mapping[str, Any]]]
"""[G][S_i] segments, as a record has them."""
_EXTRAS = ("began_at", "temperature", "top_p", "top_k", "max_tokens")


class FileWide(msgspec.Struct, frozen=True, kw_only=True):
    """What the file says of all its rows; see `FileMetadata`."""

    prompt_kind: PromptKind
    sampling: SamplingSettings | None = None
    data: DataSettings | None = None
    rewards: dict[str, RewardSettings] = {}


class FilePart(msgspec.Struct, frozen=True, kw_only=True):
    """What the record has no place for."""

    data_idx: int
    generated: bool
    """The columns hold all of the row; False where it came from Eval Protocol."""
    has_original: bool
    """`input_metadata.dataset_info` is the data set's columns."""
    file: FileWide
    tokens: int
    """`token_checksum` of the surviving completions, of all turns of those that are episodes."""
    survived: list[dict[str, Any]]
    """Of each survivor, the columns that a record holds once for all of them, or not at all."""
    failed: list[dict[str, Any]]
    """As in the record, with the same columns and the prompt's ids."""
    scores: dict[str, list[Score]]
    """Further reward columns, by survivor."""


class Imported(msgspec.Struct, frozen=True, kw_only=True):
    """What `evaluation_row` says of the record that its row had."""

    keys: list[str]
    """Which optional keys the record had."""
    answer: int | None
    """`sample_idx` of the completion that is the last message, or of the episode that is the row's
    conversation; None where it is none's."""


def file_part(
    group: Sequence[CompletionRow],
    survivors: Sequence[CompletionRow],
    metadata: FileMetadata,
    trajectories: Trajectories | None,
) -> dict[str, Any]:
    """A `FilePart`, as plain values. `trajectories` are the survivors' where they are episodes."""
    others = sorted({name for row in group for name in row.scores if name != "reward"})
    part = FilePart(
        data_idx=group[0].data_idx,
        generated=group[0].evaluation_row is None,
        has_original=bool(group[0].original),
        file=FileWide(
            prompt_kind=metadata.prompt_kind,
            sampling=metadata.sampling,
            data=metadata.data,
            rewards=metadata.rewards,
        ),
        tokens=token_checksum([row.completion_ids for row in survivors], trajectories),
        survived=[_extras(row) for row in survivors],
        failed=[{**failure(row), **_extras(row)} for row in group if row.failed],
        scores={name: [row.scores.get(name, UNSCORED) for row in survivors] for name in others},
    )
    values: dict[str, Any] = msgspec.to_builtins(part)
    return values


def read_file_part(extra: Mapping[str, Any]) -> FilePart | None:
    """What `to_row` left in the row of a file; None where it did not, or where the row was rolled
    out anew since.

    Raises:
        RecordError: it is broken.
    """
    if extra.get(FILE_KEY) is None:
        return None
    try:
        part = msgspec.convert(extra[FILE_KEY], FilePart)
    except msgspec.ValidationError as error:
        raise RecordError(f"broken {FILE_KEY!r} in extra: {error}") from error
    is_survived = has_record(extra)
    ids = extra["completion_ids"] if is_survived else []
    trajectories = extra.get("trajectories") if is_survived else None
    return part if token_checksum(ids, trajectories) == part.tokens else None


def token_checksum(completions: Sequence[Any], trajectories: Trajectories | None) -> int:
    """Of the ids of all completions [G][T_i], and of all segments where they are episodes."""
    checksum = 0
    segments = (segment["tokens"] for episode in trajectories or () for segment in episode)
    for ids in (*completions, *segments):
        checksum = zlib.crc32(np.asarray(ids, "<i4").tobytes(), checksum)
    return checksum


def _extras(row: CompletionRow) -> dict[str, Any]:
    extras = {name: getattr(row, name) for name in _EXTRAS if getattr(row, name) is not None}
    if row.failed:
        extras["kind"] = row.error_kind
        extras["prompt_ids"] = None if row.prompt_ids is None else row.prompt_ids.tolist()
    # A record has no way to say that these are not known.
    return extras | {name: None for name in ("attempts", "seconds") if getattr(row, name) is None}
