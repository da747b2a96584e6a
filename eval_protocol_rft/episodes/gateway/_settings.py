"""What a call asks for beside its messages, and what the run makes of it.

Invariant: each setting of a request is honoured, or refused with its name, or it is a `Departure`,
which the record holds. Nothing else happens to it.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

import msgspec
from annotated_types import Ge, Gt

from eval_protocol_rft import rollout
from eval_protocol_rft._options import Flag, check_options
from eval_protocol_rft.episodes._turns import OnRewrite
from eval_protocol_rft.episodes.gateway._call import CallError, ModelCall
from eval_protocol_rft.local import LoadedTokenizer
from eval_protocol_rft.sampling import SamplingParams

Shared = Literal["first", "each", "longest"]

PINNABLE = ("temperature", "top_p", "top_k")
"""Settings of the policy that is trained; an agent's own would sample from another one."""


_SESSIONS = functools.partial(Flag, panel="Sessions")


def _flag(name: str) -> Flag:
    return _SESSIONS(name, only=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionLimits:
    """Each ends a session's calls, not what it has: a further call is refused in the words of its
    protocol, and the trajectory has the name of the limit as its stop reason."""

    turns: Annotated[int, Ge(1), _flag("--max-calls")] = 256
    """Most model calls of a session."""
    tokens: Annotated[int, Ge(1), _flag("--session-tokens")] = 1_000_000
    """Most tokens that the calls of a session sample and send anew, what earlier calls hold not
    counted again."""
    seconds: Annotated[float, Gt(0), _flag("--session-seconds")] = 1800.0
    """Most seconds from the first call on."""
    concurrent_calls: Annotated[int, Ge(1), _flag("--session-concurrency")] = 16
    """Most calls of a session that are sampled at once; others wait."""
    bytes: Annotated[int, Ge(1), _flag("--session-bytes")] = 256 * 2**20
    """Most bytes of all requests of a session."""

    def __post_init__(self) -> None:
        check_options(self)


class Departure(msgspec.Struct, frozen=True, kw_only=True):
    """A setting of requests that was not honoured as it stood there."""

    field: str
    asked: Any
    used: Any
    """None: nothing stands in its place."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionSettings:
    """How the calls of a session are answered and kept."""

    params: SamplingParams
    """Of the run; what a request does not say is so."""
    pinned: frozenset[str] = frozenset()
    """Settings of `params` (`PINNABLE`) that no request changes."""
    on_other_sampling: Annotated[Literal["override", "refuse"], _SESSIONS()] = "override"
    """A request that asks for another temperature, top_p or top_k than the run's: override it, on
    record, or refuse it."""
    strict: Annotated[bool, _SESSIONS()] = False
    """Refuse what cannot be honoured exactly; else it is let through, on record.

    `tool_choice: "required"`, strict schemas, `response_format` without guided decoding."""
    guided_decoding: Annotated[bool, _SESSIONS()] = False
    """The engine takes `response_format` with a completion and keeps to it."""
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    on_rewrite: Annotated[OnRewrite, _SESSIONS()] = "split"
    """What to do where the chat template renders earlier turns anew: split begins a new segment,
    reject refuses the call."""
    shared: Annotated[Shared, _SESSIONS()] = "first"
    """Tokens that several branches of a session have are trained in the first, in each, or the
    branch with the most sampled tokens alone is trained (longest)."""
    split_reasoning: bool = True
    limits: SessionLimits = field(default_factory=SessionLimits)
    context_length: Annotated[int | None, Ge(2), _SESSIONS(unset="local: the model's")] = None
    """Of the model, in tokens; what no longer fits is refused in the agent's protocol."""

    def __post_init__(self) -> None:
        check_options(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A call's settings as they are sampled with."""

    params: SamplingParams
    """`max_tokens` without regard to the room that there is."""
    template_kwargs: dict[str, Any]
    departures: list[Departure]
    reads_calls: bool
    """Whether what the model writes as tool calls is read as calls."""


def settings_of(call: ModelCall, run: SessionSettings, tokenizer: LoadedTokenizer) -> Asked:
    """The settings of a call.

    Raises:
        CallError: one cannot be honoured, and the run does not let it through.
    """
    departures: list[Departure] = []

    def depart(field: str, asked: Any, used: Any = None) -> None:
        if run.strict:
            raise CallError(
                f"{field} = {asked!r} cannot be honoured exactly here, and this run is strict: "
                "leave it out",
                param=field,
            )
        departures.append(Departure(field=field, asked=asked, used=used))

    changes: dict[str, Any] = {}
    for name in PINNABLE:
        asked, pinned = getattr(call, name), getattr(run.params, name)
        if asked is None or asked == pinned:
            continue
        if name not in run.pinned:
            changes[name] = asked
        elif run.on_other_sampling == "refuse" or run.strict:
            raise CallError(
                f"this run samples with {name} {pinned:g}, and the request asks for {asked:g}: "
                "leave it out",
                param=name,
            )
        else:
            depart(name, asked, pinned)
    if call.stop:
        changes["stop"] = tuple(dict.fromkeys((*run.params.stop, *call.stop)))
    if call.max_tokens is not None:
        most = run.params.max_tokens
        changes["max_tokens"] = call.max_tokens if most is None else min(most, call.max_tokens)
    reads_calls = bool(call.tools) and call.tool_choice != "none"
    if call.tools:
        if reads_calls and rollout.tool_format(tokenizer) is None:
            raise CallError(
                f"cannot tell how the model of {tokenizer.name!r} writes tool calls from its chat "
                "template: give the gateway a tokenizer whose template shows it",
                param="tools",
            )
        if call.tool_choice not in (None, "auto", "none"):
            depart("tool_choice", call.tool_choice, "auto")
        if call.parallel_tool_calls is False:
            depart("parallel_tool_calls", False, True)
        strict = [t["function"]["name"] for t in call.tools if t["function"].get("strict")]
        if strict:
            depart("tools.strict", strict)
    if call.response_format is not None:
        if run.guided_decoding and not reads_calls:
            extra = {**run.params.extra, "response_format": call.response_format}
            changes["extra"] = extra
        else:
            depart("response_format", call.response_format.get("type"))
    template_kwargs = {**run.template_kwargs, **call.template_kwargs}
    if call.reasoning_effort is not None:
        said = _effort(call.reasoning_effort, tokenizer)
        template_kwargs |= said
        if not said and call.reasoning_effort != "none":
            depart("reasoning_effort", call.reasoning_effort)
    return Asked(
        params=replace(run.params, **changes) if changes else run.params,
        template_kwargs=template_kwargs,
        departures=departures,
        reads_calls=reads_calls,
    )


def _effort(effort: str, tokenizer: LoadedTokenizer) -> dict[str, Any]:
    """The variable of the chat template that says how much to think; empty where none can."""
    read = rollout.variables_read(str(tokenizer.tokenizer.chat_template)) or frozenset()
    if "reasoning_effort" in read and effort != "none":
        return {"reasoning_effort": effort}
    if "enable_thinking" in read and effort in ("none", "minimal"):
        return {"enable_thinking": False}
    return {}
