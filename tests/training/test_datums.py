"""Datums: shifted by one, zero outside what was sampled, weighted as the normalisation says."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval_protocol_rft.training._datums import pack, weight_factors
from eval_protocol_rft.training._types import Trajectory


def sequence(mask: list[int], first: int = 10) -> Trajectory:
    """Tokens first, first + 1, ...; logprob -(i + 1) / 8 at sampled position i."""
    return Trajectory(
        tokens=list(range(first, first + len(mask))),
        logprobs=[-(i + 1) / 8 * m for i, m in enumerate(mask)],
        loss_mask=mask,
        reward=1.0,
        finish_reason="length",
        row_id="r",
        completion=4,
    )


def given_of(
    batch: list[tuple[list[int], float]],
) -> tuple[list[Trajectory], list[float], list[int]]:
    """Masks and advantages as sequences of one group each."""
    return [sequence(mask) for mask, _ in batch], [a for _, a in batch], [0] * len(batch)


def test_a_datum_by_hand():
    # prompt 10 11, sampled 12 13 (13 is the end of turn)
    (datum,) = pack([sequence([0, 0, 1, 1])], [0.5], [2], normalization="none")
    assert datum.input_tokens.tolist() == [10, 11, 12]
    assert datum.target_tokens.tolist() == [11, 12, 13]
    assert datum.logprobs.tolist() == [0.0, -0.375, -0.5]
    assert datum.advantages.tolist() == [0.0, 0.5, 0.5]
    assert datum.weights.tolist() == [0.0, 1.0, 1.0]
    assert datum.mask.tolist() == [False, True, True]
    assert (len(datum), datum.prompt_length, datum.group, datum.reward) == (3, 2, 2, 1.0)
    assert (datum.row_id, datum.completion, datum.truncated) == ("r", 4, True)
    assert [datum.input_tokens.dtype, datum.target_tokens.dtype] == [np.int64] * 2
    floats = (datum.logprobs, datum.advantages, datum.weights)
    assert [array.dtype for array in floats] == [np.float32] * 3
    assert all(array.flags.c_contiguous for array in floats)


def test_several_turns_leave_what_the_environment_said_without_weight():
    datums = pack([sequence([0, 1, 0, 0, 1, 1, 0])], [-2.0], [0], normalization="sequence")
    third = np.float32(1 / 3)
    assert datums[0].weights.tolist() == [third, 0, 0, third, third, 0]
    assert datums[0].advantages.tolist() == [-2, 0, 0, -2, -2, 0]
    assert datums[0].logprobs.tolist() == [-0.25, 0, 0, -0.625, -0.75, 0]


@pytest.mark.parametrize(
    ("normalization", "length", "expected"),
    [
        ("none", None, [1, 1, 1]),
        ("token", None, [1 / 8] * 3),
        ("sequence", None, [1 / 3, 1 / 6, 1 / 15]),
        ("constant", 20, [1 / 60] * 3),
    ],
)
def test_the_factors_of_three_sequences_of_1_2_and_5_sampled_tokens(
    normalization, length, expected
):
    factors = weight_factors(np.array([1, 2, 5]), normalization, length)
    assert factors.tolist() == [np.float32(x) for x in expected]


masks = st.lists(st.integers(0, 1), min_size=1, max_size=12).map(lambda m: [0, *m]).filter(any)
batches = st.lists(st.tuples(masks, st.floats(-3, 3, width=32)), min_size=1, max_size=5)


@given(batches, st.sampled_from(["none", "token", "sequence", "constant"]))
def test_the_weighted_sum_is_the_mean_that_the_normalisation_names(batch, normalization):
    """With loss_t = x_t, any values x: brute force over tokens."""
    length = 7 if normalization == "constant" else None
    datums = pack(*given_of(batch), normalization=normalization, constant_length=length)
    per_sequence = [
        [float(t) for t, m in zip(range(10, 30), mask, strict=False) if m] for mask, _ in batch
    ]
    tokens = sum(len(values) for values in per_sequence)
    expected = {
        "none": sum(map(sum, per_sequence)),
        "token": sum(map(sum, per_sequence)) / tokens,
        "sequence": np.mean([np.mean(values) for values in per_sequence]),
        "constant": np.mean([sum(values) / 7 for values in per_sequence]),
    }[normalization]
    total = sum(float(d.weights @ d.target_tokens) for d in datums)
    assert total == pytest.approx(expected, rel=1e-5)


@given(batches, st.sampled_from(["none", "token"]))
def test_every_array_agrees_with_a_loop_over_tokens(batch, normalization):
    for datum, (mask, advantage) in zip(
        pack(*given_of(batch), normalization=normalization), batch, strict=True
    ):
        for t, target in enumerate(mask[1:]):
            assert datum.input_tokens[t] == 10 + t
            assert datum.target_tokens[t] == 11 + t
            assert datum.advantages[t] == (advantage if target else 0.0)
            assert datum.logprobs[t] == np.float32(-(t + 2) / 8 * target)
            assert bool(datum.mask[t]) == bool(target)
        assert len(datum) == len(mask) - 1
        folded = datum.folded_advantages()
        assert np.array_equal(folded, datum.advantages * datum.weights)


def test_the_datums_share_the_memory_of_the_trajectories():
    whole = sequence([0, 1, 1])
    (datum,) = pack([whole], [1.0], [0], normalization="none")
    assert np.shares_memory(datum.input_tokens, whole.tokens)
    assert np.shares_memory(datum.target_tokens, whole.tokens)
    assert np.shares_memory(datum.logprobs, whole.logprobs)
    assert np.shares_memory(datum.weights, whole.loss_mask)
