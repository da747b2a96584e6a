"""Which logprobs a server tells: raw ones, or those of sampling. Pure.

First tokens of one prompt are sampled at temperature 1 and at a lower one. For a token i with
logprob l_i at temperature 1, the other one tells

    raw:       l_i
    sampling:  l_i / T - log Z,   Z = sum over all tokens of exp(l / T)

Z is bounded by the tokens seen: at least their own sum, at most that plus r^(1/T), where r is the
probability that is left for the unseen ones (a sum of powers above 1 is largest in one token). In
the difference of two tokens Z cancels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from eval_protocol_rft.doctor.findings import Finding, skipped
from eval_protocol_rft.sampling.types import LogprobsMode

Kind = Literal["sampling", "raw", "neither", "unknown"]

KIND = "logprob kind"
LOWER_TEMPERATURE = 0.5
TOLERANCE = 0.05
"""Mean nats: half-precision servers differ from themselves by up to as much."""
SEPARATION = 0.15
"""Mean nats by which the two must differ before anything is said."""


@dataclass(frozen=True, slots=True)
class FirstTokens:
    """First tokens sampled for one prompt. N draws."""

    token_ids: NDArray[np.int64]
    """[N]"""
    logprobs: NDArray[np.float64]
    """[N] nats, as told."""

    def by_id(self) -> dict[int, float]:
        """Mean logprob of each id seen."""
        return {
            int(token): float(self.logprobs[self.token_ids == token].mean())
            for token in np.unique(self.token_ids)
        }


@dataclass(frozen=True, slots=True)
class KindMeasured:
    """How well each hypothesis fits."""

    kind: Kind
    sampling_error: float
    """Mean nats over tokens seen at both temperatures; NaN where there is none."""
    raw_error: float
    tokens: int


def measure_kind(
    at_one: Sequence[FirstTokens], lower: Sequence[FirstTokens], *, temperature: float
) -> KindMeasured:
    """Compare first tokens of the same prompts at temperature 1 and at `temperature` (below 1)."""
    parts = [
        _residuals(one.by_id(), other.by_id(), temperature)
        for one, other in zip(at_one, lower, strict=True)
    ]
    sampling, raw, apart = (
        np.concatenate(values) if parts else np.empty(0) for values in zip(*parts, strict=True)
    )
    kind: Kind
    errors = (_mean(sampling), _mean(raw))
    if not len(apart):
        kind = "unknown"
    elif _mean(apart) < SEPARATION:
        kind = "neither" if min(errors) > SEPARATION else "unknown"
    elif errors[0] <= TOLERANCE:
        kind = "sampling"
    else:
        kind = "raw" if errors[1] <= TOLERANCE else "neither"
    return KindMeasured(kind, *errors, tokens=len(apart))


def _residuals(
    known: Mapping[int, float], told: Mapping[int, float], temperature: float
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Of one prompt's tokens seen at both temperatures: how far they are from sampling logprobs
    at least, how far from raw ones, and how far raw ones would be from sampling ones at least."""
    common = sorted(known.keys() & told.keys())
    if not common:
        return np.empty(0), np.empty(0), np.empty(0)
    at_one = np.array([known[token] for token in common])
    lower = np.array([told[token] for token in common])
    bounds = _log_z(known, temperature)
    return (
        _from_sampling(at_one, lower, bounds, temperature),
        np.abs(lower - at_one),
        _from_sampling(at_one, at_one, bounds, temperature),
    )


def _from_sampling(
    at_one: NDArray[np.float64],
    told: NDArray[np.float64],
    log_z: tuple[float, float],
    temperature: float,
) -> NDArray[np.float64]:
    """The larger of two distances that are 0 for sampling logprobs: of the values from the bounds
    that Z sets, and of their differences from each other, in which Z cancels."""
    scaled = at_one / temperature
    bounded = np.maximum(scaled - log_z[1] - told, told - (scaled - log_z[0]))
    differences = np.abs((told - told.mean()) - (scaled - scaled.mean()))
    distance: NDArray[np.float64] = np.maximum(np.maximum(bounded, differences), 0.0)
    return distance


def _mean(values: NDArray[np.float64]) -> float:
    return float(values.mean()) if len(values) else math.nan


def _log_z(known: Mapping[int, float], temperature: float) -> tuple[float, float]:
    """Bounds of log Z."""
    seen = np.array(list(known.values()))
    power = 1.0 / temperature
    total = float(np.exp(seen * power).sum())
    left = max(0.0, 1.0 - float(np.exp(seen).sum()))
    return math.log(total), math.log(total + left**power)


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
