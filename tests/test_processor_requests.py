"""What a rollout reads from completion_params, and what it sends."""

from __future__ import annotations

import asyncio
import copy
import json
from itertools import pairwise

import pytest

from eval_protocol_rft import EpisodeRolloutProcessor, FireworksTrainingRolloutProcessor
from eval_protocol_rft.episodes._environment import Environment
from eval_protocol_rft.rollout._params import ParamsError
from eval_protocol_rft.rollout._processor import RolloutError
from tests.rollouts import (
    assert_is_what_the_server_sampled,
    chat_tokenizer,
    config_of,
    params_for,
    record_of_row,
    rendered,
    roll_out,
    row_of,
    scripted,
)
from tests.serving import ScriptedSampler
from tests.stub_server import Changed, StubServer


async def test_rows_share_one_session_per_endpoint(server, processor):
    rows = [row_of(row_id=str(i)) for i in range(5)]
    params = params_for(server, n=4)
    await asyncio.gather(*processor(rows, config_of(params, slots=2)))
    assert server.connections <= 2
    await processor.acleanup()
    await server.until(lambda: server.connections == 0)


async def test_two_servers_and_two_keys_are_two_endpoints(processor):
    with StubServer() as one, StubServer() as two:
        cases = [
            params_for(one, api_key="key-a"),
            params_for(one, api_key="key-b"),
            params_for(two, api_key="key-a"),
        ]
        tasks = [task for params in cases for task in processor([row_of()], config_of(params))]
        await asyncio.gather(*tasks)
        await processor.acleanup()
        sent = sorted(seen.headers["Authorization"] for seen in one.requests)
        assert sent == ["Bearer key-a", "Bearer key-b"]
        assert [seen.headers["Authorization"] for seen in two.requests] == ["Bearer key-a"]


async def test_completion_params_are_read_and_never_changed(server, processor):
    params = params_for(
        server,
        n=2,
        stop=["z"],
        api_key="sk-not-to-be-kept",
        extra_body={"min_p": 0, "metadata": {"a": [1]}},
        extra_headers={"X-Team": "rl"},
        chat_template_kwargs={"enable_thinking": True},
    )
    before, ids = copy.deepcopy(params), {key: id(value) for key, value in params.items()}
    row = row_of()
    row.input_metadata.completion_params = params
    [row] = await roll_out(processor, row, params)
    assert params == before
    assert {key: id(value) for key, value in params.items()} == ids
    assert row.input_metadata.completion_params is not params
    assert row.input_metadata.completion_params["model"] == "test-model"


async def test_completion_params_are_read_anew_on_every_call(server, processor):
    params = params_for(server, n=1, temperature=0.5)
    for n, temperature in ((1, 0.5), (3, 0.5), (2, 0.9)):
        params.update(n=n, temperature=temperature)
        [row] = await asyncio.gather(*processor([row_of()], config_of(params)))
        record = record_of_row(row)
        assert (len(record), record.sampling.temperature) == (n, temperature)
    await processor.acleanup()


async def test_wrong_parameters_fail_the_row_and_not_the_call(server, processor):
    tasks = processor([row_of(), row_of()], config_of(params_for(server, temperature=-1)))
    for task in tasks:
        with pytest.raises(ValueError, match="completion_params\\['temperature'\\]"):
            await task
    for params in (None, {}):
        [task] = processor([row_of()], config_of(params))
        with pytest.raises(ValueError, match="completion_params\\['model'\\]"):
            await task
    assert server.requests == []


async def test_the_prompt_is_written_as_json_once_per_row(server, processor):
    class Counted(ScriptedSampler):
        async def sample(self, prompt_ids, params, *, seed=None):
            jsons.append(prompt_ids.json)
            return await super().sample(prompt_ids, params, seed=seed)

    jsons: list[bytes] = []
    sampler = Counted(scripted("ok").script)
    processor = FireworksTrainingRolloutProcessor(tokenizer=chat_tokenizer(), sampler=sampler)
    await roll_out(processor, row_of(), {"model": "any", "n": 5})
    assert [json.loads(raw) for raw in jsons] == [rendered("hi")] * 5
    assert all(one is other for one, other in pairwise(jsons))


