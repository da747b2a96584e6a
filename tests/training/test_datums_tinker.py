"""Datums beside those of tinker-cookbook. Optional: needs tinker-cookbook (and tinker)."""

from __future__ import annotations

import numpy as np
import pytest

from eval_protocol_rft.training._datums import pack
from eval_protocol_rft.training._types import Trajectory

tinker = pytest.importorskip("tinker")
processing = pytest.importorskip("tinker_cookbook.rl.data_processing")
types = pytest.importorskip("tinker_cookbook.rl.types")
completers = pytest.importorskip("tinker_cookbook.completers")


def test_two_turns_give_the_datum_that_tinker_cookbook_builds():
    first, said, second = [5, 6, 7], [8, 9], [10, 11]
    turns = [(first, said, [-0.5, -1.0]), (first + said + second, [12, 13, 14], [-0.1, -0.2, -0.3])]
    theirs_from = types.Trajectory(
        transitions=[
            types.Transition(
                ob=tinker.ModelInput.from_ints(seen),
                ac=completers.TokensWithLogprobs(tokens=ids, maybe_logprobs=logprobs),
                reward=0.0,
                episode_done=i == 1,
            )
            for i, (seen, ids, logprobs) in enumerate(turns)
        ],
        final_ob=tinker.ModelInput.empty(),
    )
    (theirs,) = processing.trajectory_to_data(theirs_from, 1.5)
    ours_from = Trajectory(
        tokens=[*first, *said, *second, 12, 13, 14],
        logprobs=[0, 0, 0, -0.5, -1.0, 0, 0, -0.1, -0.2, -0.3],
        loss_mask=[0, 0, 0, 1, 1, 0, 0, 1, 1, 1],
        reward=1.0,
    )
    (ours,) = pack([ours_from], [1.5], [0], normalization="none")
    assert ours.input_tokens.tolist() == theirs.model_input.to_ints()
    for name, array in (
        ("target_tokens", ours.target_tokens),
        ("logprobs", ours.logprobs),
        ("advantages", ours.advantages),
        ("mask", ours.weights),
    ):
        assert np.array_equal(array, theirs.loss_fn_inputs[name].to_numpy()), name
