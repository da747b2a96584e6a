"""Asks the setup: what is examined, with how many completions through the normal sampler and
fan-out, and what the first of them shows.

Invariant: every completion asked for is counted, as itself or with its failure, and a probe keeps
its place: lists have one entry per seed. When nothing comes back there is one finding that says
why, and nothing else is asked.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import aiohttp
import msgspec
from annotated_types import Ge

from eval_protocol_rft import sampling
from eval_protocol_rft._options import Flag
from eval_protocol_rft.data import Reporter
from eval_protocol_rft.doctor._findings import Finding, skipped
from eval_protocol_rft.doctor._token_checks import PROMPT_ECHO, prompt_echo
from eval_protocol_rft.local import Placement
from eval_protocol_rft.local.engine import VllmOptions
from eval_protocol_rft.local.models import LOCAL_PREFIX, folder_here, local_model_folder
from eval_protocol_rft.rollout import RolloutRequest

PROMPTS = (
    "51+29=",
    "64+78=",
    "Name an animal, any animal. Answer with one word.",
    "Pick a number between 1 and 100. Answer with the number only.",
)
"""Questions with short answers of which several are likely: where the first token is certain, no
test of probabilities can see anything."""
PAIRS = 3
"""Of each prompt: completions that are drawn twice under one seed."""
FEWEST_REQUESTS = 40
_RUN = functools.partial(Flag, panel="Run")


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """One setup to examine."""

    request: RolloutRequest
    """Model, endpoint, tokenizer, template arguments, and the temperature to train at (above 0)."""
    weights: Annotated[str | Path | None, Flag(unset="a local model's own")] = None
    """Folder that the trainer loads: compares sampler and trainer."""
    requests: Annotated[int, Ge(FEWEST_REQUESTS), _RUN()] = 400
    """One-token probes; a tenth as many for whole completions."""
    concurrency: Annotated[int | None, Ge(1), _RUN(unset="16; local models: 96")] = None
    """Requests in flight."""
    trust_remote_code: Annotated[bool, _RUN()] = False
    """Let tokenizer and model folders run their own code."""
    placement: Placement = field(default_factory=Placement)
    """Of a model in this process, sampled or as the trainer."""
    vllm: VllmOptions = field(default_factory=VllmOptions)
    """Of the engine of a model `vllm/...`."""

    @property
    def in_flight(self) -> int:
        """Few over HTTP: some engines draw seeded requests one by one."""
        return self.concurrency or (96 if self.request.in_process else 16)

    @property
    def trainer_weights(self) -> str | Path | None:
        """What the trainer would load."""
        model = self.request.params.model
        if self.weights is not None:
            return self.weights
        return local_model_folder(model) if model.startswith(LOCAL_PREFIX) else folder_here(model)

    @property
    def first_tokens(self) -> int:
        """One-token probes of each prompt."""
        return max(FEWEST_REQUESTS, self.requests) // len(PROMPTS)

    @property
    def kind_probes(self) -> int:
        """Those of each prompt, at each of two temperatures, that tell the kind of the logprobs."""
        return max(12, self.first_tokens // 4)

    @property
    def whole(self) -> int:
        """Whole completions of each prompt."""
        return max(4, self.first_tokens // 10)

    @property
    def total(self) -> int:
        """All that is asked for, with the two of the beginning."""
        of_each = self.first_tokens + 2 * self.kind_probes + self.whole + 2 * PAIRS
        return 2 + len(PROMPTS) * of_each


PATIENCE_SECONDS = 60.0
"""Who waits for a diagnosis is told soon that the server is away."""
_TELL_EVERY = 5.0
"""Seconds."""


class Probe:
    """Samples for the checks, counts what came of it, and tells how far it is. Belongs to one event
    loop."""

    def __init__(
        self, sampler: sampling.Sampler, concurrency: int, seed: int, bar: Reporter
    ) -> None:
        self.sampler, self.seed = sampler, seed
        self.stage = "first completion"
        """What is being found out."""
        self.seeds_refused: str | None = None
        """The server's words, where it answers only requests without a seed: then none is sent."""
        self.completed = 0
        self.failures: Counter[str] = Counter()
        """Kind of failure -> completions."""
        self.first_failure: str | None = None
        self._bar = bar
        self._settled = 0
        """Completions that were asked for and came, or failed."""
        self._concurrency = concurrency
        self._limiter = self._fresh_limiter()

    @property
    def seeded(self) -> bool:
        """Whether requests carry seeds."""
        return self.seeds_refused is None

    def tell(self) -> None:
        self._bar.update(self._settled, detail=self.stage)

    async def keep_telling(self) -> None:
        """Again and again: a server may be long in answering."""
        while True:
            self.tell()
            await asyncio.sleep(_TELL_EVERY)

    async def one(
        self,
        prompt: sampling.TokenIds,
        params: sampling.SamplingParams,
        *,
        seed: int | None,
        attempts: int = 1,
    ) -> sampling.Completion | sampling.Failure:
        """One completion that may fail: it counts for nothing."""
        group = await self._group(prompt, params, [seed], attempts, self._fresh_limiter())
        return group.survivors[0].completion if group.survivors else group.failures[0]

    async def several(
        self, prompt: sampling.TokenIds, params: sampling.SamplingParams, n: int, *, stage: str
    ) -> list[sampling.Completion | None]:
        """n completions under seeds of their own, None where there is none. The same `stage` has
        the same seeds.

        Raises:
            RunStoppedError: the server refuses everything, or is away for too long.
        """
        seeds = sampling.derive_seeds(self.seed if self.seeded else None, f"doctor/{stage}", n)
        group = await self._group(prompt, params, seeds, _ATTEMPTS, self._limiter, stage)
        self.completed += len(group.survivors)
        for failure in group.failures:
            self.failures[failure.kind] += 1
            self.first_failure = self.first_failure or failure.message
        completions: list[sampling.Completion | None] = [None] * n
        for survivor in group.survivors:
            completions[survivor.index] = survivor.completion
        return completions

    async def _group(
        self,
        prompt: sampling.TokenIds,
        params: sampling.SamplingParams,
        seeds: Sequence[int | None],
        attempts: int,
        limiter: sampling.RunLimiter,
        name: str | None = None,
    ) -> sampling.Group:
        group = await sampling.sample_group(
            self.sampler,
            prompt,
            params,
            seeds=seeds,
            slots=contextlib.nullcontext(),
            retry=sampling.RetryPolicy(max_attempts=attempts, max_seconds=PATIENCE_SECONDS),
            limiter=limiter,
            prompt=name,
        )
        self._settled += len(seeds)
        self.tell()
        return group

    def _fresh_limiter(self) -> sampling.RunLimiter:
        limit = sampling.FixedLimit(self._concurrency)
        return sampling.RunLimiter(limit=limit, patience_seconds=PATIENCE_SECONDS)


