"""The drawing maths against plain Python written from the definitions."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from eval_protocol_rft.local._draw import (  # noqa: E402
    DrawPlan,
    draw,
    philox,
    sampling_logprobs,
    uniforms,
)
from eval_protocol_rft.sampling import SamplingParams  # noqa: E402

CPU = torch.device("cpu")


def how_to_draw(temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0) -> SamplingParams:
    return SamplingParams(model="", temperature=temperature, top_p=top_p, top_k=top_k)


PLAIN = how_to_draw()
BOUNDARY = 1e-6
"""Closer than this to a boundary, float32 and exact arithmetic may fall on different sides."""


def reference_distribution(logits: list[float], how: SamplingParams) -> dict[int, float]:
    """id -> probability, from the definitions: temperature, then top_k, then top_p."""
    ranked = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    if how.top_k > 0:
        ranked = ranked[: how.top_k]
    weights = [math.exp((logits[i] - logits[ranked[0]]) / how.temperature) for i in ranked]
    total = math.fsum(weights)
    kept: dict[int, float] = {}
    mass = 0.0
    for token, weight in zip(ranked, weights, strict=True):
        assume(how.top_p == 1 or abs(mass - how.top_p) > BOUNDARY)
        if kept and how.top_p < 1 and mass >= how.top_p:
            break
        kept[token] = weight / total
        mass += weight / total
    return {token: p / mass for token, p in kept.items()}


def reference_token(distribution: dict[int, float], uniform: float) -> int:
    """First id, in order of ids, at which the cumulative probability passes the uniform number."""
    mass = 0.0
    for token in sorted(distribution):
        mass += distribution[token]
        assume(abs(mass - uniform) > BOUNDARY)
        if mass > uniform:
            return token
    return max(distribution)


def reference_philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> list[int]:
    """Philox4x32-10 on Python integers, from the paper's description."""
    c, k = list(counter), list(key)
    for _ in range(10):
        first, second = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [
            (second >> 32) ^ c[1] ^ k[0],
            second % 2**32,
            (first >> 32) ^ c[3] ^ k[1],
            first % 2**32,
        ]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


eighths = st.integers(-80, 80).map(lambda n: n / 8)
rows = st.tuples(
    st.lists(eighths, min_size=7, max_size=7),
    st.builds(
        how_to_draw,
        temperature=st.sampled_from([0.25, 0.7, 1.0, 1.5, 3.0]),
        top_p=st.one_of(st.just(1.0), st.floats(0.01, 0.999)),
        top_k=st.integers(-1, 9),
    ),
    st.floats(0, 1, exclude_max=True),
)


@settings(deadline=None)
@given(st.lists(rows, min_size=1, max_size=6))
def test_a_mixed_batch_draws_what_the_definitions_say_row_by_row(batch):
    logits_BV = torch.tensor([logits for logits, _, _ in batch])
    plan = DrawPlan([how for _, how, _ in batch], CPU)
    uniforms_B = torch.tensor([u for _, _, u in batch], dtype=torch.float64)

    drawn = draw(logits_BV, plan, uniforms_B)

    for row, (logits, how, uniform) in enumerate(batch):
        distribution = reference_distribution(logits, how)
        token = int(drawn.tokens_B[row])
        assert token == reference_token(distribution, uniform)
        raw = reference_distribution(logits, PLAIN)[token]
        assert drawn.logprobs_B[row] == pytest.approx(math.log(distribution[token]), abs=1e-5)
        assert drawn.raw_logprobs_B[row] == pytest.approx(math.log(raw), abs=1e-5)


@settings(deadline=None)
@given(rows)
def test_exactly_the_tokens_outside_the_limits_have_no_probability(row):
    logits, how, _ = row
    logits_BV = torch.tensor([logits])
    sampling_BV = sampling_logprobs(logits_BV, logits_BV.log_softmax(-1), DrawPlan([how], CPU))
    kept = torch.isfinite(sampling_BV[0]).nonzero().flatten().tolist()
    assert set(kept) == set(reference_distribution(logits, how))


@settings(deadline=None)
@given(st.lists(rows, min_size=2, max_size=8))
def test_a_row_draws_the_same_alone_and_in_a_crowd(batch):
    logits_BV = torch.tensor([logits for logits, _, _ in batch])
    settings_B = [how for _, how, _ in batch]
    uniforms_B = torch.tensor([u for _, _, u in batch], dtype=torch.float64)
    together = draw(logits_BV, DrawPlan(settings_B, CPU), uniforms_B)
    for row, how in enumerate(settings_B):
        one = slice(row, row + 1)
        alone = draw(logits_BV[one], DrawPlan([how], CPU), uniforms_B[one])
        assert alone.tokens_B.tolist() == together.tokens_B[one].tolist()
        assert alone.logprobs_B.tolist() == pytest.approx(together.logprobs_B[one].tolist())


