"""Episodes of several turns: one reward, one advantage and one count, however many segments."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval_protocol_rft.record import RecordError
from eval_protocol_rft.training._batch import build_batch, iter_batches
from eval_protocol_rft.training._datums import TrainingDatum
from eval_protocol_rft.training._filters import Filters, SoftOverlong
from eval_protocol_rft.training._prompt_groups import group_rows
from eval_protocol_rft.training._types import Segment, Trajectory
from tests.training_episodes import TWO_SEGMENTS, episodes_extra, episodes_row, shapes
from tests.training_rows import row

NORMALIZATIONS = ["none", "token", "sequence", "constant"]
ONE_TURN = [[(3, 2)]]


def length_of(normalization: str) -> int | None:
    return 7 if normalization == "constant" else None


def fields(datum: TrainingDatum) -> dict[str, Any]:
    values = {name: getattr(datum, name) for name in datum.__struct_fields__}
    return {
        name: (value.dtype, value.tolist()) if isinstance(value, np.ndarray) else value
        for name, value in values.items()
    }


def test_an_episode_of_two_segments_by_hand() -> None:
    rows = [episodes_row("a", [TWO_SEGMENTS, ONE_TURN], [1.0, 0.0], stop_reasons=["length", "ok"])]
    (group,) = group_rows(rows)
    assert (len(group), group.rewards.tolist()) == (2, [1.0, 0.0])
    episode, one = group.trajectories
    assert [len(segment) for segment in episode.segments] == [10, 5]
    assert [segment.prompt_length for segment in episode.segments] == [3, 4]
    assert [segment.num_sampled for segment in episode.segments] == [5, 1]
    assert (episode.total_sampled, one.total_sampled) == (6, 2)
    assert (episode.truncated, one.truncated) == (True, False)
    batch = build_batch(rows, algorithm="dr_grpo", normalization="sequence")
    assert [(d.group, d.completion, d.segment) for d in batch.datums] == [
        (0, 0, 0), (0, 0, 1), (0, 1, 0),
    ]  # fmt: skip
    assert [d.reward for d in batch.datums] == [1.0, 1.0, 0.0]
    assert [d.truncated for d in batch.datums] == [True, True, False]
    # Two episodes: 1 / (2 * 6) on each token of the first, whichever segment it is in.
    assert [sorted({*d.weights.tolist()} - {0.0}) for d in batch.datums] == [
        [np.float32(1 / 12)], [np.float32(1 / 12)], [np.float32(1 / 4)],
    ]  # fmt: skip
    assert batch.datums[0].weights.tolist()[1:] == [
        0, *[np.float32(1 / 12)] * 2, 0, 0, *[np.float32(1 / 12)] * 3,
    ]  # fmt: skip


def test_statistics_count_an_episode_once() -> None:
    rows = [
        episodes_row("a", [TWO_SEGMENTS] * 3 + [ONE_TURN], [1.0, 0.0, 0.0, None]),
        episodes_row("b", [TWO_SEGMENTS] * 2, [1.0, 1.0], stop_reasons=["length", "done"]),
    ]
    stats = build_batch(rows).stats
    assert (stats.completions, stats.scored, stats.datums) == (6, 5, 6)
    assert stats.group_sizes == {3: 1}
    assert (stats.reward_mean, stats.truncated) == (0.6, 1)
    # 1 of 3 correct: pass@1 = 1/3, pass@2 = 1 - C(2,2)/C(3,2); the other group has 2 of 2.
    assert stats.pass_at_k == pytest.approx({1: (1 / 3 + 1) / 2, 2: (2 / 3 + 1) / 2})
    assert (stats.sampled_tokens, stats.context_tokens) == (18, 3 * (9 + 4) - 18)


@pytest.mark.parametrize(
    ("filters", "dropped"),
    [
        (Filters(max_sequence_tokens=10), {}),
        (Filters(max_sequence_tokens=9), {"too_long": 1, "small_group": 1}),
        (Filters(max_completion_tokens=6), {}),
        (Filters(max_completion_tokens=5), {"too_long": 1, "small_group": 1}),
        (Filters(truncated="drop"), {"truncated": 1, "small_group": 1}),
        (Filters(truncated="mask"), {"masked": 1}),
    ],
)
def test_filters_look_at_the_longest_segment_and_at_all_that_was_sampled(
    filters: Filters, dropped: dict[str, int]
) -> None:
    rows = [
        episodes_row("a", [TWO_SEGMENTS, ONE_TURN], [1.0, 0.0], stop_reasons=["length", "ok"]),
        episodes_row("b", [ONE_TURN] * 2, [1.0, 0.0]),
    ]
    batch = build_batch(rows, filters=filters)
    assert batch.dropped == dropped
    gone = sum(dropped.values())
    assert len({(d.group, d.completion) for d in batch.datums}) == 4 - gone


def test_a_later_segment_may_be_the_one_that_is_too_long() -> None:
    rows = [
        episodes_row("a", [[[(3, 1)], [(9, 1)]], ONE_TURN, ONE_TURN], [1.0, 0.0, 1.0]),
    ]
    batch = build_batch(rows, filters=Filters(max_sequence_tokens=9))
    assert batch.dropped == {"too_long": 1}
    assert [d.completion for d in batch.datums] == [1, 2]


def test_the_overlong_penalty_is_for_all_sampled_tokens_of_an_episode() -> None:
    rows = [episodes_row("a", [TWO_SEGMENTS, ONE_TURN], [1.0, 0.0])]
    penalty = SoftOverlong(max_tokens=8, cache_tokens=4)
    batch = build_batch(rows, filters=Filters(soft_overlong=penalty))
    assert [d.reward for d in batch.datums] == [0.5, 0.5, 0.0]  # 6 tokens: halfway from 4 to 8


def test_a_token_budget_counts_every_segment() -> None:
    rows = [episodes_row(name, [TWO_SEGMENTS, ONE_TURN], [1.0, 0.0]) for name in "abc"]
    targets = 9 + 4 + 4
    batches = list(iter_batches(rows, max_tokens=2 * targets))
    assert [len(batch) for batch in batches] == [6, 3]
    assert [len(b) for b in iter_batches(rows, max_tokens=2 * targets - 1)] == [3, 3, 3]


def test_rows_of_one_group_may_be_of_one_turn_and_of_several() -> None:
    extra = episodes_extra([ONE_TURN], [1.0])
    del extra["trajectories"], extra["episodes"]
    rows = [episodes_row("a", [TWO_SEGMENTS], [0.0]), row("a", extra, run=1)]
    (group,) = group_rows(rows)
    assert [len(t.segments) for t in group.trajectories] == [2, 1]


def test_a_segment_by_hand_says_what_is_wrong_with_it() -> None:
    with pytest.raises(RecordError, match=r"^loss_mask\[1\] is 0.5"):
        Segment(tokens=[1, 2], logprobs=[0, -1], loss_mask=[0, 0.5])
    made = Trajectory(
        tokens=[1, 2],
        logprobs=[0, -1],
        loss_mask=[0, 1],
        reward=1.0,
        more=(Segment(tokens=[3, 4, 5], logprobs=[0, -1, -2], loss_mask=[0, 1, 1]),),
    )
    assert (len(made), made.num_sampled, made.total_sampled) == (2, 1, 3)
    assert made.segments[0] is made


def test_arrays_are_read_like_lists() -> None:
    given_lists = episodes_row("a", [TWO_SEGMENTS, ONE_TURN], [1.0, 0.0])
    given_arrays = copy.deepcopy(given_lists)
    for segments in given_arrays["execution_metadata"]["extra"]["trajectories"]:
        for one in segments:
            one.update(
                tokens=np.array(one["tokens"], np.int32),
                logprobs=np.array(one["logprobs"], np.float32),
                loss_mask=np.array(one["loss_mask"], np.uint8),
            )
    from_lists, from_arrays = (build_batch([r]).datums for r in (given_lists, given_arrays))
    assert [fields(d) for d in from_lists] == [fields(d) for d in from_arrays]


@given(
    turns=st.lists(st.integers(1, 6), min_size=1, max_size=5),
    rewards=st.lists(st.sampled_from([None, 0.0, 0.5, 1.0]), min_size=5, max_size=5),
    cut=st.lists(st.booleans(), min_size=5, max_size=5),
    normalization=st.sampled_from(NORMALIZATIONS),
    truncated=st.sampled_from(["keep", "mask", "drop"]),
    seed=st.integers(0, 99),
)
def test_episodes_of_one_turn_give_exactly_the_datums_of_the_single_turn_record(
    turns: list[int],
    rewards: list[float | None],
    cut: list[bool],
    normalization: Any,
    truncated: Any,
    seed: int,
) -> None:
    size = len(turns)
    extra = episodes_extra(
        [[[(3, sampled)]] for sampled in turns],
        [rewards[0] or 1.0, *rewards[1:size]],
        stop_reasons=["length" if c else "done" for c in [False, *cut[1:size]]],
        seed=seed,
    )
    single = {k: v for k, v in extra.items() if k not in ("trajectories", "episodes")}
    options: dict[str, Any] = {
        "algorithm": "reinforce",
        "normalization": normalization,
        "constant_length": length_of(normalization),
        "filters": Filters(truncated=truncated),
    }
    ours, expected = (build_batch([row("a", e)], **options) for e in (extra, single))
    assert [fields(d) for d in ours.datums] == [fields(d) for d in expected.datums]
    assert (ours.dropped, ours.stats) == (expected.dropped, expected.stats)


groups = st.lists(st.lists(shapes, min_size=1, max_size=4), min_size=1, max_size=3)


def rows_of(made: list[Any], seed: int) -> tuple[list[dict[str, Any]], dict[Any, float]]:
    """Rows, and the advantage of each episode worked out apart: reward minus its group's mean."""
    rng = np.random.default_rng(seed)
    rows, advantages = [], {}
    for g, group in enumerate(made):
        rewards = rng.integers(0, 3, len(group)).astype(float)
        rows.append(episodes_row(f"r{g}", group, rewards.tolist(), seed=seed + g))
        for i, reward in enumerate(rewards.tolist()):
            advantages[g, i] = reward - sum(rewards.tolist()) / len(group)
    return rows, advantages


