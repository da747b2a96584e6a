"""HTTP in front of an `Account`: paths, statuses and the log of what was asked."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tests.emulator.account import ACCOUNT, Account, Refused

Handler = Callable[[Request, dict[str, Any]], dict[str, Any]]
HIDDEN = ("rows", "looks")


def control_plane(account: Account, log: list[tuple[str, str]]) -> list[Route]:
    """The control plane's routes; `log` takes (method, path) of every request."""
    base = f"/v1/{ACCOUNT}"

    def route(method: str, path: str, handler: Handler) -> Route:
        async def endpoint(request: Request) -> Response:
            log.append((request.method, request.url.path))
            raw = await request.body()
            is_json = request.headers.get("content-type", "").startswith("application/json")
            body = json.loads(raw) if raw and is_json else {"raw": raw}
            if isinstance(body, dict) and "raw" in body and raw:
                form = await request.form()
                body = {"file": await form["file"].read()}  # type: ignore[union-attr]
            try:
                answer = handler(request, body)
            except Refused as error:
                status = {"code": 5, "message": str(error), "details": []}
                return JSONResponse(status, status_code=error.status)
            return JSONResponse({k: v for k, v in answer.items() if k not in HIDDEN})

        return Route(f"{base}{path}", endpoint, methods=[method])

    def key(request: Request) -> str:
        return str(request.path_params["key"])

    def query(request: Request, name: str) -> str:
        return request.query_params[name]

    def adapters(request: Request, body: dict[str, Any]) -> dict[str, Any]:
        deployed = [
            {k: v for k, v in found.items() if k not in HIDDEN}
            for found in account.deployed.values()
        ]
        return {"deployedModels": deployed, "nextPageToken": ""}

    return [
        route("POST", "/datasets", lambda r, b: account.create_dataset(b["datasetId"], b)),
        route("POST", "/datasets/{key}:upload", lambda r, b: account.upload(key(r), b["file"])),
        route("GET", "/datasets/{key}", lambda r, b: account.get_dataset(key(r))),
        route("DELETE", "/datasets/{key}", lambda r, b: account.delete_dataset(key(r))),
        route(
            "POST",
            "/rlorTrainerJobs",
            lambda r, b: account.create_job(query(r, "rlorTrainerJobId"), b),
        ),
        route("GET", "/rlorTrainerJobs/{key}", lambda r, b: account.get_job(key(r))),
        route("GET", "/models/{key}", lambda r, b: account.get_model(key(r))),
        route(
            "POST",
            "/deployments",
            lambda r, b: account.create_deployment(query(r, "deploymentId"), b),
        ),
        route("GET", "/deployments/{key}", lambda r, b: account.get_deployment(key(r))),
        route("GET", "/deployedModels", adapters),
        route(
            "POST",
            "/deployedModels",
            lambda r, b: account.load_adapter(
                b, replace=r.query_params.get("replaceMergedAddon") == "true"
            ),
        ),
        route("GET", "/deployedModels/{key}", lambda r, b: account.get_adapter(key(r))),
    ]
