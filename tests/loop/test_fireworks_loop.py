"""Sample from the deployment, train over the training API, publish, again."""

from __future__ import annotations

import asyncio

import pytest

pytest.importorskip("torch")
pytest.importorskip("fireworks.training.sdk", reason="needs the extra `fireworks`")

from eval_protocol_rft import FireworksTrainingRolloutProcessor
from eval_protocol_rft.loop import RowRunner
from eval_protocol_rft.loop._trainer import NamedLoss
from eval_protocol_rft.training._batch import TrainingBatch, build_batch
from tests.service import KEY
from tests.sums import arithmetic
from tests.sums_run import right_sum, sums
from tests.trainer_service import CLIP, make_trainer, trainer_service

VERSIONS, PASSES = 3, 4


async def sampled(url: str, model: str, *, seed: int) -> TrainingBatch:
    runner = RowRunner(
        right_sum,
        processor=FireworksTrainingRolloutProcessor(tokenizer=arithmetic()[1]),
        completion_params={
            "model": model,
            "api_base": f"{url}/inference/v1",
            "api_key": KEY,
            "n": 8,
            "max_tokens": 6,
            "seed": seed,
        },
    )
    rows = await asyncio.gather(*(runner(row) for row in sums(12)))
    await runner.aclose()
    return build_batch(rows, normalization="token")


async def test_the_score_rises_and_sampler_and_trainer_agree_after_every_publish() -> None:
    rewards: list[float] = []
    loss = NamedLoss(loss_fn="ppo", config=CLIP)
    with trainer_service(lags=(0, 2)) as server:
        trainer = await asyncio.to_thread(make_trainer, server)
        assert trainer.hot_load is not None
        for version in range(VERSIONS + 1):
            await trainer.publish(version)
            batch = await sampled(server.url, trainer.hot_load.model, seed=version)
            rewards.append(batch.stats.reward_mean)
            if version == VERSIONS:
                break
            for number in range(PASSES):
                done = await trainer.forward_backward(batch.datums, loss)
                if number == 0:  # before any step: the policy is the one that sampled
                    assert done.metrics["ratio:max"] == pytest.approx(1.0, abs=1e-3)
                    assert done.metrics["ratio:mean"] == pytest.approx(1.0, abs=1e-4)
                assert done.metrics["server_loss_difference:max"] < 1e-4
                await trainer.optim_step(learning_rate=1e-4)
        await trainer.aclose()
    assert rewards[-1] > rewards[0] + 0.08
