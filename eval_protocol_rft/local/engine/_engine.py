"""An engine of vLLM's that this process starts, waits for, samples from and stops.

Invariant: it is this process's alone: it listens on loopback, at a port that was free, and asks for
a key that nobody else has. It ends when this process does, in whatever way (`_beside`). Runs of
this process that name the same model share one; no two processes do.
"""

from __future__ import annotations

import atexit
import contextlib
import http.client
import json
import os
import platform
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from eval_protocol_rft import sampling
from eval_protocol_rft.local._placement import Placement
from eval_protocol_rft.local.engine import _beside, _command
from eval_protocol_rft.local.engine._command import VllmOptions
from eval_protocol_rft.local.models import NoSuchModelError, vllm_source
from eval_protocol_rft.sampling import Completion, RunStoppedError, SamplingError, SamplingParams

START_SECONDS = 1800.0
"""For an engine that neither answers nor ends: a large model on a slow disk takes minutes."""
GRACE_SECONDS = 5.0
"""From asking it to stop to killing it."""
_STOP_SECONDS = GRACE_SECONDS + 25.0
"""For the supervisor; a driver may take its time to give memory back."""
_LOOK_SECONDS = 0.25
_MODULE = "ep_rft_beside_vllm"
"""What `_beside` is called where vLLM imports it: a copy of it, alone in a folder."""
_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - folders in it are made by mkdtemp

_RUNNING: dict[sampling.Endpoint, Engine] = {}
_LOADED: dict[tuple[Any, ...], Engine] = {}
_LOADING = threading.Lock()


