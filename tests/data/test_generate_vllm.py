"""`ep-rft generate` against a real vLLM server with a real model (see CONTRIBUTING.md).

`EP_RFT_VLLM_URL` names the server, started with `--logprobs-mode processed_logprobs`, and
`EP_RFT_VLLM_FOLDER` the folder of the model that it serves under the name of that folder.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from eval_protocol_rft.data._dataset import RolloutDataset

URL = os.environ.get("EP_RFT_VLLM_URL", "")
FOLDER = os.environ.get("EP_RFT_VLLM_FOLDER", "")
PROMPTS, N, MAX_TOKENS, TEMPERATURE = 64, 8, 32, 0.8

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(
        not (URL and FOLDER), reason="EP_RFT_VLLM_URL and EP_RFT_VLLM_FOLDER name no vLLM server"
    ),
]


@pytest.fixture(scope="module")
def rollouts(tmp_path_factory) -> RolloutDataset:
    folder = tmp_path_factory.mktemp("vllm")
    data = folder / "questions.jsonl"
    lines = [{"question": f"What is {i} plus {i + 3}? Be brief.", "i": i} for i in range(PROMPTS)]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = ["ep-rft", "generate", data, "-o", folder / "rollouts.parquet", "-n", str(N)]
    command += ["--model", Path(FOLDER).name, "--base-url", URL, "--tokenizer", FOLDER]
    command += ["--max-tokens", str(MAX_TOKENS), "--temperature", str(TEMPERATURE)]
    command += ["--logprobs-mode", "processed_logprobs", "--concurrency", "64", "--quiet"]
    subprocess.run(command, check=True)
    return RolloutDataset(folder / "rollouts.parquet")


def test_every_completion_is_there(rollouts) -> None:
    keys = [(row.data_idx, row.sample_idx) for row in rollouts]
    assert keys == [(i, k) for i in range(PROMPTS) for k in range(N)]
    assert not [row.error for row in rollouts if row.failed]


def test_what_ended_says_so(rollouts) -> None:
    end = AutoModelForCausalLM.from_pretrained(FOLDER).config.eos_token_id
    for row in rollouts:
        assert row.truncated == (row.finish_reason == "length")
        assert (row.completion_ids[-1] == end) == (row.finish_reason == "stop")
        assert row.num_tokens <= MAX_TOKENS


@torch.no_grad()
def test_logprobs_equal_a_teacher_forced_forward(rollouts) -> None:
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    for group in list(rollouts.groups())[::16]:
        for row in group:
            prompt, ids = row.prompt_ids.tolist(), row.completion_ids.tolist()
            logits = model(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
            forced = (logits / TEMPERATURE).log_softmax(-1)[torch.arange(len(ids)), ids]
            np.testing.assert_allclose(row.logprobs, forced.numpy(), atol=1e-4, rtol=0)
