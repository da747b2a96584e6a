"""Prompt groups from evaluated rows, however they came: each row's rollout record, as what trains,
and the rows of one prompt together.

Invariant: a row is read exactly or refused with its name; a rollout that failed, and a completion
without a score, stay visible as such. An episode of several turns is one trajectory, with one
reward, however many segments it has. n completions in one row, n rows of one completion from
`num_runs`, and any mix of both give the same group. Run and rollout ids play no part: their meaning
differs between Eval Protocol's schedulers. Each completion stands behind the prompt ids that it was
sampled behind, though rows of a group may have different ones.

Rows are `EvaluationRow` objects or the plain dicts of the JSONL that Eval Protocol writes; both are
read by shape, so Eval Protocol is not imported. The token data in `extra` may be lists or arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from eval_protocol_rft import record as form
from eval_protocol_rft import rollout
from eval_protocol_rft._segments import Segment
from eval_protocol_rft._segments import TokenBuffer as TokenBuffer
from eval_protocol_rft._statistics import metric_score
from eval_protocol_rft.record import RolloutRecord, SamplingRecord, Score
from eval_protocol_rft.training._types import (
    PromptGroup,
    TrainingDataError,
    Trajectory,
    reward_problem,
)

if TYPE_CHECKING:
    from eval_protocol.models import EvaluationRow

Row: TypeAlias = "EvaluationRow | Mapping[str, Any]"
"""A row that was rolled out and evaluated, or its JSON."""
GroupKey = Callable[[Row], Hashable]


def group_rows(
    rows: Iterable[Row | PromptGroup], *, key: GroupKey | None = None, tokenizer: Any = None
) -> list[PromptGroup]:
    """Read all rows and put together what belongs to one prompt, in order of appearance.

    Args:
        rows: evaluated rows, as objects or as dicts of Eval Protocol's JSONL; or parts of groups,
            as `RolloutDataset.prompt_groups` reads them, which have a key already.
        key: names the group of a row. Default: experiment id, row id and model. Rows with identical
            content have the same row id, and so share a group.
        tokenizer: of the model, for rows that Eval Protocol's remote processors brought back; see
            `rollout.read_remote_rows`.

    Raises:
        TrainingDataError: a row without an id, record or rewards, or with invalid ones; rows of
            one group that differ in tokenizer, or in what they ask (with the default key).
    """
    groups: dict[Hashable, list[PromptGroup]] = {}
    for part in _parts(rows, key, tokenizer):
        groups.setdefault(part.key, []).append(part)
    return [_joined(parts, same_prompt=key is None) for parts in groups.values()]


def iter_groups(
    rows: Iterable[Row | PromptGroup],
    *,
    key: GroupKey | None = None,
    tokenizer: Any = None,
    completions_per_group: int | None = None,
) -> Iterator[PromptGroup]:
    """As `group_rows`, lazily: holds the groups that are not complete yet, and nothing else.

    Args:
        rows: as for `group_rows`. Without `completions_per_group`, those of one group stand
            together.
        key: names the group of a row.
        tokenizer: as for `group_rows`.
        completions_per_group: a group is complete when that many completions were asked for,
            failed ones included, the surplus of over-sampling not; its rows may then stand
            anywhere. Groups that are still incomplete at the end come last.

    Raises:
        TrainingDataError: as `group_rows`; or a row of a group that was complete already.
    """
    incomplete: dict[Hashable, list[PromptGroup]] = {}
    complete: set[int] = set()  # hashes: keys of a long run would not fit in memory either

    def close(group_key: Hashable) -> PromptGroup:
        complete.add(hash(group_key))
        return _joined(incomplete.pop(group_key), same_prompt=key is None)

    for part in _parts(rows, key, tokenizer):
        if hash(part.key) in complete:
            raise TrainingDataError(_came_late(part, completions_per_group))
        if completions_per_group is None:
            for other in [k for k in incomplete if k != part.key]:
                yield close(other)
        parts = incomplete.setdefault(part.key, [])
        parts.append(part)
        if completions_per_group and sum(p.asked for p in parts) >= completions_per_group:
            yield close(part.key)
    for group_key in list(incomplete):
        yield close(group_key)


def _parts(
    rows: Iterable[Row | PromptGroup], key: GroupKey | None, tokenizer: Any
) -> Iterator[PromptGroup]:
    buffer, remote = TokenBuffer(), rollout.RemoteRows(tokenizer)
    for row in rows:
        if isinstance(row, PromptGroup):
            yield row
            continue
        try:
            exact = remote.read(row)
        except form.RecordError as error:
            raise TrainingDataError(str(error)) from error
        yield read_row(exact, buffer, key=(key or row_key)(row))


def _came_late(part: PromptGroup, completions_per_group: int | None) -> str:
    if completions_per_group is None:
        return (
            f"{part.name} belongs to a group whose rows ended before it: sort the rows by "
            "row id, or pass completions_per_group=, or use group_rows() if they fit in memory"
        )
    return (
        f"{part.name} belongs to a group that had its {completions_per_group} completions "
        "already: completions_per_group must be completions per row times runs"
    )


def _joined(parts: Sequence[PromptGroup], *, same_prompt: bool) -> PromptGroup:
    """One group of what each of its rows has of it."""
    if len(parts) == 1:
        return parts[0]
    sampled = [part for part in parts if part.trajectories]
    if same_prompt:
        _check_prompts(sampled)
    return PromptGroup(
        key=parts[0].key,
        trajectories=tuple(t for part in sampled for t in part.trajectories),
        failures=tuple(f for part in parts for f in part.failures),
        cancelled=sum(part.cancelled for part in parts),
        failed_rows=tuple(message for part in parts for message in part.failed_rows),
        tokenizer=_common_tokenizer(sampled),
        asked=sum(part.asked for part in parts),
        name=parts[0].name,
        question=parts[0].question,
    )


def _common_tokenizer(parts: Sequence[PromptGroup]) -> str | None:
    named = [part for part in parts if part.tokenizer is not None]
    for part in named[1:]:
        if part.tokenizer != named[0].tokenizer:
            raise TrainingDataError(
                f"{named[0].name} was tokenized with {named[0].tokenizer!r}, {part.name} with "
                f"{part.tokenizer!r}: their token ids mean different things"
            )
    return named[0].tokenizer if named else None


def _check_prompts(parts: Sequence[PromptGroup]) -> None:
    """Refuse a group of several questions. One question may have several prompts: chat templates
    that say the date render another one the next day, and each trajectory has its own."""
    prompts = [p.trajectories[0].tokens[: p.trajectories[0].prompt_length] for p in parts]
    for prompt, part in zip(prompts[1:], parts[1:], strict=True):
        if not (
            np.array_equal(prompt, prompts[0]) or same_question(parts[0].question, part.question)
        ):
            raise TrainingDataError(
                f"two rows have the key {part.key!r} but different prompts ({len(prompts[0])} and "
                f"{len(prompt)} tokens), and they do not ask the same by the same chat template: "
                "row ids of Eval Protocol can collide; pass key= to tell them apart"
            )


def field_of(value: Any, name: str) -> Any:
    """Attribute or key `name`, None where there is neither."""
    return value.get(name) if isinstance(value, Mapping) else getattr(value, name, None)


def row_key(row: Row) -> tuple[str | None, str, str | None]:
    """(experiment id, row id, model): the same for every run of a row, and for no other row. A
    groupwise test has the answers of several models to a row in one experiment.

    Raises:
        TrainingDataError: the row has no id.
    """
    asked = field_of(row, "input_metadata")
    row_id = field_of(asked, "row_id")
    if row_id is None:
        raise TrainingDataError(
            "a row has no input_metadata.row_id, so its prompt group is unknown: pass key= with a "
            "function that names the group of a row"
        )
    model = field_of(field_of(asked, "completion_params"), "model")
    return field_of(field_of(row, "execution_metadata"), "experiment_id"), row_id, model


def read_row(row: Row, buffer: TokenBuffer, *, key: Hashable = None) -> PromptGroup:
    """Read the rollout record and the scores of one row: what it has of its prompt group.

    Raises:
        TrainingDataError: no record, an invalid one, no scores at all, or a score that is no
            number; the message names row and completion.
    """
    name = _name(row)
    asked = field_of(row, "input_metadata")
    params = field_of(asked, "completion_params")
    status = field_of(row, "rollout_status")
    if form.is_failure(field_of(status, "code")):
        n = field_of(params, "n")
        message = str(field_of(status, "message"))
        asked_for = n if isinstance(n, int) else 1
        return PromptGroup(
            key=key, trajectories=(), failed_rows=(message,), asked=asked_for, name=name
        )
    extra = field_of(field_of(row, "execution_metadata"), "extra") or {}
    record, segments = read_named(name, extra, params, buffer)
    messages = _asked_messages(row, record)
    return group_of(
        record,
        segments,
        _rewards(row, record, name),
        key=key,
        name=name,
        row_id=field_of(asked, "row_id"),
        question=question_of(messages, field_of(row, "tools"), record.sampling),
    )


def read_named(
    name: str,
    extra: Mapping[str, Any],
    params: Mapping[str, Any] | None,
    buffer: TokenBuffer,
) -> tuple[RolloutRecord, list[tuple[Segment, ...]]]:
    """`read_record`, but for token data that nothing trains on. What is wrong is a
    `TrainingDataError` that begins with `name`."""
    try:
        trained = {key: value for key, value in extra.items() if key not in _NOT_TRAINED}
        return form.read_record(trained, params, buffer)
    except form.RecordError as error:
        place = str(error)
        joint = ", " if place.startswith("completion ") else ": "
        raise TrainingDataError(name + joint + place) from error


def group_of(
    record: RolloutRecord,
    segments: Sequence[tuple[Segment, ...]],
    rewards: Sequence[float | None],
    *,
    key: Hashable,
    name: str,
    row_id: str | None,
    question: tuple[Any, ...] | None,
) -> PromptGroup:
    """What a record has of its prompt group.

    Args:
        record: what was rolled out.
        segments: [G] of each completion, as `read_record` gives them.
        rewards: [G]
        key: of the group.
        name: how messages call the record.
        row_id: of its row.
        question: see `question_of`.

    Raises:
        TrainingDataError: a reward is no number.
    """
    sampling, firsts = record.sampling, record.sampling.first_policy_versions
    results: Sequence[Score | None] = record.completion_results or [None] * len(record)
    finish_reasons = record.last_finish_reasons
    bias = _bias(sampling)
    trajectories = []
    for i, ((first, *more), reward) in enumerate(zip(segments, rewards, strict=True)):
        if problem := reward_problem(reward):
            raise TrainingDataError(f"{name}, completion {sampling.indices[i]}: {problem}")
        trajectories.append(
            Trajectory(
                tokens=first.tokens,
                logprobs=first.logprobs,
                loss_mask=first.loss_mask,
                more=tuple(more),
                reward=reward,
                score_error=_score_error(results[i]) if reward is None else None,
                components=_components(results[i]),
                finish_reason=finish_reasons[i],
                model=sampling.model,
                policy_version=sampling.policy_versions[i],
                first_policy_version=firsts[i] if firsts else None,
                row_id=row_id,
                completion=sampling.indices[i],
                greedy=sampling.temperature == 0,
                bias=bias,
                routing_matrices=first.routing_matrices,
                prompt_length=first.prompt_length,
                num_sampled=first.num_sampled,
            )
        )
    return PromptGroup(
        key=key,
        trajectories=tuple(trajectories),
        failures=tuple(record.failures),
        cancelled=len(sampling.cancelled),
        tokenizer=sampling.tokenizer,
        asked=sampling.n,
        name=name,
        question=question,
    )


def question_of(messages: Sequence[Any], tools: Any, sampling: SamplingRecord) -> tuple[Any, ...]:
    """What a prompt is made of: the same question may be rendered differently another day.

    Args:
        messages: those that were there before anything was sampled.
        tools: that were rendered into the prompt.
        sampling: says by which chat template.
    """
    if sampling.prompts == "agent":
        return _ASKED_BY_AGENT
    return messages, tools, sampling.chat_template_hash, sampling.chat_template_kwargs


_ASKED_BY_AGENT = ([{"role": "agent"}], None, None, None)
"""What an agent asks, it makes of the row anew each time: one question, as the row is one."""


def same_question(one: tuple[Any, ...] | None, other: tuple[Any, ...] | None) -> bool:
    """Whether both ask the same by the same template; no messages are no question."""
    if not one or not other or not one[0]:
        return False
    messages, tools, *template = one
    others, other_tools, *other_template = other
    return (
        template == other_template
        and plain(tools) == plain(other_tools)
        and list(map(plain_message, messages)) == list(map(plain_message, others))
    )


def _score_error(result: Score | None) -> str | None:
    parts = [] if result is None else [part for part in (result.error, result.reason) if part]
    return ": ".join(dict.fromkeys(parts)) or None


def _asked_messages(row: Row, record: RolloutRecord) -> Sequence[Any]:
    """The row's messages without the answer, or the episode, that its rollout put behind them."""
    messages: Sequence[Any] = field_of(row, "messages") or []
    if record.episodes:
        return messages[: record.episodes[0].row_messages]
    answered = len(messages) and field_of(messages[-1], "role") == "assistant"
    return messages[:-1] if answered else messages


