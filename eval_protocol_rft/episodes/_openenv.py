"""`OpenEnvEnvironment`: an environment behind a server of OpenEnv, played in messages.

Spoken is OpenEnv's own protocol over a WebSocket, where one connection is one session; so its
package, whose requirements rule out Eval Protocol's, need not be installed beside it.

Invariant: a session is opened once and closed once, and what the server says is wrong is an error
of the episode with the server's words.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import aiohttp

from eval_protocol_rft._errors import EvalProtocolRftError
from eval_protocol_rft._text import without_url_users
from eval_protocol_rft.episodes._environment import Step
from eval_protocol_rft.episodes._played import (
    Outcome,
    Parse,
    Played,
    Render,
    as_text,
    described,
)
from eval_protocol_rft.sampling import proxy_for

if TYPE_CHECKING:
    from eval_protocol.models import EvaluationRow, Message

_NO_ACTION = "VALIDATION_ERROR"


class OpenEnvError(EvalProtocolRftError, RuntimeError):
    """The server cannot be reached, or says that something is wrong."""

    def __init__(self, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        """The server's own word for what is wrong."""


class OpenEnvEnvironment(Played):
    """An environment behind a server of OpenEnv.

    The first observation is said behind the row's messages. The score is the sum of the rewards.
    A server allows as many sessions at once as it says (`max_concurrent_envs`, by default one):
    allow no more rollouts.

    Args:
        url: of the server, `http://...` or `ws://...`.
        render: the observation, a dict, as text; default its JSON.
        parse: an answer's text, or a tool call's arguments, as the action, a dict; a ValueError
            tells the model why it is none. Default the JSON object in the text, or the arguments.
        tool: name of a tool whose calls are the actions, with `schema`, the JSON schemas of the
            action's fields; None: answers in text are.
        schema: see `tool`.
        **options: for the environment's reset, beside `seed`.
    """

    def __init__(
        self,
        url: str,
        *,
        render: Render = as_text,
        parse: Parse | None = None,
        tool: str | None = None,
        schema: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        about = None
        if tool is not None:
            about = described(tool, "Act in the environment.", schema or {})
        super().__init__(parse=parse or _json_object, tool=about)
        scheme, separator, place = url.rstrip("/").partition("://")
        scheme = {"ws": "http", "wss": "https"}.get(scheme, scheme)
        if scheme not in ("http", "https") or not separator:
            shown = url.rpartition("@")[2]
            raise ValueError(f"{shown!r} is no URL of an OpenEnv server: http://HOST:PORT")
        self._url = f"{scheme}://{place}/ws"
        self._render, self._options = render, options
        self._client: aiohttp.ClientSession | None = None
        self._socket: aiohttp.ClientWebSocketResponse | None = None

    async def reset(self, row: EvaluationRow, *, group_seed: int) -> list[dict[str, Any]]:
        """Begin in the state that comes from `group_seed`."""
        self._client = aiohttp.ClientSession()
        try:
            self._socket = await self._client.ws_connect(
                self._url,
                max_msg_size=0,
                timeout=aiohttp.ClientWSTimeout(ws_close=5.0),
                proxy=proxy_for(self._url),
            )
        except (aiohttp.ClientError, OSError) as error:
            raise self._error(f"{self._url} cannot be reached: {error}") from error
        begun = await self._ask("reset", {"seed": group_seed, **self._options})
        return [{"role": "user", "content": self._render(begun.get("observation"))}]

    async def step(self, messages: Sequence[Message], assistant: Message) -> Step:
        """Take the actions of an answer."""
        turn = self._turn(assistant)
        for move in turn:
            try:
                after = await self._ask("step", move.action)
            except OpenEnvError as error:
                if error.code != _NO_ACTION:
                    raise
                move.problem = f"That is no action: {error}"
                continue
            reward = after.get("reward")
            move.outcome = Outcome(
                text=self._render(after.get("observation")),
                reward=None if reward is None else float(reward),
                done=bool(after.get("done")),
            )
        return self._step(turn)

    async def close(self) -> None:
        try:
            if self._socket is not None and not self._socket.closed:
                with contextlib.suppress(aiohttp.ClientError, OSError):  # the server went away
                    await self._socket.send_json({"type": "close"})
                await self._socket.close()
        finally:
            if self._client is not None:
                await self._client.close()

    def _error(self, message: str) -> OpenEnvError:
        """An error that goes on record, without the URL's user and password."""
        return OpenEnvError(without_url_users(message))

    async def _ask(self, kind: str, data: Any) -> dict[str, Any]:
        assert self._socket is not None  # noqa: S101 - reset opened it
        question = json.dumps({"type": kind, "data": data})
        try:
            await self._socket.send_str(question)
            reply = await self._socket.receive()
        except (aiohttp.ClientError, OSError) as error:
            raise self._error(f"{self._url} closed the session: {error}") from error
        if reply.type is not aiohttp.WSMsgType.TEXT:
            raise self._error(f"{self._url} closed the session: {reply.extra or reply.data}")
        answer = json.loads(reply.data)
        if answer.get("type") == "error":
            said = answer.get("data") or {}
            problems = "; ".join(
                f"{'.'.join(map(str, one.get('loc') or ()))}: {one.get('msg')}"
                for one in said.get("errors") or ()
            )
            raise OpenEnvError(problems or str(said.get("message")), said.get("code"))
        found: dict[str, Any] = answer.get("data") or {}
        return found


def _json_object(given: Any) -> dict[str, Any]:
    """The action that a tool call's arguments are, or the JSON object in a text."""
    if isinstance(given, dict):
        return given
    start, end = given.find("{"), given.rfind("}")
    try:
        found = json.loads(given[start : end + 1])
    except (ValueError, RecursionError) as error:
        raise ValueError(f"answer with a JSON object: {error}") from error
    if not isinstance(found, dict):
        raise ValueError("answer with a JSON object")
    return found
