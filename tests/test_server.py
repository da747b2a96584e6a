"""The server in Fireworks' shape, over real HTTP, with a scripted sampler behind it."""

from __future__ import annotations

import json
import time
from contextlib import contextmanager

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from eval_protocol_rft.local._tokenizer import LoadedTokenizer
from eval_protocol_rft.local.server._app import create_app
from eval_protocol_rft.local.server._protocol import choice_seed
from eval_protocol_rft.local.server._reply_bodies import spell
from eval_protocol_rft.sampling._types import (
    Completion,
    ContractError,
    RefusedError,
    SamplingError,
    SamplingParams,
)
from tests.serving import EOS, ScriptedSampler, byte_tokenizer, post_and_leave, running
from tests.waiting import PATIENCE, wait_until

TOKENIZER = byte_tokenizer()
EOS_ID = TOKENIZER.convert_tokens_to_ids(EOS)
CONTEXT = 100


def ids_of(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False)


def completion_of(text: str, /, **changes) -> Completion:
    """A completion that says `text`, ended by its end-of-turn token; logprobs -1, -2, ..."""
    ids = [*ids_of(text), EOS_ID]
    fields = {
        "token_ids": ids,
        "logprobs": [-1.0 - i for i in range(len(ids))],
        "raw_logprobs": [-1.5 - i for i in range(len(ids))],
        "finish_reason": "stop",
        "text": text,
        "stop_reason": EOS_ID,
    }
    return Completion(**{**fields, **changes})


def tell_seed(prompt_ids, params, seed) -> Completion:
    return completion_of(f"{TOKENIZER.decode(prompt_ids)}:{seed}")


def say_four(prompt_ids, params, seed) -> Completion:
    return completion_of("4")


@contextmanager
def serve(sampler):
    app = create_app(sampler, TOKENIZER, model_name="m", context_length=CONTEXT)
    with running(app) as url, httpx.Client(base_url=url, timeout=PATIENCE) as client:
        yield client


@pytest.fixture(scope="module")
def shared():
    """One server for all tests that do not stop it."""
    sampler = ScriptedSampler(say_four)
    with serve(sampler) as client:
        yield sampler, client


@pytest.fixture
def sampler(shared) -> ScriptedSampler:
    sampler, _ = shared
    sampler.__init__(say_four)
    return sampler


@pytest.fixture
def client(shared, sampler) -> httpx.Client:
    return shared[1]


def ask(client, path="/v1/completions", **body) -> httpx.Response:
    return client.post(path, json={"model": "m", "prompt": [1, 2, 3], **body})


def events(reply: httpx.Response) -> list[dict]:
    """The chunks of a stream, read by the letter of the format."""
    assert reply.headers["content-type"].startswith("text/event-stream")
    *blocks, done, nothing = reply.text.split("\n\n")
    assert (done, nothing) == ("data: [DONE]", "")
    assert all(block.startswith("data: ") and "\n" not in block for block in blocks)
    return [json.loads(block.removeprefix("data: ")) for block in blocks]


# Whole replies


