"""From a sampled group to what is on the row: message, usage and record, in one step, and request
settings without credentials.

Invariant: everything is built before the first assignment, so a row never holds half of it; keys of
`extra` that are not ours stay, and a row that is rolled out again has one answer. A credential is
left out, never masked: a masked value would be sent as if it were the key when the stored settings
are used again; an absent one is looked up anew.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from eval_protocol_rft import sampling
from eval_protocol_rft._segments import turn_trace
from eval_protocol_rft._text import without_url_users
from eval_protocol_rft._turn_payloads import turn_payloads
from eval_protocol_rft.local import LoadedTokenizer
from eval_protocol_rft.record import RecordError, RolloutRecord, SamplingRecord
from eval_protocol_rft.rollout import _answers
from eval_protocol_rft.rollout._params import RolloutRequest
from eval_protocol_rft.rollout._prompts import rendered_otherwise

if TYPE_CHECKING:
    from eval_protocol.models import EvaluationRow, Message

_T = TypeVar("_T")
ASKED_KEY = "row_messages"
"""In `extra`: the row's own messages, where an agent's conversation stands in their place that does
not begin with them."""
_OWN_KEYS = frozenset(RolloutRecord.__struct_fields__)


def commit_group(
    row: EvaluationRow,
    group: sampling.Group,
    *,
    messages: Sequence[Message],
    prompt: sampling.TokenIds,
    request: RolloutRequest,
    tokenizer: LoadedTokenizer,
    split_reasoning: bool,
    began_at: float,
    seconds: float,
    stragglers: sampling.StragglerPolicy = sampling.WAIT_FOR_ALL,
) -> None:
    """Put the group on its row. `messages` are the ones that were rendered, with the row's tools;
    the first survivor follows them as the assistant's. `stragglers` is what the group was sampled
    with. An answer to raw text is plain text: no template says how its model thinks or calls."""
    reader = None
    if not request.raw:
        reader = _answers.AnswerReader(
            prompt, tokenizer, tools=row.tools, split_reasoning=split_reasoning
        )
    record = build_record(
        group,
        prompt,
        request,
        tokenizer,
        reader=reader,
        asked=messages,
        split_reasoning=split_reasoning and not request.raw,
        began_at=began_at,
        stragglers=stragglers,
    )
    answer = _first_answer(record)
    put_on_row(
        row,
        record,
        [*messages, answer],
        prompt_tokens=len(prompt) * len(record),
        completion_tokens=sum(map(len, record.completion_ids)),
        finish_reason=record.finish_reasons[0],
        tool_calls=len(answer.tool_calls or []),
        seconds=seconds,
    )


def _first_answer(record: RolloutRecord) -> Message:
    """The assistant's message of the first completion."""
    split = record.sampling.split_reasoning
    texts, messages = record.completions_text, record.completion_messages
    (answer,) = _answers.recorded_answers(
        texts[:1], messages and messages[:1], split_reasoning=split
    )
    return _answers.as_message(answer)


def put_on_row(
    row: EvaluationRow,
    record: RolloutRecord,
    messages: list[Message],
    *,
    prompt_tokens: int,
    completion_tokens: int,
    finish_reason: sampling.FinishReason,
    tool_calls: int,
    seconds: float,
) -> None:
    """Put a record on its row, in one step: messages, `extra`, usage and what Eval Protocol's own
    processors say of a rollout. Keys of `extra` that are not of the record stay.

    Args:
        messages: of the whole row, those to answer included.
        prompt_tokens, completion_tokens: as they were sent and sampled, over all completions.
        finish_reason: of the last answer in `messages`.
        tool_calls: in them.
        seconds: that the rollout took.
    """
    from openai.types import CompletionUsage

    usage = CompletionUsage(
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        total_tokens=prompt_tokens + completion_tokens,
    )
    metadata = row.execution_metadata
    # A row that was rolled out before may carry an older record, scores included: not of these.
    foreign = {k: v for k, v in (metadata.extra or {}).items() if k not in _OWN_KEYS}
    extra = {**foreign, **_with_payloads(record, messages)}
    reason = _answers.chat_finish_reason(finish_reason, messages[-1].tool_calls)

    row.messages = messages
    metadata.extra = extra
    metadata.usage = usage
    metadata.finish_reason = reason
    metadata.tool_call_count = tool_calls
    metadata.rollout_duration_seconds = seconds


