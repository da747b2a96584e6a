"""Agents as they are run: a function, a command line, or a rollout processor of Eval Protocol's.

Invariant: an agent knows a base URL and a key, and nothing else of who calls it. Whatever it does
(raise, exit, hang, block its event loop, leave processes behind) ends with its own rollout: each
function has a thread, each coroutine an event loop in one, each command a process group of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import inspect
import json
import logging
import os
import shutil
import signal
import tempfile
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval_protocol_rft import rollout, sampling
from eval_protocol_rft._text import text_of, well_formed_json
from eval_protocol_rft.episodes._calling import EnvironmentFaultError, call
from eval_protocol_rft.episodes.gateway._session import Session
from eval_protocol_rft.record import is_failure

if TYPE_CHECKING:
    from eval_protocol.models import EvaluationRow
    from eval_protocol.pytest.rollout_processor import RolloutProcessor
    from eval_protocol.pytest.types import RolloutProcessorConfig

OUTPUT_CHARACTERS = 4000
"""Of what a command printed, from its end, that go on record."""
_OUTPUT_BYTES = 1 << 20
"""That are held of it."""
_HTTP_CLIENTS = ("httpx", "httpx2")
"""They tell each request at INFO, which Eval Protocol has the root logger show."""
_GRACE_SECONDS = 2.0
"""For a command to end after SIGTERM."""

Finish = Callable[["Outcome"], Awaitable[Any]]
"""Called when an agent has ended, before what it worked in is taken away."""
Run = Callable[["EvaluationRow", Session, float, Finish], Awaitable[Any]]
"""Row, session and seconds in; what `Finish` says out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How an agent ended."""

    error: str | None = None
    """What went wrong; None where it returned."""
    is_late: bool = False
    """Whether its time was up."""
    metrics: Mapping[str, Any] = field(default_factory=dict)
    """Plain JSON: `returned` by a function; `exit_status` and `output` of a command."""


def runner_of(agent: Any, config: RolloutProcessorConfig | None, model: str) -> Run:
    """How to run `agent`.

    Raises:
        TypeError: it is nothing that can be run.
    """
    from eval_protocol.pytest.rollout_processor import RolloutProcessor

    if isinstance(agent, RolloutProcessor):
        if config is None:
            raise TypeError("a rollout processor runs under Eval Protocol")
        return _ProcessorAgent(agent, config, model)
    if isinstance(agent, Command):
        return agent.run
    if callable(agent):
        return _FunctionAgent(agent)
    raise TypeError(
        f"an agent is a function of (row, session), a command line or a RolloutProcessor, not a "
        f"{type(agent).__name__}"
    )


class _FunctionAgent:
    """A function of `(row, session)`."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._name = getattr(function, "__name__", type(function).__name__)
        for client in _HTTP_CLIENTS:
            if (logger := logging.getLogger(client)).level == logging.NOTSET:
                logger.setLevel(logging.WARNING)

    async def __call__(
        self, row: EvaluationRow, session: Session, seconds: float, finish: Finish
    ) -> Any:
        return await finish(await self._outcome(row, session, seconds))

    async def _outcome(self, row: EvaluationRow, session: Session, seconds: float) -> Outcome:
        own_loop = _OwnLoop(self._function)
        limit = sampling.Deadline(seconds)
        try:
            async with limit:
                returned = await call(
                    own_loop.run, row, session, what=f"{self._name}()", seconds=2 * seconds
                )
            return Outcome(metrics={} if returned is None else {"returned": _as_json(returned)})
        except TimeoutError:
            if not limit.expired():
                raise
            return Outcome(is_late=True)
        except EnvironmentFaultError as error:
            return Outcome(error=str(error))
        finally:
            own_loop.cancel()