def test_a_reply_has_every_field_of_fireworks_shape(client):
    reply = ask(client, logprobs=True, return_token_ids=True, raw_output=True, max_tokens=8).json()
    assert reply.pop("id").startswith("cmpl-")
    assert abs(reply.pop("created") - time.time()) < 60
    four = ids_of("4")[0]
    prompt_text = TOKENIZER.decode([1, 2, 3])
    assert reply == {
        "object": "text_completion",
        "model": "m",
        "choices": [
            {
                "index": 0,
                "text": "4",
                "finish_reason": "stop",
                "prompt_token_ids": [1, 2, 3],
                "token_ids": [four, EOS_ID],
                "logprobs": {
                    "content": [
                        {
                            "token": "4",
                            "token_id": four,
                            "logprob": -1.5,
                            "sampling_logprob": -1.0,
                            "bytes": [52],
                            "text_offset": 0,
                            "top_logprobs": [],
                        },
                        {
                            "token": EOS,
                            "token_id": EOS_ID,
                            "logprob": -2.5,
                            "sampling_logprob": -2.0,
                            "bytes": [],
                            "text_offset": 1,
                            "top_logprobs": [],
                        },
                    ]
                },
                "raw_output": {
                    "prompt_fragments": [prompt_text],
                    "prompt_token_ids": [1, 2, 3],
                    "completion": f"4{EOS}",
                    "completion_token_ids": [four, EOS_ID],
                    "completion_logprobs": None,
                    "grammar": None,
                    "images": None,
                },
            }
        ],
        "usage": {
            "prompt_tokens": 3,
            "completion_tokens": 2,
            "total_tokens": 5,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
        "perf_metrics": None,
    }


def test_tokens_are_written_as_ids_where_that_is_asked(client):
    reply = ask(client, logprobs=True, return_tokens_as_token_ids=True, max_tokens=8).json()
    content = reply["choices"][0]["logprobs"]["content"]
    assert [token["token"] for token in content] == [f"token_id:{t['token_id']}" for t in content]
    assert content


def test_what_was_not_asked_for_is_not_in_the_reply(client):
    choice = ask(client).json()["choices"][0]
    assert choice == {"index": 0, "text": "4", "finish_reason": "stop", "logprobs": None}


def test_integer_logprobs_give_the_legacy_format_with_raw_values(client):
    for wanted in (0, 5):
        logprobs = ask(client, logprobs=wanted).json()["choices"][0]["logprobs"]
        assert logprobs == {
            "tokens": ["4", EOS],
            "token_logprobs": [-1.5, -2.5],
            "token_ids": [ids_of("4")[0], EOS_ID],
            "text_offset": [0, 1],
            "top_logprobs": [{"4": -1.5}, {EOS: -2.5}],
        }


def test_false_logprobs_are_no_logprobs(client):
    assert ask(client, logprobs=False).json()["choices"][0]["logprobs"] is None


def test_metrics_are_in_the_headers_and_on_request_in_the_body(client):
    reply = client.post(
        "/v1/completions",
        json={"model": "m", "prompt": [1, 2, 3], "perf_metrics_in_response": True},
        headers={"x-request-id": "mine"},
    )
    assert reply.headers["x-request-id"] == "mine"
    metrics = reply.json()["perf_metrics"]
    assert metrics["prompt-tokens"] == "3"
    assert metrics["num-concurrent-requests"] == "1"
    assert 0 < float(metrics["server-processing-time"]) < 10
    assert metrics == {
        name.removeprefix("fireworks-"): value
        for name, value in reply.headers.items()
        if name.startswith("fireworks-")
    }


def test_a_request_without_an_id_gets_one(client):
    first, second = ask(client), ask(client)
    assert first.headers["x-request-id"] != second.headers["x-request-id"]
    assert first.json()["id"] != second.json()["id"]


@pytest.mark.parametrize("path", ["/v1/completions", "/inference/v1/completions"])
def test_the_warm_up_probe_of_the_training_sdk_is_answered(client, path):
    probe = {"model": "m", "prompt": [1, 2], "max_tokens": 4, "temperature": 0.0}
    reply = client.post(path, json=probe)
    assert reply.status_code == 200
    assert reply.json()["usage"]["completion_tokens"] == 2


@pytest.mark.parametrize("path", ["/v1/models", "/inference/v1/models"])
def test_models_lists_the_one_model_with_its_context(client, path):
    listing = client.get(path).json()
    assert listing["object"] == "list"
    assert [(m["id"], m["context_length"]) for m in listing["data"]] == [("m", CONTEXT)]


def test_health_is_ok(client):
    assert client.get("/health").json() == {"status": "ok", "model": "m"}


def test_text_without_help_from_the_sampler_leaves_out_end_of_turn_and_stop_string(sampler, client):
    sampler.script = lambda *_: completion_of("4", text=None, stop_reason=None)
    assert ask(client).json()["choices"][0]["text"] == "4"
    ids = ids_of("17\n\nand")
    sampler.script = lambda *_: Completion(
        token_ids=ids, logprobs=[-1.0] * len(ids), finish_reason="stop"
    )
    choice = ask(client, stop=["\n\n"], raw_output=True).json()["choices"][0]
    assert choice["text"] == "17"
    assert choice["raw_output"]["completion"] == "17\n\nand"


# How it is sampled


def test_several_prompts_with_n_give_choices_prompt_by_prompt(sampler, client):
    sampler.script = tell_seed
    reply = ask(client, prompt=[ids_of("a"), ids_of("bc")], n=2, seed=7).json()
    other = choice_seed(7, 1)
    assert [(c["index"], c["text"]) for c in reply["choices"]] == [
        (0, "a:7"),
        (1, f"a:{other}"),
        (2, "bc:7"),
        (3, f"bc:{other}"),
    ]
    assert reply["usage"]["prompt_tokens"] == 3


@pytest.mark.parametrize("prompt", ["ab", ["ab"], "ids", ["ids"]])
def test_a_prompt_is_text_or_ids_alone_or_in_a_list(sampler, client, prompt):
    given = json.loads(json.dumps(prompt).replace('"ids"', str(ids_of("ab"))))
    ask(client, prompt=given)
    assert [ids for ids, _, _ in sampler.asked] == [ids_of("ab")]


def test_choice_zero_has_the_seed_of_the_request_and_the_others_have_their_own(sampler, client):
    sampler.script = tell_seed
    alone = ask(client, seed=7).json()["choices"][0]["text"]
    together = [c["text"] for c in ask(client, n=128, seed=7).json()["choices"]]
    again = [c["text"] for c in ask(client, n=128, seed=7).json()["choices"]]
    neighbour = [c["text"] for c in ask(client, n=128, seed=8).json()["choices"]]
    assert together[0] == alone
    assert together == again
    assert len({*together, *neighbour}) == 256


def test_without_a_seed_the_sampler_chooses(sampler, client):
    ask(client, n=3)
    assert [seed for _, _, seed in sampler.asked] == [None] * 3


def test_the_sampler_gets_what_was_asked_in_the_words_of_the_seam(sampler, client):
    ask(
        client,
        temperature=0.5,
        top_p=0.9,
        top_k=20,
        stop="x",
        max_completion_tokens=9,
        ignore_eos=True,
        min_p=0.05,
        frequency_penalty=0,
        user="u",
        metadata={"a": "b"},
        prompt_cache_key="k",
    )
    assert sampler.asked[0][1] == SamplingParams(
        model="m",
        max_tokens=9,
        temperature=0.5,
        top_p=0.9,
        top_k=20,
        stop=("x",),
        extra={"ignore_eos": True, "min_p": 0.05},
    )


def test_nulls_mean_not_given_and_the_default_is_the_full_distribution(sampler, client):
    fields = ("n", "max_tokens", "temperature", "top_p", "top_k", "stop", "seed", "stream")
    assert ask(client, **dict.fromkeys(fields)).status_code == 200
    assert sampler.asked[0][1] == SamplingParams(
        model="m", max_tokens=CONTEXT - 3, temperature=1.0, top_p=1.0, top_k=0
    )


def test_greedy_with_n_is_allowed(client):
    assert len(ask(client, temperature=0, n=2).json()["choices"]) == 2


def test_max_tokens_is_256_unless_given():
    sampler = ScriptedSampler(lambda *_: completion_of("4"))
    app = create_app(sampler, TOKENIZER, model_name="m")
    with running(app) as url:
        httpx.post(f"{url}/v1/completions", json={"model": "m", "prompt": "a"})
    assert sampler.asked[0][1].max_tokens == 256


def test_max_tokens_beyond_the_context_is_lowered_or_refused_as_the_request_wants(sampler, client):
    ask(client, max_tokens=CONTEXT)
    ask(client, max_tokens=CONTEXT, context_length_exceeded_behavior="truncate")
    assert [params.max_tokens for _, params, _ in sampler.asked] == [CONTEXT - 3] * 2
    reply = ask(client, max_tokens=CONTEXT - 2, context_length_exceeded_behavior="error")
    assert reply.status_code == 400
    assert "max_tokens" in reply.json()["error"]["message"]
    fits = ask(client, max_tokens=CONTEXT - 3, context_length_exceeded_behavior="error")
    assert fits.status_code == 200


# Refusals


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"x": 1}, "Extra inputs are not permitted, field: 'x'"),
        (
            {"routing_matrix_format": "parquet_v1"},
            "Extra inputs are not permitted, field: 'routing_matrix_format'",
        ),
        ({"stream_options": {"x": 1}}, "'stream_options'"),
        ({"prompt": None}, "'prompt'"),
        ({"prompt": []}, "'prompt'"),
        ({"prompt": [[]]}, "'prompt'"),
        ({"prompt": ""}, "'prompt'"),
        ({"prompt": [1, "a"]}, "'prompt'"),
        ({"prompt": [1, -1]}, "'prompt[1]'"),
        ({"prompt": [1, True]}, "'prompt[1]'"),
        ({"prompt": [1] * CONTEXT}, "100 tokens"),
        ({"n": 0}, "'n'"),
        ({"n": 129}, "'n'"),
        ({"n": "2"}, "'n'"),
        ({"n": True}, "'n'"),
        ({"max_tokens": 0}, "'max_tokens'"),
        ({"max_tokens": 4, "max_completion_tokens": 4}, "'max_completion_tokens'"),
        ({"temperature": 2.1}, "'temperature'"),
        ({"temperature": -0.1}, "'temperature'"),
        ({"top_p": 1.1}, "'top_p'"),
        ({"top_k": 101}, "'top_k'"),
        ({"top_k": -1}, "'top_k'"),
        ({"stop": ["a"] * 5}, "'stop'"),
        ({"stop": [""]}, "'stop[0]'"),
        ({"stop": [7]}, "'stop[0]'"),
        ({"seed": 1.5}, "'seed'"),
        ({"seed": 2**63}, "'seed'"),
        ({"logprobs": 6}, "'logprobs'"),
        ({"logprobs": "yes"}, "'logprobs'"),
        ({"top_logprobs": 1}, "Not supported by this server, leave it out, field: 'top_logprobs'"),
        ({"echo": True}, "'echo'"),
        ({"echo_last": 2}, "'echo_last'"),
        ({"response_format": {"type": "json_object"}}, "'response_format'"),
        ({"context_length_exceeded_behavior": "cut"}, "'context_length_exceeded_behavior'"),
        ({"metadata": {"a": 1}}, "'metadata"),
    ],
)
def test_a_bad_field_is_a_400_that_names_it_and_nothing_is_sampled(
    sampler, client, fields, message
):
    reply = ask(client, **fields)
    error = reply.json()["error"]
    assert reply.status_code == 400
    assert message in error.pop("message")
    assert error == {
        "object": "error",
        "type": "invalid_request_error",
        "code": "invalid_request_error",
    }
    assert sampler.asked == []