def _with_payloads(record: RolloutRecord, messages: Sequence[Message]) -> dict[str, Any]:
    """The record as it goes into `extra` of a row with these messages."""
    extra = record.to_extra()
    payloads = turn_payloads(extra["token_turn_traces"], messages)
    return {**extra, "assistant_turn_payloads": payloads}


def messages_to_answer(row: EvaluationRow, *, drop_trailing_assistant: bool) -> list[Message]:
    """The row's messages up to where the assistant is to speak: never with the answer that an
    earlier rollout of this very row left (Eval Protocol rolls out a row again as it finds it), and
    without the trailing assistant messages of the data set if they are to be dropped."""
    messages = _before_episodes(row)
    if not drop_trailing_assistant:
        return messages[:-1] if _is_answered(row) else messages
    while messages and messages[-1].role == "assistant":
        messages.pop()
    return messages


def _before_episodes(row: EvaluationRow) -> list[Message]:
    """The row's messages without the episode that an earlier rollout put behind them."""
    messages = list(row.messages)
    extra = row.execution_metadata.extra or {}
    episodes = extra.get("episodes")
    if not episodes or not isinstance(episodes, list) or not isinstance(episodes[0], dict):
        return messages
    first = episodes[0]
    if len(first.get("messages") or ()) != len(messages):
        return messages  # the caller has put others there
    if extra.get(ASKED_KEY):
        return [type(messages[0])(**message) for message in extra[ASKED_KEY]]
    return messages[: first.get("row_messages")]


def _is_answered(row: EvaluationRow) -> bool:
    """Whether the last message is the answer that the record on the row tells of."""
    try:
        record = RolloutRecord.from_extra(row.execution_metadata.extra)
    except RecordError:
        return False
    last = row.messages[-1] if row.messages else None
    return last is not None and _answers.is_same_answer(last, _first_answer(record))


def first_policy_versions(completions: Sequence[sampling.Completion]) -> list[str | None]:
    """As the record has them: [G], or empty where no completion spans several versions."""
    return _if_any([completion.first_policy_version for completion in completions])


def _if_any(values: list[_T]) -> list[_T]:
    """What the record keeps of a list that mostly says nothing: all of it, or none."""
    return values if any(values) else []


