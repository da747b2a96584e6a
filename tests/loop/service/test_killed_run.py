"""A run of `train` on the local Fireworks ends as an undisturbed one does, though the server is
killed at every kind of request, and at many more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fireworks.training.sdk", reason="needs the extra `fireworks`")

from eval_protocol_rft.loop._run_options import Optimizer
from eval_protocol_rft.loop._train import atrain
from eval_protocol_rft.loop._trainer import TrainerError
from eval_protocol_rft.loop.fireworks._connecting import FireworksParts
from examples.arithmetic import test_arithmetic as example
from tests.killing_proxy import Plan, killing_proxy
from tests.loop.runs import options, sums_file
from tests.programs import Zygote
from tests.service import BASE, KEY, ServiceProcess


async def trained(url: str, folder: Path, **chosen: Any) -> list[dict[str, Any]]:
    """The steps of a run, without what the clock decides."""
    result = await atrain(
        example.test_arithmetic,
        folder / "run",
        options=options(**chosen),
        completion_params={"model": BASE, "seed": 5},
        data=[sums_file(folder / "sums.jsonl")],
        held_out=8,
        progress=False,
        parts=FireworksParts(
            base_model=BASE,
            deployment="dep",
            training_shape="accounts/fireworks/trainingShapes/ts-arithmetic",
            optimizer=Optimizer(),
            base_url=url,
        ),
    )
    kept = ("step", "reward_mean", "completions", "grad_norm", "loss", "sampled_score")
    return [
        {name: line[name] for name in kept if name in line}
        for line in [*result.steps, *result.evaluations]
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    "plan",
    [Plan(), Plan(of_every_kind=False, share=0.12, most=100)],
    ids=["every kind of request", "at random"],
)
async def test_a_run_ends_as_if_nothing_had_been(
    plan: Plan, tmp_path: Path, zygote: Zygote, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FIREWORKS_API_KEY", KEY)
    steps = 8 if plan.of_every_kind else 40
    chosen = {"steps": steps, "groups_per_step": 4, "completions_per_prompt": 4}
    ended: list[Any] = []
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
    with ServiceProcess(zygote, tmp_path / "straight") as server:
        monkeypatch.setenv("FIREWORKS_BASE_URL", server.url)
        expected = await trained(server.url, tmp_path / "one", **chosen)
    with (
        ServiceProcess(zygote, tmp_path / "killed") as server,
        killing_proxy(server, plan) as proxy,
    ):
        monkeypatch.setenv("FIREWORKS_BASE_URL", proxy.url)
        found = None
        while found is None:
            kills = plan.kills.copy()
            try:
                found = await trained(proxy.url, tmp_path / "other", **chosen)
            except TrainerError as error:
                # Some requests of the SDK are not sent again by it: the same command goes on.
                ended.append((str(error), dict(plan.kills - kills)))
                assert len(ended) < 30, ended
        said = server.said
    print(plan.kills, *ended, sep="\n")
    assert found == [pytest.approx(line, rel=1e-4, abs=1e-6) for line in expected], said
    assert plan.kills.total() >= (20 if plan.of_every_kind else 40)
