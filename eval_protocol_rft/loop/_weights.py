"""Where new weights go: into a sampler of this process, or to a server that reloads them.

Invariant: when `publish` returns, every new request is answered by the new weights; when it
raises, the caller knows that the sampler may still have the old ones.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from eval_protocol_rft.local.server import VERSION_KEY
from eval_protocol_rft.loop._trainer import TrainerError

if TYPE_CHECKING:
    import aiohttp
    from torch import Tensor
    from transformers import PreTrainedModel

    from eval_protocol_rft.local import LocalSampler

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

        from eval_protocol_rft.sampling import NO_CLOCKS, TrustingConnector

        name = version_name(version)
        folder = await asyncio.to_thread(self._make_folder, name)
        try:
            await asyncio.to_thread(_write_untied, model, weights, folder, name)
            # A session per version: servers close idle connections while a step is taken.
            async with aiohttp.ClientSession(
                connector=TrustingConnector(), timeout=NO_CLOCKS, headers=self._headers
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

        from eval_protocol_rft.sampling import Deadline, error_text, proxy_for, short

        try:
            async with (
                Deadline(RELOAD_SECONDS),
                session.post(
                    self._url + path,
                    json=body,
                    allow_redirects=False,
                    proxy=proxy_for(self._url),
                ) as response,
            ):
                return response.status, await response.text(errors="replace")
        except (aiohttp.ClientError, TimeoutError) as error:
            raise TrainerError(
                f"{self._url}{path}: no answer, so the sampler may have the old weights "
                f"({short(error_text(error))}); is the server running, and for how long does "
                f"it read weights? After {RELOAD_SECONDS:g} s it is given up"
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
