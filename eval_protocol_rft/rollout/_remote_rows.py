"""Rows that Eval Protocol's remote processors brought back (`RemoteRolloutProcessor` with
`include_payloads=True`), given the record of an episode: one trajectory, exact to the token.

Invariant: a turn is trained on where its ids are those of the message that the agent got, and the
row is refused otherwise. Eval Protocol puts traces and messages together by their number of
assistant messages alone, so a client's retry, or a sub-agent, can hand a message the ids of another
answer: what the ids decode to is therefore read as a chat server reads it, and compared with what
the message says and calls. Without the tokenizer that cannot be done, and the row is refused too.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar, cast

import msgspec

from eval_protocol_rft import record as form
from eval_protocol_rft import sampling
from eval_protocol_rft._segments import EpisodeRecord, turn_trace
from eval_protocol_rft._turn_payloads import (
    PAYLOADS_KEY,
    REMOTE_KEYS,
    RemoteTurn,
    has_remote_turns,
    remote_segments,
    remote_turns,
)
from eval_protocol_rft.local import LoadedTokenizer, TokenizerError
from eval_protocol_rft.record import RecordError, RolloutRecord, SamplingRecord
from eval_protocol_rft.rollout import _answers
from eval_protocol_rft.rollout._backends import Backends
from eval_protocol_rft.rollout._params import RolloutRequest, model_name
from eval_protocol_rft.rollout._remote_answers import Reading, TurnReader

if TYPE_CHECKING:
    from eval_protocol.models import EvaluationRow

GATEWAY_KEY = "gateway"
"""Of `extra`: what our gateway says of the session, as an episode's metrics."""

Row = TypeVar("Row", bound="EvaluationRow | Mapping[str, Any]")
RowMessages = Callable[[Any], int]


def read_remote_rows(
    rows: Iterable[Row],
    *,
    tokenizer: Any = None,
    row_messages: int | RowMessages | None = None,
    on_refused: Callable[[Row, RecordError], None] | None = None,
) -> Iterator[Row]:
    """Rows with a rollout record where Eval Protocol's remote processors left payloads; others, and
    those whose rollout failed, as they are. `build_batch` and `ep-rft convert` do this by
    themselves.

    Args:
        rows: as objects, or as dicts of Eval Protocol's JSONL; they are not changed.
        tokenizer: folder, hub id or tokenizer of the model; or a mapping from the names of models
            to them. Default: "tokenizer" of a row's completion_params, or what their "model" has.
        row_messages: how many of a row's messages were there before the rollout, or a function of
            the row that says so; needed where there are assistant messages among them. Default:
            those before its first assistant message.
        on_refused: is told of a row that is refused, which is then left out; None: that is raised.

    Raises:
        RecordError: a turn is missing, doubled, out of order, not whole, or not that of the
            message; or the tokenizer is not known. The message names row, turn and token.
    """
    reader = RemoteRows(tokenizer, row_messages=row_messages)
    for row in rows:
        try:
            read = reader.read(row)
        except RecordError as error:
            if on_refused is None:
                raise
            on_refused(row, error)
            continue
        yield read