def there(completions: Sequence[sampling.Completion | None]) -> list[sampling.Completion]:
    """Those that came back."""
    return [completion for completion in completions if completion is not None]


_MODELS_SECONDS = 10.0
_MODELS_BYTES = 4 << 20


async def ask_echo(
    endpoint: sampling.Endpoint, prompt: sampling.TokenIds, params: sampling.SamplingParams
) -> tuple[list[int] | None, int | None]:
    """Ask for one token, and look at the reply as it came: a `Completion` holds nothing of the
    prompt, as decoding refuses a wrong echo, and a right one and none look the same to it.

    Returns:
        The prompt's ids as they came back, and how many the server counted; None where it does not
        say.

    Raises:
        SamplingError: no reply of a completion's shape came. No secret is in its message: it holds
            nothing that was sent.
    """
    limit = sampling.reply_limit(prompt, params)
    data = sampling.request_body(prompt, params, None)
    body = await _answer(endpoint, "completions", seconds=params.timeout, limit=limit, data=data)
    reply = sampling.parse_reply(body)
    if not reply.choices:
        raise sampling.ContractError("the reply has no choices")
    choice = reply.choices[0]
    absent = sampling.ABSENT
    raw_output = absent if choice.raw_output is None else choice.raw_output.prompt_token_ids
    echo = choice.prompt_token_ids if choice.prompt_token_ids != absent else raw_output
    try:
        ids = None if echo == absent else msgspec.json.decode(echo, type=list[int])
    except msgspec.ValidationError:
        raise sampling.ContractError("prompt_token_ids are no list of integers") from None
    return ids, reply.usage.prompt_tokens if reply.usage else None


async def served_models(endpoint: sampling.Endpoint) -> list[str]:
    """The models that the server names at `/models`, in its order; empty where it does not say."""
    try:
        body = await _answer(endpoint, "models", seconds=_MODELS_SECONDS, limit=_MODELS_BYTES)
        reply = msgspec.json.decode(body, type=dict[str, Any])
        return [str(m["id"]) for m in msgspec.convert(reply["data"], list[dict[str, Any]])]
    except (sampling.SamplingError, msgspec.DecodeError, ValueError, KeyError):
        return []


