"""`ep-rft generate` that is killed, stopped or out of disk loses nothing and asks nothing twice."""

from __future__ import annotations

import random
import signal
import subprocess
import threading
from pathlib import Path

import pytest

from eval_protocol_rft.data._dataset import RolloutDataset
from eval_protocol_rft.data._job_store import parts_folder
from tests.data.servers import (
    at,
    pairs,
    sampled,
    stored,
    succeed,
    texts,
    write_jsonl,
)
from tests.programs import Program, Zygote
from tests.stub_server import Hang, Held, Late, Seen, Status, StubServer
from tests.waiting import wait_until

PROMPTS, N = 50, 4


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("data") / "data.jsonl", texts(PROMPTS))


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "rollouts.parquet"


def slowly(seen: object) -> Late:
    return Late(random.uniform(0.005, 0.05))


def start(zygote: Zygote, data: Path, output: Path, *arguments: object, **limits: int) -> Program:
    return zygote.start("generate", data, "-o", output, "-n", N, *arguments, **limits)


def finish(zygote: Zygote, data: Path, output: Path, *arguments: object) -> Program:
    command = start(zygote, data, output, *arguments)
    assert command.wait() == 0, command.said
    assert not parts_folder(output).exists()
    return command


def asked(server: StubServer, since: int) -> list[tuple[tuple[int, ...], int]]:
    return [(seen.prompt, seen.seed) for seen in server.requests[since:]]


def on_disk(output: Path) -> set[tuple[tuple[int, ...], int]]:
    return {(tuple(row.prompt_ids), row.seed) for row in stored(output).values()}


@pytest.fixture(scope="module")
def whole(zygote: Zygote, data: Path, tokenizer_folder: Path) -> dict:
    """What a run that nothing happens to samples."""
    output = data.with_name("whole.parquet")
    with StubServer() as server:
        finish(zygote, data, output, *at(server, tokenizer_folder))
        assert len(server.requests) == PROMPTS * N
    return sampled(output)


@pytest.mark.parametrize("shuffle_seed", [None, 3])
def test_killed_at_any_moment_it_goes_on_with_exactly_what_is_missing(
    shuffle_seed, zygote, data, output, server, tokenizer_folder, whole
):
    server.script = slowly
    arguments = at(server, tokenizer_folder, shuffle_seed=shuffle_seed)
    for _ in range(4):
        before, begun = on_disk(output), len(server.requests)
        command = start(zygote, data, output, *arguments)
        # From before it has begun to when it is nearly done.
        enough = len(server.requests) + random.randrange(80)
        # It may be done sooner, when few are left.
        wait_until(lambda enough=enough: len(server.requests) >= enough or output.exists())
        killed = command.kill() == -signal.SIGKILL
        assert not before.intersection(asked(server, begun))
        assert before <= on_disk(output)
        if not killed:
            break
    before, begun = on_disk(output), len(server.requests)
    finish(zygote, data, output, *arguments)
    last = asked(server, begun)
    assert len(last) == len(set(last)) == PROMPTS * N - len(before)
    assert not before.intersection(last)
    assert sampled(output) == whole
    order = list(sampled(output))
    assert sorted(order) == pairs(PROMPTS, N)
    if shuffle_seed is None:
        assert order == pairs(PROMPTS, N)


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_stopped_it_says_where_things_are_and_has_stored_all_that_was_answered(
    number, status, zygote, data, output, server, tokenizer_folder, whole
):
    server.script = lambda seen: Hang() if len(server.requests) > 60 else None
    arguments = at(server, tokenizer_folder)
    command = start(zygote, data, output, *arguments)
    wait_until(lambda: server.outcomes().count("answered") == 60 and server.in_flight == 8)
    assert command.kill(number) == status
    assert command.said.splitlines() == [
        f"ep-rft: stopped. What was finished is in {parts_folder(output)}. The same command goes on"
    ]
    assert len(on_disk(output)) == 60
    # Nothing is left to be recovered.
    assert {path.name for path in parts_folder(output).iterdir()} == {"_lock", "job.sqlite"}
    server.script = lambda seen: None
    begun = len(server.requests)
    finish(zygote, data, output, *arguments)
    assert len(server.requests) - begun == PROMPTS * N - 60
    assert sampled(output) == whole


