"""`ep-rft gateway`: a gateway that others talk to over HTTP alone.

Invariant: a session that ends is written once, whole, as a row of Eval Protocol's, before its end
is confirmed; one that cannot be written is kept until it can. The gateway's own end ends all
sessions. Its key opens sessions; a session's key opens that one. A name whose session has ended
opens no other by itself: a call that comes late would begin a rollout that nobody wanted.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
from aiohttp import web

from eval_protocol_rft import rollout, sampling
from eval_protocol_rft._errors import EvalProtocolRftError
from eval_protocol_rft._text import text_of
from eval_protocol_rft.episodes.gateway._call import CallError
from eval_protocol_rft.episodes.gateway._rows import asked_first, put_on_row
from eval_protocol_rft.episodes.gateway._server import Gateway, _key
from eval_protocol_rft.episodes.gateway._session import Session
from eval_protocol_rft.episodes.gateway._settings import SessionSettings
from eval_protocol_rft.episodes.gateway._trajectory import SessionRecord
from eval_protocol_rft.local import LoadedTokenizer

MOST_NAMES = 100_000
"""Names of ended sessions that are remembered."""


class GatewayError(EvalProtocolRftError, RuntimeError):
    """The gateway cannot start; the message says why and what to do."""


class _Opening(msgspec.Struct, forbid_unknown_fields=True):
    """Body of `POST /sessions`."""

    name: str | None = None
    row_id: str | None = None
    """Sessions with the same one are rollouts of one row: a prompt group."""
    seed: int | None = None


class _Ending(msgspec.Struct, forbid_unknown_fields=True):
    """Body of `POST /s/NAME/finish`."""

    reward: float | None = None
    reason: str | None = None


class StandaloneGateway(Gateway):
    """A gateway whose sessions are opened and ended over HTTP.

    Args:
        request: what the model is asked with, for the record.
        output: JSONL that rows are appended to; None: they are only returned.
        api_key: of the gateway; None: one that nobody can guess.
        say: prints a line.
        **options: as for `Gateway`.
    """

    def __init__(
        self,
        sampler: sampling.Sampler,
        tokenizer: LoadedTokenizer,
        *,
        request: rollout.RolloutRequest,
        output: Path | None,
        api_key: str | None,
        say: Callable[[str], None],
        **options: Any,
    ) -> None:
        super().__init__(sampler, tokenizer, tracing=True, **options)
        self._output, self._say = output, say
        self.request = request
        self.api_key = api_key or self.api_key
        self._row_ids: dict[str, str] = {}
        """Of sessions that are open, by their address."""
        self._experiment_id = secrets.token_hex(8)
        """Of all rows that it writes: those with one row id are one prompt group."""
        self._ending: set[asyncio.Task[dict[str, Any]]] = set()
        self._ended: dict[str, None] = {}
        """Names of sessions that have ended, the last `MOST_NAMES`."""
        self._unwritten: list[bytes] = []
        """Rows that the file had no room for."""
        self._counts: dict[str, int] = {}
        """Sessions of each row, so that no two draw the same."""

    def app(self) -> web.Application:
        app = super().app()
        app.router.add_post("/sessions", self._open)
        for prefix in ("", "/v1"):
            app.router.add_post(f"/s/{{session}}{prefix}/finish", self._finish)
        return app

    def begin_named(self, name: str) -> Session:
        """A session begins with its first call."""
        if name in self._ended:
            raise CallError(
                f"session {name!r} is over: POST /sessions opens another of that name",
                status=403,
                code="session_over",
            )
        return self._begin(name, name, self.request.seed)

    def _begin(self, path: str, row_id: str, seed: int | None) -> Session:
        if not path.isascii() or not path.replace("-", "").replace("_", "").isalnum():
            raise CallError("the name of a session has letters, digits, - and _", param="name")
        run = self._counts[row_id] = self._counts.get(row_id, -1) + 1
        (own,) = sampling.derive_seeds(seed, row_id, 1, run=run)
        session = self.session(path, path=path, seed=own)
        self._row_ids[path] = row_id
        self._ended.pop(path, None)
        return session

    def seed_of(self, name: str, run: int) -> int | None:
        (seed,) = sampling.derive_seeds(self.request.seed, name, 1, run=run)
        return seed

    async def _open(self, request: web.Request) -> web.Response:
        if not self._is_own_key(_key(request.headers)):
            raise CallError("send the gateway's key", status=401, code="invalid_api_key")
        asked = _read(await request.read(), _Opening)
        if asked.name is not None and asked.name in self._sessions:
            raise CallError(f"there is a session {asked.name!r}", status=409, param="name")
        path = asked.name or secrets.token_urlsafe(9)
        seed = self.request.seed if asked.seed is None else asked.seed
        session = self._begin(path, asked.row_id or path, seed)
        return web.json_response(
            {
                "name": path,
                "base_url": session.base_url,
                "anthropic_url": session.anthropic_url,
                "api_key": session.api_key,
            },
            status=201,
        )

    async def _finish(self, request: web.Request) -> web.Response:
        path, key = request.match_info["session"], _key(request.headers)
        session = self._sessions.get(path)
        if session is None and self._is_own_key(key):
            raise CallError(f"there is no open session {path!r}", status=404)
        session = self._session_of(request, key)
        ending = _read(await request.read(), _Ending)
        # Written also where the client does not wait for it.
        task = asyncio.ensure_future(self._end_session(path, session, "done", ending))
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)
        row = await asyncio.shield(task)
        return web.Response(body=msgspec.json.encode(row), content_type="application/json")

    async def aclose(self) -> None:
        """End and write all sessions, and listen no more."""
        await asyncio.gather(*self._ending, return_exceptions=True)
        for path, session in list(self._sessions.items()):
            try:
                await self._end_session(path, session, "closed", _Ending())
            except Exception as error:  # noqa: BLE001 - the others are still to be written
                self._say(text_of(error))
        await super().aclose()
        if self._unwritten:
            with contextlib.suppress(CallError):
                self._write()
        if self._unwritten:
            self._say(
                f"{_count(len(self._unwritten), 'row')} could not be written to {self._output}, "
                "and are lost"
            )

    async def _end_session(
        self, path: str, session: Session, stop_reason: str, ending: _Ending
    ) -> dict[str, Any]:
        row_id = self._row_ids.pop(path, None)
        if row_id is None:
            raise CallError(f"session {path!r} is being finished", status=409)
        self._ended[path] = None
        if len(self._ended) > MOST_NAMES:
            del self._ended[next(iter(self._ended))]
        done = await session.finish(stop_reason)
        if done.first is None:
            why = "it made no call that was answered"
            if done.failure is not None:
                why = f"a call got no completion: {done.failure.message}"
            raise CallError(f"session {path!r} is no rollout: {why}", status=409)
        row = self._row(done, row_id, session.began_at, ending)
        if self._output is not None:
            self._append(row)
        if done.failure is not None:
            raise CallError(
                f"session {path!r} is a failed rollout, and its row says so: a call got no "
                f"completion: {done.failure.message}",
                status=409,
            )
        self._say(
            f"session {path}: {_count(done.record.turns, 'turn')}, "
            f"{_count(done.sampled_tokens, 'token')} sampled, "
            f"{_count(len(done.segments), 'segment')}, {done.record.stop_reason}"
        )
        return row

    def _row(
        self, done: SessionRecord, row_id: str, began: float, ending: _Ending
    ) -> dict[str, Any]:
        from eval_protocol.models import (
            EvaluateResult,
            EvaluationRow,
            InputMetadata,
            Message,
            Status,
        )

        assert done.first is not None  # noqa: S101 - a session without a turn is no rollout
        asked = InputMetadata(row_id=row_id, completion_params={"model": self.request.params.model})
        row = EvaluationRow(messages=[], input_metadata=asked)
        row.execution_metadata.experiment_id = self._experiment_id
        put_on_row(
            row,
            sampling.Group(survivors=[done.first], failures=[]),
            [done],
            request=self.request,
            tokenizer=self.tokenizer,
            asked=[Message(**message) for message in asked_first(done)],
            split_reasoning=self.settings.split_reasoning,
            began_at=began,
            seconds=time.time() - began,
        )
        row.rollout_status = (
            Status.rollout_finished()
            if done.failure is None
            else Status.rollout_unavailable_error(done.failure.message)
        )
        if ending.reward is not None:
            row.evaluation_result = EvaluateResult(score=ending.reward, reason=ending.reason)
            extra = row.execution_metadata.extra
            assert extra is not None  # noqa: S101 - a record was put there
            extra["rewards"] = [ending.reward]
            extra["completion_results"] = [{"score": ending.reward, "reason": ending.reason}]
        dumped: dict[str, Any] = row.model_dump(mode="json", exclude_none=True)
        return dumped

    def _append(self, row: dict[str, Any]) -> None:
        """Write the row, and those before it that could not be written.

        Raises:
            CallError: it cannot be; it is kept, and tried again with the next.
        """
        self._unwritten.append(msgspec.json.encode(row) + b"\n")
        self._write()

    def _write(self) -> None:
        assert self._output is not None  # noqa: S101 - narrows the type
        try:
            _append(self._output, b"".join(self._unwritten))
        except OSError as error:
            raise CallError(
                f"{self._output}: {error.strerror}. {len(self._unwritten)} rows wait to be "
                "written: make room, and finish another session",
                status=507,
            ) from error
        self._unwritten.clear()


def _append(output: Path, lines: bytes) -> None:
    """Append all of `lines`, from the beginning of a line on, or nothing.

    Raises:
        OSError: it could not be written.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("a+b") as file:
        size = file.seek(0, os.SEEK_END)
        if size and lines:  # the last line may be half of one, from a machine that stopped
            file.seek(-1, os.SEEK_END)
            lines = lines if file.read(1) == b"\n" else b"\n" + lines
        try:
            file.write(lines)
            file.flush()
            os.fsync(file.fileno())
        except OSError:
            os.truncate(output, size)
            raise


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _read(body: bytes, shape: type[Any]) -> Any:
    try:
        return msgspec.json.decode(body or b"{}", type=shape)
    except msgspec.MsgspecError as error:
        raise CallError(f"the request's body: {text_of(error)}") from error


