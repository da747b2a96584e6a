"""How the server says no: a status and a body in Fireworks' form.

Only an unknown model is answered with "Model not found": Fireworks' clients take those words for a
deployment that is still starting, and wait.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from http import HTTPStatus

import msgspec
from starlette.responses import Response

from eval_protocol_rft.sampling.types import FailureKind, SamplingError

_STATUS_OF_FAILURE: Mapping[FailureKind, HTTPStatus] = {
    "refused": HTTPStatus.BAD_REQUEST,
    "unavailable": HTTPStatus.SERVICE_UNAVAILABLE,
    "timeout": HTTPStatus.GATEWAY_TIMEOUT,
}


class ApiError(Exception):
    """A request that gets an error reply: status, body in Fireworks' form, perhaps Retry-After."""

    def __init__(
        self,
        message: str,
        *,
        status: int = HTTPStatus.BAD_REQUEST,
        code: str = "invalid_request_error",
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.retry_after = retry_after

    @classmethod
    def from_sampling(cls, error: SamplingError) -> ApiError:
        """The reply to a completion that could not be had, by the kind of its failure."""
        status = _STATUS_OF_FAILURE.get(error.kind, HTTPStatus.INTERNAL_SERVER_ERROR)
        code = "invalid_request_error" if error.kind == "refused" else status.name
        return cls(str(error), status=status, code=code, retry_after=error.retry_after)

    @classmethod
    def unknown_model(cls, model: str, *, served: str) -> ApiError:
        return cls(
            "Model not found, inaccessible, and/or not deployed: "
            f"{model!r}; this server has {served!r}",
            status=HTTPStatus.NOT_FOUND,
            code=HTTPStatus.NOT_FOUND.name,
        )

    def body(self) -> bytes:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        fields = {"object": "error", "type": kind, "code": self.code, "message": str(self)}
        return msgspec.json.encode({"error": fields})


def error_reply(error: ApiError, headers: Mapping[str, str] | None = None) -> Response:
    """`error` as a reply, with these headers beside its own."""
    own = {"retry-after": str(math.ceil(error.retry_after))} if error.retry_after else {}
    return Response(
        error.body(),
        status_code=error.status,
        media_type="application/json",
        headers={**(headers or {}), **own},
    )
