"""Rows become prompt groups, however they came, and in no more memory than needed."""

from __future__ import annotations

import numpy as np
import pytest

from eval_protocol_rft.training._prompt_groups import group_rows, iter_groups
from eval_protocol_rft.training._types import TrainingDataError
from tests.training_rows import completion, contents_of, failed_row, record, row, scored


def test_an_unscored_completion_is_nan_among_the_rewards_and_not_zero():
    group = group_rows([scored("a", 0.0, None, 1.0)])[0]
    assert [t.reward for t in group.trajectories] == [0.0, None, 1.0]
    assert np.isnan(group.rewards).tolist() == [False, True, False]


def test_completions_of_one_row_and_rows_of_one_completion_make_the_same_group():
    one_row = group_rows([scored("a", 1.0, 0.0, 0.5, None)])
    single = [
        row("a", record([reward], completions=[completion(i)]), run=i)
        for i, reward in enumerate([1.0, 0.0, 0.5, None])
    ]
    mixed = [
        row("a", record([1.0, 0.0]), run=0),
        row("a", record([0.5, None], completions=[completion(2), completion(3)]), run=1),
    ]
    assert contents_of(one_row[0])[0] == (
        [1, 2, 3, 100, 101],
        [0, 0, 0, -0.25, -0.5],
        [0, 0, 0, 1, 1],
        1.0,
        "stop",
    )
    for rows in (single, mixed):
        groups = group_rows(rows)
        assert len(groups) == 1
        assert contents_of(groups[0]) == contents_of(one_row[0])


def test_experiment_and_row_id_make_the_group_and_the_order_is_that_of_appearance():
    rows = [
        row("b", record([1.0]), experiment="x"),
        row("a", record([1.0]), experiment="x"),
        row("b", record([0.0]), experiment="y"),
        row("b", record([0.5]), experiment="x", run=1),
    ]
    groups = group_rows(rows)
    assert [g.key for g in groups] == [("x", "b", "m"), ("x", "a", "m"), ("y", "b", "m")]
    assert groups[0].rewards.tolist() == [1.0, 0.5]


def test_a_key_function_makes_the_groups_even_across_prompts_and_without_row_ids():
    rows = [row(None, record([1.0], prompt=[4])), row(None, record([0.0], prompt=[5, 6]))]
    (group,) = group_rows(rows, key=lambda r: r["messages"][0]["content"])
    assert (group.key, group.rewards.tolist()) == ("2+2?", [1.0, 0.0])
    with pytest.raises(TrainingDataError, match=r"no input_metadata.row_id.*pass key="):
        group_rows(rows)


def test_failures_and_failed_rows_stay_visible_in_their_group():
    rows = [scored("a", 1.0, failures=2), failed_row("a"), failed_row("b")]
    first, second = group_rows(rows)
    assert (len(first), len(first.failures), first.failed_rows) == (1, 2, ("no server",))
    assert (first.failures[0].kind, first.failures[0].index) == ("timeout", 1)
    assert (len(second), second.failed_rows) == (0, ("no server",))


def test_a_completion_keeps_its_place_among_those_asked_for_when_siblings_failed():
    (group,) = group_rows([scored("a", 1.0, 0.0, indices=[1, 3], failures=2, n=4)])
    assert [t.completion for t in group.trajectories] == [1, 3]


def test_one_question_that_was_rendered_twice_is_one_group_and_keeps_both_prompts():
    tomorrow = row("a", record([1.0], prompt=[1, 2, 4]), run=1)
    tomorrow["messages"].append({"role": "assistant", "content": "4"})
    (group,) = group_rows([scored("a", 0.0), tomorrow])
    assert [t.tokens[:3].tolist() for t in group.trajectories] == [[1, 2, 3], [1, 2, 4]]
    for change in (
        {"messages": [{"role": "user", "content": "2+3?"}]},
        {"messages": []},
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
    ):
        with pytest.raises(TrainingDataError, match=r"'a', 'm'\) but different prompts"):
            group_rows([scored("a", 0.0), {**tomorrow, **change}])
    for how in ({"chat_template_hash": "0"}, {"chat_template_kwargs": {"enable_thinking": False}}):
        otherwise = row("a", record([1.0], prompt=[9], **how), run=1)
        with pytest.raises(TrainingDataError, match="by the same chat template"):
            group_rows([scored("a", 1.0), otherwise])


def test_rows_of_one_key_with_different_tokenizers_are_refused():
    other_tokenizer = row("a", record([1.0], tokenizer="other"), run=1)
    with pytest.raises(
        TrainingDataError, match=r"run 0 was tokenized with 'tok', .*run 1.*'other'"
    ):
        group_rows([scored("a", 1.0), other_tokenizer])


def test_groups_come_one_by_one_as_soon_as_the_next_begins():
    read = 0

    def stream():
        nonlocal read
        for name in ("a", "a", "b", "c", "c"):
            read += 1
            yield scored(name, 1.0)

    groups = iter_groups(stream())
    assert next(groups).key == ("exp", "a", "m")
    assert read == 3
    assert [(g.key[1], len(g)) for g in groups] == [("b", 1), ("c", 2)]


def test_scattered_rows_need_the_number_of_completions_to_be_put_together():
    rows = [scored(name, 1.0) for name in ("a", "b", "a", "b")]
    with pytest.raises(TrainingDataError, match=r"row 'a', run 0 .*pass completions_per_group="):
        list(iter_groups(rows))
    groups = list(iter_groups(rows, completions_per_group=2))
    assert [(g.key[1], len(g)) for g in groups] == [("a", 2), ("b", 2)]
    with pytest.raises(TrainingDataError, match="had its 1 completions already"):
        list(iter_groups(rows, completions_per_group=1))


def test_failed_completions_and_failed_rows_complete_a_group_too():
    rows = [scored("a", 1.0, failures=3), failed_row("a"), scored("b", 1.0)]
    keys = [g.key[1] for g in iter_groups(rows, completions_per_group=8)]
    assert keys == ["a", "b"]  # a: 1 + 3 asked for, then the 4 of its params; b at the end
    lazily = iter_groups(iter(rows), completions_per_group=8)
    assert len(next(lazily).failures) == 3
