"""Commands whose standard streams are closed, or whose reader has gone while they work; and what
`generate` says before and while nothing comes in."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import threading
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest

from eval_protocol_rft.data import _progress as progress
from eval_protocol_rft.data._dataset import RolloutDataset
from eval_protocol_rft.data._progress import reporter
from tests.data.servers import at, ep_rft, texts, write_jsonl
from tests.stub_server import Seen, Status, StubServer
from tests.waiting import PATIENCE

PROGRAM = "from eval_protocol_rft.cli import app; app(prog_name='ep-rft')"


def test_a_job_needs_no_standard_streams_and_its_file_holds_nothing_that_was_printed(
    tmp_path: Path,
) -> None:
    data = write_jsonl(tmp_path / "data.jsonl", texts(2))
    output = tmp_path / "rollouts.parquet"
    command = [sys.executable, "-c", PROGRAM, "generate", data, "-o", output, "--max-tokens", "2"]
    closed = ["sh", "-c", 'exec "$0" "$@" <&- >&- 2>&-', *command, "--model", "local/arithmetic"]
    assert subprocess.run(closed, check=False).returncode == 0
    assert len(list(RolloutDataset(output).rows())) == 2


def test_progress_whose_reader_has_gone_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    read, write = os.pipe()
    with open(write, "w") as gone:
        monkeypatch.setattr(sys, "stderr", gone)
        with reporter("score", 9, show=True, every=0.0, opening="9 completions") as shown:
            os.close(read)
            for done in range(3):
                shown.update(done, detail="")
        os.dup2(os.open(os.devnull, os.O_WRONLY), write)


def test_a_bar_whose_terminal_has_gone_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    screen, terminal = pty.openpty()
    with open(terminal, "w") as gone:
        monkeypatch.setattr(sys, "stderr", gone)
        with reporter("score", 9, show=True, opening="9 completions") as shown:
            assert isinstance(shown, progress._Bar)
            os.close(screen)
            for done in range(3):
                shown.update(done, detail="")
        os.dup2(os.open(os.devnull, os.O_WRONLY), terminal)


def test_generate_says_first_what_it_will_do_and_then_that_it_waits(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_TOLD_EVERY", 0.001)
    # Half a minute passes between one look at the clock and the next.
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=count(0.0, 30.0).__next__))
    say, told = progress._say, threading.Event()

    def listen(line: str) -> None:
        say(line)
        if "retries" in line:
            told.set()

    def script(seen: Seen) -> Status | None:
        if seen.attempt == 1:
            return Status(503, b"overloaded", {"retry-after-ms": "1"})
        told.wait(PATIENCE)
        return None

    monkeypatch.setattr(progress, "_say", listen)
    data = write_jsonl(tmp_path / "data.jsonl", texts(3))
    output = tmp_path / "rollouts.parquet"
    with StubServer() as server:
        server.script = script
        arguments = [part for part in at(server, tokenizer_folder) if part != "--quiet"]
        result = ep_rft("generate", data, "-o", output, "-n", 2, *arguments)
        url = server.url
    first, *lines = result.stderr.splitlines()
    assert first == (
        f"6 completions to sample: 3 prompts x 2; from m at {url}/v1. Until all are there they lie "
        f"in {output}.parts, and the same command goes on after any stop"
    )
    waiting = [line for line in lines if line.startswith("generate: 0/6  0 tok/s")]
    assert any(line.endswith("(mostly unavailable 503)") for line in waiting), lines
