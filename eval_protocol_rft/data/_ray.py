"""Sampling on a Ray cluster: a `Sampler` whose requests are made by one actor per node.

Invariant: only the request itself is made elsewhere. Prompts are rendered, seeds derived, attempts
counted and completions stored by the process that runs the job, so a job may be begun with one
engine and continued with the other. A request whose node is lost is a failed attempt, which the
retry policy repeats, on another node.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

from eval_protocol_rft.local.models import LOCAL_PREFIX
from eval_protocol_rft.rollout import RolloutRequest
from eval_protocol_rft.sampling import Completion, Sampler, SamplingError, SamplingParams
from eval_protocol_rft.scoring.executors import EAGER_SECONDS, Node, NodeActor, NodeActors, Work


class RolloutActor:
    """Lives on a node, and samples there."""

    def __init__(self, request: RolloutRequest, trust_remote_code: bool) -> None:
        # No more than this: what an actor raises here reaches the driver as its death.
        self._request = request
        self._trust_remote_code = trust_remote_code
        self._sampler: Sampler

    async def ready(self) -> None:
        """Load the model, or find the server's client."""
        endpoint = self._request.endpoint
        if endpoint is not None:
            from eval_protocol_rft.sampling import HttpSampler

            self._sampler = HttpSampler(endpoint)
            return

        from eval_protocol_rft.local import load_local_sampler

        self._sampler = await asyncio.to_thread(
            load_local_sampler,
            self._request.params.model.removeprefix(LOCAL_PREFIX),
            trust_remote_code=self._trust_remote_code,
        )

    async def sample(
        self, prompt_ids: Sequence[int], params: SamplingParams, seed: int | None
    ) -> Completion | SamplingError:
        """As `Sampler.sample`; what that raises is returned: Ray would wrap it, with a traceback
        for its message."""
        try:
            return await self._sampler.sample(prompt_ids, params, seed=seed)
        except SamplingError as error:
            return error.with_traceback(None)


@dataclass(slots=True)
class RaySampler:
    """The samplers of all nodes as one. `await start()` comes first.

    Args:
        request: names the model or the endpoint. The API key travels inside it.
        trust_remote_code: let local models run their own code.
        concurrency: most requests in flight, over all nodes.
        address: see `NodeActors`.

    Raises:
        RayEngineError: Ray is not installed.
    """

    request: RolloutRequest
    trust_remote_code: bool
    concurrency: int
    address: str | None
    _actors: NodeActors = field(init=False)

    def __post_init__(self) -> None:
        self._actors = NodeActors(self.address, self._work)

    async def start(self) -> None:
        """Join the cluster, and wait until one of its nodes can sample. Others join in later.

        Raises:
            RayEngineError: there is no cluster, or a node cannot load the model.
        """
        # Here, not in a thread: Ray warns when it may not see to signals.
        self._actors.connect()
        await self._free()

    async def sample(
        self, prompt_ids: Sequence[int], params: SamplingParams, *, seed: int | None = None
    ) -> Completion:
        """Sample on the node that has the least to do; see `Sampler.sample`.

        Raises:
            SamplingError: as the node's own sampler; of kind `connection`, the node was lost
                meanwhile.
            RayEngineError: a node that joined cannot load the model.
        """
        actor = await self._free()
        actor.busy += 1
        try:
            outcome = await actor.handle.sample.remote(prompt_ids, params, seed)
        except self._actors.gone as error:
            self._actors.lost(actor)
            raise SamplingError(
                f"the Ray actor on node {actor.node.address} was lost: {type(error).__name__}",
                kind="connection",
            ) from error
        finally:
            actor.busy -= 1
        if isinstance(outcome, SamplingError):
            raise outcome
        completion: Completion = outcome
        return completion

    async def aclose(self) -> None:
        """End the actors and what they are doing. Idempotent."""
        await asyncio.to_thread(self._actors.close)

    async def _free(self) -> NodeActor:
        # Asking is what finds out: Ray tells nobody of nodes that join.
        while (actor := self._actors.free()) is None:  # noqa: ASYNC110
            await asyncio.sleep(EAGER_SECONDS)
        return actor

    def _work(self, _: Node) -> Work:
        arguments = {"request": self.request, "trust_remote_code": self.trust_remote_code}
        return Work(RolloutActor, arguments, cpus=1, calls=self.concurrency)
