r"""Run a recipe of fw-ai/cookbook, unmodified, to its end, and check what it did.

    export FIREWORKS_BASE_URL=http://127.0.0.1:8000 FIREWORKS_API_KEY=fw_local
    COOKBOOK=~/cookbook python scripts/cookbook.py async_rl_loop --rollouts evaluator -o runs/first

`COOKBOOK` is a checkout of the cookbook, and this runs in the environment that it asks for, with
eval-protocol-rft beside it. The bundled model learns sums of two numbers; its rollouts come from

- `evaluator`: our `make_rollout_fn` over an evaluator of rows;
- `token_in`: the cookbook's `examples/rl/single_turn_token_in`, whose rows carry a fixed reward: a
  wrapper scores the text instead;
- `message_in`: its `examples/rl/multi_turn_message_in`, with a reward for sums in the place of the
  one for GSM8K that it imports;
- `recipe`: what `rl_loop` itself does, with its `reward_fn`, "customize these for your task", ours.

Recipes differ between commits of the cookbook. What is asked for and the recipe does not know is an
error; `--loss`, `--loss-path` and `--synchronous` belong to the form of 2507496b.

Checked at the end, exit status 1 if one fails: all steps were made; every ratio between trainer and
sampler was 1 (on-policy); the mean reward of the last fifth of steps is above that of the first;
the promoted model, deployed, answers, better than its base. `metrics.jsonl` and `summary.json` are
in the output folder.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import importlib
import json
import logging
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from eval_protocol.models import EvaluateResult, EvaluationRow

REPOSITORY = Path(__file__).resolve().parents[1]
MODEL = "accounts/fireworks/models/arithmetic"
TOKENIZER = REPOSITORY / "eval_protocol_rft" / "local" / "models" / "arithmetic"
MAX_TOKENS = 6
"""Three digits and the end of the turn, and room for what is none."""
DISTINCT = 32
"""Sums, asked again and again: few enough to be learned in a minute or two."""
RATIOS = ("train/ppo_ratio_mean", "train/is_ratio_mean", "train/tis/weight_mean")
LAG = "async/version_offset_max"
ROUNDING = 1e-5
"""How far from 1 a mean ratio may be: trainer and sampler add up float32 in different batches."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", choices=("async_rl_loop", "rl_loop"))
    parser.add_argument(
        "--rollouts", choices=("evaluator", "token_in", "message_in", "recipe"), default="evaluator"
    )
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--name", help="of deployment and model; default by the output folder")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--groups", type=int, default=8, help="prompt groups per step")
    parser.add_argument("--completions", type=int, default=8, help="per prompt")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--lora-rank", type=int, default=0)
    parser.add_argument("--kl-beta", type=float, default=0.001)
    parser.add_argument("--off-policy", type=int, default=0, help="versions that a rollout may lag")
    parser.add_argument("--synchronous", action="store_true")
    parser.add_argument("--loss", help="policy_loss")
    parser.add_argument("--loss-path", choices=("client", "builtin"))
    parser.add_argument("--seed", type=int, default=0, help="of the choice of sums")
    parser.add_argument(
        "--sampling-seed", type=int, help="with evaluator: each rollout draws the same every time"
    )
    parser.add_argument(
        "--reward", choices=("sum", "even"), default="sum", help="right sums, or any even number"
    )
    parser.add_argument(
        "--no-learning-check", action="store_true", help="for runs of a few steps only"
    )
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    if options.name is None:
        # Of its own for each run: a recipe leaves its deployment scaled to zero.
        folder = options.output.resolve().name.replace("_", "-")
        options.name = f"{folder}-{int(time.time()) % 10**6}"
    return options


# What is asked and what is right


def score(text: str, row: dict[str, Any], reward: str) -> float:
    answer = text.removesuffix("<|im_end|>").strip()
    if reward == "even":
        return float(answer.isdigit() and int(answer) % 2 == 0)
    return float(answer == row["ground_truth"])


def right_sum(row: EvaluationRow, reward: str) -> EvaluationRow:
    """`score` as an evaluator."""
    answer = str(row.messages[-1].content)
    value = score(answer, {"ground_truth": row.ground_truth}, reward)
    row.evaluation_result = EvaluateResult(score=value)
    return row


