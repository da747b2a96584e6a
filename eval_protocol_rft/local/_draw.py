"""One request while it is being sampled: what was asked, what was drawn, and when it ends.

Invariant: drawn tokens are only ever appended. Where a completion ends is decided on token ids,
or on text decoded from them; text is never turned back into ids.

Drawing tokens: logits and parameters in, tokens and their logprobs out. Pure: no state, no clock.

Invariant: a row's token depends on that row's logits, parameters and uniform number alone, so what
else is in the batch cannot change it; and a token that was drawn has a probability above zero.
Shapes: B rows (one token is drawn for each), V vocabulary entries, L rows with top_k or top_p.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from eval_protocol_rft.sampling import Completion, FinishReason, SamplingError, SamplingParams

_PHILOX_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_PHILOX_WEYL = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
_PHILOX_ROUNDS = 10
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


class Drawn(NamedTuple):
    """One token per row."""

    tokens_B: Tensor
    """[B] int64."""
    logprobs_B: Tensor
    """[B] float32, nats: of the distribution that was drawn from; of greedy rows the raw one."""
    raw_logprobs_B: Tensor
    """[B] float32, nats: log-softmax of the untouched logits."""


class DrawPlan:
    """The parameters of B rows as tensors, made once for as long as the same rows run together.
    What no row asks for is None: then its work is skipped."""

    def __init__(self, params_B: Sequence[SamplingParams], device: torch.device) -> None:
        """Greedy rows ignore top_p and top_k, which cannot change the best."""

        def column(values: Sequence[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float64, device=device).unsqueeze(1)

        temperature_B = [p.temperature or 1.0 for p in params_B]
        greedy_B = [p.temperature == 0 for p in params_B]
        limited = [
            (row, p.top_k if p.top_k > 0 else math.inf, p.top_p if p.top_p < 1 else math.inf)
            for row, p in enumerate(params_B)
            if p.temperature > 0 and (p.top_k > 0 or p.top_p < 1)
        ]
        self.temperature_B1 = (
            column(temperature_B).float() if any(t != 1 for t in temperature_B) else None
        )
        self.greedy_B = torch.tensor(greedy_B, device=device) if any(greedy_B) else None
        self.limited_L = (
            torch.tensor([r for r, _, _ in limited], device=device) if limited else None
        )
        """Which rows have top_k or top_p."""
        self.top_k_L1 = column([k for _, k, _ in limited])
        self.top_p_L1 = column([p for _, _, p in limited])


def draw(logits_BV: Tensor, plan: DrawPlan, uniforms_B: Tensor) -> Drawn:
    """Draw one token per row by inverting the cumulative distribution at its uniform number.

    Args:
        logits_BV: [B, V] as the model gave them; the maths is float32.
        uniforms_B: [B] float64 in [0, 1), see `uniforms`.
    """
    logits_BV = logits_BV.float()
    raw_BV = logits_BV.log_softmax(dim=-1)
    sampling_BV = sampling_logprobs(logits_BV, raw_BV, plan)
    tokens_B = _invert(sampling_BV, uniforms_B)
    if plan.greedy_B is not None:
        tokens_B = torch.where(plan.greedy_B, logits_BV.argmax(dim=-1), tokens_B)
    logprobs_B = sampling_BV.gather(1, tokens_B.unsqueeze(1)).squeeze(1)
    raw_B = raw_BV.gather(1, tokens_B.unsqueeze(1)).squeeze(1)
    if plan.greedy_B is not None:
        logprobs_B = torch.where(plan.greedy_B, raw_B, logprobs_B)
    return Drawn(tokens_B, logprobs_B, raw_B)


def sampling_logprobs(logits_BV: Tensor, raw_BV: Tensor, plan: DrawPlan) -> Tensor:
    """[B, V] log of the distribution to draw from: temperature, then top_k, then top_p, then
    log-softmax. What was cut off is -inf. `raw_BV` is the log-softmax of the logits."""
    if plan.temperature_B1 is None and plan.limited_L is None:
        return raw_BV
    scaled_BV = logits_BV
    if plan.temperature_B1 is not None:
        # The best logit becomes 0 first, so that a tiny temperature cannot overflow it.
        scaled_BV = (logits_BV - logits_BV.amax(dim=-1, keepdim=True)) / plan.temperature_B1
    if plan.limited_L is not None:
        kept_LV = truncate(scaled_BV[plan.limited_L], plan.top_k_L1, plan.top_p_L1)
        scaled_BV = scaled_BV.index_copy(0, plan.limited_L, kept_LV)
    return scaled_BV.log_softmax(dim=-1)


def truncate(logits_LV: Tensor, top_k_L1: Tensor, top_p_L1: Tensor) -> Tensor:
    """[L, V] the logits with -inf outside the top k and outside the nucleus.

    The nucleus (Holtzman et al. 2020, section 3.1) is the smallest set of most probable tokens,
    among the top k, whose mass reaches top_p. Of equal logits the lower id comes first. `inf`
    switches either limit off.
    """
    ordered_LV, order_LV = logits_LV.sort(dim=-1, descending=True, stable=True)
    rank_V = torch.arange(logits_LV.shape[-1], device=logits_LV.device)
    in_top_k_LV = rank_V < top_k_L1
    mass_LV = ordered_LV.double().masked_fill(~in_top_k_LV, -math.inf).softmax(dim=-1)
    mass_before_LV = mass_LV.cumsum(dim=-1) - mass_LV
    kept_LV = in_top_k_LV & (mass_before_LV < top_p_L1)
    return logits_LV.masked_fill(
        ~torch.zeros_like(kept_LV).scatter(1, order_LV, kept_LV), -math.inf
    )


def _invert(logprobs_BV: Tensor, uniforms_B: Tensor) -> Tensor:
    """[B] first id whose cumulative probability exceeds the uniform's share of the total. The
    share is below the total, so that id exists and has a probability above zero."""
    cumulative_BV = logprobs_BV.double().exp().cumsum(dim=-1)
    target_B1 = uniforms_B.unsqueeze(1) * cumulative_BV[:, -1:]
    ids_B = torch.searchsorted(cumulative_BV, target_B1, right=True).squeeze(1)
    # Only NaN logits find no id; the caller refuses their NaN logprob.
    return ids_B.clamp(max=logprobs_BV.shape[1] - 1)


def uniforms(seeds_B: npt.NDArray[np.uint64], steps_B: npt.NDArray[np.uint64]) -> Tensor:
    """[B] float64 in [0, 1): number `step` of the stream that `seed` names.

    Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") with the
    seed as key and the step as counter: no state to carry, and one call serves a whole batch.
    """
    high, low = philox(seeds_B, steps_B)
    return torch.from_numpy(((high << _HALF | low) >> np.uint64(11)) * 2.0**-53)


def philox(
    keys_B: npt.NDArray[np.uint64], counters_B: npt.NDArray[np.uint64]
) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
    """First two 32-bit output words, each [B], of Philox4x32-10 for 64-bit keys and counters."""
    key_0, key_1 = keys_B & _LOW, keys_B >> _HALF
    word_0, word_1 = counters_B & _LOW, counters_B >> _HALF
    word_2 = word_3 = np.zeros_like(counters_B)
    for _ in range(_PHILOX_ROUNDS):
        product_0 = word_0 * _PHILOX_MULTIPLIERS[0]
        product_1 = word_2 * _PHILOX_MULTIPLIERS[1]
        word_0, word_1 = (product_1 >> _HALF) ^ word_1 ^ key_0, product_1 & _LOW
        word_2, word_3 = (product_0 >> _HALF) ^ word_3 ^ key_1, product_0 & _LOW
        key_0, key_1 = (key_0 + _PHILOX_WEYL[0]) & _LOW, (key_1 + _PHILOX_WEYL[1]) & _LOW
    return word_0, word_1


Decode = Callable[[list[int]], str]

TAIL_MARGIN = 4
"""Tokens decoded beyond a stop string's bytes: the first ones of a window may decode differently
out of context (a leading space dropped, half a character)."""


@dataclass(eq=False, slots=True, kw_only=True)
class Request:
    """A prompt, its limits, and the tokens drawn so far. Only the worker thread changes it."""

    prompt_ids: tuple[int, ...]
    params: SamplingParams
    seed: int
    """64 bits."""
    limit: int
    """Most tokens to draw."""
    ends: frozenset[int]
    """Token ids that end the completion."""
    future: asyncio.Future[Completion]
    session: str | None = None
    """Where its keys and values are kept for the next turn; None: they are not."""
    policy_version: str | None = None
    """The weights that sample it now."""
    first_policy_version: str | None = None
    """Those that drew its first tokens, where they are others."""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    raw_logprobs: list[float] = field(default_factory=list)
    abandoned: bool = False
    """Set by the caller when it no longer waits."""

    @property
    def most_tokens(self) -> int:
        """Tokens that it may come to hold in the caches."""
        return len(self.prompt_ids) + self.limit

    def order(self) -> tuple[tuple[int, ...], int, str]:
        """Where it stands among requests that began together, whichever was submitted first."""
        return self.prompt_ids, self.seed, self.session or ""

    def sampled_by(self, policy_version: str | None) -> None:
        """From now on these weights draw its tokens."""
        if self.token_ids and self.first_policy_version is None:
            self.first_policy_version = self.policy_version
        self.policy_version = policy_version

    @property
    def dropped(self) -> bool:
        """Nobody waits for it: its caller gave up, or its event loop is gone."""
        return self.abandoned or self.future.get_loop().is_closed()

    def add(self, token: int, logprob: float, raw_logprob: float) -> None:
        """Take a drawn token.

        Raises:
            SamplingError: its logprob is not finite, so the model's logits were not.
        """
        if not math.isfinite(logprob + raw_logprob):
            raise SamplingError(
                f"the model gave logprob {logprob} (raw {raw_logprob}) at completion token "
                f"{len(self.token_ids)}: its logits are not finite; check its weights and dtype"
            )
        self.token_ids.append(token)
        self.logprobs.append(logprob)
        self.raw_logprobs.append(raw_logprob)

    def ending(self, decode: Decode) -> Completion | None:
        """The completion, if the last token ended it. An ending token wins over a stop string, and
        either over the limit."""
        ids = self.token_ids
        if ids[-1] in self.ends:
            return self._complete(decode(ids[:-1]), "stop", ids[-1])
        stops = self.params.stop
        hit = stop_hit(ids, stops, decode) if stops else None
        if hit:
            text, stop = hit
            return self._complete(text, "stop", stop)
        if len(ids) >= self.limit:
            return self._complete(decode(ids), "length", None)
        return None

    def _complete(
        self,
        text: str,
        finish_reason: FinishReason,
        stop_reason: str | int | None,
    ) -> Completion:
        return Completion(
            token_ids=self.token_ids,
            logprobs=self.logprobs,
            raw_logprobs=self.raw_logprobs,
            finish_reason=finish_reason,
            text=text,
            stop_reason=stop_reason,
            policy_version=self.policy_version,
            first_policy_version=self.first_policy_version,
        )


def stop_hit(ids: list[int], stops: Sequence[str], decode: Decode) -> tuple[str, str] | None:
    """The text before the first stop string, and that string, if the last token completed one.

    Only a tail is decoded at each token, long enough for the longest stop string even at one byte
    a token; the whole is decoded when the tail holds a hit.
    """
    tail = max(len(stop.encode()) for stop in stops) + TAIL_MARGIN
    if not any(stop in decode(ids[-tail:]) for stop in stops):
        return None
    text = decode(ids)
    hits = [(text.find(stop), -len(stop), stop) for stop in stops if stop in text]
    if not hits:
        return None
    start, _, stop = min(hits)
    return text[:start], stop
