"""Sampling ahead against taking turns, on a sampler with a long tail.

Every completion of the bundled model comes back after a delay drawn from a lognormal distribution
(sigma 1), as from a server whose answers differ a lot in length. The same run is taken with
`max_staleness` 0, 1 and 2: seconds, held-out scores, and how old what was trained on had become.

    python benchmarks/staleness.py --steps 60 --delay 0.15
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")
EXAMPLE = Path(__file__).parents[1] / "examples" / "sums"
sys.path.insert(0, str(EXAMPLE))


class SlowSampler:
    """Completions of `sampler`, each some time later. The delay follows from the seed."""

    def __init__(self, sampler: Any, mean: float) -> None:
        self._sampler = sampler
        self._scale = mean / math.exp(0.5)
        self.tokenizer = sampler.tokenizer

    async def sample(self, prompt_ids: Any, params: Any, *, seed: int | None = None) -> Any:
        delay = self._scale * math.exp(random.Random(seed).gauss(0.0, 1.0))
        completion = await self._sampler.sample(prompt_ids, params, seed=seed)
        await asyncio.sleep(delay)
        return completion

    async def aclose(self) -> None:
        await self._sampler.aclose()


def measure(staleness: int, arguments: argparse.Namespace, seed: int) -> dict[str, Any]:
    """One run."""
    from test_sums import test_sums

    from eval_protocol_rft.loop._run_options import LoopOptions
    from eval_protocol_rft.loop._setup import LocalParts, Parts
    from eval_protocol_rft.loop._train import train

    options = LoopOptions(
        steps=arguments.steps,
        groups_per_step=arguments.groups,
        max_staleness=staleness,
        learning_rate=arguments.lr,
        warmup_steps=10,
        eval_every=0,
        eval_completions=8,
        seed=seed,
    )

    class SlowParts(LocalParts):
        async def make(self, evaluator: Any, params: Any, options: LoopOptions) -> Parts:
            parts = await LocalParts.make(self, evaluator, params, options)
            slow = SlowSampler(parts.sampler, arguments.delay)
            return replace(parts, sampler=None, processor=parts.processor.sampling_from(slow))

    marks: list[float] = []

    def on_line(line: dict[str, Any]) -> None:
        if line["kind"] == "step" or line["step"] == 0:
            marks.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        result = train(
            test_sums,
            folder + "/run",
            options=options,
            eval_data=[str(EXAMPLE / "held_out.jsonl")],
            parts=SlowParts(),
            progress=False,
            on_line=on_line,
        )
    seen = Counter[str]()
    for line in result.steps:
        seen.update(line["staleness"])
    return {
        "max_staleness": staleness,
        "seed": seed,
        "seconds": marks[-1] - marks[0],
        "sampled_before": result.evaluations[0]["sampled_score"],
        "sampled_after": result.evaluations[-1]["sampled_score"],
        "staleness": dict(sorted(seen.items())),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--groups", type=int, default=32)
    parser.add_argument("--delay", type=float, default=0.15, help="mean seconds per completion")
    parser.add_argument("--lr", type=float, default=5e-4, help="learning rate")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the numbers here")
    arguments = parser.parse_args()
    found = []
    for seed in range(arguments.seeds):
        for staleness in (0, 1, 2):
            found.append(measure(staleness, arguments, seed))
            print(json.dumps(found[-1]), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
