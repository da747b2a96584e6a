"""The first completion: whether the server answers at all, takes seeds, and uses our prompt ids.

Invariant: when nothing comes back there is one finding that says why, and nothing else is asked.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from eval_protocol_rft.doctor.ask_echo import ask_echo, served_models
from eval_protocol_rft.doctor.completion_checks import PROMPT_ECHO, prompt_echo
from eval_protocol_rft.doctor.findings import Finding, skipped
from eval_protocol_rft.doctor.probe import Probe
from eval_protocol_rft.endpoint import Endpoint
from eval_protocol_rft.sampling.types import (
    Completion,
    Failure,
    SamplingError,
    SamplingParams,
    TokenIds,
)

EXACT_REPLY = "exact replies"
_BAR = "every reply is exact token data; a request that fails for another reason warns"
_ATTEMPTS = 3

_SHOWN_MODELS = 8
_ADVICE: dict[str, str] = {
    "refused": "Change what the message names.",
    "unavailable": "The server failed: its log says why.",
    "connection": "Is the server running, and is --base-url its address?",
    "timeout": "The server is too slow for --timeout, or hangs: look at its log.",
    "contract": "Its replies are not exact token data, so nothing can be trained from them: "
    "see docs/wire.md for what a server has to send.",
    "internal": "The model failed: check its weights and dtype.",
    "prompt": "The prompt cannot be rendered.",
}
"""By kind of failure, where its status and words say no more."""
_ADVICE_BY_STATUS: dict[int, str] = {
    401: "The key is missing or wrong: --api-key-env NAME says which variable holds it.",
    403: "The key is not allowed this model: another key (--api-key-env) or another model.",
    413: "The request is too large for the server or for a proxy before it.",
    425: "The server is loading weights: try again when it has them.",
    429: "The server turns requests away, as too many or over a quota: try again later, with a "
    "lower --concurrency.",
    502: "A proxy answered for the server, which is away: is it running?",
    503: "The server is loading or overloaded: try again when it answers.",
    504: "A proxy answered for the server, which is too slow or away: look at its log.",
}
_ADVICE_BY_WORDS: tuple[tuple[str, str], ...] = (
    (
        "certificate",
        "The server's certificate is not trusted here: name its authority's file in SSL_CERT_FILE, "
        "or mend the host's name in --base-url.",
    ),
    ("[ssl:", "What answers there speaks no TLS: write http:// in --base-url."),
    ("name or service not known", "There is no host of that name: check --base-url."),
    ("nodename nor servname", "There is no host of that name: check --base-url."),
)
"""Words of connections that failed, in lower case."""


@dataclass(frozen=True, slots=True)
class Contact:
    """What the first request showed."""

    findings: list[Finding]
    completed: bool
    seeds_refused: str | None = None
    """The server's words, if it answers only requests without a seed."""


async def first_contact(
    probe: Probe, prompt: TokenIds, params: SamplingParams, endpoint: Endpoint | None
) -> Contact:
    """Ask for one completion, with a seed, else without. `params` are at temperature 1, where
    unnamed logprobs of either kind are those of sampling."""
    outcome = await probe.one(prompt, params, seed=probe.seed, attempts=_ATTEMPTS)
    seeds_refused = None
    if isinstance(outcome, Failure) and outcome.kind == "refused":
        unseeded = await probe.one(prompt, params, seed=None, attempts=_ATTEMPTS)
        if isinstance(unseeded, Completion):
            seeds_refused, outcome = outcome.message, unseeded
    if isinstance(outcome, Completion):
        echo = await _echo_finding(prompt, params, endpoint)
        return Contact([echo], completed=True, seeds_refused=seeds_refused)
    failed = Finding(
        name=EXACT_REPLY,
        verdict="fail",
        measured=f"the first request failed: {outcome.message}",
        bar=_BAR,
        advice=await _advice(outcome, params.model, endpoint),
    )
    findings = [failed]
    if outcome.kind == "contract" and endpoint is not None:
        # It may be the prompt that is not what was sent: then that is what to say.
        echo = await _echo_finding(prompt, params, endpoint)
        findings += [echo] if echo.verdict == "fail" else []
    others = skipped("all other checks", "no completion came back, so nothing else was asked")
    return Contact([*findings, others], completed=False)


async def _advice(failure: Failure, model: str, endpoint: Endpoint | None) -> str:
    """What to do about the first request's failure."""
    if failure.status == 404 and endpoint is not None:
        served = await served_models(endpoint)
        if not served:
            return (
                "Nothing answers there: --base-url names the server without /completions, as "
                "http://host:8000 or http://host:8000/v1."
            )
        if model not in served:
            more = len(served) - _SHOWN_MODELS
            names = ", ".join(
                [*served[:_SHOWN_MODELS], *([f"and {more} more"] if more > 0 else [])]
            )
            return f"The server has no model {model}. Name with --model what it serves: {names}."
        return f"The server lists {model} but does not complete with it: is it still loading?"
    if failure.kind == "connection" and failure.status is None:
        words = failure.message.lower()
        return next((say for part, say in _ADVICE_BY_WORDS if part in words), _ADVICE["connection"])
    return _ADVICE_BY_STATUS.get(failure.status or 0) or _ADVICE.get(failure.kind, "")


async def _echo_finding(
    prompt: TokenIds, params: SamplingParams, endpoint: Endpoint | None
) -> Finding:
    if endpoint is None:
        return skipped(PROMPT_ECHO, "a model in this process takes the ids as they are")
    try:
        return prompt_echo(prompt, await ask_echo(endpoint, prompt, replace(params, max_tokens=1)))
    except SamplingError as error:
        return skipped(PROMPT_ECHO, f"the request for it failed: {error}")


def exact_replies(probe: Probe) -> Finding:
    """What became of all requests. A reply that is not exact is the server's fault, whatever the
    rest of them looks like; other failures may be of the moment."""
    failed = sum(probe.failures.values())
    total = probe.completed + failed
    measured = f"{probe.completed} of {total} completions came back"
    advice = ""
    if failed:
        kinds = ", ".join(f"{count} {kind}" for kind, count in probe.failures.most_common())
        measured += f"; {kinds}; the first: {probe.first_failure}"
        [(kind, _)] = probe.failures.most_common(1)
        advice = _ADVICE.get("contract" if probe.failures["contract"] else kind, "")
    return Finding(
        name=EXACT_REPLY,
        verdict="fail"
        if probe.failures["contract"] or not probe.completed
        else "warn"
        if failed
        else "pass",
        measured=measured,
        bar=_BAR,
        advice=advice,
        numbers={"completions": probe.completed, "failed": failed},
    )