KEEP_ALL = Filters(zero_variance="keep", min_group_size=1)


@given(groups, st.integers(0, 999), st.sampled_from(NORMALIZATIONS))
def test_the_weighted_sum_over_datums_is_the_mean_that_the_normalisation_names(
    made: list[Any], seed: int, normalization: Any
) -> None:
    """With loss_t = advantage * x_t, x the token's id: brute force over the record's own lists."""
    rows, advantages = rows_of(made, seed)
    batch = build_batch(
        rows,
        algorithm="dr_grpo",
        normalization=normalization,
        constant_length=length_of(normalization),
        filters=KEEP_ALL,
    )
    episodes: list[list[float]] = []
    for g, one in enumerate(rows):
        for i, segments in enumerate(one["execution_metadata"]["extra"]["trajectories"]):
            episodes.append([])
            for segment in segments:
                for token, mask in zip(segment["tokens"], segment["loss_mask"], strict=True):
                    if mask:
                        episodes[-1].append(advantages[g, i] * token)
    expected = {
        "none": sum(map(sum, episodes)),
        "token": sum(map(sum, episodes)) / sum(map(len, episodes)),
        "sequence": sum(sum(e) / len(e) for e in episodes) / len(episodes),
        "constant": sum(sum(e) / 7 for e in episodes) / len(episodes),
    }[normalization]
    terms = [
        d.weights.astype(float) * d.advantages.astype(float) * d.target_tokens for d in batch.datums
    ]
    scale = sum(float(np.abs(term).sum()) for term in terms)
    assert sum(float(t.sum()) for t in terms) == pytest.approx(
        expected, rel=1e-5, abs=1e-5 * scale + 1e-9
    )


