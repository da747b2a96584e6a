"""The training wire over HTTP: `/training/v1/rlorTrainerJobs/{account}/{job}/api/v1/...`, and
`/api/v1/...` for a client that trains without a job.

Invariant: nothing that a client may send again is done twice: calls have numbers, models too, and
sessions the key that the client sends with a request and its repetitions.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from eval_protocol_rft.loop.service._errors import ServiceError
from eval_protocol_rft.loop.service._names import ACCOUNT, state_row
from eval_protocol_rft.loop.service._store import Store
from eval_protocol_rft.loop.service.training import _calls as calls
from eval_protocol_rft.loop.service.training._checkpoints import checkpoint_name
from eval_protocol_rft.loop.service.training._training import (
    NO_JOB,
    UNLOADED,
    Call,
    CreateModel,
    Training,
)

_PATIENCE = 20.0
"""Seconds for which a poll is held: clients poll again at once."""
_JOB_PATH = "/training/v1/rlorTrainerJobs/{account}/{job}"


_Handler = Callable[[str | None, Request], Awaitable[Any]]
"""From the job in the path, if there is one, and the request to the answer."""


class _Future(msgspec.Struct, frozen=True):
    request_id: str


class _Model(msgspec.Struct, frozen=True):
    model_id: str


class _StatePath(msgspec.Struct, frozen=True):
    tinker_path: str


class TrainingApi:
    """The endpoints."""

    def __init__(self, store: Store, training: Training) -> None:
        self._store = store
        self._training = training

    def routes(self) -> list[Route]:
        posts: dict[str, _Handler] = {
            "create_session": self._create_session,
            "session_heartbeat": self._accepted,
            "telemetry": self._accepted,
            "create_model": self._create_model,
            "get_info": self._info,
            "unload_model": self._unload,
            "retrieve_future": self._retrieve,
            "weights_info": self._weights_info,
        }
        gets: dict[str, _Handler] = {
            "healthz": self._health,
            "get_server_capabilities": self._capabilities,
            "list_checkpoints": self._checkpoints,
        }
        posts |= {name: self._submitting(name) for name in calls.CALLS}
        return [
            _route(f"{prefix}/api/v1/{name}", method, handler)
            for prefix in (_JOB_PATH, "")
            for method, handlers in (("POST", posts), ("GET", gets))
            for name, handler in handlers.items()
        ]

    async def _health(self, job: str | None, http: Request) -> Any:
        if job is not None:
            self._training.running_job(job)
        return {"status": "ok"}

    async def _capabilities(self, job: str | None, http: Request) -> Any:
        return {"supported_models": [{"model_name": name} for name in self._training.base_models]}

    async def _accepted(self, job: str | None, http: Request) -> Any:
        await http.body()
        return {"status": "accepted"}

    async def _create_session(self, job: str | None, http: Request) -> Any:
        if job is not None:
            self._training.running_job(job)
        sent = http.headers.get("x-idempotency-key")
        key = f"{job or ''}/{sent}" if sent else None
        before = self._store.get("sessionKeys", key) if key else None
        if before is not None:
            return before
        with self._store.change():
            answer = {"session_id": self._training.create_session(job)}
            if key:
                self._store.put("sessionKeys", key, answer)
        return answer

    async def _create_model(self, job: str | None, http: Request) -> Any:
        request = calls.decode(await http.body(), CreateModel)
        return {"request_id": f"{self._training.create_model(job, request)}:0"}

    async def _info(self, job: str | None, http: Request) -> Any:
        model = calls.decode(await http.body(), _Model).model_id
        described = self._training.model(job, model)
        return {
            "type": "get_info",
            "model_id": model,
            "model_data": {"model_name": described["base"]},
            "is_lora": described["rank"] > 0,
            "lora_rank": described["rank"],
        }

    async def _unload(self, job: str | None, http: Request) -> Any:
        model = calls.decode(await http.body(), _Model).model_id
        self._training.unload(job, model)
        return {"request_id": f"{model}:{UNLOADED}"}

    async def _weights_info(self, job: str | None, http: Request) -> Any:
        path = calls.decode(await http.body(), _StatePath).tinker_path
        name = checkpoint_name(job or NO_JOB, path.rpartition("/")[2])
        row = self._store.get("checkpoints", state_row(name))
        if row is None:
            raise ServiceError.not_found(f"a state of training {path!r}")
        return {
            "base_model": row["_base"],
            "is_lora": row["_rank"] > 0,
            "lora_rank": row["_rank"] or None,
        }

    async def _checkpoints(self, job: str | None, http: Request) -> Any:
        return {"checkpoints": self._training.checkpoints.states(job or NO_JOB)}

    def _submitting(self, name: str) -> _Handler:
        async def submit(job: str | None, http: Request) -> Any:
            body = await http.body()
            call = calls.decode(body, Call)
            return {"request_id": self._training.submit(job, name, call, body)}

        return submit

    async def _retrieve(self, job: str | None, http: Request) -> Any:
        future = calls.decode(await http.body(), _Future).request_id
        answer = await self._training.answer(future, patience=_PATIENCE)
        if answer is None:
            return {"type": "try_again", "request_id": future, "queue_state": "active"}
        return Response(answer, media_type="application/json")


def _route(path: str, method: str, handler: _Handler) -> Route:
    async def endpoint(http: Request) -> Response:
        try:
            account = http.path_params.get("account")
            if account is not None and f"accounts/{account}" != ACCOUNT:
                raise ServiceError.not_found(f"accounts/{account}")
            answer = await handler(http.path_params.get("job"), http)
        except ServiceError as error:
            return JSONResponse({"detail": str(error), **error.body()}, status_code=error.status)
        return answer if isinstance(answer, Response) else JSONResponse(answer)

    return Route(path, endpoint, methods=[method])
