"""A local sampler whose weights are replaced while it serves.

Invariant: the weights and their name change together, between two tokens; a reload that is refused
changes neither. A completion that two sets of weights sampled says so, whatever they are called.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from eval_protocol_rft.sampling.local import LocalSampler
from eval_protocol_rft.sampling.types import Completion, RefusedError, SamplingParams
from eval_protocol_rft.server.checkpoint import read_checkpoint

if TYPE_CHECKING:
    from torch import Tensor

FIRST_VERSION = "initial"
"""The name of the weights that the server began with."""


class ReloadingSampler:
    """A `Sampler` that reads new weights from a folder.

    Args:
        sampler: nobody else's, with a name for its weights: they change.
    """

    def __init__(self, sampler: LocalSampler) -> None:
        if sampler.policy_version is None:
            raise ValueError("the sampler must name its weights: pass policy_version=")
        self._sampler = sampler
        # The sampler knows weights by a key that no reload shares, so that giving weights another
        # name is no new version of them.
        self._names: dict[str | None, str] = {sampler.policy_version: sampler.policy_version}
        self._keys = count(1)
        self._one_at_a_time = asyncio.Lock()

    @property
    def version(self) -> str:
        """The name of the weights that sample now."""
        return self._names[self._sampler.policy_version]

    async def sample(
        self, prompt_ids: Sequence[int], params: SamplingParams, *, seed: int | None = None
    ) -> Completion:
        """As `LocalSampler.sample`; versions are named as they are called when it ends."""
        completion = await self._sampler.sample(prompt_ids, params, seed=seed)
        name = self._names[completion.policy_version]
        first = None
        if completion.first_policy_version is not None:
            first = self._names[completion.first_policy_version]
            if first == name:
                first = f"{first}-replaced"
        return replace(completion, policy_version=name, first_policy_version=first)

    async def reload(self, folder: Path) -> str:
        """Sample with the weights in `folder` from here on; what is being sampled goes on with
        them. Returns their name: that in the files, else one made of their content.

        Raises:
            RefusedError: they cannot be read, or are not this model's. Nothing is changed then.
        """
        async with self._one_at_a_time:
            read = await asyncio.to_thread(read_checkpoint, folder)
            await asyncio.to_thread(_check_tied, self._sampler.model.state_dict(), read.weights)
            key = f"{FIRST_VERSION}+{next(self._keys)}"
            self._names[key] = read.version
            try:
                await self._sampler.load_weights(read.weights, policy_version=key)
            except RefusedError:
                del self._names[key]
                raise
            return read.version

    async def rename(self, version: str) -> None:
        """Call the weights that sample now `version`."""
        async with self._one_at_a_time:
            self._names[self._sampler.policy_version] = version

    async def aclose(self) -> None:
        await self._sampler.aclose()


def _check_tied(own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    """Tensors that are one in the model may come several times, but not as several."""
    first_of: dict[int, str] = {}
    for name, value in own.items():
        if name not in weights:
            continue
        first = first_of.setdefault(value.data_ptr(), name)
        if first != name and not weights[first].equal(weights[name]):
            raise RefusedError(
                f"{first} and {name} differ, and this model's are tied: they are one tensor"
            )
