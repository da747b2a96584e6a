"""How long an episode may get.

Invariant: a limit ends an episode with a stop reason; it never shortens what was said.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class EpisodeLimits:
    """Each ends the episode, which is kept, with the stop reason in brackets."""

    turns: int = 16
    """Assistant turns (`turns`)."""
    tokens: int = 32_768
    """Tokens of the conversation, prompt included (`tokens`). A turn may sample what is left."""
    seconds: float = 1800.0
    """From the episode's first request on (`seconds`). A turn that is being sampled then is
    cancelled and left out; an episode without any turn is a failure."""
    step_seconds: float = 60.0
    """One call of the environment; beyond it the episode is a failure."""
    observation_characters: int = 1_000_000
    """What the environment says after one turn (`observation`): half a second of tokenizing. More
    than that is never rendered."""

    def __post_init__(self) -> None:
        for name in ("turns", "tokens", "observation_characters"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("seconds", "step_seconds"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
