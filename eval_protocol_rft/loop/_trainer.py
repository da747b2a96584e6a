"""`Trainer`: what the loop asks of whoever holds the weights; and where new weights go: into a
sampler of this process, or to a server that reloads them.

Invariant: gradients add up over `forward_backward` calls until `optim_step` uses and clears them,
and nothing divides them: normalisation is in the datums' weights. Weights that are sampled from
change in `publish` and nowhere else. When `publish` returns, every new request is answered by the
new weights; when it raises, the caller knows that the sampler may still have the old ones.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, runtime_checkable

from eval_protocol_rft import sampling
from eval_protocol_rft._errors import EvalProtocolRftError
from eval_protocol_rft.local.models import VERSION_KEY
from eval_protocol_rft.training import ConfigValue, FloatArray, TrainingDatum

if TYPE_CHECKING:
    import aiohttp
    from torch import Tensor
    from transformers import PreTrainedModel

    from eval_protocol_rft.local import LocalSampler
    from eval_protocol_rft.training.losses import Correction


class TrainerError(EvalProtocolRftError, RuntimeError):
    """A trainer that cannot do what was asked; the message says what to do next."""


class DamagedCheckpointError(TrainerError):
    """What was saved cannot be read back; an older checkpoint may."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedLoss:
    """A loss by its name on the wire, with what may be added to it."""

    loss_fn: str
    """A key of `training.losses.POLICY_LOSSES`."""
    config: Mapping[str, ConfigValue] = field(default_factory=dict)
    """Its thresholds, absolute."""
    kl_beta: float = 0.0
    """Weight of the k3 penalty to the reference policy; needs `reference_logprobs`."""
    correction: Correction | None = None
    """For the distance between sampler and trainer; needs `old_logprobs`."""


LossFunction: TypeAlias = "Callable[[Sequence[TrainingDatum], Sequence[Tensor]], LossValue]"
"""A loss of one's own: datums and [T_i] logprobs of their targets, with gradient, to a scalar and
metrics (`name:reduction`). It must be a sum over datums: it may see them a few at a time."""
LossValue: TypeAlias = "tuple[Tensor, dict[str, float]]"


@dataclass(frozen=True, slots=True)
class ForwardBackward:
    """What one pass over datums told."""

    logprobs: list[FloatArray]
    """[T_i] per datum, nats, of the targets, before the update; 0.0 where nothing was sampled."""
    metrics: dict[str, float]
    """`name:reduction`, see `training.losses.Objective`."""


@runtime_checkable
class Trainer(Protocol):
    """One policy in training. Calls come one after the other."""

    async def forward(
        self,
        datums: Sequence[TrainingDatum],
        *,
        reference: bool = False,
        temperature: float | None = None,
    ) -> list[FloatArray]:
        """[T_i] logprobs (nats) of the targets under the current weights, without gradient.

        Args:
            datums: any number.
            reference: under the frozen weights that training began from.
            temperature: other than the trainer's own.
        """
        ...

    async def forward_backward(
        self,
        datums: Sequence[TrainingDatum],
        loss: NamedLoss | LossFunction,
        *,
        old_logprobs: Sequence[FloatArray] | None = None,
        reference_logprobs: Sequence[FloatArray] | None = None,
    ) -> ForwardBackward:
        """Add the gradient of `loss` over `datums` to what has gathered.

        Args:
            datums: one batch; with the advantages and weights that `build_batch` gave them.
            loss: what to differentiate.
            old_logprobs: ratios are taken against these, [T_i] per datum; default: against the
                sampler's own.
            reference_logprobs: [T_i] per datum, for `kl_beta`.

        Raises:
            LossError: the loss lacks something or is not finite.
            TrainerError: this trainer cannot compute it.
        """
        ...

    async def optim_step(self, *, learning_rate: float) -> dict[str, float]:
        """One step of the optimiser on the gathered gradient. Returns metrics (`grad_norm`)."""
        ...

    async def publish(self, version: int) -> None:
        """Make the sampler draw from the current weights, and call them `version`. When this
        returns, every new request is answered by them."""
        ...

    async def save(self, folder: Path) -> None:
        """Write weights and optimiser state into `folder`, an empty one."""
        ...

    async def load(self, folder: Path) -> None:
        """Go back to what `save` wrote, exactly.

        Raises:
            DamagedCheckpointError: it is incomplete or damaged.
            TrainerError: it is of another model, or the trainer cannot do it now.
        """
        ...

    async def aclose(self) -> None:
        """Release what the trainer holds. Idempotent."""
        ...


