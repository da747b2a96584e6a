"""From a trainer to what is served: snapshots, hot loads and promotion, by the SDK's clients."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fireworks.training import sdk

from tests.service import BASE, KEY, RunningService, fireworks_service

PATH = "/hot_load/v1/models/hot_load"
DELTA = {"compression_format": "arc_v2", "checksum_format": "alder32"}
PROMPT = [4, 5, 6]


class Recipe:
    """A trainer job and a deployment of its own, as recipes make them."""

    def __init__(self, server: RunningService, name: str, *, lora_rank: int = 0) -> None:
        self.server, self.name, self.rank = server, name, lora_rank
        self._saved = 0
        self.jobs: Any = sdk.TrainerJobManager(api_key=KEY, base_url=server.url)
        config = sdk.TrainerJobConfig(
            base_model=BASE, lora_rank=lora_rank, requested_job_id=f"{name}-job"
        )
        self.endpoint = self.jobs.create_and_wait(config)
        self.deployments: Any = sdk.DeploymentManager(api_key=KEY, base_url=server.url)
        self.deployments.create_or_get(
            sdk.DeploymentConfig(
                deployment_id=name, base_model=BASE, hot_load_trainer_job=self.endpoint.job_name
            )
        )
        self.service: Any = sdk.FiretitanServiceClient(api_key=KEY, base_url=self.endpoint.base_url)
        self.trainer = self.service.create_training_client(base_model=BASE, lora_rank=lora_rank)

    def step(self) -> None:
        """Teaches it that after 4 comes 9."""
        ids = [4, 9, 9, 9]
        tensors = {
            "target_tokens": sdk.types.TensorData(data=ids[1:], dtype="int64", shape=[3]),
            "weights": sdk.types.TensorData(data=[1.0] * 3, dtype="float32", shape=[3]),
        }
        datum = sdk.types.Datum(
            model_input=sdk.types.ModelInput.from_ints(ids[:-1]), loss_fn_inputs=tensors
        )
        self.trainer.forward_backward([datum], "cross_entropy").result()
        self.trainer.optim_step(sdk.types.AdamParams(learning_rate=3e-3)).result()

    def save(self, kind: str) -> str:
        self._saved += 1
        saved = self.trainer.save_weights_for_sampler_ext(
            f"step-{self._saved}", checkpoint_type=kind
        )
        return str(saved.snapshot_name)

    def load(self, identity: str, previous: str | None = None) -> bool:
        """Whether the first look says that it is done: the SDK would sleep otherwise."""
        metadata = {"previous_snapshot_identity": previous, **DELTA} if previous else None
        return bool(
            self.deployments.hotload_and_wait(
                self.name,
                BASE,
                identity,
                incremental_snapshot_metadata=metadata,
                timeout_seconds=1,
            )
        )

    def held(self) -> Any:
        status = self.deployments.hotload_check_status(self.name, BASE)
        (replica,) = status["replicas"]
        assert replica["readiness"] is True
        return replica["current_snapshot_identity"]

    def checkpoints(self) -> list[dict[str, Any]]:
        return list(self.jobs.list_checkpoints(f"{self.name}-job"))

    def logprobs(self, model: str | None = None) -> list[float]:
        """Of what was sampled greedily."""
        answer = httpx.post(
            f"{self.server.url}/inference/v1/completions",
            json={
                "model": model or f"accounts/acc/deployments/{self.name}",
                "prompt": PROMPT,
                "max_tokens": 3,
                "temperature": 0.0,
                "logprobs": True,
            },
        ).json()
        return [entry["logprob"] for entry in answer["choices"][0]["logprobs"]["content"]]

    def close(self) -> None:
        self.service.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    with fireworks_service(tmp_path_factory.mktemp("service")) as running:
        yield running


@pytest.fixture
def recipe(server: RunningService, request: pytest.FixtureRequest) -> Iterator[Recipe]:
    name = request.node.name.replace("_", "-").replace("[", "-").replace("]", "")[-40:].strip("-")
    made = Recipe(server, name.lower(), lora_rank=getattr(request, "param", 0))
    yield made
    made.close()


def test_a_deployment_follows_its_trainer_snapshot_by_snapshot(recipe: Recipe) -> None:
    base = recipe.logprobs()
    assert recipe.held() is None
    previous, seen = None, [base]
    for kind in ("base", "delta", "delta"):
        recipe.step()
        identity = recipe.save(kind)
        assert recipe.logprobs() == seen[-1]  # saved, and not loaded yet
        assert recipe.load(identity, previous)
        assert recipe.held() == identity
        seen.append(recipe.logprobs())
        assert seen[-1] != seen[-2]
        previous = identity
    assert f"deployment {recipe.name}: serves snapshot {previous}" in recipe.server.lines


@pytest.mark.parametrize("recipe", [4], indirect=True)
def test_an_adapter_s_snapshots_are_whole(recipe: Recipe) -> None:
    for _ in range(2):
        before = recipe.logprobs()
        recipe.step()
        assert recipe.load(recipe.save("base"))
        assert recipe.logprobs() != before


def test_a_snapshot_that_does_not_fit_is_refused_and_changes_nothing(
    recipe: Recipe, server: RunningService
) -> None:
    other = Recipe(server, f"{recipe.name[:30]}-other")
    other.step()
    foreign = other.save("base")
    other.close()
    first = recipe.save("base")
    recipe.step()
    second = recipe.save("delta")
    headers = {"fireworks-deployment": f"accounts/acc/deployments/{recipe.name}"}
    delta = {"previous_snapshot_identity": first, **DELTA}
    for status, named, body in (
        (404, "no snapshot 'none'", {"identity": "none"}),
        (404, "no snapshot", {"identity": foreign}),
        (400, "must have", {"identity": second}),
        (400, "holds none", {"identity": second, "incremental_snapshot_metadata": delta}),
        (
            400,
            "must not have",
            {"identity": first, "incremental_snapshot_metadata": delta},
        ),
        (400, "field: 'x'", {"identity": first, "x": 1}),
        (400, "field: 'identity'", {}),
        (400, "must be an object", {"identity": first, "incremental_snapshot_metadata": 1}),
        (
            400,
            "field: 'incremental_snapshot_metadata.y'",
            {"identity": first, "incremental_snapshot_metadata": {**delta, "y": 1}},
        ),
    ):
        answer = httpx.post(f"{server.url}{PATH}", headers=headers, json=body)
        assert (answer.status_code, named in answer.json()["error"]["message"]) == (status, True)
        assert recipe.held() is None
    assert recipe.load(first)
    assert recipe.load(second, first)
    assert recipe.load(second, first)  # asked again: its answer was lost
    assert recipe.held() == second


def test_who_asks_for_no_deployment_that_takes_snapshots_is_refused(
    recipe: Recipe, server: RunningService
) -> None:
    httpx.post(
        f"{server.url}/v1/accounts/acc/deployments?deploymentId=plain", json={"baseModel": BASE}
    )
    for status, headers in (
        (400, {}),
        (404, {"fireworks-deployment": "accounts/acc/deployments/no"}),
        (400, {"fireworks-deployment": "accounts/acc/deployments/plain"}),
        (400, {"fireworks-deployment": recipe.name, "fireworks-model": "accounts/x/models/y"}),
    ):
        for method in ("GET", "POST"):
            answer = httpx.request(
                method, f"{server.url}{PATH}", headers=headers, content=b'{"identity": "x"}'
            )
            assert answer.status_code == status
            assert answer.json()["error"]["message"]


def test_a_deployment_moved_to_another_trainer_begins_at_the_base_model(
    recipe: Recipe, server: RunningService
) -> None:
    base = recipe.logprobs()
    recipe.step()
    first = recipe.save("base")
    assert recipe.load(first)
    other = Recipe(server, f"{recipe.name[:30]}-other")
    other.close()
    recipe.deployments.reattach_trainer(
        recipe.name, base_model=BASE, trainer_job_name=other.endpoint.job_name, timeout_s=5
    )
    assert recipe.held() is None
    assert recipe.logprobs() == base
    with pytest.raises(httpx.HTTPStatusError):  # it is in the bucket of the trainer before
        recipe.load(first)


@pytest.mark.parametrize("recipe", [0, 4], indirect=True)
def test_a_promoted_checkpoint_is_a_model_that_can_be_served(
    recipe: Recipe, server: RunningService
) -> None:
    recipe.step()
    identity = recipe.save("base")
    assert recipe.load(identity)
    (listed,) = recipe.checkpoints()
    assert listed["promotable"] is True
    assert set(listed) == {"name", "createTime", "checkpointType", "promotable"}
    key = f"m-{recipe.rank}"
    for _ in range(2):  # the second time its answer was lost
        model = recipe.jobs.promote_checkpoint(
            name=listed["name"], output_model_id=key, base_model=BASE
        )
    assert model["state"] == "READY"
    if recipe.rank:
        assert model["kind"] == "HF_PEFT_ADDON"
        assert (model["peftDetails"]["baseModel"], model["peftDetails"]["r"]) == (BASE, 4)
    else:
        assert model["kind"] == "HF_BASE_MODEL"
    made = recipe.deployments.create_or_get(
        sdk.DeploymentConfig(
            deployment_id=f"of-{key}",
            base_model=f"accounts/acc/models/{key}",
            hot_load_trainer_job=None,
            enable_hot_load=False,
        )
    )
    assert recipe.logprobs(made.name) == recipe.logprobs()
    # The job is deleted, and what it saved can be promoted all the same.
    recipe.jobs.delete(f"{recipe.name}-job")
    again = recipe.jobs.promote_checkpoint(
        name=listed["name"], output_model_id=f"{key}-late", base_model=BASE
    )
    assert again["state"] == "READY"


def test_what_cannot_be_promoted_is_refused(recipe: Recipe) -> None:
    recipe.trainer.save_state("state").result()
    recipe.step()
    recipe.save("base")
    rows = {row["promotable"]: row["name"] for row in recipe.checkpoints()}
    for name, key, base, said in (
        (f"{rows[True]}-no", "m", BASE, "not found"),
        (rows[False], "m", BASE, "cannot be promoted"),
        (rows[True], "m", "accounts/fireworks/models/other", "not found"),
    ):
        with pytest.raises(RuntimeError, match=said):
            recipe.jobs.promote_checkpoint(name=name, output_model_id=key, base_model=base)
    recipe.jobs.promote_checkpoint(name=rows[True], output_model_id="taken", base_model=BASE)
    recipe.save("base")
    newer = recipe.checkpoints()[-1]["name"]
    with pytest.raises(RuntimeError, match="already exists"):
        recipe.jobs.promote_checkpoint(name=newer, output_model_id="taken", base_model=BASE)


def test_a_deployment_serves_its_snapshot_after_a_restart(tmp_path: Path) -> None:
    with fireworks_service(tmp_path) as server:
        recipe = Recipe(server, "dep")
        recipe.step()
        identity = recipe.save("base")
        assert recipe.load(identity)
        loaded = recipe.logprobs()
        recipe.close()
    with fireworks_service(tmp_path) as server:
        recipe.server = server
        recipe.deployments = sdk.DeploymentManager(api_key=KEY, base_url=server.url)
        assert recipe.logprobs() == loaded
        assert recipe.held() == identity
