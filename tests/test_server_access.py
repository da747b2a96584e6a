"""Who is answered by the server, how much one request may ask for, and who waits meanwhile."""

from __future__ import annotations

import json
import threading

import httpx
import pytest

from eval_protocol_rft.local._sampler import LOWEST_TEMPERATURE, check_params
from eval_protocol_rft.local.server._app import create_app
from eval_protocol_rft.local.server._protocol import MAX_BODY_BYTES, MAX_CHOICES
from eval_protocol_rft.local.server._serving import Access, AccessMiddleware, _greeting
from eval_protocol_rft.sampling._types import Completion, RefusedError, SamplingParams
from tests.serving import ScriptedSampler, byte_tokenizer, post_and_leave, running
from tests.waiting import PATIENCE


def one_token(prompt_ids, params, seed) -> Completion:
    return Completion(token_ids=[65], logprobs=[-1.0], raw_logprobs=[-1.0], finish_reason="length")


BODY = {"model": "m", "prompt": [1, 2, 3], "max_tokens": 1}
LOOPBACK = Access(loopback_only=True)
OPEN = Access(loopback_only=False)
WITH_KEY = Access(loopback_only=False, api_key="key of the server")


@pytest.fixture(params=["/v1/completions", "/inference/v1/completions"])
def path(request) -> str:
    return request.param


def serving(access: Access | None, tokenizer=None, sampler=None):
    sampler = sampler or ScriptedSampler(one_token)
    app = create_app(sampler, tokenizer or byte_tokenizer(), model_name="m")
    if access is not None:
        app.add_middleware(AccessMiddleware, access=access)
    return running(app)


# Host and Origin

NAMES_OF_THIS_MACHINE = ["127.0.0.1", "localhost:8000", "LOCALHOST", "127.1.2.3:1", "[::1]:8000"]
OTHER_NAMES = ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "192.168.0.7", ""]
OTHER_ORIGINS = ["http://evil.example", "null", "https://localhost.evil.example:8000", "file://"]


def test_on_loopback_only_names_of_loopback_are_answered(path):
    with serving(LOOPBACK) as url, httpx.Client(base_url=url) as client:

        def status(**headers: str) -> int:
            return client.post(path, json=BODY, headers=headers).status_code

        assert {status(host=name) for name in NAMES_OF_THIS_MACHINE} == {200}
        assert {status(host=name) for name in OTHER_NAMES} == {403}
        assert status(origin="http://localhost:3000") == 200
        assert {status(origin=origin) for origin in OTHER_ORIGINS} == {403}
        assert client.get("/v1/models", headers={"host": "evil.example"}).status_code == 403
        refusal = client.post("/update_weight_version", headers={"host": "evil.example"})
        assert refusal.status_code == 403
        assert "'evil.example' is no name of this machine's loopback" in refusal.text


def test_elsewhere_any_name_is_answered_but_no_page_of_another_origin():
    with serving(OPEN) as url, httpx.Client(base_url=url) as client:

        def status(**headers: str) -> int:
            return client.post("/v1/completions", json=BODY, headers=headers).status_code

        assert status(host="policy.internal:8000") == 200
        assert status(host="policy.internal", origin="http://policy.internal") == 200
        assert status(host="policy.internal", origin="http://evil.example") == 403


# The key


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        ({}, 401),
        ({"authorization": "Bearer another"}, 401),
        ({"authorization": "Basic key of the server"}, 401),
        ({"authorization": "Bearer kéy".encode()}, 401),
        ({"authorization": "Bearer key of the server"}, 200),
        ({"authorization": "bearer key of the server"}, 200),
    ],
)
def test_a_server_with_a_key_asks_for_it(sent, status):
    with serving(WITH_KEY) as url, httpx.Client(base_url=url) as client:
        assert client.post("/v1/completions", json=BODY, headers=sent).status_code == status
        assert client.get("/v1/models", headers=sent).status_code == status
        assert client.get("/health").status_code == 200


@pytest.mark.parametrize(
    ("access", "reloads", "warned"), [(LOOPBACK, True, 0), (OPEN, False, 1), (WITH_KEY, False, 0)]
)
def test_who_serves_everybody_is_warned(access, reloads, warned):
    place = "cpu, float32"
    said = _greeting("m", "http://x", byte_tokenizer(), place=place, access=access, reloads=reloads)
    assert place in said
    assert said.count("WARNING") == warned
    assert ("new weights" in said) is reloads
    assert ("Bearer KEY" in said) is (access.api_key is not None)
    assert "key of the server" not in said


# What one request may ask for


def test_a_body_that_does_not_say_json_is_not_read(path):
    with serving(None) as url, httpx.Client(base_url=url) as client:
        for kind in ("text/plain", "application/x-www-form-urlencoded", None):
            headers = {"content-type": kind} if kind else {}
            reply = client.post(path, content=json.dumps(BODY).encode(), headers=headers)
            assert reply.status_code == 415
        json_with_more = {"content-type": "application/json; charset=utf-8"}
        content = json.dumps(BODY).encode()
        assert client.post(path, content=content, headers=json_with_more).status_code == 200


