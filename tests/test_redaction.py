import copy
import json

import pytest

from eval_protocol_rft.rollout._commit import is_secret_key, redact_params

CREDENTIALS = [
    "api_key",
    "API-KEY",
    "apiKey",
    "OPENAI_API_KEY",
    "X-Api-Key",
    "Authorization",
    "proxy-authorization",
    "access_token",
    "hf_token",
    "token",
    "azure_ad_token",
    "aws_secret_access_key",
    "awsAccessKeyId",
    "vertex_credentials",
    "Ocp-Apim-Subscription-Key",
    "client_secret",
    "password",
    "Set-Cookie",
    "auth",
    "extra_headers",
]
SETTINGS = [
    "model",
    "max_tokens",
    "max_completion_tokens",
    "return_token_ids",
    "stop_token_ids",
    "eos_token",
    "pad_token_id",
    "tokenizer",
    "top_k",
    "key",
    "prompt_cache_key",
    "author",
    "seed",
    "logprobs",
    "base_url",
    "user",
    "secretary",
]


@pytest.mark.parametrize("key", CREDENTIALS)
def test_a_key_that_names_a_credential_is_one_however_it_is_spelled(key):
    assert is_secret_key(key)


@pytest.mark.parametrize("key", SETTINGS)
def test_a_key_that_only_looks_like_one_is_a_setting(key):
    assert not is_secret_key(key)


def test_credentials_are_left_out_at_every_depth_and_the_rest_stays():
    params = {
        "model": "m",
        "api_key": "hush",
        "extra_headers": {"Authorization": "Bearer hush", "X-Trace": "7"},
        "extra_body": {"tools": [{"name": "f", "headers": {"x-api-key": "hush"}}], "n": 4},
        "stop": ("a", "{"),
    }
    before = copy.deepcopy(params)
    clean = redact_params(params)
    assert clean == {
        "model": "m",
        "extra_body": {"tools": [{"name": "f"}], "n": 4},
        "stop": ["a", "{"],
    }
    assert params == before


def test_an_extra_body_written_as_json_text_is_searched_too():
    clean = redact_params({"extra_body": json.dumps({"seed": 1, "api_key": "hush"})})
    assert json.loads(clean["extra_body"]) == {"seed": 1}


def test_json_text_without_credentials_stays_as_it_was_written():
    text = '{"seed":   1}'
    assert redact_params({"extra_body": text}) == {"extra_body": text}


def test_a_url_loses_its_user_and_password():
    params = {"base_url": "https://me:hush@host:8000/v1", "webhook": "http://host/a@b"}
    assert redact_params(params) == {
        "base_url": "https://host:8000/v1",
        "webhook": "http://host/a@b",
    }
