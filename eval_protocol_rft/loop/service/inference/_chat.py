"""Chat completions: the conversation rendered to one prompt, and its completions as messages.

Invariant: a request is sampled as the completion of its rendered prompt would be, and answers with
the same ids and logprobs. Rendering, and reading tool calls and thinking out of what was sampled,
are the gateway's. A field is honoured or refused by name; what nothing here can enforce (that a
tool is called, that arguments keep to a schema) is let through, as agents' frameworks send it by
default, and said.
"""

from __future__ import annotations

import asyncio
import secrets
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from eval_protocol_rft import rollout, sampling
from eval_protocol_rft.episodes import ConversationError, gateway
from eval_protocol_rft.local import server
from eval_protocol_rft.local.server import ApiError, CompletionRequest, Sampled, ServedModel

Json = dict[str, Any]

_OF_COMPLETIONS = frozenset(CompletionRequest.__struct_fields__) - {
    "prompt", "model", "response_format", "reasoning_effort", "stream_options", "user", "metadata",
    "prompt_cache_key", "service_tier",
}  # fmt: skip
"""Fields that mean the same to a completion, which reads them; the gateway reads the others."""
_NEUTRAL: Mapping[str, Any] = {"safe_tokenization": False}
"""Fireworks' own fields, with the value that asks for nothing."""
_ENFORCED_BY_SERVICE = frozenset({"tool_choice", "parallel_tool_calls", "tools.strict"})
"""What Fireworks constrains decoding for, and a model here may do otherwise."""


class ChatEndpoints:
    """`/chat/completions`, beside the completions of the same models.

    Args:
        completions: samples.
        say: takes a line, once for each kind of thing that is not enforced.
    """

    def __init__(
        self, completions: server.CompletionEndpoints, *, say: Callable[[str], None] = print
    ) -> None:
        self._completions = completions
        self._say = say
        self._said: set[str] = set()
        self._chats: dict[str, dict[str, Any]] = {}
        """Renderers of each model's template, by tools and template arguments."""

    def routes(self) -> list[Route]:
        return [
            Route(f"{prefix}/chat/completions", self.chat, methods=["POST"])
            for prefix in ("/v1", "/inference/v1")
        ]

    async def chat(self, http: Request) -> Response:
        started = time.perf_counter()
        asked = _read(await server.read_json_body(http))
        model = await self._completions.models.find(asked.call.model)
        request, form = await asyncio.to_thread(self._render, asked, model)
        for field in form.not_enforced - self._said:
            self._said.add(field)
            self._say(
                f"chat: {field} is not enforced here, where Fireworks enforces it: the model may "
                "answer otherwise"
            )
        return await self._completions.answer(http, request, model, form, started)

    def _render(self, asked: _Asked, model: ServedModel) -> tuple[CompletionRequest, _ChatForm]:
        """The request for the completion of the rendered prompt, and how its reply is written.

        Raises:
            ApiError: the conversation cannot be rendered exactly, or does not fit.
        """
        call, tokenizer = asked.call, model.tokenizer
        if tokenizer.chat_template_hash is None:
            raise ApiError(f"{call.model} has no chat template: ask for completions instead")
        server.check_length(_characters(call.messages), model.context_length, field="messages")
        chats = self._chats.setdefault(tokenizer.name, {})
        try:
            settings = gateway.settings_of(call, _settings(call.model), tokenizer)
            prompt = (
                gateway.CallTree(tokenizer, chats=chats)
                .locate(call.messages, call.tools, settings.template_kwargs, thinking_returns=False)
                .prompt
            )
        except gateway.CallError as error:
            raise _refusal(error) from error
        except (rollout.PromptError, ConversationError) as error:
            raise ApiError(f"{error}, field: 'messages'") from error
        ids = list(prompt.ids)
        if model.context_length is not None and len(ids) >= model.context_length:
            raise ApiError(
                f"The prompt is too long: {len(ids)} tokens, and the context of "
                f"{model.context_length} must hold at least one more, field: 'messages'"
            )
        departed = {departure.field: departure.asked for departure in settings.departures}
        if "reasoning_effort" in departed:
            raise ApiError(
                f"the chat template of {call.model} knows no reasoning effort, leave it out, "
                "field: 'reasoning_effort'"
            )
        form = _ChatForm(
            stream=bool(asked.request.stream),
            reader=rollout.AnswerReader(
                ids, tokenizer, tools=call.tools if settings.reads_calls else None
            ),
            short_ids=rollout.tool_format(tokenizer) == "mistral",
            not_enforced=_ENFORCED_BY_SERVICE & departed.keys(),
        )
        return msgspec.structs.replace(asked.request, prompt=ids), form


@dataclass(frozen=True, slots=True)
class _Asked:
    """One request's body, read by those who know its fields."""

    call: gateway.ModelCall
    """The conversation, its tools, and what concerns the template."""
    request: CompletionRequest
    """How it is sampled and what the reply shows; its prompt is to come."""


