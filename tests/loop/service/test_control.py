"""The control plane through the service's own clients, and what it refuses."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Iterator
from typing import Any

import fireworks
import httpx
import pytest
from fireworks.training import sdk

from eval_protocol_rft.loop.service.control import _fields as fields
from eval_protocol_rft.loop.service.control._models import training_shape
from tests.loop.service.text_rows import sums_rows, to_jsonl
from tests.service import BASE, KEY, RunningService, arithmetic_base, fireworks_service


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    with fireworks_service(tmp_path_factory.mktemp("service")) as made:
        yield made


@pytest.fixture
def server(running: RunningService) -> RunningService:
    """With an account in which nothing was made yet."""
    running.forget()
    return running


@pytest.fixture
async def client(server: RunningService) -> AsyncIterator[Any]:
    async with fireworks.AsyncFireworks(
        api_key=KEY, account_id="acc", base_url=server.url, max_retries=0
    ) as made:
        yield made


@pytest.fixture
def http(server: RunningService) -> Iterator[httpx.Client]:
    """Requests that no client library would send."""
    with httpx.Client(base_url=f"{server.url}/v1/accounts/acc") as made:
        yield made


def trainers(server: RunningService) -> Any:
    return sdk.TrainerJobManager(api_key=KEY, base_url=server.url)


def refusal(answer: httpx.Response) -> tuple[int, int, str]:
    """Status, code and message of a refusal in the service's form."""
    body = answer.json()
    assert set(body) == {"code", "message", "details"}
    assert body["details"] == []
    return answer.status_code, body["code"], body["message"]


def test_a_key_belongs_to_the_one_account(server: RunningService) -> None:
    assert trainers(server).account_id == "acc"
    answer = httpx.get(f"{server.url}/verifyApiKey", headers={"authorization": f"Bearer {KEY}"})
    assert (answer.status_code, answer.headers["x-fireworks-account-id"]) == (200, "acc")
    assert refusal(httpx.get(f"{server.url}/verifyApiKey"))[:2] == (401, 16)


def test_other_accounts_are_none_of_its_business(server: RunningService) -> None:
    url = f"{server.url}/v1/accounts"
    assert refusal(httpx.get(f"{url}/other/models"))[:2] == (403, 7)
    assert refusal(httpx.post(f"{url}/fireworks/datasets", json={}))[:2] == (403, 7)


async def test_models_and_shapes_are_those_that_the_server_has(
    server: RunningService, client: Any
) -> None:
    manager = trainers(server)
    assert manager.model_is_moe(BASE) is False
    (listed,) = [model async for model in client.models.list(account_id="fireworks")]
    assert (listed.name, listed.context_length) == (BASE, 2048)
    shape = "accounts/fireworks/trainingShapes/ts-arithmetic"
    assert training_shape(arithmetic_base()) == shape  # what the server greets with
    profile = manager.resolve_training_profile(shape)
    assert profile.max_supported_context_length == 2048
    assert (profile.trainer_mode, profile.node_count) == ("POLICY_TRAINER", 1)
    assert profile.training_shape == shape
    assert profile.deployment_shape is not None
    again = manager.resolve_training_profile(profile.training_shape_version)
    assert again.deployment_shape == profile.deployment_shape
    assert manager.resolve_training_profile(f"{shape}-lora").supports_lora
    matches = await client.deployment_shape_versions.match_for_model(BASE)
    assert [m.name for m in matches.deployment_shape_versions] == [profile.deployment_shape]
    with pytest.raises(RuntimeError, match="ts-arithmetic"):
        manager.resolve_training_profile("accounts/fireworks/trainingShapes/ts-qwen3-8b")


def test_a_service_job_runs_at_once_and_is_one_for_ever(server: RunningService) -> None:
    manager = trainers(server)
    config = sdk.TrainerJobConfig(
        base_model=BASE,
        training_shape_ref="accounts/fireworks/trainingShapes/ts-arithmetic",
        requested_job_id="job-1",
    )
    endpoint = manager.create_and_wait(config)
    assert endpoint.job_name == "accounts/acc/rlorTrainerJobs/job-1"
    assert endpoint.max_context_length == 2048
    assert manager.create(config).job_name == endpoint.job_name  # 409, and it looks
    with pytest.raises(httpx.HTTPStatusError):
        manager.resume_and_wait("job-1")
    manager.delete("job-1")
    assert manager.get("job-1")["state"] == "JOB_STATE_DELETED"
    with pytest.raises(RuntimeError, match="archived"):
        manager.create(config)
    assert manager.list_checkpoints("job-1") == []
    assert "job job-1: RUNNING, arithmetic, all parameters" in server.lines


