"""`ep-rft generate` where an output is already there: it goes on, refuses, replaces or retries."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import sqlite3
from pathlib import Path

import pyarrow as pa
import pytest

from eval_protocol_rft.data._dataset import RolloutDataset
from eval_protocol_rft.data._job_settings import model_fingerprint
from eval_protocol_rft.data._job_store import JobStore, parts_folder, row_keys
from eval_protocol_rft.local.models import bundled_model_path
from tests.data.servers import (
    at,
    ep_rft,
    pairs,
    refused,
    rows_by_pair,
    sampled,
    succeed,
    texts,
    write_jsonl,
)
from tests.stub_server import Status, StubServer

PROMPTS, N = 6, 2


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "data.jsonl", texts(PROMPTS))


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "rollouts.parquet"


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "_lock"
    }


CHANGES = {
    "temperature": (["--temperature", 0.5], "temperature: 1.0 there, 0.5 asked for"),
    "n": (["-n", N - 1], f"n: {N} there, {N - 1} asked for"),
    "max tokens": (["--max-tokens", 4], "max_tokens: 8 there, 4 asked for"),
    "top-p": (["--top-p", 0.5], "top_p: 1.0 there, 0.5 asked for"),
    "top-k": (["--top-k", 3], "top_k: 0 there, 3 asked for"),
    "stop": (["--stop", "x"], "stop: [] there, ['x'] asked for"),
    "seed": (["--seed", 2], "seed: 1 there, 2 asked for"),
    "system": (["--system", "s"], "system: None there, 's' asked for"),
    "limit": (["--limit", 2], "data.limit: None there, 2 asked for"),
    "order": (["--shuffle-seed", 2], "data.shuffle_seed: None there, 2 asked for"),
    "rows": (["--where", "True"], "data.where: None there, 'True' asked for"),
    "model": (["--model", "m2"], "model: 'm' there, 'm2' asked for"),
    "prompts": (
        ["--prompt-key", "ground_truth"],
        "data.prompt_key: 'prompt' there, 'ground_truth'",
    ),
    "template": (
        ["--chat-template-kwargs", '{"enable_thinking": true}'],
        "chat_template_kwargs: {} there, {'enable_thinking': True} asked for",
    ),
    "a request field": (["--extra-body", '{"min_p": 0.1}'], "other: {} there, {'min_p': 0.1}"),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    """A folder with a data set and its rollouts."""
    folder = tmp_path_factory.mktemp("finished")
    write_jsonl(folder / "data.jsonl", texts(PROMPTS))
    with StubServer() as server:
        options = at(server, tokenizer_folder)
        succeed("generate", folder / "data.jsonl", "-o", folder / "r.parquet", "-n", N, *options)
    return folder


@pytest.mark.parametrize("change", CHANGES)
def test_another_job_for_the_output_is_refused_with_what_differs(
    change, finished, server, tokenizer_folder
):
    arguments, said = CHANGES[change]
    before = contents(finished)
    output = finished / "r.parquet"
    options = [*at(server, tokenizer_folder), "-n", N, *arguments]
    message = refused("generate", finished / "data.jsonl", "-o", output, *options)
    assert said in message
    assert "--overwrite" in message
    assert contents(finished) == before
    assert not server.requests


def test_data_of_the_same_content_are_the_same_under_another_name(
    finished, tmp_path, server, tokenizer_folder
):
    data, output = tmp_path / "renamed.jsonl", tmp_path / "r.parquet"
    shutil.copy(finished / "data.jsonl", data)
    shutil.copy(finished / "r.parquet", output)
    result = succeed("generate", data, "-o", output, "-n", N, *at(server, tokenizer_folder))
    assert "nothing to do: all of them were there" in result.stdout
    assert not server.requests
    data.write_text(data.read_text().replace("question 3", "question 3?"))
    message = refused("generate", data, "-o", output, "-n", N, *at(server, tokenizer_folder))
    assert "data.fingerprint: " in message
    assert contents(tmp_path)["r.parquet"] == contents(finished)["r.parquet"]


def test_other_weights_in_the_same_folder_are_another_model(tmp_path):
    model = tmp_path / "model"
    shutil.copytree(bundled_model_path("arithmetic"), model)
    data = write_jsonl(tmp_path / "d.jsonl", [{"prompt": "1+2="}])
    asked = ["generate", data, "-o", tmp_path / "r.parquet", "--model", f"local/{model}", "--quiet"]
    succeed(*asked)
    weights = model / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert "model_fingerprint: " in refused(*asked)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".gguf", ".json", ".py"])
def test_every_byte_of_a_folder_of_weights_tells_it_apart(suffix, tmp_path):
    file = tmp_path / f"model{suffix}"
    content = bytearray(5 << 20)
    file.write_bytes(content)
    before = model_fingerprint(f"local/{tmp_path}")
    content[len(content) // 2] = 1
    file.write_bytes(content)
    changed = model_fingerprint(f"local/{tmp_path}")
    assert changed != before
    file.rename(tmp_path / f"other{suffix}")
    assert model_fingerprint(f"local/{tmp_path}") not in (before, changed)


def test_a_file_is_replaced_when_asked_and_only_once_the_new_one_is_there(
    data, output, server, tokenizer_folder
):
    server.script = lambda seen: Status(400) if seen.place >= 4 else None
    asked = ["generate", data, "-o", output, "-n", N, *at(server, tokenizer_folder)]
    succeed(*asked)
    old = output.read_bytes()
    # The new job cannot go on: the old file is still there.
    server.script = lambda seen: Status(401)
    message = refused(*asked, "--temperature", 0.5, "--overwrite")
    assert "HTTP 401" in message
    assert output.read_bytes() == old
    server.script = lambda seen: None
    succeed(*asked, "--temperature", 0.5, "--overwrite")
    assert RolloutDataset(output).metadata.sampling.temperature == 0.5
    assert len(rows_by_pair(output)) == PROMPTS * N


def test_a_seed_that_nobody_gave_is_drawn_once_per_job(data, output, tmp_path):
    sums = write_jsonl(tmp_path / "sums.jsonl", [{"prompt": "1+2="}, {"prompt": "3+4="}])
    asked = ["generate", sums, "--model", "local/arithmetic", "-n", 2, "--quiet"]
    succeed(*asked, "-o", output)
    settings = RolloutDataset(output).metadata.sampling
    assert settings.seed is not None
    assert not settings.seed_given
    before = sampled(output)
    assert "nothing to do" in succeed(*asked, "-o", output).stdout
    assert sampled(output) == before
    succeed(*asked, "-o", tmp_path / "other.parquet")
    assert RolloutDataset(tmp_path / "other.parquet").metadata.sampling.seed != settings.seed
    # The seed that was drawn, given, is the same sampling but another job.
    assert "seed_given" not in refused(*asked, "-o", output, "--seed", settings.seed + 1)


def test_failures_are_kept_and_retried_alone(data, output, tmp_path, server, tokenizer_folder):
    whole = tmp_path / "whole.parquet"
    succeed("generate", data, "-o", whole, "-n", N, *at(server, tokenizer_folder))
    server.requests.clear()
    chosen = [(1, 0), (4, 0), (4, 1)]
    refused_seeds = {sampled(whole)[pair]["seed"] for pair in chosen}
    server.script = lambda seen: (
        Status(400, {"error": "too long"}) if seen.seed in refused_seeds else None
    )
    asked = ["generate", data, "-o", output, "-n", N, *at(server, tokenizer_folder)]
    result = succeed(*asked)
    assert "3 refused; the first, row data-" in result.stderr
    assert "--retry-failed" not in result.stderr
    failed = {pair: row for pair, row in rows_by_pair(output).items() if row["error"]}
    assert sorted(failed) == chosen
    for row in failed.values():
        assert (row["error_kind"], row["error_status"], row["attempts"]) == ("refused", 400, 1)
        assert row["error"] == "HTTP 400: too long"
        assert row["completion_ids"] is row["response"] is row["reward"] is None

    server.requests.clear()
    assert "nothing to do" in succeed(*asked).stdout
    assert not server.requests
    # They fail again: nothing is lost.
    succeed(*asked, "--retry-failed")
    assert {seen.seed for seen in server.requests} == refused_seeds
    assert len(server.requests) == len(chosen)
    server.requests.clear()
    server.script = lambda seen: None
    result = succeed(*asked, "--retry-failed")
    assert "this run: 3 sampled" in result.stdout
    assert {seen.seed for seen in server.requests} == refused_seeds
    assert sampled(output) == sampled(whole)


def test_retried_completions_of_renamed_data_keep_the_names_of_their_rows(
    data, output, server, tokenizer_folder
):
    server.script = lambda seen: Status(400) if seen.place % 2 else None
    options = ["-o", output, "-n", N, *at(server, tokenizer_folder)]
    succeed("generate", data, *options)
    server.script = lambda seen: None
    renamed = data.rename(data.with_name("renamed.jsonl"))
    succeed("generate", renamed, *options, "--retry-failed")
    rows = rows_by_pair(output)
    assert {row["row_id"] for row in rows.values()} == {f"data-{i}" for i in range(PROMPTS)}
    assert not any(row["error"] for row in rows.values())


@pytest.mark.parametrize("prompts", [40, 3])
@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_wrong_key_ends_the_run_early_and_stores_nothing(
    prompts, status, output, tmp_path, server, tokenizer_folder
):
    data = write_jsonl(tmp_path / "many.jsonl", texts(prompts))
    server.script = lambda seen: Status(status, {"error": "bad key"})
    asked = ["generate", data, "-o", output, "-n", 2, *at(server, tokenizer_folder)]
    message = refused(*asked)
    assert f"HTTP {status}: bad key" in message
    assert len(server.requests) <= 20
    assert not output.exists()
    server.script = lambda seen: None
    server.requests.clear()
    succeed(*asked)
    assert len(server.requests) == prompts * 2
    assert list(rows_by_pair(output)) == pairs(prompts, 2)


def test_a_wrong_address_ends_the_run_and_stores_nothing(output, data, tokenizer_folder):
    options = ["--model", "m", "--base-url", "http://127.0.0.1:9", "--tokenizer", tokenizer_folder]
    message = refused("generate", data, "-o", output, *options, "--max-attempts", 1, "--quiet")
    assert "all failed (connection)" in message
    assert not output.exists()


def test_rows_that_nobody_can_sample_do_not_keep_a_job_from_its_end(
    output, tmp_path, server, tokenizer_folder
):
    """More of them are left than a run takes for hopeless."""
    data = write_jsonl(tmp_path / "many.jsonl", texts(30))
    asked = ["generate", data, "-o", output, *at(server, tokenizer_folder)]
    count = 0

    def good_then_no_key(seen: object) -> Status | None:
        nonlocal count
        count += 1
        return None if count <= 10 else Status(401)

    server.script = good_then_no_key
    assert "in a row failed for good" in refused(*asked)
    server.script = lambda seen: Status(400, {"error": "too long"})
    result = succeed(*asked, "--retry-failed")
    assert "20 refused" in result.stderr
    rows = rows_by_pair(output)
    assert sum(row["error_status"] == 400 for row in rows.values()) == 20
    # A wrong key says nothing of the rows: what is known of them stays.
    server.script = lambda seen: Status(401)
    refused(*asked, "--retry-failed")
    assert rows_by_pair(output) == rows


def test_a_scored_file_is_gone_on_with_and_keeps_its_rewards(
    data, output, tmp_path, server, tokenizer_folder
):
    server.script = lambda seen: Status(400) if seen.place >= 9 else None
    asked = ["generate", data, "-o", output, "-n", N, *at(server, tokenizer_folder)]
    succeed(*asked)
    grader = tmp_path / "lengths.py"
    grader.write_text("def length(row):\n    return float(len(row.messages[-1].content))\n")
    succeed("score", output, "-e", f"{grader}::length", "--quiet", "--workers", 1)
    rewards = {pair: row["reward"] for pair, row in rows_by_pair(output).items() if row["response"]}
    server.script = lambda seen: None
    succeed(*asked, "--retry-failed")
    rows = rows_by_pair(output)
    assert {p: row["reward"] for p, row in rows.items() if p in rewards} == rewards
    assert [row["reward"] for p, row in rows.items() if p not in rewards] == [None] * 3
    result = succeed("score", output, "-e", f"{grader}::length", "--quiet", "--workers", 1)
    assert "(3 graded by this run)" in result.stdout


def test_no_secret_is_in_any_file_or_message(
    data, output, tmp_path, server, tokenizer_folder, monkeypatch
):
    secret = "sk-very-secret-0123456789"
    monkeypatch.setenv("MY_KEY", secret)
    server.script = lambda seen: (
        Status(400, {"error": f"key {secret} may not"}) if seen.place % 3 else None
    )
    headers = json.dumps({"extra_headers": {"x-other-key": secret}})
    asked = ["generate", data, "-o", output, "-n", N, *at(server, tokenizer_folder)]
    result = ep_rft(*asked, "--api-key-env", "MY_KEY", "--extra-body", headers)
    assert result.exit_code == 0
    assert server.requests[0].headers["authorization"] == f"Bearer {secret}"
    assert server.requests[0].headers["x-other-key"] == secret
    assert secret not in result.output
    assert "key *** may not" in result.stderr
    for name, content in contents(tmp_path).items():
        assert secret.encode() not in content, name
    # Nor in what a job that is not finished leaves.
    server.script = lambda seen: Status(401, {"error": secret})
    message = refused(*asked, "--retry-failed", "--api-key-env", "MY_KEY", "--extra-body", headers)
    assert secret not in message
    assert not any(secret.encode() in content for content in contents(tmp_path).values())


def test_the_parts_of_a_job_go_when_its_file_is_there(data, output, server, tokenizer_folder):
    succeed("generate", data, "-o", output, *at(server, tokenizer_folder))
    assert not parts_folder(output).exists()
    assert sorted(path.name for path in output.parent.iterdir()) == ["data.jsonl", output.name]


def test_a_job_deletes_only_what_it_wrote(data, output, server, tokenizer_folder):
    folder = parts_folder(output)
    (folder / "mine").mkdir(parents=True)
    mine = [folder / "notes.txt", folder / "job.sqlite-old", folder / "mine" / "job.sqlite"]
    for path in mine:
        path.write_text("mine")
    (folder / "job.sqlite").touch()
    (folder / "job.sqlite-wal").write_bytes(b"of a job that died")
    succeed("generate", data, "-o", output, *at(server, tokenizer_folder))
    assert [path.read_text() for path in mine] == ["mine"] * 3
    assert sorted(path.name for path in folder.iterdir()) == ["job.sqlite-old", "mine", "notes.txt"]
    assert len(RolloutDataset(output)) == PROMPTS


@pytest.mark.parametrize("options", [(), ("--overwrite",)])
def test_a_file_that_no_job_wrote_is_neither_read_nor_deleted(
    data, output, options, server, tokenizer_folder
):
    foreign = parts_folder(output) / "job.sqlite"
    foreign.parent.mkdir()
    with contextlib.closing(sqlite3.connect(foreign)) as database, database:
        database.execute("CREATE TABLE job (schema)")
    before = foreign.read_bytes()
    message = refused("generate", data, "-o", output, *at(server, tokenizer_folder), *options)
    assert "job.sqlite: no job wrote this" in message
    assert foreign.read_bytes() == before


@pytest.mark.parametrize("name", ["", "_lock", "job.sqlite", "job.sqlite-wal", "job.sqlite-shm"])
def test_a_link_where_a_job_keeps_its_files_is_refused_and_not_followed(
    data, output, tmp_path, name, server, tokenizer_folder
):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "job.sqlite").write_text("mine")
    link = parts_folder(output) / name if name else parts_folder(output)
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(mine / "job.sqlite" if name else mine)
    message = refused("generate", data, "-o", output, *at(server, tokenizer_folder))
    assert "is a link" in message or (not name and "damaged" in message)
    assert [path.read_text() for path in mine.iterdir()] == ["mine"]


def of_another_version(folder: Path, schema: pa.Schema) -> None:
    JobStore(folder, schema, functools.partial(row_keys, position=None)).close()
    with contextlib.closing(sqlite3.connect(folder / "job.sqlite")) as database, database:
        database.execute("PRAGMA user_version = 2")


def of_an_earlier_release(folder: Path, schema: pa.Schema) -> None:
    (folder / "_schema").write_bytes(schema.serialize())
    (folder / "_journal-000000").write_bytes(b"EPRJ")


def of_zeros(folder: Path, schema: pa.Schema) -> None:
    (folder / "job.sqlite").write_bytes(bytes(8192))


def of_rubbish(folder: Path, schema: pa.Schema) -> None:
    (folder / "job.sqlite").write_text("rubbish")


@pytest.mark.parametrize("make", [of_another_version, of_an_earlier_release, of_zeros, of_rubbish])
def test_a_job_that_cannot_go_on_is_one_line_with_what_to_do(
    make, data, output, server, tokenizer_folder
):
    asked = ("generate", data, "-o", output, *at(server, tokenizer_folder))
    succeed(*asked)
    schema = RolloutDataset(output).schema
    output.unlink()
    server.requests.clear()
    folder = parts_folder(output)
    folder.mkdir()
    make(folder, schema)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    shown = (("stats", output), ("show", output), ("show", folder), ("report", output))
    for command in (asked, (*asked, "--overwrite"), *shown):
        message = refused(*command)
        assert "to begin it anew" in message
        assert str(folder) in message
        assert len(message.splitlines()) == 1
    assert not server.requests
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    shutil.rmtree(folder)
    succeed(*asked)
    assert len(server.requests) == PROMPTS


def test_an_output_that_is_a_link_is_one_job_with_the_file_it_leads_to(
    data, tmp_path, server, tokenizer_folder
):
    store, link = tmp_path / "store", tmp_path / "link.parquet"
    store.mkdir()
    link.symlink_to(store / "real.parquet")
    assert parts_folder(link) == parts_folder(store / "real.parquet")
    succeed("generate", data, "-o", link, *at(server, tokenizer_folder))
    assert link.is_symlink()
    assert [path.name for path in store.iterdir()] == ["real.parquet"]


def test_what_would_keep_the_file_from_being_written_is_found_before_anything_is_asked(
    data, server, tokenizer_folder, tmp_path
):
    asked = at(server, tokenizer_folder)
    long = tmp_path / ("x" * 243 + ".parquet")
    assert "File name too long" in refused("generate", data, "-o", long, *asked)
    long = tmp_path / ("x" * 240 + ".jsonl")
    assert "File name too long" in refused("generate", data, "-o", long, *asked)
    pipe = tmp_path / "pipe.parquet"
    os.mkfifo(pipe)
    assert "a device or a pipe" in refused("generate", data, "-o", pipe, *asked)
    (tmp_path / "dangling.parquet").symlink_to(tmp_path / "no" / "where.parquet")
    dangling = tmp_path / "dangling.parquet"
    assert "there is no folder" in refused("generate", data, "-o", dangling, *asked)
    assert not server.requests
    succeed("generate", data, "-o", tmp_path / ("x" * 241 + ".parquet"), *asked)


def test_a_disk_without_room_for_the_file_is_told_before_anything_is_asked(
    data, output, server, tokenizer_folder, monkeypatch
):
    asked = at(server, tokenizer_folder)
    succeed("generate", data, "-o", output, *asked)
    seen = len(server.requests)
    full = shutil.disk_usage(output.parent)._replace(free=output.stat().st_size - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: full)
    message = refused("generate", data, "-o", output, *asked, "--retry-failed")
    assert "Make room first" in message
    grader = f"{Path(__file__).with_name('score_graders.py')}::length"
    assert "Make room first" in refused("score", output, "-e", grader)
    assert len(server.requests) == seen


def test_the_data_set_is_never_written_over(data, tmp_path, server, tokenizer_folder):
    before = data.read_bytes()
    (tmp_path / "link.jsonl").symlink_to(data)
    os.link(data, tmp_path / "hard.jsonl")
    for output in (data, tmp_path / "link.jsonl", tmp_path / "hard.jsonl"):
        for options in ((), ("--overwrite",)):
            message = refused(
                "generate", data, "-o", output, *at(server, tokenizer_folder), *options
            )
            assert "that is the file to be read" in message
    assert data.read_bytes() == before
    assert not server.requests
    assert not parts_folder(data).exists()


def test_a_file_without_rows_is_an_error_to_show(tmp_path):
    (tmp_path / "empty.jsonl").touch()
    assert "it holds no rows" in refused("show", tmp_path / "empty.jsonl")
