"""What Eval Protocol's tracing proxy offers, by a gateway: addresses, keys, status, traces."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import json
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
import pytest
from aiohttp.test_utils import make_mocked_request
from eval_protocol.models import EvaluationRow, Status
from eval_protocol.pytest.tracing_utils import (
    build_fireworks_tracing_url,
    default_fireworks_output_data_loader,
    update_row_with_remote_trace,
)
from eval_protocol.tracing.router_replay import decode_router_replay
from eval_protocol.types.remote_rollout_processor import RolloutMetadata

from eval_protocol_rft.episodes._conversation import Conversation
from eval_protocol_rft.episodes.gateway import Gateway, SessionSettings
from eval_protocol_rft.episodes.gateway import _tracing as tracing
from eval_protocol_rft.episodes.gateway._call import CallError
from eval_protocol_rft.episodes.gateway._tracing import RolloutStore
from eval_protocol_rft.episodes.gateway._tracing_routes import TracingRoutes
from eval_protocol_rft.record import RecordError, RolloutRecord
from eval_protocol_rft.rollout import fetch_payloads, read_remote_rows
from eval_protocol_rft.sampling import SamplingParams
from tests.remote_rows import ASKED, TOKENIZER, asked_row, said
from tests.serving import ScriptedSampler

IDS = {
    "rollout_id": "rollout-1",
    "invocation_id": "invocation-1",
    "experiment_id": "experiment-1",
    "run_id": "run-1",
    "row_id": "row-1",
}


class Client:
    """Eval Protocol's side, and the agent's."""

    def __init__(self, gateway: Gateway, http: aiohttp.ClientSession) -> None:
        self.gateway, self.http = gateway, http
        self.key = gateway.api_key

    async def get(self, path: str, *, key: str | None = None, **params: Any) -> Any:
        headers = {"authorization": f"Bearer {key or self.key}"}
        async with self.http.get(self.gateway.url + path, params=params, headers=headers) as reply:
            return reply.status, await reply.json()

    async def post(self, path: str, body: Any, *, key: str | None = None) -> Any:
        headers = {"authorization": f"Bearer {key or self.key}"}
        async with self.http.post(self.gateway.url + path, json=body, headers=headers) as reply:
            return reply.status, await reply.json()

    async def call(
        self,
        *messages: dict[str, Any],
        ids: dict[str, str] = IDS,
        before: str = "",
        after: str = "",
    ) -> dict[str, Any]:
        """A model call of a rollout's agent; what it is answered."""
        path = f"{before}{path_of(ids)}{after}/chat/completions"
        status, reply = await self.post(path, {"model": "m", "messages": list(messages)})
        assert status == 200, reply
        return reply["choices"][0]["message"]

    async def log(
        self, code: int | None, message: str = "-", *rollouts: str, **extras: Any
    ) -> None:
        tags = [f"rollout_id:{one}" for one in rollouts or ("rollout-1",)]
        status = None if code is None else {"code": code, "message": message, "details": []}
        body = {"program": "eval_protocol", "message": message, "tags": tags, "status": status}
        assert (await self.post("/logs", {**body, "extras": extras}))[0] == 200

    async def status(self, rollout_id: str = "rollout-1") -> Any:
        status, reply = await self.get("/v1/status", rollout_id=rollout_id)
        assert (status, reply["rollout_id"]) == (200, rollout_id)
        return reply["status"] and reply["status"]["code"]

    async def logs(self, rollout_id: str = "rollout-1") -> list[dict[str, Any]]:
        status, reply = await self.get(
            "/logs", tags=f"rollout_id:{rollout_id}", limit=100, hours_back=24
        )
        assert status == 200
        return reply["entries"]

    async def traces(self, tag: str = "rollout_id:rollout-1") -> list[dict[str, Any]]:
        status, reply = await self.get("/v1/traces/pointwise", tags=tag, limit=100)
        assert (status, reply["total_traces"]) == (200, len(reply["traces"]))
        return reply["traces"]


def path_of(ids: dict[str, str]) -> str:
    return "".join(f"/{name}/{value}" for name, value in ids.items())


