"""The control plane over gRPC: the bytes that fireworks-ai 0.19.20 sends are answered as their HTTP
counterparts are."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import sys
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("grpc", reason="gRPC needs the extra: pip install 'eval-protocol-rft[grpc]'")

import grpc
import grpc.aio
import httpx
from google.protobuf import json_format

from eval_protocol_rft.local.server import ServeError
from eval_protocol_rft.loop.service._command import _grpc_address
from eval_protocol_rft.loop.service._errors import Code, ServiceError
from eval_protocol_rft.loop.service._requests import FILE, RequestLog
from eval_protocol_rft.loop.service.control._control import UnknownEndpointError
from eval_protocol_rft.loop.service.grpc import serve_grpc
from eval_protocol_rft.loop.service.grpc._messages import message_class
from eval_protocol_rft.loop.service.grpc._transcoding import METHODS
from tests.loop.service.text_rows import sums_rows, to_jsonl
from tests.service import fireworks_service

GRPC = "eval_protocol_rft.loop.service.grpc"
ACCOUNT = "accounts/acc"
DEPLOYMENT = f"{ACCOUNT}/deployments/older"
BASE = "accounts/fireworks/models/arithmetic"
DATASET = f"{ACCOUNT}/datasets/dataset-1164761322-inmemory-jsonl"


class Recorder:
    """Stands for the control plane: notes what it is asked, and answers what it was given."""

    def __init__(self, answer: dict[str, Any] | Exception | None = None) -> None:
        self.answer = answer or {}
        self.calls: list[tuple[str, str, dict[str, str], dict[str, Any] | None]] = []

    async def __call__(
        self, method: str, path: str, query: Mapping[str, str], body: dict[str, Any] | None, /
    ) -> dict[str, Any]:
        self.calls.append((method, path, dict(query), body))
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@contextlib.asynccontextmanager
async def gateway(control: Recorder, **options: Any) -> AsyncIterator[grpc.aio.Channel]:
    server = await serve_grpc(control, **options)
    try:
        async with grpc.aio.insecure_channel(server.address) as channel:
            yield channel
    finally:
        await server.aclose()


async def ask(
    channel: grpc.aio.Channel, name: str, request: bytes | dict[str, Any] = b"", **metadata: str
) -> dict[str, Any]:
    """The reply in JSON; `request` in JSON or as the wire's bytes."""
    if isinstance(request, dict):
        request = encoded(f"{name}Request", request)
    call = channel.unary_unary(f"/gateway.Gateway/{name}")
    reply = await call(request, metadata=[(k.replace("_", "-"), v) for k, v in metadata.items()])
    message = message_class(METHODS[name].reply).FromString(reply)
    return dict(json_format.MessageToDict(message))


def encoded(message: str, value: dict[str, Any]) -> bytes:
    return bytes(json_format.ParseDict(value, message_class(message)()).SerializeToString())