def fetch_payloads(rows: Iterable[Row], *, model_base_url: str | None = None) -> Iterator[Row]:
    """Rows with the payloads that a tracing proxy has of their rollouts, where they brought none:
    `GithubActionRolloutProcessor` asks for none, nor does `RemoteRolloutProcessor` without
    `include_payloads`. Others, and those whose rollout failed, as they are.

    Args:
        rows: as objects, or as dicts of Eval Protocol's JSONL; they are not changed.
        model_base_url: of the proxy; default what `EP_MODEL_BASE_URL` says, else Fireworks'. Its
            key is `EP_REMOTE_API_KEY`, else `FIREWORKS_API_KEY`.

    Raises:
        RecordError: the proxy has nothing of a rollout, or another conversation.
    """
    from eval_protocol.pytest.tracing_utils import default_fireworks_output_data_loader
    from eval_protocol.types.remote_rollout_processor import DataLoaderConfig

    base_url = model_base_url or os.environ.get("EP_MODEL_BASE_URL")
    for row in rows:
        metadata = _field(row, "execution_metadata")
        extra = _field(metadata, "extra") or {}
        failed = form.is_failure(_field(_field(row, "rollout_status"), "code"))
        if failed or form.has_record(extra) or extra.get(PAYLOADS_KEY):
            yield row
            continue
        rollout_id = str(_field(metadata, "rollout_id"))
        config = DataLoaderConfig(
            rollout_id=rollout_id, model_base_url=base_url, include_payloads=True
        )
        results = default_fireworks_output_data_loader(config).load()
        found = [one for result in results for one in result.rows]
        if not found:
            raise RecordError(f"{_name(row, extra)}: the proxy has nothing of rollout {rollout_id}")
        if list(map(_plain, found[0].messages)) != list(map(_plain, _field(row, "messages") or ())):
            raise RecordError(
                f"{_name(row, extra)}: what the proxy has of rollout {rollout_id} is another "
                "conversation than the row's: the agent went on, or the rollout began anew"
            )
        brought = found[0].execution_metadata.extra or {}
        yield cast("Row", _with_extra(row, metadata, {**extra, **brought}))


class RemoteRows:
    """`read_remote_rows`, row by row; tokenizers are looked up once."""

    def __init__(
        self, tokenizer: Any = None, *, row_messages: int | RowMessages | None = None
    ) -> None:
        self._backends = Backends(tokenizer=tokenizer, sampler=None, trust_remote_code=False)
        self._row_messages = row_messages
        self._tokenizers: dict[tuple[str, str | None], LoadedTokenizer] = {}

    def read(self, row: Row) -> Row:
        """The row with its record; itself where it has none to get."""
        metadata = _field(row, "execution_metadata")
        extra = _field(metadata, "extra")
        if not has_remote_turns(extra):
            return row
        if form.is_failure(_field(_field(row, "rollout_status"), "code")):
            return row
        has_record = form.has_record(extra)
        if has_record and GATEWAY_KEY not in extra:
            return row
        read_keys = {*REMOTE_KEYS, PAYLOADS_KEY, GATEWAY_KEY}
        read = {key: value for key, value in extra.items() if key not in read_keys}
        if not has_record:  # with which our gateway sends all that is in payloads, and more
            try:
                read |= self._record(row, extra).to_extra()
            except RecordError as error:
                raise RecordError(f"{_name(row, extra)}, {error}") from error
        return cast("Row", _with_extra(row, metadata, read))

    def _record(self, row: Any, extra: Mapping[str, Any]) -> RolloutRecord:
        messages = [_plain(message) for message in _field(row, "messages") or ()]
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        asked = self._asked(row, messages)
        first = sum(place < asked for place in answers)
        turns = remote_turns(extra, first=first, messages=len(answers))
        params = form.with_body(_field(_field(row, "input_metadata"), "completion_params") or {})
        tokenizer = self._tokenizer(params)
        reader = TurnReader(tokenizer, _field(row, "tools"), _stops(params))
        readings = [reader.read(turn, messages[answers[turn.index]]) for turn in turns]
        told = extra.get(GATEWAY_KEY)
        metrics = dict(told) if isinstance(told, Mapping) else {}
        how = _sampled_with(params, tokenizer, is_ours=GATEWAY_KEY in extra)
        return _as_record(turns, readings, messages, asked, how, metrics)

    def _asked(self, row: Any, messages: Sequence[Mapping[str, Any]]) -> int:
        """How many messages were there before the rollout."""
        if self._row_messages is None:
            roles = [message["role"] for message in messages]
            return roles.index("assistant") if "assistant" in roles else len(roles)
        return (
            self._row_messages if isinstance(self._row_messages, int) else self._row_messages(row)
        )

    def _tokenizer(self, params: Mapping[str, Any]) -> LoadedTokenizer:
        model, named = model_name(str(params.get("model") or "")), params.get("tokenizer")
        key = model, named
        if key not in self._tokenizers:
            request = RolloutRequest(
                params=sampling.SamplingParams(model=model),
                n=1,
                tokenizer=named,
                endpoint=_fireworks(model) if named is None else None,
            )
            try:
                self._tokenizers[key] = _in_thread(self._backends.tokenizer(request))
            except TokenizerError as error:
                raise RecordError(
                    "its ids cannot be compared with its messages, as EP matches both by number "
                    f"alone: {error}; or give tokenizer= here"
                ) from error
        return self._tokenizers[key]


