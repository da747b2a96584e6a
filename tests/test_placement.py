"""Where a model lies and what it computes in: what is chosen, what is refused, and that bfloat16 is
sampled and trained with logprobs in float32."""

from __future__ import annotations

import asyncio
import copy
import os

import numpy as np
import pytest
import torch
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from eval_protocol_rft import training
from eval_protocol_rft.cli import app
from eval_protocol_rft.local import LocalSampler, Placement, load_model
from eval_protocol_rft.local._sampler import load_local_sampler
from eval_protocol_rft.local.models import bundled_model_path
from eval_protocol_rft.loop._local_trainer import LocalTrainer
from eval_protocol_rft.loop._run_options import LoraSettings
from eval_protocol_rft.loop._trainer import NamedLoss, SamplerWeights, TrainerError
from eval_protocol_rft.sampling import RefusedError, SamplingParams
from tests.loop.policies import KeptWeights, change, datums, tiny_model

PARAMS = SamplingParams(model="arithmetic", max_tokens=12, extra={"ignore_eos": True})
PLAIN = NamedLoss(loss_fn="importance_sampling")
BFLOAT16 = Placement(device="cpu", dtype="bfloat16")


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch):
    """Says what the driver would say of so many GPUs."""

    def there_are(count: int, *, capability: tuple[int, int] = (9, 0)) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU of a test")

    return there_are


@pytest.mark.parametrize(
    ("weights", "chosen"),
    [
        (torch.float32, "float32"),
        (torch.bfloat16, "bfloat16"),
        ("bfloat16", "bfloat16"),
        (torch.float16, "bfloat16"),
        (None, "float32"),
    ],
)
def test_auto_is_a_gpu_in_the_dtype_of_the_weights_or_else_the_cpu_in_float32(
    gpus, weights, chosen
) -> None:
    gpus(2)
    place = Placement().chosen(weights)
    assert (place.device, place.dtype) == ("cuda:0", chosen)
    gpus(0)
    place = Placement().chosen(weights)
    assert (place.device, place.dtype) == ("cpu", "float32")


def test_what_was_asked_for_is_what_is_used(gpus) -> None:
    gpus(2)
    assert str(Placement(device="cuda:1", dtype="float32").chosen(torch.bfloat16)) == (
        "cuda:1, float32"
    )
    assert str(Placement(device="cpu", dtype="bfloat16").chosen(torch.float32)) == "cpu, bfloat16"


def test_a_gpu_that_is_not_there_is_refused_with_what_to_do(gpus, monkeypatch) -> None:
    gpus(0)
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(RefusedError, match=r"cuda: torch .* is built for the CPU alone: install"):
        Placement(device="cuda").chosen()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(RefusedError, match=r"sees no GPU: look at nvidia-smi"):
        Placement(device="cuda:0").chosen()
    gpus(2)
    with pytest.raises(RefusedError, match=r"cuda:2: this machine has cuda:0 to cuda:1"):
        Placement(device="cuda:2").chosen()
    gpus(1)
    with pytest.raises(RefusedError, match=r"cuda:1: this machine has cuda:0$"):
        Placement(device="cuda:1").chosen()


def test_a_gpu_without_bfloat16_takes_float32_and_refuses_the_other(gpus) -> None:
    gpus(1, capability=(7, 5))
    assert Placement().chosen(torch.bfloat16).dtype == "float32"
    with pytest.raises(RefusedError, match=r"bfloat16: cuda:0 \(GPU of a test\) lacks it"):
        Placement(dtype="bfloat16").chosen()


def test_flash_attention_needs_a_gpu_bfloat16_and_its_package(gpus) -> None:
    flash = Placement(attention="flash_attention_2")
    gpus(0)
    with pytest.raises(RefusedError, match=r"on cpu in float32: take sdpa"):
        flash.chosen()
    gpus(1)
    with pytest.raises(RefusedError, match=r"on cuda:0 in float32: take sdpa"):
        flash.chosen(torch.float32)
    with pytest.raises(RefusedError, match="pip install flash-attn"):
        flash.chosen(torch.bfloat16)


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:x", "cpu:0", "", "CUDA"])
def test_a_device_is_checked_before_anything_is_loaded(device: str) -> None:
    with pytest.raises(ValueError, match="device must be auto, cpu, cuda"):
        Placement(device=device)