def serve_gateway(
    request: rollout.RolloutRequest,
    *,
    settings: SessionSettings,
    host: str,
    port: int,
    api_key: str | None,
    output: Path | None,
    trust_remote_code: bool = False,
    say: Callable[[str], None] = print,
) -> None:
    """Run a gateway until Ctrl-C; the arguments are the options of `ep-rft gateway`.

    Raises:
        GatewayError: the address cannot be used.
        ValueError: the tokenizer or the local model cannot be loaded.
        SamplingError: likewise.
    """
    with contextlib.suppress(asyncio.CancelledError):
        asyncio.run(
            _serve(
                request,
                settings=settings,
                host=host,
                port=port,
                api_key=api_key,
                output=output,
                trust_remote_code=trust_remote_code,
                say=say,
            )
        )


async def _serve(
    request: rollout.RolloutRequest,
    *,
    settings: SessionSettings,
    trust_remote_code: bool,
    host: str,
    port: int,
    api_key: str | None,
    output: Path | None,
    say: Callable[[str], None],
) -> None:
    clients: dict[sampling.Endpoint, sampling.HttpSampler] = {}
    backends = rollout.Backends(tokenizer=None, sampler=None, trust_remote_code=trust_remote_code)
    request = await backends.placed(request)
    sampler, tokenizer = await backends.resolve(request, clients)
    if request.seed is None and backends.seeds_are_free(request):
        request = replace(request, seed=secrets.randbits(31))
    context = settings.context_length or getattr(sampler, "context_length", None)
    gateway = StandaloneGateway(
        sampler,
        tokenizer,
        request=request,
        output=output,
        api_key=api_key,
        say=say,
        settings=replace(settings, context_length=context),
        host=host,
        port=port,
    )
    if output is not None:
        try:
            _append(output, b"")
        except OSError as error:
            raise GatewayError(f"-o: cannot write {output}: {error.strerror}") from error
    try:
        try:
            await gateway.start()
        except OSError as error:
            raise GatewayError(
                f"cannot listen on {host} port {port}: {error.strerror}; take another with --port "
                "(0 finds a free one)"
            ) from error
        say(_greeting(gateway, request.params.model))
        await asyncio.Event().wait()
    finally:
        await gateway.aclose()
        for client in clients.values():
            await client.aclose()


def _greeting(gateway: StandaloneGateway, model: str) -> str:
    port = gateway.url.rpartition(":")[2]
    return (
        f"Gateway to {model} on {gateway.url} (Ctrl-C stops it). For one agent:\n"
        f"  export OPENAI_BASE_URL={gateway.url}/s/NAME/v1 OPENAI_API_KEY={gateway.api_key}\n"
        f"  export ANTHROPIC_BASE_URL={gateway.url}/s/NAME ANTHROPIC_API_KEY={gateway.api_key}\n"
        f"and when it is done: curl -X POST {gateway.url}/s/NAME/finish "
        f"-H 'authorization: Bearer {gateway.api_key}' -d '{{\"reward\": 1.0}}'\n"
        "For Eval Protocol's RemoteRolloutProcessor(include_payloads=True):\n"
        f"  export EP_MODEL_BASE_URL=http://localhost:{port} EP_REMOTE_API_KEY={gateway.api_key}\n"
        f"and where the agent's server runs: export FW_TRACING_GATEWAY_BASE_URL={gateway.url}"
    )
