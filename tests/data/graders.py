"""Evaluators for the grading tests: what they do is told by the completion they are given."""

import asyncio
import atexit
import builtins
import ctypes
import gzip
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from pathlib import Path
from typing import IO

import pytest
from eval_protocol.models import EvaluateResult, EvaluationRow
from eval_protocol.pytest import evaluation_test

from eval_protocol_rft.scoring._scorer import score_each_completion
from tests.scored_rows import Canned, asked, give, said

NO_QUESTION = "?"
"""What is asked where a test has no need of it."""

calls = 0
waiting = 0
most_waiting = 0


def loop_forever() -> None:
    while True:
        pass


def leave_a_child_and_hang(file: str) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    Path(file).write_text(str(child.pid))
    child.wait()


MISDEEDS = {
    "loop": loop_forever,
    "sleep": lambda: time.sleep(600),
    "hang in C": lambda: ctypes.PyDLL(None).sleep(600),  # holds the interpreter lock
    "ignore signals": lambda: (signal.signal(signal.SIGTERM, signal.SIG_IGN), time.sleep(600)),
    "exit 0": lambda: os._exit(0),
    "exit 3": lambda: os._exit(3),
    "crash": lambda: ctypes.string_at(0),
    "be killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "sys.exit": lambda: sys.exit(7),
    "interrupt": lambda: (_ for _ in ()).throw(KeyboardInterrupt),
    "raise": lambda: {}["nothing"],
    "pytest.exit": lambda: pytest.exit("no judge, no use"),
}


def leave_the_folder() -> None:
    folder = tempfile.mkdtemp()
    os.chdir(folder)
    os.rmdir(folder)


def be_a_sandbox() -> None:
    """What sandboxes for code of models do in a process that they mean to be their own."""
    resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
    for name in ("kill", "fork", "remove", "rename", "rmdir", "unlink", "chdir", "getcwd"):
        setattr(os, name, None)
    shutil.rmtree = shutil.move = subprocess.Popen = None
    builtins.exit = builtins.quit = builtins.open = None
    sys.modules["subprocess"].run = None


def stop_the_clock() -> None:
    time.monotonic = time.time = lambda: 0.0


TAMPERING = {
    "leave the folder": leave_the_folder,
    "be a sandbox": be_a_sandbox,
    "stop the clock": stop_the_clock,
    "end late and leave the folder": lambda: (atexit.register(time.sleep, 600), os.chdir("/")),
    "be nobody": lambda: setattr(os, "getpid", None),
    "lie": lambda: setattr(builtins, "isinstance", lambda *_: True),
    "forget the environment": os.environ.clear,
    "limit recursion": lambda: sys.setrecursionlimit(sys.getrecursionlimit() // 8),
    "close what prints": lambda: (sys.stdout.close(), sys.stderr.close()),
    "block signals": lambda: signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 32)),
    "break models": lambda: setattr(EvaluationRow, "model_validate_json", None),
}
"""What is left as it is then, in the process that judges."""


def undisturbed(row: EvaluationRow) -> float:
    """1.0 where a grader finds all that it finds in a process of its own."""
    TAMPERING.get(said(row), lambda: None)()
    if said(row) in TAMPERING:
        return 1.0

    def deep(left: int) -> int:
        return left and deep(left - 1)

    try:
        print("judging")
        subprocess.run(["true"], check=True)  # noqa: S607
        found = Path("here").exists() and os.environ["KEPT"] == "yes" and time.time() > 1e9
        found = found and not isinstance(1, str) and deep(400) == 0 and len(bytearray(1 << 30))
        return float(bool(found and not signal.pthread_sigmask(signal.SIG_BLOCK, ())))
    except Exception:  # noqa: BLE001 - as graders do
        return 0.0


def length(row: EvaluationRow) -> float:
    """The number of characters, unless the completion is a misdeed."""
    MISDEEDS.get(said(row), lambda: None)()
    return float(len(said(row)))


def as_row(row: EvaluationRow) -> EvaluationRow:
    return give(row, float(len(said(row))), reason="counted")


def as_result(row: EvaluationRow) -> EvaluateResult:
    return EvaluateResult(score=float(len(said(row))), reason="counted")


def as_nothing(row: EvaluationRow) -> None:
    return None


def process_id(row: EvaluationRow) -> int:
    if said(row) in ("hang", "hang in C"):
        Path("hanging").write_text(str(os.getpid()))
        MISDEEDS.get(said(row), MISDEEDS["sleep"])()
    return os.getpid()


def process_id_in_a_while(row: EvaluationRow) -> int:
    time.sleep(0.05)
    return os.getpid()


def count_calls(row: EvaluationRow) -> int:
    global calls
    calls += 1
    return calls


def child_and_hang(row: EvaluationRow) -> float:
    leave_a_child_and_hang(said(row))
    return 1.0


files: list[IO[str]] = []
others: list[object] = []