async def test_a_request_says_all_that_matters_and_nothing_else(server, processor):
    await roll_out(processor, row_of(), params_for(server, n=1))
    [seen] = server.requests
    assert seen.body == {
        "model": "test-model",
        "prompt": rendered("hi"),
        "max_tokens": 32,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "logprobs": True,
        "return_token_ids": True,
        "raw_output": True,
        "context_length_exceeded_behavior": "error",
        "seed": seen.seed,
    }
    assert "Authorization" not in seen.headers


async def test_unknown_keys_travel_and_those_of_other_clients_do_not(server, processor):
    travelling = {"min_p": 0.05, "user": "me", "include_routing_matrix": True, "new_field": [1]}
    dropped = {
        "provider": "fireworks",
        "cache": {"no-cache": True},
        "http_timeout": 20,
        "max_seq_len": 4096,
        "num_retries": 3,
        "litellm_call_id": "x",
        "stream_options": {"include_usage": True},
        "drop_params": True,
        "system_prompt": None,
    }
    params = params_for(server, **travelling, **dropped, extra_body='{"top_a": 0.1}')
    await roll_out(processor, row_of(), params)
    body = server.requests[0].body
    plain = params_for(server)
    await roll_out(processor, row_of(), plain)
    added = {key: body[key] for key in body.keys() - server.requests[1].body.keys()}
    assert added == {**travelling, "top_a": 0.1}


@pytest.mark.parametrize(
    ("path", "arrives_at"),
    [
        ("", "/v1/completions"),
        ("/", "/v1/completions"),
        ("/v1", "/v1/completions"),
        ("/v1/", "/v1/completions"),
        ("/inference", "/inference/v1/completions"),
        ("/inference/v1", "/inference/v1/completions"),
        ("/inference/v1/completions", "/inference/v1/completions"),
    ],
)
@pytest.mark.parametrize("key", ["api_base", "base_url"])
async def test_a_base_url_works_in_every_spelling(server, processor, key, path, arrives_at):
    await roll_out(processor, row_of(), {"model": "m", "max_tokens": 8, key: server.url + path})
    assert [seen.path for seen in server.requests] == [arrives_at]


@pytest.mark.parametrize("variable", ["EP_LLM_API_BASE", "EP_LLM_BASE_URL", "FIREWORKS_BASE_URL"])
async def test_the_base_url_may_come_from_the_environment(server, processor, monkeypatch, variable):
    monkeypatch.setenv(variable, f"{server.url}/inference/v1")
    monkeypatch.setenv("FIREWORKS_API_KEY", "fw-key")
    await roll_out(processor, row_of(), {"model": "m", "max_tokens": 8})
    [seen] = server.requests
    assert seen.path == "/inference/v1/completions"
    # The key goes where FIREWORKS_BASE_URL points; what the others point at may be anybody's.
    expected = "Bearer fw-key" if variable == "FIREWORKS_BASE_URL" else None
    assert seen.headers.get("Authorization") == expected


@pytest.mark.parametrize(
    ("params", "authorization"),
    [
        ({"model": "Qwen/Qwen3-8B"}, None),
        ({"model": "Qwen/Qwen3-8B", "api_key": "mine"}, "Bearer mine"),
        ({"model": "accounts/a/models/m"}, "Bearer fw-key"),
        ({"model": "accounts/a/models/m", "api_key": "mine"}, "Bearer mine"),
        ({"model": "fireworks_ai/accounts/a/models/m"}, "Bearer fw-key"),
        ({"model": "accounts/a/models/m", "extra_headers": {"authorization": "Own"}}, "Own"),
        ({"model": "m", "api_key": "k", "extra_headers": {"authorization": "Own"}}, "Own"),
    ],
    ids=str,
)
async def test_a_key_is_sent_once_and_only_where_it_belongs(
    server, processor, monkeypatch, params, authorization
):
    monkeypatch.setenv("FIREWORKS_API_KEY", "fw-key")
    await roll_out(processor, row_of(), {**params, "max_tokens": 8, "api_base": server.url})
    sent = server.requests[0].headers.getall("Authorization", [])
    assert sent == ([] if authorization is None else [authorization])
    assert server.requests[0].body["model"] == params["model"].removeprefix("fireworks_ai/")


