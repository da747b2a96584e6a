"""Which weights answer which name, over HTTP, with weights that differ."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import threading
from pathlib import Path

import httpx
import pytest
import torch
from starlette.applications import Starlette

from eval_protocol_rft.local.models import bundled_model_path
from eval_protocol_rft.local.server import EXCEPTION_HANDLERS, CompletionEndpoints
from eval_protocol_rft.loop.service._errors import ServiceError
from eval_protocol_rft.loop.service._store import Store
from eval_protocol_rft.loop.service._weights import BaseModel, Weights
from eval_protocol_rft.loop.service.inference._served import ServedModels
from tests.serving import running
from tests.waiting import PATIENCE, wait_until

BASE = "accounts/fireworks/models/arithmetic"
PLACE, OTHER = "accounts/acc/deployments/d", "accounts/acc/deployments/e"
TUNED, ADAPTER = "accounts/acc/models/tuned", "accounts/acc/deployedModels/a"
PROMPT = [5, 3, 6]
MODEL = BaseModel("arithmetic", bundled_model_path("arithmetic"))


class Service:
    """The endpoints over a state folder, and the loop that they run on."""

    def __init__(self, folder: Path) -> None:
        self.store = Store(folder)
        self.weights = Weights(folder / "weights", [MODEL])
        self.lines: list[str] = []
        self.served = ServedModels(self.store, self.weights, say=self.lines.append)
        self.endpoints = CompletionEndpoints(self.served)
        self._loop: asyncio.AbstractEventLoop | None = None

    @contextlib.contextmanager
    def running(self):
        @contextlib.asynccontextmanager
        async def lifespan(app):
            self._loop = asyncio.get_running_loop()
            yield
            await self.served.aclose()

        app = Starlette(
            routes=self.endpoints.routes(),
            exception_handlers=EXCEPTION_HANDLERS,
            lifespan=lifespan,
        )
        app.state.stopping = self.endpoints.stopping
        with running(app) as url, httpx.Client(base_url=url, timeout=PATIENCE) as self.client:
            yield self
        self.store.close()

    def load(self, deployment: str, weights: str, version: str) -> None:
        work = self.served.load(deployment, weights, version=version)
        asyncio.run_coroutine_threadsafe(work, self._loop).result(PATIENCE)

    def deploy(self, name: str, base: str = BASE, **fields) -> None:
        row = {"name": name, "baseModel": base, "state": "READY", "replicaCount": 1}
        self.store.put("deployments", name, {**row, **fields})

    def train(self, seed: int, model: str | None = None) -> str:
        """Weights that differ from all others; as a model of the account where it is named."""
        noise = torch.Generator().manual_seed(seed)
        state = {
            name: value + 0.05 * torch.randn(value.shape, generator=noise)
            for name, value in MODEL.module.state_dict().items()
        }
        head = "lm_head.weight"
        state[head] = state["model.embed_tokens.weight"]
        weights = self.weights.save(state, base=BASE)
        if model:
            self.store.put("models", model, {"name": model, "state": "READY", "_weights": weights})
        return weights

    def put_on(self, deployment: str, model: str, name: str = ADAPTER, **fields) -> None:
        row = {"name": name, "model": model, "deployment": deployment, "state": "DEPLOYED"}
        self.store.put("deployedModels", name, {**row, **fields})

    def ask(self, model: str, **body) -> httpx.Response:
        body = {"prompt": PROMPT, "max_tokens": 4, "seed": 1, "logprobs": True, **body}
        return self.client.post("/inference/v1/completions", json={"model": model, **body})

    def answering(self, model: str) -> str:
        """The weights whose logprobs a reply has, of all that there are."""
        reply = self.ask(model, ignore_eos=True).json()
        rows = reply["choices"][0]["logprobs"]["content"]
        ids = [row["token_id"] for row in rows]
        told = torch.tensor([row["logprob"] for row in rows])
        saved = [path.stem for path in self.weights._folder.glob("*.safetensors")]
        near = [
            w
            for w in [MODEL.weights_id, *saved]
            if torch.allclose(self._of(w, ids), told, atol=1e-4)
        ]
        assert len(near) == 1, (model, near)
        return near[0]

    @torch.no_grad()
    def _of(self, weights: str, ids: list[int]) -> torch.Tensor:
        logits = self.weights.module(weights)(input_ids=torch.tensor([PROMPT + ids])).logits[0]
        logprobs = logits.log_softmax(-1)[len(PROMPT) - 1 : -1]
        return logprobs.gather(-1, torch.tensor(ids)[:, None])[:, 0]


@pytest.fixture
def service(tmp_path):
    with Service(tmp_path).running() as service:
        yield service


def test_each_way_to_name_a_model_leads_to_its_weights(service):
    tuned, loaded, other = service.train(1, TUNED), service.train(2), service.train(3)
    service.deploy(PLACE, f"{BASE}-fp8")
    service.deploy(OTHER)
    service.put_on(PLACE, TUNED)
    service.load(PLACE, loaded, "step-1")
    service.load(OTHER, other, "step-9")
    expected = {
        BASE: MODEL.weights_id,
        "fireworks/arithmetic": MODEL.weights_id,
        "arithmetic": MODEL.weights_id,
        PLACE: loaded,
        f"{BASE}#{PLACE}": loaded,
        f"{BASE}-fp8#{PLACE}": loaded,
        "arithmetic#d": loaded,
        "fireworks/arithmetic#acc/d": loaded,
        f"{PLACE}@step-1": loaded,
        OTHER: other,
        f"{BASE}#{OTHER}": other,
        TUNED: tuned,
        ADAPTER: tuned,
        f"{TUNED}#{PLACE}": tuned,
        "acc/tuned": tuned,
        "tuned#d": tuned,
    }
    assert {name: service.answering(name) for name in expected} == expected


@pytest.mark.parametrize(
    "name",
    [
        "accounts/fireworks/models/other",
        "accounts/acc/deployments/none",
        f"{BASE}#{OTHER}",  # there is none of that name
        f"accounts/fireworks/models/other#{PLACE}",
        f"accounts/acc/models/idle#{PLACE}",
        "accounts/acc/models/idle",
        "accounts/acc/deployedModels/none",
        f"{PLACE}@step-1",
        "",
        "#",
        f"#{PLACE}",
        "@",
        "accounts/acc/deployments/",
        "a/b/c/d/e",
        "\u0000",
    ],
)
def test_what_is_not_deployed_is_not_found(service, name):
    service.deploy(PLACE)
    service.train(1, "accounts/acc/models/idle")
    reply = service.ask(name)
    assert reply.status_code == 404
    error = reply.json()["error"]
    assert error["code"] == "NOT_FOUND"
    assert error["message"].startswith("Model not found, inaccessible, and/or not deployed")
    assert repr(PLACE) in error["message"]


def test_a_deployment_without_a_hot_load_has_its_own_models_weights(service):
    tuned = service.train(1, TUNED)
    service.deploy(PLACE)
    service.deploy(OTHER, TUNED)
    assert service.answering(PLACE) == MODEL.weights_id
    assert service.answering(OTHER) == service.answering(TUNED) == tuned


def test_a_deployment_goes_on_with_what_is_loaded_and_names_it(service):
    service.deploy(PLACE)
    service.deploy(OTHER)
    names = []
    for seed in (1, 2):
        weights = service.train(seed)
        service.load(PLACE, weights, f"step-{seed}")
        service.load(PLACE, weights, f"step-{seed}")  # as a client that had no answer does
        assert service.answering(PLACE) == weights
        names.append(models_of(service.ask(PLACE, stream=True)))
    assert names == [{f"{PLACE}@step-1"}, {f"{PLACE}@step-2"}]
    assert models_of(service.ask(OTHER, stream=True)) == {OTHER}
    assert service.ask(f"{PLACE}@step-1").status_code == 404
    assert service.ask(PLACE).json()["model"] == PLACE


@pytest.mark.parametrize("before", ["step-1", None])
def test_a_stream_names_the_weights_of_its_first_and_its_last_token(service, before):
    service.deploy(PLACE)
    if before:
        service.load(PLACE, service.train(1), before)
    service.ask(PLACE)
    new = service.train(2)
    sampler = service.served._loaded[PLACE].sampler
    forwards, drawn, queued = itertools.count(), threading.Event(), threading.Event()

    def wait_at_the_fifth(*_: object) -> None:
        if next(forwards) == 5:
            drawn.set()
            assert queued.wait(PATIENCE)

    hook = sampler.model.register_forward_hook(wait_at_the_fifth)
    replies = []
    long = {"stream": True, "max_tokens": 50, "ignore_eos": True}
    asking = threading.Thread(target=lambda: replies.append(service.ask(PLACE, **long)))
    asking.start()
    assert drawn.wait(PATIENCE)
    loading = threading.Thread(target=service.load, args=(PLACE, new, "step-2"))
    loading.start()
    wait_until(lambda: sampler._worker._swaps)
    queued.set()
    loading.join(PATIENCE)
    asking.join(PATIENCE)
    hook.remove()
    names = [chunk["model"] for chunk in chunks_of(replies[0])]
    assert (names[0], names[-1]) == (f"{PLACE}@{before}" if before else PLACE, f"{PLACE}@step-2")
    assert set(names[1:-1]) == {PLACE}
    assert service.answering(PLACE) == new


def test_the_same_names_serve_the_same_weights_after_a_restart(tmp_path):
    with Service(tmp_path).running() as service:
        loaded, tuned = service.train(1), service.train(2, TUNED)
        service.deploy(PLACE)
        service.put_on(PLACE, TUNED)
        service.load(PLACE, loaded, "step-1")
        before = service.ask(PLACE).json()["choices"]
    with Service(tmp_path).running() as service:
        assert service.answering(PLACE) == loaded
        assert service.answering(ADAPTER) == tuned
        assert service.ask(PLACE).json()["choices"] == before
        assert models_of(service.ask(PLACE, stream=True)) == {f"{PLACE}@step-1"}


def test_what_is_gone_is_not_found_and_a_new_one_of_its_name_begins_anew(service):
    service.deploy(PLACE)
    service.load(PLACE, service.train(1), "step-1")
    service.ask(PLACE)
    service.store.delete("deployments", PLACE)
    assert service.ask(PLACE).status_code == 404
    service.deploy(PLACE)
    assert service.answering(PLACE) == MODEL.weights_id


def test_a_model_that_is_put_in_the_place_of_another_answers_at_once(service):
    first, second = service.train(1, TUNED), service.train(2, "accounts/acc/models/second")
    service.deploy(PLACE)
    service.put_on(PLACE, TUNED, _merged=True)
    assert service.answering(f"{TUNED}#{PLACE}") == service.answering(PLACE) == first
    service.put_on(PLACE, "accounts/acc/models/second", _merged=True)
    assert service.answering(PLACE) == second
    assert service.ask(f"{TUNED}#{PLACE}").status_code == 404


def test_of_several_adapters_the_default_answers_for_the_model(service):
    service.train(1, TUNED)
    service.deploy(PLACE)
    service.deploy(OTHER, replicaCount=0, maxReplicaCount=0)
    service.put_on(OTHER, TUNED, "accounts/acc/deployedModels/asleep")
    service.put_on(PLACE, TUNED, default=True)
    assert service.ask(TUNED).status_code == 200


def test_a_model_is_asked_where_it_answers(service):
    """Its first deployment is gone, and its default adapter is scaled down."""
    service.train(1, TUNED)
    third = "accounts/acc/deployments/third"
    service.deploy(PLACE, TUNED, state="DELETED")
    service.deploy(OTHER, replicaCount=0, maxReplicaCount=1)
    service.put_on(OTHER, TUNED, default=True)
    assert service.ask(TUNED).json()["error"]["code"] == "DEPLOYMENT_SCALING_UP"
    service.deploy(OTHER, replicaCount=0, maxReplicaCount=0)
    assert service.ask(TUNED).status_code == 404
    service.deploy(third, TUNED)
    assert service.ask(TUNED).status_code == 200


def test_a_deployment_that_is_scaled_to_zero_wakes_by_a_request(service):
    service.deploy(PLACE, replicaCount=0, minReplicaCount=0, maxReplicaCount=1)
    listed = service.client.get("/v1/models").json()["data"]
    assert PLACE not in [one["id"] for one in listed]
    reply = service.ask(PLACE)
    assert reply.status_code == 503
    assert reply.json()["error"]["code"] == "DEPLOYMENT_SCALING_UP"
    assert service.ask(PLACE).status_code == 200


def test_a_deployment_that_may_have_no_replica_stays_asleep(service):
    service.deploy(PLACE, replicaCount=0, maxReplicaCount=0)
    for _ in range(2):
        assert service.ask(PLACE).status_code == 404


def test_what_is_asked_for_and_not_served_is_told_once_to_who_watches(service):
    service.deploy(PLACE, replicaCount=0, maxReplicaCount=0)
    for _ in range(3):
        assert service.ask(PLACE).status_code == 404
    assert service.lines == [f"asked for {PLACE!r}, not served: {PLACE} is scaled to zero"]
    assert service.ask("typo").status_code == 404
    assert service.lines[1:] == ["asked for 'typo', which nothing here serves"]


def test_a_deployment_that_was_deleted_is_not_among_those_that_there_are(service):
    service.deploy(PLACE, state="DELETED")
    service.deploy(OTHER)
    reason, _, there = service.ask(PLACE).json()["error"]["message"].partition("this server has")
    assert f"{PLACE} is DELETED" in reason
    assert OTHER in there
    assert PLACE not in there


@pytest.mark.parametrize("state", ["CREATING", "FAILED", "DELETED"])
def test_a_deployment_that_is_not_ready_is_not_found(service, state):
    service.deploy(PLACE, state=state)
    assert state in service.ask(PLACE).json()["error"]["message"]


def test_all_that_answers_is_listed(service):
    service.train(1, TUNED)
    service.deploy(PLACE, createTime="2026-01-02T03:04:05.678901Z")
    service.deploy(OTHER, state="CREATING")
    service.put_on(PLACE, TUNED)
    data = service.client.get("/inference/v1/models").json()["data"]
    assert [one["id"] for one in data] == [BASE, PLACE, ADAPTER]
    assert [one["owned_by"] for one in data] == ["fireworks", "acc", "acc"]
    assert data[1]["created"] == 1767323045
    assert {one["supports_chat"] for one in data} == {True}
    assert {one["context_length"] for one in data} == {MODEL.context_length}


def test_what_does_not_fit_is_refused_and_changes_nothing(service):
    service.deploy(PLACE)
    with pytest.raises(ServiceError, match="deployments/none not found"):
        service.load("accounts/acc/deployments/none", service.train(1), "x")
    with pytest.raises(ServiceError, match="weights gone not found"):
        service.load(PLACE, "gone", "x")
    assert service.answering(PLACE) == MODEL.weights_id


def test_names_that_are_asked_at_once_never_mix(service):
    """Every name at once, while one of them gets new weights again and again."""
    expected = {}
    for seed, name in enumerate((PLACE, OTHER)):
        service.deploy(name)
        weights = service.train(seed)
        service.load(name, weights, f"of-{seed}")
        expected[name] = weights
    moving = "accounts/acc/deployments/moving"
    service.deploy(moving)
    later = [service.train(seed) for seed in (11, 12)]
    alone = {name: service.ask(name, max_tokens=20).json()["choices"] for name in (*expected, BASE)}
    rounds = 8
    replies: list[tuple[str, dict]] = []

    def ask(name: str) -> None:
        for _ in range(rounds):
            replies.append((name, service.ask(name, max_tokens=20).json()))  # noqa: PERF401

    threads = [threading.Thread(target=ask, args=(name,)) for name in (*alone, moving)]
    for thread in threads:
        thread.start()
    for turn in range(6):
        service.load(moving, later[turn % 2], f"step-{turn}")
    for thread in threads:
        thread.join(PATIENCE)
    assert len(replies) == rounds * len(threads)
    for name, reply in replies:
        if name != moving:
            assert same(reply["choices"], alone[name]), name
    assert {name: service.answering(name) for name in expected} == expected
    assert service.answering(moving) == later[1]


def same(choices: list[dict], others: list[dict]) -> bool:
    """The same tokens, with the same logprobs up to the noise of batches."""

    def rows(given):
        return [(row["token_id"], row["logprob"]) for row in given[0]["logprobs"]["content"]]

    return [t for t, _ in rows(choices)] == [t for t, _ in rows(others)] and torch.allclose(
        *(torch.tensor([p for _, p in rows(one)]) for one in (choices, others)), atol=1e-4
    )


def chunks_of(reply: httpx.Response) -> list[dict]:
    return [json.loads(line.removeprefix("data: ")) for line in reply.text.split("\n\n")[:-2]]


def models_of(reply: httpx.Response) -> set[str]:
    """What the chunks of a stream call the model."""
    return {chunk["model"] for chunk in chunks_of(reply)}
