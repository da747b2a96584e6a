"""`examine`: the checks in their order, each on what those before it established.

Invariant: everything that cannot be checked is a finding that says why. If no completion comes back
at all, that is said once. The kind of the logprobs is settled first: what follows samples at the
temperature to train at where the server's logprobs are known to be those of sampling there, else at
1, where raw ones are too; each finding names the temperature that it was measured at.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace

import numpy as np

from eval_protocol_rft import rollout, sampling
from eval_protocol_rft.data import reporter
from eval_protocol_rft.doctor import _logprob_checks as logprobs
from eval_protocol_rft.doctor import _probe as probes
from eval_protocol_rft.doctor import _token_checks as tokens
from eval_protocol_rft.doctor._findings import Diagnosis, Finding, skipped
from eval_protocol_rft.doctor._probe import PROMPTS, Probe, Setup
from eval_protocol_rft.local import LoadedTokenizer, TokenizerError

SETUP = "setup"
DEFAULT_SEED = 20
"""Fixed: the same setup gives the same table. Another one repeats an unlikely p-value."""


def examine(setup: Setup, *, progress: bool | None = None) -> Diagnosis:
    """`aexamine` where no event loop is running."""
    return asyncio.run(aexamine(setup, progress=progress))


async def aexamine(
    setup: Setup, *, progress: bool | None = None, sampler: sampling.Sampler | None = None
) -> Diagnosis:
    """Make every check that can be made. Ctrl-C ends it; nothing is decided then.

    Args:
        setup: what to examine.
        progress: show a bar; None: where stderr is a terminal.
        sampler: used in place of what the setup names.
    """
    request = setup.request
    clients: dict[sampling.Endpoint, sampling.HttpSampler] = {}
    backends = rollout.Backends(
        tokenizer=None,
        sampler=sampler,
        trust_remote_code=setup.trust_remote_code,
        placement=setup.placement,
        vllm=setup.vllm,
        progress=progress,
    )
    try:
        request = await backends.placed(request)
        setup = replace(setup, request=request)
        chosen, tokenizer = await backends.resolve(request, clients)
        seed = DEFAULT_SEED if request.seed is None else request.seed
        with reporter("doctor", setup.total, show=progress) as bar:
            findings = await _examined(setup, Probe(chosen, setup.in_flight, seed, bar), tokenizer)
    except (TokenizerError, sampling.SamplingError) as error:
        findings = [
            Finding(
                name=SETUP,
                verdict="fail",
                measured=str(error),
                bar="model and tokenizer load",
                advice="Nothing else was checked.",
            )
        ]
    finally:
        for client in clients.values():
            await client.aclose()
    return Diagnosis(
        model=request.params.model,
        base_url=request.endpoint.base_url if request.endpoint else None,
        temperature=request.params.temperature,
        findings=findings,
    )


async def _examined(setup: Setup, probe: Probe, tokenizer: LoadedTokenizer) -> list[Finding]:
    request = setup.request
    telling = asyncio.create_task(probe.keep_telling())
    try:
        findings = [
            await asyncio.to_thread(tokens.round_trip, tokenizer),
            *await asyncio.to_thread(tokens.template_checks, tokenizer, request),
        ]
        prompts = _prompts(tokenizer, setup)
        at_one = replace(request.params, temperature=1.0, logprobs_mode=None)
        completed, made = await probes.first_contact(probe, prompts[0], at_one, request.endpoint)
        if not completed:
            return [*findings, *made]
        stages = Stages(setup, probe, tokenizer, prompts, at_one)
        try:
            for name, check in stages.in_order():
                probe.stage = name
                made += await check()
        except sampling.RunStoppedError as error:
            why = f"the run was stopped in {probe.stage!r}: {error}"
            made.append(skipped("the other checks", why))
        return [*findings, probes.exact_replies(probe), *made]
    finally:
        telling.cancel()


def _prompts(tokenizer: LoadedTokenizer, setup: Setup) -> list[sampling.TokenIds]:
    """What is asked. Probabilities can be tested after any ids, so a tokenizer whose template
    fails, which is a finding of its own, is asked plain text."""
    request = setup.request
    try:
        return [
            rollout.render_request([{"role": "user", "content": text}], None, tokenizer, request)
            for text in PROMPTS
        ]
    except rollout.PromptError:
        return [sampling.TokenIds(tokenizer.tokenizer.encode(text)) for text in PROMPTS]


Stage = tuple[str, Callable[[], Awaitable[list[Finding]]]]


class Stages:
    """The stages of one examination; each is run once, in order."""

    def __init__(
        self,
        setup: Setup,
        probe: Probe,
        tokenizer: LoadedTokenizer,
        prompts: Sequence[sampling.TokenIds],
        at_one: sampling.SamplingParams,
    ) -> None:
        """`at_one`: the request's, at temperature 1 and with nothing said of the server's
        logprobs."""
        self.setup, self.probe, self.tokenizer = setup, probe, tokenizer
        self.prompts, self.at_one = prompts, at_one
        self._params = at_one
        """How to sample where logprobs matter; settled by the first stage."""
        self._full: list[list[sampling.Completion]] = []
        """Whole completions of each prompt."""

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
        wanted = self.setup.request.params
        lower = replace(self.at_one, temperature=sampling.LOWER_TEMPERATURE, max_tokens=1)
        first = await self.probe.one(self.prompts[0], lower, seed=None)
        named = isinstance(first, sampling.Completion)
        if isinstance(first, sampling.Failure):
            # Refused because unnamed logprobs may be raw: take them as they are, to see.
            lower = replace(lower, logprobs_mode="processed_logprobs")
            first = await self.probe.one(self.prompts[0], lower, seed=None)
        if isinstance(first, sampling.Failure):
            why = f"no completion at temperature {sampling.LOWER_TEMPERATURE:g}: {first.message}"
            advice = f"What follows is at temperature 1; check {wanted.temperature:g} by hand."
            return [skipped(logprobs.KIND, why, advice if wanted.temperature != 1.0 else "")]
        n = self.setup.kind_probes
        ones = await self._first_tokens(self.at_one, n, "kind/1")
        others = await self._first_tokens(lower, n, "kind/lower")
        measured = sampling.measure_kind(ones, others, temperature=sampling.LOWER_TEMPERATURE)
        if measured.kind == "sampling" or (measured.kind == "unknown" and named):
            mode = None if named else lower.logprobs_mode
            self._params = replace(wanted, logprobs_mode=mode)
        return [
            logprobs.kind_finding(
                measured,
                named=named,
                named_mode=wanted.logprobs_mode,
                temperature=wanted.temperature,
            )
        ]

    async def _whole(self) -> list[Finding]:
        for i, prompt in enumerate(self.prompts):
            n, stage = self.setup.whole, f"full/{i}"
            drawn = await self.probe.several(prompt, self._params, n, stage=stage)
            self._full.append(probes.there(drawn))
        completions = [completion for group in self._full for completion in group]
        if not completions:
            return [skipped("end of turn, tokenizer", "no whole completion came back")]
        end_ids = getattr(self.probe.sampler, "eos_token_ids", self.tokenizer.special_ids)
        return [
            await asyncio.to_thread(
                tokens.same_tokenizer, self.tokenizer, completions, self._params
            ),
            tokens.end_of_turn(completions, end_ids),
        ]

    async def _frequencies(self) -> list[Finding]:
        drawn = await self._first_tokens(self._params, self.setup.first_tokens, "first")
        measured = await asyncio.to_thread(logprobs.measure_frequency, drawn, seed=self.probe.seed)
        return [logprobs.frequency_finding(measured, temperature=self._params.temperature)]

    async def _seeds(self) -> list[Finding]:
        findings = [tokens.different_seeds(self._full, seeded=self.probe.seeded)]
        if self.probe.seeds_refused is not None:
            why = f"the server takes no seeds: {self.probe.seeds_refused}"
            return [skipped(tokens.EQUAL_SEEDS, why, "A run cannot be repeated there."), *findings]
        pairs: list[tuple[sampling.Completion, sampling.Completion]] = []
        for i, prompt in enumerate(self.prompts):
            # One after the other, so that a server cannot be right by doing both at once.
            first, again = [
                await self.probe.several(prompt, self._params, probes.PAIRS, stage=f"pairs/{i}")
                for _ in range(2)
            ]
            pairs += [(a, b) for a, b in zip(first, again, strict=True) if a and b]
        return [tokens.equal_seeds(pairs), *findings]

    async def _trainer(self) -> list[Finding]:
        samples = [
            (prompt, completion)
            for prompt, group in zip(self.prompts, self._full, strict=True)
            for completion in group
        ]
        return await asyncio.to_thread(
            logprobs.trainer_checks,
            self.setup.trainer_weights,
            samples,
            temperature=self._params.temperature,
            placement=self.setup.placement,
            trust_remote_code=self.setup.trust_remote_code,
        )

    async def _first_tokens(
        self, params: sampling.SamplingParams, n: int, stage: str
    ) -> list[sampling.FirstTokens]:
        """n first tokens of each prompt; fewer where requests failed."""
        one = replace(params, max_tokens=1)
        drawn = []
        for i, prompt in enumerate(self.prompts):
            group = probes.there(await self.probe.several(prompt, one, n, stage=f"{stage}/{i}"))
            drawn.append(
                sampling.FirstTokens(
                    np.array([c.token_ids[0] for c in group], np.int64),
                    np.array([c.logprobs[0] for c in group], np.float64),
                )
            )
        return drawn
