"""A credential goes to the server and nowhere else."""

from __future__ import annotations

import json
import logging
import traceback
from collections.abc import Iterator
from typing import Any

import pytest

from eval_protocol_rft import FireworksTrainingRolloutProcessor, RetryPolicy, SamplingParams
from eval_protocol_rft.sampling._endpoint import Endpoint
from eval_protocol_rft.sampling._http import HttpSampler
from eval_protocol_rft.sampling._types import SamplingError
from tests.rollouts import chat_tokenizer, params_for, record_of_row, roll_out, row_of
from tests.stub_server import Drop, Hang, Raw, Script, Seen, Status

SECRET = "sk-5ecret/that+nobody=knows"

GIVEN = {
    "as api_key": {"api_key": SECRET},
    "in extra_body": {"extra_body": {"api_key": SECRET}},
    "in extra_body as text": {"extra_body": json.dumps({"api_key": SECRET})},
    "as a bearer": {"extra_headers": {"Authorization": f"Bearer {SECRET}"}},
    "as a header": {"extra_headers": {"X-Api-Key": SECRET}},
    "as a cookie": {"headers": {"Cookie": f"session={SECRET}; theme=dark"}},
}

ECHOES = {
    "an error": Status(401, {"error": {"message": f"{SECRET} is no valid key"}}),
    "plain text": Status(403, f"key {SECRET} has no access".encode()),
    "the end of a long error": Status(400, ("x" * 485 + SECRET).encode()),
    "an error inside a good status": Status(200, {"error": {"message": f"bad {SECRET}"}}),
    "something that is not JSON": Status(200, f"you sent {SECRET}".encode()),
    "a wrong reply": Status(200, {"object": SECRET, "choices": []}),
    "broken HTTP": Raw(f"HTTP/1.1 200 OK\r\nContent-Length: {SECRET}\r\n\r\n".encode()),
    "a dropped connection": Drop(),
    "no answer": Hang(),
}


def chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def everything_about(error: BaseException) -> str:
    parts = ["".join(traceback.format_exception(error))]
    parts += [f"{one!r} {one} {vars(one)}" for one in chain(error)]
    return "\n".join(parts)


def only_the_first(answer: Any) -> Script:
    def script(seen: Seen) -> Any:
        return answer if seen.place == 0 else None

    return script


@pytest.fixture
def processor() -> FireworksTrainingRolloutProcessor:
    return FireworksTrainingRolloutProcessor(
        tokenizer=chat_tokenizer(), retry=RetryPolicy(max_attempts=1)
    )


@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("echo", ECHOES)
async def test_a_key_given(server, processor, caplog, capfd, given, echo):
    caplog.set_level(logging.DEBUG)
    timeout = 0.5 if echo == "no answer" else 30
    params = params_for(server, n=2, http_timeout=timeout, **GIVEN[given])
    row = row_of()
    row.input_metadata.completion_params = params

    server.script = only_the_first(ECHOES[echo])
    [row] = await roll_out(processor, row, params)
    assert len(record_of_row(row).failures) == 1
    written = [row.model_dump_json(), repr(row), str(row.input_metadata.completion_params)]

    server.script = lambda seen: ECHOES[echo]
    with pytest.raises(RuntimeError) as raised:
        await roll_out(processor, row, params)
    written += [everything_about(raised.value), repr(processor), row.model_dump_json()]

    written += [caplog.text, *capfd.readouterr()]
    assert SECRET in str(dict(server.requests[0].headers)), "the server must get it"
    assert SECRET not in str([seen.body for seen in server.requests])
    for text in written:
        assert SECRET not in text
        assert SECRET[:12] not in text


@pytest.mark.parametrize("echo", ECHOES)
async def test_no_error_of_the_sampler_holds_a_key(server, echo):
    server.script = lambda seen: ECHOES[echo]
    headers = (("Authorization", f"Bearer {SECRET}"),)
    for endpoint in (
        Endpoint(f"{server.url}/v1", SECRET),
        Endpoint(f"{server.url}/v1", "", headers),
    ):
        sampler = HttpSampler(endpoint)
        with pytest.raises(SamplingError) as raised:
            await sampler.sample([1], SamplingParams(model="m", max_tokens=4, timeout=0.2), seed=1)
        await sampler.aclose()
        assert SECRET not in everything_about(raised.value)
        assert SECRET not in repr(endpoint)


async def test_the_key_of_the_environment_is_kept_to_itself_too(
    server, processor, monkeypatch, caplog
):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("FIREWORKS_API_KEY", SECRET)
    server.script = only_the_first(ECHOES["an error"])
    [row] = await roll_out(processor, row_of(), params_for(server, model="accounts/a/m/b", n=2))
    assert server.requests[0].headers["Authorization"] == f"Bearer {SECRET}"
    assert SECRET not in row.model_dump_json()
    assert SECRET not in caplog.text


@pytest.mark.parametrize(
    "wrong",
    [
        {"api_key": SECRET, "extra_body": {"api_key": "another"}},
        {"api_key": "another", "extra_body": {"api_key": SECRET}},
        {"api_key": f"{SECRET}\n"},
        {"api_base": SECRET},
        {"api_base": f"http://me:{SECRET}@host/v1"},
        {"api_base": f"ftp://me:{SECRET}@host/v1"},
        {"api_base": f"http://me:{SECRET}@host/v1", "base_url": "http://other"},
        {"extra_headers": {"X-Api-Key": f"{SECRET}\n"}},
        {"extra_headers": [SECRET]},
    ],
    ids=str,
)
async def test_a_wrong_setting_is_named_without_the_key_in_it(processor, wrong):
    with pytest.raises(ValueError, match=r"API key|completion_params") as raised:
        await roll_out(processor, row_of(), {"model": "m", **wrong})
    assert SECRET not in everything_about(raised.value)
