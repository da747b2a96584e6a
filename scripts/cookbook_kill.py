r"""A recipe whose server is killed again and again, against the same recipe undisturbed.

    COOKBOOK=~/cookbook python scripts/cookbook_kill.py runs/killed --kills 20

Starts `ep-rft serve --fireworks` by itself, and `scripts/cookbook.py` against it, with rollouts by
seed: first undisturbed, then with kill -9 at random moments while it trains, each followed by a
start on the same state. Clients are told nothing; their own retries are all there is. Before and
after training, where jobs and deployments are made, the SDK does not repeat a request that is cut
off: there nothing is killed. Exit status 1 if a run fails, or its steps and rewards differ from the
undisturbed ones.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

DRIVER = Path(__file__).with_name("cookbook.py")
REPOSITORY = Path(__file__).resolve().parents[1]
SERVE = "import sys; from eval_protocol_rft.cli import app; sys.exit(app())"
RECIPE = ("rl_loop", "--rollouts", "evaluator", "--sampling-seed", "7", "--no-learning-check")
SIZE = ("--steps", "12", "--groups", "4", "--completions", "8")


class Server:
    """`ep-rft serve --fireworks` on one port and one state, started as often as it is killed."""

    def __init__(self, folder: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def start(self) -> None:
        options = ("--fireworks", "--port", str(self.port), "--state", str(self._folder / "state"))
        with (self._folder / "server.txt").open("ab") as log:
            self._process = subprocess.Popen(  # noqa: S603 - our own command
                [sys.executable, "-c", SERVE, "serve", *options],
                stdout=log,
                stderr=log,
                env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
            )
        while True:
            try:
                urllib.request.urlopen(f"{self.url}/v1/accounts", timeout=60).close()  # noqa: S310
            except OSError:
                if self._process.poll() is not None:
                    raise SystemExit("the server ended: see server.txt") from None
                time.sleep(0.1)
            else:
                return

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


def recipe(server: Server, output: Path) -> subprocess.Popen[bytes]:
    output.mkdir(parents=True, exist_ok=True)
    with (output / "log.txt").open("wb") as log:
        return subprocess.Popen(  # noqa: S603 - our own script
            [sys.executable, DRIVER, *RECIPE, *SIZE, "-o", output],
            stdout=log,
            stderr=log,
            env=os.environ | {"FIREWORKS_BASE_URL": server.url, "FIREWORKS_API_KEY": "fw-local"},
        )


def rewards(output: Path) -> list[float]:
    return list(json.loads((output / "summary.json").read_text())["rewards"])


def steps_made(output: Path) -> int:
    metrics = output / "metrics.jsonl"
    return metrics.read_text().count("rollout/raw_reward") if metrics.exists() else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    server = Server(options.output)
    server.start()
    failed, kills, runs = 0, 0, 0
    draw = random.Random(options.seed)  # noqa: S311 - no secret
    try:
        undisturbed = options.output / "undisturbed"
        failed |= recipe(server, undisturbed).wait()
        wanted = rewards(undisturbed)
        print(f"undisturbed: {len(wanted)} steps", flush=True)
        while kills < options.kills and not failed:
            runs += 1
            output, here = options.output / f"killed-{runs}", 0
            process = recipe(server, output)
            while process.poll() is None:
                # Some right after the start, in the middle of what a client asks again.
                time.sleep(draw.choice((0.2, 1.0, 4.0)) * draw.random() * 2)
                in_training = 0 < steps_made(output) < len(wanted)
                if in_training and process.poll() is None and kills < options.kills:
                    server.kill()
                    server.start()
                    kills, here = kills + 1, here + 1
            status = process.wait()
            same = status == 0 and rewards(output) == wanted
            failed |= not same
            print(
                f"{'ok' if same else 'NOT'}: run {runs}: {here} kills, exit status {status}"
                + (", the steps and rewards of the undisturbed run" if same else ""),
                flush=True,
            )
    finally:
        server.kill()
    print(f"{kills} kills in {runs} runs")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
