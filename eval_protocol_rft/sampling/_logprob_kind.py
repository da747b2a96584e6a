"""Which logprobs a server tells: raw ones, or those of sampling; and a check of what the user says.

First tokens of one prompt are sampled at temperature 1 and at a lower one. For a token i with
logprob l_i at temperature 1, the other one tells

    raw:       l_i
    sampling:  l_i / T - log Z,   Z = sum over all tokens of exp(l / T)

Z is bounded by the tokens seen: at least their own sum, at most that plus r^(1/T), where r is the
probability that is left for the unseen ones (a sum of powers above 1 is largest in one token). In
the difference of two tokens Z cancels.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from eval_protocol_rft.sampling import _types
from eval_protocol_rft.sampling._exactness import plain, reshaped_by
from eval_protocol_rft.sampling._fanout import sample_group
from eval_protocol_rft.sampling._limiter import RunLimiter
from eval_protocol_rft.sampling._limits import RunStoppedError
from eval_protocol_rft.sampling._retry import RetryPolicy
from eval_protocol_rft.sampling._types import Failure, SamplingError, SamplingParams, TokenIds

Kind = Literal["sampling", "raw", "neither", "unknown"]

LOWER_TEMPERATURE = 0.5
TOLERANCE = 0.05
"""Mean nats: half-precision servers differ from themselves by up to as much."""
SEPARATION = 0.15
"""Mean nats by which the two must differ before anything is said."""
PROBE_TEXTS = (
    "51+29=",
    "Name an animal, any animal. Answer with one word:",
    "Pick a number between 1 and 100:",
    "The",
)
"""Likely to go on in several ways. No chat template around them: it may open with a token that is
certain (`<think>`), and whose logprob is 0 whatever is told."""
PROBE_DRAWS = 16
"""First tokens of a text, at each temperature."""
_UNSEEN = (
    "whether the server of %s tells the logprobs of sampling, as logprobs_mode says, could not be "
    "seen%s; `ep-rft doctor` looks closer"
)
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class FirstTokens:
    """First tokens sampled for one prompt. N draws."""

    token_ids: NDArray[np.int64]
    """[N]"""
    logprobs: NDArray[np.float64]
    """[N] nats, as the server tells them."""

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
    known: Mapping[int, float], cooler: Mapping[int, float], temperature: float
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Of one prompt's tokens seen at both temperatures: how far they are from sampling logprobs
    at least, how far from raw ones, and how far raw ones would be from sampling ones at least."""
    common = sorted(known.keys() & cooler.keys())
    if not common:
        return np.empty(0), np.empty(0), np.empty(0)
    at_one = np.array([known[token] for token in common])
    lower = np.array([cooler[token] for token in common])
    bounds = _log_z(known, temperature)
    return (
        _from_sampling(at_one, lower, bounds, temperature),
        np.abs(lower - at_one),
        _from_sampling(at_one, at_one, bounds, temperature),
    )


def _from_sampling(
    at_one: NDArray[np.float64],
    values: NDArray[np.float64],
    log_z: tuple[float, float],
    temperature: float,
) -> NDArray[np.float64]:
    """The larger of two distances that are 0 for sampling logprobs: of the values from the bounds
    that Z sets, and of their differences from each other, in which Z cancels."""
    scaled = at_one / temperature
    bounded = np.maximum(scaled - log_z[1] - values, values - (scaled - log_z[0]))
    differences = np.abs((values - values.mean()) - (scaled - scaled.mean()))
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


def needs_check(params: SamplingParams) -> bool:
    """Whether sampling logprobs would be wrong if what the user says of the server were."""
    claimed = params.logprobs_mode == "processed_logprobs"
    return claimed and params.temperature > 0 and bool(reshaped_by(params))


async def check_logprobs_mode(
    sampler: _types.Sampler,
    prompts: Sequence[TokenIds],
    params: SamplingParams,
    *,
    slots: AbstractAsyncContextManager[object],
    retry: RetryPolicy,
    limiter: RunLimiter,
) -> None:
    """See for oneself whether unnamed logprobs are those of sampling, where the user says so: a few
    requests of one token, until it is clear.

    Args:
        sampler: of the server.
        prompts: ids of `PROBE_TEXTS`.
        params: how will be sampled.
        slots, retry, limiter: as for `sample_group`.

    Raises:
        RunStoppedError: they are not.
        SamplingError: the server gives no completions to see it by.
    """
    # Alone: other settings cut the two distributions differently.
    one_token = replace(plain(params), stop=(), max_tokens=1, stream=None)
    drawn: dict[float, list[FirstTokens]] = {1.0: [], LOWER_TEMPERATURE: []}
    for prompt in prompts:
        for temperature, samples in drawn.items():
            group = await sample_group(
                sampler,
                prompt,
                replace(one_token, temperature=temperature),
                seeds=[None] * PROBE_DRAWS,
                slots=slots,
                retry=retry,
                limiter=limiter,
                prompt="logprobs probe",
            )
            if any(failure.kind == "contract" for failure in group.failures):
                # A fault of its own, which completions will tell of if they have it too.
                logger.warning(_UNSEEN, params.model, f": {_first(group.failures)}")
                return
            if group.failures:
                raise SamplingError(f"logprobs cannot be checked: {_first(group.failures)}")
            completions = [survivor.completion for survivor in group.survivors]
            samples.append(
                FirstTokens(
                    np.array([c.token_ids[0] for c in completions], np.int64),
                    np.array([c.logprobs[0] for c in completions], np.float64),
                )
            )
        measured = measure_kind(drawn[1.0], drawn[LOWER_TEMPERATURE], temperature=LOWER_TEMPERATURE)
        if measured.kind == "sampling":
            return
        if measured.kind == "raw" or measured.sampling_error > SEPARATION:
            raise RunStoppedError(_contradiction(measured))
    logger.warning(_UNSEEN, params.model, "")


def _contradiction(measured: KindMeasured) -> str:
    are = "raw ones" if measured.kind == "raw" else "no logprobs of sampling"
    return (
        f"logprobs_mode is 'processed_logprobs', and the server's logprobs are {are}: over "
        f"{measured.tokens} tokens at temperatures 1 and {LOWER_TEMPERATURE:g} they differ by "
        f"{measured.sampling_error:.2g} nats from those of sampling, by {measured.raw_error:.2g} "
        "from raw ones. Start it as `vllm serve MODEL --logprobs-mode processed_logprobs`, or "
        "leave logprobs_mode out and sample at temperature 1, top_p 1 and top_k off"
    )


def _first(failures: Sequence[Failure]) -> str:
    return f"{failures[0].kind}: {failures[0].message}"