def last_words(row: EvaluationRow) -> float:
    """Has something to do yet when its process ends, as loggers and clients have, and files open
    that hold back what was written to them."""
    atexit.register(Path("at exit").write_text, "done")
    files.append(open("in a file", "w"))  # noqa: SIM115
    files.append(gzip.open("in a compressed file", "wt"))  # noqa: SIM115
    for file in files:
        file.write("done")
    archive = zipfile.ZipFile("in an archive", "w")
    archive.writestr("what", "done")
    others.extend([archive, tempfile.NamedTemporaryFile(dir=".")])  # noqa: SIM115
    threading.Thread(
        target=lambda: (time.sleep(0.3), Path("in a thread").write_text("done"))
    ).start()
    return 1.0


def surroundings(row: EvaluationRow) -> float:
    return float(Path("answer.txt").read_text() == os.environ["GRADING_TEST_ANSWER"] == said(row))


def rank(rows: list[EvaluationRow]) -> list[EvaluationRow]:
    """Places by length, the longest first; returned in the order of the places."""
    by_length = sorted(rows, key=lambda row: -len(said(row)))
    return [give(row, float(place)) for place, row in enumerate(by_length)]


def rank_badly(rows: list[EvaluationRow]) -> list[EvaluationRow]:
    """Forgets the first, doubles the second."""
    return [give(row, 1.0) for row in (rows[1], *rows[1:])]


def under_test(mode: str, **options):
    return evaluation_test(
        input_rows=[[asked()]],
        completion_params=[{"model": "m"}],
        rollout_processor=Canned({}),
        mode=mode,
        **options,
    )


test_rank = under_test("groupwise")(rank)
test_rank_badly = under_test("groupwise")(rank_badly)
test_all = under_test("all")(rank)
test_decorated = under_test("pointwise")(score_each_completion(as_row))


@under_test("pointwise", evaluation_test_kwargs=[{"factor": 10}])
def test_scaled(row: EvaluationRow, factor: int) -> EvaluationRow:
    return give(row, float(factor * len(said(row))))


def fork_and_remember(file: Path) -> None:
    if child := os.fork():
        file.write_text(str(child))


def write_process_id(file: str) -> None:
    Path(file).write_text(str(os.getpid()))


async def in_a_task(misdeed, *arguments) -> None:
    async def task() -> None:
        misdeed(*arguments)
        await asyncio.sleep(0)

    await asyncio.create_task(task())


async def never_end() -> None:
    while True:
        try:
            await asyncio.sleep(600)
        except asyncio.CancelledError:
            continue


async def length_async(row: EvaluationRow) -> float:
    text = said(row)
    if text == "hang":
        try:
            await asyncio.sleep(600)
        except asyncio.CancelledError:
            if (file := row.messages[0].content) != NO_QUESTION:
                write_process_id(file)
            raise
    if text.startswith("wait"):
        await asyncio.sleep(0.02)
    if text == "block":
        time.sleep(600)  # noqa: ASYNC251 - others are called beside it
    if text.startswith("fork in a task "):
        await in_a_task(fork_and_remember, Path(text.rpartition(" ")[2]))
    elif text.startswith("fork "):
        fork_and_remember(Path(text.partition(" ")[2]))
        await asyncio.sleep(0)
    if text == "exit in a task":
        await in_a_task(os._exit, 5)
    if text == "exit soon":
        threading.Timer(0.03, os._exit, [3]).start()
    if text == "stop the loop":
        asyncio.get_running_loop().stop()
        await asyncio.sleep(600)
    if text == "cancel all":
        for task in asyncio.all_tasks():
            task.cancel()
        await asyncio.sleep(600)
    if text == "never end":
        await never_end()
    if text == "time out by itself":
        raise TimeoutError("the judge is slow")
    if text == "be cancelled":
        raise asyncio.CancelledError
    MISDEEDS.get(text, lambda: None)()
    return float(len(text))


async def most_at_once(row: EvaluationRow) -> int:
    """How many calls have been in flight together, at most, so far."""
    global waiting, most_waiting
    waiting += 1
    most_waiting = max(most_waiting, waiting)
    await asyncio.sleep(0.02)
    waiting -= 1
    return most_waiting


async def process_id_async(row: EvaluationRow) -> int:
    await asyncio.sleep(0.05)
    return os.getpid()


async def meet_eight_times(row: EvaluationRow) -> float:
    """Each ends when eight are here at the same time; the one that dies does so when they are."""
    global waiting
    dead = Path("dead")
    if said(row) == "exit 3":
        while waiting < 8 and not dead.exists():  # noqa: ASYNC110, ASYNC240
            await asyncio.sleep(0.01)
        dead.touch()  # noqa: ASYNC240
        os._exit(3)
    waiting += 1
    while waiting < 8 or not dead.exists():  # noqa: ASYNC110, ASYNC240
        await asyncio.sleep(0.01)
    return 1.0


async def rank_async(rows: list[EvaluationRow]) -> list[EvaluationRow]:
    await asyncio.sleep(0)
    return rank(rows)


test_rank_async = under_test("groupwise")(rank_async)