def test_several_jobs_run_beside_each_other(server: RunningService) -> None:
    manager = trainers(server)
    made = [
        manager.create(sdk.TrainerJobConfig(base_model=BASE, lora_rank=rank, forward_only=only))
        for rank, only in ((0, False), (8, False), (0, True))
    ]
    assert len({job.job_id for job in made}) == 3
    ranks = [manager.get(job.job_id)["trainingConfig"]["loraRank"] for job in made]
    assert ranks == [0, 8, 0]


def test_a_deployment_is_ready_at_once_and_belongs_to_a_trainer(server: RunningService) -> None:
    trainer = trainers(server)
    profile = trainer.resolve_training_profile("accounts/fireworks/trainingShapes/ts-arithmetic")
    one, two = (trainer.create(sdk.TrainerJobConfig(base_model=BASE)).job_name for _ in range(2))
    manager = sdk.DeploymentManager(api_key=KEY, base_url=server.url)
    config = sdk.DeploymentConfig.from_training_profile(
        deployment_id="dep", base_model=BASE, profile=profile, hot_load_trainer_job=one
    )
    made = manager.create_or_get(config)
    assert (made.state, made.hot_load_trainer_job) == ("READY", one)
    assert manager.create_or_get(config).name == made.name
    moved = manager.reattach_trainer(made, base_model=BASE, trainer_job_name=two, timeout_s=5)
    assert moved.hot_load_trainer_job == two
    manager.scale_to_zero("dep")
    assert manager.get("dep").state == "READY"
    manager.delete("dep")
    assert manager.get("dep") is None


async def test_replicas_are_counted_within_their_bounds(client: Any) -> None:
    made = await client.deployments.create(
        deployment_id="dep", base_model=BASE, min_replica_count=0, max_replica_count=3
    )
    assert made.replica_count == 1
    await client.deployments.scale("dep", replica_count=2)
    assert (await client.deployments.get("dep")).replica_count == 2
    changed = await client.deployments.update("dep", base_model=BASE, max_replica_count=0)
    assert changed.replica_count == 0
    changed = await client.deployments.update("dep", base_model=BASE, max_replica_count=1)
    assert changed.replica_count == 1
    with pytest.raises(fireworks.BadRequestError, match="do not fit"):
        await client.deployments.update("dep", base_model=BASE, min_replica_count=2)
    with pytest.raises(fireworks.BadRequestError, match="do not fit"):
        await client.deployments.create(
            deployment_id="d", base_model=BASE, min_replica_count=2, max_replica_count=1
        )


async def test_a_deleted_deployment_can_be_had_back_unless_it_was_deleted_hard(
    client: Any,
) -> None:
    await client.deployments.create(deployment_id="dep", base_model=BASE)
    await client.deployments.delete("dep")
    assert (await client.deployments.get("dep")).state == "DELETED"
    assert [d async for d in client.deployments.list()] == []
    assert len([d async for d in client.deployments.list(show_deleted=True)]) == 1
    with pytest.raises(fireworks.ConflictError):
        await client.deployments.create(deployment_id="dep", base_model=BASE)
    await client.deployments.undelete("dep", body={})
    assert (await client.deployments.get("dep")).state == "READY"
    with pytest.raises(fireworks.BadRequestError, match="not DELETED"):
        await client.deployments.undelete("dep", body={})
    await client.deployments.delete("dep", hard=True)
    with pytest.raises(fireworks.NotFoundError):
        await client.deployments.get("dep")


async def test_lists_come_in_pages_and_filtered(client: Any) -> None:
    for i in range(5):
        await client.deployments.create(
            deployment_id=f"d-{i}", base_model=BASE, display_name=f"n{i % 2}"
        )
    listed = [d.name.rpartition("/")[2] async for d in client.deployments.list(page_size=2)]
    assert listed == [f"d-{i}" for i in range(5)]
    chosen = client.deployments.list(filter=f'display_name="n1" AND base_model="{BASE}"')
    assert [d.display_name async for d in chosen] == ["n1", "n1"]
    newest = client.deployments.list(order_by="create_time desc")
    assert [d.name[-1] async for d in newest] == list("43210")


