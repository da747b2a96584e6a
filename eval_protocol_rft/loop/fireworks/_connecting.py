"""From a key to a `FireworksTrainer`: trainer job, deployment, clients; and a run of `train` there.

Invariant: what is started on Fireworks is what the SDK's managed service starts for these
arguments; what it leaves running when the trainer is closed is said in the docstring. Of the test
only the model that its completion_params name, and where it is, are replaced: by the deployment
that the trainer loads its weights into.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any

import httpx
from annotated_types import Ge

from eval_protocol_rft import rollout
from eval_protocol_rft.loop._run_options import FIREWORKS, MODEL, LoopOptions, Optimizer, SetupError
from eval_protocol_rft.loop._setup import Parts, own_processor
from eval_protocol_rft.loop._trainer import TrainerError
from eval_protocol_rft.loop.fireworks._control_plane import (
    ControlPlaneError,
    check_service,
    service_errors,
)
from eval_protocol_rft.loop.fireworks._fireworks_trainer import FireworksTrainer, check_temperature
from eval_protocol_rft.loop.fireworks._hot_load import POLL_SECONDS, HotLoad
from eval_protocol_rft.sampling import FireworksAddress, fireworks_address, is_direct_route
from eval_protocol_rft.training import require

logger = logging.getLogger(__name__)

_PAUSES = (0.5, 1.0, 2.0, 4.0, 8.0)
"""Seconds before a request whose connection broke is sent again."""


async def connect(
    *,
    base_model: str,
    deployment: str,
    temperature: float,
    optimizer: Optimizer,
    lora_rank: int = 0,
    api_key: str | None = None,
    base_url: str | FireworksAddress | None = None,
    training_shape: str | None = None,
    trainer_job: str | None = None,
    reference: bool = False,
    delete_on_close: bool = False,
    poll_seconds: float = POLL_SECONDS,
) -> FireworksTrainer:
    """Start a trainer job and a deployment, or take those that are there, and wait for both.

    This takes minutes and costs money until both are deleted. A deployment that was there may hold
    weights of another trainer, or of an earlier run, so it is given this one's before this returns.

    Args:
        base_model: `accounts/fireworks/models/...`.
        deployment: id; made where it is not there, and joined to the trainer job. Sample from
            `trainer.hot_load.model`.
        temperature: see `FireworksTrainer`.
        optimizer: of every step; its `microbatch_tokens` are not for a server.
        lora_rank: rank of the adapters; 0 trains all parameters.
        api_key: default `FIREWORKS_API_KEY`.
        base_url: of the service; default `FIREWORKS_BASE_URL`, else Fireworks. It may end in
            `/inference` or `/inference/v1`.
        training_shape: id of the hardware and software to train on; its deployment shape is used
            too. None: the server picks one, for a deployment that is there.
        trainer_job: id; made where it is not there. Give the same to go on with a trainer.
        reference: `forward(reference=True)` will be asked for. With LoRA that is the same trainer;
            without, a second one.
        delete_on_close: delete job and deployment in `aclose`, if they were made here. Otherwise
            both run on.
        poll_seconds: between looks at a hot-load.

    Raises:
        MissingPackageError: the SDK is not installed.
        ValueError: the address is no URL.
        TrainerError: no key, a temperature other than 1, or the service did not give what was
            asked for. A wrong key or address is told before anything is made.
    """
    check_temperature(temperature)
    key = api_key or os.environ.get("FIREWORKS_API_KEY")
    if not key:
        raise TrainerError("no API key: set FIREWORKS_API_KEY or pass api_key=")
    address = fireworks_address(base_url)
    sdk = require("fireworks.training.sdk", install="eval-protocol-rft[fireworks]")
    # The SDK would try for minutes what cannot succeed.
    async with service_errors().AsyncFireworks(api_key=key, base_url=address.url) as client:
        try:
            await check_service(
                client, address, key_source="api_key" if api_key else "FIREWORKS_API_KEY"
            )
        except ControlPlaneError as error:
            raise TrainerError(str(error)) from error
    service = sdk.FiretitanServiceClient.from_firetitan_config(
        api_key=key,
        base_url=address.url,
        base_model=base_model,
        lora_rank=lora_rank,
        deployment_id=deployment,
        training_shape_id=training_shape,
        trainer_job_id=trainer_job,
        reference_required=reference,
        cleanup_trainer_on_close=delete_on_close,
        cleanup_deployment_on_close="delete" if delete_on_close else None,
    )

    def start() -> FireworksTrainer:
        # What is there already is found, so both may be asked again.
        client = _persistently(lambda: service.create_training_client(lora_rank=lora_rank))
        manager = sdk.DeploymentManager(api_key=key, base_url=address.url)
        info = _persistently(lambda: manager.get(deployment))
        # A deployment may serve another quantisation of the model; hot-loads go by its own.
        served = (info.base_model if info is not None else None) or base_model
        return FireworksTrainer(
            client,
            temperature=temperature,
            optimizer=optimizer,
            hot_load=HotLoad(
                manager=manager,
                deployment=deployment,
                base_model=served,
                poll_seconds=poll_seconds,
            ),
            lora=lora_rank > 0,
            make_reference=partial(service.create_reference_client, policy_client=client)
            if reference
            else None,
            trainer_job=service.trainer_job_id,
            close=service.close,
        )

    starting = asyncio.ensure_future(asyncio.to_thread(start))
    try:
        trainer = await asyncio.shield(starting)
        # Also what an earlier run with this very job left there: it began where this one begins,
        # and its weights moved on.
        loads = trainer.hot_load
        held = loads is not None and await loads.holds_any()
        if held or service.requires_initial_sampler_sync():
            await trainer.publish(0)
        return trainer
    except BaseException as error:
        # Nobody else could: the caller gets no trainer to close. Where the caller is cancelled, the
        # thread goes on, and what it makes after the end would run on and cost money.
        await asyncio.wait([starting])
        await asyncio.to_thread(service.close)
        refused = (RuntimeError, OSError, ValueError, httpx.HTTPError, sdk.TrainingError)
        if isinstance(error, TrainerError) or not isinstance(error, refused):
            raise
        raise TrainerError(f"cannot train {base_model} on Fireworks: {error}") from error


def _persistently(ask: Callable[[], Any]) -> Any:
    """What `ask` returns, asked again where the connection breaks: the SDK does that for some of
    its requests, and not for one whose connection breaks in the midst. Blocks."""
    for seconds in _PAUSES:
        try:
            return ask()
        except httpx.TransportError as error:
            logger.warning("%s: asking again", error)
            time.sleep(seconds)
    return ask()


@dataclass(frozen=True, slots=True, kw_only=True)
class FireworksParts:
    """Training on Fireworks, for `train(parts=...)`."""

    base_model: Annotated[str, FIREWORKS()]
    """accounts/fireworks/models/... to train."""
    deployment: Annotated[str, FIREWORKS()]
    """Train on Fireworks: id of the deployment to sample from, made if need be."""
    lora_rank: Annotated[int, Ge(0), MODEL()] = 0
    """Train LoRA adapters of this rank; 0: all parameters."""
    optimizer: Optimizer = field(default_factory=Optimizer)
    training_shape: Annotated[str | None, FIREWORKS()] = None
    """Id of the hardware to train on."""
    trainer_job: str | None = None
    """Id of the trainer job; default one named after the deployment, so that a run that is
    continued finds its weights."""
    base_url: str | FireworksAddress | None = None
    """Of the service; default `FIREWORKS_BASE_URL`, else Fireworks."""
    delete_on_close: Annotated[bool, FIREWORKS()] = False
    """Delete trainer job and deployment at the end, if made here. They cost money while they are
    there."""

    def settings(self) -> dict[str, Any]:
        return {
            "base_model": self.base_model,
            "deployment": self.deployment,
            "lora_rank": self.lora_rank,
            "training_shape": self.training_shape,
            "service": fireworks_address(self.base_url).url,
            "optimizer": self.optimizer.settings(),
        }

    async def make(
        self, evaluator: Callable[..., Any], params: dict[str, Any], options: LoopOptions
    ) -> Parts:
        """Start what there is not, and connect.

        Raises:
            SetupError: the test samples a model of this process, or keeps no tokens.
            TrainerError: as for `connect`.
        """
        request = rollout.parse_completion_params(params)
        if request.endpoint is None:
            raise SetupError(
                f"{request.params.model} is a model of this process: name the one on Fireworks"
            )
        address = fireworks_address(self.base_url)
        processor = own_processor(evaluator)  # before anything is started that costs money
        trainer = await connect(
            base_model=self.base_model,
            deployment=self.deployment,
            temperature=request.params.temperature,
            optimizer=self.optimizer,
            lora_rank=self.lora_rank,
            base_url=address,
            training_shape=self.training_shape,
            trainer_job=self.trainer_job or f"{self.deployment}-trainer",
            reference=options.kl_beta > 0,
            delete_on_close=self.delete_on_close,
        )
        if trainer.hot_load is None:
            raise SetupError("the trainer has no deployment to sample from")
        sampled = {**params, "model": trainer.hot_load.model}
        if not is_direct_route(request.endpoint.base_url):
            # Wherever the test samples by itself: the deployment is there, and nowhere else.
            sampled["api_base"] = address.inference
            sampled.pop("base_url", None)
        return Parts(
            trainer=trainer,
            processor=processor,
            request=rollout.parse_completion_params(sampled),
            params=sampled,
        )