class _OwnLoop:
    """Runs a function in its thread, and a coroutine that it returns in an event loop there, which
    a client that blocks it keeps from nobody else."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[Any] | None = None

    def run(self, *arguments: Any) -> Any:
        """In a thread."""
        returned = self._function(*arguments)
        if not inspect.isawaitable(returned):
            return returned

        async def main() -> Any:
            self._loop, self._task = asyncio.get_running_loop(), asyncio.current_task()
            return await returned

        try:
            return asyncio.run(main())
        except asyncio.CancelledError as error:
            raise RuntimeError("cancelled") from error

    def cancel(self) -> None:
        """Ask it to end."""
        if self._loop is not None and self._task is not None:
            with contextlib.suppress(RuntimeError):  # its loop has ended meanwhile
                self._loop.call_soon_threadsafe(self._task.cancel)


def _as_json(value: Any) -> Any:
    """What an agent returned, as the record holds it: plain JSON, or its text."""
    try:
        return well_formed_json(json.loads(json.dumps(value, allow_nan=False)))
    except (TypeError, ValueError, RecursionError):
        return text_of(value)[:OUTPUT_CHARACTERS]


class Command:
    """A command line as an agent, in any language.

    It is given `OPENAI_BASE_URL`, `OPENAI_API_KEY`, `ANTHROPIC_BASE_URL`, `ANTHROPIC_API_KEY`, and
    `RFT_ROW`, the path of a file with the row as JSON. In its arguments `{prompt}` is the text of
    the row's last user message.

    Args:
        arguments: the program and its arguments; no shell.
        cwd: folder that it runs in; None: an empty one of its own, which is removed afterwards.
        env: further environment variables.
    """

    def __init__(
        self,
        arguments: Sequence[str | os.PathLike[str]],
        *,
        cwd: str | os.PathLike[str] | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        if isinstance(arguments, str) or not arguments:
            raise ValueError(
                'a command line is a list of a program and its arguments: ["node", "agent.mjs"]'
            )
        self.arguments = [os.fspath(argument) for argument in arguments]
        self.cwd = None if cwd is None else Path(cwd)
        if self.cwd is not None and not self.cwd.is_dir():
            raise ValueError(f"cwd: there is no folder {str(self.cwd)!r}")
        program = self.arguments[0]
        where = os.path.join(self.cwd or "", program) if os.sep in program else program
        if shutil.which(where) is None:
            raise ValueError(f"there is no program {program!r} on this machine")
        # Relative files would be looked for in the command's own folder.
        if self.cwd is None:
            self.arguments = [
                os.path.abspath(one) if os.path.isfile(one) else one for one in self.arguments
            ]
        self.env = dict(env or {})

    async def run(
        self, row: EvaluationRow, session: Session, seconds: float, finish: Finish
    ) -> Any:
        """Run it for a row, and end all that it started; its folder is there until `finish` is
        done, as `folder` in the metrics."""
        with tempfile.TemporaryDirectory(prefix="rft-agent-", ignore_cleanup_errors=True) as own:
            row_file = Path(own) / "row.json"
            row_file.write_text(row.model_dump_json(exclude_none=True), encoding="utf-8")
            folder = self.cwd or Path(own) / "work"
            folder.mkdir(exist_ok=True)
            inherited = {k: v for k, v in os.environ.items() if k not in _OTHER_KEYS}
            ours, theirs = os.pipe()  # asyncio's own waits until all who have it have closed it
            try:
                prompt = _prompt_of(row)
                process = await asyncio.create_subprocess_exec(
                    *(argument.replace("{prompt}", prompt) for argument in self.arguments),
                    cwd=folder,
                    env={**inherited, **self.env, **_addresses(session), "RFT_ROW": str(row_file)},
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=theirs,
                    stderr=asyncio.subprocess.STDOUT,
                    start_new_session=True,
                )
            except (OSError, ValueError) as error:  # a prompt too long for an argument, or with \0
                os.close(ours)
                return await finish(Outcome(error=f"cannot start {self.arguments[0]}: {error}"))
            finally:
                os.close(theirs)
            return await finish(await self._outcome(process, ours, seconds, folder))

    async def _outcome(
        self, process: asyncio.subprocess.Process, stdout: int, seconds: float, folder: Path
    ) -> Outcome:
        output = _Tail(_OUTPUT_BYTES)
        limit = sampling.Deadline(seconds)
        try:
            async with limit:
                await _read_until_exit(process, stdout, output)
        except TimeoutError:
            if not limit.expired():
                raise
        finally:
            await _end_group(process)
        metrics = {
            "exit_status": process.returncode,
            "output": output.text()[-OUTPUT_CHARACTERS:],
            "folder": str(folder),
        }
        if limit.expired():
            return Outcome(is_late=True, metrics=metrics)
        if process.returncode:
            error = f"{self.arguments[0]} ended with status {process.returncode}"
            return Outcome(error=error, metrics=metrics)
        return Outcome(metrics=metrics)


_OTHER_KEYS = frozenset({"ANTHROPIC_AUTH_TOKEN", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID"})
"""Of the user's own account: clients would send them along, or in place of the session's key."""


def _addresses(session: Session) -> dict[str, str]:
    return {
        "OPENAI_BASE_URL": session.base_url,
        "OPENAI_API_BASE": session.base_url,
        "OPENAI_API_KEY": session.api_key,
        "ANTHROPIC_BASE_URL": session.anthropic_url,
        "ANTHROPIC_API_KEY": session.api_key,
    }


class _Tail:
    """The last bytes of a stream."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._bytes = bytearray()

    def add(self, more: bytes) -> None:
        self._bytes += more
        del self._bytes[: max(0, len(self._bytes) - self._most)]

    def text(self) -> str:
        return self._bytes.decode(errors="replace")