def test_fields_at_the_value_that_asks_for_nothing_are_accepted(client):
    neutral = {"echo": False, "top_logprobs": 0, "logit_bias": {}, "repetition_penalty": 1.0}
    assert ask(client, **neutral, stream_options={"include_usage": True}).status_code == 200


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[1]", b"3", b'{"a":"\xff"}', b"[" * 100_000, b'{"prompt": NaN}']
)
def test_a_body_that_is_no_json_object_is_a_400(client, body):
    json_says = {"content-type": "application/json"}
    reply = client.post("/v1/completions", content=body, headers=json_says)
    assert reply.status_code == 400
    assert reply.json()["error"]["code"] == "invalid_request_error"


@pytest.mark.parametrize("missing", ["model", "prompt"])
def test_a_missing_field_is_named(client, missing):
    body = {"model": "m", "prompt": [1]}
    del body[missing]
    reply = client.post("/v1/completions", json=body)
    assert reply.status_code == 400
    assert missing in reply.json()["error"]["message"]


def test_an_unknown_model_is_fireworks_404(client):
    reply = ask(client, model="other")
    error = reply.json()["error"]
    assert reply.status_code == 404
    assert (error["object"], error["code"]) == ("error", "NOT_FOUND")
    assert error["message"].startswith("Model not found, inaccessible, and/or not deployed")
    assert "'m'" in error["message"]


