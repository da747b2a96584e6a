r"""Two recipes at once on one server, against each alone: nothing may be mixed.

    export FIREWORKS_BASE_URL=... FIREWORKS_API_KEY=...
    COOKBOOK=~/cookbook python scripts/cookbook_pair.py runs/pair

One learns sums, with all parameters; the other to answer with even numbers, with an adapter. Each
has a trainer job and a deployment of its own and draws by seed, so that what it does at each step
is fixed. Exit status 1 if a reward of any step, alone and beside the other, differs, or a check of
`scripts/cookbook.py` fails: a ratio of 1 at every step says that a deployment held the weights of
its own job and of no other.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

DRIVER = Path(__file__).with_name("cookbook.py")
SIZE = ("--steps", "10", "--groups", "4", "--completions", "8", "--no-learning-check")
RECIPES = {
    "sums": ("rl_loop", "--sampling-seed", "7"),
    "even": ("rl_loop", "--sampling-seed", "8", "--reward", "even", "--lora-rank", "8"),
}
DRIFT = 1e-3
"""Of a gradient's norm, relative: requests that meet in another batch round otherwise."""


def start(folder: Path, name: str, which: str) -> subprocess.Popen[bytes]:
    output = folder / name
    output.mkdir(parents=True, exist_ok=True)
    with (output / "log.txt").open("wb") as log:
        return subprocess.Popen(  # noqa: S603 - our own script
            [sys.executable, DRIVER, *RECIPES[which], *SIZE, "-o", output],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ,
        )


def steps(folder: Path, name: str) -> list[tuple[float, float]]:
    """Mean reward and norm of the gradient, per step."""
    lines = map(json.loads, (folder / name / "metrics.jsonl").read_text().splitlines())
    return [
        (line["rollout/raw_reward"], line["train/grad_norm"])
        for line in lines
        if "rollout/raw_reward" in line
    ]


def main() -> int:
    folder = Path(sys.argv[1])
    status = 0
    for which in RECIPES:
        status |= start(folder, f"{which}-alone", which).wait()
    both = [start(folder, f"{which}-beside", which) for which in RECIPES]
    for process in both:
        status |= process.wait()
    for which in RECIPES:
        alone, beside = steps(folder, f"{which}-alone"), steps(folder, f"{which}-beside")
        rewards = [pair[0] for pair in alone] == [pair[0] for pair in beside]
        drift = max(abs(b[1] / a[1] - 1) for a, b in zip(alone, beside, strict=False))
        holds = rewards and drift < DRIFT
        status |= not holds
        print(
            f"{'ok' if holds else 'NOT'}: {which}: {len(alone)} steps alone, {len(beside)} beside "
            f"the other; rewards {'equal' if rewards else 'differ'}; gradient norms at most "
            f"{drift:.1e} apart"
        )
        for name in (f"{which}-alone", f"{which}-beside"):
            summary = json.loads((folder / name / "summary.json").read_text())
            for check in summary["checks"]:
                print(f"  {name}: {'ok' if check['holds'] else 'NOT'}: {check['name']}")
    return status


if __name__ == "__main__":
    sys.exit(main())
