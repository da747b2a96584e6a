"""`ShardedTrainer`: two processes over gloo take the steps that one process takes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from eval_protocol_rft.local import Placement
from eval_protocol_rft.local.models import bundled_model_path
from eval_protocol_rft.loop._local_trainer import LocalTrainer
from eval_protocol_rft.loop._run_options import Optimizer
from eval_protocol_rft.loop._setup import LocalParts, SetupError
from eval_protocol_rft.loop._sharded import ShardedTrainer
from eval_protocol_rft.loop._train import atrain
from eval_protocol_rft.loop._trainer import NamedLoss, TrainerError
from examples.arithmetic import test_arithmetic as example
from tests.loop.policies import KeptWeights, arithmetic_sampler, datums
from tests.loop.runs import options, sums_file

PPO = NamedLoss(loss_fn="ppo", config={"clip_low_threshold": 0.8, "clip_high_threshold": 1.2})
# Some batches make an odd number of passes, and one makes a single one: a process is left over.
FEW = Optimizer(microbatch_tokens=30, max_grad_norm=0.05)


def two_processes(model, sink=None) -> ShardedTrainer:
    return ShardedTrainer(
        model,
        source=str(bundled_model_path("arithmetic")),
        placement=Placement(),
        processes=2,
        sink=sink or KeptWeights(),
        optimizer=FEW,
    )


async def steps(trainer: LocalTrainer, batches: list) -> list[tuple[float, float]]:
    """Loss and gradient norm of each."""
    curve = []
    for batch in batches:
        told = await trainer.forward_backward(batch, PPO)
        assert [len(values) for values in told.logprobs] == [len(datum) for datum in batch]
        step = await trainer.optim_step(learning_rate=1e-2)
        curve.append((told.metrics["policy_loss:sum"], step["grad_norm"]))
    return curve


async def test_two_processes_take_the_steps_of_one_and_share_its_checkpoints(tmp_path: Path):
    model = arithmetic_sampler().model
    one, sink = LocalTrainer(model, sink=KeptWeights(), optimizer=FEW), KeptWeights()
    two = two_processes(model, sink)
    batches = [datums(count, seed=count, words=16) for count in (5, 1, 6, 3)]
    try:
        for name in ("one", "two"):
            (tmp_path / name).mkdir()
        ours, theirs = await steps(two, batches), await steps(one, batches)
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
        assert abs(theirs[0][0]) > 1e-3
        for mine, others in zip(
            await two.forward(batches[0]), await one.forward(batches[0]), strict=True
        ):
            np.testing.assert_allclose(mine, others, atol=1e-4)
        await two.save(tmp_path / "two")
        await one.save(tmp_path / "one")
        await one.load(tmp_path / "two")
        await two.load(tmp_path / "one")
        np.testing.assert_allclose(
            await steps(two, batches), await steps(one, batches), rtol=1e-4, atol=1e-4
        )
        await two.publish(1)
        [(_, weights)] = sink.published
        torch.testing.assert_close(weights, dict(one.weights()), atol=1e-4, rtol=1e-4)

        two._others[0].kill()
        with pytest.raises(TrainerError, match="1 of 2 processes"):
            await two.forward(batches[0])
    finally:
        await two.aclose()
        await one.aclose()


async def test_adapters_and_a_reference_are_for_one_process(tmp_path: Path):
    with pytest.raises(SetupError, match="--processes"):
        await atrain(
            example.test_arithmetic,
            tmp_path / "run",
            options=options(steps=1, kl_beta=0.1),
            model="local/arithmetic",
            data=[sums_file(tmp_path / "sums.jsonl")],
            progress=False,
            parts=LocalParts(processes=2),
        )


@pytest.mark.slow
async def test_a_run_of_two_processes_draws_the_curve_of_one(tmp_path: Path):
    data = sums_file(tmp_path / "sums.jsonl")

    # Not the loss: where sampler and trainer agree, it is zero up to rounding at every step.
    async def curve(processes: int) -> list[tuple[float, float]]:
        result = await atrain(
            example.test_arithmetic,
            tmp_path / f"run-{processes}",
            options=options(),
            model="local/arithmetic",
            data=[data],
            progress=False,
            parts=LocalParts(processes=processes),
        )
        lines = [line for line in result.lines if "grad_norm" in line]
        return [(line["grad_norm"], line["reward_mean"]) for line in lines]

    one = await curve(1)
    assert len(one) == 4
    assert min(norm for norm, _ in one) > 0.1
    np.testing.assert_allclose(await curve(2), one, atol=1e-4, rtol=1e-4)
