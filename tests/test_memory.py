"""Memory that is counted before a weight is read, against what torch's allocator then hands out."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from eval_protocol_rft.local import (
    LocalSampler,
    Memory,
    Placement,
    estimate,
    peak_bytes,
    require_fit,
    sampling_memory,
)
from eval_protocol_rft.local import _memory as local_memory
from eval_protocol_rft.local._memory import free_memory
from eval_protocol_rft.local.models import bundled_model_path
from eval_protocol_rft.loop import LoraSettings, Optimizer
from eval_protocol_rft.loop import _memory as loop_memory
from eval_protocol_rft.loop._local_trainer import LocalTrainer
from eval_protocol_rft.loop._memory import LocalRun, _datum, sampler_memory
from eval_protocol_rft.loop._trainer import NamedLoss
from eval_protocol_rft.sampling import RefusedError
from tests.loop.policies import KeptWeights

LONGEST, DATUMS = 64, 4
PLAIN = NamedLoss(loss_fn="importance_sampling")
CPU = Placement(device="cpu", dtype="float32")


def config(**changes: Any) -> LlamaConfig:
    """Of 22 million parameters, just too many to be called small."""
    return LlamaConfig(
        **{
            "vocab_size": 24000, "hidden_size": 384, "intermediate_size": 1024,
            "num_hidden_layers": 8, "num_attention_heads": 6, "num_key_value_heads": 2,
            "max_position_embeddings": 512, "tie_word_embeddings": True, "bos_token_id": None,
            "eos_token_id": 1, "pad_token_id": None,
        }
        | changes
    )  # fmt: skip


def run_of(**changes: Any) -> LocalRun:
    return LocalRun(
        **{
            "config": config(), "place": CPU, "lora": None, "optimizer": Optimizer(),
            "reference": False, "longest": LONGEST, "datums": DATUMS,
        }
        | changes
    )  # fmt: skip


def allocated_at_most(run: Any) -> int:
    """The most that torch's allocator had handed out at once while `run` ran."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    now = most = 0
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def test_what_lives_at_once_is_counted_once() -> None:
    def work() -> torch.Tensor:
        first = torch.zeros(1000)
        second = first.view(10, 100)[1:] + 1  # 3,600 bytes; a view is nothing
        del first
        return second * 2

    assert peak_bytes(work) == 4000 + 3600
    assert peak_bytes(lambda: torch.ones(10)) == 40
    before = torch.ones(10)
    assert peak_bytes(lambda: before.view(2, 5)) == 0


@pytest.mark.parametrize(
    ("dtype", "lora", "again"),
    [
        ("bfloat16", None, False),
        ("float32", None, True),
        ("bfloat16", LoraSettings(rank=8), False),
    ],
)
def test_a_pass_takes_what_was_counted_before_there_was_a_model(dtype, lora, again) -> None:
    optimizer = Optimizer(gradient_checkpointing=again)
    run = run_of(place=replace(CPU, dtype=dtype), lora=lora, optimizer=optimizer)
    counted = run.memory()
    assert counted is not None
    model = LlamaForCausalLM(config()).to(run.place.torch_dtype())
    trainer = LocalTrainer(model, sink=KeptWeights(), lora=lora, optimizer=optimizer, in_place=True)
    batch = [_datum(LONGEST)] * DATUMS

    def step() -> None:
        trainer._forward_backward(batch, PLAIN, None, None)
        trainer._optim_step(1e-4)

    step()  # AdamW's state is there from now on
    trainer._forward_backward(batch, PLAIN, None, None)  # and gradients
    measured = allocated_at_most(step)
    (told,) = (size for name, size in counted.parts.items() if name.startswith("a pass of 4 x 64"))
    assert 0.8 < told / measured < 1.25, (told, measured)