def test_deterministic_is_what_torch_has_for_it(monkeypatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    path = bundled_model_path("arithmetic")
    assert path is not None
    try:
        load_model(path, placement=Placement(device="cpu", deterministic=True))
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        assert torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction is False
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = True


def bfloat16_model():
    return AutoModelForCausalLM.from_pretrained(
        bundled_model_path("arithmetic"), dtype=torch.bfloat16
    )


def bfloat16_sampler() -> LocalSampler:
    path = bundled_model_path("arithmetic")
    assert path is not None
    return LocalSampler.from_pretrained(path, placement=BFLOAT16, policy_version="step-0")


def prompt(sampler: LocalSampler, question: str = "17+25=") -> list[int]:
    return list(
        sampler.tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
        )
    )


@torch.no_grad()
def float32_head_logprobs(model, prompt_ids, completion) -> np.ndarray:
    """[T] by one plain forward of the layers in bfloat16, and the output layer in float32."""
    ids = torch.tensor([[*prompt_ids, *completion.token_ids]])
    hidden = model.model(ids, use_cache=False).last_hidden_state[0, len(prompt_ids) - 1 : -1]
    logits = linear(hidden.float(), model.lm_head.weight.float())
    chosen = torch.tensor(completion.token_ids)[:, None]
    return logits.log_softmax(-1).gather(-1, chosen)[:, 0].numpy()


async def test_bfloat16_samples_with_logprobs_of_a_float32_head() -> None:
    sampler, plain = bfloat16_sampler(), bfloat16_model()
    ids = prompt(sampler)
    completions = await asyncio.gather(
        *(sampler.sample(ids, PARAMS, seed=seed) for seed in range(8))
    )
    assert sampler.model.dtype == torch.bfloat16
    logits = sampler.model(torch.tensor([ids])).logits
    assert logits.dtype == torch.float32
    # Values that bfloat16 cannot hold: they were never rounded to it.
    assert not torch.equal(logits, logits.bfloat16().float())
    for completion in completions:
        expected = float32_head_logprobs(plain, ids, completion)
        # Layers in bfloat16 differ between a whole and a step; a rounded head by ten times more.
        np.testing.assert_allclose(np.exp(completion.logprobs), np.exp(expected), atol=0.05)
    assert (await sampler.sample(ids, PARAMS, seed=3)).token_ids == completions[3].token_ids
    await sampler.aclose()


async def test_new_weights_reach_the_float32_head_of_a_sampler() -> None:
    sampler = bfloat16_sampler()
    ids = prompt(sampler)
    before = await sampler.sample(ids, PARAMS, seed=1)
    other = copy.deepcopy(sampler.model)
    change(other, seed=4)
    await sampler.load_weights(other.state_dict(), policy_version="step-1")
    now = await sampler.sample(ids, PARAMS, seed=1)
    anew = LocalSampler(other, sampler.tokenizer)
    expected = await anew.sample(ids, PARAMS, seed=1)
    assert (now.token_ids, now.logprobs) == (expected.token_ids, expected.logprobs)
    assert now.logprobs != before.logprobs
    await sampler.aclose()
    await anew.aclose()


@pytest.mark.parametrize("lora", [None, LoraSettings(rank=4, alpha=8)])
async def test_sampler_and_trainer_agree_in_bfloat16_before_and_after_a_step(
    lora: LoraSettings | None,
) -> None:
    sampler = bfloat16_sampler()
    trainer = LocalTrainer(sampler.model, sink=SamplerWeights(sampler), lora=lora)
    ids = prompt(sampler)
    for version in range(3):
        completions = await asyncio.gather(
            *(sampler.sample(ids, PARAMS, seed=seed) for seed in range(8))
        )
        batch = training.comparable([training.unscored(ids, one) for one in completions])
        told = await trainer.forward_backward(batch, PLAIN)
        difference = training.measure(training.sampled_pairs(batch, told.logprobs, {0}))
        assert difference is not None
        assert difference.k3 < 1e-3, version
        assert difference.verdict == "pass"
        await trainer.optim_step(learning_rate=1e-3)
        await trainer.publish(version + 1)
        for name, value in sampler.model.state_dict().items():
            assert torch.equal(value, trainer.weights()[name]), name
    assert sampler.model.dtype == torch.bfloat16
    await trainer.aclose()
    await sampler.aclose()


async def test_steps_that_bfloat16_cannot_hold_are_not_lost() -> None:
    # 40 steps of a thousandth: at 1 each is rounded away by itself, together they are 0.04.
    model = tiny_model().bfloat16()
    trainer = LocalTrainer(model, sink=KeptWeights(), entropies=False)
    name = "model.norm.weight"
    assert torch.equal(trainer.weights()[name], torch.ones(32, dtype=torch.bfloat16))
    for _ in range(40):
        await trainer.forward_backward(
            datums(1), lambda data, logprobs: (sum(v.sum() for v in logprobs), {})
        )
        await trainer.optim_step(learning_rate=1e-3)
    moved = (trainer.weights()[name].float() - 1).abs()
    assert moved.max() > 0.01
    await trainer.aclose()


