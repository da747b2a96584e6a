"""The checks on numbers alone: closed forms, and tests that keep their stated levels."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eval_protocol_rft.doctor._findings import (
    FAIL_LEVEL,
    Finding,
    p_value_verdict,
    unfit,
    verdict_on,
)
from eval_protocol_rft.doctor._logprob_checks import (
    frequency_finding,
    measure_frequency,
    trainer_findings,
)
from eval_protocol_rft.doctor._token_checks import (
    different_seeds,
    end_of_turn,
    equal_seeds,
    prompt_echo,
    repeats_p_value,
)
from eval_protocol_rft.sampling._logprob_kind import FirstTokens, measure_kind
from eval_protocol_rft.sampling._types import Completion

EOS = 9


def completion(*ids: int, logprob: float = -0.5, finish: str = "stop", **more) -> Completion:
    return Completion(
        token_ids=list(ids), logprobs=[logprob] * len(ids), finish_reason=finish, **more
    )


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return logits - np.log(np.exp(logits).sum())


def drawn(rng, told: np.ndarray, n: int, *, truly: np.ndarray | None = None) -> FirstTokens:
    """n draws from `truly` (else from what is told), with logprobs as told."""
    weights = np.exp(told if truly is None else truly)
    ids = rng.choice(len(told), size=n, p=weights / weights.sum())
    return FirstTokens(ids, told[ids])


logit_lists = st.lists(st.floats(-4.0, 4.0), min_size=2, max_size=12)


# Verdicts


@pytest.mark.parametrize(
    ("value", "verdict"),
    [(0.0, "pass"), (2e-3, "pass"), (2.1e-3, "warn"), (0.02, "fail"), (float("nan"), "fail")],
)
def test_a_number_that_should_be_small_is_verdict_on(value, verdict):
    assert verdict_on(value, warn_above=2e-3, fail_above=1.5e-2) == verdict


def test_p_values_warn_below_one_in_a_hundred_and_fail_below_one_in_ten_thousand():
    levels = [p_value_verdict(p) for p in (1.0, 0.01, 0.0099, 0.0001, 0.00009)]
    assert levels == ["pass", "pass", "warn", "warn", "fail"]


def test_only_a_failed_check_makes_a_setup_unfit():
    found = [Finding(name="x", verdict=v, measured="") for v in ("pass", "warn", "skipped")]
    assert not unfit(found)
    assert unfit([*found, Finding(name="y", verdict="fail", measured="")])


# End of turn


def test_a_completion_that_stops_ends_with_its_end_of_turn():
    fine = [completion(1, 2, EOS), completion(1, 2, 3, finish="length")]
    assert end_of_turn(fine, {EOS}).verdict == "pass"
    dropped = end_of_turn([*fine, completion(1, 2)], {EOS})
    assert (dropped.verdict, dropped.numbers["without_end"]) == ("fail", 1)
    beyond = end_of_turn([*fine, completion(1, EOS, 2, finish="length")], {EOS})
    assert (beyond.verdict, beyond.numbers["end_within"]) == ("fail", 1)


def test_a_stop_token_that_the_server_names_is_an_end_of_turn():
    assert end_of_turn([completion(1, 7, stop_reason=7)], {EOS}).verdict == "pass"


def test_where_nothing_stopped_nothing_is_known():
    assert end_of_turn([completion(1, 2, finish="length")], {EOS}).verdict == "warn"


# Prompt echo


ids = st.lists(st.integers(0, 5), min_size=1, max_size=8)


@given(ids, ids)
def test_only_the_same_ids_pass(sent, echoed):
    verdict = prompt_echo(sent, echoed, None).verdict
    assert verdict == ("pass" if sent == echoed else "fail")


@pytest.mark.parametrize(("counted", "verdict"), [(3, "warn"), (4, "fail"), (None, "warn")])
def test_without_an_echo_the_count_is_what_there_is(counted, verdict):
    assert prompt_echo([1, 2, 3], None, counted).verdict == verdict


# Logprob kind


@given(logit_lists, st.floats(0.3, 0.9), st.integers(0, 2**31))
def test_the_kind_that_was_told_is_never_taken_for_the_other(logits, temperature, seed):
    rng = np.random.default_rng(seed)
    raw = log_softmax(np.array(logits))
    sampling = log_softmax(np.array(logits) / temperature)
    ones = [drawn(rng, raw, 30)]
    honest = [drawn(rng, sampling, 30)]
    plain = [drawn(rng, raw, 30, truly=sampling)]
    fits = measure_kind(ones, honest, temperature=temperature)
    assert fits.kind in ("sampling", "unknown")
    assert fits.tokens == 0 or fits.sampling_error < 1e-6
    told_raw = measure_kind(ones, plain, temperature=temperature)
    assert told_raw.kind in ("raw", "unknown")
    assert told_raw.tokens == 0 or told_raw.raw_error < 1e-6


def test_a_spread_distribution_is_enough_to_tell():
    rng = np.random.default_rng(0)
    logits = np.linspace(0.0, 3.0, 8)
    ones = [drawn(rng, log_softmax(logits), 40)]
    lower = log_softmax(2.0 * logits)
    assert measure_kind(ones, [drawn(rng, lower, 40)], temperature=0.5).kind == "sampling"
    raw = [drawn(rng, log_softmax(logits), 40, truly=lower)]
    assert measure_kind(ones, raw, temperature=0.5).kind == "raw"
    off = [drawn(rng, lower - 1.0, 40)]
    assert measure_kind(ones, off, temperature=0.5).kind == "neither"


def test_two_tokens_of_a_broad_distribution_are_enough():
    """Most of it unseen, so that the bounds of Z say nothing."""
    told_at_one = np.array([np.log(0.1), np.log(0.05)])
    seen = np.arange(2)

    def kind(lower: np.ndarray) -> str:
        ones, others = FirstTokens(seen, told_at_one), FirstTokens(seen, lower)
        return measure_kind([ones], [others], temperature=0.5).kind

    assert kind(2 * told_at_one - np.log(0.02)) == "sampling"
    assert kind(told_at_one) == "raw"
    assert kind(told_at_one[::-1]) == "neither"


def test_a_certain_token_tells_nothing():
    certain = FirstTokens(np.zeros(20, np.int64), np.zeros(20))
    assert measure_kind([certain], [certain], temperature=0.5).kind == "unknown"


# Token frequency


def test_a_right_sampler_passes_as_often_as_the_level_says():
    """Over many samplers the p-value is below each level at most that often (binomial noise of
    400 runs allowed for)."""
    rng = np.random.default_rng(1)
    p_values = np.array(
        [
            measure_frequency(
                [drawn(rng, log_softmax(rng.normal(size=30) * 2), 60)], seed=i, simulations=199
            ).p_value
            for i in range(400)
        ]
    )
    for level in (0.01, 0.1, 0.5):
        noise = 4 * np.sqrt(level * (1 - level) / 400)
        assert (p_values <= level).mean() <= level + noise


@settings(derandomize=True, max_examples=25)
@given(st.integers(0, 2**31))
def test_a_right_sampler_of_any_shape_does_not_fail(seed):
    rng = np.random.default_rng(seed)
    prompts = [
        drawn(rng, log_softmax(rng.normal(size=rng.integers(1, 200)) * rng.uniform(0, 5)), 50)
        for _ in range(3)
    ]
    measured = measure_frequency(prompts, seed=seed)
    assert measured.p_value >= FAIL_LEVEL
    assert measured.mass <= 1 + 1e-9


@pytest.mark.parametrize(
    "lie",
    [
        pytest.param(lambda logits: log_softmax(logits * 1.6), id="another temperature"),
        pytest.param(lambda logits: log_softmax(logits) - 0.3, id="too low"),
        pytest.param(lambda logits: log_softmax(logits)[::-1], id="of other tokens"),
    ],
)
def test_logprobs_that_are_not_those_of_sampling_fail(lie):
    rng = np.random.default_rng(2)
    logits = np.linspace(0.0, 4.0, 10)
    told = np.array(lie(logits))
    prompts = [drawn(rng, told, 200, truly=log_softmax(logits)) for _ in range(2)]
    finding = frequency_finding(measure_frequency(prompts, seed=0), temperature=1.0)
    assert finding.verdict == "fail"
    assert finding.numbers["p_value"] < 1e-4


def test_probabilities_that_sum_to_more_than_one_fail():
    rng = np.random.default_rng(3)
    told = log_softmax(np.zeros(4))
    prompts = [drawn(rng, told + 0.2, 100, truly=told)]
    finding = frequency_finding(measure_frequency(prompts, seed=0), temperature=1.0)
    assert finding.verdict == "fail"
    assert finding.numbers["mass"] == pytest.approx(np.exp(0.2))


def test_nothing_that_came_back_is_no_test():
    nothing = FirstTokens(np.zeros(0, np.int64), np.zeros(0))
    finding = frequency_finding(measure_frequency([nothing], seed=0), temperature=1.0)
    assert finding.verdict == "skipped"
    assert measure_kind([nothing], [nothing], temperature=0.5).kind == "unknown"


def test_tokens_that_are_all_but_certain_are_no_test():
    certain = FirstTokens(np.zeros(30, np.int64), np.full(30, -1e-9))
    finding = frequency_finding(measure_frequency([certain], seed=0), temperature=1.0)
    assert (finding.verdict, finding.measured) == ("skipped", "the first tokens are certain")


def test_the_p_value_is_that_of_the_exact_multinomial():
    """One prompt, two tokens: the p-value by enumeration of the binomial."""
    from math import comb, log

    told = np.log([0.8, 0.2])
    first = np.array([0, 0, 0, 0, 1])
    counted = np.array([0] * 4 + [1] * 6)
    measured = measure_frequency(
        [FirstTokens(np.r_[first, counted], told[np.r_[first, counted]])], seed=0
    )
    n, p = 10, (0.8, 0.2)

    def g(k):
        return 2 * sum(o * log(o / (n * q)) for o, q in zip((k, n - k), p, strict=True) if o)

    exact = sum(
        comb(n, k) * p[0] ** k * p[1] ** (n - k) for k in range(n + 1) if g(k) >= g(4) - 1e-9
    )
    assert measured.p_value == pytest.approx(exact, abs=0.005)


# Seeds


def test_equal_seeds_warn_where_completions_differ_and_never_fail():
    same, other = completion(1, EOS), completion(2, EOS)
    assert equal_seeds([(same, same)] * 3).verdict == "pass"
    mixed = equal_seeds([(same, same), (same, other)])
    assert (mixed.verdict, mixed.numbers["same"]) == ("warn", 1)


def test_repeats_have_the_binomial_probability():
    group = [completion(1, logprob=np.log(0.3))] * 3 + [completion(2, logprob=np.log(0.7))]
    repeats, others, p_value = repeats_p_value([group])
    assert (repeats, others) == (2, 3)
    assert p_value == pytest.approx(3 * 0.3**2 * 0.7 + 0.3**3)


def test_copies_of_an_unlikely_completion_fail_and_of_a_certain_one_do_not():
    unlikely = [[completion(1, 2, 3, logprob=-2.0)] * 4] * 2
    assert different_seeds(unlikely, seeded=True).verdict == "fail"
    certain = [[completion(1, 2, 3, logprob=-1e-6)] * 4] * 2
    assert different_seeds(certain, seeded=True).verdict == "pass"
    assert different_seeds([[completion(1)]], seeded=True).verdict == "skipped"


@settings(derandomize=True)
@given(logit_lists, st.integers(0, 2**31))
def test_independent_completions_do_not_fail(logits, seed):
    rng = np.random.default_rng(seed)
    logprobs = log_softmax(np.array(logits))
    groups = [
        [
            completion(int(token), logprob=min(0.0, float(logprobs[token])))
            for token in rng.choice(len(logits), size=8, p=np.exp(logprobs))
        ]
        for _ in range(3)
    ]
    assert repeats_p_value(groups)[2] >= FAIL_LEVEL


# Sampler against trainer


def apart(log_ratio: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """(sampler, trainer) logprobs that are so far apart."""
    return [(np.full(len(log_ratio), -1.0), log_ratio - 1.0)]


def trainer_numbers(log_ratio: np.ndarray) -> dict[str, float]:
    found = trainer_findings(apart(log_ratio), temperature=1.0)
    return {finding.name: finding.numbers["value"] for finding in found}


def test_equal_policies_are_zero_apart():
    same = [np.array([-1.0, -2.0]), np.array([-3.0])]
    found = trainer_findings([(values, values) for values in same], temperature=1.0)
    assert {finding.verdict for finding in found} == {"pass"}
    assert [finding.numbers["value"] for finding in found] == pytest.approx([0, 0, 0, 0])


@given(st.floats(-2.0, 2.0))
def test_a_constant_ratio_has_a_closed_form(shift):
    found = trainer_numbers(np.full(10, shift))
    assert found["trainer: mean k1"] == pytest.approx(abs(shift))
    assert found["trainer: mean k3"] == pytest.approx(np.exp(shift) - 1 - shift, abs=1e-12)
    assert found["trainer: max |dlogp|"] == pytest.approx(abs(shift))
    # The effective sample says nothing of a constant factor.
    assert found["trainer: effective sample"] == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize(("deviation", "verdict"), [(0.03, "pass"), (0.1, "warn"), (0.25, "fail")])
def test_noise_meets_the_bars_where_its_variance_says(deviation, verdict):
    """k3 of Gaussian noise of deviation s is s^2 / 2, and 1 - ESS is 1 - exp(-s^2)."""
    noise = np.random.default_rng(4).normal(size=20_000) * deviation
    noise -= deviation**2 / 2  # so that the ratio is 1 on average, as that of two policies is
    found = {f.name: f for f in trainer_findings(apart(noise), temperature=1.0)}
    k3 = found["trainer: mean k3"]
    assert k3.numbers["value"] == pytest.approx(deviation**2 / 2, rel=0.05)
    assert k3.verdict == verdict
    loss = found["trainer: effective sample"].numbers["value"]
    assert loss == pytest.approx(1 - np.exp(-(deviation**2)), rel=0.1)


def test_a_ratio_beyond_all_bounds_is_a_number_and_fails():
    found = trainer_findings(apart(np.array([800.0, 0.0])), temperature=1.0)
    assert all(np.isfinite(finding.numbers["value"]) for finding in found)
    assert {finding.verdict for finding in found} == {"fail"}