def build_record(
    group: sampling.Group,
    prompt: sampling.TokenIds,
    request: RolloutRequest,
    tokenizer: LoadedTokenizer,
    *,
    reader: _answers.AnswerReader | None,
    asked: Sequence[Message],
    split_reasoning: bool,
    began_at: float,
    stragglers: sampling.StragglerPolicy = sampling.WAIT_FOR_ALL,
) -> RolloutRecord:
    """The record of a group with at least one survivor, completions as `LoadedTokenizer.read` gives
    them; without a `reader` it holds no messages."""
    params, survivors = request.params, group.survivors
    completions = [survivor.completion for survivor in survivors]
    texts = [completion.text or "" for completion in completions]
    messages = [reader.read_to_record(text) for text in texts] if reader else []
    prompt_ids = list(prompt)
    raw = [completion.raw_logprobs for completion in completions]
    first = completions[0]
    return RolloutRecord(
        prompt_ids=prompt_ids,
        completion_ids=[completion.token_ids for completion in completions],
        inference_logprobs=[completion.logprobs for completion in completions],
        completions_text=texts,
        completion_messages=messages if any(messages) else None,
        truncated=[completion.truncated for completion in completions],
        finish_reasons=[completion.finish_reason for completion in completions],
        raw_logprobs=raw if any(values is not None for values in raw) else None,
        failures=group.failures,
        token_turn_traces=[
            turn_trace(prompt_ids, first.token_ids, first.logprobs, first.finish_reason)
        ],
        sampling=SamplingRecord(
            model=params.model,
            tokenizer=tokenizer.name,
            chat_template_hash=None if request.raw else tokenizer.chat_template_hash,
            raw=request.raw,
            add_special_tokens=request.add_special_tokens,
            chat_template_kwargs=redact_params(request.chat_template_kwargs),
            rendered_as=rendered_otherwise(asked, tokenizer),
            temperature=params.temperature,
            top_p=params.top_p,
            top_k=params.top_k,
            max_tokens=params.max_tokens,
            stop=list(params.stop),
            n=request.n,
            seed=request.seed,
            began_at=began_at,
            indices=[survivor.index for survivor in survivors],
            seeds=[survivor.seed for survivor in survivors],
            policy_versions=[completion.policy_version for completion in completions],
            first_policy_versions=first_policy_versions(completions),
            past_end=_if_any([completion.past_end for completion in completions]),
            request_ids=[completion.request_id for completion in completions],
            attempts=[survivor.attempts for survivor in survivors],
            seconds=[survivor.seconds for survivor in survivors],
            retry_causes=_if_any([list(survivor.causes) for survivor in survivors]),
            over_sample=stragglers.over_sample,
            cancelled=group.cancelled,
            straggler_seconds=stragglers.straggler_seconds,
            support_truncated=sampling.support_truncated(params),
            split_reasoning=split_reasoning,
            other=redact_params(params.extra),
        ),
    )


SECRET_KEYS = frozenset(
    {
        "access_key",
        "api_key",
        "apikey",
        "auth",
        "authentication",
        "authorization",
        "bearer",
        "cookie",
        "cookies",
        "credential",
        "credentials",
        "headers",
        "jwt",
        "passphrase",
        "passwd",
        "password",
        "private_key",
        "secret",
        "secrets",
        "subscription_key",
    }
)
"""Words that make a key a credential wherever they stand in it: `X-Api-Key`, `awsAccessKeyId`.
Headers go as a whole: a gateway's secret may stand under any name."""

VOCABULARY_TOKENS = frozenset(
    {"bos", "cls", "end", "eos", "image", "mask", "pad", "sep", "start", "stop", "unk"}
)
"""`<word>_token` names a token of a vocabulary after these; after anything else, a credential."""

_WORD_START = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
_NOT_A_WORD = re.compile(r"[^a-z0-9]+")


def is_secret_key(key: str) -> bool:
    """True where `key` names a credential, whatever its spelling (`apiKey`, `X-API-Key`)."""
    words = _NOT_A_WORD.sub("_", _WORD_START.sub("_", key).lower()).strip("_")
    if any(f"_{secret}_" in f"_{words}_" for secret in SECRET_KEYS):
        return True
    *before, last = words.split("_")
    return last == "token" and not VOCABULARY_TOKENS.intersection(before)


def redact_params(params: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of request settings without credentials; `params` stays as it is.

    Goes through nested mappings and sequences (`extra_headers`, `extra_body`) and through strings
    that hold a JSON object, and cuts `user:password@` out of URLs. Containers are new, other
    values are shared.
    """
    return {key: _clean(value) for key, value in params.items() if not is_secret_key(str(key))}


def _clean(value: Any) -> Any:
    if isinstance(value, Mapping):
        return redact_params(value)
    if isinstance(value, list | tuple):
        return [_clean(item) for item in value]
    if isinstance(value, str):
        return _clean_text(value)
    return value


def _clean_text(text: str) -> str:
    if text.lstrip().startswith("{"):
        try:
            parsed = json.loads(text)
        except ValueError:
            return text
        cleaned = redact_params(parsed)
        return text if cleaned == parsed else json.dumps(cleaned)
    return without_url_users(text)
