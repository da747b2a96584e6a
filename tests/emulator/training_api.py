"""The training API (Tinker's wire) in front of a `Policy`, and hot-loads of what it saves.

Requests of one model are carried out in the order of their `seq_id`, whatever order they come in.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tests.emulator.policy import Policy, check_tensors

Answer = dict[str, Any]


@dataclass
class TrainingApi:
    """What a trainer job answers under `/api/v1/`."""

    policy: Policy
    calls: list[tuple[str, Answer]] = field(default_factory=list)
    """(name, body) of every request but polling, heartbeats and telemetry."""
    snapshots: dict[str, tuple[str, Any]] = field(default_factory=dict)
    """Name -> kind and module, of what was saved for sampling."""
    states: dict[str, Any] = field(default_factory=dict)
    failing: str | None = None
    """A call of this name is accepted, and its future fails."""
    _results: dict[str, Answer] = field(default_factory=dict)
    _models: list[bool] = field(default_factory=list)
    """Per model: whether it is the frozen base."""
    _done: dict[str, int] = field(default_factory=dict)
    _turn: asyncio.Condition = field(default_factory=asyncio.Condition)

    def called(self, name: str) -> list[Answer]:
        return [body for called, body in self.calls if called == name]

    def routes(self, prefix: str) -> list[Route]:
        return [
            Route(f"{prefix}/api/v1/healthz", lambda request: JSONResponse({"status": "ok"})),
            Route(f"{prefix}/api/v1/{{name}}", self._handle, methods=["POST"]),
        ]

    async def _handle(self, request: Request) -> Response:
        name, body = request.path_params["name"], json.loads(await request.body())
        if name == "retrieve_future":
            return JSONResponse(self._results[body["request_id"]])
        if name in ("session_heartbeat", "telemetry"):
            return JSONResponse({"status": "accepted"})
        self.calls.append((name, body))
        if name == "create_session":
            return JSONResponse({"session_id": "session-1"})
        try:
            result = await self._in_turn(name, body)
        except ValueError as error:
            return JSONResponse({"detail": str(error)}, status_code=422)
        future = f"future-{len(self._results)}"
        self._results[future] = result
        return JSONResponse({"request_id": future})

    async def _in_turn(self, name: str, body: Answer) -> Answer:
        if name == "create_model":
            self._models.append(bool(body.get("base_only")))
            return {"model_id": f"model-{len(self._models) - 1}", "type": name}
        if "seq_id" not in body:
            return {"type": name}
        model = body["model_id"]
        async with self._turn:
            await self._turn.wait_for(lambda: self._done.get(model, 0) == body["seq_id"] - 1)
            try:
                if name == self.failing:
                    return {"error": "device lost", "category": "server"}
                return await asyncio.to_thread(self._carry_out, name, body)
            finally:
                self._done[model] = body["seq_id"]
                self._turn.notify_all()

    def _carry_out(self, name: str, body: Answer) -> Answer:
        frozen = self._models[int(body["model_id"].removeprefix("model-"))]
        if frozen and name != "forward":
            raise ValueError(f"the frozen base model takes no {name}")
        match name:
            case "forward":
                given = body["forward_input"]
                check_tensors(given["data"], given["loss_fn"])
                return _outputs(self.policy.forward(given["data"], base=frozen), {})
            case "forward_backward":
                given = body["forward_backward_input"]
                check_tensors(given["data"], given["loss_fn"])
                logprobs, loss = self.policy.forward_backward(
                    given["data"], given["loss_fn"], given.get("loss_fn_config")
                )
                return _outputs(logprobs, {"loss:sum": loss})
            case "optim_step":
                if body.get("grad_accumulation_normalization"):
                    raise ValueError("this server does not divide")
                return {"metrics": {"grad_norm": self.policy.step(body["adam_params"])}}
            case "save_weights_for_sampler":
                module = Policy(self.policy.module).module
                self.snapshots[body["path"]] = (body["checkpoint_type"], module)
                return {"path": body["path"], "type": name}
            case "save_weights":
                self.states[body["path"]] = self.policy.state()
                return {"path": body["path"], "type": name}
            case "load_weights":
                state = self.states[body["path"].rpartition("/")[2]]
                self.policy.restore(state, optimizer=body["optimizer"])
                return {"path": body["path"], "type": name}
        raise ValueError(f"no such call: {name}")


def _outputs(logprobs: list[Any], metrics: dict[str, float]) -> Answer:
    return {
        "loss_fn_output_type": "TensorData",
        "loss_fn_outputs": [
            {"logprobs": {"data": lp.tolist(), "dtype": "float32", "shape": [len(lp)]}}
            for lp in logprobs
        ],
        "metrics": metrics,
    }
