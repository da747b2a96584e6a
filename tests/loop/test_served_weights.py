"""`ServedWeights` with the real command `ep-rft serve --reloads`, and with servers that fail."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from eval_protocol.models import EvaluationRow, Message
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from eval_protocol_rft.local.models import bundled_model_path
from eval_protocol_rft.local.server._app import create_app
from eval_protocol_rft.local.server._weights import ReloadingSampler
from eval_protocol_rft.loop import trl as loop_trl
from eval_protocol_rft.loop._local_trainer import LocalTrainer
from eval_protocol_rft.loop._served_weights import ServedWeights
from eval_protocol_rft.loop._setup import LocalParts
from eval_protocol_rft.loop._train import TrainResult, atrain
from eval_protocol_rft.loop._trainer import NamedLoss, TrainerError
from eval_protocol_rft.loop._watch import TrainingStoppedError
from eval_protocol_rft.sampling._endpoint import Endpoint
from eval_protocol_rft.sampling._http import HttpSampler
from eval_protocol_rft.sampling._types import Completion, SamplingParams
from eval_protocol_rft.training._datums import TrainingDatum
from examples.arithmetic import test_arithmetic as example
from examples.sums import test_sums as sums
from tests.loop.policies import (
    arithmetic_sampler,
    change,
    forward_logprobs,
    grpo_trainer,
    plain_logprobs,
    tiny_model,
)
from tests.loop.runs import options, sums_file
from tests.loop.test_live_weights import prompt
from tests.programs import Zygote
from tests.serving import running

FOLDER = bundled_model_path("arithmetic")
STREAMED = SamplingParams(model="policy", max_tokens=8, stream=True)


@pytest.fixture(scope="module")
def url(zygote: Zygote) -> Iterator[str]:
    """One server for the file: who uses it gives it weights first."""
    serve = "serve --model local/arithmetic --served-model-name policy --port 0 --reloads"
    server = zygote.start(*serve.split())
    try:
        yield re.search(r"on (http://127\.0\.0\.1:\d+) ", server.line())[1]
    finally:
        server.kill(signal.SIGTERM)


@pytest.fixture
async def sampler(url: str) -> Any:
    made = HttpSampler(Endpoint(f"{url}/v1"))
    yield made
    await made.aclose()


def datum(ids: list[int], completion: Completion, advantage: float) -> TrainingDatum:
    tokens = np.array([*ids, *completion.token_ids])
    sampled = np.arange(len(tokens) - 1) >= len(ids) - 1
    logprobs = np.zeros(len(tokens) - 1, np.float32)
    logprobs[sampled] = completion.logprobs
    return TrainingDatum(
        input_tokens=tokens[:-1],
        target_tokens=tokens[1:],
        logprobs=logprobs,
        advantages=np.where(sampled, advantage, 0).astype(np.float32),
        weights=sampled.astype(np.float32),
        prompt_length=len(ids),
        reward=1.0,
        truncated=completion.truncated,
        group=0,
        row_id="0",
        completion=0,
    )


def k3(model: torch.nn.Module, batch: list[TrainingDatum]) -> float:
    """Mean over sampled tokens, by a forward of nothing but transformers."""
    found = []
    with torch.no_grad():
        for one in batch:
            d = plain_logprobs(model, one).double().numpy() - one.logprobs.astype(np.float64)
            d = d[one.prompt_length - 1 :]
            found.append(np.exp(d) - 1 - d)
    return float(np.concatenate(found).mean())


async def test_what_is_published_is_what_is_sampled_and_is_named(
    url: str, sampler: HttpSampler, tmp_path: Path
) -> None:
    local = arithmetic_sampler()
    ids = prompt(local)
    trainer = LocalTrainer(local.model, sink=ServedWeights(url, folder=tmp_path / "weights"))
    await trainer.publish(0)
    last: list[TrainingDatum] = []
    for version in range(4):
        completions = [await sampler.sample(ids, STREAMED, seed=seed) for seed in range(8)]
        assert {c.policy_version for c in completions} == {f"step-{version}"}
        assert {c.first_policy_version for c in completions} == {None}
        batch = [datum(ids, c, 1.0 if i % 2 else -1.0) for i, c in enumerate(completions)]
        policy = tiny_policy(trainer)
        assert k3(policy, batch) < 1e-8
        if last:
            assert k3(policy, last) > 1e-4, "the weights did change"
        last = batch
        await trainer.forward_backward(batch, NamedLoss(loss_fn="importance_sampling"))
        await trainer.optim_step(learning_rate=1e-3)
        await trainer.publish(version + 1)
        assert not os.listdir(tmp_path / "weights"), "weights are left lying about"
    await trainer.aclose()


def tiny_policy(trainer: LocalTrainer) -> torch.nn.Module:
    model = arithmetic_sampler().model
    model.load_state_dict(trainer.weights())
    return model


async def over_http(
    folder: Path, url: str, said: Callable[[str], None] = print, **changes: Any
) -> TrainResult:
    return await atrain(
        example.test_arithmetic,
        folder,
        options=options(**changes),
        model="policy",
        completion_params={"api_base": url, "seed": 0},
        parts=LocalParts(weights=FOLDER, say=said),
        data=[sums_file(folder.parent / "sums.jsonl")],
        held_out=8,
        progress=False,
    )


@pytest.mark.parametrize("staleness", [0, 1])
async def test_a_whole_run_over_http_trains_on_what_it_samples(
    url: str, staleness: int, tmp_path: Path
) -> None:
    await LocalTrainer(arithmetic_sampler().model, sink=ServedWeights(url)).publish(0)
    said: list[str] = []
    result = await over_http(
        tmp_path / "run",
        url,
        said.append,
        steps=6,
        learning_rate=2e-4,
        max_staleness=staleness,
    )
    assert len(result.steps) == 6
    compared = [line["mismatch_k3"] for line in result.steps if "mismatch_k3" in line]
    assert compared
    if not staleness:
        assert len(compared) == 6
        assert max(compared) < 1e-8
    assert (result.folder / "model" / "model.safetensors").exists()
    *_, first, last = said
    assert first.startswith(f"{url}/v1 takes the weights in {FOLDER} now")
    assert last.startswith(f"{url} holds the weights of step-6, and goes on with them")
    # What it says gives the first ones back.
    call = re.search(r"-d '(.*?)'", last)[1].encode()
    headers = {"content-type": "application/json"}
    async with httpx.AsyncClient() as client:
        reply = await client.post(f"{url}/collective_rpc", content=call, headers=headers)
    assert reply.status_code == 200


class Deaf(ReloadingSampler):
    """Says that it has read the weights."""

    async def reload(self, folder: Path) -> str:
        return "never"


async def test_a_server_that_ignores_the_reload_is_found_out(tmp_path: Path) -> None:
    local = arithmetic_sampler(policy_version="initial")
    app = create_app(Deaf(local), local.tokenizer, model_name="policy", context_length=256)
    said: list[str] = []
    with running(app) as url, pytest.raises(TrainingStoppedError) as stopped:
        await over_http(
            tmp_path / "run",
            url,
            said.append,
            steps=30,
            learning_rate=1e-3,
            eval_every=0,
            eval_completions=0,
        )
    assert stopped.value.trouble.cause == "stale_weights"
    # Also of a run that fails: whoever samples there is told what it has.
    assert re.search(r"holds the weights of step-\d+, and goes on with them", said[-1])


# Servers that say no


async def publish(url: str, model: Any = None, **arguments: Any) -> None:
    model = model or tiny_model()
    await ServedWeights(url, **arguments).publish(model, model.state_dict(), 7)


async def test_weights_of_another_model_are_an_error_that_cites_the_server(
    url: str, tmp_path: Path
) -> None:
    with pytest.raises(TrainerError, match=r"answered 400.*old weights.*of this model") as raised:
        await publish(url, folder=tmp_path)
    assert url in str(raised.value)
    assert not os.listdir(tmp_path)


async def test_what_a_server_is_left_with() -> None:
    server = Scripted(collective_rpc=[JSONResponse({}), Response("no room", 500)])
    with running(server.app()) as url:
        sink, model = ServedWeights(url), tiny_model()
        assert sink.what_stays(FOLDER) is None
        await sink.publish(model, model.state_dict(), 7)
        assert "holds the weights of step-7, and" in str(sink.what_stays(FOLDER))
        with pytest.raises(TrainerError):
            await sink.publish(model, model.state_dict(), 8)
        kept = str(sink.what_stays(FOLDER))
    assert "may hold the weights of step-8, or those of step-7, and" in kept


async def test_a_server_without_reloads_says_how_to_start_it() -> None:
    local = arithmetic_sampler()
    app = create_app(local, local.tokenizer, model_name="policy")
    with running(app) as url, pytest.raises(TrainerError, match="ep-rft serve --reloads"):
        await publish(url)


async def test_no_server_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(TrainerError, match=r"http://127\.0\.0\.1:9/collective_rpc: no answer"):
        await publish("http://127.0.0.1:9", folder=tmp_path)
    assert not os.listdir(tmp_path)


async def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainerError, match=r"/file/below: cannot write weights there"):
        await publish("http://127.0.0.1:9", folder=tmp_path / "file" / "below")


class Scripted:
    """Answers each path with the next of its replies, and notes what it was sent."""

    def __init__(self, **replies: list[Response]) -> None:
        self._replies = replies
        self.asked: list[str] = []
        self.bodies: list[bytes] = []
        self.keys: list[str | None] = []

    def app(self) -> Starlette:
        import asyncio

        app = Starlette(routes=[Route("/{path}", self.answer, methods=["POST"])])
        app.state.stopping = asyncio.Event()
        return app

    async def answer(self, http: Request) -> Response:
        path = http.path_params["path"]
        self.asked.append(f"{path}?{http.url.query}" if http.url.query else path)
        self.bodies.append(await http.body())
        self.keys.append(http.headers.get("authorization"))
        replies = self._replies.get(path)
        return replies.pop(0) if replies else JSONResponse({"success": True})


async def test_calls_come_in_the_order_that_is_right_for_vllm_with_a_key() -> None:
    """The name last: by then the weights are those that it names."""
    server = Scripted()
    with running(server.app()) as url:
        await publish(f"{url}/v1", headers={"authorization": "Bearer k"})
    assert server.asked == ["collective_rpc", "reset_prefix_cache", "update_weight_version"]
    assert server.bodies[2] == b'{"new_version": "step-7"}'
    assert set(server.keys) == {"Bearer k"}


async def test_a_prefix_cache_in_use_is_reset_all_the_same() -> None:
    """vLLM says so in a reply of status 200."""
    server = Scripted(reset_prefix_cache=[JSONResponse({"success": False})])
    with running(server.app()) as url:
        await publish(url)
    assert server.asked[1:3] == [
        "reset_prefix_cache",
        "reset_prefix_cache?reset_running_requests=true",
    ]
    kept = Scripted(reset_prefix_cache=[JSONResponse({"success": False})] * 2)
    with running(kept.app()) as url, pytest.raises(TrainerError, match="no-enable-prefix-caching"):
        await publish(url)


async def test_only_the_name_may_be_unknown_to_the_server() -> None:
    not_found = {"content": {"detail": "Not Found"}, "status_code": 404}
    nameless = Scripted(update_weight_version=[JSONResponse(**not_found)])
    with running(nameless.app()) as url:
        await publish(url)
    failing = Scripted(update_weight_version=[Response("boom", 500)])
    with running(failing.app()) as url, pytest.raises(TrainerError, match=r"answered 500.*boom"):
        await publish(url)
    unprepared = Scripted(collective_rpc=[JSONResponse(**not_found)])
    with (
        running(unprepared.app()) as url,
        pytest.raises(TrainerError, match="VLLM_SERVER_DEV_MODE"),
    ):
        await publish(url)


def test_a_trainer_of_trl_gives_them_too(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    row = EvaluationRow(messages=[Message(role="user", content="12+34=")], ground_truth="46")
    monkeypatch.setattr(loop_trl, "_require_trl", lambda: None)
    params = {"model": "policy", "api_base": f"{url}/v1"}
    with loop_trl.trl_rollouts(
        sums.test_sums, [row], completion_params=params, weights=str(FOLDER)
    ) as made:
        trainer = grpo_trainer(made)
        for step in range(2):
            change(trainer.model, seed=step)
            trainer.state.global_step = step
            result = made([[{"role": "user", "content": "12+34="}]] * 4, trainer)
            for i in range(4):
                expected = forward_logprobs(
                    trainer.model, result["prompt_ids"][i], result["completion_ids"][i]
                )
                np.testing.assert_allclose(result["logprobs"][i], expected, atol=1e-4)
