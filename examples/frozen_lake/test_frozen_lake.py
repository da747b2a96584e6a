r"""A small frozen lake: walk to the goal, do not fall into a hole. Several turns, one move each.

    ep-rft train examples/frozen_lake/test_frozen_lake.py::test_frozen_lake --held-out 0 \
        --steps 80 --groups-per-step 8 --lr 5e-4 --warmup-steps 5 --max-staleness 1 -o run

The bundled model knows sums and nothing else, so it is told where it stands as a sum, and moves
with the last digit of its answer. A model that calls tools would get `move` in a `ToolLoop`.
"""

from eval_protocol.data_loader import DynamicDataLoader
from eval_protocol.models import EvaluateResult, EvaluationRow, Message
from eval_protocol.pytest import evaluation_test

from eval_protocol_rft import EpisodeRolloutProcessor, SlimLogger, score_each_completion
from eval_protocol_rft.environments import Environment, EpisodeLimits, Step

LAKE = ["FFF", "FHF", "FFG"]
MOVES = {0: (0, -1), 1: (1, 0), 2: (0, 1), 3: (-1, 0)}  # left, down, right, up


def shown(row: int, column: int) -> str:
    return f"{10 + 3 * row + column}+{20 + 7 * column}="


class FrozenLake(Environment):
    def reset(self, row: EvaluationRow) -> None:
        self.row, self.column = map(int, str(row.ground_truth).split(","))

    def step(self, messages: list[Message], assistant: Message) -> Step:
        answer = str(assistant.content).strip()
        if answer[-1:].isascii() and answer[-1:].isdigit():
            down, right = MOVES[int(answer[-1]) % 4]
            self.row = min(max(self.row + down, 0), len(LAKE) - 1)
            self.column = min(max(self.column + right, 0), len(LAKE[0]) - 1)
        place = LAKE[self.row][self.column]
        told = [{"role": "user", "content": shown(self.row, self.column)}]
        return Step(messages=told, done=place in "GH", reward=float(place == "G"))


def starts() -> list[EvaluationRow]:
    """Every place that is frozen."""
    return [
        EvaluationRow(
            messages=[Message(role="user", content=shown(row, column))],
            ground_truth=f"{row},{column}",
        )
        for row, line in enumerate(LAKE)
        for column, place in enumerate(line)
        if place == "F"
    ]


@evaluation_test(
    data_loaders=DynamicDataLoader(generators=[starts]),
    completion_params=[{"model": "local/arithmetic", "n": 16, "temperature": 1.0, "max_tokens": 4}],
    rollout_processor=EpisodeRolloutProcessor(FrozenLake, limits=EpisodeLimits(turns=8)),
    logger=SlimLogger(),
)
@score_each_completion
def test_frozen_lake(row: EvaluationRow) -> EvaluationRow:
    """1 for reaching the goal."""
    extra = row.execution_metadata.extra or {}
    reached = extra["episode"]["step_rewards"][-1:] == [1.0]
    row.evaluation_result = EvaluateResult(score=float(reached))
    return row
