"""Where to sample and what a request there says: one base URL from the many spellings in use, and a
key only where it belongs.

Invariant: a key never shows. It is left out of every repr, and the Fireworks key of the environment
goes to Fireworks alone: to its hosts, to the base URL named for it, or with a Fireworks model name.

Which requests have the same prompt, or are turns of one episode, is what a router needs to send
them to the replica that has what they begin with in its cache. Where the user says anything of
affinity, in a header or in the body, we say nothing.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
import urllib.request
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any
from urllib.parse import SplitResult, unquote, urlsplit

import msgspec

from eval_protocol_rft._options import Flag, environment_variable
from eval_protocol_rft.sampling._types import RefusedError, SamplingParams, TokenIds

FIREWORKS_URL = "https://api.fireworks.ai"
FIREWORKS_VARIABLE = "FIREWORKS_BASE_URL"
_SHORTEST_SECRET = 8
_SEPARATOR = re.compile(r"[\s;,=]+")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_BASE_URL_VARIABLES = ("EP_LLM_API_BASE", "EP_LLM_BASE_URL", FIREWORKS_VARIABLE)
_BELOW_FIREWORKS = re.compile(
    r"(/inference)?(/v1)?((/chat)?/completions)?$|/training(/v1(/serverless)?)?$"
)
"""What clients write behind the address of Fireworks."""


@dataclass(frozen=True, slots=True)
class FireworksAddress:
    """Where Fireworks is, or a service like it: control plane, training and inference lie below one
    URL."""

    url: str
    """Without a slash at its end."""
    source: str
    """Who says so: an option, a variable, or nobody."""

    @property
    def inference(self) -> str:
        """Base URL of the completions there."""
        return f"{self.url}/inference/v1"

    def __str__(self) -> str:
        return f"{self.url} ({self.source})"


def fireworks_address(
    url: str | FireworksAddress | None = None,
    *,
    option: str = "base_url",
    env: Mapping[str, str] = os.environ,
) -> FireworksAddress:
    """The address of Fireworks: `url`, else `FIREWORKS_BASE_URL`, else its own.

    Args:
        url: the service, with or without `/inference`, `/inference/v1` or a slash at its end; an
            address stays as it is.
        option: what `url` is called where it is given.
        env: the environment.

    Raises:
        ValueError: it is no http(s) URL, or more than one; the message names option or variable.
    """
    if isinstance(url, FireworksAddress):
        return url
    for source, value in ((option, url), (FIREWORKS_VARIABLE, env.get(FIREWORKS_VARIABLE))):
        if value:
            return FireworksAddress(_service_root(_plain_url(source, value)), source)
    return FireworksAddress(FIREWORKS_URL, f"no {FIREWORKS_VARIABLE} is set")


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One server as one caller sees it: clients are cached by it."""

    base_url: Annotated[str, Flag()]
    """An OpenAI-compatible server that tells token ids: vLLM, SGLang, ep-rft serve, ...

    Here up to and including `/v1`."""
    api_key: Annotated[
        str | None,
        Flag(
            "--api-key-env",
            only=True,
            metavar="NAME",
            parse=environment_variable,
            unset="FIREWORKS_API_KEY, sent to Fireworks alone",
        ),
    ] = field(default=None, repr=False)
    """Environment variable that holds the server's API key."""
    headers: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    is_fireworks: bool = False
    """By its host, by the variable that names it, or by the model asked for there."""
    source: str = field(default="", compare=False)
    """What named the base URL: a key of completion_params or a variable; empty: nothing did."""

    @property
    def place(self) -> str:
        """The base URL, with the variable that it comes from: who set that may not think of it."""
        by_variable = self.source in _BASE_URL_VARIABLES
        return f"{self.base_url} ({self.source})" if by_variable else self.base_url

    @property
    def secrets(self) -> tuple[str, ...]:
        """Strings that must appear in no message, longest first: the key, and whatever in a header
        is long enough to be one (`Bearer <key>` is cited without its `Bearer`)."""
        parts = {
            part
            for _, value in self.headers
            for part in (value, *value.split(), *_SEPARATOR.split(value))
        }
        carried = {part for part in parts if len(part) >= _SHORTEST_SECRET}
        return tuple(sorted(carried | ({self.api_key} if self.api_key else set()), key=_longest))


