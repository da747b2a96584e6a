"""Requests for one prompt carry one key, and what the user says of affinity goes before it."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval_protocol_rft import EpisodeRolloutProcessor
from eval_protocol_rft.episodes._environment import Environment, EpisodeLimits, Step
from eval_protocol_rft.rollout._params import ParamsError, parse_completion_params
from eval_protocol_rft.sampling._endpoint import Endpoint
from eval_protocol_rft.sampling._http import HttpSampler
from eval_protocol_rft.sampling._types import SamplingParams, TokenIds
from tests.rollouts import chat_tokenizer, params_for, roll_out, row_of
from tests.stub_server import Seen, StubServer

HEADER = "x-session-affinity"
prompts = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=9)


async def ask(
    server: StubServer, *, fireworks: bool = False, headers: dict[str, str] | None = None, **fields
) -> Seen:
    """The one request for the prompt [1, 2, 3]."""
    own = tuple((headers or {}).items())
    sampler = HttpSampler(Endpoint(f"{server.url}/v1", None, own, fireworks))
    try:
        await sampler.sample([1, 2, 3], SamplingParams(model="m", max_tokens=8, **fields), seed=1)
    finally:
        await sampler.aclose()
    return server.requests[-1]


@given(prompts, prompts)
def test_two_prompts_have_one_key_only_where_they_are_the_same(one, other):
    assert (TokenIds(one).affinity == TokenIds(other).affinity) == (one == other)
    assert TokenIds(one).affinity == TokenIds(one).affinity


def test_the_key_is_the_same_in_every_process():
    code = (
        "from eval_protocol_rft.sampling._types import TokenIds; print(TokenIds([1, 2]).affinity)"
    )
    made = [subprocess.check_output([sys.executable, "-c", code], text=True) for _ in range(2)]
    assert {said.strip() for said in made} == {TokenIds([1, 2]).affinity}


async def test_all_completions_of_a_row_say_so_and_those_of_another_prompt_do_not(
    server, processor
):
    rows = [row_of("one", row_id="a"), row_of("two", row_id="b"), row_of("one", row_id="c")]
    await roll_out(processor, rows, params_for(server, n=4))
    keys: dict[tuple[int, ...], set[str]] = {}
    for seen in server.requests:
        keys.setdefault(seen.prompt, set()).add(seen.headers[HEADER])
    assert [len(found) for found in keys.values()] == [1, 1]
    assert len(set.union(*keys.values())) == 2
    assert all("prompt_cache_key" not in seen.body for seen in server.requests)


class Echo(Environment):
    def step(self, messages, assistant):
        return Step(messages=[{"role": "user", "content": "go on"}])


async def test_the_turns_of_an_episode_carry_one_key_and_no_other_episode_does(server):
    processor = EpisodeRolloutProcessor(
        Echo, tokenizer=chat_tokenizer(), limits=EpisodeLimits(turns=3)
    )
    await roll_out(processor, row_of("one", row_id="a"), params_for(server, n=4))
    episodes: dict[str, list[tuple[int, ...]]] = {}
    for seen in server.requests:
        episodes.setdefault(seen.headers[HEADER], []).append(seen.prompt)
    assert [len(prompts) for prompts in episodes.values()] == [3, 3, 3, 3]
    for first, second, third in episodes.values():
        assert second[: len(first)] == first
        assert third[: len(second)] == second


async def test_fireworks_has_it_in_the_body_too(server):
    seen = await ask(server, fireworks=True)
    assert seen.body["prompt_cache_key"] == seen.headers[HEADER] == TokenIds([1, 2, 3]).affinity


@pytest.mark.parametrize(
    "extra", [{"prompt_cache_key": "mine"}, {"user": "me"}, {"prompt_cache_key": "", "user": "me"}]
)
async def test_a_field_of_the_users_is_all_that_is_said(extra, server):
    seen = await ask(server, fireworks=True, extra=extra)
    assert HEADER not in seen.headers
    assert {k: v for k, v in seen.body.items() if k in ("prompt_cache_key", "user")} == extra


@pytest.mark.parametrize("name", ["X-Session-Affinity", "x-multi-turn-session-id"])
async def test_a_header_of_the_users_is_all_that_is_said(name, server):
    seen = await ask(server, fireworks=True, headers={name: "mine"})
    assert seen.headers.getall(name) == ["mine"]
    assert [key for key in seen.headers if "session" in key.lower()] == [name.lower()]
    assert "prompt_cache_key" not in seen.body


async def test_another_field_or_header_of_the_users_changes_nothing(server):
    seen = await ask(
        server, fireworks=True, headers={"X-Team": "rl"}, extra={"prompt_cache_isolation_key": "t"}
    )
    assert seen.body["prompt_cache_key"] == seen.headers[HEADER]


@pytest.mark.parametrize(
    "said", [{"prompt_cache_affinity": False}, {"extra_body": '{"prompt_cache_affinity": false}'}]
)
async def test_it_can_be_turned_off(said, server, processor):
    params = params_for(server, model="accounts/a/models/m", n=2, **said)
    await roll_out(processor, row_of(), params)
    assert len(server.requests) == 2
    for seen in server.requests:
        assert HEADER not in seen.headers
        assert not {"prompt_cache_key", "prompt_cache_affinity"} & seen.body.keys()


@pytest.mark.parametrize("value", [0, "off", []])
def test_only_true_and_false_turn_it_on_and_off(value):
    params: dict[str, Any] = {"model": "m", "api_base": "http://h"}
    with pytest.raises(ParamsError, match="prompt_cache_affinity"):
        parse_completion_params({**params, "prompt_cache_affinity": value}, env={})
    for given_ in (None, True):
        request = parse_completion_params({**params, "prompt_cache_affinity": given_}, env={})
        assert request.params.prompt_cache_affinity
        assert json.dumps(dict(request.params.extra)) == "{}"