RECORDED = {
    "ListModels": (
        "0a126163636f756e74732f66697265776f726b7310c8013001",
        ("GET", "/v1/accounts/fireworks/models",
         {"pageSize": "200", "includeDeployedModelRefs": "true"}, None),
    ),
    "GetModel": (
        "0a166163636f756e74732f6163632f6d6f64656c732f6d31",
        ("GET", f"/v1/{ACCOUNT}/models/m1", {}, None),
    ),
    "GetDeployment": (
        "0a1e6163636f756e74732f6163632f6465706c6f796d656e74732f6f6c646572",
        ("GET", f"/v1/{DEPLOYMENT}", {}, None),
    ),
    "CreateDeployment": (
        "0a0c6163636f756e74732f616363125312067265632e70799201246163636f756e74732f66697265776f726b"
        "732f6d6f64656c732f61726974686d65746963b2020d0a0308ac021202083c1a020801d80207880301820406"
        "0a0161120162a2040208013a056f6c646572",
        ("POST", f"/v1/{ACCOUNT}/deployments", {"deploymentId": "older"}, {
            "displayName": "rec.py", "baseModel": BASE, "acceleratorType": "NVIDIA_H200_141GB",
            "enableAddons": True, "annotations": {"a": "b"}, "placement": {"region": "US_IOWA_1"},
            "autoscalingPolicy": {
                "scaleUpWindow": "1s", "scaleDownWindow": "60s", "scaleToZeroWindow": "300s",
            },
        }),
    ),
    "UpdateDeployment": (
        "0a7b0a1e6163636f756e74732f6163632f6465706c6f796d656e74732f6f6c64657212067265632e70792802"
        "9201246163636f756e74732f66697265776f726b732f6d6f64656c732f61726974686d65746963980201b202"
        "0d0a0308ac021202083c1a020801d802078803019803018204060a0161120162a20402080112080a06726567"
        "696f6e",
        ("PATCH", f"/v1/{DEPLOYMENT}", {"updateMask": "region"}, {"region": "US_IOWA_1"}),
    ),
    "ScaleDeployment": (  # to no replica: the wire has no zero
        "0a1e6163636f756e74732f6163632f6465706c6f796d656e74732f6f6c646572",
        ("PATCH", f"/v1/{DEPLOYMENT}:scale", {}, {"replicaCount": 0}),
    ),
    "ListDatasets": (
        "0a0c6163636f756e74732f616363", ("GET", f"/v1/{ACCOUNT}/datasets", {}, None),
    ),
    "CreateDataset": (
        "0a0c6163636f756e74732f616363120238011a21646174617365742d313136343736313332322d696e6d656d"
        "6f72792d6a736f6e6c",
        ("POST", f"/v1/{ACCOUNT}/datasets", {}, {
            "dataset": {"exampleCount": "1"}, "datasetId": "dataset-1164761322-inmemory-jsonl",
        }),
    ),
    "GetDatasetUploadEndpoint": (
        "0a376163636f756e74732f6163632f64617461736574732f646174617365742d313136343736313332322d69"
        "6e6d656d6f72792d6a736f6e6c12130a0e696e6d656d6f72792e6a736f6e6c108201",
        ("POST", f"/v1/{DATASET}:getUploadEndpoint", {},
         {"filenameToSize": {"inmemory.jsonl": "130"}}),
    ),
    "ValidateDatasetUpload": (
        "0a376163636f756e74732f6163632f64617461736574732f646174617365742d313136343736313332322d69"
        "6e6d656d6f72792d6a736f6e6c",
        ("POST", f"/v1/{DATASET}:validateUpload", {}, {}),
    ),
    "CreateRlorTrainerJob": (
        "0a0c6163636f756e74732f616363128d012a376163636f756e74732f6163632f64617461736574732f646174"
        "617365742d313136343736313332322d696e6d656d6f72792d6a736f6e6c5a520a166163636f756e74732f61"
        "63632f6d6f64656c732f6d3112246163636f756e74732f66697265776f726b732f6d6f64656c732f61726974"
        "686d657469632d6f12033a308040381048075001600668808002",
        ("POST", f"/v1/{ACCOUNT}/rlorTrainerJobs", {}, {
            "dataset": DATASET,
            "trainingConfig": {
                "outputModel": f"{ACCOUNT}/models/m1", "baseModel": BASE, "learningRate": 0.0005,
                "maxContextLength": 8192, "loraRank": 16, "acceleratorType": "NVIDIA_H200_141GB",
                "acceleratorCount": 1, "epochs": 6, "batchSize": 32768,
            },
        }),
    ),
}  # fmt: skip
"""What the client sent, and the request over HTTP that says the same."""


@pytest.mark.parametrize("name", RECORDED)
async def test_recorded_requests_become_their_http_counterparts(name: str) -> None:
    sent, expected = RECORDED[name]
    control = Recorder()
    async with gateway(control) as channel:
        await ask(channel, name, bytes.fromhex(sent))
    assert control.calls == [expected]


@pytest.mark.parametrize("name", METHODS)
async def test_every_method_is_answered(name: str) -> None:
    fields = message_class(f"{name}Request").DESCRIPTOR.fields_by_name
    kind = METHODS[name].path.partition("accounts/*/")[2].partition("/")[0] or "deployments"
    value: dict[str, Any] = {"parent": ACCOUNT} if "parent" in fields else {}
    if "name" in fields:
        value["name"] = f"{ACCOUNT}/{kind}/x"
    if name == "UpdateDeployment":
        value["deployment"] = {"name": DEPLOYMENT}
    control = Recorder()
    async with gateway(control) as channel:
        assert await ask(channel, name, value) == {}
    assert len(control.calls) == (name != "ListServerlessLoraModels")