def test_a_limit_on_the_size_of_files_is_an_error_and_what_was_stored_is_safe(
    zygote, data, output, server, tokenizer_folder, whole
):
    arguments = at(server, tokenizer_folder)
    command = start(zygote, data, output, *arguments, RLIMIT_FSIZE=100_000)
    assert command.wait() == 1
    assert "File too large. What was stored is safe" in command.said
    assert "Traceback" not in command.said
    before, begun = on_disk(output), len(server.requests)
    assert before
    finish(zygote, data, output, *arguments)
    assert not before.intersection(asked(server, begun))
    assert sampled(output) == whole


def test_a_full_disk_is_an_error_and_what_was_stored_is_safe(
    zygote, data, tmp_path, server, tokenizer_folder, whole
):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=120k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small disk is not allowed here")
    try:
        output = disk / "rollouts.parquet"
        arguments = at(server, tokenizer_folder)
        command = start(zygote, data, output, *arguments)
        assert command.wait() == 1
        assert "No space left on device. What was stored is safe: make room" in command.said
        before, begun = on_disk(output), len(server.requests)
        assert before
        bigger = ["mount", "-o", "remount,size=4m", str(disk)]
        subprocess.run(bigger, check=True)
        finish(zygote, data, output, *arguments)
        assert not before.intersection(asked(server, begun))
        assert sampled(output) == whole
    finally:
        subprocess.run(["umount", str(disk)], check=True)  # noqa: S607


def test_a_second_process_is_refused_and_the_first_goes_on(
    zygote, data, output, server, tokenizer_folder, whole
):
    done = threading.Event()
    server.script = lambda seen: Held(done)
    arguments = at(server, tokenizer_folder, concurrency=4)
    first = start(zygote, data, output, *arguments)
    wait_until(lambda: server.in_flight == 4)
    second = start(zygote, data, output, *arguments)
    assert second.wait() == 1
    assert "another process is writing here" in second.said
    done.set()
    assert first.wait() == 0, first.said
    assert len(server.requests) == PROMPTS * N
    assert sampled(output) == whole


@pytest.mark.parametrize(
    ("status", "prompts"), [(401, 2), (401, 40), (400, 2), (400, 40), (503, 2)]
)
def test_where_nothing_succeeds_the_cause_is_one_line_and_the_exit_status_says_so(
    zygote, output, server, tokenizer_folder, status, prompts
):
    data = write_jsonl(output.with_name("few.jsonl"), texts(prompts))
    server.script = lambda seen: Status(status, {"error": {"message": "no"}})
    command = zygote.start(
        *("generate", data, "-o", output, *at(server, tokenizer_folder), "--max-attempts", 1)
    )
    assert command.wait() == 1, command.said
    assert len([line for line in command.said.splitlines() if f"HTTP {status}" in line]) == 1
    assert "Traceback" not in command.said


def test_what_is_stored_of_a_running_job_can_be_looked_at_from_the_first_completion_on(
    zygote, data, output, server, tokenizer_folder
):
    hanging = threading.Event()

    def first_alone(seen: Seen) -> Hang | None:
        if seen.place < 3:
            return None
        hanging.set()
        return Hang()

    server.script = first_alone
    command = start(zygote, data, output, *at(server, tokenizer_folder))
    hanging.wait()
    wait_until(lambda: len(stored(output)) == 3)
    assert len(RolloutDataset(output)) == 3
    assert "3 completions" in succeed("stats", output).stdout
    assert "not finished" in succeed("stats", output).stdout
    assert "not finished" in succeed("show", output).stderr
    assert "not finished" in succeed("show", parts_folder(output)).stderr
    page = output.with_suffix(".html")
    assert "3 completions" in succeed("report", output, "-o", page).stdout
    kept = output.with_name("kept.parquet")
    message = succeed("filter", output, "-o", kept, "--min-tokens", 1).stderr
    assert "its job is not finished" in message
    assert len(RolloutDataset(kept)) == 3
    nothing = zygote.start(
        *("filter", output, "-o", output.with_name("x.parquet"), "--min-tokens", 9999)
    )
    assert nothing.wait() == 1
    assert "nothing is left of 3 completions" in nothing.said
    assert "Traceback" not in nothing.said
    command.kill()
    server.script = lambda seen: None
    finish(zygote, data, output, *at(server, tokenizer_folder))
    assert len(RolloutDataset(output)) == PROMPTS * N