def test_a_page_goes_on_where_the_one_before_ended(http: httpx.Client) -> None:
    for i in range(5):
        http.post(f"/deployments?deploymentId=d-{i}", json={"baseModel": BASE})
    page = http.get("/deployments?pageSize=2").json()
    http.delete("/deployments/d-1?hard=true")  # the last of the page that was given
    rest = http.get(f"/deployments?pageToken={page['nextPageToken']}").json()["deployments"]
    assert [d["name"][-1] for d in rest] == list("234")


@pytest.mark.parametrize(
    "query", ["filter=x(", "filter=no_such=1", "pageToken=x", "pageSize=-1", "orderBy=no"]
)
def test_a_list_that_cannot_be_told_is_refused(http: httpx.Client, query: str) -> None:
    assert refusal(http.get(f"/deployments?{query}"))[:2] == (400, 3)


@pytest.mark.parametrize(
    ("path", "body", "named"),
    [
        ("/deployments", {"baseModel": BASE, "minReplicas": 1}, "'minReplicas'"),
        ("/deployments", {"baseModel": BASE, "maxReplicaCount": "many"}, "maxReplicaCount"),
        ("/deployments", {"baseModel": BASE, "placement": {"zone": "x"}}, "'zone'"),
        ("/deployments", {}, "'baseModel'"),
        ("/deployments?deploymentId=A_b", {"baseModel": BASE}, "deploymentId"),
        ("/deployments", {"baseModel": BASE, "base_model": BASE}, "twice"),
        (
            "/rlorTrainerJobs",
            {"serviceMode": True, "trainingConfig": {"baseModel": BASE, "learnigRate": 1}},
            "did you mean 'learningRate'",
        ),
        ("/rlorTrainerJobs", {"serviceMode": True}, "'baseModel'"),
        ("/datasets", {"datasetId": "d", "dataset": {"format": "XML"}}, "dataset.format"),
        ("/datasets", {"dataset": {}}, "'datasetId'"),
        ("/deployedModels", {"model": "m"}, "not found"),
        ("/checkpoints/c:promote", {"trainer_job_id": "j", "output_model": "m", "x": 1}, "'x'"),
    ],
)
def test_what_a_message_does_not_have_is_refused_by_name(
    http: httpx.Client, path: str, body: dict[str, Any], named: str
) -> None:
    status, code, message = refusal(http.post(path, json=body))
    assert (status, code) in ((400, 3), (404, 5))
    assert named in message


@pytest.mark.parametrize("body", [b"{", b"[1]", b"1", b"\xff", b'{"a":' * 2000])
def test_a_body_that_is_no_object_is_refused(http: httpx.Client, body: bytes) -> None:
    assert refusal(http.post("/deployments", content=body))[:2] == (400, 3)
    assert http.get("/deployments").json()["deployments"] == []


@pytest.mark.parametrize(
    "path",
    ["models/m", "deployments/d", "datasets/d", "deployedModels/d", "rlorTrainerJobs/j"],
)
def test_what_is_not_there_is_not_found(http: httpx.Client, path: str) -> None:
    for answer in (http.get(f"/{path}"), http.delete(f"/{path}")):
        assert refusal(answer)[:2] == (404, 5)


def test_what_names_something_that_is_not_there_is_not_found(http: httpx.Client) -> None:
    named: list[tuple[str, dict[str, Any]]] = [
        ("/deployments", {"baseModel": "accounts/fireworks/models/no"}),
        ("/deployments", {"baseModel": "accounts/acc/models/no"}),
        ("/deployments", {"baseModel": BASE, "hotLoadTrainerJob": "accounts/acc/x/no"}),
        ("/deployedModels", {"model": "accounts/acc/models/no", "deployment": "d"}),
        ("/rlorTrainerJobs", {"dataset": "no", "trainingConfig": {"baseModel": BASE}}),
        ("/checkpoints/c:promote", {"trainer_job_id": "no", "output_model": "m"}),
    ]
    for path, body in named:
        assert refusal(http.post(path, json=body))[:2] == (404, 5)


async def test_nothing_is_made_twice(client: Any) -> None:
    await client.deployments.create(deployment_id="x", base_model=BASE)
    await client.datasets.create(dataset_id="x", dataset={})
    with pytest.raises(fireworks.ConflictError):
        await client.deployments.create(deployment_id="x", base_model=BASE)
    with pytest.raises(fireworks.ConflictError):
        await client.datasets.create(dataset_id="x", dataset={})