RELOAD_SECONDS = 600.0
"""How long a server may take to read weights."""
_NEVER_HAD_IT = (404, 405)
_SHOWN = 500
"""Characters of a server's answer that an error cites."""


class WeightSink(Protocol):
    """Takes the weights that sampling is to go on with."""

    async def publish(
        self,
        model: PreTrainedModel,
        weights: Mapping[str, Tensor],
        version: int,
        *,
        unchanged: frozenset[str] = frozenset(),
    ) -> None:
        """Hand over `weights`, which are those of `model` by its own names, as `version`.

        Args:
            model: what they belong to.
            weights: all of them.
            version: their name, a number.
            unchanged: names of those that are as this sink had them before.

        Raises:
            TrainerError: they did not arrive.
        """
        ...


def version_name(version: int) -> str:
    """How completions name the weights of a version."""
    return f"step-{version}"


def named_version(name: str | None) -> int | None:
    """The version that `version_name` named; None where others did, or nobody."""
    number = (name or "").removeprefix("step-")
    return int(number) if number != name and number.isdecimal() else None


class SamplerWeights:
    """Copies weights into a `LocalSampler` in place."""

    def __init__(self, sampler: LocalSampler) -> None:
        self._sampler = sampler

    async def publish(
        self,
        model: PreTrainedModel,
        weights: Mapping[str, Tensor],
        version: int,
        *,
        unchanged: frozenset[str] = frozenset(),
    ) -> None:
        changed = {name: value for name, value in weights.items() if name not in unchanged}
        await self._sampler.load_weights(
            changed, policy_version=version_name(version), keep=unchanged
        )