def resolve_endpoint(model: str, params: Mapping[str, Any], *, env: Mapping[str, str]) -> Endpoint:
    """The endpoint for `model` from `api_base` or `base_url`, else from the environment, else
    Fireworks itself.

    Raises:
        ValueError: two different base URLs, something that is no http(s) URL, malformed headers.
    """
    source, base_url = _base_url(params, env)
    headers = _headers(params)
    key = params.get("api_key")
    if key is not None and not isinstance(key, str):
        raise ValueError("completion_params['api_key'] must be a string")
    has_own = any(name.lower() in ("authorization", "x-api-key") for name, _ in headers)
    is_fireworks = (
        source in (FIREWORKS_VARIABLE, "")
        or model.startswith(("accounts/", "fireworks_ai/"))
        or _is_fireworks(base_url)
    )
    if key is None and not has_own and is_fireworks:
        key = env.get("FIREWORKS_API_KEY")
    if key and (key != key.strip() or not _fits_header(key)):
        raise ValueError(
            "the API key has a blank, a line break or another control character at its end or "
            "inside: was it read from a file with its last line's end?"
        )
    return Endpoint(base_url, key or None, headers, is_fireworks, source)


def _base_url(params: Mapping[str, Any], env: Mapping[str, str]) -> tuple[str, str]:
    """Where the URL comes from, and the URL."""
    given = {
        f"completion_params[{key!r}]": _normalise(f"completion_params[{key!r}]", params[key])
        for key in ("api_base", "base_url")
        if params.get(key)
    }
    if len(set(given.values())) > 1:
        api_base, other = given.values()
        raise ValueError(
            f"completion_params['api_base'] leads to {api_base} and 'base_url' to {other}: give one"
        )
    if given:
        return next(iter(given.items()))
    for name in _BASE_URL_VARIABLES:
        if env.get(name):
            return name, _normalise(name, env[name])
    return "", fireworks_address(env={}).inference


def is_direct_route(url: str) -> bool:
    """Whether `url` leads to one deployment of Fireworks, past its gateway and control plane."""
    return (urlsplit(url).hostname or "").endswith(".direct.fireworks.ai")


