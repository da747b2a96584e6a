"""`GymnasiumEnvironment`: an environment of gymnasium, played in messages.

Invariant: the episodes of a row begin in one state, which comes from `group_seed`; chance after
that is each episode's own, and comes from its `seed`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from eval_protocol_rft._errors import require
from eval_protocol_rft.episodes._environment import Step
from eval_protocol_rft.episodes._played import (
    Outcome,
    Parse,
    Played,
    Render,
    as_text,
    described,
)

if TYPE_CHECKING:
    from eval_protocol.models import EvaluationRow, Message


_EXTRA = "eval-protocol-rft[gym]"


class GymnasiumEnvironment(Played):
    """An environment of gymnasium (`pip install 'eval-protocol-rft[gym]'`).

    The first observation is said behind the row's messages. The episode's score is the sum of its
    rewards, and it is done where the environment terminates or truncates it (in `metrics`).

    Args:
        make: a function of nothing that makes one, or an id for `gymnasium.make`.
        render: an observation as text; default text as it is and JSON of anything else, or what
            `render()` returns with `render_mode="ansi"`.
        parse: an answer's text, or a tool call's arguments, as an action; a ValueError tells the
            model why it is none. Default the last number in the text (or name, with `actions`), for
            other spaces than `Discrete` the last JSON value; or the argument `action`.
        actions: names of a `Discrete` space's actions, in their order.
        tool: name of a tool whose calls are the actions; None: answers in text are.
        **options: for `gymnasium.make`.

    Raises:
        MissingPackageError: gymnasium is not installed.
    """

    def __init__(
        self,
        make: str | Callable[[], Any],
        *,
        render: Render | None = None,
        parse: Parse | None = None,
        actions: Sequence[str] | None = None,
        tool: str | None = None,
        **options: Any,
    ) -> None:
        if isinstance(make, str):
            self.env = require("gymnasium", install=_EXTRA).make(make, **options)
        else:
            self.env = make(**options)
        self._render = render
        self._space = _Space(self.env.action_space, actions)
        schema = None
        if tool is not None:
            about = f"Act in {getattr(self.env.spec, 'id', None) or 'the environment'}."
            schema = described(tool, about, {"action": self._space.schema})
        super().__init__(parse=parse or self._space.read, tool=schema)

    def reset(self, row: EvaluationRow, *, group_seed: int, seed: int) -> list[dict[str, Any]]:
        """Begin in the state that comes from `group_seed`."""
        seeding = require("gymnasium.utils.seeding", install=_EXTRA)
        observation, _ = self.env.reset(seed=group_seed)
        self.env.unwrapped.np_random = seeding.np_random(seed)[0]
        return [{"role": "user", "content": self._seen(observation)}]

    def step(self, messages: Sequence[Message], assistant: Message) -> Step:
        """Take the actions of an answer."""
        turn = self._turn(assistant)
        for move in turn:
            observation, reward, terminated, truncated, _ = self.env.step(move.action)
            move.outcome = Outcome(
                text=self._seen(observation),
                reward=float(reward),
                done=bool(terminated or truncated),
                metrics={"terminated": bool(terminated), "truncated": bool(truncated)},
            )
        return self._step(turn)

    def close(self) -> None:
        self.env.close()

    def _seen(self, observation: Any) -> str:
        if self._render is not None:
            return self._render(observation)
        if self.env.render_mode == "ansi":
            return str(self.env.render())
        return as_text(observation)


class _Space:
    """The actions that there are."""

    def __init__(self, space: Any, names: Sequence[str] | None) -> None:
        self._space = space
        self._numbers: range | None = None
        if hasattr(space, "n") and hasattr(space, "start") and not hasattr(space, "spaces"):
            self._numbers = range(int(space.start), int(space.start) + int(space.n))
        self._names = None if names is None else [name.lower() for name in names]
        if names is not None and (self._numbers is None or len(names) != len(self._numbers)):
            raise ValueError(f"{len(names)} actions are named, and the space of them is {space}")

    @property
    def schema(self) -> dict[str, Any]:
        """JSON schema of an action."""
        if self._names is not None:
            return {"type": "string", "enum": self._names}
        if self._numbers is not None:
            return {
                "type": "integer", "minimum": self._numbers[0], "maximum": self._numbers[-1]
            }  # fmt: skip
        return {"description": f"JSON of a member of {self._space}"}

    def read(self, given: Any) -> Any:
        """The action that an answer's text, or a tool call's arguments, mean.

        Raises:
            ValueError: they mean none.
        """
        if isinstance(given, dict):
            if "action" not in given:
                raise ValueError("the argument action is missing")
            value = given["action"]
        else:
            value = self._last_in(given)
        if self._names is not None and self._numbers is not None:
            if not isinstance(value, str) or value.lower() not in self._names:
                raise ValueError(f"say one of {', '.join(self._names)}")
            return self._numbers[self._names.index(value.lower())]
        if self._numbers is not None:
            if type(value) is not int or value not in self._numbers:
                first, last = self._numbers[0], self._numbers[-1]
                raise ValueError(f"give a whole number from {first} to {last}")
            return value
        return self._member(value)

    def _last_in(self, text: str) -> Any:
        if self._names is not None:
            # The longest first: "turn left" is no "turn". Names may be symbols, which have no \b.
            names = sorted(self._names, key=len, reverse=True)
            pattern = "|".join(map(re.escape, names))
            found = re.findall(rf"(?<!\w)(?:{pattern})(?!\w)", text, re.IGNORECASE)
            return found[-1] if found else None
        if self._numbers is not None:
            found = re.findall(r"-?\d+(?:\.\d+)?", text)
            if not found or "." in found[-1] or len(found[-1]) >= 19:
                return None
            return int(found[-1])
        decoder = json.JSONDecoder()
        value, end = None, 0
        for start in (match.start() for match in re.finditer(r"[\[{\-\d]", text)):
            if start >= end:
                try:
                    value, end = decoder.raw_decode(text, start)
                except ValueError:
                    continue
                except RecursionError as error:
                    raise ValueError("it is nested too deeply") from error
        return value

    def _member(self, value: Any) -> Any:
        import numpy as np

        space = self._space
        if isinstance(value, list | int | float) and getattr(space, "dtype", None) is not None:
            try:
                given, value = np.asarray(value), np.asarray(value, space.dtype)
            except (ValueError, OverflowError) as error:
                raise ValueError(str(error)) from error
            if value.dtype.kind in "iu" and given.dtype.kind == "f" and (given != value).any():
                raise ValueError("give whole numbers")
        if not space.contains(value):
            raise ValueError(f"give JSON of a member of {space}")
        return value
