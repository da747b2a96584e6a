"""The one seam between prompt ids and completions: `Sampler`, what goes in, what comes out.

Invariant: a `Completion` is exact. `token_ids` and `logprobs` have the same length, every logprob
is finite and not above zero (up to float noise), and nothing in it was padded or repaired. What
cannot be exact is a `SamplingError`, which the fan-out records as a `Failure`.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Any, Literal, Protocol, runtime_checkable

import msgspec
from annotated_types import Ge, Gt, Le

from eval_protocol_rft._errors import EvalProtocolRftError
from eval_protocol_rft._options import Flag

SAMPLING = functools.partial(Flag, panel="Sampling")

FinishReason = Literal["stop", "length"]
LogprobsMode = Literal["processed_logprobs", "raw_logprobs"]

FailureKind = Literal[
    "refused",  # the server says that this request is wrong: it will say so again
    "unavailable",  # overloaded, loading, restarting: worth another attempt
    "connection",  # refused, reset or cut off before a whole reply arrived
    "timeout",  # no whole reply within the time allowed
    "contract",  # a reply arrived and is not exact token data
    "internal",  # the in-process sampler failed
    "prompt",  # the prompt could not be rendered exactly, so nothing was asked
    "cancelled",  # by us: it had not ended at the group's straggler deadline
]

TOKEN_ID_LIMIT = 2**31
"""Token ids are 32-bit integers to every consumer; vocabularies end far below."""

LOGPROB_NOISE = 1e-4
"""How far above zero a logprob may lie and still be float noise (half-precision log-softmax)."""

LOWEST_LOGPROB = -744.5
"""Below the logarithm of the smallest positive double (5e-324) no sampler draws anything: what lies
there is a stand-in for -inf, such as -9999.0."""


class TokenIds(tuple[int, ...]):
    """Prompt token ids that remember their JSON, so a group pays for encoding once, not n times."""

    @cached_property
    def json(self) -> bytes:
        return msgspec.json.encode(tuple(self))

    @cached_property
    def affinity(self) -> str:
        """16 hex digits that are the same for the same ids and for no others: whoever has sampled
        this prompt has it in its cache."""
        return hashlib.blake2b(self.json, digest_size=8).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to sample, in the wire's own words. Built and checked by `eval_protocol_rft.rollout`."""

    model: Annotated[str, Flag()]
    """local/arithmetic (bundled), local/smollm2, local/FOLDER; vllm/FOLDER or vllm/HUB-ID: vLLM is
    started for it; accounts/... on Fireworks; or the name that the server of --base-url knows.

    Here without `local/`; unused by samplers that hold one model."""
    max_tokens: Annotated[
        int | None, Ge(1), SAMPLING(unset="2048; local: what the context holds")
    ] = None
    """Most tokens per completion.

    The end-of-turn token is one of them; None leaves it to the backend."""
    temperature: Annotated[float, Ge(0), SAMPLING()] = 1.0
    """Of sampling; 0 is greedy."""
    top_p: Annotated[float, Gt(0), Le(1), SAMPLING()] = 1.0
    """Sample from the likeliest tokens that together have this probability."""
    top_k: Annotated[int, Ge(-1), SAMPLING()] = 0
    """Sample from so many of the likeliest tokens; 0 or -1: off."""
    stop: Annotated[tuple[str, ...], SAMPLING()] = ()
    """Ends a completion; repeat for several.

    Stop strings stay in `token_ids`, never in `text`."""
    extra: Annotated[Mapping[str, Any], SAMPLING("--extra-body", only=True)] = field(
        default_factory=dict
    )
    """Further fields of the request.

    Sent as they are; the server judges them."""
    logprobs_mode: Annotated[
        LogprobsMode | None, SAMPLING(parse=str, metavar="processed_logprobs|raw_logprobs")
    ] = None
    """What a vLLM server was started with.

    What the user knows of a server that sends one unnamed logprob per token (vLLM's flag
    `--logprobs-mode`); None: unknown."""
    stream: bool | None = None
    """Whether the reply travels as a stream of events; None: where the generation may be long."""
    prompt_cache_affinity: bool = True
    """Whether requests say which of them have the same prompt, see `affinity`."""
    session: str | None = None
    """Names the episode that this is a turn of: each turn's prompt begins with the one before and
    its answer. Backends may keep for it what they computed; it changes no token."""
    timeout: Annotated[float, Gt(0), Flag(panel="Run")] = 600.0
    """Seconds for one attempt.

    Long on purpose: a timeout drops the long answers first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One sampled continuation, exact to the token. T = number of sampled tokens."""

    token_ids: list[int]
    """[T] sampled ids, the sampled end-of-turn token included."""
    logprobs: list[float]
    """[T] sampling logprobs (nats): after temperature, top-p and top-k."""
    raw_logprobs: list[float] | None = None
    """[T] the model's own logprobs (T=1, full vocabulary), where the backend tells them."""
    routing_matrices: list[str] | None = None
    """[T] base64, how a mixture of experts routed the prediction of each, where the backend tells;
    "" where it does not of one."""
    finish_reason: FinishReason
    text: str | None = None
    """Text as the backend decoded it, None where only ids came back. From `LoadedTokenizer.read`:
    the answer, decoded from the ids."""
    stop_reason: str | int | None = None
    """The stop string or stop token id that ended it, where the backend tells."""
    request_id: str | None = None
    policy_version: str | None = None
    """The weights that sampled it, where the backend tells; the last of them where it spans
    several."""
    first_policy_version: str | None = None
    """The first of the weights, other than `policy_version`, that sampled a part of it; None where
    no others did, as far as the backend tells."""
    queue_seconds: float | None = None
    """How long the request waited in the server's queues, where the backend tells."""
    past_end: list[int] = field(default_factory=list)
    """Ids that the backend handed out behind the end that it names: no part of the completion."""

    def __post_init__(self) -> None:
        problem = token_data_problem(self.token_ids, self.logprobs, self.raw_logprobs)
        if problem:
            raise ContractError(problem)
        routing, size = self.routing_matrices, len(self.token_ids)
        if routing is not None and len(routing) != size:
            raise ContractError(f"{size} token ids but {len(routing)} routing matrices")

    @property
    def truncated(self) -> bool:
        return self.finish_reason == "length"


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A completion that could not be had. It keeps its place; it never becomes a reward of 0."""

    index: int
    """Position among the n completions asked for."""
    kind: FailureKind
    message: str
    attempts: int
    seconds: float
    seed: int | None = None
    status: int | None = None
    """HTTP status of the last attempt, if it got one."""


class SamplingError(EvalProtocolRftError, RuntimeError):
    """No completion; `kind` says why. A RuntimeError on purpose: Eval Protocol does not resample on
    those."""

    kind: FailureKind = "internal"

    def __init__(
        self,
        message: str,
        *,
        kind: FailureKind | None = None,
        status: int | None = None,
        retry_after: float | None = None,
        loading: bool = False,
    ) -> None:
        super().__init__(message)
        if kind is not None:
            self.kind = kind
        self.status = status
        self.retry_after = retry_after
        """Seconds the server asked us to wait."""
        self.loading = loading
        """The server says that it loads weights: it sampled nothing, and takes its time."""


class RefusedError(SamplingError):
    """The request is wrong, and would be refused again."""

    kind: FailureKind = "refused"


class ContractError(SamplingError):
    """A reply that is not exact token data; the message names the choice, field and index."""

    kind: FailureKind = "contract"


@runtime_checkable
class Sampler(Protocol):
    """Prompt ids in, one exact completion out. Implementations are safe to call concurrently."""

    async def sample(
        self, prompt_ids: Sequence[int], params: SamplingParams, *, seed: int | None = None
    ) -> Completion:
        """Sample one continuation of `prompt_ids`; raise a `SamplingError` where there is none."""
        ...

    async def aclose(self) -> None:
        """Release what this sampler holds. Idempotent."""
        ...


def logprob_problem(value: float) -> str | None:
    """Say why this is not the logprob of a token that was sampled, or None."""
    if not math.isfinite(value) or value > LOGPROB_NOISE:
        return "not a finite logprob <= 0"
    if value < LOWEST_LOGPROB:
        return "no sampler draws a token of this logprob: it stands for -inf"
    return None


def token_data_problem(
    token_ids: Sequence[int], logprobs: Sequence[float], raw_logprobs: Sequence[float] | None
) -> str | None:
    """Say what keeps these arrays from being exact token data, or None. Runs no Python loop
    unless something is wrong."""
    if len(token_ids) != len(logprobs):
        return f"{len(token_ids)} token ids but {len(logprobs)} logprobs"
    if not token_ids:
        return "no tokens: a completion has at least the token that ended it"
    for name, values in (("logprobs", logprobs), ("raw_logprobs", raw_logprobs)):
        if values is None:
            continue
        if len(values) != len(token_ids):
            return f"{len(token_ids)} token ids but {len(values)} {name}"
        # NaN fails every comparison, so it is looked for by itself: a sum with one is one.
        if not (min(values) >= LOWEST_LOGPROB and max(values) <= LOGPROB_NOISE) or math.isnan(
            sum(values)
        ):
            index = next(i for i, value in enumerate(values) if logprob_problem(value))
            return f"{name}[{index}] is {values[index]!r}: {logprob_problem(values[index])}"
    if min(token_ids) < 0 or max(token_ids) >= TOKEN_ID_LIMIT:
        index = next(i for i, t in enumerate(token_ids) if not 0 <= t < TOKEN_ID_LIMIT)
        return f"token_ids[{index}] is {token_ids[index]}: not a token id"
    return None
