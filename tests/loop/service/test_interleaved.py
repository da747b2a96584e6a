"""What happens between the two halves of a thing: a kill, a second request, another client."""

from __future__ import annotations

import contextlib
import random
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from eval_protocol_rft.loop._lora import seeded
from eval_protocol_rft.loop.service import _requests as requests
from eval_protocol_rft.loop.service.control import _datasets as datasets
from eval_protocol_rft.loop.service.control._steps import StepRunner
from eval_protocol_rft.loop.service.inference._served import ServedModels
from tests.loop.service.test_restarted_training import Caller
from tests.loop.service.text_rows import sums_rows, to_jsonl
from tests.service import BASE, RunningService, fireworks_service
from tests.waiting import wait_until

ACCOUNT = "accounts/acc"


def post(server: RunningService, path: str, body: Any, status: int = 200) -> Any:
    answer = httpx.post(f"{server.url}/v1/{ACCOUNT}/{path}", json=body, timeout=60)
    assert answer.status_code == status, answer.text
    return answer.json()


def service_job(server: RunningService, key: str) -> str:
    body = {"serviceMode": True, "trainingConfig": {"baseModel": BASE}}
    return str(post(server, f"rlorTrainerJobs?rlorTrainerJobId={key}", body)["name"])


def test_a_deployment_is_moved_to_another_trainer_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in between, it would keep the weights of the trainer before, and the client's
    repetition would find nothing to change."""
    with fireworks_service(tmp_path) as server:
        first, second = service_job(server, "one"), service_job(server, "two")
        body = {"baseModel": BASE, "enableHotLoad": True, "hotLoadTrainerJob": first}
        post(server, "deployments?deploymentId=d", body)
        row = server.service.store.get("deployments", f"{ACCOUNT}/deployments/d")
        assert row is not None
        held = {**row, "_version": "step-1"}
        server.service.store.put("deployments", row["name"], held)

        async def killed(*arguments: Any, **options: Any) -> None:
            raise RuntimeError("killed")

        url = f"{server.url}/v1/{ACCOUNT}/deployments/d?updateMask=hot_load_trainer_job"
        with monkeypatch.context() as patch:
            patch.setattr(ServedModels, "load", killed)
            httpx.patch(url, json={"hotLoadTrainerJob": second})
    with fireworks_service(tmp_path) as server:
        url = f"{server.url}/v1/{ACCOUNT}/deployments/d?updateMask=hot_load_trainer_job"
        assert httpx.patch(url, json={"hotLoadTrainerJob": second}).is_success
        row = server.service.store.get("deployments", f"{ACCOUNT}/deployments/d")
        assert row is not None
        assert (row["hotLoadTrainerJob"], row["_version"]) == (second, None)


def test_of_two_uploads_at_once_one_is_the_data_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has the rows that it was READY with, whichever these are."""
    both = threading.Barrier(2)
    check = datasets._check

    def together(data: bytes, declared: dict[str, Any]) -> tuple[str, int]:
        with contextlib.suppress(threading.BrokenBarrierError):
            both.wait(1)  # without order, both are here at once
        return check(data, declared)

    monkeypatch.setattr(datasets, "_check", together)
    uploads = [to_jsonl(sums_rows(2)), to_jsonl(sums_rows(5))]
    statuses = []
    with fireworks_service(tmp_path) as server:
        post(server, "datasets", {"datasetId": "ds"})

        def upload(data: bytes) -> None:
            url = f"{server.url}/v1/{ACCOUNT}/datasets/ds:upload"
            statuses.append(httpx.post(url, files={"file": ("a.jsonl", data)}).status_code)

        threads = [threading.Thread(target=upload, args=(data,)) for data in uploads]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        row = httpx.get(f"{server.url}/v1/{ACCOUNT}/datasets/ds").json()
        assert sorted(statuses) == [200, 400]
        lines = server.service.control._datasets.lines(f"{ACCOUNT}/datasets/ds")
        assert len(lines) == int(row["exampleCount"])


