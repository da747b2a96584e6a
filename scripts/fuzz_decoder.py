"""Damage replies at random and watch the decoder: no crash, no hang, no wrong acceptance.

    python scripts/fuzz_decoder.py --cases 1000000 --seed 1

Each case takes a recorded or generated reply, damages its JSON, its events or its bytes, and asks
`tests/hostile/oracle.py` about the outcome. A case that is wrong is printed with the seed that
makes it again: `--cases 1 --seed SEED:NUMBER`. The exit status is 1 where any was wrong.
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from eval_protocol_rft.sampling._types import SamplingError
from tests.hostile.bases import Base, bases
from tests.hostile.mutations import damaged
from tests.hostile.oracle import problem_of

HANG_SECONDS = 10
SHOWN = 20


class HangError(Exception):
    """One case took longer than `HANG_SECONDS`."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seed", default="1")
    options = parser.parse_args()
    seed, _, first = options.seed.partition(":")
    signal.signal(signal.SIGALRM, _hang)
    outcomes: Counter[str] = Counter()
    wrong = 0
    began = time.perf_counter()
    for number in range(int(first or 0), int(first or 0) + options.cases):
        outcome, problem = one_case(random.Random(f"{seed}/{number}"))  # noqa: S311 - not secrets
        outcomes[outcome] += 1
        if problem is not None:
            wrong += 1
            if wrong <= SHOWN:
                print(f"{seed}:{number} {problem}", flush=True)
    seconds = time.perf_counter() - began
    print(f"{options.cases} cases in {seconds:.0f} s: {options.cases / seconds:.0f} replies/s")
    print(", ".join(f"{name} {count}" for name, count in outcomes.most_common()))
    print(f"{wrong} wrong")
    sys.exit(bool(wrong))


def one_case(rng: random.Random) -> tuple[str, str | None]:
    """The name of the outcome, and what is wrong with it."""
    base = rng.choice(bases())
    damage = damaged(base, rng)
    signal.alarm(HANG_SECONDS)
    try:
        outcome = base.decoded(damage.body)
    except SamplingError as error:
        return error.kind, None
    except Exception as error:  # noqa: BLE001 - a crash of any kind is what is looked for
        return "crash", _told(base, damage.what, problem_of(base, damage, error))
    finally:
        signal.alarm(0)
    problem = problem_of(base, damage, outcome)
    return "accepted", problem and _told(base, damage.what, problem)


def _told(base: Base, what: str, problem: str | None) -> str:
    return f"[{base.name}] {what}: {problem}"


def _hang(*_: object) -> None:
    raise HangError(f"no outcome within {HANG_SECONDS} s")


if __name__ == "__main__":
    main()
