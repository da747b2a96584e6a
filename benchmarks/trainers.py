"""`ep-rft train` beside TRL's `GRPOTrainer`: the same task, first weights, settings and seeds.

Three trainers learn sums of two two-digit numbers from the bundled model: `ep-rft train`; TRL on
our rollouts (`trl_rollouts`); and TRL alone, which samples with transformers' `generate` and scores
with a function of its own. Each run has a process to itself, one after the other, one thread each.

    python benchmarks/trainers.py --steps 40 --seeds 3

The score is no sample: it is the probability of the one right token sequence under the last
weights, averaged over the held-out sums: what sampling at temperature 1 scores in the mean.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
EXAMPLE = Path(__file__).parents[1] / "examples" / "sums"
sys.path.insert(0, str(EXAMPLE))

N = 8
MAX_TOKENS = 8
Measured = tuple[Callable[[], Any], Callable[[Any], Any]]
"""Trains; and from what that returned, the trained model."""


def ep_rft(arguments: argparse.Namespace, folder: str) -> Measured:
    from test_sums import test_sums

    from eval_protocol_rft.loop import LoopOptions, train
    from eval_protocol_rft.training import Filters

    options = LoopOptions(
        steps=arguments.steps,
        groups_per_step=arguments.groups,
        learning_rate=arguments.lr,
        schedule="linear",
        # TRL trains on groups of equal rewards too: with an advantage of 0, but they count in the
        # mean over tokens.
        filters=Filters(zero_variance="keep"),
        eval_every=0,
        checkpoint_every=arguments.steps,
        seed=arguments.seed,
    )

    def run() -> Path:
        train(test_sums, f"{folder}/run", options=options, held_out=0, progress=False)
        return Path(folder) / "run" / "model"

    return run, load


def trl_config(arguments: argparse.Namespace, folder: str) -> Any:
    from trl import GRPOConfig

    return GRPOConfig(
        output_dir=folder,
        seed=arguments.seed,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        max_completion_length=MAX_TOKENS,
        num_generations=N,
        per_device_train_batch_size=arguments.groups * N,
        gradient_accumulation_steps=1,
        gradient_checkpointing=False,
        learning_rate=arguments.lr,
        lr_scheduler_type="linear",
        adam_beta2=0.99,
        max_grad_norm=1.0,
        loss_type="dapo",  # the mean over all tokens of the batch, as `--normalization token`
        beta=0.0,
        max_steps=arguments.steps,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        disable_tqdm=True,
    )


def trl_with_our_rollouts(arguments: argparse.Namespace, folder: str) -> Measured:
    from test_sums import test_sums
    from trl import GRPOTrainer

    from eval_protocol_rft.loop.trl import trl_rollouts

    def run() -> Any:
        with trl_rollouts(test_sums, seed=arguments.seed) as rollouts:
            trainer = GRPOTrainer(
                model=rollouts.model,
                args=trl_config(arguments, folder),
                train_dataset=rollouts.dataset,
                rollout_func=rollouts,
                reward_funcs=rollouts.reward,
            )
            trainer.train()
        return trainer.model

    return run, lambda model: model


def trl_alone(arguments: argparse.Namespace, folder: str) -> Measured:
    from datasets import Dataset
    from test_sums import sums
    from transformers import AutoTokenizer
    from trl import GRPOTrainer

    from eval_protocol_rft.local.models import bundled_model_path

    path = bundled_model_path("arithmetic")
    rows = [
        {
            "prompt": [{"role": "user", "content": row.messages[0].content}],
            "right": row.ground_truth,
        }
        for row in sums()
    ]

    def reward(completions: list[Any], right: list[str], **_: Any) -> list[float]:
        pairs = zip(completions, right, strict=True)
        return [float(answer[0]["content"].strip() == wanted) for answer, wanted in pairs]

    def run() -> Any:
        trainer = GRPOTrainer(
            model=str(path),
            args=trl_config(arguments, folder),
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(path),
            reward_funcs=reward,
        )
        trainer.train()
        return trainer.model

    return run, lambda model: model


TRAINERS = {
    "ep-rft train": ep_rft,
    "TRL, our rollouts": trl_with_our_rollouts,
    "TRL alone": trl_alone,
}


def load(path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path)


def held_out_score(model: Any) -> float:
    """Mean probability of the right answer and its end of turn, prompt by prompt."""
    import torch
    from transformers import AutoTokenizer

    from eval_protocol_rft.local.models import bundled_model_path

    tokenizer = AutoTokenizer.from_pretrained(bundled_model_path("arithmetic"))
    model = model.float().train(False)
    probabilities = []
    for line in (EXAMPLE / "held_out.jsonl").read_text().splitlines():
        row = json.loads(line)
        prompt = tokenizer.apply_chat_template(
            row["messages"], add_generation_prompt=True, return_dict=False
        )
        answer = tokenizer.encode(row["ground_truth"], add_special_tokens=False)
        answer = [*answer, tokenizer.eos_token_id]
        ids = torch.tensor([[*prompt, *answer]])
        with torch.no_grad():
            logprobs = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        probabilities.append(logprobs[range(len(answer)), answer].sum().exp().item())
    return statistics.fmean(probabilities)


def cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def one(arguments: argparse.Namespace) -> dict[str, Any]:
    """One run, in this process; imports are not measured."""
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        run, model_of = TRAINERS[arguments.only](arguments, folder)
        began, cpu = time.perf_counter(), cpu_seconds()
        result = run()
        seconds, whole = time.perf_counter() - began, cpu_seconds()
        score = held_out_score(model_of(result))
    return {
        "trainer": arguments.only,
        "seed": arguments.seed,
        "cpu": whole - cpu,
        "wall": seconds,
        "cpu_with_imports": whole,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "score": score,
    }


def in_a_process(arguments: argparse.Namespace, trainer: str, seed: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--only", trainer, "--seed", str(seed)]
    for name in ("steps", "groups", "lr"):
        command += [f"--{name}", str(getattr(arguments, name))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "EP_NO_UPLOAD": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{trainer}, seed {seed} ended with status {done.returncode}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def table(runs: list[dict[str, Any]], before: float) -> str:
    lines = [
        f"held-out score before: {before:.3f}",
        "",
        "| trainer | held-out score | each seed | CPU s | with imports | wall s | peak MB |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in dict.fromkeys(run["trainer"] for run in runs):
        own = [run for run in runs if run["trainer"] == name]
        scores = [run["score"] for run in own]
        spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
        each = ", ".join(f"{score:.3f}" for score in scores)
        keys = ("cpu", "cpu_with_imports", "wall", "peak_mb")
        used = " | ".join(f"{statistics.median(run[key] for run in own):.0f}" for key in keys)
        mean = statistics.fmean(scores)
        lines.append(f"| {name} | {mean:.3f} ± {spread:.3f} | {each} | {used} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument(
        "--groups", type=int, default=32, help="prompts per step, 8 completions each"
    )
    parser.add_argument("--lr", type=float, default=5e-4, help="learning rate")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=TRAINERS, help="one run of this one, in this process")
    parser.add_argument("--json", type=Path, help="write the numbers here")
    arguments = parser.parse_args()
    if arguments.only:
        print(json.dumps(one(arguments)), flush=True)
        return
    runs = []
    for seed in range(arguments.seeds):
        for trainer in TRAINERS:
            runs.append(in_a_process(arguments, trainer, seed))
            print(json.dumps(runs[-1]), file=sys.stderr, flush=True)
    from eval_protocol_rft.local.models import bundled_model_path

    print(table(runs, held_out_score(load(bundled_model_path("arithmetic")))))
    if arguments.json:
        arguments.json.write_text(json.dumps(runs, indent=2) + "\n")


if __name__ == "__main__":
    main()