@given(groups, st.integers(0, 999), st.sampled_from(NORMALIZATIONS))
def test_the_datums_are_the_segments_shifted_by_one_with_their_episodes_advantage(
    made: list[Any], seed: int, normalization: Any
) -> None:
    rows, advantages = rows_of(made, seed)
    batch = build_batch(
        rows,
        algorithm="dr_grpo",
        normalization=normalization,
        constant_length=length_of(normalization),
        filters=KEEP_ALL,
    )
    given_segments = [
        (g, i, k, segment)
        for g, one in enumerate(rows)
        for i, segments in enumerate(one["execution_metadata"]["extra"]["trajectories"])
        for k, segment in enumerate(segments)
    ]
    for datum, (g, i, k, segment) in zip(batch.datums, given_segments, strict=True):
        assert (datum.row_id, datum.group, datum.completion, datum.segment) == (f"r{g}", g, i, k)
        mask = segment["loss_mask"][1:]
        assert datum.mask.astype(int).tolist() == mask
        assert datum.prompt_length == segment["loss_mask"].index(1)
        assert datum.input_tokens.tolist() == segment["tokens"][:-1]
        assert datum.target_tokens.tolist() == segment["tokens"][1:]
        assert np.array_equal(datum.logprobs, np.array(segment["logprobs"][1:], np.float32))
        wanted = [np.float32(advantages[g, i]) * m for m in mask]
        assert datum.advantages.tolist() == pytest.approx(wanted, rel=1e-6, abs=1e-7)
    weights = {(d.group, d.completion): set() for d in batch.datums}
    for datum in batch.datums:
        weights[datum.group, datum.completion] |= set(datum.weights[datum.mask].tolist())
    assert Counter(map(len, weights.values())) == {1: len(weights)}
