"""completion_params in, `RolloutRequest` out. Every check of what a user asks for lives here.

Invariant: the user's dict is read and never changed, and each key is used, sent on, or refused by
name. Only keys that belong to other clients (litellm, recipes) are dropped, and they are listed.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from annotated_types import Ge

from eval_protocol_rft._errors import EvalProtocolRftError
from eval_protocol_rft._options import Flag
from eval_protocol_rft.local.models import LOCAL_PREFIX, VLLM_PREFIX
from eval_protocol_rft.sampling import SAMPLING, Endpoint, SamplingParams, resolve_endpoint

DEFAULT_MAX_TOKENS = 2048
"""Sent where the user gives none: servers differ (vLLM stops after 16), training data must not."""

SINGLE_STEP = 1
"""One turn; also what those write who call a processor themselves and mean nothing by it."""
DEFAULT_STEPS = 30
"""What Eval Protocol hands to every processor where the user says nothing."""

DROPPED_KEYS = frozenset(
    {
        # litellm's own
        "cache", "caching", "custom_llm_provider", "drop_params", "additional_drop_params",
        "num_retries", "max_retries", "fallbacks", "mock_response", "input_cost_per_token",
        "output_cost_per_token", "api_version", "api_type", "provider", "allowed_openai_params",
        # recipes' own
        "max_seq_len", "timeout_diagnostic_context", "sampling_context", "r3_ttl_seconds",
        # we read streams our own way
        "stream_options",
    }
)  # fmt: skip

TEMPLATE_KEYS = ("reasoning_effort", "enable_thinking", "documents")
"""What chat servers hand to the chat template although it stands beside the messages. Our requests
hold ids, so it has to reach the template here."""

_MESSAGES = "the row's messages are the prompt"
_IDS = "the prompt is sent as token ids, whole, and nothing is put before or behind it"
_ENDS = "the prompt ends where the assistant starts to speak"
_THINKING = (
    "a request whose prompt is token ids has no such setting: give the chat template the variable "
    "that it reads, e.g. completion_params['chat_template_kwargs'] = {'enable_thinking': False}"
)
_SHOWN = "thinking is split off here: FireworksTrainingRolloutProcessor(split_reasoning=...)"
_CALLS = "it steers the parser of a chat endpoint, and requests go to /completions"
_LENGTH = "write max_tokens: servers pass over other names for it, and would generate more"
_COUNT = "write n: servers pass over other names for it"
_BESIDE = "write its settings beside model, where they are read"
_SEARCH = "it looks for likely answers, which are not drawn with the logprobs on record"
_REFUSED_KEYS: Mapping[str, tuple[tuple[Any, ...], str]] = {
    **dict.fromkeys(
        (
            "max_new_tokens",
            "max_output_tokens",
            "max_tokens_to_sample",
            "max_length",
            "num_predict",
        ),
        ((), _LENGTH),
    ),
    **dict.fromkeys(
        ("num_return_sequences", "response_candidates_count", "candidate_count", "num_generations"),
        ((), _COUNT),
    ),
    **dict.fromkeys(
        ("sampling_params", "parameters", "generation_config", "options", "inference_parameters"),
        ((), _BESIDE),
    ),
    "do_sample": ((True,), "write temperature 0 for a greedy answer"),
    "best_of": ((1,), _SEARCH),
    "num_beams": ((1,), _SEARCH),
    "use_beam_search": ((False,), _SEARCH),
    **dict.fromkeys(("prompt", "messages", "input", "inputs"), ((), _MESSAGES)),
    **dict.fromkeys(("input_ids", "text", "conversation"), ((), _MESSAGES)),
    **dict.fromkeys(("prompt_embeds", "input_embeds"), ((), _MESSAGES)),
    **dict.fromkeys(
        ("images", "image_data", "audio_data", "video_data", "multi_modal_data"),
        ((), "prompts are text"),
    ),
    **dict.fromkeys(("mm_processor_kwargs", "modalities"), ((), "prompts are text")),
    "tools": ((), "put tools on the row"),
    "functions": ((), "put tools on the row"),
    "function_call": (("auto",), _CALLS),
    "tool_choice": (("auto",), f"{_CALLS}; with tools on the row the model may call or answer"),
    "parallel_tool_calls": ((True,), f"{_CALLS}; all calls that the model writes are read"),
    "system": ((), "put a system message first in the row"),
    "system_prompt": ((), "put a system message first in the row"),
    "instructions": ((), "put a system message first in the row"),
    "chat_template_args": ((), "write chat_template_kwargs"),
    "template_kwargs": ((), "write chat_template_kwargs"),
    "add_generation_prompt": ((True,), _ENDS),
    "continue_final_message": ((False,), _ENDS),
    "echo": ((False,), "it would put the prompt into the completion"),
    "echo_last": ((False, 0), "it would put the prompt into the completion"),
    "suffix": (("",), _IDS),
    "truncate_prompt_tokens": ((), _IDS),
    "truncation_side": ((), _IDS),
    "prompt_truncate_len": ((), _IDS),
    "thinking": ((), _THINKING),
    "thinking_budget": ((), _THINKING),
    "thinking_token_budget": ((), _THINKING),
    "reasoning": ((), _THINKING),
    "reasoning_history": ((), _THINKING),
    "verbosity": ((), _THINKING),
    "include_reasoning": ((True,), _SHOWN),
    "separate_reasoning": ((True,), _SHOWN),
}
"""Fields that act on a prompt of messages or text, or on how a chat endpoint shows the answer, and
those that say in other words, or elsewhere, what is read here: the values that say what is done
anyway, and why others are refused."""
_TIMEOUT_KEYS = ("http_timeout", "timeout", "request_timeout")
"""Spellings of the seconds that one attempt may take, the first that is given wins."""
_MUST_BE_TRUE = ("logprobs", "return_token_ids", "raw_output")
"""Asked for in every request: without them there is nothing to train on."""


class ParamsError(EvalProtocolRftError, ValueError):
    """completion_params hold a wrong or contradictory value; the message names the key."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutRequest:
    """What one row asks for."""

    params: SamplingParams
    n: Annotated[int, Ge(1), Flag()]
    """Completions per prompt."""
    seed: Annotated[int | None, SAMPLING(unset="drawn and recorded where seeds are free")] = None
    """What each completion's own seed is derived from."""
    endpoint: Endpoint | None = None
    """Where to sample; None: in this process, model `params.model` without its `local/`; or with
    an engine that is yet to be started, see `needs_engine`."""
    tokenizer: Annotated[str | None, SAMPLING(unset="the model's")] = None
    """Folder or hub id."""
    chat_template_kwargs: Annotated[Mapping[str, Any], SAMPLING()] = field(default_factory=dict)
    """E.g. '{"enable_thinking": false}'."""
    chat_template: Annotated[str | None, SAMPLING(metavar="FILE|NAME", unset="the tokenizer's")] = (
        None
    )
    """A Jinja file, `chatml`, or the folder or hub id of a tokenizer that has one."""
    raw: Annotated[bool, SAMPLING()] = False
    """Prompts are text as it is, for base models: no chat template, and an answer is plain text."""
    add_special_tokens: Annotated[bool, SAMPLING()] = True
    """Let the tokenizer put before raw text what it puts before every text (BOS), as it does."""

    @property
    def in_process(self) -> bool:
        """Whether the model is sampled in this very process."""
        return self.endpoint is None and not self.needs_engine

    @property
    def needs_engine(self) -> bool:
        """Whether it names `vllm/...`, and no engine is known yet that this process has started for
        it."""
        return self.endpoint is None and self.params.model.startswith(VLLM_PREFIX)