async def test_a_reply_holds_what_its_message_can_hold() -> None:
    deployment = {
        "name": DEPLOYMENT, "state": "READY", "replicaCount": 1, "baseModel": BASE,
        "createTime": "2026-11-30T18:00:00.123456Z", "annotations": {"a": "b"},
        "autoscalingPolicy": {"scaleUpWindow": "1s"},
    }  # fmt: skip
    newer = {"hotLoadTrainerJob": "accounts/acc/rlorTrainerJobs/j", "status": None}
    control = Recorder({"deployments": [{**deployment, **newer}], "nextPageToken": "t"})
    async with gateway(control) as channel:
        reply = await ask(channel, "ListDeployments", {"parent": ACCOUNT})
    assert reply == {"deployments": [deployment], "nextPageToken": "t"}


async def test_a_state_that_the_clients_do_not_know_is_no_other_state() -> None:
    control = Recorder({"name": "x", "state": "JOB_STATE_HAPPY"})
    async with gateway(control) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await ask(channel, "GetRlorTrainerJob", {"name": f"{ACCOUNT}/rlorTrainerJobs/x"})
    assert refused.value.code() == grpc.StatusCode.INTERNAL
    assert "JOB_STATE_HAPPY" in refused.value.details()


@pytest.mark.parametrize("code", Code)
async def test_refusals_keep_their_code_and_message(code: Code) -> None:
    control = Recorder(ServiceError("no, because", code=code))
    async with gateway(control) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await ask(channel, "GetModel", {"name": BASE})
    assert refused.value.code().value[0] == int(code)
    assert refused.value.details() == "no, because"


async def test_what_no_endpoint_answers_is_not_said_to_be_absent() -> None:
    control = Recorder(UnknownEndpointError("no endpoint: ...", code=Code.NOT_FOUND))
    async with gateway(control) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await ask(channel, "GetDatasetDownloadEndpoint", {"name": DATASET})
    assert refused.value.code() == grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize(
    ("name", "request_", "words"),
    [
        ("GetModel", b"\xff", "these bytes are no GetModelRequest"),
        # field 99 of the request, then of a message inside it
        ("GetModel", b"\x98\x06\x01", "GetModelRequest field 99"),
        ("CreateDeployment", b"\x12\x03\x98\x06\x01", "Deployment field 99"),
        ("CreateDataset", b"\x12\x02\x50\x09", "Dataset.format = 9"),
        ("GetModel", {"name": ""}, "name is '', not accounts/*/models/*"),
        ("GetModel", {"name": DEPLOYMENT}, f"name is '{DEPLOYMENT}', not accounts/*/models/*"),
        ("DeleteDataset", {"name": f"{DATASET}:validateUpload"}, "not accounts/*/datasets/*"),
        ("DeleteDataset", {"name": "accounts/../datasets/x/y"}, "not accounts/*/datasets/*"),
        (
            "UpdateDeployment",
            {"deployment": {"name": DEPLOYMENT}, "updateMask": "notAField"},
            "Deployment has no field 'not_a_field'",
        ),
    ],
)
async def test_what_cannot_be_understood_is_refused_by_name(
    name: str, request_: bytes | dict[str, Any], words: str
) -> None:
    control = Recorder()
    async with gateway(control) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await ask(channel, name, request_)
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert words in refused.value.details()
    assert control.calls == []


async def test_a_mask_sends_zeros_and_nothing_that_it_does_not_name() -> None:
    control = Recorder()
    async with gateway(control) as channel:
        await ask(
            channel,
            "UpdateDeployment",
            {
                "deployment": {"name": DEPLOYMENT, "displayName": "old", "maxReplicaCount": 2},
                "updateMask": "minReplicaCount,maxReplicaCount,annotations",
            },
        )
    ((_, path, query, body),) = control.calls
    assert (path, query["updateMask"]) == (
        f"/v1/{DEPLOYMENT}",
        "minReplicaCount,maxReplicaCount,annotations",
    )
    assert body == {"minReplicaCount": 0, "maxReplicaCount": 2, "annotations": {}}


