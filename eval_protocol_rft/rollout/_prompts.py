"""Messages and tools in, exact prompt token ids out.

Invariant: a prompt is what the chat template renders, or the ids that the row brings, or, where it
is asked for, one text as the tokenizer reads it; else it is an error that names the cause. There is
no other way to write it down.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from eval_protocol_rft._errors import EvalProtocolRftError
from eval_protocol_rft.local import LoadedTokenizer
from eval_protocol_rft.rollout._template_reads import fields_read, variables_read
from eval_protocol_rft.sampling import TokenIds

if TYPE_CHECKING:
    from eval_protocol.models import EvaluationRow, Message

    from eval_protocol_rft.rollout._params import RolloutRequest

logger = logging.getLogger(__name__)
_OWN_ARGUMENTS = frozenset(
    {
        "conversation", "tools", "add_generation_prompt", "continue_final_message",
        "tokenize", "return_dict", "return_tensors", "return_assistant_tokens_mask",
        # the record names the template by its hash, so it is the tokenizer's
        "chat_template",
        # a prompt is whole and nothing but the conversation
        "truncation", "max_length", "padding", "tokenizer_kwargs",
    }
)  # fmt: skip
"""Arguments of `apply_chat_template` that are ours to set."""


_COMMON_ROLES = frozenset({"system", "user", "assistant", "tool"})


class PromptError(EvalProtocolRftError, ValueError):
    """The prompt of a row cannot be rendered exactly."""


def render_request(
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    tokenizer: LoadedTokenizer,
    request: RolloutRequest,
) -> TokenIds:
    """Token ids of a conversation, as `chat_messages` gives it, in the way that the request asks
    for: by the chat template, or as raw text.

    Raises:
        PromptError: as `render_chat` and `render_raw`.
    """
    if request.raw:
        added = request.add_special_tokens
        return render_raw(messages, tools, tokenizer, add_special_tokens=added)
    return render_chat(messages, tools, tokenizer, request.chat_template_kwargs)


def render_raw(
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    tokenizer: LoadedTokenizer,
    *,
    add_special_tokens: bool = True,
) -> TokenIds:
    """Token ids of one user message's text, exactly those of `tokenizer(text)`.

    Raises:
        PromptError: it is not one text: there are tools, or other messages.
    """
    if tools:
        raise PromptError(f"raw text has no place for tools, and the row has some: {_NOT_RAW}")
    roles = [str(message["role"]) for message in messages]
    if roles != ["user"]:
        has = (
            f"{len(roles)} messages ({', '.join(roles)})" if len(roles) != 1 else f"a {roles[0]}'s"
        )
        raise PromptError(f"raw text is one text of a user, and the row has {has}: {_NOT_RAW}")
    ids = tokenizer.encode_raw(messages[0]["content"], add_special_tokens=add_special_tokens)
    if not ids:
        raise PromptError("the raw text is empty, so there is nothing to go on from")
    _tell_double_start(tokenizer, tuple(ids[:2]))
    return TokenIds(ids)


_NOT_RAW = (
    "write it as one text in the data set, or let a chat template render it (chat_template, "
    "--chat-template chatml)"
)


@lru_cache(maxsize=16)
def _tell_double_start(tokenizer: LoadedTokenizer, start: tuple[int, ...]) -> None:
    bos = getattr(tokenizer.tokenizer, "bos_token_id", None)
    if bos is not None and start == (bos, bos):
        logger.warning(
            "%s: a raw prompt begins with %s twice: its text has one, and the tokenizer adds one. "
            "Take it out of the text, or leave the tokenizer's out (--no-add-special-tokens)",
            tokenizer.name,
            tokenizer.decode([bos]),
        )


PROMPT_IDS_KEY = "prompt_token_ids"
"""What a row that brings its prompt as token ids calls them."""


def prompt_ids_of(row: EvaluationRow) -> Any:
    """The prompt ids that a row brings, as a field of its own or among the data set's columns; None
    where its messages are its prompt."""
    info: Any = row.input_metadata.dataset_info or {}
    return (row.model_extra or {}).get(PROMPT_IDS_KEY, info.get(PROMPT_IDS_KEY))


def given_prompt(ids: Any, tokenizer: LoadedTokenizer) -> TokenIds:
    """Prompt ids as a row brings them, to be sampled from as they are: no template, no tokenizing.

    Raises:
        PromptError: they are no list of ids of the tokenizer's vocabulary.
    """
    if not isinstance(ids, list | tuple) or not ids:
        raise PromptError(f"{PROMPT_IDS_KEY} must be a list of token ids, not empty")
    size = len(tokenizer.tokenizer)
    for index, token in enumerate(ids):
        if isinstance(token, bool) or not isinstance(token, int):
            raise PromptError(f"{PROMPT_IDS_KEY}[{index}] is {token!r}, not a token id")
        if not 0 <= token < size:
            raise PromptError(
                f"{PROMPT_IDS_KEY}[{index}] is {token}, and tokenizer {tokenizer.name!r} has the "
                f"ids 0 to {size - 1}: the ids are another tokenizer's"
            )
    return TokenIds(ids)


def chat_messages(
    messages: Sequence[Message | Mapping[str, Any]], tokenizer: LoadedTokenizer | None = None
) -> list[dict[str, Any]]:
    """Messages as the chat API has them, without empty fields and those that no template reads.
    Arguments of tool calls are JSON text, content is text: several text parts are joined by line
    breaks, as vLLM joins them.

    Args:
        messages: Eval Protocol's, or the chat API's.
        tokenizer: for its chat template the role `developer` becomes `system`, where it has no such
            role.

    Raises:
        PromptError: content that is no text (images, audio), a tool call without a name, or a
            message without anything.
    """
    chat = [_chat_message(i, message) for i, message in enumerate(messages)]
    for message in chat:
        if message["role"] == "developer" and tokenizer and not _knows_developer(tokenizer):
            message["role"] = "system"
    return chat


def rendered_otherwise(
    messages: Sequence[Message | Mapping[str, Any]], tokenizer: LoadedTokenizer
) -> list[str]:
    """What `chat_messages` wrote in another way than it stands in `messages`, for the record."""
    notes = []
    for i, message in enumerate(messages):
        role, content = _field(message, "role"), _field(message, "content")
        if role == "developer" and not _knows_developer(tokenizer):
            notes.append(f"messages[{i}]: the role developer as system")
        if isinstance(content, list) and len(content) > 1:
            notes.append(f"messages[{i}]: {len(content)} text parts, joined by line breaks")
    return notes


@lru_cache(maxsize=16)
def _knows_developer(tokenizer: LoadedTokenizer) -> bool:
    """Whether the chat template renders what a developer says."""
    words = "Speak plainly."
    chat = [{"role": "developer", "content": words}, {"role": "user", "content": "Hi."}]
    try:
        return words in tokenizer.decode(_apply(tokenizer, chat, None, {}))
    except PromptError:
        return False


@lru_cache(maxsize=16)
def knows_later_system(tokenizer: LoadedTokenizer) -> bool:
    """Whether the chat template renders a system message that is not the first."""
    words = "Speak plainly."
    chat = [
        {"role": "user", "content": "Hi."},
        {"role": "assistant", "content": "Hello."},
        {"role": "system", "content": words},
        {"role": "user", "content": "Go on."},
    ]
    try:
        return words in tokenizer.decode(_apply(tokenizer, chat, None, {}))
    except PromptError:
        return False


def render_chat(
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    tokenizer: LoadedTokenizer,
    chat_template_kwargs: Mapping[str, Any],
) -> TokenIds:
    """Token ids of the conversation up to where the assistant starts to speak.

    Args:
        messages: as `chat_messages` gives them.
        tools: in the chat API's form.
        tokenizer: its chat template is what renders.
        chat_template_kwargs: passed to the template.

    Raises:
        PromptError: no messages, no chat template, an error inside it, or tools, tool calls and
            roles that it drops.
    """
    if not messages:
        raise PromptError("the row has no messages to answer")
    if tokenizer.chat_template_hash is None:
        raise PromptError(
            f"tokenizer {tokenizer.name!r} has no chat template (base models have none): send "
            "the text as it is (--raw, completion_params['raw']), or name a template "
            "(--chat-template, completion_params['chat_template']: a Jinja file, chatml, or a "
            "tokenizer that has one)"
        )
    _check_template_kwargs(tokenizer, tools, chat_template_kwargs)
    chat = as_template_reads(messages, tools, tokenizer)
    ids = _apply(tokenizer, chat, tools, chat_template_kwargs)
    if not ids:
        raise PromptError(f"the chat template of {tokenizer.name!r} rendered nothing")
    # What a template does not know it drops in silence: it renders the same without.
    for what, less_chat, less_tools in _without(chat, tools):
        try:
            less = _apply(tokenizer, less_chat, less_tools, chat_template_kwargs)
        except PromptError:
            continue  # a template that insists on it does render it
        if less_chat and ids == less:
            raise PromptError(
                f"the chat template of {tokenizer.name!r} does not render {what}: the model would "
                "never see what this row holds"
            )
    return TokenIds(ids)


def _check_template_kwargs(
    tokenizer: LoadedTokenizer,
    tools: Sequence[Mapping[str, Any]] | None,
    kwargs: Mapping[str, Any],
) -> None:
    """A template passes over variables that it does not know: the user would never hear of it."""
    taken = _OWN_ARGUMENTS.intersection(kwargs)
    if taken:
        raise PromptError(f"chat_template_kwargs must not set {', '.join(sorted(taken))}")
    if not kwargs:
        return
    read = variables_read(_template(tokenizer, tools))
    unread = sorted(kwargs.keys() - read) if read is not None else None
    if unread:
        known = [name for name in sorted(read or ()) if not _FILLED_IN.fullmatch(name)]
        raise PromptError(
            f"the chat template of {tokenizer.name!r} does not read {', '.join(unread)}, so the "
            f"prompt would be the same without: leave it out of completion_params and "
            f"chat_template_kwargs. This template reads {', '.join(known) or 'no such variable'}"
        )


_FILLED_IN = re.compile(
    r"messages|tools|add_generation_prompt|raise_exception|strftime_now|\w+_tokens?"
)
"""Variables of a template that transformers fills in."""


def _without(
    chat: list[dict[str, Any]], tools: Sequence[Mapping[str, Any]] | None
) -> Iterator[tuple[str, list[dict[str, Any]], Sequence[Mapping[str, Any]] | None]]:
    """What a template may not know, and the conversation without it."""
    if tools:
        yield "tools", chat, None
    if any("tool_calls" in message for message in chat):
        silent = [{k: v for k, v in message.items() if k != "tool_calls"} for message in chat]
        yield "tool calls", silent, tools
    if any(len(message.get("tool_calls", ())) > 1 for message in chat):
        yield SEVERAL_CALLS, [with_one_call(message) for message in chat], tools
    for index, message in enumerate(chat):
        without = chat[:index] + chat[index + 1 :]
        if message["role"] not in _COMMON_ROLES:
            yield f"the role {message['role']!r}", without, tools
        elif message["role"] == "system" and index:
            yield "a system message that is not the first", without, tools


SEVERAL_CALLS = "more than one tool call of a message"


def with_one_call(message: Mapping[str, Any]) -> dict[str, Any]:
    """The message without its calls behind the first."""
    return {k: v[:1] if k == "tool_calls" else v for k, v in message.items()}


def _apply(
    tokenizer: LoadedTokenizer,
    chat: list[dict[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    kwargs: Mapping[str, Any],
) -> list[int]:
    try:
        ids: Any = tokenizer.tokenizer.apply_chat_template(
            chat,
            tools=[dict(tool) for tool in tools] if tools else None,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=False,
            **kwargs,
        )
        return [int(token) for token in ids]
    # A template is a program: besides its own errors it raises what its expressions raise.
    except Exception as error:
        raise PromptError(
            f"the chat template of {tokenizer.name!r} failed: {type(error).__name__}: {error}"
        ) from error


def _chat_message(index: int, message: Message | Mapping[str, Any]) -> dict[str, Any]:
    """One message with the fields that templates read."""
    # Most messages of a long history, which agents send anew with every call.
    if type(message) is dict and len(message) == 2 and type(message.get("content")) is str:
        return {"role": message.get("role"), "content": message["content"]}
    fields = {name: _field(message, name) for name in _MESSAGE_FIELDS}
    role, content, calls = fields["role"], fields["content"], fields["tool_calls"]
    if fields["function_call"] is not None:
        raise PromptError(
            f"messages[{index}] has a function_call, which chat templates do not render: "
            "use tool_calls"
        )
    chat: dict[str, Any] = {"role": role, "content": text_of(index, content)}
    thought = next((fields[n] for n in _REASONING_FIELDS if fields[n] is not None), None)
    more = {**fields, "reasoning_content": thought}
    for name in ("reasoning_content", "name", "tool_call_id"):
        if more[name] is not None:
            chat[name] = more[name]
    if calls and not isinstance(calls, list | tuple):
        raise PromptError(
            f"messages[{index}].tool_calls is a {type(calls).__name__}, not a list of tool calls"
        )
    if calls:
        chat["tool_calls"] = [_tool_call(index, _plain(call)) for call in calls]
    elif content is None:
        raise PromptError(f"messages[{index}] ({role}) has neither content nor tool calls")
    return chat


_REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")
"""What servers, traces and chat templates call what was thought; to templates that read several,
the first is given."""
_MESSAGE_FIELDS = (
    "role", "content", *_REASONING_FIELDS, "name", "tool_call_id", "tool_calls", "function_call",
)  # fmt: skip


def _field(value: Any, name: str) -> Any:
    if type(value) is dict or isinstance(value, Mapping):
        return value.get(name)
    return getattr(value, name, None)


def _plain(value: Any) -> Any:
    return value.model_dump() if hasattr(value, "model_dump") else value


def text_of(index: int, content: Any) -> str:
    """The content of message `index` as text.

    Raises:
        PromptError: it has parts that are no text.
    """
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    kinds = [str(_field(part, "type") or type(part).__name__) for part in content]
    if content and all(
        kind in _TEXT_PARTS and isinstance(_field(part, "text"), str)
        for kind, part in zip(kinds, content, strict=True)
    ):
        return "\n".join(_field(part, "text") for part in content)
    raise PromptError(
        f"messages[{index}].content has the parts {kinds}: prompts are token ids of text, so "
        "images, audio and files cannot be sent; leave such rows out, or say in words what matters"
    )


_TEXT_PARTS = frozenset({"text", "input_text", "output_text"})
"""What the chat and the responses API call a part of text."""


def _tool_call(index: int, call: Mapping[str, Any]) -> dict[str, Any]:
    """A tool call with its arguments as JSON text, as the chat API carries them; data sets often
    hold them as an object."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise PromptError(f"messages[{index}] has a tool call without a function's name")
    arguments = function.get("arguments")
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments or {}, ensure_ascii=False)
    return {
        "id": call.get("id"),
        "type": "function",
        "function": {"name": function["name"], "arguments": arguments},
    }


