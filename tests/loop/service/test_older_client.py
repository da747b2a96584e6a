"""fireworks-ai 0.19.20 itself, in its own environment, against the local Fireworks."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("grpc", reason="gRPC needs the extra: pip install 'eval-protocol-rft[grpc]'")

from google.protobuf import descriptor_pb2

from eval_protocol_rft.loop.service._requests import FILE
from eval_protocol_rft.loop.service.grpc._messages import message_class
from tests.service import KEY, fireworks_service

OLDER_CLIENT = os.environ.get("EP_RFT_OLDER_CLIENT", "")
pytestmark = [
    pytest.mark.older_client,
    pytest.mark.skipif(
        not OLDER_CLIENT, reason="EP_RFT_OLDER_CLIENT names no Python with fireworks-ai 0.19.20"
    ),
]
THEIR_FIELDS = """
import json
from fireworks.control_plane.generated.protos_grpcio.gateway import gateway_pb2
from google.protobuf import descriptor_pb2
from google.protobuf.descriptor_pool import Default
files, todo = {}, [gateway_pb2.DESCRIPTOR]
while todo:
    file = todo.pop()
    if file.name not in files:
        proto = descriptor_pb2.FileDescriptorProto()
        file.CopyToProto(proto)
        files[file.name] = proto.SerializeToString().hex() if file.package == "gateway" else ""
        todo += file.dependencies
print(json.dumps(files))
"""


def test_names_numbers_and_types_are_those_of_the_client() -> None:
    files = subprocess.run(
        [OLDER_CLIENT, "-c", THEIR_FIELDS], capture_output=True, text=True, check=True
    )
    theirs: dict[str, Any] = {}
    for data in json.loads(files.stdout).values():
        theirs |= wire_facts(descriptor_pb2.FileDescriptorProto.FromString(bytes.fromhex(data)))
    ours = descriptor_pb2.FileDescriptorProto()
    message_class("Model").DESCRIPTOR.file.CopyToProto(ours)
    facts = wire_facts(ours)
    assert len(facts) > 300
    assert facts.items() <= theirs.items()


def wire_facts(file: Any) -> dict[str, Any]:
    """What is on the wire, by name: the number of each enum's value, and of each field its number,
    whether it is repeated, and its type."""
    facts: dict[str, Any] = {}

    def read(scope: str, holder: Any, messages: Any) -> None:
        for enum in holder.enum_type:
            facts.update({f"{scope}.{enum.name}.{v.name}": v.number for v in enum.value})
        for message in messages:
            name = f"{scope}.{message.name}"
            for field in message.field:
                kind = field.type_name.lstrip(".") or field.type
                facts[f"{name}.{field.name}"] = (field.number, field.label, kind)
            read(name, message, message.nested_type)

    read("", file, file.message_type)
    return facts


def test_the_older_client_goes_through_its_loop(tmp_path: Path) -> None:
    script = Path(__file__).parents[3] / "scripts" / "older_client.py"
    few = "--steps 2 --prompts 8 --completions 4 --epochs 1"
    with fireworks_service(tmp_path, grpc=True) as server:
        assert server.service.grpc is not None
        environment = os.environ | {
            "FIREWORKS_API_BASE_URL": server.url,
            "FIREWORKS_GATEWAY_ADDR": server.service.grpc.address,
            "FIREWORKS_API_KEY": KEY,
        }
        run = subprocess.run(
            [OLDER_CLIENT, script, *few.split()],
            env=environment,
            capture_output=True,
            text=True,
            check=False,  # two steps need not learn
        )
    assert "data sets made 2, left 0" in run.stdout, run.stdout + run.stderr
    entries = [json.loads(line) for line in (tmp_path / FILE).read_text().splitlines()]
    chats = [e for e in entries if e["path"].endswith("/chat/completions")]
    assert [e["status"] for e in chats] == [200] * (3 * 8 * 4)
    assert [e for e in entries if e["unanswered"] or e["status"] not in (200, 404)] == []
