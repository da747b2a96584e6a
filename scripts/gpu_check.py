"""Tokens a second, sampler against trainer, and memory, for a model in float32 and bfloat16, as a
table in Markdown: `python -m scripts.gpu_check` (or `scripts/gpu_check.sh`, which runs the tests
that need a GPU first).

On a GPU 256 completions of 512 tokens, on the CPU 16 of 64. Each row is a process of its own, so
that its memory is its own: on a GPU what torch held at most, on the CPU what the process grew by.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

COLUMNS = (
    "", "sampling, tokens/s", "training, tokens/s", "k1", "k3", "tokens beyond 1 %",
    "furthest, nats", "peak sampling", "peak training", "estimated",
)  # fmt: skip
QUESTION = "Explain in a few sentences why the sky is blue, and what colour it has on Mars."


class Peak:
    """The most memory since `begin`, beyond what there was when this was made."""

    def __init__(self, device: str) -> None:
        import torch

        self._cuda = torch.cuda if device != "cpu" else None
        self._first = 0 if self._cuda else self._status("VmRSS")
        self.begin()

    def begin(self) -> None:
        if self._cuda:
            self._cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")

    def gigabytes(self) -> float:
        if self._cuda:
            return self._cuda.max_memory_allocated() / 1e9
        return (self._status("VmHWM") - self._first) / 1e9

    @staticmethod
    def _status(name: str) -> int:
        text = Path("/proc/self/status").read_text()
        found = re.search(rf"{name}:\s+(\d+) kB", text)
        if found is None:
            raise SystemExit("memory is read in /proc/self/status: this needs Linux")
        return int(found[1]) * 1024


async def row(arguments: argparse.Namespace) -> dict[str, Any]:
    import torch

    from eval_protocol_rft import training
    from eval_protocol_rft.local import (
        LocalSampler,
        Memory,
        Placement,
        config_and_place,
        local_model_folder,
        sampling_memory,
    )
    from eval_protocol_rft.loop import NamedLoss, Optimizer
    from eval_protocol_rft.loop._local_trainer import LocalTrainer
    from eval_protocol_rft.loop._memory import LocalRun
    from eval_protocol_rft.loop._trainer import SamplerWeights
    from eval_protocol_rft.sampling import SamplingParams

    folder = local_model_folder(arguments.model)
    placement = Placement(
        device=arguments.device, dtype=arguments.dtype, deterministic=arguments.deterministic
    )
    config, place = config_and_place(folder, placement, trust_remote_code=False)
    on_gpu = place.device != "cpu"
    count, tokens = (
        arguments.completions or (256 if on_gpu else 16),
        arguments.tokens or (512 if on_gpu else 64),
    )
    optimizer = Optimizer(
        microbatch_tokens=arguments.microbatch_tokens,
        gradient_checkpointing=arguments.gradient_checkpointing,
    )
    peak = Peak(place.device)
    sampler = LocalSampler.from_pretrained(folder, placement=placement, policy_version="step-0")
    prompt = list(
        sampler.tokenizer.apply_chat_template(
            [{"role": "user", "content": QUESTION}], add_generation_prompt=True, return_dict=False
        )
    )
    estimate = LocalRun(
        config=config,
        place=place,
        lora=None,
        optimizer=optimizer,
        sampler=sampling_memory(config, place, max_batch_tokens=count * (len(prompt) + tokens))
        or Memory(),
        reference=False,
        longest=len(prompt) + tokens,
        datums=count,
    ).memory()

    params = SamplingParams(model="m", max_tokens=tokens, extra={"ignore_eos": True})

    async def sample(seeds: range) -> list[Any]:
        return await asyncio.gather(*(sampler.sample(prompt, params, seed=s) for s in seeds))

    await sample(range(2))  # kernels are loaded, memory is found
    peak.begin()
    began = time.perf_counter()
    completions = await sample(range(count))
    sampling_seconds, sampling_peak = time.perf_counter() - began, peak.gigabytes()

    trainer = LocalTrainer(
        sampler.model, sink=SamplerWeights(sampler), optimizer=optimizer, entropies=True
    )
    batch = training.comparable([training.unscored(prompt, one) for one in completions])
    loss = NamedLoss(loss_fn="importance_sampling")
    told = await trainer.forward_backward(batch, loss)
    difference = training.measure(training.sampled_pairs(batch, told.logprobs, {0}))
    if difference is None:
        raise SystemExit("nothing was sampled")
    await trainer.optim_step(learning_rate=1e-6)
    peak.begin()
    began = time.perf_counter()
    await trainer.forward_backward(batch, loss)
    await trainer.optim_step(learning_rate=1e-6)
    await trainer.publish(1)
    training_seconds = time.perf_counter() - began
    weight = next(iter(sampler.model.parameters()))
    name = torch.cuda.get_device_name(weight.device) if on_gpu else "CPU"
    return {
        "": f"{arguments.model}, {place.dtype}, {name}",
        "sampling, tokens/s": f"{count * tokens / sampling_seconds:,.0f}",
        "training, tokens/s": f"{count * (len(prompt) + tokens) / training_seconds:,.0f}",
        "k1": f"{difference.k1:.1e}",
        "k3": f"{difference.k3:.1e}",
        "tokens beyond 1 %": f"{difference.beyond:.2%}",
        "furthest, nats": f"{difference.max_difference:.1e}",
        "peak sampling": f"{sampling_peak:.2f} GB",
        "peak training": f"{peak.gigabytes():.2f} GB",
        "estimated": "small" if estimate is None else f"{estimate.total / 1e9:.2f} GB",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", action="append", choices=("float32", "bfloat16"))
    parser.add_argument("--completions", type=int)
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--microbatch-tokens", type=int, default=16384)
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--deterministic", action="store_true")
    parser.add_argument("--row", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.row:
        (arguments.dtype,) = arguments.dtype
        print(json.dumps(asyncio.run(row(arguments))))
        return
    print("| " + " | ".join(COLUMNS) + " |\n" + "| --- " * len(COLUMNS) + "|", flush=True)
    rest = [a for a in sys.argv[1:] if a not in ("--dtype", *(arguments.dtype or ()))]
    for dtype in arguments.dtype or ("float32", "bfloat16"):
        command = [sys.executable, "-m", "scripts.gpu_check", "--row", "--dtype", dtype, *rest]
        made = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)  # noqa: S603
        values = json.loads(made.stdout.splitlines()[-1])
        print("| " + " | ".join(values[name] for name in COLUMNS) + " |", flush=True)


if __name__ == "__main__":
    main()
