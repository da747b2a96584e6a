"""Checks of logprobs.

Whether tokens come as often as their logprobs say: a G-test of goodness of fit, made valid for a
distribution that is told only where it was sampled. The first third of a prompt's draws tells which
tokens there are and their probabilities; the rest is counted in those cells, and in one more for
everything else, whose probability is what is left. Cells are fixed before the counted draws are
looked at, so under truthful logprobs the counts are multinomial. The p-value is that of a Monte
Carlo test (Barnard 1963; Davison and Hinkley, "Bootstrap Methods", 4.2): exact at its level for any
counts, with no large-sample approximation.

Of which kind a server's logprobs are, with the exact setting.

How far the trainer's policy is from the one that sampled, on the same weights: with
r = trainer / sampler per token, k1 = -log r and k3 = r - 1 - log r, both unbiased estimates of
KL(sampler || trainer) (Schulman, "Approximating KL Divergence", 2020), and Kish's effective sample
fraction (sum r)^2 / (n sum r^2). Noise of standard deviation s in log r gives k3 = s^2 / 2 and a
fraction of exp(-s^2): the bars below are those of s = 0.06 and s = 0.17. Torch is imported where
there are weights at hand, and not before; all else is pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eval_protocol_rft import sampling, training
from eval_protocol_rft.doctor import _findings as findings
from eval_protocol_rft.doctor._findings import Finding, Verdict, skipped
from eval_protocol_rft.local import Placement, load_model
from eval_protocol_rft.sampling import (
    Completion,
    FirstTokens,
    LogprobsMode,
    RefusedError,
    TokenIds,
)

FREQUENCY = "token frequency"
SIMULATIONS = 20_000
"""The smallest p-value is one in so many."""
EXCESS = 1e-2
"""By so much may probabilities told for different tokens of one prompt sum to more than 1:
half-precision noise."""
_SMALLEST_EXPECTED = 1.0
"""Cells that expect fewer counts are put together with the rest: they would only add noise."""
_FLOOR = 1e-12


@dataclass(frozen=True, slots=True)
class FrequencyMeasured:
    """Over all prompts together."""

    p_value: float
    draws: int
    """Those counted, without the first thirds."""
    cells: int
    """Besides one per prompt for the rest."""
    elsewhere: float
    """Draws expected to be of another token than their prompt's likeliest one."""
    mass: float
    """Largest sum of the probabilities told for the different tokens of one prompt."""


def measure_frequency(
    prompts: Sequence[FirstTokens], *, seed: int, simulations: int = SIMULATIONS
) -> FrequencyMeasured:
    """Test all prompts at once. `seed` is the simulation's: the same draws, the same p-value."""
    cells = [_cells(prompt) for prompt in prompts if len(prompt.token_ids)]
    rng = np.random.default_rng(seed)
    observed = 0.0
    simulated = np.zeros(simulations)
    for counts, probabilities in cells:
        n = int(counts.sum())
        observed += float(_g(counts, probabilities * n))
        if len(counts) > 1:
            draws = rng.multinomial(n, probabilities, size=simulations)
            simulated += _g(draws, probabilities * n)
    # The noise of summing in another order must not make an equal statistic a smaller one.
    as_large = int((simulated >= observed - 1e-9).sum())
    return FrequencyMeasured(
        p_value=(1 + as_large) / (simulations + 1),
        draws=sum(int(counts.sum()) for counts, _ in cells),
        cells=sum(len(counts) - 1 for counts, _ in cells),
        elsewhere=sum(
            float(counts.sum() * (1.0 - probabilities.max())) for counts, probabilities in cells
        ),
        mass=max(float(np.exp(list(prompt.by_id().values())).sum()) for prompt in prompts),
    )


def _cells(prompt: FirstTokens) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """[K] counts and [K] probabilities of one prompt's cells, the rest last."""
    split = len(prompt.token_ids) // 3
    logprobs = FirstTokens(prompt.token_ids[:split], prompt.logprobs[:split]).by_id()
    draws = prompt.token_ids[split:]
    cells = {t: p for t, p in logprobs.items() if np.exp(p) * len(draws) >= _SMALLEST_EXPECTED}
    counts = [int((draws == token).sum()) for token in cells]
    named = np.minimum(np.exp(list(cells.values())), 1.0)
    left = max(_FLOOR, 1.0 - float(named.sum()))
    probabilities = np.array([*named, left])
    return np.array([*counts, len(draws) - sum(counts)], np.int64), probabilities / (
        probabilities.sum()
    )


