"""What is examined, and with how many probes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from eval_protocol_rft.models import LOCAL_PREFIX, local_model_folder
from eval_protocol_rft.params import RolloutRequest

DEFAULT_REQUESTS = 400
FEWEST_REQUESTS = 40
DEFAULT_MAX_TOKENS = 64
DEFAULT_SEED = 20
"""Fixed: the same setup gives the same table. Another one repeats an unlikely p-value."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """One setup to examine."""

    request: RolloutRequest
    """Model, endpoint, tokenizer, template arguments, and the temperature to train at (above 0)."""
    weights: str | Path | None
    """Folder or hub id of what the trainer loads; None: those of a local model, else none."""
    requests: int = DEFAULT_REQUESTS
    """One-token probes for the test of frequencies, over all prompts."""
    concurrency: int | None = None
    """Requests in flight; None: 96 in this process, 16 over HTTP."""
    trust_remote_code: bool = False

    @property
    def in_flight(self) -> int:
        """Few over HTTP: some engines draw seeded requests one by one."""
        return self.concurrency or (96 if self.request.endpoint is None else 16)

    @property
    def trainer_weights(self) -> str | Path | None:
        """What the trainer would load."""
        model = self.request.params.model
        if self.weights is not None or not model.startswith(LOCAL_PREFIX):
            return self.weights
        return local_model_folder(model)

    def per_prompt(self, prompts: int) -> PerPrompt:
        """How many probes each of `prompts` prompts gets."""
        one_token = max(FEWEST_REQUESTS, self.requests) // prompts
        return PerPrompt(one_token, max(12, one_token // 4), max(4, one_token // 10), 3)


@dataclass(frozen=True, slots=True)
class PerPrompt:
    """Probes of one prompt."""

    first_tokens: int
    kind: int
    """At each of two temperatures."""
    full: int
    pairs: int

    @property
    def total(self) -> int:
        return self.first_tokens + 2 * self.kind + self.full + 2 * self.pairs
