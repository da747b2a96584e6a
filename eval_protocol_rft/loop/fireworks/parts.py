"""A run of `train` on Fireworks: a trainer job computes the steps, a deployment samples.

Invariant: the test is used as it is; only the model that its completion_params name is replaced,
by the deployment that the trainer loads its weights into.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from eval_protocol_rft.loop.fireworks.connecting import FIREWORKS_URL, connect
from eval_protocol_rft.loop.fireworks.settings import Adam
from eval_protocol_rft.loop.options import LoopOptions
from eval_protocol_rft.loop.setup import MakeParts, Optimizer, Parts, SetupError, own_processor
from eval_protocol_rft.params import parse_completion_params


def fireworks_parts(
    *,
    base_model: str,
    deployment: str,
    lora_rank: int = 0,
    optimizer: Optimizer | None = None,
    training_shape: str | None = None,
    trainer_job: str | None = None,
    base_url: str = FIREWORKS_URL,
    delete_on_close: bool = False,
) -> MakeParts:
    """For `train(parts=...)`.

    Args:
        base_model: `accounts/fireworks/models/...`.
        deployment: id of the deployment to sample from; made where it is not there.
        lora_rank: rank of adapters; 0 trains all parameters.
        optimizer: AdamW's settings.
        training_shape: id of the hardware to train on.
        trainer_job: id of the trainer job; default one named after the deployment, so that a run
            that is continued finds its weights.
        base_url: of the service.
        delete_on_close: delete what was started when the run ends.
    """

    async def make(
        evaluator: Callable[..., Any], params: dict[str, Any], options: LoopOptions
    ) -> Parts:
        request = parse_completion_params(params)
        if request.endpoint is None:
            raise SetupError(
                f"{request.params.model} is a model of this process: name the one on Fireworks"
            )
        chosen = optimizer or Optimizer()
        trainer = await connect(
            base_model=base_model,
            deployment=deployment,
            temperature=request.params.temperature,
            adam=Adam(
                beta1=chosen.betas[0],
                beta2=chosen.betas[1],
                eps=chosen.eps,
                weight_decay=chosen.weight_decay,
                max_grad_norm=chosen.max_grad_norm,
            ),
            lora_rank=lora_rank,
            base_url=base_url,
            training_shape=training_shape,
            trainer_job=trainer_job or f"{deployment}-trainer",
            reference=options.kl_beta > 0,
            delete_on_close=delete_on_close,
        )
        if trainer.hot_load is None:
            raise SetupError("the trainer has no deployment to sample from")
        sampled = {**params, "model": trainer.hot_load.model}
        return Parts(
            trainer=trainer,
            processor=own_processor(evaluator),
            request=parse_completion_params(sampled),
            params=sampled,
        )

    settings = {
        "base_model": base_model,
        "deployment": deployment,
        "lora_rank": lora_rank,
        "training_shape": training_shape,
        "optimizer": asdict(optimizer or Optimizer()),
    }
    return MakeParts(make, settings)