def with_gateway(
    work: Callable[[Client], Awaitable[None]],
    *,
    replies: list[str] | None = None,
    script: Callable[..., Any] | None = None,
    **options: Any,
) -> None:
    """Run against a gateway whose model answers with `replies`, in order, and then with 42."""
    left = list(replies or ())
    script = script or (lambda *_: said(left.pop(0) if left else "42"))

    async def run() -> None:
        sampler = ScriptedSampler(script)
        async with (
            Gateway(sampler, TOKENIZER, tracing=True, **options) as gateway,
            aiohttp.ClientSession() as http,
        ):
            await work(Client(gateway, http))

    asyncio.run(run())


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def test_a_rollout_that_nothing_is_known_of_has_no_status_no_logs_and_no_traces():
    async def work(client: Client) -> None:
        assert await client.status() is None
        assert await client.logs() == []
        assert await client.traces() == []

    with_gateway(work)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", ""),
        ("/v1", ""),
        ("/", ""),  # a base URL that ends in a slash
        ("/project_id/p", ""),
        ("/v1/project_id/p", ""),
        ("", "/encoded_base_url/" + base64.urlsafe_b64encode(b"http://x/v1").decode()),
        ("", "/v1"),  # a client that adds it
    ],
)
def test_a_call_under_any_of_the_addresses_is_the_rollouts(before: str, after: str):
    async def work(client: Client) -> None:
        ids = {**IDS, "row_id": "a/b c"}  # which are not escaped
        assert (await client.call(*ASKED, ids=ids, before=before, after=after))["content"] == "42"
        (trace,) = await client.traces()
        assert trace["tags"] == [f"{name}:{value}" for name, value in ids.items()]

    with_gateway(work)


def test_the_address_that_eval_protocol_builds_is_served():
    metadata = RolloutMetadata(**IDS)

    async def work(client: Client) -> None:
        for base in (None, "http://model:8000/v1"):
            url = build_fireworks_tracing_url(client.gateway.url, metadata, base)
            path = url.removeprefix(client.gateway.url)
            status, _ = await client.post(
                f"{path}/chat/completions", {"model": "m", "messages": [user("?")]}
            )
            assert status == 200

    with_gateway(work)


def test_calls_and_traces_need_the_key_and_status_and_logs_do_not_on_loopback():
    async def work(client: Client) -> None:
        call = path_of(IDS) + "/chat/completions"
        other = client.gateway.session().api_key
        for key in ("None", other):
            status, reply = await client.post(call, {"model": "m", "messages": []}, key=key)
            assert status == 401
            assert "EP_REMOTE_API_KEY" in reply["error"]["message"]
            assert (await client.get("/v1/traces/pointwise", tags="x:y", key=key))[0] == 401
            assert (await client.get("/v1/status", rollout_id="x", key=key))[0] == 200
            assert (await client.get("/logs", tags="rollout_id:x", key=key))[0] == 200

    with_gateway(work)


def test_elsewhere_status_and_logs_need_it_too():
    routes = TracingRoutes(
        begin=lambda *_: None, tell=lambda _: {}, is_own_key=lambda request: False, is_open=False
    )
    request = make_mocked_request("GET", "/v1/status?rollout_id=x")
    for handler in (routes._status, routes._logs, routes._log, routes._traces):
        with pytest.raises(CallError) as refused:
            asyncio.run(handler(request))
        assert refused.value.status == 401


def test_a_gateway_that_was_not_asked_to_offers_none_of_it():
    async def run() -> None:
        async with (
            Gateway(ScriptedSampler(lambda *_: said("42")), TOKENIZER) as gateway,
            aiohttp.ClientSession() as http,
        ):
            client = Client(gateway, http)
            assert (await client.get("/v1/status", rollout_id="x"))[0] == 404
            assert (await client.post(path_of(IDS) + "/chat/completions", {}))[0] == 404

    asyncio.run(run())


def test_traces_are_the_calls_on_the_path_of_the_last_answer_and_no_others():
    async def work(client: Client) -> None:
        await client.call(*ASKED)  # its answer is lost on the way, the agent asks again
        kept = await client.call(*ASKED)
        await client.call({"role": "system", "content": "B"}, user("a sub-agent's"))
        history = [*ASKED, kept, user("Sure?")]
        last = await client.call(*history)
        first, second = await client.traces()
        assert first["input"]["messages"] == ASKED
        assert first["output"]["content"] == kept["content"] == "two"
        assert [m["content"] for m in second["input"]["messages"]] == [
            m["content"] for m in history
        ]
        assert second["output"]["content"] == last["content"] == "four"
        assert set(second["payloads"]) == {"prompt_token_ids", "logprobs"}
        assert second["timestamp"] > first["timestamp"]

    with_gateway(work, replies=["one", "two", "three", "four"])


