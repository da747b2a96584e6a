"""Data sets: made, uploaded in one of three ways, checked line by line, and read by jobs.

Invariant: a data set is READY when, and only when, all of its lines were read and are of its one
format; it never changes after that. A request that is repeated because its answer was lost gets
the answer that the first one had.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import shutil
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from eval_protocol_rft._durable import write_whole
from eval_protocol_rft.loop.service import _names as names
from eval_protocol_rft.loop.service._errors import Code, ServiceError
from eval_protocol_rft.loop.service._store import Resource, Store
from eval_protocol_rft.loop.service.control import _fields as fields
from eval_protocol_rft.loop.service.control import _resources as resources
from eval_protocol_rft.loop.service.control._resources import Call, RouteTable

KIND = "datasets"
FORMATS = ("CHAT", "COMPLETION", "RL")
MAX_UPLOAD_BYTES = 150 * 10**6
"""Of one request to `:upload`, as documented."""
_LARGEST_SCORE = 1e30
"""Their sums, squares and differences are still numbers of float64."""
MAX_FILE_BYTES = 10**9
"""Of one file at an address of its own: it is held in memory."""
_UNSPECIFIED = "FORMAT_UNSPECIFIED"
_UNDER_WAY = ("JOB_STATE_PENDING", "JOB_STATE_RUNNING")


class Datasets:
    """The account's data sets. Their lines lie in files below the state folder."""

    def __init__(self, store: Store, say: Callable[[str], None]) -> None:
        self._store = store
        self._say = say
        self._folder = store.folder / "datasets"
        self._folder.mkdir(exist_ok=True)
        self._finishing = asyncio.Lock()
        """Of two uploads of one data set, the second finds it READY, and not half written."""

    @property
    def routes(self) -> RouteTable:
        collection = "accounts/*/datasets"
        return (
            ("GET", collection, self.list_datasets),
            ("POST", collection, self.create),
            ("GET", f"{collection}/*", self.get),
            ("PATCH", f"{collection}/*", self.update),
            ("DELETE", f"{collection}/*", self.delete),
            ("POST", f"{collection}/*:getUploadEndpoint", self.get_upload_endpoint),
            ("POST", f"{collection}/*:validateUpload", self.validate_upload),
            ("GET", f"{collection}/*:getDownloadEndpoint", self.get_download_endpoint),
        )

    async def list_datasets(self, call: Call) -> dict[str, Any]:
        rows = self._store.list(KIND, f"{call.name}/")
        return resources.page(rows, call.query, KIND, fields.DATASET)

    async def create(self, call: Call) -> dict[str, Any]:
        body = fields.read_fields(
            call.body,
            {"dataset": fields.DATASET, "datasetId": str, "sourceDatasetId": str, "filter": str},
            "the request",
        )
        if body.get("sourceDatasetId"):
            raise ServiceError(
                "sourceDatasetId: this server makes no data set out of another",
                code=Code.UNIMPLEMENTED,
            )
        key = resources.check_id(fields.need(body, "datasetId", "the request"), "datasetId")
        name = f"{call.name}/{key}"
        row = dict(body.get("dataset", {}))
        declared = row.get("format") or _UNSPECIFIED
        fields.one_of(declared, (_UNSPECIFIED, *FORMATS), "dataset.format")
        if row.get("exampleCount", 0) < 0:
            raise ServiceError(f"dataset.exampleCount is {row['exampleCount']}: at least 0")
        if self._store.get(KIND, name) is not None:
            raise resources.exists(name)
        created = names.now()
        row |= {
            "name": name, "state": "UPLOADING", "format": declared, "createTime": created,
            "updateTime": created, "exampleCount": str(row.get("exampleCount", 0)),
            "_declared": {"format": declared, "count": row.get("exampleCount", 0)},
        }  # fmt: skip
        self._store.put(KIND, name, row)
        self._say(f"dataset {key}: UPLOADING")
        return resources.view(row)

    async def get(self, call: Call) -> dict[str, Any]:
        return resources.view(self._row(call.name))

    async def update(self, call: Call) -> dict[str, Any]:
        body = fields.read_fields(call.body, fields.DATASET, "dataset")
        mask = fields.read_mask(call.query.get("updateMask", ""), fields.DATASET, "dataset")
        changes = {name: body.get(name, "") for name in mask} if mask else body
        if others := sorted(set(changes) - {"displayName", "name"}):
            raise ServiceError(f"{call.name}: {', '.join(others)} cannot be changed")
        row = {**self._row(call.name), **changes, "name": call.name, "updateTime": names.now()}
        self._store.put(KIND, call.name, row)
        return resources.view(row)

    async def delete(self, call: Call) -> dict[str, Any]:
        self._row(call.name)
        if job := self._user(call.name):
            raise resources.wrong_state(
                f"{call.name} is in use by {job['name']} ({job['state']}): cancel the job first, "
                "or wait for its end"
            )
        self._store.delete(KIND, call.name)
        self._path(call.name).unlink(missing_ok=True)
        shutil.rmtree(self._parts(call.name), ignore_errors=True)
        self._say(f"dataset {names.last(call.name)}: deleted")
        return {}

    async def get_upload_endpoint(self, call: Call) -> dict[str, Any]:
        body = fields.read_fields(
            call.body,
            {"filenameToSize": dict, "readMask": str, "name": str, "enableResumableUpload": bool},
            "the request",
        )
        files = {
            file: fields.read_integer(size, f"filenameToSize[{file!r}]")
            for file, size in body.get("filenameToSize", {}).items()
        }
        if not files:
            raise ServiceError("filenameToSize names no file")
        for file, size in files.items():
            if not 0 <= size <= MAX_FILE_BYTES:
                raise ServiceError(
                    f"filenameToSize of {file!r} is {size}: this server takes files of up to "
                    f"{MAX_FILE_BYTES} bytes"
                )
        row = self._uploading(call.name)
        row["_uploads"] = {
            secrets.token_urlsafe(24): {"file": file, "size": size} for file, size in files.items()
        }
        shutil.rmtree(self._parts(call.name), ignore_errors=True)
        self._store.put(KIND, call.name, row)
        key = names.last(call.name)
        return {
            "filenameToSignedUrls": {
                upload["file"]: f"{call.base_url}/uploads/{key}/{token}"
                for token, upload in row["_uploads"].items()
            }
        }

    async def receive(self, key: str, token: str, chunks: AsyncIterator[bytes]) -> None:
        """Take in a file at an address that `get_upload_endpoint` gave; the address is the secret.

        Raises:
            ServiceError: it gave no such address, or the file has another size than was said.
        """
        name = f"{names.ACCOUNT}/{KIND}/{key}"
        upload = (self._store.get(KIND, name) or {}).get("_uploads", {}).get(token)
        if upload is None:
            raise ServiceError(
                "this upload address is not, or no longer, valid: ask for another",
                code=Code.PERMISSION_DENIED,
            )
        size, data = upload["size"], bytearray()
        async for chunk in chunks:
            data += chunk
            if len(data) > size:
                break
        if len(data) != size:
            more = "more" if len(data) > size else str(len(data))
            raise ServiceError(f"{upload['file']}: {more} bytes, and filenameToSize said {size}")
        self._parts(name).mkdir(exist_ok=True)
        await asyncio.to_thread(write_whole, self._parts(name) / token, memoryview(data))

    async def validate_upload(self, call: Call) -> dict[str, Any]:
        fields.read_fields(call.body, {"name": str}, "the request")
        row = self._row(call.name)
        if row["state"] == "READY":
            return {}
        uploads = row.get("_uploads", {})
        parts = [self._parts(call.name) / token for token in uploads]
        missing = [
            upload["file"]
            for part, upload in zip(parts, uploads.values(), strict=True)
            if not part.is_file()
        ]
        if missing or not parts:
            raise resources.wrong_state(
                f"{call.name}: nothing was uploaded of {', '.join(missing) or 'any file'}"
            )
        data = await asyncio.to_thread(_joined, parts)
        await self._finish(call.name, data)
        shutil.rmtree(self._parts(call.name), ignore_errors=True)
        return {}

    async def get_download_endpoint(self, call: Call) -> dict[str, Any]:
        row = self._row(call.name)
        if row["state"] != "READY":
            raise resources.wrong_state(f"{call.name} is {row['state']}: it has no file yet")
        if "_download" not in row:
            row["_download"] = secrets.token_urlsafe(24)
            self._store.put(KIND, call.name, row)
        key = names.last(call.name)
        url = f"{call.base_url}/downloads/{key}/{row['_download']}"
        return {"filenameToSignedUrls": {f"{key}.jsonl": url}}

    def file(self, key: str, token: str) -> Path:
        """What lies at an address that `get_download_endpoint` gave; the address is the secret.

        Raises:
            ServiceError: it gave no such address, or the data set was deleted.
        """
        name = f"{names.ACCOUNT}/{KIND}/{key}"
        if (self._store.get(KIND, name) or {}).get("_download") != token:
            raise ServiceError(
                "this download address is not, or no longer, valid: ask for another",
                code=Code.PERMISSION_DENIED,
            )
        return self._path(name)

    async def upload(self, name: str, file: str, data: bytes) -> dict[str, Any]:
        """All of a data set in one request."""
        row = self._row(name)
        if len(data) > MAX_UPLOAD_BYTES:
            raise ServiceError(
                f"{file} has {len(data)} bytes, and :upload takes {MAX_UPLOAD_BYTES}: use "
                ":getUploadEndpoint"
            )
        if row["state"] != "READY":
            await self._finish(name, data)
        elif row["_sha256"] != await asyncio.to_thread(_digest, data):
            raise resources.wrong_state(
                f"{name} is READY, and cannot be changed: delete it, or make another"
            )
        return {"id": names.last(name), "bytes": len(data), "filename": file, "object": "file"}

    def lines(self, name: str) -> list[dict[str, Any]]:
        """The rows of a data set that is READY. Blocks."""
        return [row for _, row in _rows(self._path(name).read_bytes())]

    async def _finish(self, name: str, data: bytes) -> None:
        """Check the lines and make the data set READY, or say in its `status` why it is not."""
        async with self._finishing:
            await self._make_ready(name, data)

    async def _make_ready(self, name: str, data: bytes) -> None:
        declared = self._uploading(name)["_declared"]
        try:
            found, count = await asyncio.to_thread(_check, data, declared)
            digest = await asyncio.to_thread(_digest, data)
        except ServiceError as error:
            row = self._uploading(name)
            row["status"] = {"code": "INVALID_ARGUMENT", "message": str(error)}
            self._store.put(KIND, name, row)
            self._say(f"dataset {names.last(name)}: refused, {error}")
            raise
        await asyncio.to_thread(write_whole, self._path(name), data)
        row = self._uploading(name)
        row.pop("status", None)
        row.pop("_uploads", None)
        row |= {
            "state": "READY", "format": found, "exampleCount": str(count),
            "updateTime": names.now(), "_sha256": digest,
        }  # fmt: skip
        self._store.put(KIND, name, row)
        self._say(f"dataset {names.last(name)}: READY, {count} rows, {found}")

    def _row(self, name: str) -> Resource:
        row = self._store.get(KIND, name)
        if row is None:
            raise ServiceError.not_found(name)
        return row

    def _uploading(self, name: str) -> Resource:
        row = self._row(name)
        if row["state"] != "UPLOADING":
            raise resources.wrong_state(f"{name} is {row['state']}: its files are there already")
        return row

    def _user(self, name: str) -> Resource | None:
        """A job that reads the data set, or is about to."""
        for job in self._store.list("rlorTrainerJobs"):
            under_way = job["state"] in _UNDER_WAY and not job.get("serviceMode")
            if under_way and name in (job.get("dataset"), job.get("evaluationDataset")):
                return job
        return None

    def _path(self, name: str) -> Path:
        return self._folder / f"{names.last(name)}.jsonl"

    def _parts(self, name: str) -> Path:
        return self._folder / f"{names.last(name)}.parts"


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _joined(parts: Sequence[Path]) -> bytes:
    """Files one after the other, each ending its last line; one file as it is."""
    if len(parts) == 1:
        return parts[0].read_bytes()
    return b"".join(part.read_bytes().rstrip(b"\n") + b"\n" for part in parts)


