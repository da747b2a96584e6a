"""`LocalSampler`: a transformers model in this process, as a `Sampler`. No server, no key.

Invariant: logprobs are those of the distribution that was drawn from, in float32; a seed draws the
same tokens whatever else is sampled beside it; and what cannot be honoured exactly is refused.
Importing this module imports neither torch nor transformers; making a sampler does.

What the in-process sampler does not do, said before it starts. Pure.

Invariant: a request that passes is honoured to the letter; nothing in it is clipped or ignored,
except fields that change neither tokens nor logprobs.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import secrets
import threading
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval_protocol_rft import sampling
from eval_protocol_rft.local._placement import (
    Placement,
    config_and_place,
    keep_float32_head,
    load_model,
    load_tokenizer_of,
    with_float32_head,
)
from eval_protocol_rft.local._tokenizer import LoadedTokenizer
from eval_protocol_rft.local.models import NoSuchModelError, local_model_folder
from eval_protocol_rft.sampling import Completion, Deadline, RefusedError, SamplingParams

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HONOURED_EXTRA = frozenset({"ignore_eos"})

HARMLESS_EXTRA = frozenset(
    {
        # who asks, and how a fleet routes and caches: there is one model and it is here
        "user", "metadata", "prompt_cache_key", "prompt_cache_isolation_key", "service_tier",
        "session_id", "priority", "request_id",
        # what the reply shows: a Completion always holds ids and both logprobs, nothing else
        "logprobs", "top_logprobs", "return_token_ids", "return_tokens_as_token_ids", "raw_output",
        "perf_metrics_in_response",
        # a prompt that is too long is always an error here, as with the value "error"
        "context_length_exceeded_behavior",
    }
)  # fmt: skip
"""Request fields that change neither tokens nor logprobs of an in-process completion."""


LOWEST_TEMPERATURE = 1e-5
"""Below it float32 cannot hold logits divided by it apart, and their logprobs are noise; vLLM takes
the same bound for greedy."""


def completion_limit(prompt_tokens: int, max_tokens: int | None, context_length: int) -> int:
    """Most tokens to draw: `max_tokens`, or all that the context has left.

    Raises:
        RefusedError: prompt and completion would not fit.
    """
    left = context_length - prompt_tokens
    if left < (max_tokens or 1):
        raise RefusedError(
            f"{prompt_tokens} prompt tokens and max_tokens={max_tokens} do not fit the context of "
            f"{context_length} tokens: {max(left, 0)} are left; lower max_tokens or shorten the "
            "prompt"
        )
    return max_tokens or left


def check_prompt(prompt_ids: Sequence[int], vocab_size: int) -> None:
    """Raise RefusedError unless the prompt is one or more ids of the vocabulary."""
    if not prompt_ids:
        raise RefusedError("the prompt has no tokens")
    if min(prompt_ids) < 0 or max(prompt_ids) >= vocab_size:
        index = next(i for i, token in enumerate(prompt_ids) if not 0 <= token < vocab_size)
        raise RefusedError(
            f"prompt_ids[{index}] is {prompt_ids[index]}, outside the vocabulary of {vocab_size}: "
            "was the prompt rendered with this model's tokenizer?"
        )


def check_params(params: SamplingParams) -> None:
    """Raise RefusedError, naming the field, for a value without a meaning or a field that is not
    implemented here."""
    problem = _problem(params)
    if problem:
        raise RefusedError(problem)


def _problem(params: SamplingParams) -> str | None:
    if not (math.isfinite(params.temperature) and params.temperature >= 0):
        return f"temperature is {params.temperature}, must be finite and at least 0"
    if 0 < params.temperature < LOWEST_TEMPERATURE:
        return (
            f"temperature is {params.temperature}, must be 0 (the best token) or at least "
            f"{LOWEST_TEMPERATURE}"
        )
    if not 0 < params.top_p <= 1:
        return f"top_p is {params.top_p}, must be above 0 and at most 1"
    if params.top_k < -1:
        return f"top_k is {params.top_k}, must be above 0, or 0 or -1 for off"
    if params.max_tokens is not None and params.max_tokens < 1:
        return f"max_tokens is {params.max_tokens}, must be at least 1"
    if "" in params.stop:
        return "stop has an empty string, which would end every completion"
    return _extra_problem(params.extra)


def _extra_problem(extra: Mapping[str, Any]) -> str | None:
    unknown = sorted(extra.keys() - HONOURED_EXTRA - HARMLESS_EXTRA)
    if unknown:
        return (
            f"the in-process sampler does not implement {', '.join(unknown)}: remove what is not "
            "needed, or sample over HTTP from a server that has it"
        )
    ignore_eos = extra.get("ignore_eos", False)
    if not isinstance(ignore_eos, bool):
        return f"ignore_eos is {ignore_eos!r}, must be true or false"
    return None


DEFAULT_MAX_BATCH_TOKENS = 32768
"""Some 80 MB of caches for the bundled model, 1.5 GB for one of 135M parameters (SmolLM2)."""

_SEED_MASK = 2**64 - 1
_LOADED: dict[tuple[str, bool, Placement], LocalSampler] = {}
_LOADING = threading.Lock()


class LocalSampler:
    """Samples from a causal language model on one worker thread, many requests at a time.

    Requests may come from any event loop. They join and leave the running batch between steps
    (continuous batching); completions of one prompt that wait together share its prefill. The
    thread exists only while there is work, and holds the model, not this object.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_batch_tokens: int = DEFAULT_MAX_BATCH_TOKENS,
        policy_version: str | None = None,
    ) -> None:
        """Wrap a loaded model. It is used where it lies (device, dtype), in evaluation mode, with
        its output layer in float32.

        Args:
            max_batch_tokens: bounds the caches: completions that run together, times the tokens
                (prompt and max_tokens) of the longest. The rest waits, first in first out. What is
                kept between the turns of sessions adds up to half as much.
            policy_version: names the weights; every completion carries it.

        Raises:
            RefusedError: the model's state is more than keys and values.
        """
        from eval_protocol_rft.local._cache import LocalModel
        from eval_protocol_rft.local._sampling_thread import Worker

        if max_batch_tokens < 1:
            raise ValueError(f"max_batch_tokens is {max_batch_tokens}, must be at least 1")
        self._model = LocalModel(with_float32_head(model))
        keep_float32_head(model)
        self._tokenizer = tokenizer
        self._eos_token_ids = _eos_token_ids(model, tokenizer)
        self._worker = Worker(
            self._model,
            LoadedTokenizer.wrap(tokenizer).decode,
            max_batch_tokens=max_batch_tokens,
            policy_version=policy_version,
        )
        # Runs when this object goes away and at interpreter exit, before torch is torn down.
        weakref.finalize(self, self._worker.stop)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        placement: Placement | None = None,
        trust_remote_code: bool = False,
        max_batch_tokens: int = DEFAULT_MAX_BATCH_TOKENS,
        policy_version: str | None = None,
        say: Callable[[str], None] = lambda line: None,
    ) -> LocalSampler:
        """Load a model and its tokenizer from a folder or by hub id.

        Args:
            placement: device, dtype and attention; by default on the CPU in float32, or on a GPU,
                where torch sees one, in the dtype of the weights.
            say: told, before weights are read, where the model will lie and how much memory it
                takes.

        Raises:
            RefusedError: torch is not installed, there is no such model, it cannot be placed so or
                takes more memory than is free, or its state is more than keys and values.
        """
        tokenizer = load_tokenizer_of(name, trust_remote_code=trust_remote_code)
        config, place = config_and_place(name, placement, trust_remote_code=trust_remote_code)
        from eval_protocol_rft.local._memory import estimate, require_fit, sampling_memory

        memory = estimate(lambda: sampling_memory(config, place, max_batch_tokens=max_batch_tokens))
        require_fit(memory, place.device, smaller=_less_memory(place))
        say(f"{Path(name).name}: {place}{memory}")
        model = load_model(name, placement=place, trust_remote_code=trust_remote_code)
        return cls(
            model, tokenizer, max_batch_tokens=max_batch_tokens, policy_version=policy_version
        )

    @property
    def model(self) -> PreTrainedModel:
        """The model that is sampled; change it through `load_weights` alone."""
        return self._model.module

    @property
    def is_float32(self) -> bool:
        """Whether the model computes in it."""
        return str(self._model.module.dtype) == "torch.float32"

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self._tokenizer

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Ids that end a completion: of generation config, config and tokenizer together."""
        return self._eos_token_ids

    @property
    def context_length(self) -> int:
        """Most tokens that prompt and completion may have together."""
        return self._model.context_length

    @property
    def dtype(self) -> str:
        """What the model computes in, its output layer aside: `float32` or `bfloat16`."""
        return str(next(self.model.parameters()).dtype).removeprefix("torch.")

    @property
    def policy_version(self) -> str | None:
        """Of the weights that sample now."""
        return self._worker.policy_version

    @property
    def pending(self) -> int:
        """Requests that wait to join the batch."""
        return self._worker.pending

    async def load_weights(
        self,
        weights: Mapping[str, Tensor],
        *,
        policy_version: str | None,
        keep: Collection[str] = (),
    ) -> None:
        """Copy `weights` into the model in place, between two tokens.

        What is being sampled goes on with the new weights and the keys and values of the old, and
        says so in `Completion.first_policy_version`; each of its logprobs is that of the weights
        that drew the token.

        Args:
            weights: by the names of the model's `state_dict`; tied ones may be left out.
            policy_version: their name, which completions carry from here on.
            keep: names of weights that stay as they are, and are not in `weights`.

        Raises:
            RefusedError: a name or a shape is not the model's, or one is missing. Nothing is
                changed then.
        """
        from eval_protocol_rft.local._cache import copy_weights

        module = self._model.module
        done = self._worker.swap(lambda: copy_weights(module, weights, keep=keep), policy_version)
        await asyncio.wrap_future(done)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """No step begins inside: what is submitted meanwhile starts as one batch, composed in the
        same way whatever order it came in."""
        self._worker.hold()
        try:
            yield
        finally:
            self._worker.release()

    async def sample(
        self, prompt_ids: Sequence[int], params: SamplingParams, *, seed: int | None = None
    ) -> Completion:
        """Sample one continuation of `prompt_ids`.

        `logprobs` are after temperature, top_k and top_p, in that order; `raw_logprobs` are the
        model's own. At temperature 0 the best token is taken, no distribution is drawn from, and
        both are the raw one. The same seed (modulo 2**64) draws the same tokens, up to float
        noise of the batched forward (about 1e-6 in a probability); without one, a fresh one is
        drawn. Cancelling the caller takes the request out of the batch.

        With `params.session`, only what follows the turn before is run: its keys and values are
        kept until the weights change, the sampler is closed, or others need the room.

        Raises:
            RefusedError: a value that is wrong or does not fit, or a field in `params.extra` that
                is not implemented here.
            SamplingError: of kind `timeout`, no completion within `params.timeout`, waiting
                included.
            SamplingError: the model failed, or the sampler was closed meanwhile.
        """
        from eval_protocol_rft.local._draw import Request

        check_params(params)
        check_prompt(prompt_ids, self._model.vocab_size)
        request = Request(
            prompt_ids=tuple(prompt_ids),
            params=params,
            seed=(secrets.randbits(64) if seed is None else seed) & _SEED_MASK,
            limit=completion_limit(len(prompt_ids), params.max_tokens, self.context_length),
            ends=frozenset() if params.extra.get("ignore_eos") else self._eos_token_ids,
            future=asyncio.get_running_loop().create_future(),
            session=params.session,
        )
        self._worker.submit(request)
        try:
            async with Deadline(params.timeout):
                return await request.future
        except TimeoutError as error:
            raise sampling.SamplingError(
                f"no completion within {params.timeout:g} s: {len(request.token_ids)} of at most "
                f"{request.limit} tokens were drawn",
                kind="timeout",
            ) from error
        finally:
            request.abandoned = True

    async def aclose(self) -> None:
        """Answer what is pending with a SamplingError and end the worker thread. Idempotent. The
        model stays: sampling again starts a new thread. A sampler that `load_local_sampler` gave
        out is everybody's in this process: leave it open."""
        await asyncio.to_thread(self._worker.stop)


