"""The losses once more, one token at a time in plain Python, written from the formulas.

Other test files compare the torch losses with these. A reference takes the current logprobs twice:
`lp` varies and `fixed` does not, so a finite difference over `lp` is the gradient with its
stop-gradients respected.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from eval_protocol_rft.training.losses._tensors import PolicyTensors

Floats = list[float]


@dataclass(frozen=True)
class Tokens:
    """One sequence; `mask` has holes where a tool or the user spoke between two turns."""

    lp: Floats
    q: Floats
    advantages: Floats
    weights: Floats
    mask: list[bool]
    old: Floats
    reference: Floats

    def sampled(self) -> list[int]:
        return [t for t, counts in enumerate(self.mask) if counts]


def draw_batch(seed: int, spread: float = 0.6) -> list[Tokens]:
    """Sequences of unlike lengths with prompts, holes, both signs of advantage, a zero advantage,
    and logprobs as far off-policy as `spread` says (0: on-policy)."""
    rng = random.Random(seed)
    batch = []
    for length, advantage in ((9, 1.3), (6, -0.7), (12, -2.1), (5, 0.0), (8, 0.4)):
        mask = [t >= 2 and rng.random() < 0.75 for t in range(length)]
        mask[-1] = True
        q = [-rng.expovariate(1.0) if m else 0.0 for m in mask]
        weight = rng.choice([1.0, 1.0 / sum(mask), 0.125])
        batch.append(
            Tokens(
                lp=[
                    x - rng.gauss(0.0, spread) if m else -1.0 for x, m in zip(q, mask, strict=True)
                ],
                q=q,
                advantages=[advantage if m else 0.0 for m in mask],
                weights=[weight if m else 0.0 for m in mask],
                mask=mask,
                old=[x + rng.gauss(0.0, spread / 2) for x in q],
                reference=[x + rng.gauss(0.0, spread) for x in q],
            )
        )
    return batch


FIELDS = {
    "lp": "logprobs",
    "q": "sampling_logprobs",
    "advantages": "advantages",
    "weights": "weights",
    "mask": "mask",
    "old": "old_logprobs",
    "reference": "reference_logprobs",
}


def flat(batch: Sequence[Tokens], *leave_out: str) -> PolicyTensors:
    """The batch as flat float64 tensors, logprobs with gradient."""
    lengths = torch.tensor([len(tokens.lp) for tokens in batch])
    values: dict[str, Tensor] = {
        name: torch.cat([_tensor(getattr(tokens, ours)) for tokens in batch])
        for ours, name in FIELDS.items()
        if ours not in leave_out
    }
    values["logprobs"].requires_grad_()
    return PolicyTensors(sequence_ids=torch.repeat_interleave(lengths), **values)


def padded(batch: Sequence[Tokens], *leave_out: str, width: int, junk: float) -> PolicyTensors:
    """The batch as [B, width] tensors with `junk` in every padding position but the mask's."""
    values = {}
    for ours, name in FIELDS.items():
        if ours in leave_out:
            continue
        fill = 0.0 if ours == "mask" else junk
        rows = [
            torch.cat([_tensor(x), _tensor([fill] * (width - len(x))).to(_tensor(x).dtype)])
            for x in (getattr(tokens, ours) for tokens in batch)
        ]
        values[name] = torch.stack(rows)
    values["logprobs"].requires_grad_()
    return PolicyTensors(**values)


def _tensor(values: Sequence[float] | Sequence[bool]) -> Tensor:
    return torch.tensor(values, dtype=torch.bool if isinstance(values[0], bool) else torch.float64)


# What token t of a sequence adds: (sequence, lp, fixed, anchor, t) -> loss
TokenReference = Callable[[Tokens, Floats, Floats, Floats, int], float]


def _clamp(x: float, low: float, high: float) -> float:
    return min(max(x, low), high)


def importance_sampling(s: Tokens, lp: Floats, fixed: Floats, q: Floats, t: int) -> float:
    return -math.exp(lp[t] - q[t]) * s.advantages[t]


def reinforce(s: Tokens, lp: Floats, fixed: Floats, q: Floats, t: int) -> float:
    return -lp[t] * s.advantages[t]


def ppo(low: float, high: float) -> TokenReference:
    def loss(s: Tokens, lp: Floats, fixed: Floats, q: Floats, t: int) -> float:
        r, a = math.exp(lp[t] - q[t]), s.advantages[t]
        return -min(r * a, _clamp(r, low, high) * a)

    return loss


