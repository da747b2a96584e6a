"""How far the trainer's policy is from the one that sampled, on the same weights.

With r = trainer / sampler per token: k1 = -log r and k3 = r - 1 - log r, both unbiased estimates of
KL(sampler || trainer) (Schulman, "Approximating KL Divergence", 2020), and Kish's effective sample
fraction (sum r)^2 / (n sum r^2). Noise of standard deviation s in log r gives k3 = s^2 / 2 and a
fraction of exp(-s^2): the bars below are those of s = 0.06 and s = 0.17.

Torch is imported where there are weights at hand, and not before.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from eval_protocol_rft.doctor._findings import Finding, skipped, verdict_on
from eval_protocol_rft.sampling import Completion, TokenIds
from eval_protocol_rft.training import TrainingDatum

if TYPE_CHECKING:
    from transformers import PreTrainedModel

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

_AT_ONCE = 8
"""Sequences per forward."""

_ADVICE = (
    "Trainer and sampler compute different policies. Check, in this order: the same weights and "
    "the same temperature on both sides; float32 logits and lm_head on the server (vLLM: --dtype "
    "float32, or bfloat16 on both); no quantised weights or KV cache. What is left correct with "
    "truncated importance sampling."
)
_OTHER_WEIGHTS = "Name a folder of the sampled model's weights."


def trainer_checks(
    weights: str | Path | None,
    samples: Sequence[tuple[TokenIds, Completion]],
    *,
    temperature: float,
    trust_remote_code: bool = False,
) -> list[Finding]:
    """Compare the sampler's logprobs with those under the weights in a folder, in float32. Blocks.

    Args:
        weights: what a trainer would load; None: nothing is known of it.
        samples: prompts, and what was sampled behind them.
        temperature: of both sides.
        trust_remote_code: let the folder run its own code.
    """
    if weights is None:
        advice = "Give the folder that the server loaded: --weights FOLDER."
        return _skipped("no weights at hand", advice)
    try:
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging
    except ImportError:
        return _skipped("torch is missing", "pip install 'eval-protocol-rft[local]'")
    bars: Any = logging  # untyped
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            weights, dtype=torch.float32, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError) as error:
        return _skipped(f"cannot load {str(weights)!r}: {error}", _OTHER_WEIGHTS)
    finally:
        if shown:
            bars.enable_progress_bar()
    size = model.get_input_embeddings().num_embeddings
    for prompt, completion in samples:
        highest = max(*prompt, *completion.token_ids)
        if highest >= size:
            return _skipped(
                f"id {highest} is outside the vocabulary of {str(weights)!r} ({size} ids): these "
                "are weights of another model",
                _OTHER_WEIGHTS,
            )
    trainer = _trainer_logprobs(model, samples, temperature)
    ratios = log_ratios(trainer, [completion.logprobs for _, completion in samples])
    return trainer_findings(ratios, temperature=temperature)


def trainer_findings(log_ratio: NDArray[np.float64], *, temperature: float) -> list[Finding]:
    """Judge [n] log ratios of sampled tokens, trainer minus sampler, in nats."""
    if not len(log_ratio):
        return _skipped("no tokens were sampled")
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
        verdict = verdict_on(value, warn_above=bars[0], fail_above=bars[1])
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


def log_ratios(
    trainer: Sequence[Sequence[float]], sampler: Sequence[Sequence[float]]
) -> NDArray[np.float64]:
    """[n] trainer minus sampler, in one array."""
    pairs = zip(trainer, sampler, strict=True)
    parts = [np.asarray(t, np.float64) - np.asarray(s, np.float64) for t, s in pairs]
    return np.concatenate(parts) if parts else np.empty(0)


def _skipped(why: str, advice: str = "") -> list[Finding]:
    """One finding for all four."""
    return [skipped("sampler against trainer", why, advice)]


def _trainer_logprobs(
    model: PreTrainedModel, samples: Sequence[tuple[TokenIds, Completion]], temperature: float
) -> list[list[float]]:
    """[T_i] logprobs (nats) of each sample's completion, by a teacher-forced forward: the one that
    a training step makes."""
    import torch

    from eval_protocol_rft.training.losses import token_logprobs

    model.train(False)
    by_sample: list[list[float]] = []
    with torch.no_grad():
        for start in range(0, len(samples), _AT_ONCE):
            datums = [_datum(*sample) for sample in samples[start : start + _AT_ONCE]]
            logprobs = token_logprobs(model, datums, temperature=temperature).logprobs
            for datum, values in zip(datums, logprobs, strict=True):
                by_sample.append(values[datum.prompt_length - 1 :].tolist())
    return by_sample


def _datum(prompt: TokenIds, completion: Completion) -> TrainingDatum:
    tokens = np.array([*prompt, *completion.token_ids], np.int64)
    weights = np.zeros(len(tokens) - 1, np.float32)
    weights[len(prompt) - 1 :] = 1.0
    logprobs = np.zeros_like(weights)
    logprobs[len(prompt) - 1 :] = completion.logprobs
    return TrainingDatum(
        input_tokens=tokens[:-1],
        target_tokens=tokens[1:],
        logprobs=logprobs,
        advantages=np.zeros_like(weights),
        weights=weights,
        prompt_length=len(prompt),
        reward=0.0,
        truncated=completion.truncated,
        group=0,
        row_id=None,
        completion=0,
    )