class Engine:
    """One server of vLLM's for one model. Made by `start` or `load_engine`."""

    def __init__(
        self, name: str, command: Sequence[str], *, port: socket.socket, key: str, folder: Path
    ) -> None:
        self.name = name
        """What requests call the model."""
        self.folder = folder
        """Its log; nobody else's."""
        number = port.getsockname()[1]
        if platform.system() != "Linux":
            port.close()
        self.endpoint = sampling.Endpoint(f"http://127.0.0.1:{number}/v1", key, source=name)
        sampling.never_proxy(f"127.0.0.1:{number}")
        self.ready: Future[None] = Future()
        """Done when it answers. Raises RunStoppedError where it never will."""
        # Else one who waits and is cancelled would cancel it for all others.
        self.ready.set_running_or_notify_cancel()
        self.sleeps = False
        """Whether it can give its memory back for a while."""
        self._port, self._key, self._number = port, key, number
        self._owner = os.getpid()
        self._stopping = threading.Lock()
        self._stopped = False
        self._weights: list[Path] = []
        self._command = command
        self._supervisor: subprocess.Popen[bytes]

    @classmethod
    def start(
        cls,
        model: str,
        *,
        options: VllmOptions | None = None,
        placement: Placement | None = None,
        trust_remote_code: bool = False,
        takes_weights: bool = False,
        sleeps: bool = False,
        show: bool | None = None,
    ) -> Engine:
        """Start one of its own. Returns at once: wait for `ready`.

        Args:
            model: folder, hub id, or what `local/...` names, with or without `vllm/`.
            options: of vLLM.
            placement: where to, and what it computes in; auto: on a CPU float32, on a GPU what its
                weights are in.
            trust_remote_code: let the model's folder run its own code.
            takes_weights: they are to be changed while it runs, by a trainer on the same device.
            sleeps: it is to give its memory back while they are trained, where it is on a GPU.
            show: how far it is, on stderr; None: where that is a terminal.

        Raises:
            RefusedError: there is no such model, or no vLLM.
        """
        chosen = options or VllmOptions()
        try:
            source = vllm_source(model)
        except NoSuchModelError as error:
            raise sampling.RefusedError(str(error)) from error
        vllm = _command.find_vllm(chosen.python)
        place = placement or Placement()
        dtype = _command.dtype_of(vllm, source, place)
        folder = Path(tempfile.mkdtemp(prefix="ep-rft-vllm-"))
        shutil.copyfile(_beside.__file__, folder / f"{_MODULE}.py")
        port, key = _hold_port(), secrets.token_urlsafe(32)
        command = _command.command_line(
            vllm,
            source,
            model,
            port=port.getsockname()[1],
            middleware=f"{_MODULE}.RequireKey",
            options=chosen,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            trains_beside=takes_weights,
            sleeps=sleeps,
        )
        engine = cls(model, command, port=port, key=key, folder=folder)
        engine.sleeps = sleeps and not vllm.is_cpu
        if takes_weights:
            engine._weights = _folders_for_weights()
        env = _command.environment(
            key, modules=folder, takes_weights=takes_weights, placement=place, env=os.environ
        )
        try:
            engine._run(env)
        except OSError as error:
            for made in (folder, *engine._weights):
                shutil.rmtree(made, ignore_errors=True)
            raise sampling.RefusedError(f"vLLM cannot be started for {model}: {error}") from error
        shown = sys.stderr.isatty() if show is None else show
        # A daemon: who does not want to wait any longer does not have to.
        threading.Thread(target=engine._wait, args=(shown,), name="vllm-start", daemon=True).start()
        return engine

    @property
    def log(self) -> Path:
        """What vLLM said."""
        return self.folder / "vllm.log"

    def weights_folder(self, size: int) -> Path:
        """Where to write `size` bytes of weights that it is to read: memory, where there is room,
        else the disk. It is gone when the engine is."""
        for folder in self._weights:
            if shutil.disk_usage(folder).free > 1.2 * size:
                return folder
        return self._weights[-1]

    def problem(self) -> str | None:
        """Why it answers no more; None while it does."""
        if self._stopped:
            return f"the engine of {self.name} was stopped"
        status = self._supervisor.poll()
        return None if status is None else self._reason(status)

    def stop(self) -> None:
        """End it, and wait until it is gone. Idempotent."""
        if os.getpid() != self._owner:
            return  # a fork of ours, which has no engine
        with self._stopping:
            failed = not self._stopped and self._supervisor.poll() is not None
            self._stopped = True
            _RUNNING.pop(self.endpoint, None)
            with contextlib.suppress(ProcessLookupError):
                self._supervisor.terminate()
            try:
                self._supervisor.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._supervisor.kill()
                self._supervisor.wait()
            if self._supervisor.returncode == -signal.SIGKILL:
                self._kill_group()
            self._port.close()
            for folder in self._weights:
                shutil.rmtree(folder, ignore_errors=True)
            if failed and self._log_text(1):  # which says why
                (self.folder / f"{_MODULE}.py").unlink(missing_ok=True)
                self._group_file.unlink(missing_ok=True)
            else:
                shutil.rmtree(self.folder, ignore_errors=True)

    def _run(self, env: dict[str, str]) -> None:
        settings = {
            "client": os.getpid(),
            "grace": GRACE_SECONDS,
            "folders": [str(self.folder), *map(str, self._weights)],
            "group": str(self._group_file),
        }
        with self.log.open("wb") as log:
            self._supervisor = subprocess.Popen(  # noqa: S603 - ours
                [
                    sys.executable,
                    "-I",
                    "-S",
                    _beside.__file__,
                    json.dumps(settings),
                    *self._command,
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=env,
                # Ctrl-C is for us: what is being sampled is wanted until we have decided.
                start_new_session=True,
            )
        _RUNNING[self.endpoint] = self

    @property
    def _group_file(self) -> Path:
        return self.folder / "group"

    def _kill_group(self) -> None:
        """Of vLLM's processes, which a supervisor that was killed leaves."""
        with contextlib.suppress(OSError, ValueError):
            os.killpg(int(self._group_file.read_text()), signal.SIGKILL)

    def _wait(self, shown: bool) -> None:
        progress = _Progress(self.name, shown)
        error: BaseException | None = None
        try:
            while error is None and not self._answers():
                if (problem := self.problem()) is not None:
                    error = RunStoppedError(problem)
                elif progress.seconds > START_SECONDS:
                    error = RunStoppedError(
                        f"vLLM did not answer for {self.name} within {START_SECONDS:g} s; the end "
                        f"of its log: {self._last_lines()}"
                    )
                else:
                    progress.tell(self._stage())
                    time.sleep(_LOOK_SECONDS)
        except Exception as unforeseen:  # noqa: BLE001 - raised by `ready`
            error = unforeseen
        progress.end(is_ready=error is None)
        if error is None:
            self.ready.set_result(None)
            return
        self.stop()
        self.ready.set_exception(error)

    def _answers(self) -> bool:
        """Whether it says that it serves the model, to whoever has the key."""
        connection = http.client.HTTPConnection("127.0.0.1", self._number, timeout=10)
        try:
            connection.request(
                "GET", "/v1/models", headers={"authorization": f"Bearer {self._key}"}
            )
            response = connection.getresponse()
            body = response.read(1 << 20)
            return response.status == 200 and json.loads(body)["data"][0]["id"] == self.name
        except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError):
            return False
        finally:
            connection.close()

    def _reason(self, status: int) -> str:
        said = _reasons(self._log_text()) or self._last_lines() or "it said nothing"
        ended = f"was killed by signal {status - 128}" if status > 128 else f"ended ({status})"
        return f"vLLM {ended} for {self.name}: {said} (its log: {self.log})"

    def _last_lines(self) -> str:
        lines = [line for line in map(_bare, self._log_text().splitlines()) if line]
        return " / ".join(lines[-_LAST_LINES:])

    def _stage(self) -> str:
        lines = [line for line in map(_bare, self._log_text(1 << 12).splitlines()) if line]
        return lines[-1] if lines else ""

    def _log_text(self, most: int = 1 << 20) -> str:
        try:
            with self.log.open("rb") as file:
                file.seek(max(0, self.log.stat().st_size - most))
                return file.read().decode(errors="replace")
        except OSError:
            return ""


