"""From a key to a `FireworksTrainer`: trainer job, deployment, clients; and a run of `train` there.

Invariant: what is started on Fireworks is what the SDK's managed service starts for these
arguments; what it leaves running when the trainer is closed is said in the docstring. Of the test
only the model that its completion_params name, and where it is, are replaced: by the deployment
that the trainer loads its weights into.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Any, TypeVar

import httpx
from annotated_types import Ge

from eval_protocol_rft import rollout
from eval_protocol_rft.data import OnWait, waits
from eval_protocol_rft.loop._run_options import FIREWORKS, MODEL, LoopOptions, Optimizer, SetupError
from eval_protocol_rft.loop._setup import Parts, own_processor
from eval_protocol_rft.loop._trainer import TrainerError
from eval_protocol_rft.loop.fireworks._answers import (
    ControlPlaneError,
    check_service,
    service_errors,
)
from eval_protocol_rft.loop.fireworks._fireworks_trainer import FireworksTrainer, check_temperature
from eval_protocol_rft.loop.fireworks._hot_load import POLL_SECONDS, HotLoad
from eval_protocol_rft.loop.fireworks._provisioning import (
    SLICED,
    Resources,
    in_thread,
    persistently,
)
from eval_protocol_rft.sampling import FireworksAddress, fireworks_address, is_direct_route
from eval_protocol_rft.training import require

T = TypeVar("T")


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
    on_wait: OnWait | None = None,
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
        training_shape: id of the hardware and software to train on, one of Fireworks' or
            `accounts/.../trainingShapes/...`; its deployment shape is used too. None: the server
            picks one, for a deployment that is there.
        trainer_job: id; made where it is not there. Give the same to go on with a trainer.
        reference: `forward(reference=True)` will be asked for. With LoRA that is the same trainer;
            without, a second one, which is deleted in `aclose`.
        delete_on_close: delete job and deployment in `aclose`, if they were made here. Otherwise
            both run on, and the log says how to delete them.
        on_wait: told what is waited for (trainer job, deployment, weights), at each look, with the
            state that the service says. Default: a line where stderr is a terminal, until this
            returns. Changes are logged too.
        poll_seconds: between looks at what is waited for.

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
    if training_shape is not None and "/" not in training_shape:
        training_shape = f"accounts/fireworks/trainingShapes/{training_shape}"
    job = trainer_job or f"{deployment}-{secrets.token_hex(4)}"
    # With adapters the reference is the policy's trainer without them.
    own_reference = f"{job}-reference" if reference and not lora_rank else None
    service = sdk.FiretitanServiceClient.from_firetitan_config(
        api_key=key,
        base_url=address.url,
        base_model=base_model,
        lora_rank=lora_rank,
        deployment_id=deployment,
        training_shape_id=training_shape,
        trainer_job_id=job,
        reference_trainer_job_id=own_reference,
        **SLICED,
    )
    with waits() if on_wait is None else contextlib.nullcontext(on_wait) as shown:
        resources = Resources(
            jobs=sdk.TrainerJobManager(api_key=key, base_url=address.url),
            deployments=sdk.DeploymentManager(api_key=key, base_url=address.url),
            address=address,
            key=key,
            trainer_jobs=[job],
            deployment=deployment,
            delete=delete_on_close,
            on_wait=shown,
            poll_seconds=poll_seconds,
        )

        def close() -> None:
            try:
                service.close()
            finally:
                resources.close()

        looked = False
        try:
            await in_thread(partial(resources.look, can_make_deployment=training_shape is not None))
            looked = True
            client = await resources.started(
                partial(service.create_training_client, lora_rank=lora_rank)
            )
            make_reference = partial(service.create_reference_client, policy_client=client)
            if own_reference is not None:
                resources.trainer_jobs.append(own_reference)
                made = await resources.started(make_reference)
                make_reference = partial(_same, made)
            manager = resources.deployments
            info = await in_thread(partial(persistently, partial(manager.get, deployment)))
            trainer = FireworksTrainer(
                client,
                temperature=temperature,
                optimizer=optimizer,
                hot_load=HotLoad(
                    manager=manager,
                    deployment=deployment,
                    # It may serve another quantisation of the model; hot-loads go by its own.
                    base_model=(info.base_model if info is not None else None) or base_model,
                    poll_seconds=poll_seconds,
                    on_wait=shown,
                ),
                lora=lora_rank > 0,
                make_reference=make_reference if reference else None,
                trainer_job=job,
                close=close,
            )
            loads = trainer.hot_load
            # Also what an earlier run with this very job left there: it began where this one
            # begins, and its weights moved on.
            held = loads is not None and await loads.holds_any()
            if held or resources.other_weights:
                await trainer.publish(0)
        except BaseException as error:
            # Nobody else could: the caller gets no trainer to close.
            await in_thread(close if looked else service.close)
            refused = (RuntimeError, OSError, ValueError, httpx.HTTPError, sdk.TrainingError)
            if isinstance(error, TrainerError) or not isinstance(error, refused):
                raise
            raise TrainerError(f"cannot train {base_model} on Fireworks: {error}") from error
    if on_wait is None:
        hot_load = trainer.hot_load
        assert hot_load is not None  # noqa: S101 - narrows the type
        hot_load.on_wait = None
    return trainer


def _same(value: T) -> T:
    return value


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
    """Id of the hardware to train on; without it, the deployment must be there."""
    trainer_job: Annotated[str | None, FIREWORKS(unset="DEPLOYMENT-trainer")] = None
    """Id of the trainer job, made if need be; one that was deleted cannot be used again.

    The default is named after the deployment, so that a run that is continued finds its weights."""
    base_url: str | FireworksAddress | None = None
    """Of the service; default `FIREWORKS_BASE_URL`, else Fireworks."""
    delete_on_close: Annotated[bool, FIREWORKS()] = False
    """Delete trainer job and deployment at the end, if made here. They cost money while they are
    there."""
    on_wait: OnWait | None = None
    """See `connect`; `train` shows it beside its progress."""

    def telling(self, on_wait: OnWait) -> FireworksParts:
        """The same, where nobody is told yet what is waited for: `on_wait` is."""
        return self if self.on_wait is not None else replace(self, on_wait=on_wait)

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
            SetupError: the test samples a model of this process, or keeps no tokens; the optimizer
                says what the service decides.
            TrainerError: as for `connect`.
        """
        if self.optimizer.is_for_this_process:
            raise SetupError(
                "microbatch_tokens, gradient_checkpointing and variant of the optimizer "
                "(--microbatch-tokens, --gradient-checkpointing, --optimizer) are for training in "
                "this process: Fireworks decides them by its training shape"
            )
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
            on_wait=self.on_wait,
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
