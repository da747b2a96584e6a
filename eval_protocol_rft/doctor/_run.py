"""`examine`: the checks in their order, each on what those before it established.

Invariant: everything that cannot be checked is a finding that says why. If no completion comes back
at all, that is said once.

A diagnosis as a terminal table, and as JSON.

Invariant: what a server or a model said is shown as text: no markup, control characters escaped.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace

import msgspec
from rich.table import Table
from rich.text import Text

from eval_protocol_rft._text import visible
from eval_protocol_rft.data import Reporter, reporter
from eval_protocol_rft.doctor._contact import exact_replies, first_contact
from eval_protocol_rft.doctor._findings import PROMPTS, Finding, Verdict, skipped, unfit
from eval_protocol_rft.doctor._probe import DEFAULT_SEED, Probe, Setup
from eval_protocol_rft.doctor._stages import Stages
from eval_protocol_rft.doctor._tokenizer_checks import round_trip, template_checks
from eval_protocol_rft.local import LoadedTokenizer, TokenizerError
from eval_protocol_rft.rollout import Backends, PromptError, render_chat
from eval_protocol_rft.sampling import (
    Endpoint,
    HttpSampler,
    RunStoppedError,
    Sampler,
    SamplingError,
    TokenIds,
)

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


_STYLES: dict[Verdict, str] = {
    "pass": "green",
    "warn": "yellow",
    "fail": "bold red",
    "skipped": "dim",
}
_LONGEST = 400
"""Characters of a message that are shown; JSON has all of it."""


def diagnosis_table(diagnosis: Diagnosis) -> Table:
    """One row a check: verdict, number, bar, advice."""
    table = Table(header_style="bold", show_lines=True, expand=False)
    table.add_column("check", no_wrap=False, max_width=26)
    table.add_column("verdict", no_wrap=True)
    table.add_column("measured, bar and advice")
    for finding in diagnosis.findings:
        table.add_row(
            Text(visible(finding.name)),
            Text(finding.verdict, style=_STYLES[finding.verdict]),
            _cell(finding),
        )
    return table


def _cell(finding: Finding) -> Text:
    measured = visible(finding.measured)
    if len(measured) > _LONGEST:
        measured = measured[: _LONGEST - 3] + "..."
    cell = Text(measured)
    if finding.bar:
        cell.append(f"\nbar: {visible(finding.bar)}", style="dim")
    if finding.advice:
        cell.append(f"\n→ {visible(finding.advice)}", style=_STYLES[finding.verdict])
    return cell


def summary(diagnosis: Diagnosis) -> str:
    """The whole in one line."""
    verdicts = [finding.verdict for finding in diagnosis.findings]
    order: tuple[tuple[Verdict, str], ...] = (
        ("pass", "passed"),
        ("warn", "warned"),
        ("fail", "failed"),
        ("skipped", "skipped"),
    )
    counts = ", ".join(f"{verdicts.count(v)} {word}" for v, word in order if v in verdicts)
    where = f" on {diagnosis.base_url}" if diagnosis.base_url else ""
    judged = "not fit to train" if unfit(diagnosis.findings) else "fit to train"
    if "fail" not in verdicts and "warn" in verdicts:
        judged = "fit to train, with the warnings above"
    return (
        f"{visible(diagnosis.model)}{where}, temperature {diagnosis.temperature:g}: {judged} "
        f"({counts})"
    )


def diagnosis_json(diagnosis: Diagnosis) -> bytes:
    """The same for machines: `fit`, and every finding with its numbers."""
    value = {
        "model": diagnosis.model,
        "base_url": diagnosis.base_url,
        "temperature": diagnosis.temperature,
        "fit": not unfit(diagnosis.findings),
        "findings": diagnosis.findings,
    }
    return msgspec.json.format(msgspec.json.encode(value), indent=2)
