"""Models `vllm/...` with vLLM itself: `EP_RFT_VLLM_PYTHON` names an interpreter that has it, see
CONTRIBUTING.md. Some ten minutes on two idle cores, most of it vLLM starting."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from eval_protocol_rft.data._dataset import RolloutDataset
from eval_protocol_rft.local.engine import VllmOptions
from eval_protocol_rft.local.engine._command import PYTHON_VARIABLE
from eval_protocol_rft.local.models import NoSuchModelError, local_model_folder
from eval_protocol_rft.loop._setup import LocalParts
from eval_protocol_rft.loop._train import atrain
from examples.arithmetic import test_arithmetic as example
from tests.engine import stand_in
from tests.loop import digit_sums
from tests.loop.runs import options, sums_file
from tests.waiting import wait_until

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(
        PYTHON_VARIABLE not in os.environ, reason=f"{PYTHON_VARIABLE} names no vLLM"
    ),
]


def processes() -> set[int]:
    """vLLM's on this machine, the supervisors among them."""
    found = set()
    for folder in Path("/proc").iterdir():
        try:
            words = (folder / "cmdline").read_bytes().replace(b"\0", b" ")
        except OSError:
            continue
        if any(name in words for name in (b"vllm.entrypoints", b"VLLM::", b"engine/_beside.py")):
            found.add(int(folder.name))
    return {pid for pid in found if stand_in.is_alive(pid)}


def folder_of_smollm2() -> Path:
    try:
        return local_model_folder("local/smollm2")
    except NoSuchModelError as error:
        pytest.skip(str(error))


def test_a_job_that_is_killed_takes_its_engine_along_and_goes_on(zygote, tmp_path) -> None:
    folder = folder_of_smollm2()
    others = processes()
    data = tmp_path / "questions.jsonl"
    lines = [{"prompt": f"What is {i} plus {i + 3}? Be brief."} for i in range(24)]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = tmp_path / "out.parquet"
    command = ["generate", data, "-o", out, "-n", 8, "--model", "vllm/smollm2"]
    command += ["--max-tokens", 24, "--temperature", 0.8, "--max-model-len", 512]

    job = zygote.start(*command)
    wait_until(lambda: "24/" in job.stderr or "tok/s" in job.stderr or job.poll() is not None)
    assert job.poll() is None, job.said
    assert processes() - others
    job.kill(signal.SIGKILL)
    wait_until(lambda: not processes() - others)

    again = zygote.run(*command)
    assert again.returncode == 0, again.stderr
    assert not processes() - others
    rows = list(RolloutDataset(out))
    assert [(row.data_idx, row.sample_idx) for row in rows] == [
        (i, k) for i in range(24) for k in range(8)
    ]
    assert not [row.error for row in rows if row.failed]
    # Two starts of vLLM draw different tokens: seeds of its own would repeat themselves.
    assert len({tuple(row.completion_ids.tolist()) for row in rows}) > 100
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for row in rows[::24]:
        prompt, ids = row.prompt_ids.tolist(), row.completion_ids.tolist()
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        forced = (logits / 0.8).log_softmax(-1)[torch.arange(len(ids)), ids]
        np.testing.assert_allclose(row.logprobs, forced.numpy(), atol=1e-4, rtol=0)


async def test_weights_in_training_reach_the_engine_in_place(tmp_path) -> None:
    folder_of_smollm2()
    others = processes()
    result = await atrain(
        digit_sums.test_digit_sum,
        tmp_path / "run",
        model="local/smollm2",
        options=options(steps=3, eval_every=0, learning_rate=2e-5),
        held_out=2,
        parts=LocalParts(sampler="vllm", vllm=VllmOptions(max_model_len=512)),
        progress=False,
    )
    assert len(result.steps) == 3
    # float32 on both sides: the engine has the very weights that are trained, at every step.
    assert max(line["mismatch_k3"] for line in result.steps) < 1e-8
    assert not processes() - others


async def test_the_bundled_model_runs_ahead_of_its_trainer(tmp_path) -> None:
    others = processes()
    result = await atrain(
        example.test_arithmetic,
        tmp_path / "run",
        model="vllm/arithmetic",
        data=[sums_file(tmp_path / "sums.jsonl")],
        options=options(steps=6, max_staleness=1, eval_every=0),
        held_out=4,
        progress=False,
    )
    assert max(line["mismatch_k3"] for line in result.steps if line["mismatch_tokens"]) < 1e-8
    assert not processes() - others


def test_a_folder_that_vllm_cannot_load_is_told_in_its_words(zygote, tmp_path) -> None:
    others = processes()
    config = json.loads((local_model_folder("arithmetic") / "config.json").read_text())
    bad = tmp_path / "model"
    bad.mkdir()
    (bad / "config.json").write_text(json.dumps({**config, "architectures": ["NoSuchModel"]}))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (bad / name).write_bytes((local_model_folder("arithmetic") / name).read_bytes())
    (tmp_path / "data.jsonl").write_text('{"prompt": "1+1="}\n')
    done = zygote.run(
        *("generate", tmp_path / "data.jsonl", "-o", tmp_path / "o.parquet", "--raw", "--quiet"),
        *("--model", f"vllm/{bad}"),
        env={"TMPDIR": str(tmp_path)},
    )
    assert done.returncode == 1
    assert "NoSuchModel" in done.stderr
    assert "its log:" in done.stderr
    assert "Traceback" not in done.stderr
    assert not processes() - others
