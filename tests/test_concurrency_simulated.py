"""The adaptive limit against the best fixed one, on simulated servers of several shapes.

Every run lasts 240 times as long as one completion takes alone: two hours of completions of half a
minute. That includes finding the limit from 16 on. Where the best fixed limit makes each completion
take 22 times as long, as it does where throughput saturates slowly, the run is four times as long
too. The best fixed limit comes from the shape's own
formula, and a sweep in the simulator confirms the formula.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest

from eval_protocol_rft.sampling._adaptive import AdaptiveLimit
from eval_protocol_rft.sampling._limits import (
    CircuitBreaker,
    ConcurrencyLimit,
    FixedLimit,
    RetryBudget,
    RunLimits,
)
from tests.simulation import Result, Server, Simulation

ALONE = 25.0
"""Tokens per second of a request that has the server for itself."""
SECONDS = 2400.0
HALF = SECONDS / 2
HIGHEST = 256
WITHIN = 0.9


def flat(knee: float) -> Callable[[float], float]:
    """As fast for `knee` requests as for one; more share the same sum."""
    return lambda n: ALONE * min(n, knee)


def saturating(half: float) -> Callable[[float], float]:
    """Each request slows the others down a little; half of the best sum at `half`."""
    return lambda n: ALONE * n / (1 + n / half)


def collapsing(knee: float, power: float) -> Callable[[float], float]:
    """As `flat`, but beyond the knee the sum falls: the cache thrashes."""
    return lambda n: ALONE * (n if n <= knee else knee * (knee / n) ** power)


def even(random) -> int:
    return int(random.gauss(250, 50))


def long_tailed(random) -> int:
    """Mean 250, median 150, one in a hundred above 1500."""
    return min(4000, int(random.lognormvariate(math.log(150), 1.0)))


UNBOUNDED = flat(math.inf)
UP, DOWN = [(HALF, 4.0)], [(HALF, 0.25)]
SHAPES = {
    "flat": (Server(flat(32)), even),
    "flat and tiny": (Server(flat(3)), even),
    "saturating": (Server(saturating(12)), even),
    "collapsing": (Server(collapsing(32, 1.5)), even),
    "collapsing steeply": (Server(collapsing(32, 3.0)), even),
    "hard limit": (Server(UNBOUNDED, reject_above=50), even),
    "queue it tells of": (Server(UNBOUNDED, slots=32, tells_queue=True), even),
    "queue it is silent on": (Server(UNBOUNDED, slots=32), even),
    "flat, long tails": (Server(flat(32)), long_tailed),
    "collapsing, long tails": (Server(collapsing(32, 1.5)), long_tailed),
    "flat, scaled up": (Server(flat(16), scales=UP), even),
    "flat, scaled down": (Server(flat(64), scales=DOWN), even),
    "hard limit, scaled up": (Server(UNBOUNDED, reject_above=16, scales=UP), even),
    "hard limit, scaled down": (Server(UNBOUNDED, reject_above=64, scales=DOWN), even),
    "collapsing, scaled up": (Server(collapsing(16, 1.5), scales=UP), even),
    "collapsing, scaled down": (Server(collapsing(64, 1.5), scales=DOWN), even),
    "queue, scaled down": (Server(UNBOUNDED, slots=64, tells_queue=True, scales=DOWN), even),
}


def sample(
    server: Server,
    lengths,
    limit: ConcurrencyLimit,
    *,
    seconds: float = SECONDS,
    noise: float = 0.1,
) -> Result:
    limits = RunLimits(limit=limit, breaker=CircuitBreaker(), budget=RetryBudget(began=0.0))
    simulation = Simulation(
        server, limits, lengths=lengths, seconds=seconds, window=2 * HIGHEST, noise=noise
    )
    return simulation.run()


def best_fixed(server: Server) -> tuple[float, int]:
    """Tokens per second with the best fixed limit, by the server's own formula, and the limit."""

    def throughput(limit: int) -> float:
        changes = [(0.0, 1.0), *server.scales, (SECONDS, 0.0)]
        tokens = 0.0
        for (start, scale), (end, _) in itertools.pairwise(changes):
            n = min(limit, server.slots * scale, server.reject_above * scale)
            tokens += (end - start) * scale * server.tokens_per_second(n / scale)
        return tokens / SECONDS

    return max((throughput(limit), -limit) for limit in range(1, HIGHEST + 1))


@pytest.mark.parametrize("name", SHAPES)
def test_it_is_within_a_tenth_of_the_best_fixed_limit(name):
    server, lengths = SHAPES[name]
    best, _ = best_fixed(server)
    seconds = 4 * SECONDS if name == "saturating" else SECONDS
    result = sample(server, lengths, AdaptiveLimit(highest=HIGHEST), seconds=seconds)
    assert result.throughput >= WITHIN * best
    assert not result.failed
    assert result.stopped is None


@pytest.mark.parametrize("name", ["flat", "hard limit", "queue it tells of"])
def test_requests_whose_pace_differs_by_forty_percent_do_not_mislead_it(name):
    """Slow ones that happen to end together look like a server that has become slower."""
    server, lengths = SHAPES[name]
    best, _ = best_fixed(server)
    result = sample(server, lengths, AdaptiveLimit(highest=HIGHEST), noise=0.4)
    assert result.throughput >= 0.8 * best


@pytest.mark.parametrize("name", ["flat", "collapsing", "hard limit"])
def test_the_formula_for_the_best_fixed_limit_is_what_a_sweep_finds(name):
    server, lengths = SHAPES[name]
    best, limit = best_fixed(server)
    swept = {n: sample(server, lengths, FixedLimit(n), seconds=300) for n in (16, 32, 50, 64)}
    found = max(swept, key=lambda n: swept[n].tokens)
    assert swept[found].throughput == pytest.approx(best, rel=0.05)
    assert (
        swept[found].throughput
        >= 0.95 * sample(server, lengths, FixedLimit(-limit), seconds=300).throughput
    )


def test_a_hard_limit_costs_few_rejections():
    server, lengths = SHAPES["hard limit"]
    result = sample(server, lengths, AdaptiveLimit(highest=HIGHEST))
    assert result.rejected < 0.05 * len(result.starts)


def test_a_queue_that_the_server_tells_of_stays_short():
    server, lengths = SHAPES["queue it tells of"]
    result = sample(server, lengths, AdaptiveLimit(highest=HIGHEST))
    late = [limit for at, limit in result.limits if at > HALF]
    assert max(late, default=result.limits[-1][1]) <= 1.5 * server.slots