def test_a_wrong_path_does_not_look_like_a_missing_model(client):
    # Fireworks' clients wait up to half an hour for a model that is "not found".
    for reply in (client.post("/v1/chat/completions", json={}), client.get("/v1/completions")):
        assert reply.status_code in (404, 405)
        assert "Model not found" not in reply.text
        assert reply.json()["error"]["object"] == "error"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("failure", "status", "kind"),
    [
        (RefusedError("no"), 400, "invalid_request_error"),
        (SamplingError("no", kind="unavailable"), 503, "server_error"),
        (SamplingError("no", kind="timeout"), 504, "server_error"),
        (SamplingError("no", kind="connection"), 500, "server_error"),
        (ContractError("no"), 500, "server_error"),
        (SamplingError("no"), 500, "server_error"),
    ],
)
def test_a_failed_completion_is_a_status_by_its_kind(
    sampler, client, failure, status, kind, stream
):
    def fail(*_):
        raise failure

    sampler.script = fail
    reply = ask(client, n=3, stream=stream)
    assert (reply.status_code, reply.json()["error"]["type"]) == (status, kind)
    assert reply.json()["error"]["message"] == "no"


def test_a_wait_that_the_sampler_asks_for_reaches_the_client(sampler, client):
    def fail(*_):
        raise SamplingError("full", kind="unavailable", retry_after=1.2)

    sampler.script = fail
    assert ask(client).headers["retry-after"] == "2"


