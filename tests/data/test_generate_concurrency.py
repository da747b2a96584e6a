"""Many completions in flight, never too many, none waiting for another, and little in memory."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from eval_protocol_rft.data._generate import agenerate
from eval_protocol_rft.data._job_store import parts_folder
from eval_protocol_rft.sampling._limits import RunStoppedError
from eval_protocol_rft.sampling._retry import RetryPolicy
from eval_protocol_rft.sampling._types import Completion, SamplingError, SamplingParams
from tests.data.servers import at, pairs, rows_by_pair, stored, succeed, texts, write_jsonl
from tests.rollouts import chat_tokenizer
from tests.stub_server import Late, Status
from tests.waiting import until

PARAMS = {"model": "m", "n": 4, "max_tokens": 8, "seed": 1}


class Gate:
    """A sampler whose completions end when they are let through."""

    def __init__(self) -> None:
        self.asked: list[int | None] = []
        self.in_flight = 0
        self.peak = 0
        self.answered = 0
        self.holds = lambda seed: False
        self.open = asyncio.Event()

    async def sample(
        self, prompt_ids: Sequence[int], params: SamplingParams, *, seed: int | None = None
    ) -> Completion:
        self.asked.append(seed)
        self.in_flight += 1
        self.peak = max(self.peak, self.in_flight)
        try:
            await (self.open.wait() if self.holds(seed) else asyncio.sleep(0))
        finally:
            self.in_flight -= 1
        self.answered += 1
        return Completion(token_ids=[64, 256], logprobs=[-0.5, -0.25], finish_reason="stop")

    async def aclose(self) -> None:
        pass


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "data.jsonl", texts(200))


async def generate(data: Path, sampler: Any, **options: Any) -> None:
    await agenerate(
        data,
        data.with_name("out.parquet"),
        PARAMS,
        sampler=sampler,
        tokenizer=chat_tokenizer(),
        **options,
    )


async def settled(gate: Gate) -> int:
    """How many were asked once no more come."""
    while True:
        before = len(gate.asked)
        await asyncio.sleep(0.1)
        if len(gate.asked) == before:
            return before


async def test_as_many_are_in_flight_as_allowed_and_never_more(data):
    gate = Gate()
    gate.holds = lambda seed: True
    run = asyncio.create_task(generate(data, gate, concurrency=13))
    await until(lambda: gate.in_flight == 13)
    assert await settled(gate) == 13
    gate.open.set()
    await run
    assert gate.peak == 13
    assert len(rows_by_pair(data.with_name("out.parquet"))) == 800


async def test_one_that_never_ends_holds_up_no_other_and_its_siblings_are_on_disk(data):
    gate = Gate()
    gate.holds = lambda seed: seed == gate.asked[0]
    output = data.with_name("out.parquet")
    run = asyncio.create_task(generate(data, gate, concurrency=8))
    await until(lambda: (len(gate.asked), gate.in_flight) == (800, 1))
    assert gate.peak == 8
    # Read as it would be after a crash; the process that writes goes on.
    await until(lambda: len(stored(output)) == 799)
    gate.open.set()
    await run
    assert list(rows_by_pair(output)) == pairs(200, 4)


async def test_what_waits_is_bounded_whatever_the_size_of_the_data_set(data):
    gate = Gate()
    gate.holds = lambda seed: True
    run = asyncio.create_task(generate(data, gate, concurrency=4))
    await until(lambda: gate.in_flight == 4)
    await settled(gate)
    assert len(asyncio.all_tasks()) < 2 * 4 + 256 + 10
    run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await run


async def test_what_was_answered_when_it_is_cancelled_is_stored(data):
    class Cancelling(Gate):
        async def sample(self, *args: Any, **kwargs: Any) -> Completion:
            if len(self.asked) == at_request:
                run.cancel()
            return await super().sample(*args, **kwargs)

    for at_request in (20, 300, 700):
        gate = Cancelling()
        run = asyncio.create_task(generate(data, gate, concurrency=16, overwrite=True))
        with pytest.raises(asyncio.CancelledError):
            await run
        assert gate.answered >= at_request - 16
        output = data.with_name("out.parquet")
        assert len(stored(output)) == gate.answered
        shutil.rmtree(parts_folder(output))


@pytest.mark.parametrize("milliseconds", [0, 2, 5, 10, 20, 40])
async def test_cancelled_while_the_file_is_made_everything_is_there(milliseconds, data):
    class Cancelling(Gate):
        async def sample(self, *args: Any, **kwargs: Any) -> Completion:
            if len(self.asked) == 799:
                asyncio.get_running_loop().call_later(milliseconds / 1000, run.cancel)
            return await super().sample(*args, **kwargs)

    run = asyncio.create_task(generate(data, Cancelling(), concurrency=16))
    with contextlib.suppress(asyncio.CancelledError):
        await run
    output = data.with_name("out.parquet")
    assert sorted(stored(output)) == pairs(200, 4)
    assert output.exists() != parts_folder(output).exists()
    gate = Gate()
    await generate(data, gate)
    assert not gate.asked
    assert list(rows_by_pair(output)) == pairs(200, 4)


async def test_a_bug_in_a_sampler_is_raised_as_it_is_and_the_others_are_stored(data):
    class Broken(Gate):
        async def sample(self, prompt_ids: Any, params: Any, *, seed: Any = None) -> Completion:
            if len(self.asked) >= 100:
                raise ZeroDivisionError("a bug")
            return await super().sample(prompt_ids, params, seed=seed)

    with pytest.raises(ZeroDivisionError, match="a bug"):
        await generate(data, Broken(), concurrency=8)
    assert 90 <= len(stored(data.with_name("out.parquet"))) <= 100


async def test_a_server_that_is_overloaded_throughout_ends_the_run(data):
    class Overloaded(Gate):
        async def sample(self, prompt_ids: Any, params: Any, *, seed: Any = None) -> Completion:
            self.asked.append(seed)
            raise SamplingError("HTTP 503: busy", kind="unavailable", status=503, retry_after=0.0)

    sampler = Overloaded()
    policy = RetryPolicy(max_attempts=2, base_seconds=0.0, max_seconds=3.0)
    with pytest.raises(RunStoppedError, match=r"no request succeeded for \d s.*503: busy"):
        await generate(data, sampler, concurrency=8, retry=policy)
    assert len(sampler.asked) <= 2 * (16 + 2 * 8 + 256)
    assert not stored(data.with_name("out.parquet"))


def test_prompts_follow_each_other_without_a_barrier_over_http(data, server, tokenizer_folder):
    """Every 20th takes 50 times as long; the others fill the places."""
    server.script = lambda seen: Late(0.5 if seen.place % 20 == 0 else 0.01)
    succeed("generate", data, "-o", data.with_name("o.parquet"), *at(server, tokenizer_folder))
    assert server.peak == 8
    # With a barrier behind every 8, each slow one would cost 0.5 s of all: 5 s in all.
    assert server.requests[-1].arrived - server.requests[0].arrived < 2.5


def test_what_a_server_answers_for_a_moment_is_tried_again(data, server, tokenizer_folder):
    server.script = lambda seen: Status(503, headers={}) if seen.attempt == 1 else None
    output = data.with_name("o.parquet")
    options = at(server, tokenizer_folder, limit=10)
    succeed("generate", data, "-o", output, *options)
    assert [row["attempts"] for row in rows_by_pair(output).values()] == [2] * 10


MEMORY = """
import sys, json
from pathlib import Path
from eval_protocol_rft.data import generate
from eval_protocol_rft.sampling import Completion
from tests.rollouts import chat_tokenizer