async def _read_until_exit(process: asyncio.subprocess.Process, stdout: int, output: _Tail) -> None:
    """Read what it prints until it ends; what processes that it leaves behind print is not waited
    for. Closes `stdout`."""
    reader = asyncio.StreamReader()
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(stdout, "rb", 0)
    )
    reading = asyncio.ensure_future(_read(reader, output))
    try:
        await process.wait()
        await asyncio.wait({reading}, timeout=0.2)
    finally:
        transport.close()
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)


async def _read(stdout: asyncio.StreamReader, output: _Tail) -> None:
    while more := await stdout.read(1 << 16):
        output.add(more)


def _prompt_of(row: EvaluationRow) -> str:
    """The text of the row's last user message.

    Raises:
        PromptError: it holds more than text.
    """
    last = next((m for m in reversed(row.messages) if m.role == "user"), None)
    return "" if last is None else rollout.text_of(len(row.messages) - 1, last.content)


async def _end_group(process: asyncio.subprocess.Process) -> None:
    """End the command and all that it started, also where this is cancelled."""
    try:
        _signal(process, signal.SIGTERM)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), _GRACE_SECONDS)
    finally:
        _signal(process, signal.SIGKILL)
    await process.wait()


def _signal(process: asyncio.subprocess.Process, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


class _ProcessorAgent:
    """A rollout processor of Eval Protocol's, with its model calls through a session.

    Those that read `base_url` and `api_key` of the completion_params are given the session's.
    litellm reads neither for Eval Protocol's own agent, so the model's name says it all: its
    provider `hosted_vllm` finds the gateway in the environment, and the gateway finds the session
    in the name. One name for each session also keeps litellm's cache, which Eval Protocol turns on,
    from answering one rollout with another's completion.
    """

    def __init__(
        self, processor: RolloutProcessor, config: RolloutProcessorConfig, model: str
    ) -> None:
        self._processor, self._config, self._model = processor, config, model

    async def __call__(
        self, row: EvaluationRow, session: Session, seconds: float, finish: Finish
    ) -> Any:
        return await finish(await self._outcome(row, session, seconds))

    async def _outcome(self, row: EvaluationRow, session: Session, seconds: float) -> Outcome:
        params = {
            **{k: v for k, v in (self._config.completion_params or {}).items() if k in _PASSED},
            "model": f"hosted_vllm/{session.model_name(self._model)}",
            "base_url": session.base_url,
            "api_key": session.api_key,
        }
        row.input_metadata.completion_params = dict(params)
        kwargs = dict(self._config.kwargs or {})
        if type(self._processor).__name__ == "MCPGymRolloutProcessor":
            kwargs.setdefault("server_mode", "shared")  # one server for all, on its one port
        config = replace(
            self._config,
            completion_params=params,
            semaphore=asyncio.Semaphore(1),
            kwargs=kwargs,
        )
        limit = sampling.Deadline(seconds)
        try:
            async with limit:
                os.environ.update(
                    HOSTED_VLLM_API_BASE=session.shared_url, HOSTED_VLLM_API_KEY=session.shared_key
                )
                processor = _with_session_model(self._processor, session, self._model)

                async def run() -> list[EvaluationRow]:
                    return list(await asyncio.gather(*processor([row], config)))

                name = type(self._processor).__name__
                rows = await call(run, what=name, seconds=2 * seconds)
        except TimeoutError:
            if not limit.expired():
                raise
            return Outcome(is_late=True)
        except EnvironmentFaultError as error:
            return Outcome(error=str(error))
        failed = next((one for one in rows if is_failure(one.rollout_status.code)), None)
        return Outcome(error=None if failed is None else failed.rollout_status.message)


_PASSED = frozenset({"temperature", "top_p", "max_tokens", "stop", "reasoning_effort", "stream"})
"""Of completion_params; the rest is ours, or of the sampler's."""


def _with_session_model(
    processor: RolloutProcessor, session: Session, model: str
) -> RolloutProcessor:
    """Pydantic AI's agents have a model object that was made before any session: it is made anew
    with the session's address."""
    make_agent = getattr(processor, "_setup_agent", None)
    if make_agent is None:
        return processor

    def with_model(config: Any) -> Any:
        from pydantic_ai.providers.openai import OpenAIProvider

        agent = copy.copy(make_agent(config))  # it may be one that all rollouts share
        if agent.model is None or isinstance(agent.model, str):
            raise TypeError(
                f"the model of the Pydantic AI agent is {agent.model!r}: give it one of "
                "OpenAIChatModel or OpenAIResponsesModel, which is then sent to the session"
            )
        provider = OpenAIProvider(base_url=session.base_url, api_key=session.api_key)
        agent.model = type(agent.model)(model, provider=provider, settings=agent.model.settings)
        return agent

    other = copy.copy(processor)
    other._setup_agent = with_model  # type: ignore[attr-defined]
    return other
