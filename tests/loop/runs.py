"""Short real runs: the bundled model, the example's evaluator, sums of two small numbers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from eval_protocol_rft.loop._run_options import LoopOptions
from eval_protocol_rft.loop._setup import LocalParts, Parts
from eval_protocol_rft.loop._train import TrainResult, atrain
from eval_protocol_rft.sampling._types import Completion, SamplingParams
from examples.arithmetic import test_arithmetic as example

FIRST_SUMS = [(a, b) for a in range(10, 34) for b in range(10, 22)]


def sums_file(path: Path, sums: Iterable[tuple[int, int]] = FIRST_SUMS) -> str:
    rows = (
        {"messages": [{"role": "user", "content": f"{a}+{b}="}], "ground_truth": str(a + b)}
        for a, b in sums
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def options(**changes: Any) -> LoopOptions:
    return LoopOptions(
        **{
            "steps": 4,
            "groups_per_step": 4,
            "completions_per_prompt": 4,
            "learning_rate": 1e-4,
            "eval_every": 2,
            "eval_completions": 2,
            "checkpoint_every": 1,
            **changes,
        }
    )


@dataclass(frozen=True)
class Broken(LocalParts):
    """Sampler and trainer as `alter` leaves them."""

    alter: Callable[[Parts], Parts] = lambda parts: parts

    async def make(
        self, evaluator: Callable[..., Any], params: dict[str, Any], options: LoopOptions
    ) -> Parts:
        return self.alter(await super().make(evaluator, params, options))


async def run(
    folder: Path,
    chosen: LoopOptions,
    *,
    broken: Callable[[Parts], Parts] = lambda parts: parts,
    completion_params: dict[str, Any] | None = None,
    **arguments: Any,
) -> TrainResult:
    """A run in `folder`; `broken` gets sampler and trainer in its hands first."""
    data = sums_file(folder.parent / f"{folder.name}.jsonl")
    return await atrain(
        example.test_arithmetic,
        folder,
        options=chosen,
        model="local/arithmetic",
        data=[data],
        held_out=8,
        progress=False,
        parts=Broken(alter=broken),
        completion_params=completion_params,
        **arguments,
    )


def without_times(result: TrainResult) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k != "seconds"} for line in result.lines]


class Altered:
    """A sampler whose completions are altered on their way back."""

    def __init__(self, sampler: Any, alter: Callable[[Completion], Completion]) -> None:
        self._sampler = sampler
        self._alter = alter
        self.tokenizer = sampler.tokenizer

    async def sample(
        self, prompt_ids: Any, params: SamplingParams, *, seed: int | None = None
    ) -> Completion:
        return self._alter(await self._sampler.sample(prompt_ids, params, seed=seed))

    async def aclose(self) -> None:
        await self._sampler.aclose()


def altered(alter: Callable[[Completion], Completion]) -> Callable[[Parts], Parts]:
    def put_between(parts: Parts) -> Parts:
        sampler = Altered(parts.sampler, alter)
        return replace(parts, sampler=None, processor=parts.processor.sampling_from(sampler))

    return put_between
