"""Our formulas give the numbers that verl's and TRL's own functions gave; see
`scripts/peer_formulas.py`, which recorded them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from eval_protocol_rft.training._algorithms import ALGORITHMS
from eval_protocol_rft.training.losses import POLICY_LOSSES, Rejection
from scripts.peer_formulas import PAIRS, RECORD, RECORDED, draw, worst_difference

RECORDING: Mapping[str, Any] = json.loads(RECORD.read_text())


@pytest.mark.parametrize("name", PAIRS)
def test_our_value_is_the_peers(name: str) -> None:
    for batch, theirs in zip(RECORDING["batches"], RECORDING["values"][name], strict=True):
        # TRL has SAPO's temperature in single precision.
        assert PAIRS[name].ours(batch) == pytest.approx(np.array(theirs), rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("name", PAIRS)
def test_the_recorded_values_are_not_those_of_another_formula(name: str) -> None:
    """What was recorded tells the formulas apart, so that agreement means something."""
    ours = PAIRS[name].ours(RECORDING["batches"][0])
    same = {"ppo, TRL", "geo_mean", "geo_mean, TRL", "sapo", "sapo, TRL"}
    losses = [n for n in PAIRS if not n.startswith("Rejection")]
    others = [n for n in losses if n != name and not ({n, name} <= same)]
    for other in others:
        values = np.array(RECORDING["values"][other][0])
        assert values.shape != ours.shape or np.abs(values - ours).max() > 1e-6, other


def test_the_batches_are_those_that_the_script_draws() -> None:
    assert [draw(seed) for seed in RECORDED] == RECORDING["batches"]


def test_every_loss_of_an_algorithm_that_a_peer_has_is_compared() -> None:
    compared = {name.split(",")[0] for name in PAIRS}
    losses = {algorithm.loss_fn for algorithm in ALGORITHMS.values()}
    assert losses - compared == {"importance_sampling"}  # which neither peer has by itself
    names = {*POLICY_LOSSES, "TokenTIS", "SequenceTIS", "IcePop", "Rejection", "Combined"}
    assert {name for name in compared if not name.startswith("advantages.")} <= names
    kinds = {name.split(", ")[1] for name in PAIRS if name.startswith("Rejection")}
    assert kinds == set(Rejection.KINDS)


@pytest.mark.parametrize("name", PAIRS)
def test_the_peers_functions_agree_now(name: str) -> None:
    for module in {"verl": ["verl"], "TRL": ["trl"]}.get(PAIRS[name].peer, []):
        pytest.importorskip(module)
    assert worst_difference(PAIRS[name]) < 1e-6
