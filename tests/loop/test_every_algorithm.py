"""Each algorithm trains the bundled model for real, with the command's own options."""

from __future__ import annotations

from pathlib import Path

import pytest

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