def _g(counts: NDArray[np.int64], expected: NDArray[np.float64]) -> NDArray[np.float64]:
    """2 sum O log(O / E) over the last axis, where 0 log 0 is 0."""
    ratio = np.where(counts > 0, counts / expected, 1.0)
    total: NDArray[np.float64] = 2.0 * (counts * np.log(ratio)).sum(axis=-1)
    return total


def frequency_finding(measured: FrequencyMeasured, *, temperature: float) -> Finding:
    """The verdict on the test, and on probabilities that sum to more than 1."""
    numbers = {
        "p_value": measured.p_value,
        "draws": measured.draws,
        "cells": measured.cells,
        "mass": measured.mass,
        "temperature": temperature,
    }
    advice = (
        "Tokens are not drawn with the probabilities that are told. Check for top_p, top_k, min_p "
        "or penalties of the server's own (vLLM: --generation-config vllm), for speculative "
        "decoding, and for weights or seeds that change under the run."
    )
    if measured.mass > 1.0 + EXCESS:
        return Finding(
            name=FREQUENCY,
            verdict="fail",
            measured=f"probabilities of different tokens of one prompt sum to {measured.mass:.3g}",
            bar="at most 1",
            advice=f"The logprobs are too high. {advice}",
            numbers=numbers,
        )
    if not measured.draws:
        return skipped(FREQUENCY, "no completion came back")
    finding = findings.p_value_finding(
        FREQUENCY,
        measured.p_value,
        measured=f"p = {measured.p_value:.2g} (G-test, {measured.draws} draws in "
        f"{measured.cells} cells, temperature {temperature:g})",
        advice=advice,
        numbers=numbers,
    )
    if measured.elsewhere < 1.0 and finding.verdict == "pass":
        return skipped(
            FREQUENCY,
            "the first tokens are certain",
            "Nothing could be tested: try a higher --temperature.",
        )
    return finding


KIND = "logprob kind"


def kind_finding(
    measured: sampling.KindMeasured,
    *,
    named: bool,
    named_mode: LogprobsMode | None,
    temperature: float,
) -> Finding:
    """The verdict, and the exact setting.

    Args:
        named: the server sends a logprob that it calls the one of sampling.
        named_mode: what the user says of the server.
        temperature: the one to train at.
    """
    naming = "named as such" if named else "unnamed"
    errors = (
        f"{measured.tokens} tokens at temperatures 1 and {sampling.LOWER_TEMPERATURE:g} differ "
        f"from sampling logprobs by {measured.sampling_error:.2g} nats, from raw ones by "
        f"{measured.raw_error:.2g}"
    )
    numbers = {"tokens": float(measured.tokens)}
    if measured.tokens:
        numbers |= {"sampling_error": measured.sampling_error, "raw_error": measured.raw_error}
    verdict, advice = _kind_verdict(
        measured.kind, named=named, named_mode=named_mode, temperature=temperature
    )
    if verdict == "skipped":
        return skipped(KIND, f"first tokens are too certain to tell; {naming}", advice)
    return Finding(
        name=KIND,
        verdict=verdict,
        measured=f"{measured.kind}, {naming}: {errors}",
        bar=f"sampling within {sampling.TOLERANCE:g} nats, or raw at temperature 1",
        advice=advice,
        numbers=numbers,
    )


_SAY_PROCESSED = (
    '--logprobs-mode processed_logprobs (completion_params: "logprobs_mode": "processed_logprobs")'
)
_START_PROCESSED = (
    f"start it as `vllm serve MODEL --logprobs-mode processed_logprobs` and pass {_SAY_PROCESSED}"
)


def _kind_verdict(
    kind: str, *, named: bool, named_mode: LogprobsMode | None, temperature: float
) -> tuple[Verdict, str]:
    at_one = temperature == 1.0
    if kind == "neither":
        return "fail", (
            "They belong to neither distribution: does the server cut or reshape it (top_p, top_k, "
            "penalties of its own), or serve replicas of different weights? Importance ratios made "
            "of them would be wrong."
        )
    if kind == "unknown":
        if at_one or named:
            return "skipped", "At temperature 1 the two are equal." if at_one else ""
        return "warn", f"They may be raw: sample at temperature 1, or {_START_PROCESSED}."
    if kind == "sampling":
        if named_mode == "raw_logprobs":
            return "fail", f"raw_logprobs is wrong of this server: pass {_SAY_PROCESSED}."
        if named or named_mode == "processed_logprobs":
            return "pass", ""
        return ("pass" if at_one else "warn"), f"For any temperature but 1 pass {_SAY_PROCESSED}."
    if named:
        return "fail", (
            "The server calls them the logprobs of sampling, but the temperature is not in them. "
            "Sample at temperature 1, where the two are equal."
        )
    if named_mode == "processed_logprobs":
        return "fail", (
            "--logprobs-mode processed_logprobs is wrong of this server: leave it out and sample "
            f"at temperature 1, or {_START_PROCESSED}."
        )
    if at_one:
        return "pass", f"Right at temperature 1. For any other {_START_PROCESSED}."
    return "fail", f"Sample at temperature 1, or {_START_PROCESSED}."


