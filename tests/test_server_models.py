"""Several models behind one set of endpoints, in an application of somebody else's."""

from __future__ import annotations

import httpx
import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from eval_protocol_rft.local import LoadedTokenizer
from eval_protocol_rft.local.server import (
    EXCEPTION_HANDLERS,
    ApiError,
    CompletionEndpoints,
    ServedModel,
)
from tests.serving import ScriptedSampler, byte_tokenizer, running
from tests.test_server import completion_of
from tests.waiting import PATIENCE

TOKENIZER = LoadedTokenizer.wrap(byte_tokenizer())


class Two:
    """Answers to `a` and `b`, each of which says its own name; `b` has a short context."""

    def __init__(self) -> None:
        self.models = {
            name: ServedModel(
                name=f"the {name}",
                sampler=ScriptedSampler(lambda ids, params, seed, name=name: completion_of(name)),
                tokenizer=TOKENIZER,
                context_length=length,
            )
            for name, length in (("a", 100), ("b", 4))
        }

    async def find(self, name: str) -> ServedModel:
        if name not in self.models:
            raise ApiError.unknown_model(name, served=self.models)
        return self.models[name]

    async def listed(self):
        return [{"id": name, "context_length": m.context_length} for name, m in self.models.items()]


@pytest.fixture(scope="module")
def served():
    endpoints = CompletionEndpoints(Two())
    app = Starlette(
        routes=[*endpoints.routes(), Route("/own", lambda http: PlainTextResponse("own"))],
        exception_handlers=EXCEPTION_HANDLERS,
    )
    app.state.stopping = endpoints.stopping
    with running(app) as url, httpx.Client(base_url=url, timeout=PATIENCE) as client:
        yield client, endpoints


@pytest.fixture
def client(served) -> httpx.Client:
    return served[0]


def ask(client, model: str, **body) -> httpx.Response:
    return client.post("/v1/completions", json={"model": model, "prompt": [1, 2, 3], **body})


def test_a_request_is_answered_by_the_model_that_it_names(client):
    for name in ("a", "b", "a"):
        reply = ask(client, name).json()
        assert (reply["choices"][0]["text"], reply["model"]) == (name, f"the {name}")


def test_each_model_has_its_own_context(client):
    assert ask(client, "a", prompt=[1] * 5).status_code == 200
    refused = ask(client, "b", prompt=[1] * 5)
    assert refused.status_code == 400
    assert "the context of 4" in refused.json()["error"]["message"]


def test_a_name_that_nobody_has_is_refused_with_those_that_there_are(client):
    reply = ask(client, "c")
    assert reply.status_code == 404
    assert "'c'; this server has 'a', 'b'" in reply.json()["error"]["message"]


def test_all_are_listed_and_the_application_keeps_its_own_routes(client):
    listed = client.get("/inference/v1/models").json()
    assert [one["id"] for one in listed["data"]] == ["a", "b"]
    assert {one["object"] for one in listed["data"]} == {"model"}
    assert client.get("/own").text == "own"
