"""Whether tokens come as often as their logprobs say. Pure.

A G-test of goodness of fit, made valid for a distribution that is told only where it was sampled.
The first third of a prompt's draws tells which tokens there are and their probabilities; the rest
is counted in those cells, and in one more for everything else, whose probability is what is left.
Cells are fixed before the counted draws are looked at, so under truthful logprobs the counts are
multinomial. The p-value is that of a Monte Carlo test (Barnard 1963; Davison and Hinkley,
"Bootstrap Methods", 4.2): exact at its level for any counts, with no large-sample approximation.

What `doctor` says of the kind of a server's logprobs, with the exact setting. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from eval_protocol_rft.doctor._findings import P_VALUE_BAR, Finding, p_value_verdict, skipped
from eval_protocol_rft.sampling import (
    LOWER_TEMPERATURE,
    TOLERANCE,
    FirstTokens,
    KindMeasured,
    LogprobsMode,
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


@dataclass(frozen=True, slots=True)
class _Counted:
    """Counts of one prompt, [K] each, the rest last."""

    counts: NDArray[np.int64]
    probabilities: NDArray[np.float64]


def measure_frequency(
    prompts: Sequence[FirstTokens], *, seed: int, simulations: int = SIMULATIONS
) -> FrequencyMeasured:
    """Test all prompts at once. `seed` is the simulation's: the same draws, the same p-value."""
    counted = [_counted(prompt) for prompt in prompts if len(prompt.token_ids)]
    rng = np.random.default_rng(seed)
    observed = 0.0
    simulated = np.zeros(simulations)
    for cell in counted:
        n = int(cell.counts.sum())
        observed += float(_g(cell.counts, cell.probabilities * n))
        if len(cell.counts) > 1:
            draws = rng.multinomial(n, cell.probabilities, size=simulations)
            simulated += _g(draws, cell.probabilities * n)
    # The noise of summing in another order must not make an equal statistic a smaller one.
    as_large = int((simulated >= observed - 1e-9).sum())
    return FrequencyMeasured(
        p_value=(1 + as_large) / (simulations + 1),
        draws=sum(int(cell.counts.sum()) for cell in counted),
        cells=sum(len(cell.counts) - 1 for cell in counted),
        elsewhere=sum(
            float(cell.counts.sum() * (1.0 - cell.probabilities.max())) for cell in counted
        ),
        mass=max(float(np.exp(list(prompt.by_id().values())).sum()) for prompt in prompts),
    )


def _counted(prompt: FirstTokens) -> _Counted:
    split = len(prompt.token_ids) // 3
    known = FirstTokens(prompt.token_ids[:split], prompt.logprobs[:split]).by_id()
    rest = prompt.token_ids[split:]
    cells = {t: p for t, p in known.items() if np.exp(p) * len(rest) >= _SMALLEST_EXPECTED}
    counts = [int((rest == token).sum()) for token in cells]
    told = np.minimum(np.exp(list(cells.values())), 1.0)
    left = max(_FLOOR, 1.0 - float(told.sum()))
    probabilities = np.array([*told, left])
    return _Counted(
        counts=np.array([*counts, len(rest) - sum(counts)], np.int64),
        probabilities=probabilities / probabilities.sum(),
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
    verdict = p_value_verdict(measured.p_value)
    if measured.elsewhere < 1.0 and verdict == "pass":
        return skipped(
            FREQUENCY,
            "the first tokens are certain",
            "Nothing could be tested: try a higher --temperature.",
        )
    return Finding(
        name=FREQUENCY,
        verdict=verdict,
        measured=f"p = {measured.p_value:.2g} (G-test, {measured.draws} draws in "
        f"{measured.cells} cells, temperature {temperature:g})",
        bar=P_VALUE_BAR,
        advice="" if verdict == "pass" else advice,
        numbers=numbers,
    )


KIND = "logprob kind"


def kind_finding(
    measured: KindMeasured, *, named: bool, told: LogprobsMode | None, temperature: float
) -> Finding:
    """The verdict, and the exact setting.

    Args:
        named: the server sends a logprob that it calls the one of sampling.
        told: what the user said of the server.
        temperature: the one to train at.
    """
    told_by = "named as such" if named else "unnamed"
    errors = (
        f"{measured.tokens} tokens at temperatures 1 and {LOWER_TEMPERATURE:g} differ from "
        f"sampling logprobs by {measured.sampling_error:.2g} nats, from raw ones by "
        f"{measured.raw_error:.2g}"
    )
    numbers = {"tokens": float(measured.tokens)}
    if measured.tokens:
        numbers |= {"sampling_error": measured.sampling_error, "raw_error": measured.raw_error}
    verdict, advice = _judged(measured.kind, named=named, told=told, temperature=temperature)
    if verdict == "skipped":
        return skipped(KIND, f"first tokens are too certain to tell; {told_by}", advice)
    return Finding(
        name=KIND,
        verdict=verdict,
        measured=f"{measured.kind}, {told_by}: {errors}",
        bar=f"sampling within {TOLERANCE:g} nats, or raw at temperature 1",
        advice=advice,
        numbers=numbers,
    )


_SAY_PROCESSED = (
    '--logprobs-mode processed_logprobs (completion_params: "logprobs_mode": "processed_logprobs")'
)
_START_PROCESSED = (
    f"start it as `vllm serve MODEL --logprobs-mode processed_logprobs` and pass {_SAY_PROCESSED}"
)


def _judged(
    kind: str, *, named: bool, told: LogprobsMode | None, temperature: float
) -> tuple[Literal["pass", "warn", "fail", "skipped"], str]:
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
        return (
            "warn",
            f"They may be raw: sample at temperature 1, or {_START_PROCESSED}.",
        )
    if kind == "sampling":
        if told == "raw_logprobs":
            return (
                "fail",
                f"raw_logprobs is wrong of this server: pass {_SAY_PROCESSED}.",
            )
        if named or told == "processed_logprobs":
            return "pass", ""
        return ("pass" if at_one else "warn"), f"For any temperature but 1 pass {_SAY_PROCESSED}."
    if named:
        return "fail", (
            "The server calls them the logprobs of sampling, but the temperature is not in them. "
            "Sample at temperature 1, where the two are equal."
        )
    if told == "processed_logprobs":
        return "fail", (
            "--logprobs-mode processed_logprobs is wrong of this server: leave it out and sample "
            f"at temperature 1, or {_START_PROCESSED}."
        )
    if at_one:
        return (
            "pass",
            f"Right at temperature 1. For any other {_START_PROCESSED}.",
        )
    return "fail", f"Sample at temperature 1, or {_START_PROCESSED}."
