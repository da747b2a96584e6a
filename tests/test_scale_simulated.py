"""A bulk run at the size of a cluster, in simulated time: what it takes beside the bound, what a
death costs, and that the head's work grows with the completions and with nothing else."""

from __future__ import annotations

import pytest

from eval_protocol_rft.sampling import FixedLimit
from tests.simulated_cluster import Cluster, Outage, simulate

DISK = 1.0
"""Seconds that an append takes: many rows share one, as they do in a run of this size."""


class CountingLimit(FixedLimit):
    """Counts how often it is asked: about once for each look at whether a request may start."""

    asked = 0

    @property
    def limit(self) -> int:
        self.asked += 1
        return self._limit

    @limit.setter
    def limit(self, value: int) -> None:
        self._limit = value


@pytest.mark.parametrize("in_flight", [100, 400])
def test_an_outage_of_everything_costs_each_request_a_few_looks_however_many_wait(in_flight):
    limit = CountingLimit(in_flight)
    cluster = Cluster(nodes=4, mean_tokens=500, outages=[Outage(10, 70, range(4))])
    head = simulate(cluster, 6 * in_flight, lambda: limit, highest=in_flight, append_seconds=DISK)
    assert head.completions == 6 * in_flight
    assert head.attempts >= 7 * in_flight
    # To start, to be woken, and to see to the next: with all woken for each start it is thousands.
    assert limit.asked < 40 * head.attempts


def test_a_run_takes_little_longer_than_the_bound_and_nodes_that_die_cost_what_they_had():
    def run(*outages: Outage) -> float:
        cluster = Cluster(nodes=8, mean_tokens=500, outages=outages)
        head = simulate(cluster, 2400, lambda: FixedLimit(160), highest=160, append_seconds=DISK)
        assert (head.completions, head.failed, head.most_in_flight) == (2400, 0, 160)
        return head.seconds / (head.tokens / cluster.tokens_per_second(160))

    assert run() < 1.15
    # An eighth of the nodes is away for a third of the time.
    assert 1.0 < run(Outage(50, 110, range(1))) < 1.3


def test_a_head_that_is_killed_loses_what_was_in_flight_and_nothing_else():
    cluster = Cluster(nodes=4, mean_tokens=500)
    head = simulate(
        cluster,
        1200,
        lambda: FixedLimit(80),
        highest=80,
        append_seconds=DISK,
        dies_at=[60.0, 120.0],
        restart_seconds=30,
    )
    assert head.failed == 0
    # What had come and was not stored yet is sampled again.
    assert 1200 <= head.completions <= 1200 + 2 * 80


def test_what_an_outage_cut_off_comes_back_at_once_where_no_first_attempt_follows_to_pay_for_it():
    cluster = Cluster(nodes=4, mean_tokens=500, outages=[Outage(2, 10, range(4))])
    head = simulate(cluster, 1200, lambda: FixedLimit(1200), highest=1200, append_seconds=DISK)
    assert head.attempts > 2300
    # Its own time, the outage, backoff and the ramp after it; with 512 retries and one a second
    # more, the last of the 1,200 would begin after ten minutes.
    assert head.seconds < 300