def test_what_stays_is_counted_exactly() -> None:
    run = run_of(place=replace(CPU, dtype="bfloat16"), reference=True)
    counted = run.memory()
    assert counted is not None
    numbers = sum(p.numel() for p in LlamaForCausalLM(config()).parameters())
    assert counted.parts["weights in training"] == 2 * numbers
    assert counted.parts["their float32 masters"] == 4 * numbers
    assert counted.parts["gradients"] == 4 * numbers
    assert counted.parts["AdamW's state"] == 8 * numbers
    assert counted.parts["frozen copy"] == 2 * numbers
    small = replace(run, optimizer=Optimizer(variant="adamw_8bit")).memory()
    assert small is not None
    assert small.parts["AdamW's state"] == 2 * numbers
    sampler = sampling_memory(config(), run.place, max_batch_tokens=1000)
    assert sampler is not None
    assert sampler.parts["weights"] == 2 * numbers
    assert sampler.parts["float32 output layer"] == 4 * 24000 * 384
    # 8 layers, keys and values, 2 heads of 64, 2 bytes; half as much again for sessions.
    assert sampler.at_most["keys and values"] == 1500 * 8 * 2 * 2 * 64 * 2


def test_all_layers_take_what_two_and_four_say() -> None:
    run = run_of(config=config(num_hidden_layers=6, vocab_size=30000))
    traced = local_memory._measured(run.config, CPU, lambda model: run._pass(DATUMS, model))
    counted = run.memory()
    assert counted is not None
    assert counted.parts["a pass of 4 x 64 tokens"] == traced


def test_what_does_not_fit_is_refused_with_what_would(monkeypatch) -> None:
    large = config(
        vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=8192,
        tie_word_embeddings=False,
    )  # fmt: skip
    half = replace(CPU, dtype="bfloat16")
    sampler = estimate(lambda: sampler_memory(large, half))
    fewer = Optimizer(microbatch_tokens=1024)
    run = run_of(config=large, place=half, longest=512, sampler=sampler, optimizer=fewer)
    for module in (local_memory, loop_memory):
        monkeypatch.setattr(module, "free_memory", lambda device: int(60e9))
    with pytest.raises(RefusedError, match=r"about 1\d\d GB.* cpu has 60 GB free") as refused:
        run.checked()
    what_would = "with --gradient-checkpointing --lora-rank 16 it would take 4"
    assert what_would in str(refused.value)
    for module in (local_memory, loop_memory):
        monkeypatch.setattr(module, "free_memory", lambda device: 1000)
    again = replace(fewer, gradient_checkpointing=True)
    with pytest.raises(RefusedError, match=r"nor would it with --dtype .*--lora-rank 16: train a"):
        run_of(optimizer=again).checked()


def test_a_model_that_does_not_fit_is_refused_before_its_weights_are_read(
    tmp_path, monkeypatch
) -> None:
    bundled = bundled_model_path("arithmetic")
    assert bundled is not None
    for path in bundled.glob("*token*"):
        shutil.copy(path, tmp_path)
    config().save_pretrained(tmp_path)  # and no weights at all
    monkeypatch.setattr(local_memory, "free_memory", lambda device: 50_000_000)
    with pytest.raises(RefusedError, match="does not fit; --dtype bfloat16 takes half of it"):
        LocalSampler.from_pretrained(tmp_path, placement=CPU)
    monkeypatch.setattr(local_memory, "free_memory", lambda device: None)  # nobody knows
    said: list[str] = []
    with pytest.raises(RefusedError, match="cannot load the local model"):
        LocalSampler.from_pretrained(tmp_path, placement=CPU, say=said.append)
    (line,) = said
    assert "cpu, float32; about 0.1" in line
    assert "weights 0.08" in line
    assert "keys and values up to" in line


def test_what_a_small_model_takes_is_not_told() -> None:
    tiny = config(vocab_size=40)
    assert str(estimate(lambda: sampling_memory(tiny, CPU, max_batch_tokens=10))) == ""


def test_memory_that_cannot_be_counted_is_said_and_refuses_nothing() -> None:
    def count() -> Memory:
        raise NotImplementedError("this layer asks for numbers")

    memory = estimate(count)
    assert str(memory) == (
        "; how much memory it takes is not known (NotImplementedError: this layer asks for numbers)"
    )
    require_fit(memory, "cpu")


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="not Linux")
def test_free_memory_is_some() -> None:
    free = free_memory("cpu")
    assert free is not None
    assert 0 < free < 1e14
    assert np.isfinite(free)