async def test_gradients_of_bfloat16_weights_gather_in_float32() -> None:
    model, batch = tiny_model().bfloat16(), datums(12)
    whole, parts = (LocalTrainer(model, sink=KeptWeights()) for _ in range(2))
    await whole.forward_backward(batch, PLAIN)
    for i in range(12):
        await parts.forward_backward(batch[i : i + 1], PLAIN)
    gathered = [weight.grad for weight in parts._masters.weights.values()]
    assert all(g is not None and g.dtype == torch.float32 for g in gathered)
    assert all(p.grad is None for p in parts._module.parameters())
    one = await whole.optim_step(learning_rate=1e-3)
    other = await parts.optim_step(learning_rate=1e-3)
    assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=0.02)


async def test_bfloat16_training_goes_on_to_the_last_bit_and_not_in_float32(tmp_path) -> None:
    async def steps(trainer: LocalTrainer, first: int, last: int) -> None:
        for seed in range(first, last):
            await trainer.forward_backward(datums(4, seed=seed), PLAIN)
            await trainer.optim_step(learning_rate=1e-4)

    straight = LocalTrainer(tiny_model().bfloat16(), sink=KeptWeights())
    await steps(straight, 0, 3)
    await straight.save(tmp_path)
    await steps(straight, 3, 8)
    resumed = LocalTrainer(tiny_model().bfloat16(), sink=KeptWeights())
    await resumed.load(tmp_path)
    await steps(resumed, 3, 8)
    for name, value in straight._masters.weights.items():
        assert torch.equal(value, resumed._masters.weights[name]), name
    for name, value in straight.weights().items():
        assert torch.equal(value, resumed.weights()[name]), name
    other = LocalTrainer(tiny_model(), sink=KeptWeights())
    with pytest.raises(TrainerError, match=r"was trained in bfloat16.*--dtype bfloat16"):
        await other.load(tmp_path)


async def test_a_model_that_nobody_samples_from_is_trained_in_place() -> None:
    model = tiny_model()
    trainer = LocalTrainer(model, sink=KeptWeights(), in_place=True, keep_reference=True)
    before = await trainer.forward(datums(2))
    await trainer.forward_backward(datums(2), PLAIN)
    await trainer.optim_step(learning_rate=0.1)
    assert trainer.weights()["lm_head.weight"].data_ptr() == model.lm_head.weight.data_ptr()
    reference = await trainer.forward(datums(2), reference=True)
    np.testing.assert_array_equal(before[0], reference[0])


def test_float16_is_not_trained() -> None:
    with pytest.raises(TrainerError, match="float16, whose range gradients leave"):
        LocalTrainer(tiny_model().half(), sink=KeptWeights())


def test_one_sampler_for_each_placement() -> None:
    cpu = load_local_sampler("arithmetic")
    half = load_local_sampler("arithmetic", placement=BFLOAT16)
    assert (cpu.model.dtype, half.model.dtype) == (torch.float32, torch.bfloat16)
    assert (
        load_local_sampler("arithmetic", placement=Placement(dtype="bfloat16", device="cpu"))
        is half
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    "command",
    [
        ["generate", "DATA", "-o", "OUT"],
        ["doctor"],
        ["serve", "--port", "0"],
    ],
)
def test_commands_refuse_a_gpu_that_is_not_there(command, tmp_path) -> None:
    data = tmp_path / "in.jsonl"
    data.write_text('{"prompt": "1+1="}\n')
    words = {"DATA": str(data), "OUT": str(tmp_path / "out.parquet")}
    arguments = [words.get(word, word) for word in command]
    result = CliRunner().invoke(
        app, [*arguments, "--model", "local/arithmetic", "--device", "cuda"]
    )
    assert result.exit_code == 1
    assert "device cuda: torch" in result.output + result.stderr


def test_generate_says_where_the_model_runs_and_refuses_to_place_a_server(tmp_path) -> None:
    data, out = tmp_path / "in.jsonl", tmp_path / "out.parquet"
    data.write_text('{"prompt": "1+1="}\n')
    base = ["generate", str(data), "-o", str(out), "--max-tokens", "4", "--quiet"]
    result = CliRunner().invoke(
        app, [*base, "--model", "local/arithmetic", "--device", "cpu", "--attention", "eager"]
    )
    assert result.exit_code == 0, result.output
    assert result.stderr.count("arithmetic: cpu, float32, eager attention") == 1
    result = CliRunner().invoke(
        app, [*base, "--model", "m", "--base-url", "http://127.0.0.1:1", "--dtype", "bfloat16"]
    )
    assert result.exit_code == 1
    assert "the server has its own" in result.stderr
