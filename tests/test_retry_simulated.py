"""A run through outages: no herd when the server is back, back at work within a stated time, and
never more attempts than the budget says.

The server gives 64 requests 25 tokens/s each; a completion of 250 tokens takes 10 s, so 6.4
requests/s keep it busy.
"""

from __future__ import annotations

import math

import pytest

from eval_protocol_rft.sampling._adaptive import AdaptiveLimit
from eval_protocol_rft.sampling._limits import (
    LONGEST_PROBE_SECONDS,
    LONGEST_RAMP,
    OPEN_AFTER,
    SHORTEST_RAMP,
    CircuitBreaker,
    ConcurrencyLimit,
    FixedLimit,
    RetryBudget,
    RunLimits,
)
from eval_protocol_rft.sampling._retry import RetryPolicy
from eval_protocol_rft.sampling._types import ContractError, RefusedError
from tests.simulation import Result, Server, Simulation

SLOTS, ALONE, TOKENS = 64, 25.0, 250
BUSY = SLOTS * ALONE
"""Tokens per second of a busy server."""
DOWN, UP, END = 400.0, 700.0, 1100.0
HERD = 3
"""Requests in any 10 s after an outage, as a multiple of the most in 10 s before it."""
ASKED = 20.0
"""What the simulated server's `Retry-After` asks for."""

LIMITS = {
    "fixed": lambda: FixedLimit(SLOTS),
    "fixed at four times the best": lambda: FixedLimit(4 * SLOTS),
    "adaptive": lambda: AdaptiveLimit(highest=256),
}


def tokens_per_second(n: float) -> float:
    return ALONE * min(n, SLOTS)


def even(random) -> int:
    return int(random.gauss(TOKENS, 50))


def run(
    limit: ConcurrencyLimit,
    *,
    outages: list[tuple[float, float, str]] | None = None,
    budget: RetryBudget | None = None,
    seconds: float = END,
    patience: float = 1800.0,
    **options,
) -> tuple[Result, RunLimits]:
    limits = RunLimits(
        limit=limit,
        breaker=CircuitBreaker(patience_seconds=patience),
        budget=budget or RetryBudget(began=0.0),
    )
    server = Server(tokens_per_second, outages=outages or [])
    options = {"window": 1024, **options}
    return Simulation(server, limits, lengths=even, seconds=seconds, **options).run(), limits


def assert_within_budget(result: Result, limits: RunLimits) -> None:
    budget = limits.budget
    assert len(result.starts) == budget.attempts
    line = budget.burst + budget.extra_ratio * budget.first_attempts
    assert budget.retries <= line + budget.trickle_per_second * result.seconds


@pytest.fixture(params=["refused", "503", "503 retry-after"])
def how(request) -> str:
    return request.param


@pytest.fixture(params=LIMITS)
def limit(request) -> ConcurrencyLimit:
    return LIMITS[request.param]()


def test_an_outage_of_five_minutes_loses_no_completion_and_sends_no_herd(how, limit):
    result, limits = run(limit, outages=[(DOWN, UP, how)])

    assert not result.failed
    assert result.stopped is None
    assert_within_budget(result, limits)

    # Until it opens, at most twice the limit fails: those in flight, and those that follow them.
    opening = [at for at in result.starts if DOWN <= at < DOWN + 2]
    assert len(opening) <= 2 * 256 + OPEN_AFTER
    probes = [at for at in result.starts if DOWN + 2 <= at < UP]
    assert len(probes) <= 5 + (UP - DOWN) / min(LONGEST_PROBE_SECONDS, ASKED)

    before = result.most_starts_within(10.0, DOWN - 100, DOWN)
    assert result.most_starts_within(10.0, UP, END) <= HERD * before

    # The next probe, its completion among the first others, and the ramp.
    alone = 2 * TOKENS / ALONE
    back = UP + LONGEST_PROBE_SECONDS + alone + min(LONGEST_RAMP, max(SHORTEST_RAMP, alone))
    assert result.tokens_between(back, back + 100) >= 0.9 * BUSY * 100


