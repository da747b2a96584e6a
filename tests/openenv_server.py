"""A server of OpenEnv for tests, run by a Python that has `openenv-core`:
`python openenv_server.py PORT`. It counts down from what the seed says."""

import sys

import uvicorn
from openenv.core.env_server import Action, Environment, Observation, State, create_fastapi_app


class Take(Action):
    take: int


class Left(Observation):
    left: int


class Countdown(Environment):
    SUPPORTS_CONCURRENT_SESSIONS = True

    def reset(self, seed=None, episode_id=None, more=0, **options):
        self.left = seed % 5 + 5 + more
        return Left(left=self.left)

    def step(self, action, timeout_s=None, **options):
        if action.take > self.left:
            raise ValueError("so many are not left")
        self.left -= action.take
        return Left(left=self.left, reward=action.take / 10, done=self.left == 0)

    @property
    def state(self):
        return State()


app = create_fastapi_app(Countdown, Take, Left, max_concurrent_envs=2)
uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="error")