def dapo(low: float, high: float, c: float) -> TokenReference:
    def loss(s: Tokens, lp: Floats, fixed: Floats, q: Floats, t: int) -> float:
        r, a = math.exp(lp[t] - q[t]), s.advantages[t]
        objective = min(r * a, _clamp(r, low, high) * a)
        return -max(objective, c * a) if a < 0 else -objective

    return loss


def cispo(low: float, high: float) -> TokenReference:
    def loss(s: Tokens, lp: Floats, fixed: Floats, q: Floats, t: int) -> float:
        return -_clamp(math.exp(fixed[t] - q[t]), low, high) * lp[t] * s.advantages[t]

    return loss


def gspo(low: float, high: float) -> TokenReference:
    def loss(s: Tokens, lp: Floats, fixed: Floats, q: Floats, t: int) -> float:
        sampled = s.sampled()
        ratio = math.exp(sum(fixed[k] - q[k] for k in sampled) / len(sampled))
        r, a = ratio * math.exp(lp[t]) / math.exp(fixed[t]), s.advantages[t]
        return -min(r * a, _clamp(r, low, high) * a)

    return loss


def dro(beta: float) -> TokenReference:
    def loss(s: Tokens, lp: Floats, fixed: Floats, q: Floats, t: int) -> float:
        return -(lp[t] * s.advantages[t] - 0.5 * beta * (lp[t] - q[t]) ** 2)

    return loss


def geo_mean(low: float, high: float) -> TokenReference:
    def loss(s: Tokens, lp: Floats, fixed: Floats, q: Floats, t: int) -> float:
        logs = []
        for k in s.sampled():
            x, a = lp[k] - q[k], s.advantages[k]
            logs.append(max(x, math.log(low)) if a < 0 else min(x, math.log(high)))
        return -math.exp(sum(logs) / len(logs)) * s.advantages[t]

    return loss


def sapo(pos: float, neg: float) -> TokenReference:
    def loss(s: Tokens, lp: Floats, fixed: Floats, q: Floats, t: int) -> float:
        r, a = math.exp(lp[t] - q[t]), s.advantages[t]
        tau = pos if a > 0 else neg
        # The logistic function in the form that cannot overflow.
        return -a * (4.0 / tau) * 0.5 * (1.0 + math.tanh(tau * (r - 1.0) / 2.0))

    return loss


def dppo(low: float, high: float, cap: float, *, kl: bool) -> TokenReference:
    def loss(s: Tokens, lp: Floats, fixed: Floats, q: Floats, t: int) -> float:
        p, p_q, a = math.exp(fixed[t]), math.exp(q[t]), s.advantages[t]
        weight, distance = min(p / p_q, cap), abs(p - p_q)
        if kl:
            p, p_q = min(p, 1.0), min(p_q, 1.0)  # these batches hold logprobs above 0
            distance = p_q * math.log(p_q / p)
            if p_q < 1.0:
                distance += (1.0 - p_q) * math.log((1.0 - p_q) / max(1.0 - p, 1e-300))
        pushed_out = (p > p_q and distance > high) if a > 0 else (p < p_q and distance > low)
        return 0.0 if pushed_out else -weight * lp[t] * a

    return loss


def total(
    batch: Sequence[Tokens],
    token_loss: TokenReference,
    *,
    fixed: Sequence[Tokens] | None = None,
    old: bool = False,
    correction: Callable[[Tokens, int], float] = lambda s, t: 1.0,
    kl_beta: float = 0.0,
) -> float:
    """The weighted sum over sampled tokens; `fixed` is what stop-gradients see."""
    result = 0.0
    for s, f in zip(batch, fixed or batch, strict=True):
        anchor = s.old if old else s.q
        for t in s.sampled():
            value = correction(s, t) * token_loss(s, s.lp, f.lp, anchor, t)
            if kl_beta:
                log_r = s.reference[t] - s.lp[t]
                value += kl_beta * (math.exp(log_r) - 1.0 - log_r)
            result += s.weights[t] * value
    return result


def finite_differences(batch: list[Tokens], loss: Callable[[list[Tokens]], float]) -> Floats:
    """d loss / d lp of every token, in order, by central differences."""
    step, gradient = 1e-5, []
    for i, s in enumerate(batch):
        for t in range(len(s.lp)):
            sides = []
            for sign in (1.0, -1.0):
                lp = [x + sign * step * (k == t) for k, x in enumerate(s.lp)]
                sides.append(loss([*batch[:i], replace(s, lp=lp), *batch[i + 1 :]]))
            gradient.append((sides[0] - sides[1]) / (2 * step))
    return gradient


