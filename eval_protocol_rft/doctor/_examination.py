"""`examine`: the checks in their order, each on what those before it established.

Invariant: everything that cannot be checked is a finding that says why. If no completion comes back
at all, that is said once. The kind of the logprobs is settled first: what follows samples at the
temperature to train at where the server's logprobs are known to be those of sampling there, else at
1, where raw ones are too; each finding names the temperature that it was measured at.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from eval_protocol_rft.data import Reporter, reporter
from eval_protocol_rft.doctor._completion_checks import (
    EQUAL_SEEDS,
    different_seeds,
    end_of_turn,
    equal_seeds,
)
from eval_protocol_rft.doctor._contact import exact_replies, first_contact
from eval_protocol_rft.doctor._findings import Diagnosis, Finding, skipped
from eval_protocol_rft.doctor._logprob_checks import (
    KIND,
    frequency_finding,
    kind_finding,
    measure_frequency,
)
from eval_protocol_rft.doctor._probe import DEFAULT_SEED, PerPrompt, Probe, Setup, there
from eval_protocol_rft.doctor._tokenizer_checks import round_trip, same_tokenizer, template_checks
from eval_protocol_rft.doctor._trainer_checks import trainer_checks
from eval_protocol_rft.local import LoadedTokenizer, TokenizerError
from eval_protocol_rft.rollout import Backends, PromptError, render_chat
from eval_protocol_rft.sampling import (
    LOWER_TEMPERATURE,
    Completion,
    Endpoint,
    Failure,
    FirstTokens,
    HttpSampler,
    RunStoppedError,
    Sampler,
    SamplingError,
    SamplingParams,
    TokenIds,
    measure_kind,
)

SETUP = "setup"
_TELL_EVERY = 5.0
"""Seconds."""
PROMPTS = (
    "51+29=",
    "64+78=",
    "Name an animal, any animal. Answer with one word.",
    "Pick a number between 1 and 100. Answer with the number only.",
)
"""Questions with short answers of which several are likely: where the first token is certain, no
test of probabilities can see anything."""


def examine(setup: Setup, *, progress: bool | None = None) -> Diagnosis:
    """`aexamine` where no event loop is running."""
    return asyncio.run(aexamine(setup, progress=progress))


async def aexamine(
    setup: Setup, *, progress: bool | None = None, sampler: Sampler | None = None
) -> Diagnosis:
    """Make every check that can be made. Ctrl-C ends it; nothing is decided then.

    Args:
        setup: what to examine.
        progress: show a bar; None: where stderr is a terminal.
        sampler: used in place of what the setup names.
    """
    request = setup.request
    clients: dict[Endpoint, HttpSampler] = {}
    backends = Backends(tokenizer=None, sampler=sampler, trust_remote_code=setup.trust_remote_code)
    try:
        chosen, tokenizer = await backends.resolve(request, clients)
        total = 2 + len(PROMPTS) * setup.per_prompt(len(PROMPTS)).total
        with reporter("doctor", total, show=progress) as bar:
            findings = await _examined(setup, chosen, tokenizer, bar)
    except (TokenizerError, SamplingError) as error:
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


@dataclass(slots=True)
class _Shown:
    """How far the examination is, told again and again: a server may be long in answering."""

    bar: Reporter
    done: int = 0
    stage: str = "first completion"

    def settled(self, count: int) -> None:
        self.done += count
        self.tell()

    def tell(self) -> None:
        self.bar.update(self.done, detail=self.stage)

    async def keep_telling(self) -> None:
        while True:
            self.tell()
            await asyncio.sleep(_TELL_EVERY)


async def _examined(
    setup: Setup, sampler: Sampler, tokenizer: LoadedTokenizer, bar: Reporter
) -> list[Finding]:
    shown = _Shown(bar)
    telling = asyncio.create_task(shown.keep_telling())
    try:
        return await _checked(setup, sampler, tokenizer, shown)
    finally:
        telling.cancel()


async def _checked(
    setup: Setup, sampler: Sampler, tokenizer: LoadedTokenizer, shown: _Shown
) -> list[Finding]:
    request = setup.request
    findings = [
        await asyncio.to_thread(round_trip, tokenizer),
        *await asyncio.to_thread(template_checks, tokenizer, request.chat_template_kwargs),
    ]
    seed = DEFAULT_SEED if request.seed is None else request.seed
    probe = Probe(sampler, setup.in_flight, seed, shown.settled)
    prompts = _prompts(tokenizer, setup)
    at_one = replace(request.params, temperature=1.0, logprobs_mode=None)
    completed, made = await first_contact(probe, prompts[0], at_one, request.endpoint)
    if not completed:
        return [*findings, *made]
    stages = Stages(
        setup=setup,
        probe=probe,
        tokenizer=tokenizer,
        prompts=prompts,
        at_one=at_one,
        end_ids=getattr(sampler, "eos_token_ids", tokenizer.special_ids),
    )
    try:
        for name, check in stages.in_order():
            shown.stage = name
            made += await check()
    except RunStoppedError as error:
        made.append(skipped("the other checks", f"the run was stopped in {shown.stage!r}: {error}"))
    return [*findings, exact_replies(probe), *made]


def _prompts(tokenizer: LoadedTokenizer, setup: Setup) -> list[TokenIds]:
    """What is asked. Probabilities can be tested after any ids, so a tokenizer whose template
    fails, which is a finding of its own, is asked plain text."""
    kwargs = setup.request.chat_template_kwargs
    try:
        return [
            render_chat([{"role": "user", "content": text}], None, tokenizer, kwargs)
            for text in PROMPTS
        ]
    except PromptError:
        return [TokenIds(tokenizer.tokenizer.encode(text)) for text in PROMPTS]


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
    end_ids: frozenset[int]
    _params: SamplingParams = field(init=False)
    """How to sample where logprobs matter; settled by the first stage."""
    _counts: PerPrompt = field(init=False)
    _full: list[list[Completion]] = field(default_factory=list)
    """Whole completions of each prompt."""

    def __post_init__(self) -> None:
        self._params = self.at_one
        self._counts = self.setup.per_prompt(len(self.prompts))

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
        lower = replace(self.at_one, temperature=LOWER_TEMPERATURE, max_tokens=1)
        first = await self.probe.one(self.prompts[0], lower, seed=None)
        named = isinstance(first, Completion)
        if isinstance(first, Failure):
            # Refused because unnamed logprobs may be raw: take them as they are, to see.
            lower = replace(lower, logprobs_mode="processed_logprobs")
            first = await self.probe.one(self.prompts[0], lower, seed=None)
        if isinstance(first, Failure):
            why = f"no completion at temperature {LOWER_TEMPERATURE:g}: {first.message}"
            advice = f"What follows is at temperature 1; check {wanted.temperature:g} by hand."
            return [skipped(KIND, why, advice if wanted.temperature != 1.0 else "")]
        n = self._counts.kind
        ones = await self._first_tokens(self.at_one, n, "kind/1")
        others = await self._first_tokens(lower, n, "kind/lower")
        measured = measure_kind(ones, others, temperature=LOWER_TEMPERATURE)
        if measured.kind == "sampling" or (measured.kind == "unknown" and named):
            mode = None if named else lower.logprobs_mode
            self._params = replace(wanted, logprobs_mode=mode)
        return [
            kind_finding(
                measured,
                named=named,
                named_mode=wanted.logprobs_mode,
                temperature=wanted.temperature,
            )
        ]

    async def _whole(self) -> list[Finding]:
        for i, prompt in enumerate(self.prompts):
            drawn = await self.probe.several(
                prompt, self._params, self._counts.full, stage=f"full/{i}"
            )
            self._full.append(there(drawn))
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
        if self.probe.seeds_refused is not None:
            why = f"the server takes no seeds: {self.probe.seeds_refused}"
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
        samples = [
            (prompt, completion)
            for prompt, group in zip(self.prompts, self._full, strict=True)
            for completion in group
        ]
        return await asyncio.to_thread(
            trainer_checks,
            self.setup.trainer_weights,
            samples,
            temperature=self._params.temperature,
            trust_remote_code=self.setup.trust_remote_code,
        )

    async def _first_tokens(self, params: SamplingParams, n: int, stage: str) -> list[FirstTokens]:
        """n first tokens of each prompt; fewer where requests failed."""
        one = replace(params, max_tokens=1)
        drawn = []
        for i, prompt in enumerate(self.prompts):
            group = there(await self.probe.several(prompt, one, n, stage=f"{stage}/{i}"))
            drawn.append(
                FirstTokens(
                    np.array([c.token_ids[0] for c in group], np.int64),
                    np.array([c.logprobs[0] for c in group], np.float64),
                )
            )
        return drawn
