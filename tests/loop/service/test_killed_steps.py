"""An iterative run whose server is killed again and again ends as one that is left alone."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest
import torch

from eval_protocol_rft.loop.fireworks import StepReport
from eval_protocol_rft.loop.fireworks._answers import ControlPlaneError
from eval_protocol_rft.loop.service._store import Store
from eval_protocol_rft.loop.service._weights import Weights
from eval_protocol_rft.rollout import RolloutError
from tests.programs import Zygote
from tests.service import ServiceProcess, arithmetic_base
from tests.sums_run import run_sums

STEPS, ROWS, N = 2, 8, 4


def run(url: str, folder: Path) -> list[StepReport]:
    return asyncio.run(run_sums(url, folder, rows=ROWS, n=N, steps=STEPS))


def left(state: Path) -> tuple[list[str], dict[str, dict[str, torch.Tensor]]]:
    """Names of data sets, and the weights of every model."""
    store = Store(state)
    weights = Weights(state / "weights", [arithmetic_base()])
    models = {row["name"]: weights.state_dict(row["_weights"]) for row in store.list("models")}
    datasets = store.names("datasets")
    store.close()
    return datasets, models


@pytest.mark.slow
def test_a_server_that_is_killed_again_and_again_ends_where_one_that_is_not_does(
    tmp_path: Path, zygote: Zygote
) -> None:
    with ServiceProcess(zygote, tmp_path / "straight") as server:
        expected_reports = run(server.url, tmp_path / "straight-run")
    expected = left(tmp_path / "straight")

    server = ServiceProcess(zygote, tmp_path / "killed")
    reports: list[StepReport] = []
    interruptions: list[Exception] = []
    failures: list[BaseException] = []

    def run_as_often_as_needed() -> None:
        while not reports:
            try:
                reports.extend(run(server.url, tmp_path / "killed-run"))
            except (ControlPlaneError, RolloutError) as error:  # it says: start again
                interruptions.append(error)
            except BaseException as error:
                failures.append(error)
                raise

    thread = threading.Thread(target=run_as_often_as_needed)
    kills = server.killed_during(thread, most=10, between=(0.2, 2.5), seed=3)
    assert not failures, server.said
    assert kills > 2
    assert reports == expected_reports
    datasets, models = left(tmp_path / "killed")
    assert datasets == expected[0] == []
    assert models.keys() == expected[1].keys()
    for name, weights in expected[1].items():
        assert all(torch.equal(value, models[name][key]) for key, value in weights.items()), name
