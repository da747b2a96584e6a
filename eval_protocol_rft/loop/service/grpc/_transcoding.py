"""Each method's counterpart over HTTP, and the way of a message there and back.

Invariant: nothing that a client sends is lost unseen. A field that a request's message does not
have is refused, and a zero, which proto3 does not send, goes on where it is a value.

The mapping is the one that `google.api.http` describes: fields of a request go into the path, one
(or all others) into the body, and what is left into the query.
"""

from __future__ import annotations

import functools
import logging
import re
from dataclasses import dataclass
from typing import Any

from google.protobuf import json_format
from google.protobuf.message import DecodeError

from eval_protocol_rft.loop.service._errors import Code, ServiceError
from eval_protocol_rft.loop.service.grpc._messages import Message, message_class, unknown_part

_log = logging.getLogger(__name__)

_STATES = {"JOB_STATE_DELETED": "JOB_STATE_DELETING"}
"""States that came later, and what is nearest to them."""
_PATH_FIELD = re.compile(r"{(?P<field>[\w.]+)=(?P<pattern>[^}]+)}")


@dataclass(frozen=True, slots=True)
class Method:
    """A method of `gateway.Gateway`."""

    reply: str
    """The message that it answers with."""
    verb: str
    path: str
    """With fields of the request in braces, each with the pattern of its value; empty: there is no
    counterpart, and the reply is empty."""
    body: str = ""
    """The field that is the body; `*`: all that the path does not name; empty: there is none."""
    zeros: tuple[str, ...] = ()
    """Fields of a `*` body whose zero is a value."""


_EMPTY = "google.protobuf.Empty"


def _name(kind: str, *, field: str = "name") -> str:
    return f"/v1/{{{field}=accounts/*/{kind}/*}}"


def _resource(kind: str, message: str, *, body: str) -> dict[str, Method]:
    """The methods that every kind of resource has."""
    collection = f"/v1/{{parent=accounts/*}}/{kind}"
    return {
        f"List{message}s": Method(f"List{message}sResponse", "GET", collection),
        f"Get{message}": Method(message, "GET", _name(kind)),
        f"Create{message}": Method(message, "POST", collection, body),
        f"Delete{message}": Method(_EMPTY, "DELETE", _name(kind)),
    }


_DATASET = _name("datasets")
METHODS = {
    "ListModels": Method("ListModelsResponse", "GET", "/v1/{parent=accounts/*}/models"),
    "GetModel": Method("Model", "GET", _name("models")),
    "DeleteModel": Method(_EMPTY, "DELETE", _name("models")),
    # Adapters are served on deployments alone.
    "ListServerlessLoraModels": Method("ListServerlessLoraModelsResponse", "", ""),
    **_resource("deployments", "Deployment", body="deployment"),
    "UpdateDeployment": Method(
        "Deployment", "PATCH", _name("deployments", field="deployment.name"), "deployment"
    ),
    "ScaleDeployment": Method(
        _EMPTY, "PATCH", f"{_name('deployments')}:scale", "*", zeros=("replica_count",)
    ),
    **_resource("deployedModels", "DeployedModel", body="deployed_model"),
    **_resource("datasets", "Dataset", body="*"),
    "GetDatasetUploadEndpoint": Method(
        "GetDatasetUploadEndpointResponse", "POST", f"{_DATASET}:getUploadEndpoint", "*"
    ),
    "GetDatasetDownloadEndpoint": Method(
        "GetDatasetDownloadEndpointResponse", "GET", f"{_DATASET}:getDownloadEndpoint"
    ),
    "ValidateDatasetUpload": Method(_EMPTY, "POST", f"{_DATASET}:validateUpload", "*"),
    **_resource("rlorTrainerJobs", "RlorTrainerJob", body="rlor_trainer_job"),
}
"""By name; the request of `X` is `XRequest`."""


@dataclass(frozen=True, slots=True)
class HttpCall:
    """What `ControlPlane.call` takes."""

    verb: str
    path: str
    query: dict[str, str]
    body: dict[str, Any] | None


