"""What keeps `ep-rft generate` from starting is said in one line, before anything is asked."""

from __future__ import annotations

import contextlib
import functools
import json
import re
import sqlite3
from pathlib import Path

import pytest

from eval_protocol_rft.data._dataset import RolloutDataset
from eval_protocol_rft.data._job_store import JobStore, parts_folder, row_keys
from eval_protocol_rft.data._row_groups import to_record_batch
from tests.data.servers import at, refused, sampled, succeed, texts, write_jsonl
from tests.stub_server import Status, StubServer


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "data.jsonl", texts(3))


def refusal(data: Path, server: StubServer, tokenizer: Path, *arguments: object) -> str:
    """What is said of a command that asks nothing and leaves nothing behind."""
    folder = data.parent
    before = sorted(folder.rglob("*"))
    output = [] if "-o" in arguments else ["-o", folder / "out.parquet"]
    message = refused("generate", data, *output, *at(server, tokenizer), *arguments)
    assert not server.requests
    assert sorted(folder.rglob("*")) == before
    assert len(message.strip().splitlines()) == 1
    return message


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["-o", "out"], "out: name the output .parquet or .jsonl"),
        (["-o", "/nowhere/at/all.parquet"], "there is no folder /nowhere/at"),
        (["-o", "/proc/out.parquet"], "/proc/out.parquet"),
        (["-o", "o.jsonl", "--format", "parquet"], "contradict each other"),
        (["--prompt-key", "promt"], "no column 'promt'; the columns are 'prompt', 'ground_truth'"),
        (["--where", "level > 3"], "level"),
        (["--where", "prompt =="], "is no expression"),
        (["--where", "prompt == ''"], "no row is selected; look at --where and --limit"),
        (["--temperature", 0, "-n", 2], "greedy completions are all the same"),
        (["--top-p", 0], "top_p"),
        (["--extra-body", "{"], "--extra-body: not JSON"),
        (["--extra-body", "[]"], "--extra-body: must be a JSON object"),
        (["--chat-template-kwargs", "1"], "--chat-template-kwargs: must be a JSON object"),
        (["--api-key-env", "NO_SUCH_KEY"], "--api-key-env NO_SUCH_KEY: there is no such"),
        (["--base-url", "localhost:80"], "must be an http(s) URL"),
        (["--tokenizer", "/nowhere/tokenizer"], "cannot load tokenizer '/nowhere/tokenizer'"),
        (["--model", "accounts/a/models/b", "--tokenizer", ""], "names no tokenizer"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_wrong_options_are_refused(arguments, said, data, server, tokenizer_folder):
    assert said in refusal(data, server, tokenizer_folder, *arguments)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("d.jsonl", b'{"prompt": "a"}\n{"prompt": "\xff"}\n', "d.jsonl:2: "),
        ("d.jsonl", b'{"prompt": "a"}\nnot json\n', "d.jsonl:2: "),
        ("d.jsonl", b'{"prompt": "a"}\n\n{"prompt": ["x"]}\n', "d.jsonl:3: the prompt"),
        ("d.jsonl", b'{"prompt": "a"}\n{"prompt": ""}\n', "d.jsonl:2: the prompt in 'prompt' is"),
        (
            "d.jsonl",
            b'{"prompt": "a"}\n{"prompt": [{"role": "user", "content": "b"}]}\n',
            "d.jsonl:2: the prompt in 'prompt' is a list of messages, but the rows before have",
        ),
        ("d.jsonl", b'{"prompt": "a"}\n{"prompt": null}\n', "d.jsonl:2: the prompt"),
        ("d.jsonl", b'{"prompt": "a", "tools": 3}\n', "d.jsonl:1: 'tools' must be a list"),
        ("d.jsonl", b'{"prompt": "\\ud800"}\n', "d.jsonl:1: "),
        ("d.jsonl", b"", "no rows"),
        ("d.json", b'{"prompt": "a"}', "d.json"),
        ("d.csv", b"prompt,level\na\n", "d.csv:2: "),
        ("d.parquet", b"PAR1", "d.parquet"),
        ("d.txt", b"a\n", "not a format that can be read"),
        ("d.jsonl", b'{"text": "a"}\n', "which column holds the prompt?"),
    ],
)
def test_a_broken_data_set_is_refused_with_the_place(
    name, content, said, tmp_path, server, tokenizer_folder
):
    path = tmp_path / name
    path.write_bytes(content)
    assert said in refusal(path, server, tokenizer_folder)