def test_temperature_zero_takes_the_first_best_token_and_reports_its_raw_logprob():
    logits_BV = torch.tensor([[0.0, 2.0, 2.0, 1.0], [3.0, 0.0, 0.0, 0.0]])
    plan = DrawPlan([how_to_draw(0.0, 0.5, 3), PLAIN], CPU)
    drawn = draw(logits_BV, plan, torch.tensor([0.99, 0.0], dtype=torch.float64))
    raw = 2 - math.log(1 + 2 * math.exp(2) + math.exp(1))
    assert drawn.tokens_B.tolist() == [1, 0]
    assert drawn.logprobs_B[0] == pytest.approx(raw, abs=1e-6)
    assert drawn.raw_logprobs_B[0] == pytest.approx(raw, abs=1e-6)


@pytest.mark.parametrize("temperature", [1e-40, 1e-6, 1e6])
def test_extreme_temperatures_stay_finite(temperature):
    logits_BV = torch.tensor([[50.0, -50.0, 49.0]])
    plan = DrawPlan([how_to_draw(temperature, 1.0, 0)], CPU)
    drawn = draw(logits_BV, plan, torch.tensor([0.5], dtype=torch.float64))
    assert math.isfinite(drawn.logprobs_B[0])
    if temperature < 1:
        assert drawn.tokens_B.tolist() == [0]
        assert drawn.logprobs_B[0] == 0


def test_the_largest_uniform_number_still_draws_a_token_that_has_a_probability():
    # The tail underflows to probability 0 and must never be reached.
    logits_BV = torch.tensor([[0.0, 0.0, -1e4, -1e4]])
    largest = torch.tensor([1 - 2.0**-53], dtype=torch.float64)
    assert draw(logits_BV, DrawPlan([PLAIN], CPU), largest).tokens_B.tolist() == [1]


def test_tokens_that_the_model_itself_forbids_are_never_drawn():
    logits_BV = torch.tensor([[-math.inf, 0.0, -math.inf, 1.0]]).expand(256, 4)
    seeds_B = np.arange(256, dtype=np.uint64)
    plan = DrawPlan([how_to_draw(0.8, 0.99, 4)] * 256, CPU)
    drawn = draw(logits_BV, plan, uniforms(seeds_B, np.zeros_like(seeds_B)))
    assert set(drawn.tokens_B.tolist()) == {1, 3}


@pytest.mark.parametrize(
    "how", [PLAIN, how_to_draw(0.7, 1.0, 0), how_to_draw(1.3, 0.8, 0), how_to_draw(1.0, 1.0, 3)]
)
def test_draws_come_as_often_as_their_logprobs_say(how):
    logits = [0.3, -1.0, 2.0, 0.0, 1.1, -0.4]
    draws = 20_000
    seeds_B = np.arange(draws, dtype=np.uint64)
    drawn = draw(
        torch.tensor([logits]).expand(draws, -1),
        DrawPlan([how] * draws, CPU),
        uniforms(seeds_B, np.full_like(seeds_B, 3)),
    )
    observed = Counter(drawn.tokens_B.tolist())
    expected = {
        token: draws * math.exp(logprob)
        for token, logprob in zip(drawn.tokens_B.tolist(), drawn.logprobs_B.tolist(), strict=True)
    }
    assert sum(expected.values()) == pytest.approx(draws, rel=1e-5)
    chi_square = sum((observed[t] - e) ** 2 / e for t, e in expected.items())
    freedom = len(expected) - 1
    assert chi_square < freedom + 5 * math.sqrt(2 * freedom)


@pytest.mark.parametrize(
    ("counter", "key", "output"),
    [
        # Known answers published with the Random123 library.
        ((0, 0, 0, 0), (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        (
            (0xFFFFFFFF,) * 4,
            (0xFFFFFFFF,) * 2,
            [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD],
        ),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_the_philox_reference_gives_the_published_answers(counter, key, output):
    assert reference_philox(counter, key) == output


@given(st.lists(st.tuples(*[st.integers(0, 2**64 - 1)] * 2), min_size=1, max_size=5))
def test_philox_equals_the_reference_for_whole_batches(pairs):
    keys_B, counters_B = (np.array(column, dtype=np.uint64) for column in zip(*pairs, strict=True))
    first_B, second_B = philox(keys_B, counters_B)
    for row, (key, counter) in enumerate(pairs):
        words = reference_philox((counter % 2**32, counter >> 32, 0, 0), (key % 2**32, key >> 32))
        assert [int(first_B[row]), int(second_B[row])] == words[:2]


def test_uniform_numbers_fill_the_unit_interval_and_streams_do_not_repeat():
    seeds_B, steps_B = (a.ravel() for a in np.meshgrid(*[np.arange(200, dtype=np.uint64)] * 2))
    numbers = uniforms(seeds_B, steps_B).numpy()
    assert len(set(numbers.tolist())) == numbers.size
    assert 0 <= numbers.min() < 1e-3
    assert 1 - 1e-3 < numbers.max() < 1
    # 40,000 uniform numbers: the mean has a standard error of 0.0014.
    assert abs(numbers.mean() - 0.5) < 0.007
