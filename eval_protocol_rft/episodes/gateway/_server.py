"""The gateway: a server on loopback for agents' model calls, each agent in a session of its own.

    async with Gateway(sampler, tokenizer) as gateway:
        session = gateway.session("row 1")
        await run_my_agent(base_url=session.base_url, api_key=session.api_key)
        done = await session.finish()              # done.segments, done.record

Invariant: a request reaches the session that its key and its address name, or none. What a client
does (leaves, floods, sends what is no request) ends its own request at most.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import logging
import secrets
import socket
from collections.abc import Mapping
from dataclasses import replace
from http import HTTPStatus
from types import ModuleType
from typing import Any, cast

import msgspec
from aiohttp import web

from eval_protocol_rft import rollout, sampling
from eval_protocol_rft.episodes._rendering import ChatText
from eval_protocol_rft.episodes.gateway import _chat_api, _messages_api, _responses_api
from eval_protocol_rft.episodes.gateway._answering import answer, error_response, own_fault
from eval_protocol_rft.episodes.gateway._call import CallError
from eval_protocol_rft.episodes.gateway._rows import asked_first, record_of
from eval_protocol_rft.episodes.gateway._session import KEY_MARK, Sample, Session
from eval_protocol_rft.episodes.gateway._settings import SessionSettings
from eval_protocol_rft.episodes.gateway._tracing_routes import TracingRoutes
from eval_protocol_rft.local import LoadedTokenizer
from eval_protocol_rft.local.server import Access, is_loopback

logger = logging.getLogger(__name__)

REQUEST_BYTES = 32 * 2**20
"""Most bytes of one request: a history of some million tokens."""
REWARD_HEADER = "x-rft-reward"
"""Of a call: what the answer before it was worth."""

_PROTOCOLS: dict[str, ModuleType] = {
    "/chat/completions": _chat_api,
    "/responses": _responses_api,
    "/messages": _messages_api,
}
_PREFIXES = ("", "/v1", "/v1/v1")
"""What clients put before a path: some expect `/v1` in their base URL, and some add it."""
_SESSION_PATH = "/s/{session}"
_IN_TRACES = frozenset({"token_turn_traces", "assistant_turn_payloads"})
_NAMED = {"session", "rollout_id"}
"""What an address may say of the session that a call is of."""


class Gateway:
    """Answers agents' model calls from a sampler. Belongs to one event loop.

    Args:
        sampler: samples; the caller's to close.
        tokenizer: the model's; its chat template renders.
        settings: how calls are answered, for sessions that have no other.
        host: address to listen on.
        port: 0 finds a free one.
        retry: budget of attempts per completion.
        tracing: offer what Eval Protocol's tracing proxy offers, for its remote processors.
    """

    def __init__(
        self,
        sampler: sampling.Sampler,
        tokenizer: Any,
        *,
        settings: SessionSettings | None = None,
        host: str = "127.0.0.1",
        port: int = 0,
        retry: sampling.RetryPolicy | None = None,
        tracing: bool = False,
    ) -> None:
        self.tokenizer = (
            tokenizer if isinstance(tokenizer, LoadedTokenizer) else LoadedTokenizer.wrap(tokenizer)
        )
        self.settings = settings or SessionSettings(
            params=sampling.SamplingParams(model="policy", max_tokens=rollout.DEFAULT_MAX_TOKENS),
            context_length=getattr(sampler, "context_length", None),
        )
        self.request = rollout.RolloutRequest(params=self.settings.params, n=1)
        """What records say of how was sampled."""
        self._sampler = sampler
        self._host, self._port = host, port
        self._retry = retry or sampling.RetryPolicy()
        self._limiter = sampling.RunLimiter(patience_seconds=self._retry.max_seconds)
        self._access = Access(loopback_only=is_loopback(host))
        self._sessions: dict[str, Session] = {}
        """By the last part of their address."""
        self._by_key: dict[bytes, Session] = {}
        """By the hash of their key, so that looking one up takes as long for a wrong one."""
        self._tracing = (
            TracingRoutes(
                begin=self.begin_rollout,
                tell=self.rollout_extra,
                is_own_key=lambda request: self._is_own_key(_key(request.headers)),
                is_open=is_loopback(host),
            )
            if tracing
            else None
        )
        self._chats: dict[str, ChatText] = {}
        self._runner: web.AppRunner | None = None
        self.api_key = f"sk-rft-{secrets.token_urlsafe(24)}"
        """Of clients that name their session in the model, see `Session.model_name`."""
        self.starting: asyncio.Task[None] | None = None
        """Of those who share it: `start`."""
        self.url = ""
        """`http://HOST:PORT`, once it listens."""

    async def __aenter__(self) -> Gateway:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def start(self) -> None:
        """Listen.

        Raises:
            OSError: the address cannot be used.
        """
        runner = web.AppRunner(
            self.app(), handler_cancellation=True, access_log=None, shutdown_timeout=1.0
        )
        await runner.setup()
        self._runner = runner
        family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
        listener = socket.create_server((self._host, self._port), family=family, backlog=2048)
        await web.SockSite(runner, listener).start()
        host = f"[{self._host}]" if ":" in self._host else self._host
        self.url = f"http://{host}:{listener.getsockname()[1]}"

    async def aclose(self) -> None:
        """End all sessions and listen no more. Idempotent."""
        sessions = list(self._sessions.values())
        self._sessions.clear()
        self._by_key.clear()
        await asyncio.gather(*(session.end("closed") for session in sessions))
        if self._tracing is not None:
            await self._tracing.aclose()
        runner, self._runner = self._runner, None
        if runner is not None:
            await runner.cleanup()

    def session(
        self,
        name: str = "",
        *,
        path: str | None = None,
        settings: SessionSettings | None = None,
        sample: Sample | None = None,
        seed: int | None = None,
        salt: str | None = None,
    ) -> Session:
        """A new session, for one rollout.

        Args:
            name: what errors and logs call it.
            path: names it in its address; None: nobody can guess it.
            settings: other than the gateway's.
            sample: gets a completion, in place of the gateway's sampler.
            seed: what the seeds of its completions are derived from; None: none are sent.
            salt: makes the ids of its calls and replies; None: they are random.
        """
        path, key = path or secrets.token_urlsafe(9), f"sk-rft-{secrets.token_urlsafe(24)}"
        session = Session(
            name or path,
            settings=settings or self.settings,
            tokenizer=self.tokenizer,
            sample=sample or self._sample,
            seed=seed,
            salt=salt if salt is not None else secrets.token_hex(8),
            chats=self._chats,
        )
        session.anthropic_url = f"{self.url}/s/{path}"
        session.base_url, session.api_key = f"{session.anthropic_url}/v1", key
        session.shared_url, session.shared_key = f"{self.url}/v1", self.api_key
        self._sessions[path] = self._by_key[_hashed(key)] = session
        session.on_end = lambda: self._forget(path, key)
        return session

    def begin_rollout(self, rollout_id: str, attempt: int) -> Session:
        """The session of a rollout of Eval Protocol's, which is found by its ids alone. `attempt`
        counts those of the same id before it."""
        seed = self.seed_of(rollout_id, attempt)
        session = self.session(f"rollout {rollout_id}", seed=seed)
        session.on_end()
        session.on_end = lambda: None
        return session

    def rollout_extra(self, session: Session) -> dict[str, Any]:
        """What Eval Protocol is to put on the row of a rollout that ended: its record, with what
        is in no trace (sub-agents, retries, answers that the agent wrote anew). The turns of the
        conversation alone, each with its whole prompt, come with its traces."""
        done = session.record()
        if done.first is None:
            return {}
        record = record_of(
            sampling.Group(survivors=[done.first], failures=[]),
            [done],
            request=self.request,
            tokenizer=self.tokenizer,
            own=len(asked_first(done)),
            split_reasoning=session.settings.split_reasoning,
            began_at=session.began_at,
        )
        extra = record.to_extra()
        return {key: value for key, value in extra.items() if key not in _IN_TRACES}

    def seed_of(self, name: str, run: int) -> int | None:
        """Of a session that a client begins by naming it; None: no seeds are sent."""
        return None

    def _forget(self, path: str, key: str) -> None:
        self._sessions.pop(path, None)
        self._by_key.pop(_hashed(key), None)

    async def _sample(
        self, ids: sampling.TokenIds, params: sampling.SamplingParams, seed: int | None
    ) -> sampling.Survivor | sampling.Failure:
        return await sampling.sample_one(
            self._sampler,
            ids,
            params,
            index=0,
            seed=seed,
            slots=contextlib.nullcontext(),
            retry=self._retry,
            limiter=self._limiter,
            prompt=params.session,
            observe=rollout.observe_attempt,
            read=lambda completion: self.tokenizer.read(completion, params),
        )

    def app(self) -> web.Application:
        """The server's application."""
        app = web.Application(client_max_size=REQUEST_BYTES, middlewares=[self._guard])
        for where in ("", _SESSION_PATH):
            for prefix in _PREFIXES:
                for path in _PROTOCOLS:
                    app.router.add_post(f"{where}{prefix}{path}", self._call)
                app.router.add_get(f"{where}{prefix}/models", self._models)
                app.router.add_post(f"{where}{prefix}/reward", self._reward)
        app.router.add_get("/health", _health)
        if self._tracing is not None:
            handlers: dict[str, Any] = dict.fromkeys(_PROTOCOLS, self._call)
            handlers["/reward"] = self._reward
            under = {f"{prefix}{path}": handlers[path] for prefix in _PREFIXES for path in handlers}
            self._tracing.add_to(app, under)
        return app

    @web.middleware
    async def _guard(self, request: web.Request, handler: Any) -> web.StreamResponse:
        """Errors in the shape of the protocol that the address names."""
        api = _protocol_of(request.path)
        try:
            problem = self._access.problem(request.path, request.headers)
            if problem is not None:
                raise CallError(problem[1], status=problem[0])
            return cast("web.StreamResponse", await handler(request))
        except CallError as error:
            return error_response(api, error)
        except web.HTTPRequestEntityTooLarge:
            message = f"a request has at most {REQUEST_BYTES} bytes"
            return error_response(api, CallError(message, status=413, code="request_too_large"))
        except web.HTTPException as error:
            if error.status < HTTPStatus.BAD_REQUEST:
                raise
            message = f"{error.reason}: {request.method} {request.path}. {_ADDRESSES}"
            return error_response(api, CallError(message, status=error.status))
        except (asyncio.CancelledError, ConnectionError):
            raise  # the client is gone
        except Exception as error:
            logger.exception("a request of an agent failed")
            return error_response(api, own_fault(error))

    def _session_of(self, request: web.Request, key: str, *, begins: bool = False) -> Session:
        """The session that a request's key and address name; a model call may begin one by name.

        Raises:
            CallError: 401, they name none, or two.
        """
        if self._tracing is not None and (session := self._tracing.session_of(request)):
            return session
        path = request.match_info.get("session")
        if self._is_own_key(key):
            name = path or "default"
            session = self._sessions.get(name) or (self.begin_named(name) if begins else None)
        else:
            session = self._by_key.get(_hashed(key))
        if session is None or (path is not None and self._sessions.get(path) is not session):
            raise CallError(
                "the API key is missing, or not this session's, or the session is over: send the "
                "key that belongs to this base URL",
                status=HTTPStatus.UNAUTHORIZED,
                code="invalid_api_key",
            )
        return session

    def begin_named(self, name: str) -> Session | None:
        """A session for those who have the gateway's own key and name it in the address; None where
        the gateway begins none so."""
        return None

    def _is_own_key(self, key: str) -> bool:
        return hmac.compare_digest(key.encode(errors="replace"), self.api_key.encode())

    async def _call(self, request: web.Request) -> web.StreamResponse:
        api, key, call = _protocol_of(request.path), _key(request.headers), None
        if self._is_own_key(key) and not _NAMED & request.match_info.keys():
            call = api.read_call(await request.read())
            model, mark, key = call.model.rpartition(KEY_MARK)
            call = replace(call, model=model) if mark else call
            key = key if mark else self.api_key
        session = self._session_of(request, key, begins=True)
        announced = request.content_length or 0
        session.arrived(announced)
        body = await request.read()
        session.received(max(0, len(body) - announced))  # in chunks, or compressed
        call = api.read_call(body) if call is None else call
        said = request.headers.get(REWARD_HEADER)
        reward = None if said is None else _number(said)
        digest = hashlib.blake2b(body, digest_size=16, key=api.__name__.encode()[-16:]).digest()
        is_retry = request.headers.get("x-stainless-retry-count", "0") != "0"
        pending = session.call(call, digest, is_retry=is_retry, reward=reward)
        return await answer(request, api, call, pending)

    async def _models(self, request: web.Request) -> web.Response:
        model = self._session_of(request, _key(request.headers)).settings.params.model
        entry = {"id": model, "object": "model", "created": 0, "owned_by": "policy"}
        return web.json_response({"object": "list", "data": [entry]})

    async def _reward(self, request: web.Request) -> web.Response:
        session = self._session_of(request, _key(request.headers))
        try:
            said = msgspec.json.decode(await request.read(), type=_Reward)
        except msgspec.MsgspecError as error:
            raise CallError(f'a reward is {{"reward": 1.0, "id": ...}}: {error}') from error
        session.reward(said.reward, said.id)
        return web.json_response({})


class _Reward(msgspec.Struct, forbid_unknown_fields=True):
    reward: float
    id: str | None = None


_ADDRESSES = (
    "OpenAI clients take a base URL that ends in /v1, Anthropic's one without it; there are "
    "/chat/completions, /responses, /messages and /models"
)


def _protocol_of(path: str) -> ModuleType:
    named = next((one for one in _PROTOCOLS if f"{one}/" in f"{path}/"), "/chat/completions")
    return _PROTOCOLS[named]


def _key(headers: Mapping[str, str]) -> str:
    """Of OpenAI's clients, and of Anthropic's old and new ones."""
    scheme, _, key = headers.get("authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "").strip()


def _hashed(key: str) -> bytes:
    return hashlib.blake2b(key.encode(errors="surrogateescape"), digest_size=32).digest()


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise CallError(f"{REWARD_HEADER}: {text!r} is no number", param=REWARD_HEADER) from error


async def _health(_: web.Request) -> web.Response:
    return web.json_response({"status": "ok"})