def test_weights_that_were_freed_while_they_were_loaded_are_not_put_on_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with fireworks_service(tmp_path) as server:
        job = service_job(server, "one")
        body = {"baseModel": BASE, "enableHotLoad": True, "hotLoadTrainerJob": job}
        post(server, "deployments?deploymentId=d", body)
        caller = Caller(server)
        caller.gather()
        caller.step()
        caller("save_weights_for_sampler", path="old", checkpoint_type="delta")
        store = server.service.store
        (snapshot,) = store.list("snapshots")
        store.put("snapshots", f"{job}/snapshots/old", {**snapshot, "checkpointType": "base"})
        base_of = server.service.weights.base_of

        def freed(weights: str) -> Any:
            base = base_of(weights)
            if weights == snapshot["weights"]:
                server.service.weights.delete(weights)
            return base

        monkeypatch.setattr(server.service.weights, "base_of", freed)
        answer = httpx.post(
            f"{server.url}/hot_load/v1/models/hot_load",
            json={"identity": "old"},
            headers={"fireworks-deployment": f"{ACCOUNT}/deployments/d"},
        )
        assert answer.status_code == 404
        row = store.get("deployments", f"{ACCOUNT}/deployments/d")
        assert row is not None
        assert row["_version"] is None


def test_a_step_puts_its_model_over_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint may be promoted to that name while the step trains."""
    promoted = {"name": f"{ACCOUNT}/models/m", "state": "READY", "_weights": "base:arithmetic"}
    train = StepRunner.train

    async def meanwhile(self: StepRunner, row: Any) -> Any:
        trained = await train(self, row)
        self._store.put("models", promoted["name"], promoted)
        return trained

    monkeypatch.setattr(StepRunner, "train", meanwhile)
    with fireworks_service(tmp_path) as server:
        post(server, "datasets", {"datasetId": "ds"})
        url = f"{server.url}/v1/{ACCOUNT}/datasets/ds:upload"
        httpx.post(url, files={"file": ("a.jsonl", to_jsonl(sums_rows(2)))})
        body = {"dataset": "ds", "trainingConfig": {"baseModel": BASE, "outputModel": "m"}}
        name = post(server, "rlorTrainerJobs", body)["name"]
        wait_until(lambda: any("FAILED" in line for line in server.lines))
        job = httpx.get(f"{server.url}/v1/{name}").json()
        assert "already exists" in job["status"]["message"]
        assert server.service.store.get("models", promoted["name"]) == promoted


def test_random_numbers_of_a_seed_are_not_shared_among_threads() -> None:
    """Adapters of two trainers are made at once, and each has those of its own seed."""
    drawn: dict[int, list[float]] = {}

    def draw(seed: int) -> None:
        with seeded(seed):
            values = []
            for _ in range(300):
                values.append(torch.rand(()).item())
                if random.random() < 0.2:
                    threading.Event().wait(0.0001)
            drawn[seed] = values

    for seed in (1, 2):
        draw(seed)
    alone = dict(drawn)
    before = torch.random.get_rng_state()
    threads = [threading.Thread(target=draw, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert drawn == alone
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"learningRateWarmupSteps": -5}, "learningRateWarmupSteps"),  # would climb the loss
        ({"optimizerWeightDecay": -0.1}, "optimizerWeightDecay"),
        ({"gradientAccumulationSteps": -1}, "gradientAccumulationSteps"),
        ({"outputModel": "accounts/fireworks/models/arithmetic"}, "outputModel"),
        ({"outputModel": "accounts/acc/datasets/x"}, "outputModel"),
    ],
)
def test_a_step_that_makes_no_sense_is_refused(
    change: dict[str, Any], field: str, tmp_path: Path
) -> None:
    with fireworks_service(tmp_path) as server:
        post(server, "datasets", {"datasetId": "ds"})
        url = f"{server.url}/v1/{ACCOUNT}/datasets/ds:upload"
        httpx.post(url, files={"file": ("a.jsonl", to_jsonl(sums_rows(2)))})
        body = {"dataset": "ds", "trainingConfig": {"baseModel": BASE, **change}}
        assert field in post(server, "rlorTrainerJobs", body, 400)["message"]


@pytest.mark.parametrize(
    "body",
    [
        b'{"annotations": {"a": 1e999}}',
        b'{"annotations": {"a": NaN}}',
        b'{"displayName": "\\ud800"}',
        b'{"displayName": "\xff"}',
        b'{"annotations": ' + b'{"a":' * 100_000,
    ],
)
def test_json_that_cannot_be_written_again_is_refused(body: bytes, tmp_path: Path) -> None:
    with fireworks_service(tmp_path) as server:
        post(server, "deployments?deploymentId=d", {"baseModel": BASE, "enableHotLoad": True})
        headers = {"fireworks-deployment": f"{ACCOUNT}/deployments/d"}
        for method, path in (
            ("PATCH", f"v1/{ACCOUNT}/deployments/d"),
            ("POST", "hot_load/v1/models/hot_load"),
            ("POST", "api/v1/create_model"),
        ):
            answer = httpx.request(method, f"{server.url}/{path}", content=body, headers=headers)
            assert answer.status_code == 400, (path, answer.text)


def test_a_future_is_of_a_model_that_there_is(tmp_path: Path) -> None:
    with fireworks_service(tmp_path) as server:
        caller = Caller(server)

        def retrieve(future: str) -> httpx.Response:
            url = f"{server.url}/api/v1/retrieve_future"
            return httpx.post(url, json={"request_id": future})

        assert retrieve("nobody:0").status_code == 404
        unload = {"model_id": caller.model}
        future = httpx.post(f"{server.url}/api/v1/unload_model", json=unload).json()["request_id"]
        assert retrieve(future).json()["model_id"] == caller.model
        assert retrieve(f"{caller.model}:0").status_code == 404


def test_a_checkpoint_has_a_name_that_paths_can_hold(tmp_path: Path) -> None:
    with fireworks_service(tmp_path) as server:
        caller = Caller(server)
        for name in ("a/b", "a:promote", ""):
            assert "cannot be read" in caller("save_weights", path=name)["error"]


def test_a_number_is_of_one_model(tmp_path: Path) -> None:
    with fireworks_service(tmp_path) as server:
        url = f"{server.url}/api/v1"
        session = httpx.post(f"{url}/create_session", json={}).json()["session_id"]
        body = {"session_id": session, "model_seq_id": 0, "base_model": BASE}
        answers = [httpx.post(f"{url}/create_model", json=body) for _ in range(2)]
        assert answers[0].json() == answers[1].json()
        other = httpx.post(f"{url}/create_model", json={**body, "base_only": True})
        assert other.status_code == 409


@pytest.mark.parametrize(
    "path",
    [
        f"v1/{ACCOUNT}/deployments",
        f"v1/{ACCOUNT}/datasets/ds:upload",
        "hot_load/v1/models/hot_load",
        "api/v1/forward",
    ],
)
def test_a_body_without_end_is_refused(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(requests, "MOST_BODY_BYTES", 1000)
    headers = {
        "content-type": "multipart/form-data; boundary=x" if "upload" in path else "text/plain"
    }
    form = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
    with fireworks_service(tmp_path) as server:
        chunks = iter([form, *[b"y" * 400] * 3])  # without a length
        answer = httpx.post(f"{server.url}/{path}", content=chunks, headers=headers)
        assert answer.status_code in (400, 413)
        assert "more than 1000 bytes" in answer.text


def test_a_request_does_nothing_to_the_terminal(tmp_path: Path) -> None:
    with fireworks_service(tmp_path) as server:
        httpx.post(f"{server.url}/v1/nothing%1b[2J%0aline", content=b"\x1b]0;title\x07")
        wait_until(lambda: any("nothing" in line for line in server.lines))
        assert all(line.isprintable() for line in server.lines)
