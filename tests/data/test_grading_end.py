"""How grading ends when its process does: nothing is left behind, and nothing is said twice."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.data.grading_runs import is_gone
from tests.waiting import PATIENCE, wait_until

PROGRAM = """
# No `if __name__ == "__main__"`: workers import nothing of this.
import sys
from tests.data.grading_runs import grader, one_each
from eval_protocol_rft.scoring.executors import score_items

hang = "hang in C" if sys.argv[1:] == ["in C"] else "hang"
running = score_items(one_each(["a", hang, "b"]), grader("process_id"), workers=2, timeout=None)
print(int(next(running).results[0].reward), flush=True)
if sys.argv[1:] == ["leave"]:
    sys.exit()
next(running)
next(running)
"""
ROOT = Path(__file__).parents[2]


@pytest.fixture
def start(tmp_path):
    """Starts the program, in a process group as a terminal's, and waits until a call hangs."""
    (tmp_path / "program.py").write_text(PROGRAM)
    started = []
    begun = []

    def run(*arguments: str) -> tuple[subprocess.Popen[str], list[int]]:
        program = subprocess.Popen(
            [sys.executable, "program.py", *arguments],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            process_group=0,
        )
        started.append(program)
        assert program.stdout is not None
        workers = [int(program.stdout.readline())]
        if arguments != ("leave",):
            hanging = tmp_path / "hanging"
            wait_until(lambda: hanging.exists() and hanging.read_text())
            workers.append(int(hanging.read_text()))
        begun.extend(workers)
        return program, workers

    yield run
    for program in started:
        program.kill()
    for pid in begun:
        # A worker that lives on keeps the pipes of its program open.
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    for program in started:
        program.communicate()


def test_ctrl_c_ends_it_at_once_and_only_the_caller_says_so(start):
    program, workers = start()
    os.killpg(program.pid, signal.SIGINT)
    _, stderr = program.communicate(timeout=PATIENCE)
    assert program.returncode == -signal.SIGINT
    assert all(is_gone(pid) for pid in workers)
    assert stderr.count("Traceback") == 1
    assert stderr.rstrip().endswith("KeyboardInterrupt")


def test_a_caller_that_was_killed_leaves_no_worker_behind(zygote, tmp_path):
    file, hanging = tmp_path / "program.py", tmp_path / "hanging"
    file.write_text(PROGRAM)
    # Nothing else of that worker runs meanwhile.
    program = zygote.start(file, "in C", program="python", cwd=tmp_path)
    workers = [int(program.line())]
    wait_until(lambda: hanging.exists() and hanging.read_text())
    workers.append(int(hanging.read_text()))
    program.kill()
    assert all(is_gone(pid) for pid in workers)


def test_a_caller_that_leaves_a_run_open_can_end(start):
    program, workers = start("leave")
    _, stderr = program.communicate(timeout=PATIENCE)
    assert program.returncode == 0
    assert "Traceback" not in stderr
    assert all(is_gone(pid) for pid in workers)
