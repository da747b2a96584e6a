"""Sampler against trainer, and what a run says when they disagree."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from eval_protocol_rft.loop._metrics import reduce_metrics
from eval_protocol_rft.loop._watch import WINDOW, Watch
from eval_protocol_rft.training._datums import Mismatch, looks_shifted, measure

LOGPROBS = arrays(np.float32, st.integers(1, 30), elements=st.floats(-8, 0, width=32))


@given(LOGPROBS, st.integers(0, 2**32 - 1))
def test_the_estimates_are_their_definitions(sampler: np.ndarray, seed: int) -> None:
    noise = np.random.default_rng(seed).normal(0, 0.3, len(sampler)).astype(np.float32)
    trainer = sampler + noise

    found = measure([(sampler, trainer)])

    d = [float(t) - float(s) for s, t in zip(sampler, trainer, strict=True)]
    assert found is not None
    assert found.tokens == len(d)
    assert found.k1 == pytest.approx(-sum(d) / len(d), abs=1e-9)
    assert found.k3 == pytest.approx(sum(math.exp(x) - 1 - x for x in d) / len(d), abs=1e-9)
    assert found.max_difference == pytest.approx(max(map(abs, d)))


def test_k3_estimates_the_divergence() -> None:
    """Over many draws from q, k3 comes to KL(q || p)."""
    rng = np.random.default_rng(3)
    q, p = np.array([0.7, 0.2, 0.1]), np.array([0.5, 0.3, 0.2])
    drawn = rng.choice(3, size=200_000, p=q)
    found = measure([(np.log(q)[drawn], np.log(p)[drawn])])
    assert found is not None
    assert found.k3 == pytest.approx(float(np.sum(q * np.log(q / p))), rel=0.02)


def test_nothing_to_compare_is_nothing() -> None:
    assert measure([]) is None
    assert measure([(np.empty(0, np.float32), np.empty(0, np.float32))]) is None


def test_an_absurd_token_does_not_hide_behind_infinity() -> None:
    found = measure([(np.array([-500.0]), np.array([0.0]))])
    assert found is not None
    assert math.isfinite(found.k3)
    assert found.verdict == "fail"


@pytest.mark.parametrize("by", [1, -1])
def test_shifted_logprobs_are_known_by_their_neighbours(by: int) -> None:
    rng = np.random.default_rng(1)
    trainer = [-rng.exponential(1.0, 12).astype(np.float32) for _ in range(8)]
    pairs = [(np.roll(values, by), values) for values in trainer]
    assert looks_shifted(pairs)
    assert not looks_shifted([(values, values[::-1]) for values in trainer])


BAD = Mismatch(tokens=100, k1=0.1, k3=0.2, max_difference=3.0, beyond=0.9)
GOOD = Mismatch(tokens=100, k1=0.0, k3=1e-9, max_difference=1e-5, beyond=0.0)
UNEASY = Mismatch(tokens=100, k1=0.0, k3=5e-3, max_difference=0.3, beyond=0.5)


def test_causes_are_told_apart() -> None:
    trouble = Watch().mismatch(1, BAD)
    assert trouble is not None
    assert trouble.cause == "mismatch"
    trouble = Watch().mismatch(1, BAD, shifted=True)
    assert trouble is not None
    assert trouble.cause == "shifted_logprobs"
    trouble = Watch().mismatch(1, BAD, raw=GOOD)
    assert trouble is not None
    assert trouble.cause == "raw_logprobs"


def test_in_float32_in_one_process_the_bar_is_that_of_float_noise() -> None:
    slight = Mismatch(tokens=100, k1=0.0, k3=1e-4, max_difference=0.05, beyond=0.3)
    assert Watch().mismatch(1, slight) is None
    watch = Watch(exact=True)
    assert watch.mismatch(1, GOOD) is None
    trouble = watch.mismatch(2, slight)
    assert trouble is not None
    assert not trouble.fatal
    assert "warn above 1e-05" in trouble.message
    assert "30% are more than 1 % apart" in trouble.message


def test_tokens_beyond_a_percent_are_counted() -> None:
    sampler = np.log(np.array([0.5, 0.5, 0.5, 0.5], np.float32))
    trainer = np.log(np.array([0.5, 0.504, 0.506, 0.49], np.float32))
    difference = measure([(sampler, trainer)])
    assert difference is not None
    assert difference.beyond == 0.5


def test_weights_are_stale_where_the_first_step_agreed() -> None:
    watch = Watch()
    assert watch.mismatch(1, GOOD) is None
    trouble = watch.mismatch(2, BAD)
    assert trouble is not None
    assert (trouble.cause, trouble.fatal) == ("stale_weights", True)


def test_a_warning_comes_once_and_failing_after_it_is_said_too() -> None:
    watch = Watch()
    first = watch.mismatch(1, UNEASY)
    assert first is not None
    assert not first.fatal
    assert watch.mismatch(2, UNEASY) is None
    later = watch.mismatch(3, BAD)
    assert later is not None
    assert later.fatal


def test_a_collapse_is_seen_and_a_bad_start_is_none() -> None:
    watch = Watch()
    assert all(watch.reward(i, 0.02, 1e-3) is None for i in range(3 * WINDOW))
    assert all(watch.reward(i, 0.4, 1e-3) is None for i in range(WINDOW))
    told = [watch.reward(i, 0.01, 1e-3) for i in range(2 * WINDOW)]
    (trouble,) = [trouble for trouble in told if trouble is not None]
    assert trouble.cause == "collapse"
    assert "0.001" in trouble.message


def test_completions_without_an_end_are_fatal() -> None:
    trouble = Watch().endings(4, 12, 64)
    assert trouble is not None
    assert (trouble.cause, trouble.fatal) == ("missing_eos", True)
    assert "12 of 64" in trouble.message
    assert Watch().endings(4, 0, 64) is None


def test_metrics_fold_by_their_reduction() -> None:
    reduced = reduce_metrics(
        [
            {"tokens:sum": 10.0, "entropy:mean": 1.0, "ratio:max": 2.0, "loss:sum": 1.0},
            {"tokens:sum": 30.0, "entropy:mean": 3.0, "ratio:max": 1.5, "loss:sum": 2.0},
        ]
    )
    assert reduced == {
        "tokens:sum": 40.0,
        "entropy:mean": 2.5,
        "ratio:max": 2.0,
        "loss:sum": 3.0,
    }
    with pytest.raises(ValueError, match="no reduction"):
        reduce_metrics([{"loss": 1.0}, {"loss": 2.0}])
