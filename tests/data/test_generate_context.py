"""What the model's context holds is looked up, and what it does not hold is told before anything is
asked."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from eval_protocol_rft.data._context import context_length
from eval_protocol_rft.local.server._app import create_app
from eval_protocol_rft.rollout import parse_completion_params
from eval_protocol_rft.sampling import Completion, HttpSampler
from tests.data.servers import refused, rows_by_pair, succeed, write_jsonl
from tests.rollouts import chat_tokenizer, rendered
from tests.serving import ScriptedSampler, running

AROUND = len(rendered(""))
CONTEXT = AROUND + 20
"""Of the model below: its prompts have one token per character."""


@pytest.fixture
def model() -> ScriptedSampler:
    """Says as many tokens as it may."""
    return ScriptedSampler(
        lambda prompt, params, seed: Completion(
            token_ids=[64] * (params.max_tokens or 0),
            logprobs=[-1.0] * (params.max_tokens or 0),
            raw_logprobs=[-1.0] * (params.max_tokens or 0),
            finish_reason="length",
        )
    )


@pytest.fixture
def url(model: ScriptedSampler) -> Iterator[str]:
    app = create_app(model, chat_tokenizer(), model_name="m", context_length=CONTEXT)
    with running(app) as url:
        yield url


def command(folder: Path, url: str, tokenizer: Path, *prompts: str) -> list[Any]:
    data = write_jsonl(folder / "d.jsonl", [{"prompt": prompt} for prompt in prompts])
    at = ("--model", "m", "--base-url", url, "--tokenizer", tokenizer, "--quiet")
    return ["generate", data, "-o", folder / "o.parquet", *at]


def test_max_tokens_is_what_the_context_leaves(
    url: str, model: ScriptedSampler, tmp_path: Path, tokenizer_folder: Path
) -> None:
    args = command(tmp_path, url, tokenizer_folder, "x" * 15, "x" * 4)
    said = succeed(*args, "--max-tokens", 8).stderr
    assert "leaves fewer, 5 at least, for 1 of 2 prompts" in said
    assert sorted(params.max_tokens or 0 for _, params, _ in model.asked) == [5, 8]
    rows = rows_by_pair(tmp_path / "o.parquet")
    assert [row["max_tokens"] for row in rows.values()] == [5, 8]
    assert [len(row["completion_ids"]) for row in rows.values()] == [5, 8]
    assert [row["truncated"] for row in rows.values()] == [True, True]


def test_a_prompt_that_does_not_fit_is_told_and_costs_no_request(
    url: str, model: ScriptedSampler, tmp_path: Path, tokenizer_folder: Path
) -> None:
    args = command(tmp_path, url, tokenizer_folder, "x", "x" * 20, "y" * 21)
    said = succeed(*args, "--max-tokens", 2).stderr
    assert f"2 of 3 prompts do not fit into the context of {CONTEXT} tokens of m, the first" in said
    assert f"d.jsonl:2 with {CONTEXT}" in said
    assert len(model.asked) == 1
    failed = [row for row in rows_by_pair(tmp_path / "o.parquet").values() if row["error"]]
    assert [(row["data_idx"], row["error_kind"], row["attempts"]) for row in failed] == [
        (1, "prompt", 0),
        (2, "prompt", 0),
    ]


def test_where_none_fits_nothing_is_begun(
    url: str, model: ScriptedSampler, tmp_path: Path, tokenizer_folder: Path
) -> None:
    said = refused(*command(tmp_path, url, tokenizer_folder, "x" * 20, "y" * 21))
    assert "2 of 2 prompts do not fit" in said
    assert not model.asked
    assert not (tmp_path / "o.parquet").exists()


def test_unset_it_is_what_the_context_leaves_too(
    url: str, model: ScriptedSampler, tmp_path: Path, tokenizer_folder: Path
) -> None:
    said = succeed(*command(tmp_path, url, tokenizer_folder, "x")).stderr
    assert "max_tokens is 2,048, and the context" in said
    assert [params.max_tokens for _, params, _ in model.asked] == [19]


def test_where_all_fits_nothing_is_said(url: str, tmp_path: Path, tokenizer_folder: Path) -> None:
    assert not succeed(*command(tmp_path, url, tokenizer_folder, "x"), "--max-tokens", 19).stderr


@pytest.mark.parametrize(
    ("body", "found"),
    [
        ({"data": [{"id": "x", "max_model_len": 5}, {"id": "m", "max_model_len": 4096}]}, 4096),
        ({"data": [{"id": "m", "context_length": 100}]}, 100),
        ({"data": [{"id": "m"}]}, None),
        ({"data": [{"id": "m", "max_model_len": None}, 3]}, None),
        ({"data": [{"id": "m", "max_model_len": "9"}]}, None),
        ({"data": {"id": "m"}}, None),
        ([], None),
        (None, None),
    ],
)
async def test_it_is_what_the_server_lists(body: Any, found: int | None) -> None:
    async def models(request: Request) -> Response:
        return Response(json.dumps(body)) if body is not None else Response(status_code=404)

    app = Starlette(routes=[Route("/v1/models", models)])
    app.state.stopping = asyncio.Event()
    with running(app) as url:
        request = parse_completion_params({"model": "m", "base_url": url})
        assert request.endpoint is not None
        sampler = HttpSampler(request.endpoint)
        assert await context_length(sampler, request) == found
        await sampler.aclose()
