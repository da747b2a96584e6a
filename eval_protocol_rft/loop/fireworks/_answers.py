"""Whether it is Fireworks that answers, and what it means when it refuses.

Invariant: a server of another kind is not taken for the service, whatever it answers; no message
holds the key.
"""

from __future__ import annotations

import logging
import re
from typing import Any

import httpx

from eval_protocol_rft._errors import EvalProtocolRftError
from eval_protocol_rft.sampling import FireworksAddress, short
from eval_protocol_rft.training import require

logger = logging.getLogger(__name__)


class ControlPlaneError(EvalProtocolRftError, RuntimeError):
    """The control plane did not give what was asked for; the message says what to do next."""


def service_errors() -> Any:
    """The module with the client's exceptions."""
    return require("fireworks", install="eval-protocol-rft[fireworks]")


async def check_service(client: Any, address: FireworksAddress, *, key_source: str) -> None:
    """See that Fireworks answers and takes the key, before anything is begun there. One that
    answers that it is overloaded is there.

    Args:
        client: an `AsyncFireworks`.
        address: of the client, for messages.
        key_source: where its key comes from, for messages.

    Raises:
        ControlPlaneError: nothing answers, something else does, or the key is refused.
    """
    errors = service_errors()
    try:
        answer = await client.get(
            "/v1/accounts", cast_to=httpx.Response, options={"params": {"pageSize": 2}}
        )
    except (errors.InternalServerError, errors.RateLimitError) as error:
        logger.warning("%s answers, but not well: %s", address, _said(error.response))
    except errors.APIError as error:
        problem = service_problem(error, address, key=client.api_key, key_source=key_source)
        raise ControlPlaneError(problem) from error
    else:
        if "accounts" not in (_json_object(answer) or ()):
            raise ControlPlaneError(_no_fireworks(answer, address))


def service_problem(error: Any, address: FireworksAddress, *, key: str, key_source: str) -> str:
    """What an `APIError` of the client says of address and key; else its own words."""
    errors = service_errors()
    if isinstance(error, errors.APIConnectionError):
        return (
            f"nothing answers at {address}: {error.__cause__ or error}. See that the service is "
            "running, and that this is its address"
        )
    if isinstance(error, errors.AuthenticationError | errors.PermissionDeniedError):
        said = _said(error.response).replace(key, "***")
        return f"{address} refuses the API key ({key_source}): HTTP {error.status_code}: {said}"
    if isinstance(error, errors.NotFoundError) and not is_absence(error):
        return _no_fireworks(error.response, address)
    return str(error)


def is_absence(error: Any) -> bool:
    """Whether a `NotFoundError` says that a resource is not there: a server of another kind, or a
    proxy with no service behind it, answers every question with 404."""
    body = _json_object(error.response) or {}
    return "code" in body or "error" in body


def _no_fireworks(answer: httpx.Response, address: FireworksAddress) -> str:
    kind = answer.headers.get("content-type", "no content type")
    return (
        f"{address} is no Fireworks: {answer.request.method} {answer.request.url.path} was "
        f"answered with HTTP {answer.status_code} ({kind}): {_said(answer)}. See that this is the "
        "service's address"
    )


def _json_object(answer: httpx.Response) -> dict[str, Any] | None:
    try:
        body = answer.json()
    except ValueError:
        return None
    return body if isinstance(body, dict) else None


def _said(answer: httpx.Response) -> str:
    """The message of an answer, in one short line."""
    body = _json_object(answer) or {}
    error = body.get("error")
    inner = error.get("message") if isinstance(error, dict) else error
    return plain_line(str(body.get("message") or inner or answer.text))


def plain_line(text: str) -> str:
    """One short line, without markup."""
    return short(re.sub(r"<[^>]*>", " ", text)) or "no message"