def test_a_bug_in_the_sampler_is_a_500_without_its_details(sampler, client):
    def fail(*_):
        raise KeyError("a secret")

    sampler.script = fail
    reply = ask(client)
    assert reply.status_code == 500
    assert "KeyError" in reply.json()["error"]["message"]
    assert "a secret" not in reply.text
    assert reply.headers["connection"] == "close"  # as uvicorn does, after an exception


@pytest.mark.parametrize("stream", [False, True])
def test_raw_logprobs_are_never_made_up(sampler, client, stream):
    sampler.script = lambda *_: completion_of("4", raw_logprobs=None)
    exact = ask(client, logprobs=True).json()["choices"][0]["logprobs"]["content"]
    assert [entry["logprob"] for entry in exact] == [-1.0, -2.0]
    refused = ask(client, logprobs=True, temperature=0.7, stream=stream)
    assert refused.status_code == 500
    assert "temperature=0.7" in refused.json()["error"]["message"]


# Streams


def test_a_stream_carries_exactly_what_the_whole_reply_has(sampler, client):
    sampler.script = tell_seed
    wanted = {
        "prompt": [ids_of("é"), ids_of("b")],
        "n": 2,
        "seed": 3,
        "logprobs": True,
        "return_token_ids": True,
        "raw_output": True,
    }
    whole = ask(client, **wanted).json()
    chunks = events(ask(client, **wanted, stream=True))
    rebuilt: dict[int, dict] = {}
    for chunk in chunks:
        (part,) = chunk["choices"]
        choice = rebuilt.setdefault(
            part["index"], {"index": part["index"], "text": "", "token_ids": [], "content": []}
        )
        choice["text"] += part["text"]
        choice["token_ids"] += part["token_ids"]
        choice["content"] += part["logprobs"]["content"]
        for key in ("prompt_token_ids", "raw_output"):
            if key in part:
                assert key not in choice
                choice[key] = part[key]
        if part["finish_reason"] is not None:
            choice["finish_reason"] = part["finish_reason"]
    for choice in rebuilt.values():
        choice["logprobs"] = {"content": choice.pop("content")}
    assert list(rebuilt.values()) == whole["choices"]
    assert chunks[-1]["usage"] == whole["usage"]
    assert {chunk["id"] for chunk in chunks} == {chunks[0]["id"]}


