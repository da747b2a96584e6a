"""`examine`: the checks in their order, each on what those before it established.

Invariant: everything that cannot be checked is a finding that says why. If no completion comes back
at all, that is said once.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace

from eval_protocol_rft.backends import Backends
from eval_protocol_rft.batch.progress import Reporter, reporter
from eval_protocol_rft.doctor.contact import exact_replies, first_contact
from eval_protocol_rft.doctor.findings import Finding, skipped
from eval_protocol_rft.doctor.probe import Probe
from eval_protocol_rft.doctor.setup import DEFAULT_SEED, Setup
from eval_protocol_rft.doctor.stages import Stages
from eval_protocol_rft.doctor.template_checks import template_checks
from eval_protocol_rft.doctor.texts import PROMPTS
from eval_protocol_rft.doctor.tokenizer_checks import round_trip
from eval_protocol_rft.endpoint import Endpoint
from eval_protocol_rft.prompts import PromptError, render_chat
from eval_protocol_rft.sampling.guard import RunStoppedError
from eval_protocol_rft.sampling.http import HttpSampler
from eval_protocol_rft.sampling.types import Sampler, SamplingError, TokenIds
from eval_protocol_rft.tokenizer import LoadedTokenizer, TokenizerError

SETUP = "setup"
_TELL_EVERY = 5.0
"""Seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """All findings on a setup, in the order of the checks."""

    model: str
    base_url: str | None
    """None: a model in this process."""
    temperature: float
    findings: list[Finding]


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
    contact = await first_contact(probe, prompts[0], at_one, request.endpoint)
    if not contact.completed:
        return [*findings, *contact.findings]
    stages = Stages(
        setup=setup,
        probe=probe,
        tokenizer=tokenizer,
        prompts=prompts,
        at_one=at_one,
        seeds_refused=contact.seeds_refused,
        end_ids=getattr(sampler, "eos_token_ids", tokenizer.special_ids),
    )
    made = list(contact.findings)
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
