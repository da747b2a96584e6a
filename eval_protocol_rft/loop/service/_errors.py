"""How the control plane says no.

Invariant: a refusal is a status and a body in the service's form, `{"code", "message", "details"}`;
the code is gRPC's, so that both faces of the control plane say the same.
"""

from __future__ import annotations

from enum import IntEnum
from http import HTTPStatus
from typing import Any

from eval_protocol_rft._errors import EvalProtocolRftError


class Code(IntEnum):
    """gRPC's status codes, as far as the control plane has them."""

    INVALID_ARGUMENT = 3
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    FAILED_PRECONDITION = 9
    UNIMPLEMENTED = 12
    INTERNAL = 13
    GONE = 15
    """DATA_LOSS: it was here, and was given up."""
    UNAUTHENTICATED = 16


_STATUS = {
    Code.INVALID_ARGUMENT: HTTPStatus.BAD_REQUEST,
    Code.NOT_FOUND: HTTPStatus.NOT_FOUND,
    Code.ALREADY_EXISTS: HTTPStatus.CONFLICT,
    Code.PERMISSION_DENIED: HTTPStatus.FORBIDDEN,
    Code.FAILED_PRECONDITION: HTTPStatus.BAD_REQUEST,
    Code.UNIMPLEMENTED: HTTPStatus.NOT_IMPLEMENTED,
    Code.INTERNAL: HTTPStatus.INTERNAL_SERVER_ERROR,
    Code.GONE: HTTPStatus.GONE,
    Code.UNAUTHENTICATED: HTTPStatus.UNAUTHORIZED,
}
"""As gRPC's gateway to HTTP maps them."""


class ServiceError(EvalProtocolRftError, RuntimeError):
    """A request that is refused; the message says what, where and what to do."""

    def __init__(self, message: str, *, code: Code = Code.INVALID_ARGUMENT) -> None:
        super().__init__(message)
        self.code = code

    @classmethod
    def not_found(cls, name: str) -> ServiceError:
        return cls(f"{name} not found", code=Code.NOT_FOUND)

    @property
    def status(self) -> int:
        """Of HTTP."""
        return _STATUS[self.code]

    def body(self) -> dict[str, Any]:
        return {"code": int(self.code), "message": str(self), "details": []}
