"""Sampler against trainer on tokens that both should give the same probability. Pure.

Invariant: only groups of the very weights in training count, so that what is measured is a fault
of the setup and never the policy's own progress.

k1 and k3 estimate KL(sampler || trainer) from d = trainer - sampler logprob of sampled tokens:
k1 = -d, k3 = exp(d) - 1 - d (J. Schulman, "Approximating KL Divergence", 2020).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec
import numpy as np

from eval_protocol_rft.sampling import Completion
from eval_protocol_rft.training._datums import TrainingDatum, pack
from eval_protocol_rft.training._types import FloatArray, Trajectory

WARN_K3 = 2e-3
FAIL_K3 = 1.5e-2
"""Mean k3 over tokens. Between engines of different precision (bfloat16 kernels) it is below the
first; importance ratios stop meaning anything beyond the second."""


@dataclass(frozen=True, slots=True)
class Mismatch:
    """How far sampler and trainer are apart."""

    tokens: int
    k1: float
    k3: float
    max_difference: float
    """Of the logprobs of one token, nats."""

    @property
    def mean_ratio(self) -> float:
        """Mean of exp(trainer - sampler), each difference capped: 1 where the policies are one."""
        return 1.0 + self.k3 - self.k1

    @property
    def verdict(self) -> Literal["pass", "warn", "fail"]:
        return "fail" if self.k3 > FAIL_K3 else "warn" if self.k3 > WARN_K3 else "pass"


def measure(pairs: Sequence[tuple[FloatArray, FloatArray]]) -> Mismatch | None:
    """Compare (sampler, trainer) logprobs of sampled tokens, per datum; None without tokens."""
    if not any(len(sampler) for sampler, _ in pairs):
        return None
    sampler = np.concatenate([pair[0] for pair in pairs]).astype(np.float64)
    trainer = np.concatenate([pair[1] for pair in pairs]).astype(np.float64)
    difference = trainer - sampler
    # Capped as in the losses: one absurd token must not hide behind an infinity.
    k3 = np.expm1(np.minimum(difference, 20.0)) - difference
    return Mismatch(
        tokens=len(sampler),
        k1=float(-difference.mean()),
        k3=float(k3.mean()),
        max_difference=float(np.abs(difference).max()),
    )


def unscored(prompt: Sequence[int], completion: Completion) -> Trajectory:
    """A completion that is compared and not trained on."""
    sampled = np.repeat(np.array([0.0, 1.0], np.float32), [len(prompt), len(completion.token_ids)])
    return Trajectory(
        tokens=np.array([*prompt, *completion.token_ids], np.int64),
        logprobs=np.array([0.0] * len(prompt) + completion.logprobs, np.float32),
        loss_mask=sampled,
        reward=None,
        finish_reason=completion.finish_reason,
        policy_version=completion.policy_version,
        first_policy_version=completion.first_policy_version,
        row_id="of a probe",
    )


def comparable(trajectories: Sequence[Trajectory]) -> list[TrainingDatum]:
    """Datums to run through a trainer's forward pass, for `sampled_pairs`; all of group 0."""
    scored = [msgspec.structs.replace(trajectory, reward=0.0) for trajectory in trajectories]
    return pack(scored, [1.0] * len(scored), [0] * len(scored), normalization="none")


def sampled_pairs(
    datums: Sequence[TrainingDatum], logprobs: Sequence[FloatArray], groups: Collection[int]
) -> list[tuple[FloatArray, FloatArray]]:
    """(sampler, trainer) logprobs of the sampled tokens of datums in `groups`."""
    return [
        (datum.logprobs[datum.mask], values[datum.mask])
        for datum, values in zip(datums, logprobs, strict=True)
        if datum.group in groups
    ]


def looks_shifted(pairs: Sequence[tuple[FloatArray, FloatArray]]) -> bool:
    """Whether the sampler's logprobs fit the trainer's one token further on, or back."""
    long = [(s, t) for s, t in pairs if len(s) > 1]
    for left, right in ((slice(1, None), slice(None, -1)), (slice(None, -1), slice(1, None))):
        moved = measure([(s[left], t[right]) for s, t in long])
        if moved is not None and moved.verdict == "pass":
            return True
    return False


def missing_eos(
    datums: Sequence[TrainingDatum], eos_token_ids: Collection[int], *, stops: bool
) -> int:
    """Datums whose last turn ended by itself and not with an end token. With stop strings (`stops`)
    it may."""
    if stops or not eos_token_ids:
        return 0
    return sum(
        not datum.truncated and int(datum.target_tokens[datum.mask][-1]) not in eos_token_ids
        for datum in datums
    )
