r"""A gymnasium environment: FrozenLake-v1, in which the bundled model learns to walk to the goal.

    ep-rft train examples/gym_lake/test_lake.py::test_lake --held-out 0 --steps 40 \
        --groups-per-step 8 --lr 5e-4 --warmup-steps 5 --max-staleness 1 -o run

The episode's score is the return of gymnasium's environment.
"""

from eval_protocol.models import EvaluationRow, Message
from eval_protocol.pytest import evaluation_test

from eval_protocol_rft import EpisodeRolloutProcessor, score_each_completion
from eval_protocol_rft.episodes import EpisodeLimits, GymnasiumEnvironment


def lake() -> GymnasiumEnvironment:
    world = {"desc": ["SFF", "FHF", "FFG"], "is_slippery": False, "max_episode_steps": 8}
    as_a_sum, move = "{0}+{0}=".format, lambda text: int(text.strip()[-1:]) % 4
    return GymnasiumEnvironment("FrozenLake-v1", render=as_a_sum, parse=move, **world)


@evaluation_test(
    input_messages=[[[Message(role="user", content=f"{walk}+0=")] for walk in range(10, 26)]],
    completion_params=[{"model": "local/arithmetic", "n": 16, "temperature": 1.0, "max_tokens": 4}],
    rollout_processor=EpisodeRolloutProcessor(lake, limits=EpisodeLimits(turns=8)),
)
@score_each_completion
def test_lake(row: EvaluationRow) -> EvaluationRow:
    return row  # the environment has scored it: the sum of its rewards
