"""The checks that need many completions, in order.

Invariant: the kind of the logprobs is settled first. What follows samples at the temperature to
train at where the server's logprobs are known to be those of sampling there, else at 1, where raw
ones are too; each finding names the temperature that it was measured at.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from eval_protocol_rft.doctor._completion_checks import (
    EQUAL_SEEDS,
    different_seeds,
    end_of_turn,
    equal_seeds,
)
from eval_protocol_rft.doctor._findings import Finding, skipped
from eval_protocol_rft.doctor._logprob_checks import (
    KIND,
    frequency_finding,
    kind_finding,
    measure_frequency,
)
from eval_protocol_rft.doctor._probe import PerPrompt, Probe, Setup, there
from eval_protocol_rft.doctor._tokenizer_checks import same_tokenizer
from eval_protocol_rft.doctor._trainer_gap import log_ratios, trainer_findings, trainer_skipped
from eval_protocol_rft.local import LoadedTokenizer
from eval_protocol_rft.sampling import (
    LOWER_TEMPERATURE,
    Completion,
    Failure,
    FirstTokens,
    SamplingParams,
    TokenIds,
    measure_kind,
)

Stage = tuple[str, Callable[[], Awaitable[list[Finding]]]]


@dataclass(slots=True)
class Stages:
    """The stages of one examination; each is run once, in order."""

    setup: Setup
    probe: Probe
    tokenizer: LoadedTokenizer
    prompts: Sequence[TokenIds]
    at_one: SamplingParams
    """The request's, at temperature 1 and with nothing said of the server's logprobs."""
    seeds_refused: str | None
    end_ids: frozenset[int]
    _params: SamplingParams = field(init=False)
    """How to sample where logprobs matter; settled by the first stage."""
    _counts: PerPrompt = field(init=False)
    _full: list[list[Completion]] = field(default_factory=list)
    """Whole completions of each prompt."""

    def __post_init__(self) -> None:
        self._params = self.at_one
        self._counts = self.setup.per_prompt(len(self.prompts))
        self.probe.seeded = self.seeds_refused is None

    def in_order(self) -> list[Stage]:
        """Names to show, and the work."""
        return [
            ("logprob kind", self._kind),
            ("whole completions", self._whole),
            ("token frequencies", self._frequencies),
            ("seeds", self._seeds),
            ("trainer", self._trainer),
        ]

    async def _kind(self) -> list[Finding]:
        asked = self.setup.request.params
        lower = replace(self.at_one, temperature=LOWER_TEMPERATURE, max_tokens=1)
        first = await self.probe.one(self.prompts[0], lower, seed=None)
        named = isinstance(first, Completion)
        if isinstance(first, Failure):
            # Refused because unnamed logprobs may be raw: take them as they are, to see.
            lower = replace(lower, logprobs_mode="processed_logprobs")
            first = await self.probe.one(self.prompts[0], lower, seed=None)
        if isinstance(first, Failure):
            why = f"no completion at temperature {LOWER_TEMPERATURE:g}: {first.message}"
            advice = f"What follows is at temperature 1; check {asked.temperature:g} by hand."
            return [skipped(KIND, why, advice if asked.temperature != 1.0 else "")]
        n = self._counts.kind
        ones = await self._first_tokens(self.at_one, n, "kind/1")
        others = await self._first_tokens(lower, n, "kind/lower")
        measured = measure_kind(ones, others, temperature=LOWER_TEMPERATURE)
        if measured.kind == "sampling" or (measured.kind == "unknown" and named):
            mode = None if named else lower.logprobs_mode
            self._params = replace(asked, logprobs_mode=mode)
        return [
            kind_finding(
                measured,
                named=named,
                told=asked.logprobs_mode,
                temperature=asked.temperature,
            )
        ]

    async def _whole(self) -> list[Finding]:
        for i, prompt in enumerate(self.prompts):
            found = await self.probe.several(
                prompt, self._params, self._counts.full, stage=f"full/{i}"
            )
            self._full.append(there(found))
        completions = [completion for group in self._full for completion in group]
        if not completions:
            return [skipped("end of turn, tokenizer", "no whole completion came back")]
        return [
            await asyncio.to_thread(same_tokenizer, self.tokenizer, completions, self._params),
            end_of_turn(completions, self.end_ids),
        ]

    async def _frequencies(self) -> list[Finding]:
        drawn = await self._first_tokens(self._params, self._counts.first_tokens, "first")
        measured = await asyncio.to_thread(measure_frequency, drawn, seed=self.probe.seed)
        return [frequency_finding(measured, temperature=self._params.temperature)]

    async def _seeds(self) -> list[Finding]:
        findings = [different_seeds(self._full, seeded=self.probe.seeded)]
        if self.seeds_refused is not None:
            why = f"the server takes no seeds: {self.seeds_refused}"
            return [skipped(EQUAL_SEEDS, why, "A run cannot be repeated there."), *findings]
        pairs: list[tuple[Completion, Completion]] = []
        for i, prompt in enumerate(self.prompts):
            # One after the other, so that a server cannot be right by doing both at once.
            first, again = [
                await self.probe.several(
                    prompt, self._params, self._counts.pairs, stage=f"pairs/{i}"
                )
                for _ in range(2)
            ]
            pairs += [(a, b) for a, b in zip(first, again, strict=True) if a and b]
        return [equal_seeds(pairs), *findings]

    async def _trainer(self) -> list[Finding]:
        weights = self.setup.trainer_weights
        if weights is None:
            return trainer_skipped(
                "no weights at hand", "Give the folder that the server loaded: --weights FOLDER."
            )
        try:
            from eval_protocol_rft.doctor._weights import WeightsError, trainer_logprobs
        except ImportError:
            return trainer_skipped("torch is missing", "pip install 'eval-protocol-rft[local]'")
        samples = [
            (prompt, completion)
            for prompt, group in zip(self.prompts, self._full, strict=True)
            for completion in group
        ]
        try:
            trainer = await asyncio.to_thread(
                trainer_logprobs,
                weights,
                samples,
                temperature=self._params.temperature,
                trust_remote_code=self.setup.trust_remote_code,
            )
        except WeightsError as error:
            return trainer_skipped(str(error), "Name a folder of the sampled model's weights.")
        ratios = log_ratios(trainer, [completion.logprobs for _, completion in samples])
        return trainer_findings(ratios, temperature=self._params.temperature)

    async def _first_tokens(self, params: SamplingParams, n: int, stage: str) -> list[FirstTokens]:
        """n first tokens of each prompt; fewer where requests failed."""
        one = replace(params, max_tokens=1)
        drawn = []
        for i, prompt in enumerate(self.prompts):
            found = there(await self.probe.several(prompt, one, n, stage=f"{stage}/{i}"))
            drawn.append(
                FirstTokens(
                    np.array([c.token_ids[0] for c in found], np.int64),
                    np.array([c.logprobs[0] for c in found], np.float64),
                )
            )
        return drawn
