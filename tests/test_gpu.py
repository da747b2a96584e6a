"""On a GPU: what is sampled and trained there is what the CPU gives. `scripts/gpu_check.sh`."""

from __future__ import annotations

import asyncio
import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from eval_protocol_rft import training
from eval_protocol_rft.cli import app
from eval_protocol_rft.local import LocalSampler, Placement
from eval_protocol_rft.local.models import bundled_model_path
from eval_protocol_rft.loop import LoraSettings, NamedLoss, Optimizer
from eval_protocol_rft.loop._local_trainer import LocalTrainer
from eval_protocol_rft.loop._memory import LocalRun, _datum
from eval_protocol_rft.loop._trainer import SamplerWeights
from eval_protocol_rft.sampling import SamplingParams
from tests.loop.policies import KeptWeights, datums, tiny_model
from tests.test_memory import config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, and pytest -m gpu"),
]
PLAIN = NamedLoss(loss_fn="importance_sampling")
PARAMS = SamplingParams(
    model="arithmetic", max_tokens=12, temperature=0.9, top_p=0.95, extra={"ignore_eos": True}
)
EXAMPLE = Path(__file__).parents[1] / "examples" / "sums"


def sampler_on(device: str, dtype: str = "float32") -> LocalSampler:
    path = bundled_model_path("arithmetic")
    assert path is not None
    placement = Placement(device=device, dtype=dtype)  # type: ignore[arg-type]
    return LocalSampler.from_pretrained(path, placement=placement, policy_version="step-0")


def prompts(sampler: LocalSampler) -> list[list[int]]:
    return [
        list(
            sampler.tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
            )
        )
        for text in ("17+25=", "8+9=", "123456+1=")
    ]


async def test_a_gpu_draws_what_the_cpu_draws() -> None:
    cpu, gpu = sampler_on("cpu"), sampler_on("cuda")
    for ids in prompts(cpu):
        for seed in range(4):
            one = await cpu.sample(ids, PARAMS, seed=seed)
            other = await gpu.sample(ids, PARAMS, seed=seed)
            assert one.token_ids == other.token_ids
            np.testing.assert_allclose(one.logprobs, other.logprobs, atol=2e-3)
    await cpu.aclose()
    await gpu.aclose()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("lora", [None, LoraSettings(rank=4, alpha=8)])
async def test_sampler_and_trainer_agree_on_a_gpu(dtype, lora) -> None:
    sampler = sampler_on("cuda", dtype)
    trainer = LocalTrainer(
        sampler.model,
        sink=SamplerWeights(sampler),
        lora=lora,
        temperature=1.0,
        optimizer=Optimizer(gradient_checkpointing=lora is None),
    )
    plain = SamplingParams(model="arithmetic", max_tokens=12, extra={"ignore_eos": True})
    for version in range(3):
        ids = prompts(sampler)
        drawn = await asyncio.gather(
            *(sampler.sample(p, plain, seed=seed) for p in ids for seed in range(8))
        )
        asked = [p for p in ids for _ in range(8)]
        batch = training.comparable(
            [training.unscored(p, one) for p, one in zip(asked, drawn, strict=True)]
        )
        told = await trainer.forward_backward(batch, PLAIN)
        difference = training.measure(training.sampled_pairs(batch, told.logprobs, {0}))
        assert difference is not None
        assert difference.k3 < (1e-5 if dtype == "float32" else 2e-3), version
        await trainer.optim_step(learning_rate=1e-4)
        await trainer.publish(version + 1)
    assert sampler.model.device.type == "cuda"
    await trainer.aclose()
    await sampler.aclose()


async def test_a_step_on_a_gpu_is_the_cpus_and_a_saved_run_goes_on_on_either(tmp_path) -> None:
    model, batch = tiny_model(), datums(8)
    cpu = LocalTrainer(copy.deepcopy(model), sink=KeptWeights())
    gpu = LocalTrainer(copy.deepcopy(model).cuda(), sink=KeptWeights())
    for trainer in (cpu, gpu):
        await trainer.forward_backward(batch, PLAIN)
        await trainer.optim_step(learning_rate=1e-3)
    for name, value in cpu.weights().items():
        torch.testing.assert_close(gpu.weights()[name].cpu(), value, atol=2e-4, rtol=1e-3)
    await gpu.save(tmp_path)
    await cpu.load(tmp_path)
    for name, value in gpu.weights().items():
        assert torch.equal(value.cpu(), cpu.weights()[name]), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
async def test_a_pass_takes_on_a_gpu_what_was_counted(dtype) -> None:
    from transformers import LlamaForCausalLM

    place = Placement(device="cuda", dtype=dtype).chosen()
    run = LocalRun(
        config=config(),
        place=place,
        lora=None,
        optimizer=Optimizer(),
        reference=False,
        longest=256,
        datums=16,
    )
    counted = run.memory()
    assert counted is not None
    before = torch.cuda.memory_allocated()
    model = LlamaForCausalLM(config()).to(place.device, place.torch_dtype())
    trainer = LocalTrainer(model, sink=KeptWeights(), in_place=True)
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        await trainer.forward_backward([_datum(256)] * 16, PLAIN)
        await trainer.optim_step(learning_rate=1e-4)
    measured = torch.cuda.max_memory_allocated() - before
    assert 0.7 < counted.total / measured < 1.4, (counted.total, measured)


def test_commands_run_on_a_gpu(tmp_path) -> None:
    data, out = tmp_path / "in.jsonl", tmp_path / "out.parquet"
    data.write_text('{"prompt": "1+1="}\n')
    asked = ["--model", "local/arithmetic", "--device", "cuda", "--dtype", "bfloat16"]
    result = CliRunner().invoke(app, ["generate", str(data), "-o", str(out), "-n", "4", *asked])
    assert result.exit_code == 0, result.output
    assert "arithmetic: cuda:0, bfloat16" in result.stderr
    arguments = [
        "train", f"{EXAMPLE}/test_sums.py::test_sums", "--steps", "2", "--groups-per-step", "4",
        "--eval-data", f"{EXAMPLE}/held_out.jsonl", "-o", str(tmp_path / "run"), "--deterministic",
    ]  # fmt: skip
    result = CliRunner().invoke(app, [*arguments, *asked])
    assert result.exit_code == 0, result.output
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    steps = [line for line in map(json.loads, lines) if line["kind"] == "step"]
    assert all(line["mismatch_k3"] < 2e-3 for line in steps)
