"""`TextArenaEnvironment`: a game of TextArena, played in messages.

TextArena draws from Python's one `random`.

Invariant: each game goes on with random numbers of its own, whatever other games of this process
draw between its moves.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from eval_protocol_rft._errors import require
from eval_protocol_rft.episodes._environment import Step
from eval_protocol_rft.episodes._played import Outcome, Parse, Played

if TYPE_CHECKING:
    from eval_protocol.models import EvaluationRow, Message

_EXTRA = "eval-protocol-rft[textarena]"
_RANDOM = threading.Lock()


class TextArenaEnvironment(Played):
    """A game of TextArena (`pip install 'eval-protocol-rft[textarena]'`).

    The model is told what the game and other players say since its last move; the first time that
    is the rules, behind the row's messages. The score is the model's reward at the end, 0 where the
    game was not finished.

    Args:
        make: an id for `textarena.make`, or a function of nothing that makes a game.
        players: how many play.
        player: which of them the model is.
        opponent: the moves of all others, from what the game tells them: a function, or an agent of
            TextArena; in a thread.
        parse: an answer's text as a move; default as it is. A ValueError tells the model why it is
            none.
        **options: for `textarena.make`.

    Raises:
        MissingPackageError: TextArena is not installed.
    """

    def __init__(
        self,
        make: str | Callable[[], Any],
        *,
        players: int = 1,
        player: int = 0,
        opponent: Callable[[str], str] | None = None,
        parse: Parse = str.strip,
        **options: Any,
    ) -> None:
        if players > 1 and opponent is None:
            raise ValueError(f"{players} players need an opponent, who moves for the others")
        super().__init__(parse=parse, tool=None)
        arena = require("textarena", install=_EXTRA)
        self._random = random.Random()  # noqa: S311 - it plays games
        with self._own_random():
            self.game = arena.make(make, **options) if isinstance(make, str) else make(**options)
        self._bare = self.game
        while isinstance(self._bare, arena.Wrapper):
            self._bare = self._bare.env
        self._players, self._player, self._opponent = players, player, opponent
        self._kind_of_moves = arena.ObservationType.PLAYER_ACTION

    def reset(self, row: EvaluationRow, *, group_seed: int, seed: int) -> list[dict[str, Any]]:
        """Begin the game that comes from `group_seed`; others move first where it is their turn."""
        self._random.seed(group_seed)
        with self._own_random():
            self.game.reset(num_players=self._players, seed=group_seed)
        done = self._others_move()
        if done:
            raise RuntimeError("the game was over before the model's first move")
        said = self._said()
        self._random.seed(seed)
        return [{"role": "user", "content": said}]

    def step(self, messages: Sequence[Message], assistant: Message) -> Step:
        """Make the move, and those of the others."""
        turn = self._turn(assistant)
        for move in turn:
            done = self._move(move.action) or self._others_move()
            reward = None
            if done:
                rewards, _ = self.game.close()
                reward = float((rewards or {}).get(self._player, 0.0))
            move.outcome = Outcome(text="" if done else self._said(), reward=reward, done=done)
        return self._step(turn)

    def _others_move(self) -> bool:
        """Let the others move until it is the model's turn; whether the game is over."""
        while self._bare.state.current_player_id != self._player:
            assert self._opponent is not None  # noqa: S101 - there are others
            if self._move(self._opponent(self._said())):
                return True
        return False

    def _move(self, action: str) -> bool:
        with self._own_random():
            done, _ = self.game.step(action)
        return bool(done)

    def _said(self) -> str:
        """What the player whose turn it is has not yet been told, but for moves of its own."""
        with self._own_random():
            player, told = self._bare.get_observation()
        names = self._bare.state.role_mapping
        lines = [
            text if sender < 0 else f"[{names.get(sender, f'Player {sender}')}] {text}"
            for sender, text, kind in told
            if not (sender == player and kind is self._kind_of_moves)
        ]
        return "\n".join(lines) or "It is your turn."

    @contextmanager
    def _own_random(self) -> Iterator[None]:
        with _RANDOM:
            others = random.getstate()
            random.setstate(self._random.getstate())
            try:
                yield
            finally:
                self._random.setstate(random.getstate())
                random.setstate(others)