def _rows(data: bytes) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number of the line, row) of every line that is not blank."""
    for number, line in enumerate(data.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            row = msgspec.json.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ServiceError(f"line {number} is no JSON: {error}") from None
        if not isinstance(row, dict):
            raise ServiceError(f"line {number} is no object")
        yield number, row


def _check(data: bytes, declared: dict[str, Any]) -> tuple[str, int]:
    """The format of the lines and how many there are.

    Raises:
        ServiceError: a line is of no format, or of another than those before it or than was
            declared; or there are more or fewer lines than was declared.
    """
    first = None if declared["format"] == _UNSPECIFIED else declared["format"]
    count = 0
    for number, row in _rows(data):
        found = row_format(row)
        if found is None:
            raise ServiceError(
                f"line {number} is of no known format: it has {', '.join(sorted(row)) or 'nothing'}"
                ", and RL rows have samples, CHAT rows messages, COMPLETION rows prompt and "
                "completion"
            )
        first = first or found
        if found != first:
            raise ServiceError(f"line {number} is of format {found}, not {first}")
        if problem := _PROBLEMS[found](row):
            raise ServiceError(f"line {number}: {problem}")
        count += 1
    if first is None or not count:
        raise ServiceError("the data set has no rows")
    if declared["count"] not in (0, count):
        raise ServiceError(f"{count} rows, and exampleCount said {declared['count']}")
    return str(first), count


def row_format(row: dict[str, Any]) -> str | None:
    """The format that a row is of, by its fields."""
    if "samples" in row:
        return "RL"
    if "messages" in row:
        return "CHAT"
    if "prompt" in row and "completion" in row:
        return "COMPLETION"
    return None


def _samples_problem(row: dict[str, Any]) -> str | None:
    samples = row["samples"]
    if not isinstance(samples, list) or not samples:
        return "samples must be a list, not empty"
    for i, sample in enumerate(samples):
        if not isinstance(sample, dict):
            return f"samples[{i}] is no object"
        if problem := _messages_problem(sample):
            return f"samples[{i}]: {problem}"
        if not any(message["role"] == "assistant" for message in sample["messages"]):
            return f"samples[{i}]: no message is of the assistant: there is nothing to train"
        evals = sample.get("evals")
        if not isinstance(evals, dict) or not evals:
            return f"samples[{i}]: evals must be an object of scores by name"
        for name, value in evals.items():
            number = not isinstance(value, bool) and isinstance(value, int | float)
            if not number or abs(value) > _LARGEST_SCORE:
                return f"samples[{i}]: evals[{name!r}] is {str(value)[:80]!r}, not a number"
    return None


def _messages_problem(row: dict[str, Any]) -> str | None:
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        return "messages must be a list, not empty"
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            return f"messages[{i}] must be an object with a role"
        if not isinstance(message.get("content"), str | list | None):
            return f"messages[{i}]: content must be text or a list of parts"
    return None


def _completion_problem(row: dict[str, Any]) -> str | None:
    if not isinstance(row["prompt"], str) or not isinstance(row["completion"], str):
        return "prompt and completion must be text"
    return None


_PROBLEMS: dict[str, Callable[[dict[str, Any]], str | None]] = {
    "RL": _samples_problem,
    "CHAT": _messages_problem,
    "COMPLETION": _completion_problem,
}
