"""The tokenizer of a model of Fireworks is the one that the service says it has."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from eval_protocol_rft import FireworksTrainingRolloutProcessor
from eval_protocol_rft.local._tokenizer import TokenizerError
from eval_protocol_rft.rollout._backends import _tokenizer_place, hub_id_of
from eval_protocol_rft.sampling._endpoint import Endpoint
from tests.rollouts import roll_out, row_of
from tests.serving import running

BASE = "accounts/fireworks/models/qwen3-8b"
RESOURCES: Mapping[str, Any] = {
    BASE: {"name": BASE, "huggingFaceUrl": "https://huggingface.co/Qwen/Qwen3-8B"},
    "accounts/me/models/tuned": {"kind": "HF_PEFT_ADDON", "peftDetails": {"baseModel": BASE}},
    "accounts/me/deployments/d": {"baseModel": "accounts/me/models/tuned"},
    "accounts/me/deployedModels/tuned-d": {"model": "accounts/me/models/tuned"},
    "accounts/me/models/own": {"kind": "CUSTOM_MODEL", "huggingFaceUrl": ""},
    "accounts/me/models/round": {"peftDetails": {"baseModel": "accounts/me/models/round"}},
    "accounts/me/models/here": {"huggingFaceUrl": "file:///models/my%20model"},
    "accounts/me/models/list": ["no", "object"],
}


@contextmanager
def fireworks(asked: list[tuple[str, str | None]]) -> Iterator[str]:
    async def model(request: Request) -> Response:
        name = request.path_params["name"]
        asked.append((name, request.headers.get("authorization")))
        if name == "accounts/other/models/own":
            return JSONResponse({"code": 7, "message": "forbidden"}, status_code=403)
        if name not in RESOURCES:
            return JSONResponse({"code": 5, "message": "not found"}, status_code=404)
        return JSONResponse(RESOURCES[name])

    app = Starlette(routes=[Route("/v1/{name:path}", model)])
    app.state.stopping = asyncio.Event()
    with running(app) as url:
        yield url


@pytest.mark.parametrize(
    ("model", "hub_id", "why"),
    [
        (BASE, "Qwen/Qwen3-8B", ""),
        ("accounts/me/models/tuned", "Qwen/Qwen3-8B", ""),
        ("accounts/me/models/tuned#accounts/me/deployments/d", "Qwen/Qwen3-8B", ""),
        (f"{BASE}@v7", "Qwen/Qwen3-8B", ""),
        ("accounts/me/deployments/d", "Qwen/Qwen3-8B", ""),
        ("accounts/me/deployedModels/tuned-d", "Qwen/Qwen3-8B", ""),
        ("accounts/me/models/own", None, "names no Hugging Face model for accounts/me/models/own"),
        ("accounts/me/models/here", "/models/my model", ""),  # of a service on this machine
        ("accounts/me/models/round", None, "too many to follow"),
        ("accounts/me/models/gone", None, "Fireworks answered 404"),
        ("accounts/me/models/list", None, "no JSON object"),
        ("accounts/other/models/own", None, "answered 403: the API key (FIREWORKS_API_KEY)"),
    ],
)
@pytest.mark.parametrize("path", ["/inference/v1", "/v1"])
def test_the_service_is_asked_for_the_model_and_for_what_it_was_made_of(
    model: str, hub_id: str | None, why: str, path: str
) -> None:
    asked: list[tuple[str, str | None]] = []
    with fireworks(asked) as url:
        found, said = asyncio.run(hub_id_of(model, Endpoint(url + path, "key-of-mine")))
    assert found == hub_id
    assert why in said
    assert {key for _, key in asked} == {"Bearer key-of-mine"}


def test_a_service_elsewhere_names_no_folder_of_this_machine() -> None:
    url = "file:///etc"
    assert _tokenizer_place(url, Endpoint("https://fireworks.example/inference/v1", None)) is None
    assert _tokenizer_place(url, Endpoint("http://localhost:8000/v1", None)) == "/etc"


def test_rows_without_a_tokenizer_ask_once_and_are_told_what_to_write() -> None:
    asked: list[tuple[str, str | None]] = []
    rows = [row_of(row_id=f"r{i}") for i in range(4)]
    with fireworks(asked) as url:
        params = {"model": "accounts/me/models/own", "api_base": url, "api_key": "key-of-mine"}
        with pytest.raises(
            TokenizerError,
            match=r'names no tokenizer \(Fireworks names no Hugging Face model.*"tokenizer"\] = ',
        ):
            asyncio.run(roll_out(FireworksTrainingRolloutProcessor(), rows, params))
    assert [name for name, _ in asked] == ["accounts/me/models/own"]