def _is_fireworks(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    return host == "fireworks.ai" or host.endswith(".fireworks.ai")


def _plain_url(source: str, url: Any) -> SplitResult:
    """The parts of an http(s) URL without credentials or a query."""
    try:
        parts = urlsplit(url if isinstance(url, str) else "")
        is_url = parts.scheme in ("http", "https") and bool(parts.hostname)
        _ = parts.port  # raises where it is no number
    except ValueError:
        is_url = False
    # Never with the value: what stands in the wrong place may be a key.
    if not is_url:
        raise ValueError(f"{source} must be an http(s) URL")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ValueError(f"{source} must be a plain URL; credentials go into api_key")
    return parts


def _normalise(source: str, url: Any) -> str:
    """`http://h`, `http://h/v1`, `http://h/inference` and `http://h/inference/v1` all work."""
    parts = _plain_url(source, url)
    path = parts.path.rstrip("/")
    path = path.removesuffix("/chat/completions").removesuffix("/completions")
    path = path.removesuffix("/v1").rstrip("/")
    if parts.hostname == "api.fireworks.ai" and not path:
        path = "/inference"
    return f"{parts.scheme}://{parts.netloc}{path}/v1"


def _service_root(parts: SplitResult) -> str:
    path = _BELOW_FIREWORKS.sub("", parts.path.rstrip("/"), count=1)
    return f"{parts.scheme}://{parts.netloc}{path}"


def _headers(params: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    merged: dict[str, str] = {}
    for key in ("headers", "extra_headers"):
        headers = params.get(key) or {}
        if not isinstance(headers, Mapping) or not all(
            isinstance(k, str) and isinstance(v, str) and _fits_header(k + v)
            for k, v in headers.items()
        ):
            raise ValueError(f"completion_params[{key!r}] must be a dict of strings without breaks")
        merged.update(headers)
    return tuple(sorted(merged.items()))


def _fits_header(text: str) -> bool:
    return not _CONTROL.search(text)


def _longest(text: str) -> tuple[int, str]:
    return -len(text), text


def endpoint_headers(endpoint: Endpoint) -> dict[str, str]:
    """What each request to this server carries, names in lower case."""
    key = endpoint.api_key
    headers = {"authorization": f"Bearer {key}"} if key else {}
    # The user's header goes before ours, whatever its case: a name sent twice is refused.
    return headers | {name.lower(): value for name, value in endpoint.headers}


_OWN_SERVERS: set[str] = set()


def never_proxy(netloc: str) -> None:
    """A server that this process started, on loopback: a proxy would look for it elsewhere."""
    _OWN_SERVERS.add(netloc)


def proxy_for(url: str) -> str | None:
    """The proxy that the environment names for `url`: `HTTP_PROXY` or `HTTPS_PROXY` by its scheme,
    else `ALL_PROXY`, unless `NO_PROXY` has its host. Look it up once, not for every request.

    Raises:
        RefusedError: it is no HTTP proxy.
    """
    parts = urlsplit(url)
    if parts.netloc in _OWN_SERVERS:
        return None
    named = urllib.request.getproxies()
    scheme = parts.scheme if named.get(parts.scheme) else "all"
    proxy = named.get(scheme)
    if not proxy or _goes_direct(parts, named.get("no", "")):
        return None
    if "://" not in proxy:
        proxy = f"http://{proxy}"
    if urlsplit(proxy).scheme not in ("http", "https"):
        host = urlsplit(proxy).netloc.rpartition("@")[2]
        raise RefusedError(
            f"{scheme.upper()}_PROXY names a proxy that is not supported "
            f"({urlsplit(proxy).scheme}://{host}): name one that speaks HTTP, or have "
            f"{parts.hostname} in NO_PROXY"
        )
    return proxy


def _goes_direct(url: SplitResult, exceptions: str) -> bool:
    """Whether `NO_PROXY` names this host: by its name, a domain, `host:port`, or as curl takes it
    too, by a network (10.0.0.0/8)."""
    if urllib.request.proxy_bypass(url.netloc.rpartition("@")[2]):
        return True
    try:
        address = ipaddress.ip_address(url.hostname or "")
    except ValueError:
        return False
    for exception in exceptions.split(","):
        with contextlib.suppress(ValueError):
            if address in ipaddress.ip_network(exception.strip().strip("[]"), strict=False):
                return True
    return False


def proxy_passwords(proxy: str | None) -> tuple[str, ...]:
    """What may not be shown of the proxy's URL."""
    parts = urlsplit(proxy or "")
    return (parts.password, unquote(parts.password)) if parts.password else ()


AFFINITY_HEADER = "x-session-affinity"
"""Known to Fireworks and to routers before several vLLM servers; others do not look at it."""
AFFINITY_FIELD = "prompt_cache_key"
"""Fireworks alone gets it: servers may refuse a field that they do not know."""
_OWN_HEADERS = frozenset({AFFINITY_HEADER, "x-multi-turn-session-id"})
_OWN_FIELDS = (AFFINITY_FIELD, "user")
"""Of the body. Fireworks routes by `user` where there is no `prompt_cache_key`."""


def has_own_affinity(headers: Iterable[tuple[str, str]]) -> bool:
    """Whether the user's headers say where requests belong."""
    return any(name.lower() in _OWN_HEADERS for name, _ in headers)


def affinity_of(prompt: TokenIds, params: SamplingParams) -> str | None:
    """What to call the episode or else the prompt; None where the user turned that off or calls it
    something else."""
    if not params.prompt_cache_affinity:
        return None
    if params.extra and any(field in params.extra for field in _OWN_FIELDS):
        return None
    return params.session or prompt.affinity


STREAM_INTERVAL = 32
"""Tokens of one event. A server so busy that it draws two a second is still heard every 16 s, half
the silence after which a stream is given up."""


def request_body(
    prompt: TokenIds,
    params: SamplingParams,
    seed: int | None,
    *,
    stream: bool = False,
    is_fireworks: bool = False,
    prompt_cache_key: str | None = None,
) -> bytes:
    """The JSON of one request for one completion. Costs nothing per prompt token after the first
    call for a prompt.

    Args:
        stream: ask for a stream of events.
        is_fireworks: leave out what it refuses. Others are asked for the counts of tokens in a
            stream, by which lost events show: vLLM sends them only then, Fireworks always. And for
            fewer, larger events: vLLM knows the field since 0.31, older ones and SGLang pass over
            it.
        prompt_cache_key: what to call the prompt, where the server knows the field.
    """
    body: dict[str, Any] = {
        "model": params.model,
        "prompt": msgspec.Raw(prompt.json),
        "temperature": params.temperature,
        # Left out, servers fall back on the model's generation_config and cut the support.
        "top_p": params.top_p,
        "top_k": params.top_k,
        "logprobs": True,
        "return_token_ids": True,
        "raw_output": True,
        "context_length_exceeded_behavior": "error",
    }
    if params.max_tokens is not None:
        body["max_tokens"] = params.max_tokens
    if params.stop:
        body["stop"] = list(params.stop)
    if seed is not None:
        body["seed"] = seed
    if stream:
        body["stream"] = True
        if not is_fireworks:
            body["stream_options"] = {"include_usage": True}
            body["stream_interval"] = STREAM_INTERVAL
    if prompt_cache_key is not None:
        body["prompt_cache_key"] = prompt_cache_key
    if params.logprobs_mode is not None:
        # Only vLLM's users set the mode; there this makes every id and logprob checkable.
        body["return_tokens_as_token_ids"] = True
    body.update(params.extra)
    return msgspec.json.encode(body)