def row_of(a: int, b: int, tokenizer: Any) -> dict[str, Any]:
    """A line of the data set as all three rollouts read it."""
    messages = [{"role": "user", "content": f"{a}+{b}="}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    total = str(a + b)
    return {
        "id": f"{a}+{b}",
        "messages": messages,
        "prompt_token_ids": list(ids),
        "ground_truth": total,
        "answer": total,
    }


def sums(tokenizer: Any, seed: int) -> list[dict[str, Any]]:
    pairs = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    chosen = random.Random(seed).sample(pairs, DISTINCT)  # noqa: S311 - no secret
    return [row_of(a, b, tokenizer) for a, b in chosen]


# Rollouts: each a factory of `async rollout_fn(row) -> RolloutRun | None` from the recipe's setup

Factory = Callable[[Any], Callable[..., Any]]


def rollouts(options: argparse.Namespace) -> Factory:
    makers = {"evaluator": evaluator, "token_in": token_in, "message_in": message_in}
    return makers[options.rollouts](options)


def evaluator(options: argparse.Namespace) -> Factory:
    """Ours: an evaluator of `row`."""
    from training.utils.rl.rollout.types import RolloutRun, RolloutSample

    from eval_protocol_rft import FireworksTrainingRolloutProcessor
    from eval_protocol_rft.loop import make_rollout_fn, recipe_params
    from eval_protocol_rft.training.export.cookbook import CookbookTypes

    def factory(setup: Any) -> Callable[..., Any]:
        seed = {} if options.sampling_seed is None else {"seed": options.sampling_seed}
        made: Callable[..., Any] = make_rollout_fn(
            right_sum,
            evaluation_test_kwargs={"reward": options.reward},
            processor=FireworksTrainingRolloutProcessor(),
            completion_params=recipe_params(setup) | {"n": 1} | seed,
            types=CookbookTypes(sample=RolloutSample, run=RolloutRun),
        )
        return made

    return factory


def token_in(options: argparse.Namespace) -> Factory:
    from training.examples.rl.single_turn_token_in.rollout import make_rollout_fn

    def factory(setup: Any) -> Callable[..., Any]:
        rollout_fn = make_rollout_fn(setup)

        async def roll_out(sample_prompt: dict[str, Any]) -> Any:
            run = await rollout_fn(sample_prompt)
            if run is None:
                return None
            (sample,) = run.segments
            sample = dataclasses.replace(
                sample, reward=score(sample.text, sample_prompt, options.reward)
            )
            return dataclasses.replace(run, segments=[sample])

        return roll_out

    return factory


def message_in(options: argparse.Namespace) -> Factory:
    from training.examples.rl.multi_turn_message_in import rollout

    def reward(text: str, answer: str) -> float:
        return score(text, {"ground_truth": answer}, options.reward)

    rollout.gsm8k_reward = reward
    factory: Factory = rollout.make_rollout_fn
    return factory


# The recipes


def run(options: argparse.Namespace, tokenizer: Any) -> dict[str, Any]:
    """The recipe's `main`, which says what it did: steps, jobs, deployment."""
    recipe = importlib.import_module(f"training.recipes.{options.recipe}")
    distinct = sums(tokenizer, options.seed)
    rows = [distinct[i % DISTINCT] for i in range(options.steps * options.groups)]
    config = configured(recipe, options, rows)
    if options.recipe == "async_rl_loop":
        done = recipe.main(config, rollout_fn_factory=rollouts(options), rows=rows)
    elif options.rollouts == "recipe":
        recipe.reward_fn = lambda text, row: score(text, row, options.reward)
        done = recipe.main(config)
    else:
        done = recipe.main(config, sample_prompt_fn=grouped(options, config, tokenizer), rows=rows)
    return dict(done)


def configured(recipe: Any, options: argparse.Namespace, rows: list[dict[str, Any]]) -> Any:
    """The recipe's `Config`. What it has no field for is refused if it was asked for."""
    from training.utils import DeployConfig, TrainerConfig

    shape = "accounts/fireworks/trainingShapes/ts-arithmetic"
    data_set = options.output / "rows.jsonl"
    data_set.write_text("".join(json.dumps(row) + "\n" for row in rows))
    fields = {
        "log_path": str(options.output),
        "base_model": MODEL,
        "dataset": str(data_set),
        "max_rows": len(rows),
        "learning_rate": options.learning_rate,
        "kl_beta": options.kl_beta,
        "completions_per_prompt": options.completions,
        "prompt_groups_per_step": options.groups,
        "max_completion_tokens": MAX_TOKENS,
        "lora_rank": options.lora_rank,
        "trainer": TrainerConfig(training_shape_id=shape),
        "deployment": DeployConfig(deployment_id=options.name, tokenizer_model=str(TOKENIZER)),
        "output_model_id": options.name,
    }
    asked = {
        "policy_loss": options.loss,
        "loss_path": options.loss_path,
        "synchronous_training": options.synchronous or None,
        "max_head_offpolicy_versions": options.off_policy or None,
    }
    known = {field.name for field in dataclasses.fields(recipe.Config)}
    unknown = [name for name, value in asked.items() if value is not None and name not in known]
    if unknown:
        raise SystemExit(
            f"{options.recipe} of this commit has no {', '.join(unknown)}: take the form of the "
            "cookbook that has it, or leave the option out"
        )
    return recipe.Config(**fields, **{k: v for k, v in asked.items() if v is not None})


def grouped(options: argparse.Namespace, config: Any, tokenizer: Any) -> Callable[..., Any]:
    """`sample_prompt_fn` of today's `rl_loop`: a prompt group from as many rollouts."""
    from training.recipes.async_rl_loop import RolloutSetup
    from training.utils.rl.rollout import Rollout, rollout_to_prompt_group

    rollout_fn = rollouts(options)(
        RolloutSetup(
            tokenizer=tokenizer,
            tokenizer_id=str(TOKENIZER),
            sample_kwargs={
                "max_tokens": MAX_TOKENS,
                "temperature": 1.0,
                "top_p": 1.0,
                "top_k": 0,
                "logprobs": True,
            },
            inference_base_url=os.environ["FIREWORKS_BASE_URL"],
            api_key=os.environ["FIREWORKS_API_KEY"],
            model=f"{account()}/deployments/{options.name}",
            completions_per_prompt=options.completions,
        )
    )

    async def sample_prompt(row: dict[str, Any], *, cursor_index: int) -> Any:
        runs = await asyncio.gather(*(rollout_fn(row) for _ in range(options.completions)))
        return rollout_to_prompt_group(
            Rollout(runs=[one for one in runs if one is not None]),
            with_reference=config.kl_beta > 0,
        )

    return sample_prompt


# What it did


class Check(NamedTuple):
    name: str
    holds: bool
    detail: str


def steps_of(metrics: Path) -> list[dict[str, Any]]:
    """One line for each step that trained; other lines of the file are of the producer."""
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    return [line for line in lines if reward_of(line) is not None]


def reward_of(line: dict[str, Any]) -> float | None:
    """Mean reward of everything that was sampled, also of groups that were filtered out."""
    raw = line.get("rollout/raw_reward", line.get("rollout/reward"))
    return None if raw is None else float(raw)


def checks(
    options: argparse.Namespace, done: dict[str, Any], steps: list[dict[str, Any]]
) -> Iterator[Check]:
    yield Check(
        "every step was made",
        len(steps) == done["steps"] > 0,
        f"{done['steps']} steps, {len(steps)} with metrics",
    )
    ratios = {key: [step[key] for step in steps if key in step] for key in RATIOS}
    apart = {key: max(abs(x - 1) for x in values) for key, values in ratios.items() if values}
    if options.off_policy == 0:
        yield Check(
            "on-policy ratios are 1",
            all(distance <= ROUNDING for distance in apart.values()),
            "; ".join(f"{key} at most {d:.1e} away" for key, d in apart.items())
            or "none is reported where the server computes the loss",
        )
    else:
        lags = [step[LAG] for step in steps if LAG in step]
        furthest = max(apart.values(), default=0.0)
        yield Check(
            f"rollouts lag, by {options.off_policy} versions at most",
            0 < max(lags) <= options.off_policy if lags else furthest > ROUNDING,
            f"versions: {max(lags) if lags else 'not in the metrics of this commit'}; "
            f"mean ratios at most {furthest:.1e} from 1",
        )
    rewards = [reward for step in steps if (reward := reward_of(step)) is not None]
    fifth = max(1, len(rewards) // 5)
    first, last = sum(rewards[:fifth]) / fifth, sum(rewards[-fifth:]) / fifth
    if not options.no_learning_check:
        yield Check("the reward rises", last > first, f"first fifth {first:.3f}, last {last:.3f}")


def account() -> str:
    return str(call("GET", "/v1/accounts?pageSize=2")["accounts"][0]["name"])


def call(method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    import httpx

    answer = httpx.request(
        method,
        os.environ["FIREWORKS_BASE_URL"].rstrip("/") + path,
        json=body,
        headers={"Authorization": f"Bearer {os.environ['FIREWORKS_API_KEY']}"},
        timeout=600,
    )
    if answer.is_error:
        raise SystemExit(f"{method} {path}: {answer.status_code}: {answer.text[:500]}")
    return dict(answer.json()) if answer.content else {}


def examined(options: argparse.Namespace, tokenizer: Any) -> Check:
    """The promoted model and its base, each deployed, answer the sums greedily."""
    rows = sums(tokenizer, options.seed)
    shares = {}
    for model, deployment in (
        (f"{account()}/models/{options.name}", f"{options.name}-after"),
        (MODEL, f"{options.name}-before"),
    ):
        at = f"/v1/{account()}/deployments"
        call("POST", f"{at}?deploymentId={deployment}", {"baseModel": model})
        while call("GET", f"{at}/{deployment}")["state"] != "READY":
            time.sleep(1)
        answers = call(
            "POST",
            "/inference/v1/completions",
            {
                "model": f"{account()}/deployments/{deployment}",
                "prompt": [row["prompt_token_ids"] for row in rows],
                "temperature": 0,
                "max_tokens": MAX_TOKENS,
            },
        )["choices"]
        right = [score(choice["text"], rows[choice["index"]], options.reward) for choice in answers]
        shares[model] = sum(right) / len(rows)
        call("DELETE", f"{at}/{deployment}?ignoreChecks=true")
    after, before = shares.values()
    better = after > before or options.no_learning_check
    return Check(
        "the promoted model answers", better, f"greedily right {after:.3f}, its base {before:.3f}"
    )


def main() -> int:
    options = arguments()
    cookbook = Path(os.environ.get("COOKBOOK", "")).expanduser()
    if not (cookbook / "training" / "recipes").is_dir():
        raise SystemExit("set COOKBOOK to a checkout of fw-ai/cookbook")
    missing = {"FIREWORKS_BASE_URL", "FIREWORKS_API_KEY"} - set(os.environ)
    if missing:
        raise SystemExit(f"set {' and '.join(sorted(missing))}, as the server printed them")
    sys.path[:0] = [str(cookbook), str(REPOSITORY)]
    metrics = options.output / "metrics.jsonl"
    metrics.unlink(missing_ok=True)
    os.environ["COOKBOOK_METRICS_FILE"] = str(metrics)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    began = time.monotonic()
    done = run(options, tokenizer)
    seconds = time.monotonic() - began
    steps = steps_of(metrics)
    results = [*checks(options, done, steps), examined(options, tokenizer)]
    summary = {
        "recipe": options.recipe,
        "options": {k: str(v) for k, v in vars(options).items() if v is not None},
        "done": done,
        "seconds": round(seconds, 1),
        "rewards": [reward_of(step) for step in steps],
        "checks": [check._asdict() for check in results],
    }
    (options.output / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    print(f"\n{options.recipe}, {options.rollouts}: {done['steps']} steps in {seconds:.0f} s")
    for check in results:
        print(f"  {'ok' if check.holds else 'NOT'}: {check.name}: {check.detail}")
    return 0 if all(check.holds for check in results) else 1


if __name__ == "__main__":
    sys.exit(main())