async def _answer(
    endpoint: sampling.Endpoint,
    path: str,
    *,
    seconds: float | None,
    limit: int,
    data: bytes | None = None,
) -> bytes:
    """The body of an answer with status 200, to `data` where there is some to be posted.

    Raises:
        SamplingError: there is none, or it has more than `limit` bytes.
    """
    url = f"{endpoint.base_url}/{path}"
    try:
        async with (
            sampling.Deadline(seconds),
            aiohttp.ClientSession(
                headers={
                    "content-type": "application/json",
                    **sampling.endpoint_headers(endpoint),
                },
                cookie_jar=aiohttp.DummyCookieJar(),
            ) as session,
            session.request(
                "GET" if data is None else "POST",
                url,
                data=data,
                timeout=sampling.NO_CLOCKS,
                allow_redirects=False,
                proxy=sampling.proxy_for(url),
            ) as response,
        ):
            if response.status != 200:
                status = response.status
                raise sampling.SamplingError(f"HTTP {status}", kind="connection", status=status)
            return await sampling.read_body(response, limit=limit)
    except (aiohttp.ClientError, OSError, TimeoutError) as error:
        raise sampling.SamplingError(type(error).__name__, kind="connection") from None


EXACT_REPLY = "exact replies"
_BAR = "every reply is exact token data; a request that fails for another reason warns"
_ATTEMPTS = 3

_SHOWN_MODELS = 8
_ADVICE: dict[str, str] = {
    "refused": "Change what the message names.",
    "unavailable": "The server failed: its log says why.",
    "connection": "Is the server running, and is PLACE its address?",
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
        "or mend the host's name in PLACE.",
    ),
    ("[ssl:", "What answers there speaks no TLS: write http:// in PLACE."),
    ("name or service not known", "There is no host of that name: check PLACE."),
    ("nodename nor servname", "There is no host of that name: check PLACE."),
)
"""Words of connections that failed, in lower case."""


async def first_contact(
    probe: Probe,
    prompt: sampling.TokenIds,
    params: sampling.SamplingParams,
    endpoint: sampling.Endpoint | None,
) -> tuple[bool, list[Finding]]:
    """Ask for one completion, with a seed, else without; then the probe sends no seeds from here
    on. `params` are at temperature 1, where unnamed logprobs of either kind are those of sampling.

    Returns:
        Whether a completion came back, and what that showed.
    """
    outcome = await probe.one(prompt, params, seed=probe.seed, attempts=_ATTEMPTS)
    if isinstance(outcome, sampling.Failure) and outcome.kind == "refused":
        unseeded = await probe.one(prompt, params, seed=None, attempts=_ATTEMPTS)
        if isinstance(unseeded, sampling.Completion):
            probe.seeds_refused, outcome = outcome.message, unseeded
    if isinstance(outcome, sampling.Completion):
        return True, [await _echo_finding(prompt, params, endpoint)]
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
    return False, [*findings, others]


async def _advice(failure: sampling.Failure, model: str, endpoint: sampling.Endpoint | None) -> str:
    """What to do about the first request's failure."""
    if failure.status == 404 and endpoint is not None:
        served = await served_models(endpoint)
        if not served:
            return (
                f"Nothing answers there: {_place(endpoint)} names the server without /completions, "
                "as http://host:8000 or http://host:8000/v1."
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
        advice = next(
            (say for part, say in _ADVICE_BY_WORDS if part in words), _ADVICE["connection"]
        )
        return advice.replace("PLACE", _place(endpoint))
    return _ADVICE_BY_STATUS.get(failure.status or 0) or _ADVICE.get(failure.kind, "")


def _place(endpoint: sampling.Endpoint | None) -> str:
    """What the address stands in: the variable that named it, or else the option that could."""
    source = "" if endpoint is None else endpoint.source
    return source if source.isidentifier() else "--base-url"


async def _echo_finding(
    prompt: sampling.TokenIds, params: sampling.SamplingParams, endpoint: sampling.Endpoint | None
) -> Finding:
    if endpoint is None:
        return skipped(PROMPT_ECHO, "a model in this process takes the ids as they are")
    try:
        returned, count = await ask_echo(endpoint, prompt, replace(params, max_tokens=1))
    except sampling.SamplingError as error:
        return skipped(PROMPT_ECHO, f"the request for it failed: {error}")
    return prompt_echo(prompt, returned, count)


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
        advice = advice.replace("PLACE", _place(None))
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
