"""Each algorithm trains the bundled model for real, with the command's own options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from eval_protocol_rft.loop._run_options import SetupError
from eval_protocol_rft.loop._setup import Parts
from eval_protocol_rft.training._algorithms import ALGORITHMS
from tests.loop.runs import options, run

NEW = ("gmpo", "sapo", "dppo_tv", "dppo_kl", "clip_cov", "kl_cov", "opo")


@pytest.mark.parametrize("algorithm", NEW)
async def test_it_takes_its_steps(tmp_path: Path, algorithm: str) -> None:
    needed = {"normalization": "sequence"} if algorithm == "gmpo" else {}
    chosen = options(algorithm=algorithm, steps=1, eval_every=0, eval_completions=0, **needed)
    result = await run(tmp_path / "run", chosen)
    steps = [line for line in result.lines if line["kind"] == "step"]
    assert [line["step"] for line in steps] == [1]
    # On-policy every ratio is 1, in any loss.
    assert [line["ratio_mean"] for line in steps] == pytest.approx([1.0], abs=1e-4)
    assert all(line["grad_norm"] > 0 for line in steps)
    assert set(NEW) <= set(ALGORITHMS)


async def test_remax_samples_a_greedy_completion_beside_each_prompts_own(tmp_path: Path) -> None:
    chosen = options(
        algorithm="remax", steps=1, completions_per_prompt=1, eval_every=0, eval_completions=0
    )
    result = await run(tmp_path / "run", chosen)
    steps = [line for line in result.lines if line["kind"] == "step"]
    assert len(steps) == 1
    for line in steps:
        assert line["dropped"] == {"baseline": 4}
        assert line["completions"] == 8


async def test_corrections_are_against_the_trainers_own_logprobs(tmp_path: Path) -> None:
    chosen = options(
        correction="token:2,seq_mean_k3:0.01",
        steps=1,
        passes=2,
        eval_every=0,
        eval_completions=0,
    )
    result = await run(tmp_path / "run", chosen)
    (line,) = [line for line in result.lines if line["kind"] == "step"]
    # One engine samples and trains here, so there is nothing to correct.
    assert line["correction"] == pytest.approx(1.0, abs=1e-4)
    assert line["correction_bounded"] == 0.0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"correction": "tokens:2"}, "'tokens:2' is none of token:CAP"),
        ({"algorithm": "sapo", "loss_fn_config": {"tau": 1.0}}, "unknown: tau"),
        ({"algorithm": "kl_cov", "loss_fn_config": {"kl_cov_ratio": 2.0}}, "is a share"),
    ],
)
async def test_what_is_wrong_with_a_loss_is_said_before_sampler_and_trainer_are_made(
    tmp_path: Path, wrong: dict[str, Any], message: str
) -> None:
    def never(parts: Parts) -> Parts:
        raise AssertionError("parts were made")

    with pytest.raises(SetupError, match=message):
        await run(tmp_path / "run", options(**wrong), broken=never)
