"""Who may talk to a server on this machine.

Invariant: programs that know the server's address and its key may talk to it, and no web page: what
is refused here reaches no endpoint. A page in a browser on this machine can send requests to
loopback under a name of its own that was rebound to 127.0.0.1; it cannot choose the `Host` and
`Origin` that the browser sends along.
"""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from urllib.parse import urlsplit

_HEALTH = "/health"
"""Answered without the key: load balancers have none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """What a request must show."""

    loopback_only: bool
    """The server listens on loopback alone, so its callers know it by a name of loopback."""
    api_key: str | None = None
    """Asked for as `Authorization: Bearer KEY` or `X-Api-Key: KEY`; None: anyone may call."""

    open_paths: tuple[str, ...] = ()
    """What begins with one of them needs no key."""

    def problem(self, path: str, headers: Mapping[str, str]) -> tuple[HTTPStatus, str] | None:
        """The status of a refusal and why; None where the request may pass. Names of `headers` are
        found in any case."""
        host = headers.get("host", "")
        if self.loopback_only and not is_loopback(_name(host)):
            return (
                HTTPStatus.FORBIDDEN,
                f"Host {host!r} is no name of this machine's loopback interface, on which alone "
                "this server listens: ask for 127.0.0.1 or localhost, or start it with --host",
            )
        origin = headers.get("origin")
        if origin is not None and not self._is_own(origin, host):
            return (
                HTTPStatus.FORBIDDEN,
                f"requests of web pages of {origin!r} are not answered, whatever they send",
            )
        is_open = path == _HEALTH or path.startswith(self.open_paths)
        if self.api_key is not None and not is_open:
            scheme, _, key = headers.get("authorization", "").partition(" ")
            if scheme.lower() != "bearer":
                key = headers.get("x-api-key", "")  # as the training SDK sends it
            if not hmac.compare_digest(key.strip().encode(), self.api_key.encode()):
                return (
                    HTTPStatus.UNAUTHORIZED,
                    "the API key is missing or wrong: send the server's --api-key as "
                    "'Authorization: Bearer KEY'",
                )
        return None

    def _is_own(self, origin: str, host: str) -> bool:
        """Whether a page of `origin` is this machine's or this server's own."""
        try:
            place = urlsplit(origin).netloc
        except ValueError:
            return False
        return bool(place) and (
            is_loopback(_name(place)) if self.loopback_only else place.lower() == host.lower()
        )


def is_loopback(host: str) -> bool:
    """Whether `host` (a name or an address, no port) always means this machine."""
    name = host.lower().rstrip(".")
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _name(place: str) -> str:
    """`host:port` without the port, and an IPv6 address without its brackets."""
    try:
        return urlsplit(f"//{place}").hostname or ""
    except ValueError:
        return ""
