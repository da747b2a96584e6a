"""Where to sample: one base URL from the many spellings in use, and a key only where it belongs.

Invariant: a key never shows. It is left out of every repr, and the Fireworks key of the environment
goes to Fireworks alone: to its hosts, to the base URL named for it, or with a Fireworks model name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

FIREWORKS_URL = "https://api.fireworks.ai/inference/v1"
_BASE_URL_VARIABLES = ("EP_LLM_API_BASE", "EP_LLM_BASE_URL", "FIREWORKS_BASE_URL")


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One server as one caller sees it: clients are cached by it."""

    base_url: str
    """Up to and including `/v1`."""
    api_key: str | None = field(default=None, repr=False)
    headers: tuple[tuple[str, str], ...] = field(default=(), repr=False)

    @property
    def secrets(self) -> tuple[str, ...]:
        """Strings that must appear in no message: the key and all header values that carry one."""
        carried = [value for _, value in self.headers if len(value) >= 8]
        return (*([self.api_key] if self.api_key else []), *carried)


def resolve_endpoint(model: str, params: Mapping[str, Any], *, env: Mapping[str, str]) -> Endpoint:
    """The endpoint for `model` from `api_base` or `base_url`, else from the environment, else
    Fireworks itself.

    Raises:
        ValueError: two different base URLs, something that is no http(s) URL, malformed headers.
    """
    given = {key: params[key] for key in ("api_base", "base_url") if params.get(key)}
    if len({str(url).rstrip("/") for url in given.values()}) > 1:
        raise ValueError(
            f"completion_params['api_base'] is {given['api_base']!r} and 'base_url' "
            f"{given['base_url']!r}: give one"
        )
    source, url = next(
        iter(given.items()),
        next(
            ((name, env[name]) for name in _BASE_URL_VARIABLES if env.get(name)),
            ("default", FIREWORKS_URL),
        ),
    )
    base_url = _normalise(source, url)
    key = params.get("api_key")
    if key is not None and not isinstance(key, str):
        raise ValueError("completion_params['api_key'] must be a string")
    if key is None and (
        source in ("FIREWORKS_BASE_URL", "default")
        or model.startswith(("accounts/", "fireworks_ai/"))
        or _is_fireworks(base_url)
    ):
        key = env.get("FIREWORKS_API_KEY") or None
    return Endpoint(base_url, key or None, _headers(params))


def _is_fireworks(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    return host == "fireworks.ai" or host.endswith(".fireworks.ai")


def _normalise(source: str, url: Any) -> str:
    """`http://h`, `http://h/v1`, `http://h/inference` and `http://h/inference/v1` all work."""
    parts = urlsplit(url) if isinstance(url, str) else None
    if parts is None or parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{source} must be an http(s) URL, got {url!r}")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ValueError(f"{source} must be a plain URL; credentials go into api_key")
    base = f"{parts.scheme}://{parts.netloc}{parts.path}".rstrip("/")
    base = base.removesuffix("/completions").removesuffix("/chat")
    if base.endswith("/v1"):
        return base
    if parts.hostname == "api.fireworks.ai" and parts.path.strip("/") == "":
        return f"{base}/inference/v1"
    return f"{base}/v1"


def _headers(params: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    merged: dict[str, str] = {}
    for key in ("headers", "extra_headers"):
        headers = params.get(key) or {}
        if not isinstance(headers, Mapping) or not all(
            isinstance(k, str) and isinstance(v, str) for k, v in headers.items()
        ):
            raise ValueError(f"completion_params[{key!r}] must be a dict of strings")
        merged.update(headers)
    return tuple(sorted(merged.items()))