_NOT_TRAINED = frozenset({"raw_logprobs", "token_turn_traces", "assistant_turn_payloads"})
"""Keys of `extra` that hold token data and that no datum is made of."""
_MESSAGE_KEYS = (
    "role",
    "content",
    "reasoning_content",
    "name",
    "tool_calls",
    "tool_call_id",
    "function_call",
)


def plain_message(message: Any) -> dict[str, Any]:
    """A message of Eval Protocol, or its JSON, as plain JSON without empty fields."""
    fields = {name: field_of(message, name) for name in _MESSAGE_KEYS}
    return {name: plain(value) for name, value in fields.items() if value is not None}


def plain(value: Any) -> Any:
    """Plain JSON of what Eval Protocol's models hold, without their empty fields."""
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json", exclude_none=True)
    if isinstance(value, Mapping):
        return {name: plain(item) for name, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def _name(row: Row) -> str:
    row_id = field_of(field_of(row, "input_metadata"), "row_id")
    extra = field_of(field_of(row, "execution_metadata"), "extra") or {}
    run = extra.get("run_index")
    return f"row {row_id!r}" + (f", run {run}" if run is not None else "")


def _rewards(row: Row, record: RolloutRecord, name: str) -> list[float | None]:
    """[G] one per completion; a row of one completion may carry it as its evaluation result."""
    rewards = record.rewards
    if rewards is None:
        result = field_of(row, "evaluation_result")
        if result is None or len(record) != 1:
            raise TrainingDataError(
                f"{name}: {len(record)} completions without rewards. Put @score_each_completion "
                "under @evaluation_test, or score the rows with score_rows()"
            )
        rewards = [form.result_score(result)]
    return rewards


def _components(result: Score | None) -> dict[str, float | None]:
    """The metrics that are scores: a number, or an object with `score` and `is_score_valid`."""
    if result is None or not result.metrics:
        return {}
    scores: dict[str, float | None] = {}
    for name, metric in result.metrics.items():
        score = metric_score(metric)
        if reward_problem(score) is None:
            scores[name] = score
    return scores


def _bias(sampling: SamplingRecord) -> str | None:
    if sampling.temperature == 0:
        return "temperature=0: greedy completions are no samples"
    if sampling.support_truncated:
        return f"truncated support (top_p={sampling.top_p}, top_k={sampling.top_k})"
    if sampling.logprobs == "unknown" and sampling.temperature not in (None, 1):
        return (
            f"temperature={sampling.temperature}, and the proxy that the logprobs came from does "
            "not say whether it is in them"
        )
    return None