async def test_headers_of_the_users_are_sent_with_every_request(server, processor):
    headers = {"X-Team": "rl", "content-type": "application/json; charset=utf-8"}
    await roll_out(processor, row_of(), params_for(server, n=2, extra_headers=headers))
    for seen in server.requests:
        assert seen.headers["X-Team"] == "rl"
        assert seen.headers.getall("Content-Type") == ["application/json; charset=utf-8"]


async def test_what_eval_protocol_and_the_cookbook_put_into_a_config_does_not_matter(
    server, processor
):
    config = config_of(
        params_for(server), logger=None, kwargs={"start_server": False, "anything": object()}
    )
    [row] = await asyncio.gather(*processor([row_of()], config))
    await processor.acleanup()
    assert len(record_of_row(row)) == 1


async def test_the_servers_meaning_of_its_logprobs_can_be_told(server):
    """vLLM with `--logprobs-mode processed_logprobs`: one unnamed logprob per token."""

    def as_vllm(reply):
        [choice] = reply["choices"]
        del choice["raw_output"]
        content = choice["logprobs"]["content"]
        choice["logprobs"] = {"token_logprobs": [e["sampling_logprob"] for e in content]}

    server.script = lambda seen: Changed(as_vllm)
    params = params_for(server, temperature=0.7)
    unaware = FireworksTrainingRolloutProcessor(tokenizer=chat_tokenizer())
    with pytest.raises(RolloutError, match="--logprobs-mode processed_logprobs"):
        await roll_out(unaware, row_of(), params)
    aware = FireworksTrainingRolloutProcessor(
        tokenizer=chat_tokenizer(), logprobs_mode="processed_logprobs"
    )
    # At others the word is checked, and this server's numbers follow from no model.
    [row] = await roll_out(aware, row_of(), params | {"temperature": 1.0})
    assert_is_what_the_server_sampled(record_of_row(row))
    assert record_of_row(row).raw_logprobs is None


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"mcp_config_path": "tools.json"}, r"mcp_config_path=\.\.\.\).*ToolLoop"),
        ({"server_script_path": "server.py"}, r"server_script_path=\.\.\.\).*ToolLoop"),
        ({"steps": 5}, r"steps=5\).*EpisodeLimits\(turns="),
    ],
)
@pytest.mark.parametrize("episodes", [False, True])
async def test_what_has_no_use_here_is_refused_by_name_before_anything_is_sampled(
    server, field, message, episodes
):
    if episodes and "mcp_config_path" in field:
        pytest.skip("there it has a use")
    options = {"tokenizer": chat_tokenizer()}
    processor = (
        EpisodeRolloutProcessor(Environment, **options)
        if episodes
        else FireworksTrainingRolloutProcessor(**options)
    )
    config = config_of(params_for(server), **{"mcp_config_path": "", **field})
    (task,) = processor([row_of()], config)
    with pytest.raises(ParamsError, match=message):
        await task
    await processor.acleanup()
    assert server.requests == []


async def test_a_keyword_without_use_is_told_once(server, caplog):
    processor = FireworksTrainingRolloutProcessor(tokenizer=chat_tokenizer())
    config = config_of(params_for(server), kwargs={"start_server": False, "tmperature": 2})
    await asyncio.gather(*processor([row_of(), row_of(row_id="row-2")], config))
    await processor.acleanup()
    assert caplog.text.count("rollout_processor_kwargs['tmperature'] is not used") == 1
    assert "start_server" not in caplog.text


async def test_one_step_is_the_one_turn_that_is_taken(server):
    processor = FireworksTrainingRolloutProcessor(tokenizer=chat_tokenizer())
    (task,) = processor([row_of()], config_of(params_for(server), steps=1))
    assert_is_what_the_server_sampled(record_of_row(await task))
    await processor.acleanup()