MESSAGES: dict[str, fields.Fields] = {
    "datasets": {"datasetId": str, "dataset": fields.DATASET, "filenameToSize": dict},
    "models": fields.MODEL,
    "deployments": {**fields.DEPLOYMENT, "replicaCount": int},
    "deployedModels": fields.DEPLOYED_MODEL,
    "rlorTrainerJobs": fields.JOB,
    "checkpoints": fields.PROMOTION,
}
NAMES = ["x", "A b", "", "accounts/acc/models/x", "accounts/acc/datasets/x", BASE, "a=b", "a,b"]


def any_value(kind: Any, rng: random.Random) -> Any:
    """Of a field: mostly of its type, and mostly of no sense."""
    if rng.random() < 0.2:
        return rng.choice([None, True, -1, 2**70, 1.5, "\0", [], {}, [{"a": 1}], {"b": None}])
    if isinstance(kind, dict):
        chosen = rng.sample(list(kind), min(len(kind), rng.randint(0, 5)))
        return {name: any_value(kind[name], rng) for name in chosen}
    of_type: dict[Any, list[Any]] = {
        str: [*NAMES, "RL", "GRPO", "ASYNC"],
        int: [0, 1, 3, "7", "x"],
        float: [0, 0.5, 1e300],
        bool: [True, False],
        list: [[], ["score=1.0"], [None]],
        dict: [{}, {"a": "1"}, {"a": None}],
    }
    return rng.choice(of_type[kind])


def test_no_request_is_a_fault_of_the_server(server: RunningService, http: httpx.Client) -> None:
    rng = random.Random(5)
    assert http.post("/deployments?deploymentId=x", json={"baseModel": BASE}).is_success
    job = {"serviceMode": True, "trainingConfig": {"baseModel": BASE}}
    assert http.post("/rlorTrainerJobs?rlorTrainerJobId=x", json=job).is_success
    assert http.post("/datasets", json={"datasetId": "x"}).is_success
    routes = server.service.control._routes
    answered = set()
    for _ in range(700):
        method, pattern, handler = rng.choice(routes)
        path = pattern.pattern.replace("[^/:]+", rng.choice(["x", "y", "ts-arithmetic"]))
        path = path.replace("\\", "").replace("accounts/x", "accounts/acc")
        path = path.replace("accounts/y", "accounts/acc").replace("accounts/ts-", "accounts/fire-")
        kinds = [kind for kind in MESSAGES if f"/{kind}" in path]
        body = any_value(MESSAGES[kinds[-1]] if kinds else {}, rng)
        query = {
            name: rng.choice(NAMES)
            for name in ("updateMask", "filter", "pageToken", "pageSize", "orderBy", "hard")
            if rng.random() < 0.1
        }
        answer = http.request(method, f"{server.url}/v1/{path}", params=query, json=body)
        assert answer.status_code < 500 or answer.status_code == 501, (method, path, query, body)
        if answer.status_code < 400:
            answered.add(handler)
        else:
            refusal(answer)
    assert len(answered) > 10


def test_secrets_are_not_kept(http: httpx.Client, server: RunningService) -> None:
    http.post(
        "/rlorTrainerJobs",
        json={
            "serviceMode": True,
            "trainingConfig": {"baseModel": BASE},
            "wandbConfig": {"api_key": "very-secret", "project": "p"},
        },
    ).raise_for_status()
    http.post(
        "/deployments", json={"baseModel": BASE, "directRouteApiKeys": ["very-secret"]}
    ).raise_for_status()
    (job,) = http.get("/rlorTrainerJobs").json()["rlorTrainerJobs"]
    assert job["wandbConfig"] == {"project": "p"}
    kept = b"".join(path.read_bytes() for path in server.service.store.folder.glob("state*"))
    assert b"very-secret" not in kept


async def test_all_of_it_is_there_after_a_restart(tmp_path: Any) -> None:
    def client_of(server: RunningService) -> Any:
        return fireworks.AsyncFireworks(api_key=KEY, account_id="acc", base_url=server.url)

    with fireworks_service(tmp_path) as server:
        async with client_of(server) as client:
            made = await client.deployments.create(deployment_id="dep", base_model=BASE)
            await client.datasets.create(dataset_id="ds", dataset={"format": "RL"})
            await client.datasets.upload("ds", file=("a.jsonl", to_jsonl(sums_rows(2))))
            dataset = await client.datasets.get("ds")
    with fireworks_service(tmp_path) as server:
        async with client_of(server) as client:
            assert await client.deployments.get("dep") == made
            assert await client.datasets.get("ds") == dataset
