"""A trajectory says what is wrong with it, and where."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from eval_protocol_rft.training._types import TrainingDataError, Trajectory


def trajectory(**changes: Any) -> Trajectory:
    """Prompt 5 6, sampled 7 8, then tool output 9, then sampled 10."""
    fields: dict[str, Any] = {
        "tokens": [5, 6, 7, 8, 9, 10],
        "logprobs": [0, 0, -0.5, -1.5, 0, -0.25],
        "loss_mask": [0, 0, 1, 1, 0, 1],
        "reward": 1.0,
        "row_id": "r7",
        "completion": 3,
    }
    return Trajectory(**{**fields, **changes})


def test_a_trajectory_of_several_turns_knows_its_prompt_and_what_was_sampled():
    made = trajectory()
    assert (len(made), made.prompt_length, made.num_sampled) == (6, 2, 3)
    assert (made.tokens.dtype, made.logprobs.dtype, made.loss_mask.dtype) == (
        np.int64,
        np.float32,
        np.float32,
    )


def test_who_gives_the_counts_has_checked_the_arrays_and_they_are_taken_as_they_are():
    made = trajectory()
    arrays = {"tokens": made.tokens, "logprobs": made.logprobs, "loss_mask": made.loss_mask}
    taken = trajectory(**arrays, prompt_length=2, num_sampled=3)
    assert all(getattr(taken, name) is array for name, array in arrays.items())
    assert (taken.prompt_length, taken.num_sampled) == (2, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": [5, 6, 7]}, "3 tokens, 6 logprobs, loss_mask of 6"),
        ({"tokens": [5], "logprobs": [0.0], "loss_mask": [0]}, "at least a prompt token"),
        ({"tokens": [5, 6, -7, 8, 9, 10]}, r"tokens\[2\] is -7"),
        ({"tokens": [5, 6, 7.5, 8, 9, 10]}, "tokens holds float64"),
        ({"tokens": [[5, 6, 7, 8, 9, 10]]}, "tokens has shape"),
        ({"logprobs": [0, 0, -0.5, math.nan, 0, -1]}, r"logprobs\[3\] is nan"),
        ({"logprobs": [0, 0, -0.5, -math.inf, 0, -1]}, r"logprobs\[3\] is -inf"),
        ({"logprobs": [0, 0, 0.5, -1, 0, -1]}, r"logprobs\[2\] is 0.5"),
        ({"logprobs": [0, 0, -1, -1, -0.5, -1]}, r"logprobs\[4\] is -0.5 where loss_mask is 0"),
        ({"loss_mask": [0, 0, 1, 0.5, 0, 1]}, r"loss_mask\[3\] is 0.5"),
        ({"loss_mask": [1, 0, 1, 1, 0, 1]}, r"loss_mask\[0\] is 1"),
        ({"loss_mask": [0] * 6, "logprobs": [0.0] * 6}, "no token was sampled"),
        ({"reward": math.nan}, "reward is nan"),
        ({"reward": "1"}, "reward is '1'"),
    ],
)
def test_a_broken_trajectory_names_row_completion_and_place(changes, message):
    with pytest.raises(TrainingDataError, match=f"row 'r7', completion 3: .*{message}"):
        trajectory(**changes)
