"""New weights into a running deployment: what to save, what to ask for, and when it is done.

Invariant: a snapshot counts as loaded when every replica says so. A delta is saved only where the
deployment is known to hold the snapshot before it; after anything that went wrong comes a base.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import httpx

from eval_protocol_rft.data import OnWait
from eval_protocol_rft.loop._trainer import TrainerError
from eval_protocol_rft.loop.fireworks._control_plane import Verdict
from eval_protocol_rft.loop.fireworks._waiting import Wait

CheckpointType = Literal["base", "delta"]
POLL_SECONDS = 5.0
TIMEOUT_SECONDS = 900.0
DELTA_FORMAT = {"compression_format": "arc_v2", "checksum_format": "alder32"}
"""As the SDK's own weight syncer sends it."""


@dataclass(slots=True)
class SnapshotChain:
    """Which snapshot the deployment holds, as far as we know. Pure.

    An adapter is whole by itself, so with LoRA every snapshot is a base.
    """

    lora: bool
    loaded: str | None = None
    """Identity of the last snapshot that was loaded and seen to be; None: a base comes next."""

    def next_type(self) -> CheckpointType:
        return "base" if self.lora or self.loaded is None else "delta"

    def metadata(self, kind: CheckpointType) -> dict[str, str] | None:
        """What a hot-load of a snapshot of this kind says about the one before it."""
        if kind == "base" or self.loaded is None:
            return None
        return {"previous_snapshot_identity": self.loaded, **DELTA_FORMAT}


def replicas_verdict(status: Mapping[str, Any], expected: str) -> tuple[Verdict, str]:
    """Read the answer to a hot-load status request. Pure.

    Returns:
        Whether the snapshot `expected` is loaded, and what the replicas say, one line of each.

    Raises:
        TrainerError: the answer has no list of replicas.
    """
    replicas = _replicas(status)
    done, failed, seen = bool(replicas), False, []
    for i, replica in enumerate(replicas):
        loading = replica.get("loading_state") or {}
        current, stage = replica.get("current_snapshot_identity"), loading.get("stage")
        adapters = replica.get("loaded_adapters") or []
        holds = current == expected or any(
            a.get("identity") == expected and a.get("status") == "loaded" for a in adapters
        )
        done = done and holds and replica.get("readiness") is True
        # An error of an earlier snapshot stays in the status until the new one begins.
        failed |= stage == "error" and loading.get("target_snapshot_identity") == expected
        seen.append(
            f"replica {i}: holds {current}, stage {stage}, ready {replica.get('readiness')}"
        )
    verdict: Verdict = "done" if done else "failed" if failed else "wait"
    return verdict, "; ".join(seen) or "no replicas"


def _replicas(status: Mapping[str, Any]) -> list[Any]:
    replicas = status.get("replicas")
    if not isinstance(replicas, list):
        raise TrainerError(
            f"the hot-load status has no list of replicas but {sorted(status)}: update fireworks-ai"
        )
    return replicas


@dataclass(slots=True, kw_only=True)
class HotLoad:
    """A deployment that takes snapshots.

    Args:
        manager: the SDK's `DeploymentManager`.
        deployment: id of a deployment with hot-load enabled, which reads the trainer's bucket.
        base_model: what it serves; routes the request.
        poll_seconds: between looks at the replicas.
        timeout_seconds: most time for one snapshot.
        on_wait: told what the replicas say, at each look.
    """

    manager: Any
    deployment: str
    base_model: str
    poll_seconds: float = POLL_SECONDS
    timeout_seconds: float = TIMEOUT_SECONDS
    on_wait: OnWait | None = None

    @property
    def model(self) -> str:
        """The name under which the deployment is sampled from."""
        return f"accounts/{self.manager.account_id}/deployments/{self.deployment}"

    async def holds_any(self) -> bool:
        """Whether a replica may hold a snapshot, of whatever trainer.

        Raises:
            TrainerError: the answer is none that we know.
        """
        try:
            answer = await asyncio.to_thread(
                self.manager.hotload_check_status, self.deployment, self.base_model
            )
        except httpx.HTTPError:
            return True  # it does not say
        return any(
            replica.get("current_snapshot_identity") or replica.get("loaded_adapters")
            for replica in _replicas(answer)
        )

    async def load(self, identity: str, metadata: Mapping[str, str] | None) -> None:
        """Ask for a snapshot and return when every replica holds it and is ready.

        Raises:
            TrainerError: refused, failed or not done in time; the message says what was seen.
        """
        deadline = time.monotonic() + self.timeout_seconds
        wait = Wait(f"weights {identity} on deployment {self.deployment}", self.on_wait)
        await self._ask_for(identity, metadata, deadline)
        while True:
            verdict, seen = await self._status(identity)
            if verdict == "done":
                wait.done("loaded")
                return
            if verdict == "failed":
                raise TrainerError(
                    f"deployment {self.deployment} failed to load {identity}: {seen}"
                )
            if time.monotonic() >= deadline:
                raise TrainerError(
                    f"deployment {self.deployment} has not loaded {identity} within "
                    f"{self.timeout_seconds:g} s: {seen}"
                )
            wait.see(seen)
            await asyncio.sleep(self.poll_seconds)

    async def _ask_for(
        self, identity: str, metadata: Mapping[str, str] | None, deadline: float
    ) -> None:
        while True:
            try:
                await asyncio.to_thread(
                    self.manager.hotload,
                    deployment_id=self.deployment,
                    base_model=self.base_model,
                    snapshot_identity=identity,
                    incremental_snapshot_metadata=dict(metadata) if metadata else None,
                    reset_prompt_cache=True,
                )
                return
            except httpx.HTTPError as error:
                # A connection that broke: the same snapshot may be asked for again.
                if isinstance(error, httpx.TransportError) and time.monotonic() < deadline:
                    await asyncio.sleep(self.poll_seconds)
                    continue
                raise TrainerError(
                    f"deployment {self.deployment} did not take snapshot {identity}: {error}. See "
                    "that hot-load is enabled on it and that it belongs to this trainer"
                ) from error

    async def _status(self, identity: str) -> tuple[Verdict, str]:
        try:
            answer = await asyncio.to_thread(
                self.manager.hotload_check_status, self.deployment, self.base_model
            )
        except httpx.HTTPError as error:  # a replica may be restarting; the deadline decides
            return "wait", f"no status: {error}"
        return replicas_verdict(answer, identity)
