"""`FireworksTrainer`s of the emulator, as tests make them."""

from __future__ import annotations

from typing import Any

from fireworks.training import sdk

from eval_protocol_rft.loop._run_options import Optimizer
from eval_protocol_rft.loop._trainer import NamedLoss
from eval_protocol_rft.loop.fireworks._fireworks_trainer import FireworksTrainer
from eval_protocol_rft.loop.fireworks._hot_load import HotLoad
from tests.emulator.server import KEY, TrainingEmulator

BASE = "accounts/fireworks/models/arithmetic"
OPTIMIZER = Optimizer(beta2=0.95, max_grad_norm=None)
CLIP = {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}


def make_trainer(
    server: TrainingEmulator, *, lora: bool = False, **options: Any
) -> FireworksTrainer:
    """Over the SDK's own client. Blocks: the SDK creates the model before it returns."""
    service = sdk.FiretitanServiceClient(api_key=KEY, base_url=server.url)
    manager = sdk.DeploymentManager(api_key=KEY, base_url=server.url)
    return FireworksTrainer(
        service.create_training_client(base_model=BASE, lora_rank=8 if lora else 0),
        temperature=1.0,
        optimizer=OPTIMIZER,
        hot_load=HotLoad(manager=manager, deployment="dep", base_model=BASE, poll_seconds=0.01),
        lora=lora,
        make_reference=lambda: service.create_reference_client(base_model=BASE),
        close=service.close,
        **options,
    )


async def one_step(trainer: FireworksTrainer, batch: Any) -> None:
    await trainer.forward_backward(batch.datums, NamedLoss(loss_fn="ppo", config=CLIP))
    await trainer.optim_step(learning_rate=1e-3)