K1, K3, LARGEST, SAMPLE_SIZE = (
    "trainer: mean k1",
    "trainer: mean k3",
    "trainer: max |dlogp|",
    "trainer: effective sample",
)

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

Pairs = Sequence[tuple[training.FloatArray, training.FloatArray]]
"""(sampler, trainer) logprobs of sampled tokens, nats."""


def trainer_checks(
    weights: str | Path | None,
    samples: Sequence[tuple[TokenIds, Completion]],
    *,
    temperature: float,
    placement: Placement | None = None,
    trust_remote_code: bool = False,
) -> list[Finding]:
    """Compare the sampler's logprobs with those under the weights in a folder. Blocks.

    Args:
        weights: what a trainer would load; None: nothing is known of it.
        samples: prompts, and what was sampled behind them.
        temperature: of both sides.
        placement: of the weights; by default as `LocalSampler` places a model.
        trust_remote_code: let the folder run its own code.
    """
    if weights is None:
        advice = "Give the folder that the server loaded: --weights FOLDER."
        return _skipped("no weights at hand", advice)
    try:
        import torch  # noqa: F401 - whether it is there
    except ImportError:
        return _skipped("torch is missing", "pip install 'eval-protocol-rft[local]'")
    try:
        model: Any = load_model(weights, placement=placement, trust_remote_code=trust_remote_code)
    except RefusedError as error:
        return _skipped(str(error), _OTHER_WEIGHTS)
    size = model.get_input_embeddings().num_embeddings
    for prompt, completion in samples:
        highest = max(*prompt, *completion.token_ids)
        if highest >= size:
            return _skipped(
                f"id {highest} is outside the vocabulary of {str(weights)!r} ({size} ids): these "
                "are weights of another model",
                _OTHER_WEIGHTS,
            )
    return trainer_findings(_pairs(model, samples, temperature), temperature=temperature)


def trainer_findings(pairs: Pairs, *, temperature: float) -> list[Finding]:
    """Judge how far trainer and sampler are apart."""
    difference = training.measure(pairs)
    if difference is None:
        return _skipped("no tokens were sampled")
    log_ratio = np.concatenate([trainer - sampler for sampler, trainer in pairs])
    scaled = np.exp(log_ratio.astype(np.float64) - log_ratio.max())
    fraction = float(scaled.mean() ** 2 / np.square(scaled).mean())

    def finding(
        name: str, value: float, shown: str, bars: tuple[float, float], bar: str
    ) -> Finding:
        verdict = findings.verdict_on(value, warn_above=bars[0], fail_above=bars[1])
        return Finding(
            name=name,
            verdict=verdict,
            measured=shown,
            bar=bar,
            advice="" if verdict == "pass" else _ADVICE,
            numbers={"value": value, "tokens": difference.tokens},
        )

    k1, k3, largest = difference.k1, difference.k3, difference.max_difference
    k3_warn, k3_fail = training.WARN_K3, training.FAIL_K3
    return [
        finding(
            K1, abs(k1),
            f"{k1:.2g} nats ({difference.tokens} tokens, temperature {temperature:g})",
            (K1_WARN, K1_FAIL), f"|k1| up to {K1_WARN:g}; fails above {K1_FAIL:g}",
        ),
        finding(
            K3, k3, f"{k3:.2g} nats", (k3_warn, k3_fail),
            f"up to {k3_warn:g}; fails above {k3_fail:g}",
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


def _skipped(why: str, advice: str = "") -> list[Finding]:
    """One finding for all four."""
    return [skipped("sampler against trainer", why, advice)]


def _pairs(model: Any, samples: Sequence[tuple[TokenIds, Completion]], temperature: float) -> Pairs:
    """Of each sample, by a teacher-forced forward: the one that a training step makes."""
    import torch

    from eval_protocol_rft.training.losses import token_logprobs

    datums = training.comparable([training.unscored(*sample) for sample in samples])
    logprobs: list[training.FloatArray] = []
    model.train(False)
    with torch.no_grad():
        for start in range(0, len(datums), _AT_ONCE):
            part = datums[start : start + _AT_ONCE]
            values = token_logprobs(model, part, temperature=temperature).logprobs
            logprobs += [value.cpu().numpy() for value in values]
    return training.sampled_pairs(datums, logprobs, {0})
