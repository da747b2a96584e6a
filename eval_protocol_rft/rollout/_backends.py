"""What a request samples from: the sampler of its endpoint or model, and its tokenizer. For a model
of Fireworks that is the one which the service names.

Invariant: HTTP clients belong to one event loop and are cached by endpoint alone; weights and
tokenizers are loaded once per process, off the loop. No tokenizer is guessed from a name of
Fireworks: either the service names a model on the Hugging Face hub, for the model itself or for the
one that it was made of, or there is no answer.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any
from urllib.parse import unquote, urlsplit
from weakref import WeakKeyDictionary

import aiohttp

from eval_protocol_rft import sampling
from eval_protocol_rft.local import (
    LoadedTokenizer,
    Placement,
    TokenizerError,
    chat_template_text,
    load_tokenizer,
    unknown_marks,
)
from eval_protocol_rft.local import engine as engines
from eval_protocol_rft.local.models import LOCAL_PREFIX
from eval_protocol_rft.local.server import is_loopback
from eval_protocol_rft.rollout._params import RolloutRequest, model_name

logger = logging.getLogger(__name__)
SECONDS = 20.0
"""For all questions about one model."""
_MOST_BYTES = 1 << 20
_LONGEST_CHAIN = 5
"""Deployment, adapter, model it was tuned from, ... are two or three."""
_HUB = re.compile(r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+)/?")


async def hub_id_of(model: str, endpoint: sampling.Endpoint) -> tuple[str | None, str]:
    """The hub id (or the folder, from a service on this machine) that belongs to `model`
    (`accounts/.../models/...`, also a deployment or a deployed model, with or without `#deployment`
    and `@version`), and where there is none, why."""
    name = re.split("[#@]", model)[0]
    try:
        async with (
            sampling.Deadline(SECONDS),
            aiohttp.ClientSession(timeout=sampling.NO_CLOCKS) as session,
        ):
            for _ in range(_LONGEST_CHAIN):
                resource = await _resource(session, name, endpoint)
                if place := _tokenizer_place(str(resource.get("huggingFaceUrl") or ""), endpoint):
                    return place, ""
                made_of = _made_of(resource)
                if made_of is None:
                    return None, f"Fireworks names no Hugging Face model for {name}"
                name = made_of
    except TimeoutError:
        return None, f"Fireworks said nothing of {name} within {SECONDS:g} s"
    except (aiohttp.ClientError, OSError, ValueError, sampling.SamplingError) as error:
        return None, f"asked about {name}, Fireworks answered {str(error) or type(error).__name__}"
    return None, f"{name} is made of models too many to follow"


def _tokenizer_place(url: str, endpoint: sampling.Endpoint) -> str | None:
    """What a model's address names: a hub id, or, from a service on this machine and no other, a
    folder."""
    if hub := _HUB.match(url):
        return hub[1]
    there = urlsplit(url)
    is_here = is_loopback(urlsplit(_control_plane(endpoint)).hostname or "")
    return unquote(there.path) if there.scheme == "file" and is_here else None


def _made_of(resource: Mapping[str, Any]) -> str | None:
    """The model that has the same tokenizer: an adapter's base, what a deployment serves."""
    peft = resource.get("peftDetails")
    named = (
        peft.get("baseModel") if isinstance(peft, Mapping) else None,
        resource.get("baseModel"),
        resource.get("model"),
        resource.get("importedFrom"),
    )
    return next(
        (re.split("[#@]", v)[0] for v in named if isinstance(v, str) and v.startswith("accounts/")),
        None,
    )


