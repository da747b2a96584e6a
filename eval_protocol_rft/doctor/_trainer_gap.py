"""How far the trainer's policy is from the one that sampled, on the same weights. Pure.

With r = trainer / sampler per token: k1 = -log r and k3 = r - 1 - log r, both unbiased estimates of
KL(sampler || trainer) (Schulman, "Approximating KL Divergence", 2020), and Kish's effective sample
fraction (sum r)^2 / (n sum r^2). Noise of standard deviation s in log r gives k3 = s^2 / 2 and a
fraction of exp(-s^2): the bars below are those of s = 0.06 and s = 0.17.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from eval_protocol_rft.doctor._findings import Finding, graded, skipped

K1, K3, LARGEST, SAMPLE_SIZE = (
    "trainer: mean k1",
    "trainer: mean k3",
    "trainer: max |dlogp|",
    "trainer: effective sample",
)
TRAINER_CHECKS = (K1, K3, LARGEST, SAMPLE_SIZE)

K3_WARN, K3_FAIL = 2e-3, 1.5e-2
K1_WARN, K1_FAIL = 1e-2, 5e-2
LARGEST_WARN, LARGEST_FAIL = 0.5, 3.0
"""Nats, of one token: half precision reaches 0.05, a rare token more; a wrong template or wrong
weights reach tens."""
LOSS_WARN, LOSS_FAIL = 0.05, 0.2
"""Share of the sample that the weights cost."""

_ADVICE = (
    "Trainer and sampler compute different policies. Check, in this order: the same weights and "
    "the same temperature on both sides; float32 logits and lm_head on the server (vLLM: --dtype "
    "float32, or bfloat16 on both); no quantised weights or KV cache. What is left correct with "
    "truncated importance sampling."
)


def trainer_findings(log_ratio: NDArray[np.float64], *, temperature: float) -> list[Finding]:
    """Judge [n] log ratios of sampled tokens, trainer minus sampler, in nats."""
    if not len(log_ratio):
        return trainer_skipped("no tokens were sampled")
    ratio = np.exp(np.minimum(log_ratio, 50.0))
    k1 = float(-log_ratio.mean())
    k3 = float((np.expm1(np.minimum(log_ratio, 50.0)) - log_ratio).mean())
    largest = float(np.abs(log_ratio).max())
    scaled = ratio / ratio.max()
    fraction = float(scaled.mean() ** 2 / np.square(scaled).mean())
    tokens = f"{len(log_ratio)} tokens, temperature {temperature:g}"

    def finding(
        name: str, value: float, shown: str, bars: tuple[float, float], bar: str
    ) -> Finding:
        verdict = graded(value, warn_above=bars[0], fail_above=bars[1])
        return Finding(
            name=name,
            verdict=verdict,
            measured=shown,
            bar=bar,
            advice="" if verdict == "pass" else _ADVICE,
            numbers={"value": value, "tokens": len(log_ratio)},
        )

    return [
        finding(
            K1, abs(k1), f"{k1:.2g} nats ({tokens})", (K1_WARN, K1_FAIL),
            f"|k1| up to {K1_WARN:g}; fails above {K1_FAIL:g}",
        ),
        finding(
            K3, k3, f"{k3:.2g} nats", (K3_WARN, K3_FAIL),
            f"up to {K3_WARN:g}; fails above {K3_FAIL:g}",
        ),
        finding(
            LARGEST, largest, f"{largest:.2g} nats", (LARGEST_WARN, LARGEST_FAIL),
            f"up to {LARGEST_WARN:g}; fails above {LARGEST_FAIL:g}",
        ),
        finding(
            SAMPLE_SIZE, 1.0 - fraction, f"{fraction:.4%} of the tokens", (LOSS_WARN, LOSS_FAIL),
            f"at least {1 - LOSS_WARN:.0%}; fails below {1 - LOSS_FAIL:.0%}",
        ),
    ]  # fmt: skip


def trainer_skipped(why: str, advice: str = "") -> list[Finding]:
    """One finding for all four."""
    return [skipped("sampler against trainer", why, advice)]


def log_ratios(
    trainer: Sequence[Sequence[float]], sampler: Sequence[Sequence[float]]
) -> NDArray[np.float64]:
    """[n] trainer minus sampler, in one array."""
    pairs = zip(trainer, sampler, strict=True)
    parts = [np.asarray(t, np.float64) - np.asarray(s, np.float64) for t, s in pairs]
    return np.concatenate(parts) if parts else np.empty(0)
