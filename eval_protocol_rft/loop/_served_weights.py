"""New weights for a server: one that reads them from a folder (vLLM in its development mode, or
`ep-rft serve --reloads`), the user's or an engine of this process.

Invariant: when `publish` returns, every new request is answered by the new weights; when it raises,
the message says that the server may still have the old ones. Nothing of the files is left.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval_protocol_rft import sampling
from eval_protocol_rft.local.engine import Engine
from eval_protocol_rft.local.models import VERSION_KEY
from eval_protocol_rft.loop._trainer import TrainerError, version_name

if TYPE_CHECKING:
    import aiohttp
    from torch import Tensor
    from transformers import PreTrainedModel

RELOAD_SECONDS = 600.0
"""How long a server may take to read weights."""
_NEVER_HAD_IT = (404, 405)
_SHOWN = 500
"""Characters of a server's answer that an error cites."""


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
        self._held: str | None = None
        """Name of the newest weights that the server has taken."""
        self._sent: str | None = None
        """Name of the newest that it was told of."""

    async def publish(
        self,
        model: PreTrainedModel,
        weights: Mapping[str, Tensor],
        version: int,
        *,
        unchanged: frozenset[str] = frozenset(),
    ) -> None:
        """As `WeightSink.publish`; a server reads all of them, changed or not."""
        name = version_name(version)
        size = sum(value.nbytes for value in weights.values())
        folder = await asyncio.to_thread(self._make_folder, name, size)
        try:
            await asyncio.to_thread(_write_untied, model, weights, folder, name)
            self._sent = name
            async with self._session() as session:
                await self._reload(session, folder)
                await self._forget_prefixes(session)
                await self._name(session, name)
            self._held = name
        finally:
            await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)

    def what_stays(self, first: Path) -> str | None:
        """What the server holds by now and goes on with, for people; None where it was sent
        nothing. `first`: folder of the weights that it had."""
        if self._sent is None:
            return None
        call = {"method": "reload_weights", "kwargs": {"weights_path": str(first.absolute())}}
        held = f"holds the weights of {self._sent}"
        if self._held != self._sent:
            before = f"those of {self._held}" if self._held else "its own"
            held = f"may hold the weights of {self._sent}, or {before}"
        return (
            f"{self._url} {held}, and goes on with them. It takes those of {first} again from: "
            f"curl {self._url}/collective_rpc -H 'content-type: application/json' "
            f"-d '{json.dumps(call)}' && curl -X POST {self._url}/reset_prefix_cache"
        )

    def _session(self) -> aiohttp.ClientSession:
        """One per version: servers close idle connections while a step is taken."""
        import aiohttp

        return aiohttp.ClientSession(
            connector=sampling.TrustingConnector(),
            timeout=sampling.NO_CLOCKS,
            headers=self._headers,
        )

    def _place(self, size: int) -> Path:
        """Where to write so many bytes of weights."""
        return self._folder or Path(tempfile.gettempdir())

    def _make_folder(self, name: str, size: int) -> Path:
        # The server has another working directory.
        parent = self._place(size).absolute()
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


class EngineWeights(ServedWeights):
    """Gives weights to an engine of this process, and has it sleep while they are trained.

    Asleep it holds neither weights nor keys and values (vLLM's level 2): it gets the next ones
    before it has to sample again. Files of weights are in memory, where there is room.

    Args:
        engine: started with `takes_weights`.
    """

    def __init__(self, engine: Engine) -> None:
        headers = sampling.endpoint_headers(engine.endpoint)
        super().__init__(engine.endpoint.base_url, headers=headers)
        self._engine = engine
        self._is_asleep = False

    async def rest(self) -> None:
        """Leave the device to the trainer, until the next `publish`. What is being sampled is
        sampled to its end first.

        Raises:
            TrainerError: the engine does not.
        """
        if self._engine.sleeps and not self._is_asleep:
            async with self._session() as session:
                await self._ask(session, "/sleep?level=2&mode=wait")
            self._is_asleep = True

    def _place(self, size: int) -> Path:
        return self._engine.weights_folder(size)

    async def _reload(self, session: aiohttp.ClientSession, folder: Path) -> None:
        if not self._is_asleep:
            await super()._reload(session, folder)
            return
        import torch

        # What torch keeps for later is what the engine needs now.
        torch.cuda.empty_cache()
        await self._ask(session, "/wake_up?tags=weights")
        await super()._reload(session, folder)
        await self._ask(session, "/wake_up?tags=kv_cache")
        self._is_asleep = False

    async def _ask(self, session: aiohttp.ClientSession, path: str) -> None:
        self._expect_200(path, *await self._post(session, path, None))

    async def _post(self, session: aiohttp.ClientSession, path: str, body: Any) -> tuple[int, str]:
        try:
            return await super()._post(session, path, body)
        except TrainerError as error:
            if (problem := self._engine.problem()) is None:
                raise
            raise TrainerError(problem) from error


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