def test_routing_that_the_engine_tells_is_in_payloads_and_segments():
    def routed(*_: Any) -> Any:
        completion = said("42")
        matrices = ["AQ==" for _ in completion.token_ids]
        return dataclasses.replace(completion, routing_matrices=matrices)

    async def work(client: Client) -> None:
        answer = await client.call(*ASKED)
        await client.call(*ASKED, answer, user("Sure?"))
        assert client.gateway._tracing is not None
        session = client.gateway._tracing.store._rollouts["rollout-1"].session
        assert session is not None
        (segment,) = session.record().segments
        assert segment.routing_matrices == ["AQ==" if m else "" for m in segment.loss_mask]
        for trace in await client.traces():
            payload = trace["payloads"]["router_replay"]
            matrices = decode_router_replay(payload["data"]).value
            sampled = len(said("42").token_ids)
            assert matrices == [None] * (len(matrices) - sampled) + ["AQ=="] * sampled

    with_gateway(work, script=routed)


def brought_back(client: Client, *, include_payloads: bool = True) -> EvaluationRow:
    """What Eval Protocol makes of it; without payloads as `GithubActionRolloutProcessor` asks."""
    row = asked_row()
    row.execution_metadata.rollout_id = "rollout-1"
    update_row_with_remote_trace(
        row,
        default_fireworks_output_data_loader,
        client.gateway.url,
        include_payloads=include_payloads,
    )
    row.rollout_status = Status.rollout_finished()
    return row


def test_rows_without_payloads_asked_for_train_where_they_have_one_turn(
    monkeypatch: pytest.MonkeyPatch,
):
    async def work(client: Client) -> None:
        monkeypatch.setenv("EP_REMOTE_API_KEY", client.key)
        answer = await client.call(*ASKED)
        row = await asyncio.to_thread(brought_back, client, include_payloads=False)
        (read,) = read_remote_rows([row], tokenizer=TOKENIZER)
        talk = Conversation.start(ASKED, None, TOKENIZER)
        talk.sampled(said("42"))
        record = RolloutRecord.from_extra(read.execution_metadata.extra)
        assert record.trajectories == [talk.segments()]
        await client.call(*ASKED, answer, user("Sure?"))
        row = await asyncio.to_thread(brought_back, client, include_payloads=False)
        with pytest.raises(RecordError, match="turn 0, an assistant message, has no payload"):
            list(read_remote_rows([row], tokenizer=TOKENIZER))

    with_gateway(work)


def test_rows_whose_processor_asked_for_no_payloads_can_have_them_later(
    monkeypatch: pytest.MonkeyPatch,
):
    async def work(client: Client) -> None:
        monkeypatch.setenv("EP_REMOTE_API_KEY", client.key)
        monkeypatch.setenv("EP_MODEL_BASE_URL", client.gateway.url)
        answer = await client.call(*ASKED)
        await client.call(*ASKED, answer, user("Sure?"))
        row = await asyncio.to_thread(brought_back, client, include_payloads=False)
        fetched = await asyncio.to_thread(lambda: list(fetch_payloads([row])))
        (read,) = read_remote_rows(fetched, tokenizer=TOKENIZER)
        record = RolloutRecord.from_extra(read.execution_metadata.extra)
        assert record.sampled_counts == [6]

    with_gateway(work)


def test_a_status_is_handed_out_until_it_ends_and_its_log_tells_why():
    async def work(client: Client) -> None:
        await client.call(*ASKED)
        await client.log(None, "begun")
        assert await client.status() is None
        await client.log(101, "under way")
        assert await client.status() == 101
        await client.log(100, "done", reward_hint=0.5)
        for _ in range(2):
            assert await client.status() == 100
            done, under_way, begun = await client.logs()
            assert [done["message"], under_way["message"], begun["message"]] == [
                "done", "under way", "begun",
            ]  # fmt: skip
            assert done["status"] == {"code": 100, "message": "done", "details": []}
            assert done["extras"]["reward_hint"] == 0.5
            assert done["extras"]["gateway"]["calls"] == 1
            assert "gateway" not in under_way["extras"]
        assert len(await client.traces()) == 1

    with_gateway(work)


def test_a_log_for_several_rollouts_is_each_ones_own():
    async def work(client: Client) -> None:
        await client.log(100, "all", "a", "b")
        for one in "ab":
            assert await client.status(one) == 100
            assert [entry["message"] for entry in await client.logs(one)] == ["all"]
        assert await client.logs("c") == []

    with_gateway(work)


