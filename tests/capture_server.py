"""A training server on loopback, as a Tinker-compatible client sees it, for tests.

It keeps every pass it is asked for, refuses tensors that the wire does not allow, and answers with
logprobs from a table, so a test can say what every loss and gradient must be. It holds no model and
learns nothing.
"""

from __future__ import annotations

import asyncio
import json
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from aiohttp import web

INPUTS = {
    "cross_entropy": {"target_tokens", "weights"},
    "ppo": {"target_tokens", "logprobs", "advantages"},
    "cispo": {"target_tokens", "logprobs", "advantages"},
    "importance_sampling": {"target_tokens", "logprobs", "advantages"},
}
"""Names of the tensors that a loss takes: no more, no less. None of them is a mask."""
DTYPES = {
    "target_tokens": "int64",
    "weights": "float32",
    "logprobs": "float32",
    "advantages": "float32",
}


def table_logprob(previous: int, target: int) -> float:
    """log p(target | previous) of the policy: in [-1.5, -0.125], and exact in float32."""
    return -((7 * previous + 3 * target) % 11 + 1) / 8


def table_logprobs(tokens: Sequence[int], targets: Sequence[int]) -> list[float]:
    return [table_logprob(p, t) for p, t in zip(tokens, targets, strict=True)]


@dataclass(frozen=True, slots=True)
class Pass:
    """One forward or forward_backward, as it came over the wire."""

    kind: str
    loss_fn: str
    config: Mapping[str, Any] | None
    tokens: list[list[int]]
    """Per datum, of the model input."""
    inputs: list[dict[str, Any]]
    """Per datum, name -> array."""

    def logprobs(self) -> list[list[float]]:
        return [
            table_logprobs(tokens, inputs["target_tokens"].tolist())
            for tokens, inputs in zip(self.tokens, self.inputs, strict=True)
        ]

    def loss(self) -> float:
        """The loss as the wire's documentation has it: a sum over all positions, unmasked."""
        total = 0.0
        for current, inputs in zip(self.logprobs(), self.inputs, strict=True):
            if self.loss_fn == "cross_entropy":
                weights = inputs["weights"].tolist()
                total -= sum(w * lp for w, lp in zip(weights, current, strict=True))
                continue
            drawn, gains = inputs["logprobs"].tolist(), inputs["advantages"].tolist()
            for lp, q, gain in zip(current, drawn, gains, strict=True):
                total -= self._objective(lp, math.exp(lp - q), gain)
        return total

    def _objective(self, lp: float, ratio: float, gain: float) -> float:
        if self.loss_fn == "importance_sampling":
            return ratio * gain
        assert self.config is not None
        low, high = self.config["clip_low_threshold"], self.config["clip_high_threshold"]
        clipped = min(max(ratio, low), high)
        if self.loss_fn == "ppo":
            return min(ratio * gain, clipped * gain)
        return clipped * lp * gain


@dataclass(slots=True)
class CaptureServer:
    """Serves the training API from a thread of its own until the `with` block ends."""

    passes: list[Pass] = field(default_factory=list)
    """Forward and backward passes in the order in which they were carried out."""
    calls: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    """(name, body) of every request but polling, heartbeats and telemetry."""
    polls_before_results: int = 0
    """How often a result is not ready yet when it is asked for."""
    _results: dict[str, dict[str, Any]] = field(default_factory=dict)
    _polls: dict[str, int] = field(default_factory=dict)
    _carried_out: int = 0
    _turn: asyncio.Condition = field(default_factory=asyncio.Condition)
    _loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.new_event_loop)
    _runner: web.AppRunner | None = None
    _thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        assert self._runner is not None
        host, port = self._runner.addresses[0][:2]
        return f"http://{host}:{port}"

    def called(self, name: str) -> list[dict[str, Any]]:
        return [body for called, body in self.calls if called == name]

    def __enter__(self) -> CaptureServer:
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(10)
        return self

    def __exit__(self, *_: object) -> None:
        assert self._runner is not None
        assert self._thread is not None
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    async def _start(self) -> None:
        app = web.Application(client_max_size=1 << 26)
        app.router.add_post("/api/v1/{name}", self._handle)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()

    async def _handle(self, request: web.Request) -> web.Response:
        name, body = request.match_info["name"], json.loads(await request.read())
        quiet: dict[str, Callable[[], dict[str, Any]]] = {
            "retrieve_future": lambda: self._retrieve(body["request_id"]),
            "session_heartbeat": dict,
            "telemetry": lambda: {"status": "accepted"},
        }
        if name in quiet:
            return web.json_response(quiet[name]())
        self.calls.append((name, body))
        if name == "create_session":
            return web.json_response({"session_id": "session-1"})
        try:
            result = await self._in_turn(name, body)
        except ValueError as error:
            return web.json_response({"detail": str(error)}, status=422)
        future = f"future-{len(self._results)}"
        self._results[future] = result
        return web.json_response({"request_id": future})

    def _retrieve(self, future: str) -> dict[str, Any]:
        self._polls[future] = self._polls.get(future, 0) + 1
        if self._polls[future] <= self.polls_before_results:
            return {"type": "try_again", "request_id": future, "queue_state": "active"}
        return self._results[future]

    async def _in_turn(self, name: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Carry out in order of `seq_id`, however the requests arrive."""
        if "seq_id" not in body:
            return {"model_id": "model-1", "type": name}
        async with self._turn:
            await self._turn.wait_for(lambda: self._carried_out == body["seq_id"] - 1)
            try:
                return self._carry_out(name, body)
            finally:
                self._carried_out += 1
                self._turn.notify_all()

    def _carry_out(self, name: str, body: Mapping[str, Any]) -> dict[str, Any]:
        if name not in ("forward", "forward_backward"):
            return {"metrics": {}}
        done = read_pass(name, body[f"{name}_input"])
        self.passes.append(done)
        outputs = [
            {"logprobs": {"data": values, "dtype": "float32", "shape": [len(values)]}}
            for values in done.logprobs()
        ]
        return {
            "loss_fn_output_type": "TensorData",
            "loss_fn_outputs": outputs,
            "metrics": {"loss:sum": done.loss()},
        }


def read_pass(kind: str, wire: Mapping[str, Any]) -> Pass:
    """Check what came over the wire.

    Raises:
        ValueError: a tensor too many or too few, or one of the wrong dtype or length.
    """
    loss_fn = wire["loss_fn"]
    tokens, inputs = [], []
    for i, datum in enumerate(wire["data"]):
        (chunk,) = datum["model_input"]["chunks"]
        tensors = datum["loss_fn_inputs"]
        if set(tensors) != INPUTS[loss_fn]:
            raise ValueError(f"datum {i}: {loss_fn} does not take {sorted(tensors)}")
        size = len(chunk["tokens"])
        for name, tensor in tensors.items():
            found = (tensor["dtype"], tensor["shape"], len(tensor["data"]))
            if found != (DTYPES[name], [size], size):
                raise ValueError(f"datum {i}: {name} is {found} for {size} tokens")
        arrays = {name: np.array(t["data"], t["dtype"]) for name, t in tensors.items()}
        if arrays["target_tokens"].tolist()[:-1] != chunk["tokens"][1:]:
            raise ValueError(f"datum {i}: target_tokens are not the next tokens")
        tokens.append(chunk["tokens"])
        inputs.append(arrays)
    return Pass(kind, loss_fn, wire.get("loss_fn_config"), tokens, inputs)