def as_template_reads(
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    tokenizer: LoadedTokenizer,
) -> list[dict[str, Any]]:
    """Messages as the chat template takes them: arguments of calls as objects, and what was thought
    under the name that it reads (gpt-oss's reads `thinking`).

    Raises:
        PromptError: arguments of a tool call are not JSON.
    """
    chat = [_with_parsed_arguments(i, message) for i, message in enumerate(messages)]
    if any("reasoning_content" in message for message in chat):
        read = fields_read(_template(tokenizer, tools))
        name = next((name for name in _REASONING_FIELDS if name in read), "reasoning_content")
        chat = [
            {name if key == "reasoning_content" else key: value for key, value in message.items()}
            for message in chat
        ]
    return chat


def _template(tokenizer: LoadedTokenizer, tools: Sequence[Mapping[str, Any]] | None) -> str | None:
    """The chat template that renders such a prompt: some have another one for tools."""
    if not hasattr(tokenizer.tokenizer, "get_chat_template"):
        return None
    template = tokenizer.tokenizer.get_chat_template(tools=[*map(dict, tools or ())] or None)
    return template if isinstance(template, str) else None


def _with_parsed_arguments(index: int, message: Mapping[str, Any]) -> dict[str, Any]:
    chat = dict(message)
    if "tool_calls" in chat:
        chat["tool_calls"] = [_parsed(index, call) for call in chat["tool_calls"]]
    return chat


def _parsed(index: int, call: Mapping[str, Any]) -> dict[str, Any]:
    function = call["function"]
    try:
        arguments = json.loads(function["arguments"] or "{}")
    except ValueError as error:
        raise PromptError(
            f"messages[{index}]: arguments of tool call {function['name']!r} are not JSON: {error}"
        ) from error
    return {**call, "function": {**function, "arguments": arguments}}