def test_a_rollout_that_failed_begins_anew_once_its_failure_was_heard():
    async def work(client: Client) -> None:
        await client.call(*ASKED)
        await client.log(14, "out of luck")
        assert [await client.status(), await client.status()] == [14, 14]
        assert (await client.logs())[0]["status"]["message"] == "out of luck"
        # Eval Protocol raises, and rolls the row out again under the same id.
        assert await client.status() is None
        assert await client.traces() == []
        await client.call(*ASKED)
        await client.log(100, "this time")
        assert await client.status() == 100
        assert (await client.logs())[0]["status"]["message"] == "this time"
        (trace,) = await client.traces()
        assert trace["output"]["content"] == "two"

    with_gateway(work, replies=["one", "two"])


@pytest.mark.parametrize(
    ("body", "status"),
    [([], 400), ({"tags": "x"}, 400), ({"tags": [], "status": {"code": "x"}}, 400),
     ({"tags": ["rollout_id:a"], "message": "x" * 70_000}, 413)],
)  # fmt: skip
def test_what_is_no_log_entry_is_refused(body: Any, status: int):
    async def work(client: Client) -> None:
        assert (await client.post("/logs", body))[0] == status
        assert await client.logs("a") == []

    with_gateway(work)


def test_traces_are_found_by_all_tags_that_are_asked_for():
    async def work(client: Client) -> None:
        for number in (1, 2):
            await client.call(
                *ASKED, ids={**IDS, "rollout_id": f"r{number}", "run_id": f"n{number}"}
            )
        assert len(await client.traces("row_id:row-1")) == 2
        assert len(await client.traces("run_id:n2")) == 1
        assert len(await client.traces("run_id:n3")) == 0
        status, reply = await client.get("/v1/project_id/p/traces/pointwise")
        assert (status, reply) == (200, {"project_id": "p", "total_traces": 0, "traces": []})

    with_gateway(work)


def test_a_strict_run_refuses_another_models_address():
    settings = SessionSettings(params=SamplingParams(model="m"), strict=True)

    async def work(client: Client) -> None:
        encoded = base64.urlsafe_b64encode(b"http://user:secret@x/v1").decode()
        path = f"{path_of(IDS)}/encoded_base_url/{encoded}/chat/completions"
        status, reply = await client.post(path, {"model": "m", "messages": ASKED})
        assert (status, reply["error"]["param"]) == (400, "base_url")
        assert "secret" not in json.dumps(reply)

    with_gateway(work, settings=settings)


class Sessions:
    """Makes sessions of a gateway that does not listen."""

    def __init__(self) -> None:
        self.gateway = Gateway(ScriptedSampler(lambda *_: said("42")), TOKENIZER, tracing=True)
        self.store = RolloutStore()

    def begin(self, number: int, now: float) -> Any:
        ids = {**IDS, "rollout_id": f"r{number}"}
        return self.store.session(ids, self.gateway.begin_rollout, now=now)


def test_rollouts_are_kept_within_bounds_however_many_come(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tracing, "MOST_ROLLOUTS", 5)
    made = Sessions()
    sessions = [made.begin(number, now=float(number)) for number in range(8)]
    assert len(made.store) == 5
    assert made.store.dropped() == sessions[:3]
    assert made.store.dropped() == []
    assert made.begin(7, now=9.0) is sessions[7]
    assert made.begin(0, now=9.0) is not sessions[0]
    assert not made.gateway._sessions


