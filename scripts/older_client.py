r"""The iterative loop of fireworks-ai 0.19, in an environment of its own: `LLM`, `Dataset`, steps.

    python -m venv older && older/bin/pip install fireworks-ai==0.19.20
    ep-rft serve --fireworks               # in another terminal: prints what to export
    export FIREWORKS_API_BASE_URL=http://127.0.0.1:8000 FIREWORKS_GATEWAY_ADDR=127.0.0.1:8001
    export FIREWORKS_API_KEY=fw-local
    older/bin/python scripts/older_client.py --steps 12

Each step asks the model for the same sums by chat, scores the answers, uploads them as a data set
of `{"samples": [...]}`, trains a LoRA model on it with `reinforcement_step`, and goes on with that
model on the same deployment. At the end everything is deleted but the models.

Exit status 1: a step failed, the mean reward of the last third is not above that of the first, or a
data set is left.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import statistics
import sys
import time
from typing import Any

ADDRESSES = ("FIREWORKS_API_BASE_URL", "FIREWORKS_GATEWAY_ADDR", "FIREWORKS_API_KEY")
ENDED_BADLY = ("FAILED", "CANCELLED", "EXPIRED", "DELETING", "CLEANING_UP")
POLL_S = 1.0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="arithmetic", help="of the server, by its short name")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--prompts", type=int, default=32, help="per step")
    parser.add_argument("--completions", type=int, default=8, help="per prompt")
    parser.add_argument("--concurrency", type=int, default=32, help="chat requests at once")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--max-tokens", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0, help="of the choice of sums")
    parser.add_argument("--name", help="of deployment and models; default: one of its own")
    options = parser.parse_args()
    options.name = options.name or f"older-{int(time.time())}"
    return options


def main() -> int:
    options = arguments()
    # The client reads its addresses when it is imported, and else talks to the service itself.
    if missing := [name for name in ADDRESSES if not os.environ.get(name)]:
        print(f"not set: {', '.join(missing)}; see the lines that the server prints")
        return 1
    return run(options)


def run(options: argparse.Namespace) -> int:
    from fireworks import LLM

    base = LLM(
        model=options.model, deployment_type="on-demand", id=options.name, enable_addons=True
    )
    base.apply()
    policy, rewards, datasets = base, list[float](), list[Any]()
    rng = random.Random(options.seed)  # noqa: S311 - no secret
    sums = [(rng.randrange(10, 100), rng.randrange(10, 100)) for _ in range(options.prompts)]
    print("step  mean reward  rollouts s  training s  policy", flush=True)
    try:
        for step in range(options.steps + 1):
            began = time.monotonic()
            rows = asyncio.run(roll_out(policy, sums, options))
            rewards.append(mean_reward(rows))
            rolled_out = time.monotonic()
            if step == options.steps:
                print(f"{step:4}  {rewards[-1]:11.3f}  {rolled_out - began:10.1f}", flush=True)
                break
            trained = train(policy, rows, f"{options.name}-{step + 1}", options, datasets)
            print(
                f"{step:4}  {rewards[-1]:11.3f}  {rolled_out - began:10.1f}  "
                f"{time.monotonic() - rolled_out:10.1f}  {policy.model}",
                flush=True,
            )
            if policy is not base:
                policy.delete_deployment()
            policy = LLM(model=trained, deployment_type="on-demand-lora", base_id=options.name)
            policy.apply()
    finally:
        for dataset in datasets:
            dataset.delete()
        if policy is not base:
            policy.delete_deployment()
        base.delete_deployment()
    return report(rewards, datasets)


async def roll_out(
    policy: Any, sums: list[tuple[int, int]], options: argparse.Namespace
) -> list[Any]:
    """A row of a data set for each sum."""
    limit = asyncio.Semaphore(options.concurrency)

    async def sample(prompt: str, total: int) -> dict[str, Any]:
        messages = [{"role": "user", "content": prompt}]
        async with limit:
            reply = await policy.chat.completions.acreate(
                messages=messages, temperature=options.temperature, max_tokens=options.max_tokens
            )
        answer = reply.choices[0].message.content or ""
        return {
            "messages": [*messages, {"role": "assistant", "content": answer}],
            "evals": {"score": float(answer.strip() == str(total))},
        }

    async def row(a: int, b: int) -> dict[str, Any]:
        samples = (sample(f"{a}+{b}=", a + b) for _ in range(options.completions))
        return {"samples": await asyncio.gather(*samples)}

    try:
        return await asyncio.gather(*(row(a, b) for a, b in sums))
    finally:
        # `LLM` has no way to close its sessions, which belong to this loop.
        await policy._client.aclose()


def mean_reward(rows: list[dict[str, Any]]) -> float:
    return statistics.fmean(sample["evals"]["score"] for row in rows for sample in row["samples"])


def train(
    policy: Any, rows: list[Any], output: str, options: argparse.Namespace, datasets: list[Any]
) -> str:
    """The name of the model that a step on `rows` made."""
    from fireworks import Dataset

    dataset = Dataset.from_list(rows)
    datasets.append(dataset)
    dataset.sync()
    step = policy.reinforcement_step(
        dataset=dataset,
        output_model=output,
        epochs=options.epochs,
        learning_rate=options.learning_rate,
    )
    while not step.is_completed:
        # `raise_if_bad_state` compares the state's name with numbers, and raises for none.
        if any(part in step.state for part in ENDED_BADLY):
            raise RuntimeError(f"{step.job.name} is {step.state}: {step.job.status.message}")
        time.sleep(POLL_S)
        step = step.get()
    dataset.delete()
    return str(step.output_model)


def report(rewards: list[float], datasets: list[Any]) -> int:
    third = max(1, len(rewards) // 3)
    first, last = statistics.fmean(rewards[:third]), statistics.fmean(rewards[-third:])
    left = [dataset.id for dataset in datasets if dataset.get() is not None]
    print(f"mean reward of the first third {first:.3f}, of the last {last:.3f}")
    print(f"data sets made {len(datasets)}, left {len(left)}")
    return int(last <= first or bool(left))


if __name__ == "__main__":
    sys.exit(main())
