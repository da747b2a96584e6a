"""What the three protocols have in common: how a request is read, how a stream is written.

Invariant: a field of a request is read, or it is on record because it changes no token, or the
request is refused with the field's name and place (`messages[2].content[0].type`). `null` is as
absent. Nothing here or in the protocols does I/O.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct

from eval_protocol_rft.episodes.gateway._call import CallError, ReplyChoice

Request = TypeVar("Request", bound=Struct)
Shape = TypeVar("Shape")

keep_alive = b": keep-alive\n\n"
"""A comment between events: clients of all three protocols read over it."""

DELTA_CHARACTERS = 64
"""Text of a stream's delta. Agents show progress by it; all is sampled before the first is sent."""

ENGINE_FIELDS: Mapping[str, tuple[Any, ...]] = {
    "add_generation_prompt": (True,),
    "allowed_token_ids": ([],),
    "bad_words": ([],),
    "best_of": (1,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "custom_logit_processor": (),
    "documents": ([],),
    "echo": (False,),
    "frequency_penalty": (0,),
    "guided_choice": (),
    "guided_decoding_backend": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "ignore_eos": (False,),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1,),
    "logit_bias": ({},),
    "min_p": (0,),
    "min_tokens": (0,),
    "mirostat_lr": (),
    "mirostat_target": (),
    "presence_penalty": (0,),
    "prompt_logprobs": (0, False),
    "prompt_truncate_len": (),
    "raw_output": (False,),
    "repetition_penalty": (1,),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "separate_reasoning": (True,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "stop_token_ids": ([],),
    "structured_outputs": (),
    "truncate_prompt_tokens": (),
    "typical_p": (1,),
    "use_beam_search": (False,),
}
"""What vLLM, SGLang and Fireworks know besides, and with which values it asks for nothing. Others
of these would change what is sampled or told."""

ENGINE_IGNORED = frozenset(
    {
        "cache_salt",
        "perf_metrics_in_response",
        "priority",
        "prompt_cache_isolation_key",
        "prompt_cache_max_len",
        "request_id",
        "rid",
        "session_id",
    }
)
"""What those know that changes no token."""

UNKNOWN = "no such field is known here; leave it out"

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
Count = Annotated[int, Meta(ge=1)]
StopText = Annotated[str, Meta(min_length=1)]


class Sampling(Struct, kw_only=True):
    """The fields that are the same in every protocol, or that its clients send all the same."""

    model: str
    stream: bool | None = None
    temperature: Annotated[float, Meta(ge=0)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1)] | None = None
    seed: int | None = None
    stop: StopText | list[StopText] | None = None

    def settings(self) -> dict[str, Any]:
        """These fields as `ModelCall` has them."""
        return {
            "model": self.model,
            "stream": bool(self.stream),
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "seed": self.seed,
            "stop": (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
        }


class Part(Struct):
    """One part of a content that is a list."""

    type: str
    text: str | None = None


Content = str | list[Part]


def refusal(param: str | None, reason: str, *, code: str | None = None) -> CallError:
    """A 400. The message begins with the field: Anthropic's shape has no other place for it."""
    return CallError(f"{param}: {reason}" if param else reason, param=param, code=code)


def read_request(
    body: bytes,
    shape: type[Request],
    *,
    ignored: Collection[str] = (),
    unsupported: Mapping[str, tuple[Any, ...]],
) -> tuple[Request, dict[str, Any]]:
    """The request's fields, and those that change no token, for the record.

    Args:
        body: what came over the wire.
        shape: the fields that are read.
        ignored: names of fields that change no token.
        unsupported: names of fields that are not done, each with the values that ask for nothing.

    Raises:
        CallError: the body is no JSON object, or a field is unknown, of a wrong type or not done.
    """
    try:
        fields = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
        request = msgspec.json.decode(body, type=shape)
        others = {
            name: msgspec.json.decode(raw)
            for name, raw in fields.items()
            if name not in shape.__struct_fields__ and bytes(raw) != b"null"
        }
    except msgspec.ValidationError as error:
        raise _shape_refusal(error) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise refusal(
            None, f"the body of the request is not JSON that can be read: {error}"
        ) from None
    kept = {}
    for name, value in others.items():
        if name in ignored or name in ENGINE_IGNORED:
            kept[name] = value
        elif name in unsupported or name in ENGINE_FIELDS:
            if value not in (neutral := (*unsupported.get(name, ()), *ENGINE_FIELDS.get(name, ()))):
                raise refusal(name, _unsupported_reason(neutral), code="unsupported_parameter")
        else:
            raise refusal(
                name, "no such field is known here; leave it out", code="unknown_parameter"
            )
    return request, kept


def _unsupported_reason(neutral: tuple[Any, ...]) -> str:
    allowed = " or ".join(msgspec.json.encode(value).decode() for value in neutral)
    return "not supported here, because it cannot be honoured exactly; leave it out" + (
        f", or send {allowed}" if allowed else ""
    )


def read_shape(value: Any, shape: type[Shape], where: str) -> Shape:
    """A part of a request whose fields are read one by one.

    Raises:
        CallError: a field of it is of a wrong type.
    """
    try:
        return msgspec.convert(value, shape)
    except msgspec.ValidationError as error:
        raise _shape_refusal(error, where) from None


def _shape_refusal(error: msgspec.ValidationError, where: str = "") -> CallError:
    """The error of a wrong type or value, which names its place as `$.messages[0].role`."""
    reason, _, place = str(error).partition(" - at `$")
    path = (where + place.removesuffix("`")).removeprefix(".")
    if named := re.fullmatch(r"Object (missing required|contains unknown) field `(.*)`", reason):
        path = f"{path}.{named[2]}".removeprefix(".")
        reason = "this field is required" if named[1].startswith("missing") else UNKNOWN
    if not path:
        reason = f"the body of the request is not a JSON object: {reason}"
    return refusal(path or None, reason.replace("`", "").replace(" | null", ""))


def check_type(fields: Mapping[str, Any], where: str, *known: str | None) -> None:
    """Refuse what is of another type than these.

    Raises:
        CallError: with the place of the type.
    """
    if (kind := fields.get("type")) not in known:
        names = ", ".join(name for name in known if name)
        raise refusal(f"{where}.type", f"{kind!r} is not supported here, only {names}")


def text_content(
    content: Content, where: str, kinds: Collection[str] = ("text",)
) -> str | list[dict[str, Any]]:
    """A content of text in the chat API's form: text stays text, a list a list; no part is no text.

    Args:
        content: as the request has it.
        where: its place in the request.
        kinds: the types of parts that are text in this protocol.

    Raises:
        CallError: a part is an image, a sound, a file or something unknown.
    """
    if isinstance(content, str):
        return content
    for index, part in enumerate(content):
        if part.type not in kinds:
            known = ", ".join(kinds)
            raise refusal(f"{where}[{index}].type", f"{part.type!r} is not text ({known})")
        if part.text is None:
            raise refusal(f"{where}[{index}].text", "this field is required")
    return [{"type": "text", "text": part.text} for part in content] or ""


def joined_text(content: Content, where: str, kinds: Collection[str] = ("text",)) -> str:
    """A content of text as one text, as `text_content` reads it."""
    read = text_content(content, where, kinds)
    return read if isinstance(read, str) else "".join(part["text"] for part in read)


def without_nulls(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that say something."""
    return {name: value for name, value in fields.items() if value is not None}


class MessageList:
    """Messages in the chat API's form, of a protocol that spreads a turn over several items.

    A turn is what was thought, then a text, then calls: what comes in another order, or twice, is
    the next turn, so the order of the request is kept.
    """

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []
        self._turn: dict[str, Any] | None = None

    def add(self, message: dict[str, Any]) -> None:
        """A message of any other role; it ends the turn."""
        self.end_turn()
        self.messages.append(message)

    def end_turn(self) -> None:
        """What the assistant says next is another message."""
        self._turn = None

    def think(self, text: str) -> None:
        """More of what was thought."""
        turn = self._turn_without("content", "tool_calls")
        turn["reasoning_content"] = turn.get("reasoning_content", "") + text

    def say(self, text: str) -> None:
        """More of the text."""
        turn = self._turn_without("tool_calls")
        turn["content"] = turn.get("content", "") + text

    def call(self, call_id: str, name: str, arguments: str) -> None:
        """One more call."""
        function = {"name": name, "arguments": arguments}
        calls = self._turn_without().setdefault("tool_calls", [])
        calls.append({"id": call_id, "type": "function", "function": function})

    def refer(self, reply_id: str, part: str | int) -> None:
        """One more part of an answer that is named and not told again, see `ModelCall`."""
        if self._turn is not None and self._turn.get("reply_id", reply_id) != reply_id:
            self.end_turn()
        behind = {"reasoning_content": ("content", "tool_calls"), "content": ("tool_calls",)}
        turn = self._turn_without(*behind.get(str(part), ()))
        turn["reply_id"] = reply_id
        turn.setdefault("parts", []).append(part)

    def has_text(self) -> bool:
        """Whether the turn that goes on has a text."""
        return self._turn is not None and _has(self._turn, "content")

    def _turn_without(self, *names: str) -> dict[str, Any]:
        """The turn that goes on, or the next where it has one of these fields already."""
        if self._turn is None or any(_has(self._turn, name) for name in names):
            self._turn = {"role": "assistant"}
            self.messages.append(self._turn)
        return self._turn


def _has(turn: Mapping[str, Any], name: str) -> bool:
    """Whether a turn has this field, told or named."""
    return name in turn or name in turn.get("parts", ())


def function_tool(
    name: str, description: str | None, parameters: dict[str, Any] | None, strict: bool | None
) -> dict[str, Any]:
    """A tool in the chat API's form."""
    function = {
        "name": name,
        "description": description,
        "parameters": parameters,
        "strict": strict,
    }
    return {"type": "function", "function": without_nulls(function)}


def check_tool_choice(choice: str | None, tools: Sequence[dict[str, Any]]) -> str | None:
    """The choice, `function:NAME` for one function.

    Raises:
        CallError: it asks for a call that none of the tools can answer.
    """
    names = [tool["function"]["name"] for tool in tools]
    wanted = (choice or "").removeprefix("function:")
    if choice == "required" and not names:
        raise refusal("tool_choice", "a call is required, and there are no tools")
    if wanted != choice and wanted not in names and choice is not None:
        raise refusal("tool_choice", f"none of the tools has the name {wanted!r}")
    return choice


def json_schema_format(
    name: str, schema: dict[str, Any], strict: bool | None, description: str | None = None
) -> dict[str, Any]:
    """A `response_format` in the chat API's form."""
    fields = {"name": name, "description": description, "schema": schema, "strict": strict}
    return {"type": "json_schema", "json_schema": without_nulls(fields)}


def pieces(text: str) -> Iterator[str]:
    """The text in the deltas of a stream; none for an empty one."""
    for start in range(0, len(text), DELTA_CHARACTERS):
        yield text[start : start + DELTA_CHARACTERS]


def token_logprobs(choice: ReplyChoice) -> list[dict[str, Any]]:
    """[T] the sampled tokens in OpenAI's shape. A token that is only a part of a character is
    written with U+FFFD: which bytes it stands for is not known."""
    return [
        {
            "token": text,
            "bytes": None if "\ufffd" in text else list(text.encode("utf-8", "surrogatepass")),
            "logprob": logprob,
            "top_logprobs": [],
        }
        for text, logprob in zip(choice.token_texts, choice.logprobs, strict=True)
    ]


_LINE_ENDS = (("\x85", b"\\u0085"), ("\u2028", b"\\u2028"), ("\u2029", b"\\u2029"))


def event(data: Mapping[str, Any], name: str | None = None) -> bytes:
    """One event of a stream. Clients that split lines as `str.splitlines` does (httpx) see ends of
    lines in three more characters: inside JSON these can be written otherwise."""
    line = msgspec.json.encode(data)
    for character, escape in _LINE_ENDS:
        line = line.replace(character.encode(), escape)
    return b"event: %b\ndata: %b\n\n" % (name.encode(), line) if name else b"data: %b\n\n" % line


def openai_error_body(error: CallError) -> dict[str, Any]:
    """The body of an error's answer, in OpenAI's shape."""
    kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found_error"}
    kind = kinds.get(error.status, "invalid_request_error")
    if error.status == 429:
        kind = "rate_limit_error"
    elif error.status >= 500:
        kind = "server_error"
    fields = {"message": str(error), "type": kind, "param": error.param, "code": error.code}
    return {"error": fields}