def test_without_a_breaker_the_same_outage_would_cost_every_attempt():
    """That the outage is one: it takes what the breaker prevents."""
    limits = RunLimits(
        limit=FixedLimit(SLOTS),
        breaker=_NoBreaker(),
        budget=RetryBudget(burst=1e6, began=0.0),
    )
    server = Server(tokens_per_second, outages=[(10.0, 130.0, "refused")])
    result = Simulation(server, limits, lengths=even, seconds=130, window=256).run()
    assert len(result.failed) > 256


class _NoBreaker(CircuitBreaker):
    def ended(self, attempt, *, in_flight):
        pass


def test_a_deployment_that_scales_up_for_ten_minutes_is_waited_for():
    """Nothing has ever succeeded, and four completions are all there is."""
    result, _ = run(
        FixedLimit(4), outages=[(0.0, 600.0, "503")], jobs=4, policy=RetryPolicy(max_attempts=6)
    )
    assert result.completions == 4
    assert result.finished is not None
    assert result.finished <= 600 + LONGEST_PROBE_SECONDS + 40
    assert all(len([a for a in h if not a.probe]) <= 6 for h in result.histories)


def test_a_server_that_does_not_come_back_ends_the_run_with_one_error(limit):
    result, _ = run(limit, outages=[(DOWN, math.inf, "refused")], patience=300.0)
    assert result.stopped is not None
    at, reason = result.stopped
    assert DOWN + 300 <= at <= DOWN + 300 + LONGEST_PROBE_SECONDS + 1
    assert "no request succeeded for" in reason


@pytest.mark.parametrize(
    "error",
    [RefusedError("HTTP 401: no such key", status=401), ContractError("3 ids but 2 logprobs")],
    ids=["bad key", "contract"],
)
def test_a_lost_run_ends_before_it_has_spent_the_data_set(error, limit):
    result, _ = run(limit, error_rate=1.0, error=lambda _: error, jobs=100_000)
    assert result.stopped is not None
    assert str(error) in result.stopped[1]
    assert len(result.starts) <= 2 * 256


def test_a_key_that_expires_in_mid_run_spends_no_more_than_what_is_in_flight():
    """Completions accepted before go on arriving for 10 s and more."""
    expired: list[int] = []

    def error(name: int) -> RefusedError:
        expired.append(name)
        return RefusedError("HTTP 402: pay", status=402)

    server = Server(tokens_per_second)
    limits = RunLimits(
        limit=FixedLimit(SLOTS),
        breaker=CircuitBreaker(),
        budget=RetryBudget(began=0.0),
    )
    simulation = Simulation(server, limits, lengths=even, seconds=END, error=error)

    def expire() -> None:
        simulation.error_rate = 1.0

    simulation.at(100.0, expire)
    result = simulation.run()
    assert result.stopped is not None
    assert len(expired) <= SLOTS


@pytest.mark.parametrize("share", [0.05, 0.3])
def test_a_server_that_fails_at_random_gets_no_more_than_the_budget(share):
    budget = RetryBudget(began=0.0, extra_ratio=0.2, burst=20, trickle_per_second=0.05)
    result, limits = run(
        FixedLimit(SLOTS), error_rate=share, budget=budget, window=4 * SLOTS, seconds=600
    )
    assert_within_budget(result, limits)
    assert limits.breaker.state == "closed"
    assert result.completions > 0
    if share < 0.2 / 1.2:
        assert not result.failed
        assert result.throughput >= 0.9 * BUSY


def test_every_attempt_is_in_a_record():
    result, limits = run(
        FixedLimit(SLOTS), error_rate=0.1, jobs=500, outages=[(30.0, 60.0, "503")], seconds=5000
    )
    assert result.finished is not None
    assert len(result.histories) == 500
    assert sum(map(len, result.histories)) == len(result.starts) == limits.budget.attempts