def parse_completion_params(
    completion_params: Mapping[str, Any] | None, *, env: Mapping[str, str] = os.environ
) -> RolloutRequest:
    """Check completion_params and sort them into what samples, what travels and what is dropped.

    Raises:
        ParamsError: a missing, wrong or contradictory value; the message names the key.
    """
    keys = _Keys(flat_params(completion_params or {}))
    model = keys.take("model")
    if not isinstance(model, str) or not model.strip():
        raise ParamsError(f"completion_params['model'] must name a model, got {model!r}")
    n = keys.integer("n", at_least=1) or 1
    temperature = keys.number("temperature", low=0.0)
    if temperature == 0 and n > 1:
        raise ParamsError(
            f"completion_params['temperature'] is 0 with n={n}: greedy completions are all the "
            'same. Write "temperature": 1.0 to train on them, or "n": 1 to have one greedy answer'
        )
    _refuse_keys(keys)
    for key in _MUST_BE_TRUE:
        if keys.take(key) is False:
            raise ParamsError(f"completion_params[{key!r}] is False: training data needs it")
    endpoint_keys = {
        key: keys.take(key)
        for key in ("api_base", "base_url", "api_key", "extra_headers", "headers")
    }
    timeouts = [keys.number(key, above=0.0) for key in _TIMEOUT_KEYS]
    tokenizer = keys.take("tokenizer")
    if tokenizer is not None and not isinstance(tokenizer, str):
        raise ParamsError(
            "completion_params['tokenizer'] must be a folder or hub id; pass a tokenizer object "
            "to FireworksTrainingRolloutProcessor(tokenizer=...)"
        )
    prompts = _prompt_settings(keys)
    seed = keys.integer("seed")
    stream = keys.flag("stream")
    affinity = keys.flag("prompt_cache_affinity")
    local, vllm = model.startswith(LOCAL_PREFIX), model.startswith(VLLM_PREFIX)
    server_keys = [key for key, value in endpoint_keys.items() if value]
    if (local or vllm) and server_keys:
        how = "in this process and asks no server" if local else "with an engine of this process"
        raise ParamsError(
            f"completion_params[{server_keys[0]!r}] is given with the model {model!r}, which is "
            f"sampled {how}: leave {', '.join(server_keys)} out, or name the model as the server "
            "does"
        )
    logprobs_mode = _logprobs_mode(keys.take("logprobs_mode"))
    if vllm and logprobs_mode == "raw_logprobs":
        raise ParamsError(
            f"completion_params['logprobs_mode'] is 'raw_logprobs', and the engine of {model!r} is "
            "started with processed_logprobs: leave it out"
        )
    asked: dict[str, Any] = {
        "max_tokens": _max_tokens(keys) or (None if local else DEFAULT_MAX_TOKENS),
        "temperature": temperature,
        "top_p": keys.number("top_p", above=0.0, high=1.0),
        "top_k": keys.integer("top_k", at_least=-1),
        "stop": _stop(keys.take("stop")),
        "logprobs_mode": "processed_logprobs" if vllm else logprobs_mode,
        "stream": stream,
        "prompt_cache_affinity": affinity,
        "timeout": next((value for value in timeouts if value is not None), None),
    }
    params = SamplingParams(
        model=model_name(model),
        extra=keys.rest(),
        **{key: value for key, value in asked.items() if value is not None},
    )
    return RolloutRequest(
        params=params,
        n=n,
        seed=seed,
        endpoint=None if local or vllm else resolve_endpoint(model, endpoint_keys, env=env),
        tokenizer=tokenizer,
        **prompts,
    )


