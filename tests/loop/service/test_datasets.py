"""Data sets: three ways of uploading one, and what is no data set."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import fireworks
import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval_protocol_rft.loop.service import ServiceError
from eval_protocol_rft.loop.service.control._datasets import _check
from tests.loop.service.text_rows import sums_rows, to_jsonl
from tests.service import KEY, RunningService, fireworks_service

RL = sums_rows(3)
CHAT = [{"messages": [{"role": "user", "content": "1+1="}]}] * 3
COMPLETION = [{"prompt": "1+1=", "completion": "2"}] * 3


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    with fireworks_service(tmp_path_factory.mktemp("service")) as running:
        yield running


@pytest.fixture
def client(server: RunningService) -> Iterator[Any]:
    """With none of the data sets of the test before."""
    with fireworks.Fireworks(
        api_key=KEY, account_id="acc", base_url=server.url, max_retries=0
    ) as made:
        yield made
        for dataset in made.datasets.list():
            made.datasets.delete(str(dataset.name).rpartition("/")[2])


@pytest.mark.parametrize("rows", [RL, CHAT, COMPLETION], ids=["RL", "CHAT", "COMPLETION"])
@pytest.mark.parametrize("declared", [True, False], ids=["declared", "found"])
def test_a_data_set_is_uploaded_in_one_request(
    client: Any, rows: list[Any], declared: bool, request: pytest.FixtureRequest
) -> None:
    name = {"samples": "RL", "messages": "CHAT", "prompt": "COMPLETION"}[next(iter(rows[0]))]
    more = {"format": name, "example_count": "3"} if declared else {}
    made = client.datasets.create(dataset_id="ds", dataset={"user_uploaded": {}, **more})
    assert made.state == "UPLOADING"
    data = to_jsonl(rows)
    answer = client.datasets.upload("ds", file=("a.jsonl", data))
    assert (answer.id, answer.bytes, answer.filename) == ("ds", len(data), "a.jsonl")
    there = client.datasets.get("ds")
    assert (there.state, there.format, there.example_count) == ("READY", name, "3")


def test_a_data_set_is_uploaded_to_addresses_of_this_server(
    client: Any, server: RunningService
) -> None:
    client.datasets.create(dataset_id="ds", dataset={"example_count": "3"})
    parts = {"a.jsonl": to_jsonl(RL[:1]), "b_c d.jsonl": to_jsonl(RL[1:])}
    sizes = {name: str(len(data)) for name, data in parts.items()}
    endpoint = client.datasets.get_upload_endpoint("ds", filename_to_size=sizes)
    urls = endpoint.filename_to_signed_urls
    assert set(urls) == set(parts)
    for name, data in parts.items():
        assert urls[name].startswith(server.url)
        headers = {"X-Goog-Content-Length-Range": f"{len(data)},{len(data)}"}
        # Without the key: it must not leave for a signed address.
        assert httpx.put(urls[name], content=data, headers=headers).status_code == 200
    client.datasets.validate_upload("ds", body={})
    there = client.datasets.get("ds")
    assert (there.state, there.format, there.example_count) == ("READY", "RL", "3")
    client.datasets.validate_upload("ds", body={})  # sent again, its answer was lost


def test_an_upload_must_be_what_was_said_and_all_of_it(client: Any) -> None:
    client.datasets.create(dataset_id="ds", dataset={})
    data = to_jsonl(RL)
    with pytest.raises(fireworks.BadRequestError, match="nothing was uploaded"):
        client.datasets.validate_upload("ds", body={})
    sizes = {"a.jsonl": str(len(data)), "b.jsonl": str(len(data))}
    urls = client.datasets.get_upload_endpoint("ds", filename_to_size=sizes).filename_to_signed_urls
    for other in (data[:-1], data + b" ", b""):
        assert httpx.put(urls["a.jsonl"], content=other).status_code == 400
    assert httpx.put(urls["a.jsonl"] + "x", content=data).status_code == 403
    assert httpx.put(urls["a.jsonl"], content=data).status_code == 200
    with pytest.raises(fireworks.BadRequestError, match=r"b\.jsonl"):
        client.datasets.validate_upload("ds", body={})
    assert client.datasets.get("ds").state == "UPLOADING"


def test_an_upload_whose_answer_was_lost_may_be_sent_again_but_nothing_else(client: Any) -> None:
    client.datasets.create(dataset_id="ds", dataset={})
    for _ in range(2):
        client.datasets.upload("ds", file=("a.jsonl", to_jsonl(RL)))
    with pytest.raises(fireworks.BadRequestError, match="READY"):
        client.datasets.upload("ds", file=("a.jsonl", to_jsonl(CHAT)))
    assert client.datasets.get("ds").format == "RL"


@pytest.mark.parametrize(
    ("declared", "data", "said"),
    [
        ({"format": "RL"}, to_jsonl(CHAT), "line 1 is of format CHAT, not RL"),
        ({"format": "CHAT"}, to_jsonl(RL), "line 1 is of format RL, not CHAT"),
        ({"example_count": "4"}, to_jsonl(RL), "3 rows, and exampleCount said 4"),
        ({"example_count": "2"}, to_jsonl(RL), "3 rows, and exampleCount said 2"),
        ({}, to_jsonl([*RL, *CHAT]), "line 4 is of format CHAT, not RL"),
        ({}, b"", "no rows"),
        ({}, b"\n \n", "no rows"),
        ({}, b'{"samples": [', "line 1 is no JSON"),
        ({}, b"[1]", "line 1 is no object"),
        ({}, b'{"text": "1+1=2"}', "line 1 is of no known format: it has text"),
        ({}, b'{"samples": []}', "samples must be a list, not empty"),
        ({}, b'{"samples": [{"messages": []}]}', "messages must be a list"),
        ({}, to_jsonl([{"samples": [CHAT[0] | {"evals": {"s": 1}}]}]), "of the assistant"),
        ({}, b"\xff\xfe", "line 1 is no JSON"),
    ],
)
def test_what_does_not_fit_is_refused_and_said(
    client: Any, server: RunningService, declared: dict[str, str], data: bytes, said: str
) -> None:
    client.datasets.create(dataset_id="ds", dataset=declared)
    with pytest.raises(fireworks.BadRequestError, match=said):
        client.datasets.upload("ds", file=("a.jsonl", data))
    there = client.datasets.get("ds")
    assert there.state == "UPLOADING"
    assert said in there.status.message
    assert said in server.lines[-1]
    with pytest.raises(fireworks.BadRequestError, match="UPLOADING"):
        client.reinforcement_fine_tuning_steps.create(
            dataset="ds", training_config={"base_model": "accounts/fireworks/models/arithmetic"}
        )
    if not declared:  # it can be mended
        client.datasets.upload("ds", file=("a.jsonl", to_jsonl(RL)))
        assert client.datasets.get("ds").status is None


@pytest.mark.parametrize(
    "evals", [None, {}, {"score": None}, {"score": "1"}, {"score": True}, [1.0], 1.0]
)
def test_evals_are_scores_by_name(client: Any, evals: Any) -> None:
    row = {"samples": [{**RL[0]["samples"][0], "evals": evals}]}
    client.datasets.create(dataset_id="ds", dataset={})
    with pytest.raises(fireworks.BadRequestError, match="evals"):
        client.datasets.upload("ds", file=("a.jsonl", to_jsonl([row])))


def test_what_is_no_form_is_refused(client: Any, server: RunningService) -> None:
    client.datasets.create(dataset_id="ds", dataset={})
    url = f"{server.url}/v1/accounts/acc/datasets/ds:upload"
    for given_body in (
        {"content": b"{}"},
        {"json": {}},
        {"files": {"other": b"{}"}},
        {"content": b"--x\r\n", "headers": {"content-type": "multipart/form-data; boundary=x"}},
        {"content": b"--x\r\n", "headers": {"content-type": "multipart/form-data"}},
    ):
        answer = httpx.post(url, **given_body)
        assert (answer.status_code, answer.json()["code"]) == (400, 3)
    with pytest.raises(fireworks.NotFoundError):
        client.datasets.upload("no", file=("a.jsonl", b"{}"))


@pytest.mark.parametrize("way", ["one request", "addresses"])
def test_a_data_set_is_downloaded_as_it_was_uploaded(
    client: Any, server: RunningService, way: str
) -> None:
    data = to_jsonl(RL)
    client.datasets.create(dataset_id="ds", dataset={"user_uploaded": {}})
    with pytest.raises(fireworks.BadRequestError, match="UPLOADING: it has no file yet"):
        client.datasets.get_download_endpoint("ds")
    if way == "one request":
        client.datasets.upload("ds", file=("a.jsonl", data))
    else:
        to = client.datasets.get_upload_endpoint("ds", filename_to_size={"a": str(len(data))})
        httpx.put(to.filename_to_signed_urls["a"], content=data).raise_for_status()
        client.datasets.validate_upload("ds", body={})
    (url,) = client.datasets.get_download_endpoint("ds").filename_to_signed_urls.values()
    assert url.startswith(f"{server.url}/downloads/ds/")
    assert httpx.get(url).content == data
    assert httpx.get(f"{url}x").status_code == 403
    client.datasets.delete("ds")
    assert httpx.get(url).status_code == 403


def test_a_deleted_data_set_leaves_nothing(client: Any, server: RunningService) -> None:
    folder = server.service.store.folder / "datasets"
    client.datasets.create(dataset_id="ds", dataset={})
    client.datasets.upload("ds", file=("a.jsonl", to_jsonl(RL)))
    assert list(folder.iterdir())
    client.datasets.delete("ds")
    assert not list(folder.iterdir())
    with pytest.raises(fireworks.NotFoundError):
        client.datasets.get("ds")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
KNOWN = st.sampled_from(["samples", "messages", "prompt", "completion", "evals", "role", "content"])


@given(st.lists(st.dictionaries(KNOWN | st.text(), JSON, max_size=4), min_size=1, max_size=3))
def test_any_rows_are_of_a_format_or_refused(rows: list[dict[str, Any]]) -> None:
    data = "\n".join(json.dumps(row) for row in rows).encode()
    try:
        name, count = _check(data, {"format": "FORMAT_UNSPECIFIED", "count": 0})
    except ServiceError:
        return
    assert name in ("CHAT", "COMPLETION", "RL")
    assert count == len(rows)