def request_to_http(name: str, data: bytes) -> HttpCall | None:
    """The HTTP counterpart of a request's bytes; None where the method has none.

    Raises:
        ServiceError: the bytes are no such message, or carry what it does not have.
    """
    method = METHODS[name]
    request = _read_request(name, data)
    if not method.path:
        return None
    fields: dict[str, Any] = json_format.MessageToDict(request)
    path = _PATH_FIELD.sub(lambda match: _take_name(fields, match, name), method.path)
    body: dict[str, Any] | None = None
    if method.body == "*":
        zeros = {_json_name(request, field): 0 for field in method.zeros}
        body, fields = zeros | fields, {}
    elif method.body:
        body = fields.pop(_json_name(request, method.body), {})
        if "updateMask" in fields:
            body = _masked(getattr(request, method.body), request.update_mask.paths)
    query = {key: _query_text(value) for key, value in fields.items()}
    return HttpCall(method.verb, path, query, body)


def reply_from_http(name: str, answer: dict[str, Any]) -> bytes:
    """The bytes of a reply. Fields that this generation of clients does not know are left out.

    Raises:
        ServiceError: a value is none that the message can hold.
    """
    reply = message_class(METHODS[name].reply)()
    try:
        json_format.ParseDict(_known(answer, reply.DESCRIPTOR), reply)
    except json_format.ParseError as error:
        raise ServiceError(
            f"{name}: the answer cannot be told to a client of this generation: {error}",
            code=Code.INTERNAL,
        ) from error
    encoded: bytes = reply.SerializeToString()
    return encoded


def _read_request(name: str, data: bytes) -> Message:
    request = message_class(f"{name}Request")()
    try:
        request.ParseFromString(data)
    except DecodeError as error:
        raise ServiceError(f"{name}: these bytes are no {name}Request: {error}") from error
    if unknown := unknown_part(request):
        raise ServiceError(f"{name}: unknown to this server: {unknown}")
    return request


def _take_name(fields: dict[str, Any], match: re.Match[str], method: str) -> str:
    """The value of a path's field, which leaves `fields`."""
    *parents, key = match["field"].split(".")
    holder = fields
    for parent in parents:
        holder = holder.get(parent, {})
    value = str(holder.pop(key, ""))
    if not re.fullmatch(match["pattern"].replace("*", r"[^/?#%:\s]+"), value):
        raise ServiceError(f"{method}: {match['field']} is {value!r}, not {match['pattern']}")
    return value


def _masked(message: Message, paths: list[str]) -> dict[str, Any]:
    """What an update's mask names, zeros too; of `a.b`, the whole `a`."""
    values = json_format.MessageToDict(message, always_print_fields_with_no_presence=True)
    body = {}
    for path in paths:
        name = _json_name(message, path.partition(".")[0])
        body[name] = values.get(name)
    return body


def _json_name(message: Message, field: str) -> str:
    """
    Raises:
        ServiceError: the message has no such field.
    """
    found = message.DESCRIPTOR.fields_by_name.get(field)
    if found is None:
        raise ServiceError(f"{message.DESCRIPTOR.name} has no field {field!r}")
    name: str = found.json_name
    return name


def _query_text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _known(answer: dict[str, Any], descriptor: Any) -> dict[str, Any]:
    """The part of an answer that a message can hold."""
    known = {}
    for key, value in answer.items():
        field = descriptor.fields_by_camelcase_name.get(key)
        if field is None:
            _note_left_out(f"{descriptor.name}.{key}")
            continue
        inner = field.message_type
        if inner is None or inner.GetOptions().map_entry or inner.file.package != "gateway":
            known[key] = _STATES.get(value, value) if key == "state" else value
        elif isinstance(value, list):
            known[key] = [_known(part, inner) for part in value]
        else:
            known[key] = None if value is None else _known(value, inner)
    return known


@functools.cache
def _note_left_out(field: str) -> None:
    """Once each."""
    _log.info("clients over gRPC are not told %s: their messages have no such field", field)
