"""Many completions over a hostile server, and an account of every request.

    python -m tests.hostile.run --completions 20000 --seed 1 --through fanout

What is asked: is anything accepted that was not sampled, is anything lost or counted twice, is
anything left over? Server and client share this process, so memory and descriptors are of both.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import resource
import time
from collections import Counter
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any

from eval_protocol_rft.sampling._retry import RetryPolicy
from tests.hostile.ask import Ask, Client
from tests.hostile.book import GROUP, Book
from tests.hostile.clients import through_fanout, through_sampler
from tests.hostile.clients_of_rows import through_generate, through_processor
from tests.hostile.faults import FAULTS
from tests.hostile.ledger import Death, Plan
from tests.hostile.plan import FaultPlan
from tests.hostile.resources import Held, Memory, one_arena
from tests.hostile.server import HostileServer
from tests.hostile.settle import Account, settle

SHARE = 0.35
"""Of requests that a fault strikes. Some 40 % of the faults may pass, so a seventh of the attempts
is made again: within the budget of a run, which is a fifth. Those that concern the account
(401, 403, ...) strike one request in 60, so no streak of them ends a run as hopeless."""
COSTLY_WEIGHT = 0.2
"""How often faults that move many bytes strike, against 1 for the others."""
LONG_RUN = 10_000
"""Completions from which every fault must have struck and memory must be flat."""
EVALUATOR_EVERY = 0.1
"""Seconds between calls of an evaluator on the loop, on average."""
SLOW_SHARE = 0.02
"""Of these calls, those that take up to twice the patience; the others some milliseconds."""
BROKEN_SHARE = 0.01
"""Of requests, most that may be lost on a connection which the server ended at that moment."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a run came to."""

    account: Account
    seconds: float
    memory: Memory
    before: Held
    after: Held


CLIENTS: dict[str, Client] = {
    "sampler": through_sampler,
    "fanout": through_fanout,
    "processor": through_processor,
    "generate": through_generate,
}