@pytest.mark.parametrize(("interval", "sizes"), [(None, [1] * 7), (1, [1] * 7), (3, [3, 3, 1])])
def test_a_chunk_has_as_many_tokens_as_were_asked_for(sampler, client, interval, sizes):
    ids = [*ids_of("4+4=8."), EOS_ID]
    sampler.script = lambda *_: completion_of("4+4=8.")
    wanted = {"stream": True, "return_token_ids": True, "logprobs": True}
    chunks = events(ask(client, **wanted, stream_interval=interval))
    parts = [chunk["choices"][0] for chunk in chunks]
    assert [len(part["token_ids"]) for part in parts] == sizes
    assert [len(part["logprobs"]["content"]) for part in parts] == sizes
    assert [token for part in parts for token in part["token_ids"]] == ids
    assert "".join(part["text"] for part in parts) == "4+4=8."
    assert [part["finish_reason"] for part in parts] == [None] * (len(sizes) - 1) + ["stop"]


def test_the_first_chunk_has_the_prompt_and_the_last_one_how_it_ended(client):
    first, last = events(
        ask(
            client,
            stream=True,
            return_token_ids=True,
            raw_output=True,
            perf_metrics_in_response=True,
        )
    )
    assert first["choices"] == [
        {
            "index": 0,
            "text": "4",
            "finish_reason": None,
            "logprobs": None,
            "prompt_token_ids": [1, 2, 3],
            "token_ids": ids_of("4"),
        }
    ]
    assert "usage" not in first
    assert "perf_metrics" not in first
    assert last["choices"][0]["finish_reason"] == "stop"
    assert last["choices"][0]["text"] == ""
    assert last["choices"][0]["raw_output"]["completion_token_ids"] == [*ids_of("4"), EOS_ID]
    assert last["usage"]["completion_tokens"] == 2
    assert last["perf_metrics"]["prompt-tokens"] == "3"


def test_streams_name_the_policy_version_and_whole_replies_the_model(sampler, client):
    sampler.script = lambda *_: completion_of("4", policy_version="step-7")
    assert {chunk["model"] for chunk in events(ask(client, stream=True))} == {"m@step-7"}
    assert ask(client).json()["model"] == "m"


def test_a_chunk_has_no_tokens_of_two_versions(sampler, client):
    versions = {"policy_version": "b", "first_policy_version": "a"}
    sampler.script = lambda *_: completion_of("4+4=8", **versions)
    chunks = events(ask(client, stream=True, stream_interval=100, return_token_ids=True))
    told = [(chunk["model"], len(chunk["choices"][0]["token_ids"])) for chunk in chunks]
    assert told == [("m@a", 1), ("m", 4), ("m@b", 1)]


# Clients that go away, servers that stop


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_cancels_all_its_completions(sampler, client, stream):
    sampler.held = lambda seed: True
    body = {"model": "m", "prompt": [1], "n": 3, "stream": stream}
    with post_and_leave(str(client.base_url), body):
        for _ in range(3):
            assert sampler.waiting.acquire(timeout=PATIENCE)
        assert not sampler.cancelled.acquire(timeout=0.05)
    for _ in range(3):
        assert sampler.cancelled.acquire(timeout=PATIENCE)
    sampler.held = lambda seed: False
    wait_until(lambda: ask(client).headers["fireworks-num-concurrent-requests"] == "1")