def _with_extra(row: Any, metadata: Any, extra: dict[str, Any]) -> Any:
    """The row, an object or its JSON, with another `extra`."""
    if isinstance(row, Mapping):
        return {**row, "execution_metadata": {**metadata, "extra": extra}}
    changed = metadata.model_copy(update={"extra": extra})
    return row.model_copy(update={"execution_metadata": changed})


def _fireworks(model: str) -> sampling.Endpoint | None:
    """Who can be asked for the tokenizer of a model of Fireworks."""
    asks = model.startswith("accounts/") and os.environ.get("FIREWORKS_API_KEY")
    return sampling.resolve_endpoint(model, {}, env=os.environ) if asks else None


def _in_thread(work: Coroutine[Any, Any, LoadedTokenizer]) -> LoadedTokenizer:
    """What a coroutine returns, also where a loop is running."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, work).result()


def _as_record(
    turns: Sequence[RemoteTurn],
    readings: Sequence[Reading],
    messages: list[dict[str, Any]],
    asked: int,
    sampled_with: SamplingRecord,
    metrics: dict[str, Any],
) -> RolloutRecord:
    first, reading, last = turns[0], readings[0], readings[-1].finish_reason
    plain = _answers.answer_fields(reading.text, split_reasoning=True)
    return RolloutRecord(
        prompt_ids=first.prompt_ids.tolist(),
        completion_ids=[first.completion_ids.tolist()],
        inference_logprobs=[first.logprobs],
        completions_text=[reading.text],
        completion_messages=None if reading.message == plain else [reading.message],
        truncated=[reading.finish_reason == "length"],
        finish_reasons=[reading.finish_reason],
        sampling=sampled_with,
        token_turn_traces=[
            turn_trace(
                turn.prompt_ids.tolist(),
                turn.completion_ids.tolist(),
                turn.logprobs,
                r.finish_reason,
            )
            for turn, r in zip(turns, readings, strict=True)
        ],
        trajectories=[remote_segments(turns)],
        episodes=[
            EpisodeRecord(
                turns=len(turns),
                stop_reason="length" if last == "length" else "done",
                finish_reason=last,
                metrics=metrics,
                messages=messages,
                row_messages=asked,
            )
        ],
    )


def _sampled_with(
    params: Mapping[str, Any], tokenizer: LoadedTokenizer, *, is_ours: bool
) -> SamplingRecord:
    """As the row's completion_params say it; the payloads do not. Our gateway's logprobs are those
    of sampling."""
    fields = {
        **form.sampling_of_params(params, 1),
        "tokenizer": tokenizer.name,
        "chat_template_hash": tokenizer.chat_template_hash,
        "stop": _stops(params),
        "logprobs": "sampling" if is_ours else "unknown",
        "prompts": "agent",
    }
    try:
        return msgspec.convert(fields, SamplingRecord)
    except msgspec.ValidationError as error:
        raise RecordError(
            f"its completion_params do not say how it was sampled: {error}"
        ) from error


def _stops(params: Mapping[str, Any]) -> list[str]:
    stop = params.get("stop")
    return [stop] if isinstance(stop, str) else [s for s in stop or () if isinstance(s, str) and s]


def _field(value: Any, name: str) -> Any:
    return value.get(name) if isinstance(value, Mapping) else getattr(value, name, None)


def _name(row: Any, extra: Mapping[str, Any]) -> str:
    run = extra.get("run_index")
    row_id = _field(_field(row, "input_metadata"), "row_id")
    return f"row {row_id!r}" + (f", run {run}" if run is not None else "")


def _plain(message: Any) -> dict[str, Any]:
    """A message as plain JSON, without the token data that Eval Protocol copies into it."""
    fields = message if isinstance(message, Mapping) else message.model_dump(mode="json")
    kept = {k: v for k, v in fields.items() if v is not None and k != "logprobs"}
    return {"role": kept.pop("role", None), "content": kept.pop("content", None), **kept}