class Instant:
    async def sample(self, prompt_ids, params, *, seed=None):
        ids, logprobs = [64] * (TOKENS - 1) + [256], [-0.5] * TOKENS
        return Completion(token_ids=ids, logprobs=logprobs, finish_reason="stop")
    async def aclose(self):
        pass

TOKENS = int(sys.argv[1])
for data in sys.argv[2:]:
    generate(data, data + ".parquet", {"model": "m", "n": 8}, sampler=Instant(),
             tokenizer=chat_tokenizer())
    status = Path("/proc/self/status").read_text()
    print([line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")][0])
"""


def growth_in_megabytes(folder: Path, small: int, large: int, *, tokens: int) -> float:
    """By how much the peak of a process grows that first samples 8 completions for each of `small`
    prompts and then for each of `large` ones, so many tokens each."""
    files = []
    for prompts in (small, large):
        lines = [json.dumps({"prompt": f"question {i}"}) + "\n" for i in range(prompts)]
        files.append(folder / f"{prompts}.jsonl")
        files[-1].write_text("".join(lines))
    result = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tokens), *files],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    before, after = map(int, result.stdout.split())
    return (after - before) / 1024


def test_memory_does_not_grow_with_the_data_set(tmp_path):
    # 12,000 completions more, of 3 KB each and more, would be 36 MB.
    assert growth_in_megabytes(tmp_path, 1_000, 2_500, tokens=64) < 20


@pytest.mark.slow
def test_memory_does_not_grow_to_a_million_completions(tmp_path):
    assert growth_in_megabytes(tmp_path, 1_250, 125_000, tokens=64) < 100