def run(
    through: str,
    *,
    completions: int,
    seed: int,
    plan: Plan | None = None,
    patience: float = 2.0,
    in_flight: int = 64,
    deaths: int = 3,
    without: tuple[str, ...] = (),
    evaluator: bool = False,
    slow_share: float = SLOW_SHARE,
) -> Outcome:
    """Ask for `completions` in one of the ways of `CLIENTS`, and settle accounts.

    Args:
        through: whose client.
        completions: a multiple of `GROUP`.
        seed: of what is asked and, without a plan, of the faults.
        plan: which faults strike; None: all of them do.
        patience: seconds for one attempt.
        in_flight: most requests at once.
        deaths: how often the server dies.
        without: faults that the seed's plan leaves out.
        evaluator: run a synchronous one on the client's loop, which sleeps at random.
        slow_share: of its calls, those that outlast the patience.
    """
    if completions >= LONG_RUN:
        one_arena()
    assert completions % GROUP == 0, f"{completions} is no multiple of {GROUP}"
    book, memory, before = Book(completions, patience=patience), Memory(), Held.now()
    with HostileServer(
        plan=plan or _every_fault(seed, without),
        dialect="both",
        deaths=tuple(
            Death(after_requests=completions * (i + 1) // (deaths + 1), seconds=0.3)
            for i in range(deaths)
        ),
        on_final=book.saw,
    ) as server:
        ask = Ask(
            url=server.url,
            completions=completions,
            seed=seed,
            patience=patience,
            in_flight=in_flight,
            retry=RetryPolicy(base_seconds=0.02, cap_seconds=0.3),
        )
        began = time.monotonic()
        work = CLIENTS[through](ask, book)
        if evaluator:
            work = _beside_evaluator(work, random.Random(seed), patience, slow_share)
        left = asyncio.run(_watched(work, memory))
        seconds = time.monotonic() - began
        server.wait_until(lambda: server.open_connections == 0)
    account = settle(book)
    after = Held.now()
    account.problems += [f"left over: {task}" for task in left]
    account.problems += [f"left over: {what}" for what in after.more_than(before)]
    if account.broken > account.at_accept + deaths * in_flight + BROKEN_SHARE * account.requests:
        account.problems.append(f"{account.broken} attempts never arrived")
    if account.thrown_away:
        account.problems.append(f"{account.thrown_away} replies that had arrived were thrown away")
    if completions >= LONG_RUN:
        account.problems += [grown] if (grown := memory.growth()) else []
        account.problems += _never_struck(account, without)
    return Outcome(account=account, seconds=seconds, memory=memory, before=before, after=after)


def _every_fault(seed: int, without: tuple[str, ...]) -> FaultPlan:
    weights = {name: COSTLY_WEIGHT for name, fault in FAULTS.items() if fault.costly}
    weights |= dict.fromkeys(without, 0.0)
    return FaultPlan(seed=seed, share=SHARE, weights=weights)


async def _watched(work: Coroutine[Any, Any, None], memory: Memory) -> list[str]:
    """Do the work, and say which tasks it left behind."""
    watch = asyncio.create_task(memory.watch())
    try:
        await work
    finally:
        watch.cancel()
        await asyncio.wait([watch])
    return [str(task) for task in asyncio.all_tasks() - {asyncio.current_task()}]


async def _beside_evaluator(
    work: Coroutine[Any, Any, None], rng: random.Random, patience: float, slow_share: float
) -> None:
    """The work, and calls on its loop that block it, as evaluators do under Eval Protocol."""

    async def evaluate() -> None:
        while True:
            await asyncio.sleep(rng.expovariate(1 / EVALUATOR_EVERY))
            slow = rng.random() < slow_share
            time.sleep(rng.uniform(0.5, 2) * patience if slow else rng.uniform(0, 0.02))  # noqa: ASYNC251

    evaluating = asyncio.create_task(evaluate())
    try:
        await work
    finally:
        evaluating.cancel()
        await asyncio.wait([evaluating])


def _never_struck(account: Account, without: tuple[str, ...]) -> list[str]:
    return [
        f"{name} never struck"
        for name in FAULTS
        if not account.struck[name] and name not in without
    ]


def report(outcome: Outcome) -> None:
    """Print what came of a run."""
    account = outcome.account
    ended = account.accepted + account.failed.total()
    print(f"{ended} completions in {outcome.seconds:.1f} s")
    print(f"accepted {account.accepted}, failed {dict(account.failed.most_common())}")
    print(
        f"{account.attempts} attempts + {account.cancelled} cancelled = {account.requests} requests"
        f" + {account.refused} refused + {account.broken} broken off unread"
    )
    print(
        f"{account.at_accept} faults at accept, late {account.late}, of these thrown away "
        f"{account.thrown_away}, crossed {account.crossed}"
    )
    print(f"{len(+account.struck - Counter(none=1 << 40))} of {len(FAULTS)} faults struck")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    quarters = ", ".join(f"{mib:.1f}" for mib in outcome.memory.quarters())
    print(f"memory held, by quarters: {quarters} MiB; peak {peak} MiB")
    print(f"before {outcome.before}, after {outcome.after}")
    for problem in account.problems[:20]:
        print("PROBLEM", problem[:400])
    print(f"{len(account.problems)} problems")


def main() -> None:
    # Read when Eval Protocol is imported: nothing is asked of any network but loopback.
    os.environ |= {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "EP_NO_UPLOAD": "1"}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--through", choices=CLIENTS, default="fanout")
    parser.add_argument("--completions", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--patience", type=float, default=2.0, metavar="SECONDS")
    parser.add_argument("--deaths", type=int, default=3)
    parser.add_argument("--evaluator", action="store_true", help="one that sleeps on the loop")
    parser.add_argument("--without", nargs="*", default=[], metavar="FAULT")
    options = parser.parse_args()
    outcome = run(
        options.through,
        completions=options.completions,
        seed=options.seed,
        patience=options.patience,
        deaths=options.deaths,
        without=tuple(options.without),
        evaluator=options.evaluator,
    )
    report(outcome)
    raise SystemExit(bool(outcome.account.problems))


if __name__ == "__main__":
    main()