async def test_a_key_is_asked_for_where_there_is_one() -> None:
    control = Recorder()
    request = {"name": BASE}
    async with gateway(control, api_key="right") as channel:
        for metadata in ({}, {"x_api_key": "mine"}, {"authorization": "Bearer mine"}):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await ask(channel, "GetModel", request, **metadata)
            assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED
            assert "mine" not in refused.value.details()
        assert control.calls == []
        await ask(channel, "GetModel", request, x_api_key="right")
        await ask(channel, "GetModel", request, authorization="Bearer right")
    assert len(control.calls) == 2


async def test_every_call_is_in_the_log_and_unknown_methods_are_loud(tmp_path: Path) -> None:
    shown: list[str] = []
    log = RequestLog(tmp_path, print_line=shown.append)
    async with gateway(Recorder(), log=log) as channel:
        await ask(channel, "GetModel", {"name": BASE})
        for path in ("/gateway.Gateway/CreateUser", "/other.Service/GetModel"):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await channel.unary_unary(path)(b"\x01\x02")
            assert refused.value.code() == grpc.StatusCode.UNIMPLEMENTED
            assert path in refused.value.details()
    log.close()
    entries = [json.loads(line) for line in (tmp_path / FILE).read_text().splitlines()]
    assert [(e["path"], e["query"], e["status"], e["unanswered"]) for e in entries] == [
        ("/gateway.Gateway/GetModel", f"name={BASE}", 200, False),
        ("/gateway.Gateway/CreateUser", "", 501, True),
        ("/other.Service/GetModel", "", 501, True),
    ]
    assert all(e["method"] == "gRPC" and "grpc-python" in e["user_agent"] for e in entries)
    assert [line.partition("/")[0] for line in shown] == ["NOTHING HERE ANSWERS gRPC "] * 2


async def test_a_fault_of_the_control_plane_costs_one_call() -> None:
    control = Recorder(KeyError("lost"))
    async with gateway(control) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await ask(channel, "GetModel", {"name": BASE})
        assert refused.value.code() == grpc.StatusCode.INTERNAL
        control.answer = {"name": BASE}
        assert await ask(channel, "GetModel", {"name": BASE}) == {"name": BASE}


async def test_calls_do_not_wait_for_each_other() -> None:
    here = asyncio.Event()

    class Waits(Recorder):
        async def __call__(self, *call: Any) -> dict[str, Any]:
            if "first" in call[1]:
                await here.wait()
            else:
                here.set()
            return {}

    async with gateway(Waits()) as channel:
        names = [f"{ACCOUNT}/models/{name}" for name in ("first", "second")]
        await asyncio.gather(*(ask(channel, "GetModel", {"name": name}) for name in names))


async def test_an_address_that_clients_cannot_use_is_refused() -> None:
    server = await serve_grpc(Recorder())
    try:
        with pytest.raises(OSError, match=f"cannot listen on {server.address}"):
            await serve_grpc(Recorder(), port=server.port)
    finally:
        await server.aclose()
    for options in ({"host": "::1"}, {"port": 443}):
        with pytest.raises(ValueError, match="split the address"):
            await serve_grpc(Recorder(), **options)


def test_the_command_takes_the_next_port_or_another_and_says_which() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ServeError, match=r"--grpc-port: cannot listen .* with --grpc-port"):
            _grpc_address("127.0.0.1", port, 1)
        at = _grpc_address("127.0.0.1", None, port)
        assert at is not None
        assert at[1] not in (0, port)
    assert _grpc_address("127.0.0.1", None, port) == ("127.0.0.1", port)
    # Those clients split an address at its colon.
    assert _grpc_address("::1", port, 1) == ("127.0.0.1", port)


def test_without_the_extra_there_is_no_grpc_unless_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in [name for name in sys.modules if name.startswith(GRPC)]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "grpc", None)
    assert _grpc_address("127.0.0.1", None, 1) is None
    with pytest.raises(ServeError, match=r"pip install 'eval-protocol-rft\[grpc\]'"):
        _grpc_address("127.0.0.1", 0, 1)