def test_one_failed_choice_cancels_its_siblings(sampler, client):
    def last_fails(prompt_ids, params, seed):
        raise RefusedError("no")

    sampler.script = last_fails
    sampler.held = lambda seed: seed != choice_seed(1, 2)
    assert ask(client, n=3, seed=1).status_code == 400
    assert all(sampler.waiting.acquire(timeout=PATIENCE) for _ in range(2))
    assert all(sampler.cancelled.acquire(timeout=PATIENCE) for _ in range(2))


def test_a_server_that_stops_answers_503_cancels_and_closes_its_sampler():
    sampler = ScriptedSampler(say_four)
    sampler.held = lambda seed: True
    with serve(sampler) as client:
        connection = post_and_leave(str(client.base_url), {"model": "m", "prompt": [1]})
        assert sampler.waiting.acquire(timeout=PATIENCE)
        assert sampler.closed == 0
    with connection, connection.makefile("rb") as reply:
        assert reply.readline() == b"HTTP/1.1 503 Service Unavailable\r\n"
        assert b"shutting down" in reply.read()
    assert sampler.cancelled.acquire(timeout=PATIENCE)
    assert sampler.closed == 1


# Spelling ids


BYTES = LoadedTokenizer.wrap(TOKENIZER)
PARAMS = SamplingParams(model="m")


def sampled(ids: list[int]) -> Completion:
    return Completion(token_ids=ids, logprobs=[-1.0] * len(ids), finish_reason="length")


def deltas(spelling) -> list[str]:
    ends = zip(spelling.offsets, spelling.offsets[1:], strict=False)
    return [spelling.text[start:end] for start, end in ends]


@settings(deadline=None)
@given(st.text(min_size=1))
def test_token_bytes_spell_the_text_they_were_encoded_from(text):
    ids = ids_of(text)
    spelling = spell(BYTES, sampled(ids), PARAMS)
    assert [[byte] for byte in text.encode()] == spelling.bytes
    assert spelling.text == "".join(deltas(spelling)) == text


@settings(deadline=None)
@given(st.lists(st.integers(min_value=0, max_value=256), min_size=1))
def test_any_sampled_ids_half_characters_too_have_deltas_that_join_to_the_text(ids):
    spelling = spell(BYTES, sampled(ids), PARAMS)
    assert "".join(deltas(spelling)) == spelling.text == TOKENIZER.decode(ids)
    ordinary = bytes(byte for token in spelling.bytes for byte in token)
    without_control_tokens = TOKENIZER.decode([i for i in ids if i != EOS_ID])
    assert ordinary.decode(errors="replace") == without_control_tokens


def test_a_character_of_several_tokens_appears_with_its_last_one():
    spelling = spell(BYTES, sampled(ids_of("a😀b")), PARAMS)
    assert deltas(spelling) == ["a", "", "", "", "😀", "b"]
    assert spelling.offsets == [0, 1, 1, 1, 1, 2, 3]


def test_a_tokenizer_that_strips_the_first_space_keeps_the_others():
    names = ["<unk>", "▁hello", "▁world", "!", *(f"<0x{byte:02X}>" for byte in "é".encode())]
    backend = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, "<unk>"))
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer = LoadedTokenizer.wrap(PreTrainedTokenizerFast(tokenizer_object=backend))
    spelling = spell(tokenizer, sampled([1, 2, 4, 5, 3]), PARAMS)
    assert spelling.text == "hello worldé!"
    assert deltas(spelling) == ["hello", " world", "", "é", "!"]
    assert spelling.tokens == ["hello", " world", "\ufffd", "\ufffd", "!"]
    assert bytes(b for token in spelling.bytes for b in token).decode() == "hello worldé!"