def model_name(model: str) -> str:
    """As the server knows it: litellm puts a provider in front."""
    return model.removeprefix("fireworks_ai/")


class _Keys:
    """The keys not looked at yet."""

    def __init__(self, values: dict[str, Any]) -> None:
        self._values = values

    def take(self, key: str) -> Any:
        return self._values.pop(key, None)

    def integer(self, key: str, *, at_least: int | None = None) -> int | None:
        value = self.take(key)
        if value is None:
            return None
        if isinstance(value, float) and value.is_integer():
            value = int(value)  # JSON and YAML turn 8 into 8.0
        if isinstance(value, bool) or not isinstance(value, int):
            raise ParamsError(f"completion_params[{key!r}] must be an integer, got {value!r}")
        if at_least is not None and value < at_least:
            raise ParamsError(
                f"completion_params[{key!r}] must be at least {at_least}, got {value}"
            )
        return value

    def flag(self, key: str) -> bool | None:
        value = self.take(key)
        if value is not None and not isinstance(value, bool):
            raise ParamsError(f"completion_params[{key!r}] must be true or false, got {value!r}")
        return value

    def number(
        self,
        key: str,
        *,
        low: float = -math.inf,
        above: float = -math.inf,
        high: float = math.inf,
    ) -> float | None:
        value = self.take(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ParamsError(f"completion_params[{key!r}] must be a number, got {value!r}")
        if isinstance(value, int) and abs(value) > sys.float_info.max:
            raise ParamsError(f"completion_params[{key!r}] is too large for a number")
        if not (math.isfinite(value) and low <= value <= high and value > above):
            floor = f"above {above:g}" if math.isfinite(above) else f"at least {low:g}"
            ceiling = f" and at most {high:g}" if math.isfinite(high) else ""
            raise ParamsError(f"completion_params[{key!r}] must be {floor}{ceiling}, got {value}")
        return float(value)

    def rest(self) -> dict[str, Any]:
        """What travels in the body for the server to judge, as plain JSON values."""
        return {
            key: _plain_json(key, value)
            for key, value in self._values.items()
            if value is not None and key not in DROPPED_KEYS and not key.startswith("litellm_")
        }


def flat_params(params: Mapping[str, Any]) -> dict[str, Any]:
    """completion_params with `extra_body` (a dict, or a JSON string in managed jobs) folded in."""
    flat = {key: value for key, value in params.items() if key != "extra_body"}
    for key in flat:
        if not isinstance(key, str):
            raise ParamsError(f"completion_params has the key {key!r}: keys are strings")
    body = params.get("extra_body")
    if isinstance(body, str):
        try:
            body = json.loads(body) if body.strip() else {}
        except ValueError as error:
            raise ParamsError(f"completion_params['extra_body'] is not JSON: {error}") from error
    if body is None:
        return flat
    if not isinstance(body, Mapping) or not all(isinstance(key, str) for key in body):
        raise ParamsError("completion_params['extra_body'] must be a dict with strings as keys")
    for key, value in body.items():
        if flat.get(key) is not None and flat[key] != value:
            # Without the values: one of them may be a key.
            raise ParamsError(
                f"completion_params[{key!r}] has one value and extra_body[{key!r}] another: "
                "give it once"
            )
        flat[key] = value
    return flat


def template_values(kwargs: Any) -> dict[str, Any]:
    """`chat_template_kwargs` as plain JSON values, which is what a chat server gets.

    Raises:
        ParamsError: they are no dict, or no JSON.
    """
    if not isinstance(kwargs, Mapping):
        raise ParamsError(f"'chat_template_kwargs' must be a dict, got {kwargs!r}")
    return {str(key): _plain_json(f"chat_template_kwargs: {key}", kwargs[key]) for key in kwargs}


def _template_kwargs(keys: _Keys) -> dict[str, Any]:
    kwargs = template_values(keys.take("chat_template_kwargs") or {})
    for key in TEMPLATE_KEYS:
        value = keys.take(key)
        if value is None:
            continue
        if kwargs.setdefault(key, value) != value:
            raise ParamsError(
                f"completion_params[{key!r}] is {value!r} and chat_template_kwargs has "
                f"{kwargs[key]!r}: give it once"
            )
        kwargs[key] = _plain_json(key, value)
    return kwargs


def _prompt_settings(keys: _Keys) -> dict[str, Any]:
    """How messages, or raw text, become token ids."""
    kwargs, template = _template_kwargs(keys), keys.take("chat_template")
    if template is not None and (not isinstance(template, str) or not template.strip()):
        raise ParamsError(
            "completion_params['chat_template'] must be a template, the path of one, or a name, "
            f"got {template!r}"
        )
    raw, added = keys.flag("raw") or False, keys.flag("add_special_tokens")
    if raw and (template is not None or kwargs):
        unread = "chat_template" if template is not None else ", ".join(kwargs)
        raise ParamsError(
            "completion_params['raw'] sends prompts as plain text, which no chat template renders: "
            f"leave out either raw or {unread}"
        )
    if added and not raw:
        raise ParamsError(f"completion_params['add_special_tokens'] is not accepted: {_IDS}")
    return {
        "chat_template_kwargs": kwargs,
        "chat_template": template,
        "raw": raw,
        "add_special_tokens": added is not False or not raw,
    }


def _refuse_keys(keys: _Keys) -> None:
    for key, (neutral, why) in _REFUSED_KEYS.items():
        value = keys.take(key)
        # By type too: 1 is not True here.
        if value is None or any(value == v and type(value) is type(v) for v in neutral):
            continue
        raise ParamsError(f"completion_params[{key!r}] is not accepted: {why}")


def _max_tokens(keys: _Keys) -> int | None:
    first = keys.integer("max_tokens", at_least=1)
    second = keys.integer("max_completion_tokens", at_least=1)
    if first is not None and second is not None and first != second:
        raise ParamsError(
            f"completion_params['max_tokens'] is {first} and 'max_completion_tokens' {second}: "
            "they mean the same, give one"
        )
    return first if first is not None else second


def _stop(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list | tuple) or not all(
        isinstance(stop, str) and stop for stop in stops
    ):
        raise ParamsError(
            f"completion_params['stop'] must be a string or a list of strings, got {value!r} "
            "(for token ids use stop_token_ids where the server has it)"
        )
    return tuple(stops)


def _logprobs_mode(value: Any) -> Any:
    if value not in (None, "processed_logprobs", "raw_logprobs"):
        raise ParamsError(
            "completion_params['logprobs_mode'] must be 'processed_logprobs' or 'raw_logprobs' "
            f"(what the vLLM server's --logprobs-mode says), got {value!r}"
        )
    return value


def _plain_json(key: str, value: Any) -> Any:
    """`value` as its JSON reads back, which is what the server gets and the record keeps."""
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ParamsError(f"completion_params[{key!r}] is not JSON: {error}") from error