def test_a_data_set_that_is_not_there(tmp_path, server, tokenizer_folder):
    message = refusal(tmp_path / "no.jsonl", server, tokenizer_folder)
    assert "no.jsonl: no such file" in message


def test_a_file_of_something_else_is_not_overwritten(data, server, tokenizer_folder):
    output = data.with_name("precious.parquet")
    output.write_bytes(b"precious")
    message = refusal(data, server, tokenizer_folder, "-o", output)
    assert "not a whole Parquet file" in message
    assert "--overwrite" in message
    assert output.read_bytes() == b"precious"


def test_a_data_set_that_changes_while_it_is_read_is_an_error_in_one_line(
    tmp_path, server, tokenizer_folder
):
    data = write_jsonl(tmp_path / "data.jsonl", texts(600))
    whole = data.read_bytes()

    def cut_short(seen: object) -> None:
        data.write_bytes(b"x" * len(whole))

    server.script = cut_short
    options = at(server, tokenizer_folder)
    message = refused("generate", data, "-o", tmp_path / "out.parquet", *options)
    assert len(message.splitlines()) == 1
    # What was sampled before is there.
    data.write_bytes(whole)
    server.script = lambda seen: None
    before = len(server.requests)
    succeed("generate", data, "-o", tmp_path / "out.parquet", *options)
    assert len(server.requests) < 600 + before


@pytest.mark.parametrize("value", [2**63, 2**70, -1.5, True, None, "\u0000", {"a": [None]}, []])
def test_odd_values_in_other_columns_come_through(value, tmp_path, server, tokenizer_folder):
    rows = [{"prompt": "a", "odd": value}, {"prompt": "b", "odd": 3}]
    data = write_jsonl(tmp_path / "data.jsonl", rows)
    output = tmp_path / "out.jsonl"
    succeed("generate", data, "-o", output, *at(server, tokenizer_folder))
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["original_odd"] for line in lines] == [value, 3]


def test_a_broken_batch_is_named_and_without_it_the_job_goes_on(data, server, tokenizer_folder):
    output = data.with_name("out.parquet")
    asked = ["generate", data, "-o", output, "-n", 2, *at(server, tokenizer_folder)]
    succeed(*asked)
    whole, finished = sampled(output), RolloutDataset(output)
    rows = list(finished)
    keys_of = functools.partial(row_keys, position=None)
    with contextlib.closing(JobStore(parts_folder(output), finished.schema, keys_of)) as store:
        for half in (rows[:3], rows[3:]):
            store.append(to_record_batch(half, finished.schema))
    output.unlink()
    stored = parts_folder(output) / "job.sqlite"
    ids = rows[4].completion_ids.tobytes()
    content = stored.read_bytes()
    assert content.count(ids) == 1
    stored.write_bytes(content.replace(ids, bytes(len(ids))))
    server.requests.clear()
    for command in (asked, ["stats", output], ["show", output]):
        message = refused(*command)
        assert f"{stored}: the stored batch 2 was damaged" in message
        (remedy,) = re.findall(r"\((DELETE .*)\)", message)
    assert not server.requests
    with contextlib.closing(sqlite3.connect(stored)) as anyone, anyone:
        anyone.execute(remedy)
    assert "3 completions" in succeed("stats", output).stdout
    succeed(*asked)
    assert len(server.requests) == len(rows) - 3
    assert sampled(output) == whole


def test_what_will_fail_again_is_not_proposed_to_be_tried_again(
    data, server, tokenizer_folder, tmp_path
):
    asked = ("generate", data, "-o", tmp_path / "out.parquet", *at(server, tokenizer_folder))
    server.script = lambda seen: Status(400, {"error": "long"}) if seen.place == 1 else None
    result = succeed(*asked)
    assert "1 of them failed" in result.stdout
    assert "HTTP 400" in result.stderr
    assert "--retry-failed" not in result.stderr