async def test_a_step_of_the_loop_against_the_real_control_plane(tmp_path: Path) -> None:
    """In the order of `LLM.apply`, `Dataset.sync`, `reinforcement_step` and `delete`."""
    data = to_jsonl(sums_rows(3))
    with fireworks_service(tmp_path, grpc=True) as server:
        assert server.service.grpc is not None
        async with grpc.aio.insecure_channel(server.service.grpc.address) as channel:
            (base,) = (await ask(channel, "ListModels", {"parent": "accounts/fireworks"}))["models"]
            assert base["name"] == BASE
            assert await absent(channel, "GetDeployment", DEPLOYMENT)
            create = bytes.fromhex(RECORDED["CreateDeployment"][0])
            assert (await ask(channel, "CreateDeployment", create))["state"] == "READY"
            deployment = await ask(channel, "GetDeployment", {"name": DEPLOYMENT})
            assert deployment["replicaCount"] == 1  # else the client waits
            assert deployment["autoscalingPolicy"]["scaleToZeroWindow"] == "300s"

            create = {"parent": ACCOUNT, "datasetId": "d", "dataset": {"exampleCount": 3}}
            await ask(channel, "CreateDataset", create)
            dataset = f"{ACCOUNT}/datasets/d"
            sizes = {"name": dataset, "filenameToSize": {"inmemory.jsonl": len(data)}}
            urls = await ask(channel, "GetDatasetUploadEndpoint", sizes)
            url = urls["filenameToSignedUrls"]["inmemory.jsonl"]
            assert url.startswith(server.url)
            async with httpx.AsyncClient() as http:
                assert (await http.put(url, content=data)).status_code == 200
            await ask(channel, "ValidateDatasetUpload", {"name": dataset})
            (listed,) = (await ask(channel, "ListDatasets", {"parent": ACCOUNT}))["datasets"]
            assert (listed["state"], listed["format"]) == ("READY", "RL")

            model = f"{ACCOUNT}/models/m1"
            assert await absent(channel, "GetModel", model)
            config = {"baseModel": BASE, "outputModel": model, "loraRank": 4, "epochs": 1}
            step = {"dataset": dataset, "trainingConfig": {**config, "learningRate": 1e-4}}
            job = await ask(
                channel, "CreateRlorTrainerJob", {"parent": ACCOUNT, "rlorTrainerJob": step}
            )
            while job["state"] != "JOB_STATE_COMPLETED":
                assert job["state"] in ("JOB_STATE_PENDING", "JOB_STATE_RUNNING"), job
                job = await ask(channel, "GetRlorTrainerJob", {"name": job["name"]})
            trained = await ask(channel, "GetModel", {"name": job["trainingConfig"]["outputModel"]})
            assert trained["kind"] == "HF_PEFT_ADDON"
            assert trained["peftDetails"]["baseModel"] == BASE

            adapter = {"model": model, "deployment": DEPLOYMENT, "displayName": "d"}
            made = await ask(
                channel, "CreateDeployedModel", {"parent": ACCOUNT, "deployedModel": adapter}
            )
            wanted = {"parent": ACCOUNT, "filter": f'model="{model}"'}
            (found,) = (await ask(channel, "ListDeployedModels", wanted))["deployedModels"]
            assert (found["name"], found["state"]) == (made["name"], "DEPLOYED")
            for name, resource in (
                ("DeployedModel", made["name"]),
                ("Deployment", DEPLOYMENT),
                ("Dataset", dataset),
                ("RlorTrainerJob", job["name"]),
            ):
                await ask(channel, f"Delete{name}", {"name": resource})
            assert await ask(channel, "ListDatasets", {"parent": ACCOUNT}) == {}
            assert await absent(channel, "GetDeployedModel", made["name"])
            gone = await ask(channel, "GetRlorTrainerJob", {"name": job["name"]})
            assert gone["state"] == "JOB_STATE_DELETING"


async def absent(channel: grpc.aio.Channel, name: str, resource: str) -> bool:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await ask(channel, name, {"name": resource})
    return refused.value.code() == grpc.StatusCode.NOT_FOUND
