"""Where a `FireworksTrainer`'s weights go: saved states, deployments; and the way in from a key."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("fireworks.training.sdk", reason="needs the extra `fireworks`")

from fireworks.training.sdk import FiretitanServiceClient as Service  # noqa: E402

from eval_protocol_rft.loop._trainer import TrainerError  # noqa: E402
from eval_protocol_rft.loop.fireworks._connecting import connect  # noqa: E402
from eval_protocol_rft.loop.fireworks._fireworks_trainer import FireworksTrainer  # noqa: E402
from tests.service import BASE, KEY  # noqa: E402
from tests.sums import arithmetic, sums_batch  # noqa: E402
from tests.trainer_service import (  # noqa: E402
    DEPLOYMENT,
    JOB,
    OPTIMIZER,
    TrainerService,
    make_trainer,
    one_step,
    trainer_service,
)


@pytest.fixture
def server() -> Iterator[TrainerService]:
    with trainer_service() as running:
        yield running


@pytest.fixture
async def trainer(server: TrainerService) -> AsyncIterator[FireworksTrainer]:
    made = await asyncio.to_thread(make_trainer, server)
    yield made
    await made.aclose()


# Saving and loading


async def test_load_goes_back_to_what_save_saved_optimiser_included(
    server: TrainerService, trainer: FireworksTrainer, tmp_path: Path
) -> None:
    batch = sums_batch()
    await one_step(trainer, batch)
    await trainer.save(tmp_path)
    saved = server.state()
    await one_step(trainer, batch)
    once = server.state()
    await trainer.load(tmp_path)
    _assert_equal(server.state(), saved)
    await one_step(trainer, batch)
    _assert_equal(server.state(), once)
    assert KEY not in (tmp_path / "fireworks.json").read_text()


def _assert_equal(ours: Any, theirs: Any) -> None:
    for mine, other in zip(_leaves(ours), _leaves(theirs), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=0)


def _leaves(state: Any) -> list[Any]:
    weights, moments = state
    return [*weights.values(), *(v for s in moments["state"].values() for v in s.values())]


async def test_a_state_of_another_job_is_asked_for_by_that_job(
    server: TrainerService, tmp_path: Path
) -> None:
    first = await asyncio.to_thread(make_trainer, server, trainer_job="job")
    await first.save(tmp_path)
    await first.load(tmp_path)
    # One process has one client at a time; what the server is asked is what counts here.
    first._trainer_job = "job-two"
    await first.load(tmp_path)
    await first.aclose()
    name = json.loads((tmp_path / "fireworks.json").read_text())["path"]
    asked = [body["path"] for body in server.called("load_weights")]
    assert asked == [name, f"cross_job://job/{name}"]


async def test_a_folder_without_a_state_is_refused(
    trainer: FireworksTrainer, tmp_path: Path
) -> None:
    with pytest.raises(TrainerError, match="no state of a Fireworks trainer"):
        await trainer.load(tmp_path)


# Publishing


async def _ask(server: TrainerService, model: str) -> dict[str, Any]:
    """Greedy, so that the answer is a matter of the weights alone."""
    body = {"model": model, "prompt": "1", "max_tokens": 1, "logprobs": True, "temperature": 0}
    async with httpx.AsyncClient() as client:
        reply = await client.post(f"{server.url}/inference/v1/completions", json=body)
    answer: dict[str, Any] = reply.json()["choices"][0]["logprobs"]["content"][0]
    return answer


async def test_a_published_version_is_what_the_deployment_samples_from(
    server: TrainerService, trainer: FireworksTrainer
) -> None:
    assert trainer.hot_load is not None
    model, before = trainer.hot_load.model, await _ask(server, trainer.hot_load.model)
    await one_step(trainer, sums_batch())
    assert (await _ask(server, model))["logprob"] == before["logprob"]  # not published yet
    await trainer.publish(1)
    after = await _ask(server, model)
    ids = torch.tensor([arithmetic()[1].encode("1")])
    logits = server.module(input_ids=ids).logits[0, -1]
    assert after["logprob"] == pytest.approx(logits.detach().log_softmax(-1).max().item(), abs=1e-4)
    assert after["logprob"] != before["logprob"]


async def test_all_parameters_travel_as_a_base_and_then_as_deltas_of_what_is_loaded(
    server: TrainerService, trainer: FireworksTrainer
) -> None:
    for version in (1, 2, 3):
        await trainer.publish(version)
    saved = server.called("save_weights_for_sampler")
    assert [body["checkpoint_type"] for body in saved] == ["base", "delta", "delta"]
    loads = [body for _, body in server.asked.loads]
    assert [body["identity"] for body in loads] == [body["path"] for body in saved]
    assert [body["reset_prompt_cache"] for body in loads] == [True] * 3
    before = [body.get("incremental_snapshot_metadata") for body in loads]
    assert before[0] is None
    assert [m["previous_snapshot_identity"] for m in before[1:]] == [
        body["identity"] for body in loads[:2]
    ]
    headers, _ = server.asked.loads[0]
    assert headers["fireworks-deployment"] == "accounts/acc/deployments/dep"
    assert headers["fireworks-model"] == BASE


async def test_after_a_load_comes_a_base(
    server: TrainerService, trainer: FireworksTrainer, tmp_path: Path
) -> None:
    await trainer.save(tmp_path)
    await trainer.publish(1)
    await trainer.load(tmp_path)
    await trainer.publish(2)
    kinds = [b["checkpoint_type"] for b in server.called("save_weights_for_sampler")]
    assert kinds == ["base", "base"]


async def test_adapters_travel_whole(server: TrainerService) -> None:
    trainer = await asyncio.to_thread(make_trainer, server, lora=True)
    await trainer.publish(1)
    await trainer.publish(2)
    await trainer.aclose()
    kinds = [b["checkpoint_type"] for b in server.called("save_weights_for_sampler")]
    assert kinds == ["base", "base"]


async def test_publishing_waits_for_the_slowest_replica() -> None:
    with trainer_service(lags=(0, 0, 4)) as server:
        trainer = await asyncio.to_thread(make_trainer, server)
        await trainer.publish(1)
        (saved,) = server.snapshots
        assert server.asked.held == [saved] * 3
        await trainer.aclose()


async def test_after_a_failed_load_the_same_version_is_published_as_a_base() -> None:
    with trainer_service(lags=(0, 0)) as server:
        trainer = await asyncio.to_thread(make_trainer, server)
        await trainer.publish(1)
        server.asked.failing = True
        with pytest.raises(TrainerError, match=r"failed to load version-2-.*replica 1: .*error"):
            await trainer.publish(2)
        server.asked.failing = False
        await trainer.publish(2)
        await trainer.publish(3)
        await trainer.aclose()
        saved = server.called("save_weights_for_sampler")
        assert [b["checkpoint_type"] for b in saved] == ["base", "delta", "base", "delta"]
        assert len({body["path"] for body in saved}) == 4


async def test_a_deployment_that_never_gets_ready_is_given_up(server: TrainerService) -> None:
    server.asked.lags = (10**9,)
    trainer = await asyncio.to_thread(make_trainer, server)
    assert trainer.hot_load is not None
    trainer.hot_load.timeout_seconds = 0.05
    with pytest.raises(TrainerError, match=r"has not loaded .* within 0.05 s: replica 0: holds"):
        await trainer.publish(1)
    await trainer.aclose()


# From a key


async def test_connecting_from_a_key_trains_and_publishes(server: TrainerService) -> None:
    trainer = await connect(
        base_model=BASE,
        deployment="dep",
        trainer_job="job",
        lora_rank=8,
        temperature=1.0,
        optimizer=OPTIMIZER,
        api_key=KEY,
        base_url=server.url,
        reference=True,
        poll_seconds=0.01,
    )
    batch = sums_batch()
    await trainer.forward(batch.datums, reference=True)
    await one_step(trainer, batch)
    await trainer.publish(1)
    assert trainer.hot_load is not None
    assert (await _ask(server, trainer.hot_load.model))["token"]
    await trainer.aclose()
    await trainer.aclose()
    models = server.called("create_model")
    assert [body.get("base_only", False) for body in models] == [False, True]
    assert models[0]["lora_config"]["rank"] == 8
    headers, _ = server.asked.loads[0]
    assert headers["fireworks-model"].endswith("arithmetic-fp8")  # the deployment's own


async def test_a_deployment_of_another_trainer_gets_this_ones_weights_first(
    server: TrainerService,
) -> None:
    row = {**server.deployment, "hotLoadTrainerJob": "accounts/acc/rlorTrainerJobs/earlier"}
    server.service.store.put("deployments", DEPLOYMENT, row)
    trainer = await connect(
        base_model=BASE,
        deployment="dep",
        trainer_job="job",
        temperature=1.0,
        optimizer=OPTIMIZER,
        api_key=KEY,
        base_url=server.url,
        poll_seconds=0.01,
    )
    await trainer.aclose()
    assert server.deployment["hotLoadTrainerJob"] == JOB
    assert server.asked.held == server.snapshots


async def test_connecting_to_what_is_not_there_is_one_error(server: TrainerService) -> None:
    with pytest.raises(TrainerError, match=r"cannot train .* on Fireworks"):
        await connect(
            base_model="accounts/fireworks/models/none",
            deployment="dep",
            trainer_job="another-job",
            temperature=1.0,
            optimizer=OPTIMIZER,
            api_key=KEY,
            base_url=server.url,
        )


async def test_what_was_being_started_is_closed_where_the_caller_gives_up(
    server: TrainerService, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on = threading.Event(), threading.Event()
    events: list[str] = []
    create, close = Service.create_training_client, Service.close

    def slowly(self: Any, *args: Any, **options: Any) -> Any:
        begun.set()
        go_on.wait()
        client = create(self, *args, **options)
        events.append("made")
        return client

    def closing(self: Any) -> None:
        events.append("closed")
        close(self)

    monkeypatch.setattr(Service, "create_training_client", slowly)
    monkeypatch.setattr(Service, "close", closing)
    connecting = asyncio.create_task(
        connect(
            base_model=BASE,
            deployment="dep",
            trainer_job="job",
            temperature=1.0,
            optimizer=OPTIMIZER,
            api_key=KEY,
            base_url=server.url,
        )
    )
    await asyncio.to_thread(begun.wait)
    connecting.cancel()
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await connecting
    assert events[0] == "made"
    assert events.index("closed") == len(events) - 1
