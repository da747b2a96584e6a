"""The table in the docs is the table in the code."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from eval_protocol_rft.loop.fireworks._fireworks_trainer import BUILT_IN
from eval_protocol_rft.training._algorithms import ALGORITHMS
from eval_protocol_rft.training._datums import WIRE_LOSSES
from eval_protocol_rft.training._filters import DROP_REASONS
from scripts.peer_formulas import PAIRS

PAGE = (Path(__file__).parents[2] / "docs" / "training.md").read_text()


def table(heading: str) -> list[list[str]]:
    """The body of the first table after `heading`."""
    section = PAGE.split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
    after = itertools.dropwhile(lambda line: not line.startswith("|"), section.splitlines())
    lines = list(itertools.takewhile(lambda line: line.startswith("|"), after))
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_the_page_lists_each_algorithm_as_it_is():
    rows = table("Algorithms")
    assert [row[0] for row in rows] == list(ALGORITHMS)
    for name, advantage, loss_fn, config, normalization, way, difference, source in rows:
        algorithm = ALGORITHMS[name]
        assert advantage == algorithm.estimator.__name__
        assert (loss_fn, normalization, source) == (
            algorithm.loss_fn,
            algorithm.paper_normalization,
            algorithm.source,
        )
        assert way == ("by name" if loss_fn in BUILT_IN else "custom")
        peers = [p for n, p in PAIRS.items() if n.split(",")[0] == loss_fn]
        assert [entry.split()[0] for entry in difference.split(", ")] == (
            [pair.peer for pair in peers] or ["no"]
        )
        written = dict(entry.split("=") for entry in config.split())
        assert {key: float(value) for key, value in written.items()} == pytest.approx(
            dict(algorithm.loss_fn_config), rel=1e-4
        )


def test_the_page_lists_each_reason_for_dropping():
    listed = [reason.strip(" `") for row in table("Filters") for reason in row[0].split(",")]
    assert listed == list(DROP_REASONS)


def test_the_losses_of_the_wire_are_names_that_the_training_sdk_knows():
    loss_fn_type = pytest.importorskip("fireworks.training.sdk.types.loss_fn_type")
    known = set(loss_fn_type.LossFnType.__args__)
    assert known >= WIRE_LOSSES | set(BUILT_IN.values())
    # What is computed under a name of ours alone must not be taken for a server's.
    custom = {algorithm.loss_fn for algorithm in ALGORITHMS.values()} - WIRE_LOSSES
    assert custom
    assert not custom & known
