"""The HTTP of `_tracing`: which addresses Eval Protocol's processors, their remote servers and the
log handler in these ask for, and with which key.

Invariant: model calls and traces need the gateway's key. Status and logs do too, but on loopback:
there Eval Protocol sends another key than the one that it gives the agent, or none.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import msgspec
from aiohttp import web

from eval_protocol_rft import rollout, sampling
from eval_protocol_rft.episodes.gateway._call import CallError
from eval_protocol_rft.episodes.gateway._session import Session
from eval_protocol_rft.episodes.gateway._settings import Departure
from eval_protocol_rft.episodes.gateway._tracing import IDS, RolloutStore, calls_of

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

# A base URL that ends in a slash gives two of them; ids are not escaped, so a row's may hold some.
_BEFORE = "/{before:(?:/|v1/)?(?:project_id/[^/]+/)?}"
_IDS = "/".join(f"{name}/{{{name}}}" for name in IDS[:-1]) + "/row_id/{row_id:.+?}"
ROLLOUT_PATH = f"{_BEFORE}{_IDS}{{base_url:(?:/encoded_base_url/[^/]+)?}}"
"""Of a rollout, before what its client adds. `{before}` may be empty."""
_MOST_DIGITS = 6
"""Of a limit."""


class TracingRoutes:
    """Offers `_tracing` over HTTP.

    Args:
        begin: makes the session of a rollout, see `RolloutStore.session`.
        tell: what a rollout's row is to hold of its session.
        is_own_key: whether a request has the gateway's key.
        is_open: whether status and logs are for everyone, as on loopback.
    """

    def __init__(
        self,
        *,
        begin: Callable[[str, int], Session],
        tell: Callable[[Session], dict[str, Any]],
        is_own_key: Callable[[web.Request], bool],
        is_open: bool,
    ) -> None:
        self.store = RolloutStore()
        self._begin, self._tell = begin, tell
        self._is_own_key, self._is_open = is_own_key, is_open
        self._ending: set[asyncio.Future[Any]] = set()

    def add_to(self, app: web.Application, handlers: Mapping[str, Handler]) -> None:
        """Add the routes to an application.

        Args:
            app: before it serves.
            handlers: what is done at a path under a rollout's ids.
        """
        # The longest first: what a client adds is no part of the row's id.
        for path in sorted(handlers, key=len, reverse=True):
            app.router.add_post(f"{ROLLOUT_PATH}{path}", handlers[path])
        for prefix in ("", "/v1"):
            app.router.add_get(f"{prefix}/status", self._status)
            app.router.add_get(f"{prefix}/logs", self._logs)
            app.router.add_post(f"{prefix}/logs", self._log)
        for prefix in ("", "/project_id/{project}"):
            app.router.add_get(f"/v1{prefix}/traces/pointwise", self._traces)

    def session_of(self, request: web.Request) -> Session | None:
        """The session that a call's address names by a rollout's ids; None where it names none.

        Raises:
            CallError: 401, the key is not the gateway's.
        """
        ids = {name: request.match_info[name] for name in IDS if name in request.match_info}
        if len(ids) < len(IDS):
            return None
        self._check_key(request)

        def begin(rollout_id: str, attempt: int) -> Session:
            session = self._begin(rollout_id, attempt)
            if other := request.match_info.get("base_url"):
                _depart(session, other)
            return session

        session = self.store.session(ids, begin, now=sampling.sampling_time())
        self._end_dropped()
        return session

    async def aclose(self) -> None:
        """End all sessions."""
        self.store.close()
        self._end_dropped()
        await asyncio.gather(*self._ending, return_exceptions=True)

    def _check_key(self, request: web.Request, *, is_open: bool = False) -> None:
        if not is_open and not self._is_own_key(request):
            raise CallError(
                "the API key is missing or wrong: Eval Protocol gives agents EP_REMOTE_API_KEY, or "
                "else FIREWORKS_API_KEY, so set it to the gateway's key",
                status=401,
                code="invalid_api_key",
            )

    async def _status(self, request: web.Request) -> web.Response:
        self._check_key(request, is_open=self._is_open)
        rollout_id = request.query.get("rollout_id")
        if not rollout_id:
            raise CallError("which rollout? ?rollout_id=...", param="rollout_id")
        return _json(self.store.status(rollout_id, now=sampling.sampling_time()))

    async def _log(self, request: web.Request) -> web.Response:
        self._check_key(request, is_open=self._is_open)
        self.store.log(await request.read(), now=sampling.sampling_time())
        self._end_dropped()
        return _json({})

    async def _logs(self, request: web.Request) -> web.Response:
        # A wider search would name the rollouts of others.
        names_one = any(tag.startswith("rollout_id:") for tag in _tags(request))
        self._check_key(request, is_open=self._is_open and names_one)
        limit = request.query.get("limit", "100")
        if not limit.isdecimal() or len(limit) > _MOST_DIGITS:
            raise CallError(f"limit is a number of at most {_MOST_DIGITS} digits", param="limit")
        entries = self.store.entries(_tags(request), self._tell, limit=int(limit))
        self._end_dropped()
        return _json({"entries": entries})

    async def _traces(self, request: web.Request) -> web.Response:
        self._check_key(request)
        is_final = request.query.get("include_payloads", "").lower() == "true"
        found = self.store.paths(_tags(request), is_final=is_final, now=sampling.sampling_time())
        self._end_dropped()
        calls = [call for one in found for call in calls_of(*one)]
        # Encoding takes long where conversations are.
        traces = await asyncio.to_thread(lambda: [call.with_payloads() for call in calls])
        project = request.match_info.get("project", "default")
        return _json({"project_id": project, "total_traces": len(traces), "traces": traces})

    def _end_dropped(self) -> None:
        for session in self.store.dropped():
            ending = asyncio.ensure_future(session.end("dropped"))
            self._ending.add(ending)
            ending.add_done_callback(self._ending.discard)


def _tags(request: web.Request) -> list[str]:
    return request.query.getall("tags", [])


def _depart(session: Session, path: str) -> None:
    """Put on record that the model's address, which completion_params name, is not asked.

    Raises:
        CallError: the run is strict.
    """
    encoded = path.rpartition("/")[2]
    try:
        url = base64.urlsafe_b64decode(encoded).decode()
    except (binascii.Error, ValueError):
        url = encoded
    shown = rollout.redact_params({"base_url": url})["base_url"]
    if session.settings.strict:
        raise CallError(
            f"completion_params name the base_url {shown!r}, and this gateway samples where it was "
            "started for: leave it out",
            param="base_url",
        )
    session.depart(Departure(field="base_url", asked=shown, used=None))


def _json(body: Any) -> web.Response:
    return web.Response(body=msgspec.json.encode(body), content_type="application/json")
