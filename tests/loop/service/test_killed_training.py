"""A trainer that is killed at any moment ends with the very weights of one that is not."""

from __future__ import annotations

import random
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from eval_protocol_rft.loop.service._store import Store
from eval_protocol_rft.loop.service._weights import Weights
from tests.programs import Zygote
from tests.service import BASE, ServiceProcess, arithmetic_base
from tests.waiting import PATIENCE

STEPS = 6


class Patient:
    """A client that sends a request again until it is answered, as the SDK does."""

    def __init__(self, url: str) -> None:
        self._url = url
        self.retries = 0

    def post(self, path: str, body: Any, key: str = "") -> Any:
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                answer = httpx.post(
                    f"{self._url}/api/v1/{path}",
                    json=body,
                    headers={"x-idempotency-key": key} if key else {},
                    timeout=60,
                )
            except httpx.TransportError:
                self.retries += 1
                assert time.monotonic() < deadline
                time.sleep(0.05)
                continue
            assert answer.status_code == 200, answer.text
            return answer.json()

    def result(self, future: Any) -> Any:
        while True:
            answer = self.post("retrieve_future", {"request_id": future["request_id"]})
            if answer.get("type") != "try_again":
                assert "error" not in answer, answer
                return answer


def train(client: Patient, rank: int) -> None:
    session = client.post("create_session", {}, key=f"session-{rank}")["session_id"]
    lora = {"rank": rank, "seed": 5}
    made = {"session_id": session, "model_seq_id": 0, "base_model": BASE, "lora_config": lora}
    model = client.result(client.post("create_model", made))["model_id"]
    rng = random.Random(rank)
    calls: list[tuple[str, dict[str, Any]]] = []
    for step in range(STEPS):
        for _ in range(2):
            ids = [rng.randrange(3, 13) for _ in range(12)]
            weights = [rng.uniform(-1, 1) for _ in ids[1:]]
            tensors = {
                "target_tokens": {"data": ids[1:], "dtype": "int64"},
                "weights": {"data": weights, "dtype": "float32"},
            }
            datum = {
                "model_input": {"chunks": [{"tokens": ids[:-1], "type": "encoded_text"}]},
                "loss_fn_inputs": tensors,
            }
            given = {"data": [datum] * 4, "loss_fn": "cross_entropy"}
            calls.append(("forward_backward", {"forward_backward_input": given}))
        calls.append(("optim_step", {"adam_params": {"learning_rate": 0.001}}))
        kind = "delta" if step else "base"
        calls.append(("save_weights_for_sampler", {"path": f"s{step}", "checkpoint_type": kind}))
        if step == STEPS // 2:
            calls.append(("save_weights", {"path": "middle"}))
            calls.append(("load_weights", {"path": "middle", "optimizer": True}))
    futures = []
    for seq, (name, body) in enumerate(calls, start=1):
        futures.append(client.post(name, {**body, "model_id": model, "seq_id": seq}))
        if name == "optim_step":
            client.result(futures[-1])
    for future in futures:
        client.result(future)


def last_weights(folder: Path) -> dict[str, torch.Tensor]:
    store = Store(folder)
    rows = {row["identity"]: row for row in store.list("snapshots")}
    store.close()
    weights = Weights(folder / "weights", [arithmetic_base()])
    return weights.state_dict(rows[f"s{STEPS - 1}"]["weights"])


@pytest.mark.parametrize("rank", [0, pytest.param(4, marks=pytest.mark.slow)])
def test_a_killed_trainer_goes_on_to_the_last_bit(
    rank: int, tmp_path: Path, zygote: Zygote
) -> None:
    with ServiceProcess(zygote, tmp_path / "straight") as server:
        train(Patient(server.url), rank)
    expected = last_weights(tmp_path / "straight")

    server = ServiceProcess(zygote, tmp_path / "killed")
    client = Patient(server.url)
    failures: list[BaseException] = []

    def run() -> None:
        try:
            train(client, rank)
        except BaseException as error:
            failures.append(error)
            raise

    thread = threading.Thread(target=run)
    server.killed_during(thread, most=4, between=(0.1, 1.5), seed=11)
    assert not failures, server.said
    assert client.retries, "nothing was asked while it was down"
    found = last_weights(tmp_path / "killed")
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