def test_what_only_logs_told_of_goes_before_what_calls_were_made_for(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(tracing, "MOST_ROLLOUTS", 5)
    made = Sessions()
    for number in range(3):
        made.begin(number, now=0.0)
    for number in range(100):  # for which nobody needs a key
        made.store.log(json.dumps({"tags": [f"rollout_id:x{number}"]}).encode(), now=1.0)
    assert len(made.store) == 5
    assert made.store.dropped() == []


def test_a_rollout_that_is_not_heard_of_for_hours_is_dropped():
    made = Sessions()
    sessions = [made.begin(number, now=0.0) for number in range(3)]
    made.store.status("r1", now=10.0)
    made.begin(3, now=tracing.IDLE_SECONDS + 5.0)
    assert made.store.dropped() == [sessions[0], sessions[2]]


def test_a_rollouts_logs_are_bounded():
    store = RolloutStore()
    for number in range(tracing.MOST_LOGS + 10):
        body = {"tags": ["rollout_id:r"], "message": str(number)}
        store.log(json.dumps(body).encode(), now=0.0)
    found = store.entries(["rollout_id:r"], lambda _: {}, limit=10_000)
    assert len(found) == tracing.MOST_LOGS
    assert found[0]["message"] == str(tracing.MOST_LOGS + 9)


def test_a_rollout_is_told_of_only_to_who_names_it():
    async def work(client: Client) -> None:
        for one in ("r1", "r2"):
            await client.call(*ASKED, ids={**IDS, "rollout_id": one})
            tags = [f"rollout_id:{one}", "experiment_id:experiment-1", "of:mine"]
            body = {"tags": tags, "message": one, "status": {"code": 100}, "extras": {"own": 1}}
            assert (await client.post("/logs", body, key="None"))[0] == 200
        status, _ = await client.get("/logs", tags="experiment_id:experiment-1", key="None")
        assert status == 401  # it would name the others
        _, reply = await client.get("/logs", tags="experiment_id:experiment-1")
        assert [entry["extras"] for entry in reply["entries"]] == [{"own": 1}] * 2
        (entry,) = await client.logs("r2")
        assert {"own", "gateway", "trajectories"} <= set(entry["extras"])
        _, reply = await client.get("/logs?tags=rollout_id:r2&tags=of:mine")
        assert [entry["message"] for entry in reply["entries"]] == ["r2"]

    with_gateway(work)


@pytest.mark.parametrize(
    ("limit", "expected"),
    [("0", 0), ("1", 1), ("999999", 2), ("1000000", None), ("9" * 5000, None), ("-1", None)],
)
def test_a_limit_is_a_number_of_six_digits(limit: str, expected: int | None):
    async def work(client: Client) -> None:
        await client.log(101)
        await client.log(101)
        status, reply = await client.get("/logs", tags="rollout_id:rollout-1", limit=limit)
        if expected is None:
            assert (status, reply["error"]["param"]) == (400, "limit")
        else:
            assert (status, len(reply["entries"])) == (200, expected)

    with_gateway(work)


def test_a_rollout_takes_one_tag_of_an_id_from_logs_and_no_others():
    made = Sessions()
    for number in range(50):
        tags = ["rollout_id:r1", f"run_id:{number}", f"x{number}:y", "rollout_id:other"]
        made.store.log(json.dumps({"tags": tags}).encode(), now=0.0)
    assert made.store._rollouts["r1"].tags == ("rollout_id:r1", "run_id:0")
    made.begin(1, now=0.0)
    made.store.log(json.dumps({"tags": ["rollout_id:r1", "run_id:z"]}).encode(), now=0.0)
    expected = {**IDS, "rollout_id": "r1"}
    assert made.store._rollouts["r1"].tags == tuple(f"{n}:{i}" for n, i in expected.items())
    with pytest.raises(CallError, match="at most"):
        made.store.log(json.dumps({"tags": ["run_id:" + "x" * 2000]}).encode(), now=0.0)


def test_logs_of_all_rollouts_are_kept_within_bytes_and_the_oldest_go_first(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(tracing, "MOST_KEPT_LOG_BYTES", 4 * (tracing.LOG_ENTRY_BYTES + 1000))
    store = RolloutStore()
    for number in range(9):
        tags = ["run_id:n", f"rollout_id:r{number % 3}", f"rollout_id:s{number}"]
        body = {"tags": tags, "message": str(number)}
        store.log(json.dumps(body).encode().ljust(1000), now=0.0)

    def kept(rollout_id: str) -> list[str]:
        found = store.entries([f"rollout_id:{rollout_id}"], lambda _: {})
        return [entry["message"] for entry in found]

    assert [kept(f"r{number}") for number in range(3)] == [["6"], ["7"], ["8", "5"]]
    assert [len(kept(f"s{number}")) for number in range(9)] == [0] * 5 + [1] * 4


def test_what_was_fetched_is_dropped_first(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tracing, "MOST_FETCHED", 2)

    async def work(client: Client) -> None:
        for number in range(5):
            await client.call(*ASKED, ids={**IDS, "rollout_id": f"r{number}"})
        for number in (0, 1, 2, 3, 4):
            assert len(await client.traces(f"rollout_id:r{number}")) == 1  # without payloads
        for number in (1, 2, 3):
            tag = f"rollout_id:r{number}"
            await client.get("/v1/traces/pointwise", tags=tag, include_payloads="True")
        left = [len(await client.traces(f"rollout_id:r{number}")) for number in range(5)]
        assert left == [1, 0, 1, 1, 1]

    with_gateway(work)