async def _resource(
    session: aiohttp.ClientSession, name: str, endpoint: sampling.Endpoint
) -> Mapping[str, Any]:
    """What `GET /v1/{name}` answers.

    Raises:
        ValueError: it is no 200, or no JSON object.
    """
    url = f"{_control_plane(endpoint)}/v1/{name}"
    async with session.get(
        url,
        headers=sampling.endpoint_headers(endpoint),
        proxy=sampling.proxy_for(url),
        allow_redirects=False,
    ) as response:
        if response.status in (401, 403):
            raise ValueError(
                f"{response.status}: the API key (FIREWORKS_API_KEY) is missing, or not one for "
                f"{_control_plane(endpoint)}"
            )
        if response.status != 200:
            raise ValueError(f"{response.status}")
        body = await sampling.read_body(response, limit=_MOST_BYTES)
    resource = json.loads(body)
    if not isinstance(resource, dict):
        raise ValueError("no JSON object")
    return resource


def _control_plane(endpoint: sampling.Endpoint) -> str:
    """The inference address without its path; a direct route has no control plane of its own."""
    direct = sampling.is_direct_route(endpoint.base_url)
    return sampling.fireworks_address(None if direct else endpoint.base_url).url


class Backends:
    """Finds sampler and tokenizer for requests.

    Args:
        tokenizer: folder or hub id, or a tokenizer object, for requests that name none; or a
            mapping from the names of models to them.
        sampler: used for every request in place of what it names.
        trust_remote_code: let tokenizer and model folders run their own code.
        placement: of models in this process.
        say: told where such a model will lie, when it is loaded.
        vllm: options of the engines that models `vllm/...` are sampled with; or the engine itself,
            for all of them.
        progress: show how far an engine is that is started; None: where stderr is a terminal.
    """

    def __init__(
        self,
        *,
        tokenizer: Any,
        sampler: sampling.Sampler | None,
        trust_remote_code: bool,
        placement: Placement | None = None,
        say: Callable[[str], None] = lambda line: None,
        vllm: engines.VllmOptions | engines.Engine | None = None,
        progress: bool | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._sampler = sampler
        self._trust_remote_code = trust_remote_code
        self._placement, self._say = placement, say
        self._vllm, self._progress = vllm, progress
        self._engines: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[str, engines.Engine]] = (
            WeakKeyDictionary()
        )
        """By event loop and model: what began with an engine does not go on with another."""
        self._wrapped: dict[int, LoadedTokenizer] = {}
        """Tokenizer objects of the caller's, by identity."""
        self._local: dict[str, LoadedTokenizer] = {}
        self._alike: set[tuple[int, int]] = set()
        """Tokenizers, by identity, that were compared."""
        self._templated: dict[tuple[int, str], LoadedTokenizer] = {}
        """With the chat template of that name, by identity."""
        self._asked: dict[str, asyncio.Future[tuple[str | None, str]]] = {}
        """Models of Fireworks -> what the service says of their tokenizers."""

    @property
    def names_tokenizer(self) -> bool:
        """Whether requests that name no tokenizer have one of the caller's."""
        return self._tokenizer is not None

    def tokenizer_problem(self, requests: Sequence[RolloutRequest]) -> str | None:
        """Why the tokenizer cannot stand for the models of one evaluation test; None where it can.
        Models share one by their own words, in completion_params or in a mapping, never by
        default."""
        if self._sampler is not None or self._tokenizer is None:
            return None
        if isinstance(self._tokenizer, Mapping):
            return None
        unnamed = [_weights_of(request) for request in requests if request.tokenizer is None]
        models = list(dict.fromkeys(unnamed))
        if len(models) < 2:
            return None
        each = ", ".join(f"{model!r}: ..." for model in models)
        return (
            f"one tokenizer, the processor's argument, is given for {len(models)} models of this "
            f"evaluation test: {', '.join(map(repr, models))}. Name the tokenizer of each, also "
            'where it is the same: as "tokenizer" in each of the completion_params, or as '
            f"FireworksTrainingRolloutProcessor(tokenizer={{{each}}})"
        )

    def sampling_from(self, sampler: sampling.Sampler) -> Backends:
        """The same with another sampler."""
        return Backends(
            tokenizer=self._tokenizer,
            sampler=sampler,
            trust_remote_code=self._trust_remote_code,
            placement=self._placement,
        )

    def with_engine(self, engine: engines.Engine) -> Backends:
        """The same with an engine of the caller's for what vLLM samples."""
        return Backends(
            tokenizer=self._tokenizer,
            sampler=self._sampler,
            trust_remote_code=self._trust_remote_code,
            placement=self._placement,
            vllm=engine,
        )

    async def placed(self, request: RolloutRequest) -> RolloutRequest:
        """`request` with the endpoint of its engine, where it needs one; it is started and waited
        for. Others stay as they are.

        Raises:
            RefusedError: there is no such model, or no vLLM.
            RunStoppedError: the engine has ended.
        """
        if not request.needs_engine or self._sampler is not None:
            return request
        engine = await self._engine(request.params.model)
        await asyncio.wrap_future(engine.ready)
        return replace(request, endpoint=engine.endpoint)

    async def _engine(self, model: str) -> engines.Engine:
        if isinstance(self._vllm, engines.Engine):
            return self._vllm
        known = self._engines.setdefault(asyncio.get_running_loop(), {})
        if model not in known:
            loaded = await asyncio.to_thread(
                engines.load_engine,
                model,
                options=self._vllm,
                placement=self._placement,
                trust_remote_code=self._trust_remote_code,
                show=self._progress,
            )
            known.setdefault(model, loaded)
        return known[model]

    def seeds_are_free(self, request: RolloutRequest) -> bool:
        """Whether to seed completions although the user gave no seed. Not on servers that are not
        known to be Fireworks: vLLM draws seeded requests one by one, and its CPU engine (0.32) dies
        of a seed when it splits a prefill."""
        endpoint = request.endpoint
        if self._sampler is not None or request.in_process:
            return True
        return endpoint is not None and endpoint.is_fireworks

    async def resolve(
        self, request: RolloutRequest, clients: dict[sampling.Endpoint, sampling.HttpSampler]
    ) -> tuple[sampling.Sampler, LoadedTokenizer]:
        """Sampler and tokenizer for `request`. `clients` are those of the running event loop.

        Raises:
            TokenizerError: there is no tokenizer, or it cannot be loaded.
            RefusedError: the local model cannot be loaded or sampled.
            RunStoppedError: the engine that samples it has ended.
        """
        request = await self.placed(request)
        if self._sampler is not None:
            sampler_tokenizer = getattr(self._sampler, "tokenizer", None)
            return self._sampler, await self._tokenizer_for(request, sampler_tokenizer)
        if request.endpoint is not None:
            if request.endpoint not in clients:
                clients[request.endpoint] = engines.sampler_at(request.endpoint)
            return clients[request.endpoint], await self._tokenizer_for(request, None)

        from eval_protocol_rft.local import load_local_sampler

        local = await asyncio.to_thread(
            load_local_sampler,
            request.params.model.removeprefix(LOCAL_PREFIX),
            placement=self._placement,
            trust_remote_code=self._trust_remote_code,
            say=self._say,
        )
        # Named as the user named it: a folder of this machine would tell nobody else anything.
        if request.params.model not in self._local:
            wrapped = LoadedTokenizer.wrap(local.tokenizer, request.params.model)
            self._local[request.params.model] = wrapped
        return local, await self._tokenizer_for(request, self._local[request.params.model])

    async def tokenizer(self, request: RolloutRequest) -> LoadedTokenizer:
        """The tokenizer for `request`, where nothing is to be sampled.

        Raises:
            TokenizerError: there is none, or it cannot be loaded.
        """
        return await self._tokenizer_for(request, None)

    async def _tokenizer_for(
        self, request: RolloutRequest, sampler_tokenizer: Any
    ) -> LoadedTokenizer:
        chosen = request.tokenizer or self._argument_for(request) or sampler_tokenizer
        if chosen is None:
            chosen = await self._by_model(request)
        loaded = await self._loaded(chosen)
        if request.chat_template is not None:
            loaded = await asyncio.to_thread(self._with_template, loaded, request.chat_template)
        if sampler_tokenizer is not None and chosen is not sampler_tokenizer:
            await asyncio.to_thread(self._refuse_other, loaded, sampler_tokenizer)
        return loaded

    def _argument_for(self, request: RolloutRequest) -> Any:
        """What the argument `tokenizer` says for the model."""
        if not isinstance(self._tokenizer, Mapping):
            return self._tokenizer
        by_model = {model_name(str(model)): value for model, value in self._tokenizer.items()}
        for model in (request.params.model, _weights_of(request)):
            if model in by_model:
                return by_model[model]
        raise TokenizerError(
            f"the argument tokenizer names none for model {request.params.model!r}, only for "
            f"{', '.join(map(repr, by_model)) or 'no model'}: add it there, or name one as "
            'completion_params["tokenizer"]'
        )

    async def _loaded(self, chosen: Any) -> LoadedTokenizer:
        if isinstance(chosen, LoadedTokenizer):
            return chosen
        if isinstance(chosen, os.PathLike):
            chosen = os.fspath(chosen)
        if isinstance(chosen, str):
            return await asyncio.to_thread(
                load_tokenizer, chosen, trust_remote_code=self._trust_remote_code
            )
        if id(chosen) not in self._wrapped:
            self._wrapped[id(chosen)] = LoadedTokenizer.wrap(chosen)
        return self._wrapped[id(chosen)]

    def _with_template(self, loaded: LoadedTokenizer, name: str) -> LoadedTokenizer:
        key = (id(loaded.tokenizer), name)
        if key not in self._templated:
            trust = self._trust_remote_code
            text = chat_template_text(name, trust_remote_code=trust)
            self._templated[key] = other = loaded.with_template(text)
            if marks := unknown_marks(other):
                logger.warning(
                    "the chat template writes %s, and to tokenizer %r that is ordinary text, of "
                    "several tokens: such a mark ends no turn unless it is a stop string (stop)",
                    ", ".join(marks),
                    loaded.name,
                )
        return self._templated[key]

    def _refuse_other(self, loaded: LoadedTokenizer, tokenizer: Any) -> None:
        """A sampler that brings its tokenizer says which ids its model has: they mean the same."""
        if not isinstance(tokenizer, LoadedTokenizer):
            tokenizer = LoadedTokenizer.wrap(tokenizer)
        pair = (id(loaded.tokenizer), id(tokenizer.tokenizer))
        if pair in self._alike:
            return
        vocabularies = (one.tokenizer.get_vocab() for one in (loaded, tokenizer))
        ours, theirs = ({v: k for k, v in tokens.items()} for tokens in vocabularies)
        other = next((i for i in sorted(ours) if theirs.get(i, ours[i]) != ours[i]), None)
        if other is not None:
            raise TokenizerError(
                f"tokenizer {loaded.name!r} is not the one of the model, {tokenizer.name!r}: id "
                f"{other} is {ours[other]!r} to one and {theirs[other]!r} to the other. Leave the "
                "tokenizer out, or name one with the model's vocabulary"
            )
        self._alike.add(pair)

    async def _by_model(self, request: RolloutRequest) -> str:
        """The tokenizer of a request that names none: what Fireworks says of its model, else the
        model's name as a hub id."""
        model, endpoint = request.params.model, request.endpoint
        if not model.startswith("accounts/"):
            return model
        hub_id, why = None, "and the sampler brings none"
        if endpoint is not None:
            # One question for all rows that start together; shielded, as any of them may end.
            asked = self._asked.get(model)
            if asked is None or asked.get_loop() is not asyncio.get_running_loop():
                asked = self._asked[model] = asyncio.ensure_future(hub_id_of(model, endpoint))
            hub_id, why = await asyncio.shield(asked)
        if hub_id is None:
            raise TokenizerError(
                f"model {model!r} names no tokenizer ({why}): give the base model's, as "
                'completion_params["tokenizer"] = "Qwen/Qwen3-8B" or '
                'FireworksTrainingRolloutProcessor(tokenizer="Qwen/Qwen3-8B")'
            )
        return hub_id


def _weights_of(request: RolloutRequest) -> str:
    """The model's name without the deployment that it runs on."""
    return request.params.model.partition("#")[0]
