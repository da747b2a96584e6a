"""The example of an agent that is trained, run as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean

import pytest

from tests.programs import Zygote

EXAMPLE = Path(__file__).parent.parent / "examples/agent"


def asked(a: int, b: int) -> str:
    """A line of a data set."""
    message = {"role": "user", "content": f"{a}+{b}="}
    return json.dumps({"messages": [message], "ground_truth": str(a + b)})


def test_the_agent_knows_nothing_of_us_and_all_is_sixty_lines() -> None:
    agent, training = (
        (EXAMPLE / name).read_text().splitlines() for name in ("second_try.py", "test_agent.py")
    )
    assert len(agent) + len(training) <= 60
    imported = [line.split()[1] for line in agent if line.startswith(("import", "from"))]
    assert imported == ["agents"]


@pytest.mark.clients
def test_the_agents_reward_rises(zygote: Zygote, tmp_path: Path) -> None:
    pytest.importorskip("agents", reason="needs openai-agents")
    # All of one total, which is learned within a few steps.
    lines = [asked(a, 111 - a) for a in range(17, 97, 8)]
    (tmp_path / "sums.jsonl").write_text("\n".join(lines))
    arguments = (
        *("train", f"{EXAMPLE}/test_agent.py::test_agent", "-o", tmp_path / "run", "--seed", 1),
        *("--data", tmp_path / "sums.jsonl", "--held-out", 0, "--steps", 5),
        *("--groups-per-step", 8, "--max-staleness", 1, "--lr", "5e-4", "--warmup-steps", 3),
    )
    done = zygote.run(*arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    told = map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines())
    steps = [line for line in told if line["kind"] == "step"]
    rewards = [step["reward_mean"] for step in steps]
    assert fmean(rewards[-2:]) > fmean(rewards[:2]) + 0.2
    assert max(step.get("mismatch_max", 0.0) for step in steps) < 1e-3  # sampler against trainer
