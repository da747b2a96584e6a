"""What it saves to keep an episode's keys and values between its turns, in this process.

    python benchmarks/local_prefix.py [--episodes 32] [--turns 8] [--repeats 7]

Concurrent episodes on the bundled model: after each answer an environment says something of its
own, so that prompts grow by some 40 tokens a turn (answers of 16, feedback of 16 to 32). With and
without `SamplingParams.session` in one process, in alternating order, medians. Tokens are counted
where the model gets them: rows times new columns of every forward, padding included.

The model's context is raised from 256 to fit the last turns. What it says there is nonsense; what
it costs is the same.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from statistics import median
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM

from eval_protocol_rft.local._sampler import LocalSampler, load_local_sampler, no_loading_bar
from eval_protocol_rft.local.models import bundled_model_path
from eval_protocol_rft.sampling._types import SamplingParams

ANSWER = 16
FEEDBACK = (16, 32)
FIRST_PROMPT = 25
CONTEXT = 1024
PARAMS = SamplingParams(model="", max_tokens=ANSWER, extra={"ignore_eos": True})


class Cost(NamedTuple):
    """Of all episodes."""

    prefilled: int
    """Tokens of prefills, padding included."""
    stepped: int
    """Tokens of steps."""
    seconds: float

    @property
    def run(self) -> int:
        return self.prefilled + self.stepped


@contextmanager
def counted(module: torch.nn.Module) -> Iterator[list[tuple[int, int]]]:
    """The shapes of all forwards: rows, new columns."""
    shapes: list[tuple[int, int]] = []

    def see(_: torch.nn.Module, __: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        shapes.append(tuple(kwargs["input_ids"].shape))

    hook = module.register_forward_pre_hook(see, with_kwargs=True)
    try:
        yield shapes
    finally:
        hook.remove()


async def episode(sampler: LocalSampler, params: SamplingParams, name: str, turns: int) -> None:
    rng = random.Random(name)
    prompt = [rng.randrange(256) for _ in range(FIRST_PROMPT)]
    for turn in range(turns):
        completion = await sampler.sample(prompt, params, seed=turn)
        feedback = [rng.randrange(256) for _ in range(rng.randint(*FEEDBACK))]
        prompt = [*prompt, *completion.token_ids, *feedback]


async def job(sampler: LocalSampler, sessions: bool, run: int, episodes: int, turns: int) -> Cost:
    names = [f"episode {index}" for index in range(episodes)]
    with counted(sampler.model) as shapes:
        began = time.perf_counter()
        await asyncio.gather(
            *(
                # A new run has sessions of its own.
                episode(
                    sampler, replace(PARAMS, session=f"{run} {n}" if sessions else None), n, turns
                )
                for n in names
            )
        )
        seconds = time.perf_counter() - began
    prefilled = sum(rows * columns for rows, columns in shapes if columns > 1)
    stepped = sum(rows for rows, columns in shapes if columns == 1)
    return Cost(prefilled, stepped, seconds)


async def measure(
    sampler: LocalSampler, *, episodes: int, turns: int, repeats: int
) -> dict[bool, Sequence[Cost]]:
    costs: dict[bool, list[Cost]] = {False: [], True: []}
    for repeat in range(-1, repeats):
        for sessions in (False, True) if repeat % 2 else (True, False):
            cost = await job(sampler, sessions, repeat, episodes, turns)
            if repeat >= 0:  # the first warms up
                costs[sessions].append(cost)
    return dict(costs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--episodes", type=int, default=32)
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    with no_loading_bar():
        model = AutoModelForCausalLM.from_pretrained(
            bundled_model_path("arithmetic"), dtype=torch.float32, max_position_embeddings=CONTEXT
        )
    sampler = LocalSampler(model, load_local_sampler("arithmetic").tokenizer)
    costs = asyncio.run(measure(sampler, **vars(options)))
    print(f"{options.episodes} episodes of {options.turns} turns, median of {options.repeats}")
    for sessions, label in ((False, "without sessions"), (True, "with sessions")):
        own = costs[sessions]
        print(
            f"{label:>16}: {median(c.run for c in own):>9,.0f} tokens run "
            f"({median(c.prefilled for c in own):,.0f} of them prefilled), "
            f"{median(c.seconds for c in own):.3f} s "
            f"({min(c.seconds for c in own):.3f} to {max(c.seconds for c in own):.3f})"
        )
    pairs = list(zip(costs[False], costs[True], strict=True))
    for what, ratio in (
        ("tokens run", median(a.run / b.run for a, b in pairs)),
        ("prefilled", median(a.prefilled / b.prefilled for a, b in pairs)),
        ("wall time", median(a.seconds / b.seconds for a, b in pairs)),
    ):
        print(f"{what:>16}: {ratio:.2f} times as much without")


if __name__ == "__main__":
    main()
