"""Many completions over a hostile server, and an account of every request.

    python -m tests.hostile.run --completions 20000 --seed 1

The client is `HttpSampler` with a retry loop of its own that is as simple as can be; what is asked
here is whether anything is accepted that was not sampled, lost, or counted twice.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import resource
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field

from eval_protocol_rft.endpoint import Endpoint
from eval_protocol_rft.sampling.http import HttpSampler
from eval_protocol_rft.sampling.types import Completion, SamplingError, SamplingParams, TokenIds
from tests.hostile.faults import FAULTS, TRANSIENT
from tests.hostile.plan import FaultPlan
from tests.hostile.replies import truth_of
from tests.hostile.server import Death, Entry, HostileServer

MAX_TOKENS = 64
GROUP = 4
"""Completions per prompt: siblings are the ones that a reply can be mistaken for."""
Key = tuple[tuple[int, ...], int]
End = Completion | SamplingError


@dataclass(slots=True)
class Account:
    """What came of a run."""

    accepted: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    """Completions without an end, by the last attempt's kind."""
    attempts: int = 0
    unseen: int = 0
    """Attempts that never reached the server as requests: refused, or cut at accept."""
    late: int = 0
    """Timeouts that no fault explains: the machine was too slow for the patience given."""
    struck: Counter[str] = field(default_factory=Counter)
    """Requests by the fault that met them."""
    problems: list[str] = field(default_factory=list)
    """Everything that must not be; empty after a good run."""


async def run(
    server: HostileServer,
    *,
    completions: int,
    in_flight: int = 64,
    attempts: int = 6,
    patience: float = 2.0,
    pause: float = 0.02,
    share_streamed: float = 0.5,
) -> Account:
    """Ask for `completions`, several per prompt; retry what is transient, and settle accounts.
    Seconds: `patience` for one attempt, `pause` before the second one and doubled for each more."""
    sampler = HttpSampler(Endpoint(f"{server.url}/v1"))
    numbers = iter(range(completions))
    ends: dict[Key, list[End]] = {}

    async def work() -> None:
        for number in numbers:
            prompt = TokenIds([7, 11, number // GROUP])
            streamed = (number * 0.618) % 1.0 < share_streamed
            params = SamplingParams(
                model="m", max_tokens=MAX_TOKENS, timeout=patience, stream=streamed
            )
            mine = ends[tuple(prompt), number] = []
            while not mine or (_may_pass(mine[-1]) and len(mine) < attempts):
                if mine:
                    await asyncio.sleep(pause * 2 ** len(mine))
                try:
                    mine.append(await sampler.sample(prompt, params, seed=number))
                except SamplingError as error:
                    mine.append(error)

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(in_flight):
                group.create_task(work())
    finally:
        await sampler.aclose()
    return _settle(ends, server.ledger)


def _may_pass(end: End) -> bool:
    return isinstance(end, SamplingError) and end.kind in TRANSIENT


def _settle(ends: dict[Key, list[End]], ledger: list[Entry]) -> Account:
    account = Account(struck=Counter(entry.fault or "none" for entry in ledger))
    seen: dict[Key, list[Entry]] = defaultdict(list)
    for entry in ledger:
        if entry.request is not None:
            seen[entry.request.prompt, entry.request.seed].append(entry)
    for key, mine in ends.items():
        account.attempts += len(mine)
        account.unseen += len(mine) - len(seen[key])
        if problem := _wrong(key, mine, seen[key]):
            account.problems.append(f"{key}: {problem}")
        if isinstance(mine[-1], Completion):
            account.accepted += 1
        else:
            account.failed[mine[-1].kind] += 1
    timeouts = sum(
        1 for mine in ends.values() for end in mine if getattr(end, "kind", "") == "timeout"
    )
    due = sum(1 for entry in ledger if entry.fault and "timeout" in FAULTS[entry.fault].sees)
    account.late = max(0, timeouts - due)
    if strangers := set(seen) - set(ends):
        account.problems.append(f"requests that nobody made: {strangers}")
    return account


def _wrong(key: Key, mine: list[End], entries: list[Entry]) -> str | None:
    """What is wrong with the attempts at one completion, against the server's own account."""
    if len(entries) > len(mine):
        return f"{len(entries)} requests for {len(mine)} attempts"
    last = mine[-1]
    if isinstance(last, Completion):
        truth = truth_of(*key, MAX_TOKENS)
        told = (tuple(last.token_ids), tuple(last.logprobs), last.finish_reason)
        if told != (truth.token_ids, truth.logprobs, truth.finish_reason):
            return f"accepted what was not sampled: {last}"
        if not entries or (entries[-1].fault and "accept" not in FAULTS[entries[-1].fault].sees):
            return f"accepted in spite of {entries[-1].fault if entries else 'no request'}"
    if not _matches(mine, entries):
        told = [end if isinstance(end, Completion) else f"{end.kind}: {end}" for end in mine]
        return f"{told} does not fit {[(entry.fault, entry.cut) for entry in entries]}"
    return None


def _matches(mine: list[End], entries: list[Entry]) -> bool:
    """Whether attempts and requests can be paired in order, each with what its fault allows.
    An attempt that never arrived has no request; it can only have broken off or timed out."""
    if not mine:
        return not entries
    kind = "accept" if isinstance(mine[0], Completion) else mine[0].kind
    broken = kind in ("connection", "timeout")
    if broken and _matches(mine[1:], entries):
        return True
    if not entries:
        return False
    fault = entries[0].fault
    fits = kind in (FAULTS[fault].sees if fault else ("accept",))
    # On a busy machine anything may be late; `Account.late` counts those.
    fits = fits or kind == "timeout" or (broken and entries[0].cut)
    return fits and _matches(mine[1:], entries[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--completions", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--dialect", choices=("fireworks", "vllm"), default="fireworks")
    parser.add_argument("--without", nargs="*", default=[], metavar="FAULT")
    options = parser.parse_args()
    deaths = tuple(
        Death(after_requests=options.completions * part // 4, seconds=0.3) for part in (1, 2, 3)
    )
    plan = FaultPlan(seed=options.seed, weights=dict.fromkeys(options.without, 0.0))
    with HostileServer(plan=plan, dialect=options.dialect, deaths=deaths) as server:
        began, before = time.monotonic(), len(os.listdir("/proc/self/fd"))
        account = asyncio.run(run(server, completions=options.completions))
        server.wait_until(lambda: server.open_connections == 0)
        gc.collect()
        print(f"{time.monotonic() - began:.1f} s, {account.attempts} attempts")
        print(f"accepted {account.accepted}, failed {dict(account.failed)}")
        print(f"never seen by the server: {account.unseen}, late: {account.late}")
        print(f"{len(account.struck)} kinds of fault")
        print(f"file descriptors: {before} before, {len(os.listdir('/proc/self/fd'))} after")
        print(f"peak memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10} MiB")
        for problem in account.problems[:20]:
            print("PROBLEM", problem)
        print(f"{len(account.problems)} problems")
    raise SystemExit(bool(account.problems))


if __name__ == "__main__":
    main()
