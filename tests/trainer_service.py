"""A trainer job and a deployment of it on the local Fireworks, as tests of its clients need them:
what they asked is on record, and replicas can be slow or fail."""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from fireworks.training import sdk
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from eval_protocol_rft.loop._run_options import Optimizer
from eval_protocol_rft.loop._trainer import NamedLoss
from eval_protocol_rft.loop.fireworks._fireworks_trainer import FireworksTrainer
from eval_protocol_rft.loop.fireworks._hot_load import HotLoad
from eval_protocol_rft.loop.service._app import FireworksService
from tests.service import BASE, KEY, fireworks_service

OPTIMIZER = Optimizer(beta2=0.95, max_grad_norm=None)
CLIP = {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}
JOB, DEPLOYMENT = "accounts/acc/rlorTrainerJobs/job", "accounts/acc/deployments/dep"
_HOT_LOAD = "/hot_load/v1/models/hot_load"
_NOT_CALLS = {"retrieve_future", "session_heartbeat", "telemetry", "healthz", "create_session"}


@dataclass
class Asked:
    """ASGI middleware: what was asked of the training API and for hot loads, and how replicas
    take those."""

    app: ASGIApp
    calls: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    """Name and body."""
    loads: list[tuple[dict[str, str], dict[str, Any]]] = field(default_factory=list)
    """Headers and body."""
    lags: tuple[int, ...] = (0,)
    """Per replica: how many looks go by until it holds a snapshot."""
    failing: bool = False
    """The next snapshot fails on the last replica."""
    held: list[str | None] = field(default_factory=list)
    """Per replica."""
    _looks: int = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "")
        name = path.rpartition("/api/v1/")[2] if "/api/v1/" in path else ""
        if path == _HOT_LOAD and scope["method"] == "GET":
            await self._status(scope, receive, send)
        elif path == _HOT_LOAD or (name and name not in _NOT_CALLS):
            body, receive = await _read(receive)
            if path == _HOT_LOAD:
                self._looks = 0
                headers = {k.decode(): v.decode() for k, v in scope["headers"]}
                self.loads.append((headers, body))
            else:
                self.calls.append((name, body))
            await self.app(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    async def _status(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The one replica's answer, as if there were several that load one after the other."""
        answer = bytearray()

        async def gather(message: Message) -> None:
            answer.extend(message.get("body", b""))

        await self.app(scope, receive, gather)
        identity = json.loads(answer)["replicas"][0]["current_snapshot_identity"]
        self.held += [None] * (len(self.lags) - len(self.held))
        replicas = []
        for i, lag in enumerate(self.lags):
            stage = "done" if self._looks >= lag else "loading"
            if self.failing and i == len(self.lags) - 1:
                stage = "error"
            if stage == "done":
                self.held[i] = identity
            loading = {"stage": stage, "target_snapshot_identity": identity}
            replicas.append(
                {
                    "current_snapshot_identity": self.held[i],
                    "readiness": stage != "loading",
                    "loading_state": loading,
                }
            )
        self._looks += 1
        body = json.dumps({"replicas": replicas}).encode()
        headers = [(b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})


async def _read(receive: Receive) -> tuple[dict[str, Any], Receive]:
    """A request's body, and what gives it again."""
    data, more = b"", True
    while more:
        message = await receive()
        data += message.get("body", b"")
        more = message.get("more_body", False)
    again: list[Message] = [{"type": "http.request", "body": data, "more_body": False}]

    async def replay() -> Message:
        return again.pop() if again else await receive()

    return json.loads(data or b"{}"), replay


@dataclass
class TrainerService:
    """A running service with `JOB` and `DEPLOYMENT`."""

    url: str
    service: FireworksService
    asked: Asked

    def called(self, name: str) -> list[dict[str, Any]]:
        return [body for call, body in self.asked.calls if call == name]

    @property
    def module(self) -> Any:
        """The model in training, its gradients in it."""
        return self._trained._module

    def state(self) -> Any:
        """Weights and moments."""
        optimizer = self._trained._optimizer.state_dict()
        return copy.deepcopy((self.module.state_dict(), optimizer))

    @property
    def _trained(self) -> Any:
        store, live = self.service.store, self.service.training._live
        (model,) = [m for m in live if not (store.get("trainingModels", m) or {})["frozen"]]
        return live[model].trained

    @property
    def snapshots(self) -> list[str]:
        return [row["identity"] for row in self.service.store.list("snapshots")]

    @property
    def deployment(self) -> dict[str, Any]:
        row = self.service.store.get("deployments", DEPLOYMENT)
        assert row is not None
        return row


@contextlib.contextmanager
def trainer_service(*, lags: tuple[int, ...] = (0,)) -> Iterator[TrainerService]:
    """A trainer job of the bundled model, and a deployment of a quantisation of it."""
    asked: list[Asked] = []

    def recording(app: ASGIApp) -> ASGIApp:
        asked.append(Asked(app, lags=lags))
        return asked[0]

    with (
        tempfile.TemporaryDirectory() as folder,
        fireworks_service(Path(folder) / "state", around=recording) as running,
    ):
        url = f"{running.url}/v1/accounts/acc"
        config = {"baseModel": BASE}
        job = {"serviceMode": True, "trainingConfig": config}
        _made(httpx.post(f"{url}/rlorTrainerJobs?rlorTrainerJobId=job", json=job))
        deployment = {
            "baseModel": f"{BASE}-fp8",
            "enableHotLoad": True,
            "hotLoadTrainerJob": JOB,
        }
        _made(httpx.post(f"{url}/deployments?deploymentId=dep", json=deployment))
        yield TrainerService(running.url, running.service, asked[0])


def _made(reply: httpx.Response) -> None:
    assert reply.status_code == 200, reply.text


def make_trainer(server: TrainerService, *, lora: bool = False, **options: Any) -> FireworksTrainer:
    """Over the SDK's own client. Blocks: the SDK creates the model before it returns."""
    address = f"{server.url}/training/v1/rlorTrainerJobs/acc/job"
    service = sdk.FiretitanServiceClient(api_key=KEY, base_url=address)
    manager = sdk.DeploymentManager(api_key=KEY, base_url=server.url)
    make_reference: Callable[..., Any] = functools.partial(
        service.create_reference_client, base_model=BASE
    )
    return FireworksTrainer(
        service.create_training_client(base_model=BASE, lora_rank=8 if lora else 0),
        temperature=1.0,
        optimizer=OPTIMIZER,
        hot_load=HotLoad(manager=manager, deployment="dep", base_model=BASE, poll_seconds=0.01),
        lora=lora,
        make_reference=make_reference,
        close=service.close,
        **options,
    )


async def one_step(trainer: FireworksTrainer, batch: Any) -> None:
    await trainer.forward_backward(batch.datums, NamedLoss(loss_fn="ppo", config=CLIP))
    await trainer.optim_step(learning_rate=1e-3)
