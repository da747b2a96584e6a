"""Which server a request goes to, and with which key. Everything made up goes through HTTP in
`test_processor_requests.py`; here are the hosts that no test may reach."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval_protocol_rft.sampling._endpoint import Endpoint, fireworks_address, resolve_endpoint

KEY = "fw-key-of-the-environment"
FIREWORKS = "https://api.fireworks.ai/inference/v1"


def resolve(model: str = "Qwen/Qwen3-8B", env: dict | None = None, **params) -> Endpoint:
    return resolve_endpoint(model, params, env=env if env is not None else {})


URLS = {
    "https://api.fireworks.ai": FIREWORKS,
    "https://api.fireworks.ai/": FIREWORKS,
    "https://api.fireworks.ai/v1": FIREWORKS,
    "https://api.fireworks.ai/inference": FIREWORKS,
    "https://api.fireworks.ai/inference/": FIREWORKS,
    "https://api.fireworks.ai/inference/v1": FIREWORKS,
    "https://api.fireworks.ai/inference/v1/completions": FIREWORKS,
    "https://api.fireworks.ai/inference/v1/chat/completions": FIREWORKS,
    "HTTPS://api.fireworks.ai/inference/v1": FIREWORKS,
    "https://acme-1a2b.us-iowa-1.direct.fireworks.ai": (
        "https://acme-1a2b.us-iowa-1.direct.fireworks.ai/v1"
    ),
    "http://localhost:8000": "http://localhost:8000/v1",
    "http://localhost:8000/v1//": "http://localhost:8000/v1",
    "http://[::1]:8000/v1": "http://[::1]:8000/v1",
    "http://gateway/team/llm": "http://gateway/team/llm/v1",
    "http://gateway/chat": "http://gateway/chat/v1",
    "http://gateway/v12": "http://gateway/v12/v1",
}


@pytest.mark.parametrize("given_url", URLS)
@pytest.mark.parametrize("key", ["api_base", "base_url"])
def test_a_url_leads_to(key, given_url):
    assert resolve(**{key: given_url}).base_url == URLS[given_url]


@given(st.sampled_from(sorted(URLS)))
def test_a_url_that_was_resolved_stays_as_it_is(given_url):
    once = resolve(api_base=given_url).base_url
    assert resolve(api_base=once).base_url == once


@pytest.mark.parametrize(
    "wrong",
    [
        "localhost:8000",
        "ftp://host/v1",
        "http://",
        "http:///v1",
        "http://[::1",
        "http://host:port/v1",
        "https://host/v1?key=1",
        "https://host/v1#here",
        "https://me:pw@host/v1",
        "sk-key",
        5,
    ],
)
def test_what_is_no_plain_url_is_refused_by_the_name_of_its_key(wrong):
    with pytest.raises(ValueError, match=r"completion_params\['api_base'\] must be") as raised:
        resolve(api_base=wrong)
    assert str(wrong) not in str(raised.value)
    if isinstance(wrong, str):
        with pytest.raises(ValueError, match="EP_LLM_API_BASE must be"):
            resolve(env={"EP_LLM_API_BASE": wrong})


def test_two_spellings_of_one_server_are_fine_and_two_servers_are_not():
    both = resolve(api_base="http://h/v1", base_url="http://h/")
    assert both.base_url == "http://h/v1"
    with pytest.raises(ValueError, match=r"'api_base'.*'base_url'.*give one"):
        resolve(api_base="http://h/v1", base_url="http://g/v1")


def test_completion_params_go_before_the_environment_and_that_before_fireworks():
    env = {
        "EP_LLM_API_BASE": "http://one",
        "EP_LLM_BASE_URL": "http://two",
        "FIREWORKS_BASE_URL": "http://three",
    }
    assert resolve(api_base="http://zero", env=env).base_url == "http://zero/v1"
    for name, expected in (
        ("EP_LLM_API_BASE", "http://one/v1"),
        ("EP_LLM_BASE_URL", "http://two/v1"),
        ("FIREWORKS_BASE_URL", "http://three/v1"),
    ):
        assert resolve(env=env).base_url == expected
        del env[name]
    assert resolve(env=env).base_url == FIREWORKS
    assert resolve(env={"EP_LLM_API_BASE": ""}).base_url == FIREWORKS


@pytest.mark.parametrize(
    ("params", "env", "sent"),
    [
        ({}, {}, KEY),
        ({"api_base": "https://api.fireworks.ai/inference/v1"}, {}, KEY),
        ({"api_base": "https://x.direct.fireworks.ai/v1"}, {}, KEY),
        ({"api_base": "https://fireworks.ai/v1"}, {}, KEY),
        ({"api_base": "https://fireworks.ai.example.org/v1"}, {}, None),
        ({"api_base": "https://notfireworks.ai/v1"}, {}, None),
        ({"api_base": "http://localhost:8000"}, {}, None),
        ({}, {"EP_LLM_API_BASE": "http://localhost:8000"}, None),
        ({}, {"FIREWORKS_BASE_URL": "http://localhost:8000"}, KEY),
        ({"model": "accounts/a/models/m", "api_base": "http://gateway"}, {}, KEY),
        ({"model": "fireworks_ai/x", "api_base": "http://gateway"}, {}, KEY),
        ({"api_base": "http://localhost:8000", "api_key": "mine"}, {}, "mine"),
        ({"api_key": "mine"}, {}, "mine"),
        ({"api_key": ""}, {}, None),
        ({"extra_headers": {"AUTHORIZATION": "Bearer other"}}, {}, None),
        ({"headers": {"x-api-key": "other"}}, {}, None),
        ({"extra_headers": {"X-Team": "rl"}}, {}, KEY),
    ],
    ids=str,
)
def test_the_key_that_goes_along(params, env, sent):
    params = {"model": "Qwen/Qwen3-8B", **params}
    model = params.pop("model")
    assert resolve(model, {"FIREWORKS_API_KEY": KEY, **env}, **params).api_key == sent


def test_without_a_key_none_is_sent():
    assert resolve("accounts/a/models/m").api_key is None
    assert resolve("accounts/a/models/m", {"FIREWORKS_API_KEY": ""}).api_key is None


@pytest.mark.parametrize("key", ["sk-key\n", " sk-key", "sk\tkey", "sk-key\x7f"])
def test_a_key_with_blanks_or_breaks_is_refused_without_being_shown(key):
    for params, env in (({"api_key": key}, {}), ({}, {"FIREWORKS_API_KEY": key})):
        with pytest.raises(ValueError, match="the API key has a blank") as raised:
            resolve(env=env, **params)
        assert "sk" not in str(raised.value)


def test_headers_of_both_spellings_are_merged_and_never_shown():
    endpoint = resolve(
        headers={"A": "1", "B": "of headers"}, extra_headers={"B": "of extra_headers"}, api_key="k"
    )
    assert dict(endpoint.headers) == {"A": "1", "B": "of extra_headers"}
    assert "extra_headers" not in repr(endpoint)
    assert "'k'" not in repr(endpoint)


def test_endpoints_are_equal_where_everything_is():
    one = resolve(api_base="http://h", api_key="k", headers={"A": "1", "B": "2"})
    two = resolve(base_url="http://h/v1/", api_key="k", extra_headers={"B": "2", "A": "1"})
    assert one == two
    assert hash(one) == hash(two)
    assert one != resolve(api_base="http://h", api_key="other", headers={"A": "1", "B": "2"})


def test_secrets_are_the_key_and_the_long_parts_of_headers_longest_first():
    endpoint = Endpoint("http://h/v1", "key", (("A", "Bearer 0123456789"), ("B", "short")))
    assert endpoint.secrets == ("Bearer 0123456789", "0123456789", "key")
    cookie = Endpoint("http://h/v1", None, (("Cookie", "session=0123456789; theme=dark"),))
    assert "0123456789" in cookie.secrets
    assert Endpoint("http://h/v1").secrets == ()


@pytest.mark.parametrize(
    "tail",
    [
        *("", "/", "/v1", "/inference", "/inference/", "/inference/v1", "/training/v1"),
        *("/inference/v1/completions", "/inference/v1/chat/completions"),
        "/training/v1/serverless",
    ],
)
@pytest.mark.parametrize("root", ["http://h:1", "https://gateway.example/team"])
def test_one_address_of_fireworks_in_all_its_spellings(root, tail):
    for address in (
        fireworks_address(root + tail, env={"FIREWORKS_BASE_URL": "http://other"}),
        fireworks_address(env={"FIREWORKS_BASE_URL": root + tail}),
    ):
        assert (address.url, address.inference) == (root, f"{root}/inference/v1")


def test_the_address_of_fireworks_says_where_it_comes_from():
    env = {"FIREWORKS_BASE_URL": "http://h"}
    assert str(fireworks_address(env=env)) == "http://h (FIREWORKS_BASE_URL)"
    assert str(fireworks_address("http://g", option="--base-url", env=env)).endswith("(--base-url)")
    assert fireworks_address(env={}).url == "https://api.fireworks.ai"
    with pytest.raises(ValueError, match="FIREWORKS_BASE_URL must be"):
        fireworks_address(env={"FIREWORKS_BASE_URL": "fw_key"})
    with pytest.raises(ValueError, match="--base-url must be"):
        fireworks_address("localhost:8000", option="--base-url", env=env)
