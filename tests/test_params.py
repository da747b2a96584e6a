"""completion_params, as users, litellm, recipes and managed jobs write them."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval_protocol_rft.rollout._params import (
    DROPPED_KEYS,
    ParamsError,
    RolloutRequest,
    parse_completion_params,
)


def parse(**params: Any) -> RolloutRequest:
    return parse_completion_params({"model": "m", **params}, env={})


def test_a_model_is_enough():
    request = parse()
    params = request.params
    assert (params.model, request.n, request.seed) == ("m", 1, None)
    assert (params.temperature, params.top_p, params.top_k, params.stop) == (1.0, 1.0, 0, ())
    assert (params.max_tokens, params.timeout, params.extra) == (2048, 600.0, {})
    assert request.endpoint.base_url == "https://api.fireworks.ai/inference/v1"


def test_a_local_model_has_no_endpoint_and_its_own_limit_of_tokens():
    request = parse_completion_params({"model": "local/arithmetic"}, env={})
    assert request.endpoint is None
    assert request.params.model == "local/arithmetic"
    assert request.params.max_tokens is None


def test_what_is_given_is_used():
    request = parse(
        n=8,
        temperature=0.7,
        top_p=0.9,
        top_k=40,
        max_tokens=100,
        stop=["a", "b"],
        seed=-3,
        tokenizer="Qwen/Qwen3-8B",
        chat_template_kwargs={"enable_thinking": False},
        logprobs_mode="processed_logprobs",
    )
    params = request.params
    assert (request.n, request.seed, request.tokenizer) == (8, -3, "Qwen/Qwen3-8B")
    assert (params.temperature, params.top_p, params.top_k) == (0.7, 0.9, 40)
    assert (params.max_tokens, params.stop) == (100, ("a", "b"))
    assert params.logprobs_mode == "processed_logprobs"
    assert request.chat_template_kwargs == {"enable_thinking": False}
    assert params.extra == {}


SPELLINGS = [
    ({"max_completion_tokens": 7}, "max_tokens", 7),
    ({"max_completion_tokens": 7, "max_tokens": 7}, "max_tokens", 7),
    ({"max_tokens": 7.0}, "max_tokens", 7),
    ({"stop": "x"}, "stop", ("x",)),
    ({"stop": ("x", "y")}, "stop", ("x", "y")),
    ({"stop": []}, "stop", ()),
    ({"temperature": 1}, "temperature", 1.0),
    ({"temperature": 0}, "temperature", 0.0),
    ({"top_k": -1}, "top_k", -1),
    ({"http_timeout": 5}, "timeout", 5.0),
    ({"timeout": 5.5}, "timeout", 5.5),
    ({"request_timeout": 6}, "timeout", 6.0),
    ({"http_timeout": 5, "timeout": 7}, "timeout", 5.0),
    ({"model": "fireworks_ai/accounts/f/models/q"}, "model", "accounts/f/models/q"),
    ({"extra_body": {"top_p": 0.5}}, "top_p", 0.5),
    ({"extra_body": '{"top_p": 0.5}'}, "top_p", 0.5),
    ({"extra_body": ""}, "extra", {}),
    ({"extra_body": None}, "extra", {}),
    ({"extra_body": {"min_p": 0.1}, "user": "me"}, "extra", {"min_p": 0.1, "user": "me"}),
    ({"extra_body": {"user": "me"}, "user": "me"}, "extra", {"user": "me"}),
    ({"logit_bias": {5: -100}}, "extra", {"logit_bias": {"5": -100}}),
    ({"metadata": {"a": (1, 2)}}, "extra", {"metadata": {"a": [1, 2]}}),
    ({"logprobs": True, "return_token_ids": True, "raw_output": True}, "extra", {}),
    ({"logprobs": 5, "echo": False, "echo_last": 0}, "extra", {}),
    ({"tool_choice": "auto", "parallel_tool_calls": True, "suffix": ""}, "extra", {}),
    ({"do_sample": True, "best_of": 1, "num_beams": 1, "use_beam_search": False}, "extra", {}),
    ({"add_generation_prompt": True, "add_special_tokens": False}, "extra", {}),
    ({"litellm_metadata": {}, "litellm_call_id": "x"}, "extra", {}),
    ({"top_p": None, "stop": None, "n": None, "anything": None}, "extra", {}),
]


@pytest.mark.parametrize(("given_params", "field", "expected"), SPELLINGS, ids=str)
def test_spellings(given_params, field, expected):
    value = getattr(parse(**given_params).params, field)
    assert value == expected
    assert type(value) is type(expected)


WRONG = [
    ({"model": None}, "model"),
    ({"model": ""}, "model"),
    ({"model": " "}, "model"),
    ({"model": 5}, "model"),
    ({"n": 0}, "n"),
    ({"n": -2}, "n"),
    ({"n": 1.5}, "n"),
    ({"n": True}, "n"),
    ({"n": "4"}, "n"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": math.nan}, "temperature"),
    ({"temperature": math.inf}, "temperature"),
    ({"temperature": 10**400}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": False}, "temperature"),
    ({"temperature": 0, "n": 2}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.01}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"top_k": 0.5}, "top_k"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": math.inf}, "max_tokens"),
    ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ({"max_tokens": 5, "max_completion_tokens": 6}, "max_completion_tokens"),
    ({"stop": 5}, "stop"),
    ({"stop": ""}, "stop"),
    ({"stop": ["a", ""]}, "stop"),
    ({"stop": [7]}, "stop"),
    ({"stop": {"a": 1}}, "stop"),
    ({"seed": 0.5}, "seed"),
    ({"seed": "x"}, "seed"),
    ({"http_timeout": 0}, "http_timeout"),
    ({"timeout": -1}, "timeout"),
    ({"http_timeout": 5, "timeout": "soon"}, "timeout"),
    ({"tokenizer": 5}, "tokenizer"),
    ({"chat_template_kwargs": "x"}, "chat_template_kwargs"),
    ({"logprobs_mode": "raw"}, "logprobs_mode"),
    ({"logprobs": False}, "logprobs"),
    ({"return_token_ids": False}, "return_token_ids"),
    ({"raw_output": False}, "raw_output"),
    ({"extra_body": {"max_new_tokens": 8}}, "max_new_tokens"),
    ({"max_output_tokens": 8}, "max_output_tokens"),
    ({"num_return_sequences": 4}, "num_return_sequences"),
    ({"sampling_params": {"temperature": 0.5}}, "sampling_params"),
    ({"do_sample": False}, "do_sample"),
    ({"best_of": 4}, "best_of"),
    ({"use_beam_search": True}, "use_beam_search"),
    ({"echo": True}, "echo"),
    ({"echo_last": 3}, "echo_last"),
    ({"prompt": "hi"}, "prompt"),
    ({"messages": []}, "messages"),
    ({"tools": [{}]}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"parallel_tool_calls": False}, "parallel_tool_calls"),
    ({"extra_body": {"add_generation_prompt": False}}, "add_generation_prompt"),
    ({"continue_final_message": True}, "continue_final_message"),
    ({"suffix": "}"}, "suffix"),
    ({"truncate_prompt_tokens": 10}, "truncate_prompt_tokens"),
    ({"add_special_tokens": True}, "add_special_tokens"),
    ({"extra_body": {"thinking": {"type": "disabled"}}}, "thinking"),
    (
        {"reasoning_effort": "low", "chat_template_kwargs": {"reasoning_effort": "high"}},
        "reasoning_effort",
    ),
    ({"chat_template_kwargs": {"documents": ...}}, "chat_template_kwargs: documents"),
    ({"system_prompt": "be"}, "system_prompt"),
    ({"extra_body": [1]}, "extra_body"),
    ({"extra_body": "{"}, "extra_body"),
    ({"extra_body": "[1]"}, "extra_body"),
    ({"extra_body": {1: 2}}, "extra_body"),
    ({"extra_body": {"temperature": 0.5}, "temperature": 0.6}, "temperature"),
    ({"extra_body": {"top_p": 2}}, "top_p"),
    ({"custom": math.nan}, "custom"),
    ({"custom": [1, {"a": math.inf}]}, "custom"),
    ({"custom": {1, 2}}, "custom"),
    ({"custom": b"x"}, "custom"),
    ({"api_base": "localhost:8000"}, "api_base"),
    ({"base_url": 5}, "base_url"),
    ({"api_key": 5}, "api_key"),
    ({"extra_headers": "x"}, "extra_headers"),
    ({"headers": {"a": 1}}, "headers"),
]


@pytest.mark.parametrize(("given_params", "key"), WRONG, ids=str)
def test_a_wrong_value_is_an_error_that_names_its_key(given_params, key):
    with pytest.raises(ValueError, match=rf"completion_params\['{key}'\]|'{key}'"):
        parse(**given_params)


def test_a_key_that_is_no_string_is_an_error_that_shows_it():
    with pytest.raises(ParamsError, match="the key 5"):
        parse_completion_params({"model": "m", 5: 6}, env={})


@pytest.mark.parametrize("key", sorted(DROPPED_KEYS))
def test_keys_of_other_clients_are_dropped_wherever_they_stand(key):
    assert parse(**{key: "anything"}).params.extra == {}
    assert parse(extra_body={key: "anything"}).params.extra == {}


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)
known = st.sampled_from(
    [
        "model n temperature top_p top_k max_tokens max_completion_tokens stop seed timeout",
        "http_timeout extra_body tokenizer chat_template_kwargs logprobs_mode echo api_base",
        "base_url api_key extra_headers headers logprobs tools cache",
    ]
).flatmap(lambda names: st.sampled_from(names.split()))


@given(
    params=st.dictionaries(known | st.text(max_size=6), plain, max_size=8),
    model=st.sampled_from(["m", "local/x", "accounts/a/models/m"]),
)
def test_any_dict_is_a_request_or_a_value_error_and_stays_as_it_was(params, model):
    params = {"model": model, **params}
    before = copy.deepcopy(params)
    try:
        request = parse_completion_params(params, env={})
    except ValueError:
        request = None
    assert repr(params) == repr(before)
    if request is None:
        return
    assert request.n >= 1
    assert request.params.temperature > 0 or request.n == 1
    assert 0 < request.params.top_p <= 1
    assert request.params.top_k >= -1
    assert request.params.timeout > 0
    body = json.dumps(dict(request.params.extra), allow_nan=False)
    assert json.loads(body) == request.params.extra
    assert not set(request.params.extra) & {*DROPPED_KEYS, "n", "seed", "api_key", "prompt", "echo"}


@pytest.mark.parametrize("place", ["beside", "extra_body", "chat_template_kwargs"])
def test_what_chat_servers_give_to_the_template_reaches_it_from_wherever_it_stands(place):
    values = {"reasoning_effort": "high", "enable_thinking": False, "documents": [{"text": "x"}]}
    request = parse(**(values if place == "beside" else {place: values}))
    assert request.chat_template_kwargs == values
    assert request.params.extra == {}
