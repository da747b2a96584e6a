"""A model call of an agent, in one form whatever protocol it came by, and what it is answered.

Invariant: what a request asks for is in its `ModelCall`, or it is refused with the field's name, or
it stands in `ignored`: nothing is dropped in silence. A `Reply` says what was sampled and nothing
else; the three protocols (`_chat_api`, `_responses_api`, `_messages_api`) only write it down.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from eval_protocol_rft._errors import EvalProtocolRftError
from eval_protocol_rft.sampling import Failure, FinishReason

Protocol = Literal["chat", "responses", "messages"]
"""OpenAI Chat Completions, OpenAI Responses, Anthropic Messages."""


class CallError(EvalProtocolRftError, RuntimeError):
    """A call that is answered with an error, in the words and the shape of its protocol."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        """
        Args:
            message: for the agent's author: what is wrong, and what to do.
            status: HTTP. Clients try 408, 409, 429 and 5xx again, and nothing else.
            param: the field of the request that is wrong.
            code: a word for programs: `context_length_exceeded`, `session_limit`, ...
            retry_after: seconds after which to try again.
        """
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.retry_after = retry_after

    @classmethod
    def of(cls, failure: Failure) -> CallError:
        """A completion that could not be had. It was tried as often as the run's budget says."""
        if failure.kind in ("refused", "prompt"):
            return cls(failure.message, code="refused_by_engine")
        return cls(
            f"no completion after {failure.attempts} attempts: {failure.message}",
            status=502,
            code="sampling_failed",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCall:
    """What a client asks for. Settings are None where the request says nothing."""

    protocol: Protocol
    model: str
    messages: list[dict[str, Any]]
    """In the chat API's form, as the request has them: content is text or a list of text parts,
    arguments of tool calls are text, what was thought is `reasoning_content`. A system prompt that
    stands elsewhere in the request is the first message. Null fields and unknown ones are left out;
    items of one turn (Responses: reasoning, message, calls) are one assistant message. Where a
    client names items of an earlier answer and does not tell them again, the message has the
    `reply_id` and the `parts` of it: "reasoning_content", "content", and numbers of calls, from 0.
    Of Anthropic
    the signature of a thinking block is left out, and arguments are the JSON text of their object.
    """
    tools: list[dict[str, Any]] | None = None
    """In the chat API's form; None where there are none."""
    stream: bool = False
    include_usage: bool = False
    """Whether a stream of the chat API ends with a usage chunk; the other two always tell it."""
    n: int = 1
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: bool = False
    tool_choice: str | None = None
    """`auto`, `none`, `required`, or `function:NAME`; None as `auto`."""
    parallel_tool_calls: bool | None = None
    response_format: dict[str, Any] | None = None
    """As the chat API has it: `{"type": "json_schema", "json_schema": {...}}` or
    `{"type": "json_object"}`; None for text."""
    reasoning_effort: str | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Variables of the chat template (`chat_template_kwargs`)."""
    previous_response_id: str | None = None
    """Responses: the answer that `messages` come behind (instructions are not carried over)."""
    echo: dict[str, Any] = field(default_factory=dict)
    """Fields that the reply repeats as they came (Responses: `tools`, `tool_choice`, ...)."""
    ignored: dict[str, Any] = field(default_factory=dict)
    """Fields that mean nothing here and change no token (`user`, `metadata`, `store`, ...); for the
    record."""

    @property
    def messages_field(self) -> str:
        """What the messages of a request are called in its protocol."""
        return "input" if self.protocol == "responses" else "messages"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplyChoice:
    """One sampled answer."""

    content: str
    """Without thinking and calls; may be empty."""
    reasoning: str | None
    tool_calls: Sequence[dict[str, Any]]
    """In the chat API's form: `id` (globally unique, starts with `call_`), `type`, `function` with
    `name` and `arguments`, the text that was sampled."""
    finish_reason: FinishReason
    """`stop` or `length`; that calls are to be made follows from `tool_calls`."""
    token_texts: Sequence[str] = ()
    """[T] what each sampled token is written as; empty unless logprobs were asked for."""
    token_ids: Sequence[int] = ()
    logprobs: Sequence[float] = ()
    """[T] sampling logprobs (nats)."""
    stop_sequence: str | None = None
    """The stop string that ended it, where it was one of the request's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What a call is answered. The same `Reply` is written again where a client tries again."""

    id: str
    """32 hex digits; each protocol puts its own prefix before it (`chatcmpl-`, `resp_`, `msg_`);
    the ids of items are made of it: the same each time."""
    created: int
    """Unix time, seconds."""
    model: str
    """As the request named it."""
    choices: Sequence[ReplyChoice]
    prompt_tokens: int
    completion_tokens: int
