"""The numbers of `AdaptiveLimit`, each with its reason.

They come from simulated servers (`tests/test_concurrency_simulated.py`): throughput flat, slowly
saturating or collapsing beyond a knee, hard limits, queues, long-tailed lengths, a quarter or four
times the capacity in mid run. "Worst" and "mean" are over these 17 shapes, as shares of the best
fixed limit's throughput. With the numbers here the worst is 0.90 and the mean 0.96; one shape, the
slowly saturating one, has 0.88 until its run is as many completions long as the others'.

The pace of simulated requests differs by 10%. Where it differs by 40%, as with prompts of very
different lengths, trials are judged by more chance: 0.8 to 0.99 on most shapes, 0.55 to 0.85 on
those that collapse or change. A fixed limit is the better choice there, if one is known.
"""

START = 16
"""Keeps a small server busy, and is four doublings from 256."""

HIGHEST = 512
"""A bound where nobody gave one: sockets and memory of one process."""

BIG_STEP = 2.0
"""Steps while the best is far away. With 1.5 the worst falls to 0.84: the way is longer and each
overshoot as dear. With 3 to 0.76: beyond a knee where throughput collapses, what is in flight takes
minutes to drain."""

SMALL_STEP = 1.2
"""Steps around the best, at least by one. A trial beyond a steep knee costs most of its time: with
1.5 the worst is 0.80. 1.1 is as good as 1.2 here, but its gain is within a real server's noise."""

ACCELERATION = 2.0
"""Power by which a step grows when its trial is kept: 1.2, 1.44, 2. Four times the
capacity is found in four trials."""

WORTH = 0.07
"""Least elasticity (relative gain of throughput per relative gain of the limit) for which more
requests are kept in flight. It leaves 7% of what an endlessly saturating server has to give. With
0.15 that server falls by another 2%; 0.02 gains 1% there and goes three times as far for it."""

COSTS_NOTHING = 0.03
"""Elasticity below which fewer requests cost nothing: they wait in no queue and fail in no outage.
Below `WORTH`, or trials would go up and down in turn."""

CLEARLY = 0.5
"""Elasticity at which a trial up is kept on an early estimate while the best is far: half of what a
server with room to spare gives. Makes a doubling take one completion's time instead of two."""

HOPELESS = 0.85
"""Share of the throughput before, below which a trial ends on an early estimate. With 0.7 the mean
falls by 0.5%; 0.95 gains 0.3% here, but is as close as an early estimate errs."""

LONGEST_HOLD = 6
"""Epochs from a failed trial to the next, after a few have failed. With 2 the worst is 0.86: trials
cost. With 12 a server that grew is noticed so late that it has 0.895."""

BACK_OFF = 0.97
"""Of the requests that a server took when it turned others away. With 0.9, 6% more of a server
with a hard limit is idle, with TCP's 0.5, 36% more. With 1.0 nothing is left for whoever shares
the limit with us."""


OVERLOAD_CUT = 0.7
"""Of the limit, where so many fail with 5xx or time out. There, unlike with a 429, what the server
could have taken is unknown."""

SLOWED, SPED_UP = 0.7, 1.3
"""Change of what a request gets that shows another server. Noise of 16 requests is a few percent; a
change that matters is a factor of 2 and more. (0.5, 2) and (0.85, 1.15) do as well."""

SIGMAS = 5.0
"""Standard errors that such a change must have besides. It is looked for at every completion: where
the pace of requests differs by 40%, three of them came by chance every few minutes, and throughput
fell to two thirds."""

SMOOTHING = 0.3
"""Weight of the newest measurement at an unchanged limit: evens out about five."""

QUEUE_ENOUGH = 0.05
"""Share of their time that requests wait in the server's queue: from here on no more are tried."""

QUEUE_TOO_LONG, QUEUE_KEPT = 0.3, 1.15
"""From this share on, the limit goes to what is in service (Little's law), and 15% more, so that
the queue never runs dry between two completions."""