@pytest.mark.parametrize(("prompts", "n"), [(MAX_CHOICES + 1, 1), (2000, 128), (9, 128)])
def test_more_completions_than_a_reply_holds_are_refused(prompts, n):
    sampler = ScriptedSampler(one_token)
    with serving(None, sampler=sampler) as url:
        reply = httpx.post(
            f"{url}/v1/completions", json={**BODY, "prompt": [[1, 2, 3]] * prompts, "n": n}
        )
    assert reply.status_code == 400
    assert f"make {prompts * n} completions" in reply.json()["error"]["message"]
    assert sampler.asked == []


def test_as_many_completions_as_a_reply_holds_are_sampled():
    prompts = [[1, 2, 3]] * (MAX_CHOICES // 128)
    with serving(None) as url:
        body = {**BODY, "prompt": prompts, "n": 128, "logprobs": True}
        reply = httpx.post(f"{url}/v1/completions", json=body, timeout=PATIENCE)
    assert [choice["index"] for choice in reply.json()["choices"]] == list(range(MAX_CHOICES))


def test_a_body_beyond_its_bound_is_refused_whether_its_length_was_said_or_not():
    padding = b" " * (MAX_BODY_BYTES + 1)
    headers = {"content-type": "application/json"}
    with serving(None) as url, httpx.Client(base_url=url, timeout=PATIENCE) as client:
        for content in (padding, iter([padding])):
            try:
                status = client.post("/v1/completions", content=content, headers=headers)
            except (httpx.WriteError, httpx.RemoteProtocolError):
                continue  # the server has closed before all of it was sent
            assert status.status_code == 413
        assert client.get("/health").status_code == 200


# Others are answered meanwhile


class SlowTokenizer:
    """A tokenizer that does not come to an end until it is told to."""

    def __init__(self) -> None:
        self.own = byte_tokenizer()
        self.began, self.may_end = threading.Event(), threading.Event()

    def encode(self, text: str) -> list[int]:
        self.began.set()
        assert self.may_end.wait(30)
        return self.own.encode(text)

    def __getattr__(self, name: str):
        return getattr(self.own, name)


def test_a_text_that_takes_long_to_encode_holds_up_nobody(monkeypatch):
    slow = SlowTokenizer()
    own = byte_tokenizer()
    monkeypatch.setattr(own, "encode", slow.encode)
    with serving(None, tokenizer=own) as url:
        replies = []
        body = {**BODY, "prompt": "a long text"}
        waiting = threading.Thread(
            target=lambda: replies.append(httpx.post(f"{url}/v1/completions", json=body))
        )
        waiting.start()
        assert slow.began.wait(PATIENCE)
        assert httpx.get(f"{url}/health", timeout=PATIENCE).status_code == 200
        ids = {**BODY, "max_tokens": 1}
        assert httpx.post(f"{url}/v1/completions", json=ids, timeout=PATIENCE).status_code == 200
        assert replies == []
        slow.may_end.set()
        waiting.join(PATIENCE)
        assert [reply.status_code for reply in replies] == [200]


def test_a_client_that_leaves_while_its_text_is_encoded_is_not_sampled_for(monkeypatch):
    slow = SlowTokenizer()
    own = byte_tokenizer()
    monkeypatch.setattr(own, "encode", slow.encode)
    sampler = ScriptedSampler(one_token)
    with serving(None, tokenizer=own, sampler=sampler) as url:
        with post_and_leave(url, {**BODY, "prompt": "a long text"}):
            assert slow.began.wait(PATIENCE)
        while (
            httpx.post(f"{url}/v1/completions", json=BODY).headers[
                "fireworks-num-concurrent-requests"
            ]
            != "1"
        ):
            pass  # until the request that nobody waits for is given up
        asked = len(sampler.asked)
        slow.may_end.set()
        assert httpx.get(f"{url}/health").status_code == 200
        assert len(sampler.asked) == asked
        assert all(prompt == [1, 2, 3] for prompt, _, _ in sampler.asked)


# Names and temperatures


def test_a_name_with_or_without_local_in_front_is_the_same_model():
    app = create_app(ScriptedSampler(one_token), byte_tokenizer(), model_name="arithmetic")
    with running(app) as url, httpx.Client(base_url=url) as client:
        for name, status in (("arithmetic", 200), ("local/arithmetic", 200), ("other", 404)):
            reply = client.post("/v1/completions", json={**BODY, "model": name})
            assert reply.status_code == status


@pytest.mark.parametrize("temperature", [1e-300, 5e-324, 9.9e-6])
def test_a_temperature_that_float32_cannot_divide_by_is_refused(temperature):
    with pytest.raises(RefusedError, match=r"must be 0 \(the best token\) or at least 1e-05"):
        check_params(SamplingParams(model="m", temperature=temperature))


def test_the_lowest_temperature_and_zero_are_taken():
    for temperature in (0.0, LOWEST_TEMPERATURE):
        check_params(SamplingParams(model="m", temperature=temperature))
