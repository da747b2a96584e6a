r"""A small frozen lake: walk to the goal, do not fall into a hole. Several turns, one move each.

    ep-rft train examples/frozen_lake/test_frozen_lake.py::test_frozen_lake --held-out 0 \
        --steps 40 --groups-per-step 8 --lr 5e-4 --warmup-steps 5 --max-staleness 1 -o run

Its episodes as a file, which `ep-rft score`, `report` and `datums` take:

    ep-rft generate examples/frozen_lake/starts.jsonl -o lake.parquet -n 16 --max-tokens 4 \
        --model local/arithmetic --episodes examples/frozen_lake/test_frozen_lake.py::FrozenLake

The bundled model knows sums and nothing else, so it is told where it stands as a sum, and moves
with the last digit of its answer. A model that calls tools has `move`, in the second test; there a
script that walks at random stands in for it. With one behind a server, leave out `sampler=`, name
it in `completion_params`, and `ep-rft train` trains it.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from eval_protocol.models import EvaluateResult, EvaluationRow, Message
from eval_protocol.pytest import evaluation_test
from wanderer import Wanderer

from eval_protocol_rft import EpisodeRolloutProcessor, SlimLogger, score_each_completion
from eval_protocol_rft.episodes import Environment, EpisodeLimits, Step, ToolLoop

LAKE = ["FFF", "FHF", "FFG"]
MOVES = {"left": (0, -1), "down": (1, 0), "right": (0, 1), "up": (-1, 0)}


class Lake:
    def reset(self, row: EvaluationRow) -> None:
        self.row, self.column = map(int, str(row.ground_truth).split(","))

    def move(self, direction: Literal["left", "down", "right", "up"]) -> str:
        """Walk one field over the ice."""
        down, right = MOVES[direction]
        self.row = min(max(self.row + down, 0), len(LAKE) - 1)
        self.column = min(max(self.column + right, 0), len(LAKE[0]) - 1)
        return self.shown()

    def shown(self) -> str:
        return f"{10 + 3 * self.row + self.column}+{20 + 7 * self.column}="

    def after(self, step: Step) -> Step:
        place = LAKE[self.row][self.column]
        return replace(step, done=place in "GH", reward=float(place == "G"))


class FrozenLake(Lake, Environment):
    def step(self, messages: list[Message], assistant: Message) -> Step:
        answer = str(assistant.content).strip()
        if answer[-1:].isascii() and answer[-1:].isdigit():
            self.move(list(MOVES)[int(answer[-1]) % 4])
        return self.after(Step(messages=[{"role": "user", "content": self.shown()}]))


class FrozenLakeWithTools(Lake, ToolLoop):
    def __init__(self) -> None:
        super().__init__(self.move)

    async def step(self, messages: list[Message], assistant: Message) -> Step:
        return self.after(await super().step(messages, assistant))


def starts(max_tokens: int) -> dict[str, Any]:
    """What both tests have in common: they begin at every place that is frozen."""
    params = {"model": "local/arithmetic", "n": 16, "temperature": 1.0, "max_tokens": max_tokens}
    return {
        "input_dataset": [str(Path(__file__).with_name("starts.jsonl"))],
        "completion_params": [params],
        "logger": SlimLogger(),
    }


def reached_the_goal(row: EvaluationRow) -> EvaluationRow:
    rewards = (row.execution_metadata.extra or {})["episode"]["step_rewards"]
    row.evaluation_result = EvaluateResult(score=float(rewards[-1:] == [1.0]))
    return row


@evaluation_test(
    **starts(max_tokens=4),
    rollout_processor=EpisodeRolloutProcessor(FrozenLake, limits=EpisodeLimits(turns=8)),
)
@score_each_completion
def test_frozen_lake(row: EvaluationRow) -> EvaluationRow:
    return reached_the_goal(row)


@evaluation_test(
    **starts(max_tokens=200),
    rollout_processor=EpisodeRolloutProcessor(
        FrozenLakeWithTools, limits=EpisodeLimits(turns=8), sampler=Wanderer()
    ),
)
@score_each_completion
def test_with_tools(row: EvaluationRow) -> EvaluationRow:
    return reached_the_goal(row)
