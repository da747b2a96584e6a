"""A real model learns over a real vLLM server that takes new weights at every step.

Needs a server with `VLLM_SERVER_DEV_MODE=1` that serves the folder `EP_RFT_VLLM_FOLDER` by its name
(SmolLM2-135M) at `EP_RFT_VLLM_URL`; some six minutes on two cores. See CONTRIBUTING.md.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from eval_protocol_rft.loop._run_options import LoopOptions, Optimizer
from eval_protocol_rft.loop._served_weights import ServedWeights
from eval_protocol_rft.loop._setup import LocalParts
from eval_protocol_rft.loop._train import atrain
from tests.loop import digit_sums

URL = os.environ.get("EP_RFT_VLLM_URL", "")
FOLDER = os.environ.get("EP_RFT_VLLM_FOLDER", "")
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(
        not (URL and FOLDER), reason="EP_RFT_VLLM_URL, EP_RFT_VLLM_FOLDER name no vLLM server"
    ),
]
BEFORE, AFTER = 0.3, 0.7
"""Mean reward of what is sampled, at most at first and at least in the end."""
STEPS = 8
"""Beyond them nearly all answers are right, and a step must ask for ten times the prompts to find
twelve that still teach something."""


async def test_reward_climbs_over_live_weight_sync(tmp_path: Path) -> None:
    folder = Path(FOLDER)
    original = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    served = ServedWeights(URL)
    # Whoever used the server before may have left other weights in it.
    await served.publish(original, original.state_dict(), 0)
    try:
        result = await atrain(
            digit_sums.test_digit_sum,
            tmp_path / "run",
            options=LoopOptions(
                steps=STEPS,
                groups_per_step=12,
                completions_per_prompt=8,
                learning_rate=2e-5,
                eval_every=0,
                eval_completions=4,
            ),
            model=folder.name,
            completion_params={
                "api_base": URL,
                "tokenizer": FOLDER,
                "logprobs_mode": "processed_logprobs",
            },
            held_out=16,
            parts=LocalParts(weights=folder, optimizer=Optimizer(microbatch_tokens=1024)),
            progress=False,
            on_line=lambda line: print(_told(line), flush=True),
        )
    finally:
        await served.publish(original, original.state_dict(), 0)
    rewards = [line["reward_mean"] for line in result.steps]
    assert len(rewards) == STEPS
    assert rewards[0] < BEFORE
    assert sum(rewards[-2:]) / 2 > AFTER
    # float32 on both sides: the server has the very weights that are trained, at every step.
    assert max(line["mismatch_k3"] for line in result.steps) < 1e-6
    first, last = result.evaluations[0], result.evaluations[-1]
    assert last["sampled_score"] > first["sampled_score"] + 0.3


def _told(line: dict[str, object]) -> str:
    """For `pytest -s`."""
    wanted = ("reward_mean", "mismatch_k3", "groups", "sampled_score", "greedy_score", "seconds")
    return f"{line['kind']} {line['step']} " + " ".join(
        f"{name}={line[name]}" for name in wanted if name in line
    )
