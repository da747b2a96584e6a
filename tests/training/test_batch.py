"""Rows to batches: the whole way, against numbers worked out by hand."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
import tracemalloc
import warnings
from functools import partial
from typing import Any, get_type_hints

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval_protocol_rft.training import advantages
from eval_protocol_rft.training._algorithms import ALGORITHMS, BatchArguments, BatchOptions
from eval_protocol_rft.training._batch import build_batch, iter_batches
from eval_protocol_rft.training._filters import Filters, SoftOverlong
from eval_protocol_rft.training._prompt_groups import group_rows
from eval_protocol_rft.training._types import (
    BiasedSamplingWarning,
    EmptyBatchError,
    TrainingDataError,
)
from tests.training_rows import completion, failed_row, record, row, scored


def test_a_grpo_batch_by_hand():
    # Group a: mean 1/4, unbiased deviation 1/2. Group b has no gradient.
    rows = [scored("a", 1.0, 0.0, 0.0, 0.0, failures=1), scored("b", 1.0, 1.0)]
    batch = build_batch(rows, algorithm="grpo")
    assert (batch.loss_fn, batch.normalization, batch.tokenizer) == ("ppo", "none", "tok")
    assert batch.loss_fn_config == {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}
    assert batch.dropped == {"failed": 1, "zero_variance": 2}
    assert len(batch) == 4
    first = batch.datums[0]
    assert first.input_tokens.tolist() == [1, 2, 3, 100]
    assert first.target_tokens.tolist() == [2, 3, 100, 101]
    assert first.logprobs.tolist() == [0, 0, -0.25, -0.5]
    assert first.weights.tolist() == [0, 0, 1, 1]
    assert first.advantages == pytest.approx([0, 0, 1.5, 1.5], rel=1e-5)
    assert batch.datums[3].advantages == pytest.approx([0, 0, -0.5, -0.5], rel=1e-5)


def test_the_statistics_describe_what_was_sampled_and_what_is_trained():
    rows = [
        scored("a", 1.0, 0.0, None, 0.0, truncated=[1], versions=["v1", "v1", "v2", None]),
        scored("b", 1.0, 1.0),
        scored("c", 0.0, 0.0),
        failed_row("d"),
    ]
    batch = build_batch(rows)
    stats = batch.stats
    assert (stats.groups, stats.groups_trained, stats.completions, stats.scored) == (4, 1, 8, 7)
    assert (stats.datums, stats.group_sizes) == (3, {3: 1})
    assert stats.reward_mean == pytest.approx(3 / 7)
    assert stats.reward_std == pytest.approx(math.sqrt(3 / 7 * 4 / 7))
    assert (stats.reward_min, stats.reward_max) == (0.0, 1.0)
    assert (stats.truncated, stats.sampled_tokens, stats.context_tokens) == (1, 6, 6)
    # pass@1: 1/3, 1, 0; pass@2 with one of three correct: 1 - C(2,2)/C(3,2) = 2/3
    assert stats.pass_at_k == pytest.approx({1: 4 / 9, 2: 5 / 9})
    assert (stats.all_correct, stats.none_correct) == (1, 1)
    assert stats.policy_versions == {"v1": 2, "v2": 1, None: 5}
    assert batch.dropped == {"unscored": 1, "zero_variance": 4, "failed_row": 1}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_each_algorithm_has_its_estimator_and_absolute_thresholds(algorithm):
    greedy = scored("a", 0.25, temperature=0.0)
    rows = [scored("a", 1.0, 0.0, 0.5), *([greedy] if algorithm == "remax" else [])]
    batch = build_batch(rows, algorithm=algorithm)
    inputs = {"opo": {"lengths": np.full((1, 3), 2.0)}, "remax": {"baselines": [0.25]}}
    expected = ALGORITHMS[algorithm].estimator(
        np.array([[1.0, 0.0, 0.5]]), **inputs.get(algorithm, {})
    )[0]
    got = [float(d.advantages[-1]) for d in batch.datums]
    assert got == pytest.approx(expected, rel=1e-6)
    assert (batch.loss_fn, batch.loss_fn_config) == (
        ALGORITHMS[algorithm].loss_fn,
        ALGORITHMS[algorithm].loss_fn_config,
    )
    low = batch.loss_fn_config.get("clip_low_threshold", 1.0)
    high = batch.loss_fn_config.get("clip_high_threshold", 1.0)
    assert 0 <= low <= 1 <= high


def test_thresholds_can_be_replaced_and_a_relative_eps_is_refused():
    rows = [scored("a", 1.0, 0.0)]
    batch = build_batch(
        rows, algorithm="dapo", loss_fn_config={"clip_high_threshold": 1.3, "eps_clip_c": 3.0}
    )
    assert batch.loss_fn_config == {
        "clip_low_threshold": 0.8,
        "clip_high_threshold": 1.3,
        "eps_clip_c": 3.0,
    }
    with pytest.raises(TrainingDataError, match=r"clip_high_threshold.* is 0.28: .*absolute"):
        build_batch(rows, loss_fn_config={"clip_low_threshold": 0.2, "clip_high_threshold": 0.28})


def test_groups_that_train_alone_are_kept_for_estimators_without_a_group_baseline():
    rows = [scored("a", 1.0), scored("b", 0.5, 0.5), scored("c", None)]
    reinforce = build_batch(rows, algorithm="reinforce")
    assert [float(d.advantages[-1]) for d in reinforce.datums] == [1.0, 0.5, 0.5]
    normalised = build_batch(rows, estimator=partial(advantages.reinforce_pp, ddof=0, eps=0.0))
    # mean 2/3, variance 1/18
    expected = np.array([1 / 3, -1 / 6, -1 / 6]) * math.sqrt(18)
    assert [float(d.advantages[-1]) for d in normalised.datums] == pytest.approx(expected)
    with pytest.raises(EmptyBatchError):
        build_batch(rows, algorithm="grpo")


def test_gdpo_reads_the_named_metrics():
    metrics = [{"right": 1.0, "short": 0.0}, {"right": 0.0, "short": 0.0}]
    rows = [
        scored("a", 1.0, 0.0, metrics=metrics),
        scored("b", 1.0, 0.0, metrics=[{"right": 1.0, "short": 1.0}, metrics[1]]),
    ]
    batch = build_batch(
        rows,
        estimator=partial(advantages.gdpo, ddof=0, eps=0.0),
        components=("right", "short"),
    )
    expected = np.array([1.0, -1.0, 2.0, -2.0]) / math.sqrt(2.5)
    assert [float(d.advantages[-1]) for d in batch.datums] == pytest.approx(expected)
    with pytest.raises(TrainingDataError, match="no completion has the component 'shrt'"):
        build_batch(rows, estimator=advantages.gdpo, components=("right", "shrt"))


def test_the_overlong_penalty_shapes_rewards_and_not_the_statistics():
    made = [completion(0, 4), completion(1, 8)]
    rows = [scored("a", 0.5, 1.0, completions=made)]
    shaping = Filters(soft_overlong=SoftOverlong(max_tokens=8, cache_tokens=4))
    batch = build_batch(rows, algorithm="dr_grpo", filters=shaping)
    assert [d.reward for d in batch.datums] == [0.5, 0.0]
    assert [float(d.advantages[-1]) for d in batch.datums] == [0.25, -0.25]
    assert batch.stats.reward_mean == 0.75


def test_masked_completions_count_in_the_baseline_and_give_no_datum():
    rows = [scored("a", 1.0, 0.0, 0.0, truncated=[1])]
    batch = build_batch(rows, algorithm="dr_grpo", filters=Filters(truncated="mask"))
    got = [(d.completion, float(d.advantages[-1])) for d in batch.datums]
    assert got == [(0, pytest.approx(2 / 3)), (2, pytest.approx(-1 / 3))]
    assert batch.dropped == {"masked": 1}


@pytest.mark.parametrize(
    ("sampling", "reason"),
    [
        ({"support_truncated": True, "top_p": 0.9}, r"truncated support \(top_p=0.9, top_k=0\)"),
        ({"temperature": 0.0}, "temperature=0"),
    ],
)
def test_biased_sampling_warns_or_is_refused(sampling, reason):
    rows = [scored("fine", 1.0, 0.0), scored("odd", 1.0, 0.0, **sampling)]
    message = f"2 of 4 completions .*row 'odd', completion 0: {reason}"
    with pytest.warns(BiasedSamplingWarning, match=message) as caught:
        build_batch(rows)
    assert caught[0].filename == __file__
    with pytest.warns(BiasedSamplingWarning, match=message) as caught:
        next(iter_batches(rows, max_groups=2))
    assert caught[0].filename == __file__
    with pytest.raises(TrainingDataError, match=message):
        build_batch(rows, biased_sampling="refuse")
    build_batch(rows[:1], biased_sampling="refuse")


def test_completions_of_several_models_in_one_batch_are_warned_of_or_refused():
    rows = [scored("a", 1.0, 0.0), scored("b", 1.0, 0.0, 0.0, model="other")]
    message = "completions are of 2 models, 2 of 'm', 3 of 'other': .*rows of one"
    with pytest.warns(BiasedSamplingWarning, match=message) as caught:
        batch = build_batch(rows)
    assert (caught[0].filename, len(batch)) == (__file__, 5)
    with pytest.raises(TrainingDataError, match=message):
        build_batch(rows, biased_sampling="refuse")
    with pytest.warns(BiasedSamplingWarning, match=message):  # in one group, too
        build_batch(rows, key=lambda row: row["messages"][0]["content"])
    # Batches of one model each, and rows that do not say of which, are fine.
    unknown = scored("c", 1.0, 0.0, model=None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(list(iter_batches(rows, max_groups=1))) == 2
        build_batch([rows[0], unknown])


def test_mixed_tokenizers_in_one_batch_are_refused_by_name():
    rows = [scored("a", 1.0, 0.0), scored("b", 1.0, 0.0, tokenizer="llama")]
    with pytest.raises(TrainingDataError, match=r"'a', 'm'\) was tokenized with 'tok', .*'llama'"):
        build_batch(rows)
    unknown = [scored("a", 1.0, 0.0), scored("b", 1.0, 0.0, tokenizer=None)]
    assert build_batch(unknown).tokenizer == "tok"
    apart = list(iter_batches(rows, max_groups=1))
    assert [batch.tokenizer for batch in apart] == ["tok", "llama"]


def test_a_batch_of_nothing_is_an_error_that_counts():
    rows = [scored("a", 1.0, 1.0), scored("b", 1.0), failed_row("c"), scored("d", None)]
    message = "failed_row: 1, small_group: 1, unscored: 1, zero_variance: 2"
    with pytest.raises(EmptyBatchError, match=message) as caught:
        build_batch(rows)
    assert caught.value.dropped["zero_variance"] == 2
    with pytest.raises(EmptyBatchError, match=message):
        list(iter_batches(rows, max_groups=1))
    with pytest.raises(EmptyBatchError, match="there were no rows"):
        build_batch([])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"algorithm": "ppo"}, "unknown algorithm 'ppo'; there are grpo, dapo"),
        ({"normalization": "tokens"}, "normalization must be one of none, token"),
        ({"normalization": "constant"}, "constant_length"),
        ({"constant_length": 5}, "constant_length"),
        ({"normalization": "constant", "constant_length": 0}, "constant_length"),
        ({"biased_sampling": "ignore"}, "biased_sampling must be one of warn, refuse"),
        ({"components": ("a",)}, "components= needs an estimator"),
        (
            {
                "components": ("a",),
                "estimator": advantages.gdpo,
                "filters": Filters(soft_overlong=SoftOverlong(max_tokens=2, cache_tokens=1)),
            },
            "soft_overlong shapes the reward",
        ),
        ({"loss_fn_config": {"clip_low_threshold": 1.2}}, "clip_low_threshold"),
    ],
)
def test_contradictory_options_are_refused_before_any_row_is_read(options, message):
    def rows():
        pytest.fail("a row was read")
        yield

    with pytest.raises(TrainingDataError, match=message):
        build_batch(rows(), **options)
    with pytest.raises(TrainingDataError, match=message):
        iter_batches(rows(), max_groups=1, **options)


def test_a_misspelt_option_is_a_type_error():
    with pytest.raises(TypeError, match="normalisation"):
        build_batch([scored("a", 1.0, 0.0)], normalisation="token")


def test_the_options_of_both_functions_are_one_list():
    assert get_type_hints(BatchOptions) == get_type_hints(BatchArguments)


@pytest.mark.parametrize(
    ("estimator", "message"),
    [
        (lambda rewards: rewards[:, :1], r"shape \(1, 1\) for rewards of shape \(1, 2\)"),
        (lambda rewards: rewards * np.nan, "gave nan to row 'a', completion 0, with rewards"),
    ],
)
def test_an_estimator_of_the_wrong_shape_or_value_is_named(estimator, message):
    with pytest.raises(TrainingDataError, match=message):
        build_batch([scored("a", 1.0, 0.0)], estimator=estimator)


def names(batch: Any) -> list[str]:
    return [name for name, _ in itertools.groupby(d.row_id for d in batch.datums)]


def test_batches_are_limited_by_groups_and_dropped_groups_do_not_count():
    rewards = {"a": (1, 0), "b": (1, 1), "c": (0, 1), "d": (0, 1), "e": (1, 1)}
    rows = [scored(name, *pair) for name, pair in rewards.items()]
    batches = list(iter_batches(rows, max_groups=2))
    assert [names(batch) for batch in batches] == [["a", "c"], ["d"]]
    assert [batch.dropped for batch in batches] == [{"zero_variance": 2}, {"zero_variance": 2}]
    assert [[d.group for d in batch.datums] for batch in batches] == [[0, 0, 1, 1], [0, 0]]


def test_batches_are_limited_by_targets_and_a_large_group_stands_alone():
    # prompt of 3: a group of two completions of n tokens has 2 (3 + n - 1) targets
    rows = [
        scored(name, 1.0, 0.0, completions=[completion(0, n), completion(1, n)])
        for name, n in zip("abcd", (2, 3, 20, 2), strict=True)
    ]
    by_tokens = list(iter_batches(rows, max_tokens=18))
    assert [names(batch) for batch in by_tokens] == [["a", "b"], ["c"], ["d"]]
    both = list(iter_batches(rows, max_tokens=18, max_groups=1))
    assert [names(batch) for batch in both] == [["a"], ["b"], ["c"], ["d"]]
    assert [b.stats.sampled_tokens for b in both] == [4, 6, 40, 4]


def test_iteration_reads_no_further_than_it_must():
    read = []

    def stream():
        for i in itertools.count():
            read.append(i)
            yield scored(f"r{i}", 1.0, 0.0)

    batches = iter_batches(stream(), max_groups=3)
    assert read == []
    assert names(next(batches)) == ["r0", "r1", "r2"]
    assert len(read) <= 5


def test_iteration_holds_a_batch_and_not_the_rows():
    size = 50_000
    one = (np.arange(size), np.full(size, -0.5, np.float32))
    rows = (scored(f"r{i}", 1.0, 0.0, completions=[one, one]) for i in range(200))
    tracemalloc.start()
    tokens = sum(batch.stats.sampled_tokens for batch in iter_batches(rows, max_groups=4))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert tokens == 200 * 2 * size  # 320 MB of tokens, logprobs and masks
    assert peak < 200e6


def test_rows_of_several_runs_may_be_scattered():
    made = [completion(0), completion(1)]
    rows = [
        row(name, record([float(run)], completions=[made[run]]), run=run)
        for run in (0, 1)
        for name in "ab"
    ]
    batches = list(iter_batches(rows, max_groups=1, completions_per_group=2))
    assert [names(batch) for batch in batches] == [["a"], ["b"]]
    assert [len(batch) for batch in batches] == [2, 2]


def test_iter_batches_needs_a_limit():
    with pytest.raises(TrainingDataError, match="max_groups, max_tokens or both"):
        iter_batches([])
    with pytest.raises(TrainingDataError, match="max_tokens must be at least 1, got 0"):
        iter_batches([], max_tokens=0)


@given(
    groups=st.lists(
        st.lists(st.sampled_from([None, 0.0, 1.0]), min_size=1, max_size=4),
        min_size=1,
        max_size=8,
    ),
    max_groups=st.one_of(st.none(), st.integers(1, 3)),
    max_tokens=st.integers(1, 40),
)
def test_batches_together_are_the_whole_and_count_every_completion(groups, max_groups, max_tokens):
    rows = [scored(f"r{i}", *rewards) for i, rewards in enumerate(groups)]
    completions = sum(map(len, groups))
    try:
        whole = build_batch(rows)
    except EmptyBatchError as error:
        dropped = sum(error.dropped.values())
        assert dropped == completions
        return
    batches = list(iter_batches(rows, max_groups=max_groups, max_tokens=max_tokens))
    datums = [datum for batch in batches for datum in batch.datums]
    for got, expected in zip(datums, whole.datums, strict=True):
        assert (got.row_id, got.completion) == (expected.row_id, expected.completion)
        assert np.array_equal(got.advantages, expected.advantages)
    assert len(datums) + sum(sum(batch.dropped.values()) for batch in batches) == completions
    assert all(len(batch) for batch in batches)


def test_prompt_groups_and_their_rows_make_the_same_batch():
    rows = [scored("a", 1.0, 0.0), scored("b", 0.0, 1.0)]
    from_rows, from_groups = build_batch(rows), build_batch(group_rows(rows))
    for got, expected in zip(from_groups.datums, from_rows.datums, strict=True):
        assert np.array_equal(got.target_tokens, expected.target_tokens)
        assert np.array_equal(got.advantages, expected.advantages)
    assert from_groups.stats == from_rows.stats
    assert len(list(iter_batches(group_rows(rows), max_groups=1))) == 2


def test_building_a_batch_imports_neither_eval_protocol_nor_torch():
    code = (
        "import sys; from eval_protocol_rft.training import *; "
        "print([m for m in ('eval_protocol', 'litellm', 'torch', 'pyarrow') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_batch_is_printed_in_one_line():
    batch = build_batch([scored("a", 1.0, 0.0, None), scored("b", 1.0, 1.0)])
    assert repr(batch) == (
        "TrainingBatch(grpo: 2 datums of 1 groups, 4 sampled tokens, mean reward 0.75, "
        "dropped: 1 unscored, 2 zero_variance)"
    )
