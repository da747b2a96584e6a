"""What each loss on the wire is given: mask and division folded into the advantages, once."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval_protocol_rft.training._datums import FOLDED_LOSSES, Normalization, loss_fn_inputs, pack
from eval_protocol_rft.training._types import ExportError, Trajectory

masks = st.lists(st.integers(0, 1), min_size=1, max_size=12).map(lambda m: [0, *m, 1])
examples = st.lists(
    st.tuples(masks, st.floats(-4, 4, width=32).filter(lambda a: abs(a) > 1e-3 or a == 0)),
    min_size=1,
    max_size=4,
)


def packed(drawn, normalization: Normalization, length: int | None):
    made = [
        Trajectory(
            tokens=list(range(len(mask))),
            logprobs=[-0.5 * m for m in mask],
            loss_mask=mask,
            reward=1.0,
        )
        for mask, _ in drawn
    ]
    advantages = [advantage for _, advantage in drawn]
    return pack(
        made, advantages, [0] * len(made), normalization=normalization, constant_length=length
    )


@given(examples, st.sampled_from(sorted(FOLDED_LOSSES)), st.data())
def test_folded_advantages_are_zero_where_nothing_was_sampled_and_weighted_elsewhere(
    drawn, loss_fn, data
):
    normalization = data.draw(st.sampled_from(["none", "token", "sequence", "constant"]))
    sampled = [sum(mask) for mask, _ in drawn]
    factors = {
        "none": [1.0] * len(drawn),
        "token": [1 / sum(sampled)] * len(drawn),
        "sequence": [1 / (len(drawn) * count) for count in sampled],
        "constant": [1 / (len(drawn) * 16)] * len(drawn),
    }[normalization]
    length = 16 if normalization == "constant" else None
    for (mask, advantage), factor, datum in zip(
        drawn, factors, packed(drawn, normalization, length), strict=True
    ):
        inputs = loss_fn_inputs(datum, loss_fn)
        assert list(inputs) == ["target_tokens", "logprobs", "advantages"]
        wanted = [advantage * factor if m else 0.0 for m in mask[1:]]
        np.testing.assert_allclose(inputs["advantages"], wanted, rtol=1e-6)
        assert not inputs["advantages"][np.array(mask[1:]) == 0].any()
        assert {name: array.dtype.name for name, array in inputs.items()} == {
            "target_tokens": "int64",
            "logprobs": "float32",
            "advantages": "float32",
        }
        assert {len(array) for array in inputs.values()} == {len(mask) - 1}


def test_folding_leaves_the_datum_as_it_is():
    (datum,) = packed([([0, 1, 1], 2.0)], "token", None)
    before = datum.advantages.copy()
    loss_fn_inputs(datum, "ppo")["advantages"][:] = 99
    assert np.array_equal(datum.advantages, before)


def test_cross_entropy_gets_weights_and_no_advantages():
    (datum,) = packed([([0, 0, 1, 1], 2.0)], "token", None)
    inputs = loss_fn_inputs(datum, "cross_entropy")
    assert {name: array.tolist() for name, array in inputs.items()} == {
        "target_tokens": [1, 2, 3],
        "weights": [0.0, 0.5, 0.5],
    }


def test_dro_is_exact_only_where_every_position_was_sampled():
    whole, partly = packed([([0, 1, 1], 2.0), ([0, 0, 1], 2.0)], "none", None)
    assert loss_fn_inputs(whole, "dro")["advantages"].tolist() == [2.0, 2.0]
    with pytest.raises(ExportError, match="1 of 2 positions were not sampled"):
        loss_fn_inputs(partly, "dro")


def test_dro_cannot_be_weighted():
    (whole,) = packed([([0, 1, 1], 2.0)], "token", None)
    with pytest.raises(ExportError, match=r'takes no weights.*normalization="none"'):
        loss_fn_inputs(whole, "dro")


def test_an_unknown_loss_is_refused_with_the_names_there_are():
    (datum,) = packed([([0, 1], 2.0)], "none", None)
    with pytest.raises(ExportError, match="'dppo' has no name on the wire, which knows cispo,"):
        loss_fn_inputs(datum, "dppo")


def test_importing_the_exports_loads_no_trainer_and_no_eval_protocol():
    names = ("fireworks", "tinker", "cookbook", "trl", "verl", "rl_step", "files")
    heavy = ("eval_protocol", "torch", "fireworks", "tinker", "trl", "verl", "safetensors")
    code = (
        "import importlib, sys\n"
        f"for name in {names!r}:\n"
        "    importlib.import_module('eval_protocol_rft.training.export.' + name)\n"
        f"print([name for name in {heavy!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