class ServedWeights:
    """Has a server read weights from a folder that both see: vLLM in its development mode
    (`VLLM_SERVER_DEV_MODE=1`), or `ep-rft serve --reloads`.

    The weights are named in the file itself, which `ep-rft serve` reads with them, so that no
    completion goes by a wrong name; a server that does not (vLLM) is told the name last, when the
    weights are those that it names.

    Args:
        url: of the server, with or without `/v1`.
        folder: where to write them, in a folder of each version's own that is gone when the server
            has read it; default the system's for temporary files.
        headers: sent along, for a server that wants a key.
    """

    def __init__(
        self, url: str, *, folder: Path | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        self._url = url.rstrip("/").removesuffix("/v1")
        self._folder = folder
        self._headers = dict(headers or {})

    async def publish(
        self,
        model: PreTrainedModel,
        weights: Mapping[str, Tensor],
        version: int,
        *,
        unchanged: frozenset[str] = frozenset(),
    ) -> None:
        """As `WeightSink.publish`; a server reads all of them, changed or not."""
        import aiohttp

        name = version_name(version)
        folder = await asyncio.to_thread(self._make_folder, name)
        try:
            await asyncio.to_thread(_write_untied, model, weights, folder, name)
            # A session per version: servers close idle connections while a step is taken.
            async with aiohttp.ClientSession(
                connector=sampling.TrustingConnector(),
                timeout=sampling.NO_CLOCKS,
                headers=self._headers,
            ) as session:
                await self._reload(session, folder)
                await self._forget_prefixes(session)
                await self._name(session, name)
        finally:
            await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)

    def _make_folder(self, name: str) -> Path:
        # The server has another working directory.
        parent = (self._folder or Path(tempfile.gettempdir())).absolute()
        try:
            parent.mkdir(parents=True, exist_ok=True)
            return Path(tempfile.mkdtemp(prefix=f"{name}-", dir=parent))
        except OSError as error:
            raise TrainerError(f"{parent}: cannot write weights there: {error}") from error

    async def _reload(self, session: aiohttp.ClientSession, folder: Path) -> None:
        call = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
        path = "/collective_rpc"
        status, text = await self._post(session, path, call)
        if status in _NEVER_HAD_IT:
            text = "it does not take new weights: start vLLM with VLLM_SERVER_DEV_MODE=1 set"
        self._expect_200(path, status, text)

    async def _forget_prefixes(self, session: aiohttp.ClientSession) -> None:
        """Keys and values of the old weights must not answer new requests. vLLM keeps them while
        requests run, and says so in a reply of status 200; then those start over."""
        for path in ("/reset_prefix_cache", "/reset_prefix_cache?reset_running_requests=true"):
            status, text = await self._post(session, path, None)
            self._expect_200(path, status, text)
            if not _says_failure(text):
                return
        raise TrainerError(
            f"{self._url} has the new weights and keeps the old ones' prefix cache: {text[:_SHOWN]}"
            "; start vLLM with --no-enable-prefix-caching"
        )

    async def _name(self, session: aiohttp.ClientSession, name: str) -> None:
        path = "/update_weight_version"
        status, text = await self._post(session, path, {"new_version": name})
        # Not every release of vLLM has it, and completions there do not show it.
        if status not in _NEVER_HAD_IT:
            self._expect_200(path, status, text)

    def _expect_200(self, path: str, status: int, text: str) -> None:
        if status != 200:
            raise TrainerError(
                f"{self._url}{path} answered {status}, so the sampler may have the old weights: "
                f"{text[:_SHOWN]}"
            )

    async def _post(self, session: aiohttp.ClientSession, path: str, body: Any) -> tuple[int, str]:
        import aiohttp

        try:
            async with (
                sampling.Deadline(RELOAD_SECONDS),
                session.post(
                    self._url + path,
                    json=body,
                    allow_redirects=False,
                    proxy=sampling.proxy_for(self._url),
                ) as response,
            ):
                return response.status, await response.text(errors="replace")
        except (aiohttp.ClientError, TimeoutError) as error:
            reason = sampling.short(sampling.error_text(error))
            raise TrainerError(
                f"{self._url}{path}: no answer, so the sampler may have the old weights "
                f"({reason}); is the server running, and for how long does it read weights? "
                f"After {RELOAD_SECONDS:g} s it is given up"
            ) from error


def _says_failure(text: str) -> bool:
    try:
        answer = json.loads(text)
    except ValueError:
        return False
    return isinstance(answer, dict) and answer.get("success") is False


def _write_untied(
    model: PreTrainedModel, weights: Mapping[str, Tensor], folder: Path, name: str
) -> None:
    """Every tensor by itself: vLLM's CPU engine (0.32) keeps its old output layer, and says
    nothing, where a file leaves that out because it is tied to the embeddings."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    written: set[int] = set()
    for key, value in weights.items():
        plain = value.detach().cpu().contiguous()
        memory = plain.untyped_storage().data_ptr()
        # The format refuses two tensors in one memory.
        tensors[key] = plain.clone() if memory in written else plain
        written.add(memory)
    try:
        metadata = {"format": "pt", VERSION_KEY: name}
        save_file(tensors, folder / "model.safetensors", metadata=metadata)
        model.config.save_pretrained(folder)
    except (OSError, SafetensorError) as error:
        needed = sum(value.nbytes for value in tensors.values()) / 1e9
        raise TrainerError(
            f"{folder}: the new weights cannot be written ({needed:.2g} GB): {error}"
        ) from error