_LAST_LINES = 5
_LONGEST_REASON = 400
"""Characters."""
_PREFIX = re.compile(
    r"^(\(\w[^)]*\) )?((INFO|WARNING|ERROR|DEBUG) [\d-]+ [\d:.]+ \[[^\]]*\] ?)?|\x1b\[[\d;]*m"
)
_ERROR = re.compile(r"^(?:[\w.]*(?:Error|Exception)\b|\s*Value error,).*")
_SAYS_NOTHING = re.compile(r"See root cause above|For further information visit|validation error")


def _bare(line: str) -> str:
    """Without who says it, and when."""
    return _PREFIX.sub("", _PREFIX.sub("", line)).strip()


def _reasons(log: str) -> str:
    """The errors that a log names, first ones first: later ones are consequences."""
    errors = [line for line in map(_bare, log.splitlines()) if _ERROR.match(line)]
    telling = [line for line in dict.fromkeys(errors) if not _SAYS_NOTHING.search(line)]
    return " / ".join(telling[:2])[:_LONGEST_REASON]


_LINE_EVERY = 30.0
"""Seconds, where stderr is no terminal."""


class _Progress:
    """One line of stderr, written anew; a line now and then where that is no terminal."""

    def __init__(self, name: str, shown: bool) -> None:
        self._name, self._shown = name, shown
        self._began = time.monotonic()
        self._text, self._next_line = "", 0.0
        self._on_terminal = sys.stderr.isatty()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began

    def tell(self, stage: str) -> None:
        room = max(20, shutil.get_terminal_size().columns - 1)
        self._write(f"vLLM starts for {self._name}, {self.seconds:.0f} s: {stage}"[:room])

    def end(self, *, is_ready: bool) -> None:
        self._write(f"vLLM is ready for {self._name}, {self.seconds:.0f} s\n" if is_ready else "")

    def _write(self, text: str) -> None:
        if not self._shown or text == self._text:
            return
        if self._on_terminal:
            sys.stderr.write("\r" + text.ljust(len(self._text)))
        elif self.seconds >= self._next_line or text.endswith("\n"):
            self._next_line = self.seconds + _LINE_EVERY
            sys.stderr.write(text.rstrip() + "\n")
        sys.stderr.flush()
        self._text = text


def _hold_port() -> socket.socket:
    """A free port of loopback, bound and not listened on. On Linux vLLM can bind it as well, as
    both allow it, and nobody who asks for any port gets it meanwhile; elsewhere it is let go."""
    holder = socket.socket()
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    holder.bind(("127.0.0.1", 0))
    return holder


def _folders_for_weights() -> list[Path]:
    folders = []
    if os.access(_SHARED_MEMORY, os.W_OK | os.X_OK):
        folders.append(Path(tempfile.mkdtemp(prefix="ep-rft-weights-", dir=_SHARED_MEMORY)))
    return [*folders, Path(tempfile.mkdtemp(prefix="ep-rft-weights-"))]


def load_engine(
    model: str,
    *,
    options: VllmOptions | None = None,
    placement: Placement | None = None,
    trust_remote_code: bool = False,
    show: bool | None = None,
) -> Engine:
    """The engine of a model: one per process and choices. Returns at once, where it has to be
    started too: wait for `ready`. As `Engine.start`; stopped when the process ends, or by
    `stop_engines`.

    Raises:
        RefusedError: there is no such model, or no vLLM.
    """
    options, placement = options or VllmOptions(), placement or Placement()
    choices = (os.getpid(), model, options, placement, trust_remote_code)
    with _LOADING:
        engine = _LOADED.get(choices)
        if engine is None or engine.problem() is not None:
            engine = _LOADED[choices] = Engine.start(
                model,
                options=options,
                placement=placement,
                trust_remote_code=trust_remote_code,
                show=show,
            )
        return engine


@atexit.register
def stop_engines() -> None:
    """Stop every engine of this process, and give their memory back. Those that are asked for
    afterwards are started anew."""
    for engine in list(_RUNNING.values()):
        engine.stop()


class EngineSampler(sampling.HttpSampler):
    """Samples from an engine over HTTP. One that has ended is not waited for."""

    knows_logprobs = True

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine.endpoint)
        self._engine = engine

    async def sample(
        self, prompt_ids: Sequence[int], params: SamplingParams, *, seed: int | None = None
    ) -> Completion:
        """As `HttpSampler.sample`.

        Raises:
            RunStoppedError: the engine has ended; the message says why.
        """
        try:
            return await super().sample(prompt_ids, params, seed=seed)
        except SamplingError as error:
            if error.kind not in ("connection", "unavailable"):
                raise
            problem = self._engine.problem()
            if problem is None:
                raise
            raise RunStoppedError(problem) from None


def sampler_at(endpoint: sampling.Endpoint) -> sampling.HttpSampler:
    """What samples from `endpoint`, an engine's or any other."""
    engine = _RUNNING.get(endpoint)
    return sampling.HttpSampler(endpoint) if engine is None else EngineSampler(engine)
