"""A user's environment as an episode sees it.

Invariant: whatever the environment does, an episode gets a `Step` with messages and plain metrics
within bounds, or an `EnvironmentFaultError` that says what was wrong.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import TYPE_CHECKING, Any

from eval_protocol_rft.environments.calling import call
from eval_protocol_rft.environments.environment import Environment, EnvironmentFaultError, Step
from eval_protocol_rft.environments.limits import EpisodeLimits
from eval_protocol_rft.environments.transcript import as_messages
from eval_protocol_rft.text import well_formed_json

if TYPE_CHECKING:
    from eval_protocol.models import EvaluationRow, Message

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CheckedEnvironment:
    """Calls an environment and checks what it answers. Make one with `made`."""

    environment: Environment
    limits: EpisodeLimits

    @classmethod
    async def made(
        cls, factory: Callable[[], Environment], limits: EpisodeLimits
    ) -> CheckedEnvironment:
        """The environment of one episode.

        Raises:
            EnvironmentFaultError: the factory raised, hung, or made something else.
        """
        name = f"{getattr(factory, '__name__', type(factory).__name__)}()"

        async def without_thread() -> Environment:
            return factory()

        # A class that does nothing of its own when it is made takes no time either.
        is_quick = getattr(factory, "__init__", None) is object.__init__
        make = without_thread if is_quick else factory
        environment = await call(make, what=name, seconds=limits.step_seconds)
        if not callable(getattr(environment, "step", None)):
            raise EnvironmentFaultError(f"{name} made a {type(environment).__name__} without step")
        return cls(environment, limits)

    async def reset(self, row: EvaluationRow) -> list[Message]:
        """Begin; the messages to put behind the row's own.

        Raises:
            EnvironmentFaultError: it raised, hung, or returned what are no messages.
        """
        if not _does_something(self.environment.reset):
            return []
        began = await self._call("reset", row.model_copy(deep=True))
        return as_messages(began or ())

    async def step(self, history: Sequence[Message], assistant: Message) -> Step:
        """Its answer to an assistant turn; it says something unless it is done.

        Raises:
            EnvironmentFaultError: it raised, hung, or returned what is no such step.
        """
        answer = await self._call("step", history, assistant)
        if not isinstance(answer, Step):
            raise EnvironmentFaultError(f"step() returned {type(answer).__name__}, not a Step")
        if not answer.done and not answer.messages:
            raise EnvironmentFaultError(f"{self._name}.step() is not done and says nothing")
        return replace(answer, reward=_reward(answer.reward), metrics=self._metrics(answer.metrics))

    async def close(self, row_id: str | None) -> None:
        """End it; a fault is logged, for the episode is over."""
        if not _does_something(self.environment.close):
            return
        try:
            await self._call("close")
        except EnvironmentFaultError as error:
            logger.warning("row %s: %s", row_id, error)

    def too_long(self, told: Sequence[Message]) -> bool:
        """Whether these are more characters than may be said at once."""
        return sum(len(str(m.content or "")) for m in told) > self.limits.observation_characters

    @property
    def _name(self) -> str:
        return type(self.environment).__name__

    def _metrics(self, metrics: Mapping[str, Any]) -> dict[str, Any]:
        if isinstance(metrics, dict) and not metrics:
            return {}
        try:
            text = json.dumps(dict(metrics), allow_nan=False)
            plain: dict[str, Any] = well_formed_json(json.loads(text))
        except (TypeError, ValueError, RecursionError) as error:
            raise EnvironmentFaultError(f"the metrics of a step are no JSON: {error}") from error
        if len(text) > self.limits.observation_characters:
            raise EnvironmentFaultError(f"the metrics of a step are {len(text)} characters of JSON")
        return plain

    async def _call(self, method: str, *arguments: Any) -> Any:
        function, what = getattr(self.environment, method), f"{self._name}.{method}()"
        return await call(function, *arguments, what=what, seconds=self.limits.step_seconds)


def _reward(reward: Any) -> float | None:
    if reward is None:
        return None
    if not isinstance(reward, Real) or not math.isfinite(reward):
        raise EnvironmentFaultError(
            f"the reward of a step is {reward!r}: a finite number, or None where there is none"
        )
    return float(reward)


def _does_something(method: Callable[..., Any]) -> bool:
    """Whether it is overridden: what an `Environment` does by itself takes no thread, and no copy
    of a row."""
    return getattr(method, "__func__", None) not in (Environment.reset, Environment.close)