REFERENCES: dict[str, tuple[dict[str, float | None], TokenReference]] = {
    "ppo": ({"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}, ppo(0.8, 1.2)),
    "grpo": ({"clip_low_threshold": 0.7, "clip_high_threshold": 1.3}, ppo(0.7, 1.3)),
    "cispo": ({"clip_low_threshold": 0.5, "clip_high_threshold": 1.5}, cispo(0.5, 1.5)),
    "dapo": (
        {
            "clip_low_threshold": 0.8,
            "clip_high_threshold": 1.28,
            "dual_clip_threshold": 1.6,
        },
        dapo(0.8, 1.28, 1.6),
    ),
    "gspo": ({"clip_low_threshold": 0.95, "clip_high_threshold": 1.05}, gspo(0.95, 1.05)),
    "dro": ({"beta": 0.05}, dro(0.05)),
    "importance_sampling": ({}, importance_sampling),
    "reinforce": ({}, reinforce),
    "geo_mean": (
        {"clip_low_threshold": 0.7, "clip_high_threshold": 1.4},
        geo_mean(0.7, 1.4),
    ),
    "sapo": ({"tau_pos": 1.0, "tau_neg": 1.05}, sapo(1.0, 1.05)),
    "dppo_tv": (
        {
            "divergence_low_threshold": 0.1,
            "divergence_high_threshold": 0.15,
            "ratio_cap": 3.0,
        },
        dppo(0.1, 0.15, 3.0, kl=False),
    ),
    "dppo_kl": (
        {
            "divergence_low_threshold": 0.04,
            "divergence_high_threshold": 0.05,
            "ratio_cap": 3.0,
        },
        dppo(0.04, 0.05, 3.0, kl=True),
    ),
}
"""Loss name to its config and the reference with that config."""


def one_token(lp: float, q: float, advantage: float) -> list[Tokens]:
    return [Tokens([lp], [q], [advantage], [1.0], [True], [q], [q])]


@pytest.mark.parametrize(
    ("token_loss", "ratio", "advantage", "expected"),
    [
        (ppo(0.8, 1.2), 2.0, 1.0, -1.2),
        (ppo(0.8, 1.2), 0.5, 1.0, -0.5),
        (ppo(0.8, 1.2), 2.0, -1.0, 2.0),
        (ppo(0.8, 1.2), 0.5, -1.0, 0.8),
        (dapo(0.8, 1.2, 3.0), 5.0, -1.0, 3.0),
        (dapo(0.8, 1.2, 3.0), 2.0, -1.0, 2.0),
        (dapo(0.8, 1.2, 3.0), 5.0, 1.0, -1.2),
        (cispo(0.0, 4.0), 5.0, 1.0, 8.0),
        (cispo(0.0, 4.0), 5.0, -1.0, -8.0),
        (dro(2.0), math.e, 1.0, 3.0),
        (importance_sampling, 5.0, 2.0, -10.0),
        (reinforce, 5.0, 2.0, 4.0),
        (gspo(0.9, 1.1), 2.0, 1.0, -1.1),
        (geo_mean(0.9, 1.1), 2.0, 1.0, -1.1),
        (geo_mean(0.9, 1.1), 0.5, 1.0, -0.5),
        (sapo(1.0, 2.0), 1.0, 1.0, -2.0),
        (sapo(1.0, 2.0), 1.0, -1.0, 1.0),
        # From e^-2 / 2 = 0.068 to e^-2 = 0.135.
        (dppo(0.1, 0.1, 9.0, kl=False), 2.0, 1.0, 4.0),
        (dppo(0.1, 0.05, 9.0, kl=False), 2.0, 1.0, 0.0),
        (dppo(0.1, 0.05, 9.0, kl=False), 2.0, -1.0, -4.0),
        (dppo(0.1, 0.1, 1.5, kl=False), 2.0, 1.0, 3.0),
    ],
)
def test_the_references_give_the_values_worked_out_by_hand(
    token_loss: TokenReference, ratio: float, advantage: float, expected: float
) -> None:
    batch = one_token(-2.0, -2.0 - math.log(ratio), advantage)
    assert total(batch, token_loss) == pytest.approx(expected, rel=1e-12)
