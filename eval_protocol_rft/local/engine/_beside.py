"""What of this package runs outside of its own process: beside vLLM, and inside it. Run as a
program it is the engine's supervisor; imported by vLLM (`--middleware`) it asks for the key.

Invariant: vLLM ends when the process that wanted it does, however that ends, and with it all that
it has started; what is left of neither is a process, or a folder. Nobody without the key reaches
any of its addresses: of itself vLLM asks for it below `/v1` alone, and answers whoever is on this
machine where weights are changed.

The standard library only: vLLM may live in another environment than this package.
"""

from __future__ import annotations

import contextlib
import ctypes
import hmac
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

KEY_VARIABLE = "VLLM_API_KEY"
"""vLLM's own: it is on no command line, which others may read."""
LOOK_SECONDS = 0.2
"""Between two looks at whether the process that wanted the engine is there. Its number as our
parent says so, and no signal: those of Linux belong to the thread that asked, and come when that
ends; and a pipe stays open in whatever the process forked."""
_TO_END_SECONDS = 2.0
_SUBREAPER, _DEATH_SIGNAL = 36, 1
"""PR_SET_CHILD_SUBREAPER and PR_SET_PDEATHSIG of Linux's prctl."""


_CHILDREN_COME_TO_US = platform.system() == "Linux"


def main(arguments: list[str]) -> int:
    """Run a command until it ends, or the process `client` does, or SIGTERM comes.

    Args:
        arguments: JSON of `client` (a process id), `grace` (seconds from SIGTERM to SIGKILL),
            `folders` (gone at the end, where the client is) and `group` (a file that gets the
            number of the command's process group); then the command.
    """
    settings: dict[str, Any] = json.loads(arguments[0])
    stopping: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, _: stopping.append(number))
    _prctl(_SUBREAPER)
    command = subprocess.Popen(  # noqa: S603 - made by `_command`
        arguments[1:],
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=_die_with_parent,  # noqa: PLW1509 - there is one thread
    )
    with open(settings["group"], "w") as file:
        file.write(str(command.pid))
    while command.poll() is None and not stopping and os.getppid() == settings["client"]:
        time.sleep(LOOK_SECONDS)
    status = command.poll()
    if status is None:
        _stop(command, settings["grace"])
    _end_group(command.pid)
    if os.getppid() != settings["client"]:
        for folder in settings["folders"]:
            shutil.rmtree(folder, ignore_errors=True)
    return 0 if status is None else status if status >= 0 else 128 - status


def _prctl(option: int, value: int = 1) -> None:
    """Where there is one; on other systems less is promised."""
    if _CHILDREN_COME_TO_US:
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _die_with_parent() -> None:
    """The supervisor may be killed too. It has one thread, so its thread's end is its own."""
    _prctl(_DEATH_SIGNAL, signal.SIGKILL)


def _stop(command: subprocess.Popen[bytes], grace: float) -> None:
    command.terminate()
    try:
        command.wait(grace)
    except subprocess.TimeoutExpired:
        command.kill()
        command.wait()


def _end_group(group: int) -> None:
    """vLLM's engine and its workers outlive the server that started them. They come to us when it
    ends; those that left its group as well. Who does not hear SIGTERM is killed, but not at once:
    Python's tracker gives shared memory back when the others are gone."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGTERM)
    deadline = time.monotonic() + _TO_END_SECONDS
    while True:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            break
        if pid == 0:
            if time.monotonic() > deadline:
                for child in _children():
                    os.kill(child, signal.SIGKILL)
            time.sleep(0.01)
    if not _CHILDREN_COME_TO_US:
        time.sleep(_TO_END_SECONDS)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(group, signal.SIGKILL)


def _children() -> list[int]:
    try:
        with open(f"/proc/self/task/{os.getpid()}/children") as file:
            return [int(number) for number in file.read().split()]
    except OSError:
        return []


Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
_BODY = b'{"error": {"message": "no API key, or a wrong one", "type": "Unauthorized", "code": 401}}'


class RequireKey:
    """ASGI middleware that lets through whoever shows the key, whatever they ask for."""

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        self._app = app
        self._word = b"Bearer " + os.environ[KEY_VARIABLE].encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope.get("headers") or ())
        shown = headers.get(b"authorization", b"")
        if scope["type"] == "lifespan" or hmac.compare_digest(shown, self._word):
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            start = {"type": "http.response.start", "status": 401}
            await send(start | {"headers": [(b"content-type", b"application/json")]})
            await send({"type": "http.response.body", "body": _BODY})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
