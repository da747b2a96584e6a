"""Graders that do to the machine what code does that a model wrote; which one, says the completion.

Each process that they leave behind writes its id into the file LEFT first, so that a test can tell
whether it is gone.
"""

import asyncio
import ctypes
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from eval_protocol.models import EvaluationRow

from tests.scored_rows import said


def remember(pid: int) -> None:
    with Path(os.environ["LEFT"]).open("a") as file:
        file.write(f"{pid}\n")


def fork_and_come_back() -> None:
    """Both go on."""
    os.fork()


def fork_many_and_come_back() -> None:
    for _ in range(3):
        os.fork()


def fork_past_python() -> None:
    """No hook of Python hears of it."""
    ctypes.CDLL(None).fork()


def fork_and_stay() -> None:
    if os.fork() == 0:
        remember(os.getpid())
        time.sleep(600)


def fork_and_write() -> None:
    """The child writes into what it has while others are graded."""
    if os.fork() == 0:
        remember(os.getpid())
        while True:
            write_into_every_descriptor()
            time.sleep(0.02)


def leave_a_daemon() -> None:
    """Two forks and a session of its own, as daemons do."""
    if (child := os.fork()) == 0:
        os.setsid()
        if os.fork() == 0:
            remember(os.getpid())
            time.sleep(600)
        os._exit(0)
    os.waitpid(child, 0)


def leave_a_program() -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    remember(child.pid)


def leave_a_program_in_its_own_session() -> None:
    child = subprocess.Popen(["sleep", "600"], start_new_session=True)  # noqa: S607
    remember(child.pid)


def leave_a_killer() -> None:
    """A child that kills its parent a little later."""
    parent = os.getpid()
    if os.fork() == 0:
        remember(os.getpid())
        time.sleep(0.05)
        os.kill(parent, signal.SIGKILL)
        os._exit(0)


def leave_a_thread_that_exits() -> None:
    threading.Timer(0.05, os._exit, [3]).start()


def leave_an_alarm() -> None:
    signal.setitimer(signal.ITIMER_REAL, 0.05)


def become_another_program() -> None:
    os.execv("/bin/true", ["true"])  # noqa: S606


def write_into_every_descriptor() -> None:
    for descriptor in range(3, 4096):
        try:
            os.set_blocking(descriptor, False)
            os.write(descriptor, b"hell" * 3)
        except OSError:
            continue


def write_and_hang() -> None:
    write_into_every_descriptor()
    time.sleep(600)


def close_every_descriptor() -> None:
    os.closerange(3, 4096)


def print_a_lot() -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.write("\x1b]0;PWNED\x07" + "\x9b31m" * 1000 + "\n")


def allocate() -> None:
    lump = bytearray(100_000_000)
    lump[::4096] = b"x" * len(lump[::4096])


def allocate_too_much() -> None:
    bytearray(1 << 62)


def work_in_processes() -> None:
    """What an honest grader does with `multiprocessing`, nested target and all."""
    queue = multiprocessing.get_context("fork").Queue()

    def answer() -> None:
        queue.put(7)

    process = multiprocessing.get_context("fork").Process(target=answer)
    process.start()
    assert queue.get(timeout=600) == 7
    process.join()


def kill_the_guard() -> None:
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(600)


def stop_the_guard_and_hang() -> None:
    os.kill(os.getppid(), signal.SIGSTOP)
    time.sleep(600)


HARMLESS = [
    fork_and_come_back,
    fork_many_and_come_back,
    fork_past_python,
    fork_and_stay,
    fork_and_write,
    leave_a_daemon,
    leave_a_program,
    leave_a_program_in_its_own_session,
    print_a_lot,
    allocate,
    work_in_processes,
]
"""After these a completion still gets its own reward."""
LATE = [leave_a_killer, leave_a_thread_that_exits, leave_an_alarm]
"""These too, unless they are the last thing that their worker does."""
DEADLY = {
    "os._exit": lambda: os._exit(0),
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "kill the group": lambda: os.killpg(0, signal.SIGKILL),
    "crash": lambda: ctypes.string_at(0),
    "exec": become_another_program,
    "write": write_into_every_descriptor,
    "close": close_every_descriptor,
    "too much": allocate_too_much,
    "kill the guard": kill_the_guard,
}
HANGING = {
    "sleep": lambda: time.sleep(600),
    "hang in C": lambda: ctypes.PyDLL(None).sleep(600),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "write and hang": write_and_hang,
}
MISDEEDS = {
    **{misdeed.__name__: misdeed for misdeed in [*HARMLESS, *LATE]},
    **DEADLY,
    **HANGING,
    "stop the guard": stop_the_guard_and_hang,
}


async def fork_in_a_task() -> None:
    async def task() -> None:
        os.fork()
        await asyncio.sleep(0)

    await asyncio.gather(task(), task())


async def leave_a_task() -> None:
    """It keeps the loop busy in small pieces."""

    async def task() -> None:
        while True:  # noqa: ASYNC110
            await asyncio.sleep(0.001)

    asyncio.get_running_loop().left = asyncio.ensure_future(task())


async def cancel_all() -> None:
    for task in asyncio.all_tasks():
        task.cancel()
    await asyncio.sleep(600)


async def stop_the_loop() -> None:
    asyncio.get_running_loop().stop()
    await asyncio.sleep(600)


async def exit_in_a_task() -> None:
    async def task() -> None:
        sys.exit(7)

    await asyncio.create_task(task())


async def never_end() -> None:
    while True:
        try:
            await asyncio.sleep(600)
        except asyncio.CancelledError:
            continue


ASYNC_HARMLESS = {"fork in a task": fork_in_a_task, "leave a task": leave_a_task}
ASYNC_DEADLY = {
    "cancel all": cancel_all,
    "stop the loop": stop_the_loop,
    "exit in a task": exit_in_a_task,
}
ASYNC_HANGING = {"never end": never_end, "wait": lambda: asyncio.sleep(600)}


def reward(text: str) -> float:
    """Another number for each text."""
    return float(sum((i + 1) * ord(c) for i, c in enumerate(text)))


def judge(row: EvaluationRow) -> float:
    """`misdeed #n`, or `fine #n`."""
    MISDEEDS.get(said(row).partition(" #")[0], lambda: None)()
    return reward(said(row))


async def judge_async(row: EvaluationRow) -> float:
    name = said(row).partition(" #")[0]
    misdeed = {**ASYNC_HARMLESS, **ASYNC_DEADLY, **ASYNC_HANGING}.get(name)
    if misdeed is not None:
        await misdeed()
    await asyncio.sleep(0.01)
    return judge(row)