def _read(body: bytes) -> _Asked:
    """
    Raises:
        ApiError: 400, naming the field that is unknown, missing, mistyped or not honoured here.
    """
    fields = server.read_object(body)
    if "prompt" in fields:
        raise ApiError("Extra inputs are not permitted, field: 'prompt'")
    sampled = {name: value for name, value in fields.items() if name in _OF_COMPLETIONS}
    others = {
        name: value
        for name, value in fields.items()
        if name not in sampled and not (name in _NEUTRAL and value in (None, _NEUTRAL[name]))
    }
    try:
        call = gateway.read_call(msgspec.json.encode(others))
    except gateway.CallError as error:
        raise _refusal(error) from error
    if call.response_format is not None:
        raise ApiError(
            "Only text is supported by this server, nothing constrains what is sampled, "
            "field: 'response_format'"
        )
    to_sample = {"model": call.model, "prompt": [0], **sampled}
    return _Asked(call, server.parse_request(msgspec.json.encode(to_sample)))


def _refusal(error: gateway.CallError) -> ApiError:
    """In Fireworks' form, which names the field at the end."""
    if error.code == "unknown_parameter":
        return ApiError(f"Extra inputs are not permitted, field: '{error.param}'")
    reason = str(error).removeprefix(f"{error.param}: ")
    where = f", field: '{error.param}'" if error.param else ""
    return ApiError(f"{reason[:1].upper()}{reason[1:]}{where}", status=error.status)


def _settings(model: str) -> gateway.SessionSettings:
    return gateway.SessionSettings(params=sampling.SamplingParams(model=model, max_tokens=None))


def _characters(messages: Sequence[Mapping[str, Any]]) -> int:
    """Of all texts, with what is JSON around them."""
    return sum(len(str(message.get("content") or "")) for message in messages)


@dataclass(frozen=True, slots=True, kw_only=True)
class _ChatForm:
    """How the reply to one request is written."""

    stream: bool
    reader: rollout.AnswerReader
    short_ids: bool
    """Templates of Mistral refuse ids of calls that are not nine letters or digits."""
    not_enforced: frozenset[str]

    def head(self, model: str) -> Json:
        """What the reply, and every chunk of one, begins with."""
        return {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "object": "chat.completion.chunk" if self.stream else "chat.completion",
            "created": int(time.time()),
            "model": model,
        }

    def whole_reply(
        self,
        head: Json,
        request: CompletionRequest,
        samples: Sequence[Sampled],
        metrics: dict[str, str],
    ) -> Json:
        """All choices in one body."""
        choices = [self._choice(request, i, sampled) for i, sampled in enumerate(samples)]
        prompts = [choice.pop("prompt_token_ids", None) for choice in choices]
        reply = {**head, "choices": choices, "usage": server.usage(request, samples)}
        if request.return_token_ids:
            reply["prompt_token_ids"] = prompts[0]
        if request.perf_metrics_in_response:
            reply["perf_metrics"] = metrics
        return reply

    def chunks(
        self,
        head: Json,
        request: CompletionRequest,
        samples: Sequence[Sampled],
        metrics: dict[str, str],
    ) -> Iterator[Json]:
        """The same in pieces, choice after choice. The first chunk of a choice has what concerns
        its tokens (they are not those of one piece of text), the last one its finish reason and raw
        output, the very last one usage and metrics."""
        for index, sampled in enumerate(samples):
            tokens = self._tokens(request, index, sampled)
            raw_output = tokens.pop("raw_output", None)
            last_token = len(sampled.completion.token_ids) - 1
            for place, (delta, finish_reason) in enumerate(gateway.deltas(self._read(sampled))):
                choice: Json = {"index": index, "delta": delta, "finish_reason": finish_reason}
                token = last_token if finish_reason else min(place, 1, last_token)
                name = server.model_of_token(head["model"], sampled.completion, token)
                chunk = {**head, "model": name, "choices": [choice]}
                if place == 0:
                    choice |= tokens
                    if request.return_token_ids:
                        chunk["prompt_token_ids"] = sampled.prompt.token_ids
                if finish_reason and raw_output:
                    choice["raw_output"] = raw_output
                if finish_reason and index == len(samples) - 1:
                    chunk["usage"] = server.usage(request, samples)
                    if request.perf_metrics_in_response:
                        chunk["perf_metrics"] = metrics
                yield chunk

    def _choice(self, request: CompletionRequest, index: int, sampled: Sampled) -> Json:
        answer = self._read(sampled)
        message = gateway.assistant_message(answer)
        del message["refusal"]
        return {
            "index": index,
            "message": message,
            "finish_reason": rollout.chat_finish_reason(answer.finish_reason, answer.tool_calls),
            **self._tokens(request, index, sampled),
        }

    def _tokens(self, request: CompletionRequest, index: int, sampled: Sampled) -> Json:
        """What a choice says of its tokens, as that of a completion does."""
        whole = len(sampled.completion.token_ids)
        body = server.choice_body(request, index, sampled, 0, whole)
        del body["index"], body["text"], body["finish_reason"]
        return body

    def _read(self, sampled: Sampled) -> gateway.ReplyChoice:
        """The answer, its calls under ids that nobody else has."""
        message = self.reader.read(sampled.spelling.text).message
        calls = message.get("tool_calls", ())
        for call in calls:
            call["id"] = self._call_id()
        return gateway.ReplyChoice(
            content=message["content"],
            reasoning=message.get("reasoning_content"),
            tool_calls=calls,
            finish_reason=sampled.completion.finish_reason,
        )

    def _call_id(self) -> str:
        return secrets.token_hex(5)[:9] if self.short_ids else f"call_{secrets.token_hex(12)}"
