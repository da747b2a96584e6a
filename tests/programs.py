"""Programs in processes of their own that start at once: no test waits for imports that it is not
about. What a test says of a new interpreter (imports, its exit) needs one, started as users do."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.waiting import wait_until

REPOSITORY = Path(__file__).parents[1]


@dataclass
class Program:
    """A running `ep-rft` or `pytest`, or a Python file."""

    zygote: Zygote
    pid: int
    out: Path
    err: Path
    status: int | None = None
    """Of a program that was waited for."""

    def send_signal(self, number: signal.Signals) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self, number: signal.Signals = signal.SIGKILL) -> int:
        self.send_signal(number)
        return self.wait()

    def poll(self) -> int | None:
        """Exit status (below 0: the signal that ended it), or None while it runs."""
        if self.status is None:
            self.status = self.zygote.ask({"wait": self.pid})
        return self.status

    def wait(self) -> int:
        wait_until(lambda: self.poll() is not None)
        assert self.status is not None
        return self.status

    @property
    def stdout(self) -> str:
        return self.out.read_text()

    @property
    def stderr(self) -> str:
        return self.err.read_text()

    @property
    def said(self) -> str:
        """All of it."""
        return self.stdout + self.stderr

    def line(self) -> str:
        """The first line that it prints."""
        wait_until(lambda: "\n" in self.stdout or self.poll() is not None)
        assert "\n" in self.stdout, self.said
        return self.stdout.splitlines()[0]


class Zygote:
    """Starts them, forked from a process that has imported what they need."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.started = 0
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.zygote"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=REPOSITORY,
        )

    def ask(self, request: Mapping[str, Any]) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps(request), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def start(
        self,
        *arguments: object,
        program: str = "ep-rft",
        env: Mapping[str, str] | None = None,
        cwd: Path = REPOSITORY,
        **limits: int,
    ) -> Program:
        """`env` is added to the environment of the tests; `limits` are those of `resource`."""
        self.started += 1
        out, err = (self.folder / f"{self.started}.{name}" for name in ("out", "err"))
        for file in (out, err):
            file.touch()
        pid = self.ask(
            {
                "program": program,
                "arguments": list(map(str, arguments)),
                "cwd": str(cwd),
                "env": {**os.environ, **(env or {})},
                "limits": limits,
                "out": str(out),
                "err": str(err),
            }
        )
        return Program(self, pid, out, err)

    def run(self, *arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
        """Start it and wait for its end."""
        program = self.start(*arguments, **options)
        return subprocess.CompletedProcess(
            arguments, program.wait(), program.stdout, program.stderr
        )

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()