def load_local_sampler(
    name: str,
    *,
    placement: Placement | None = None,
    trust_remote_code: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> LocalSampler:
    """The sampler of a bundled model ("arithmetic"), a folder or a hub id: one per process, name
    and placement, safe to call from any thread. Blocks while it loads: call it in
    `asyncio.to_thread`. `say` is told where the model will lie, if it is not there already.

    Raises:
        RefusedError: as `LocalSampler.from_pretrained`.
    """
    with _LOADING:
        key = (name, trust_remote_code, placement or Placement())
        if key not in _LOADED:
            try:
                folder = local_model_folder(name)
            except NoSuchModelError as error:
                raise RefusedError(str(error)) from error
            _LOADED[key] = LocalSampler.from_pretrained(
                folder, placement=placement, trust_remote_code=trust_remote_code, say=say
            )
        return _LOADED[key]


def _less_memory(place: Placement) -> Callable[[], str]:
    hint = "" if place.dtype == "bfloat16" else "--dtype bfloat16 takes half of it, or "
    return lambda: f"{hint}take a smaller model"


def _eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    known: set[int] = set()
    for source in (getattr(model, "generation_config", None), model.config, tokenizer):
        ids = getattr(source, "eos_token_id", None)
        known.update([ids] if isinstance(ids, int) else ids or ())
    return frozenset(known)
