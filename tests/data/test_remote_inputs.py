"""Inputs from anywhere: URLs of fsspec, compressed files, patterns, in every command."""

from __future__ import annotations

import base64
import contextlib
import gzip
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
import tracemalloc
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from eval_protocol_rft import data
from eval_protocol_rft.data.source._opening import open_source
from eval_protocol_rft.data.source._urls import SourceError
from tests.data.servers import refused, succeed, write_jsonl
from tests.programs import Zygote
from tests.scored_files import Sampled
from tests.scored_files import write as write_scored

ROWS: list[dict[str, Any]] = [{"prompt": f"{i}+1=", "ground_truth": str(i + 1)} for i in range(30)]


class Loopback:
    """An HTTP server in a thread, until it is closed."""

    def __init__(self, handler: type[BaseHTTPRequestHandler]) -> None:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.netloc = f"127.0.0.1:{self._server.server_port}"
        self.url = f"http://{self.netloc}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class WebServer(Loopback):
    """A folder on loopback, with pages that list its folders.

    `key`: what a request must have as `?key=`, as signed URLs do. `password`: of user `u`.
    """

    def __init__(self, folder: Path, *, ranges: bool = False) -> None:
        self.folder, self.ranges = folder, ranges
        self.key: str | None = None
        self.password: str | None = None
        self.cut = False
        self.lines: list[str] = []
        web = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                web.lines.append(self.requestline)

            def do_GET(self) -> None:
                web.answer(self)

            do_HEAD = do_GET

        super().__init__(Handler)

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        url = urlsplit(request.path)
        if self.key is not None and parse_qs(url.query).get("key") != [self.key]:
            return self.send(request, 403, b"")
        if self.password is not None:
            wanted = base64.b64encode(f"u:{self.password}".encode()).decode()
            if request.headers.get("authorization") != f"Basic {wanted}":
                return self.send(request, 401, b"")
        path = self.folder / unquote(url.path).lstrip("/")
        if path.is_dir():
            links = "".join(f'<a href="{p.name}">x</a>' for p in sorted(path.iterdir()))
            return self.send(request, 200, links.encode(), content_type="text/html")
        if not path.is_file():
            return self.send(request, 404, b"")
        content = path.read_bytes()
        wanted_bytes = request.headers.get("range")
        if self.ranges and wanted_bytes:
            first, last = wanted_bytes.removeprefix("bytes=").split("-")
            part = content[int(first) : int(last) + 1 if last else None]
            place = f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}"
            return self.send(request, 206, part, content_range=place)
        headers = {"accept_ranges": "bytes"} if self.ranges else {}
        return self.send(request, 200, content, **headers)

    def send(
        self, request: BaseHTTPRequestHandler, status: int, body: bytes, **headers: str
    ) -> None:
        request.send_response(status)
        request.send_header("content-length", str(len(body)))
        for name, value in headers.items():
            request.send_header(name.replace("_", "-"), value)
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(body[: len(body) // 2] if self.cut else body)


@pytest.fixture(params=[False, True], ids=["without ranges", "with ranges"])
def web(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[WebServer]:
    yield from served(tmp_path, ranges=request.param)


@pytest.fixture
def plain_web(tmp_path: Path) -> Iterator[WebServer]:
    yield from served(tmp_path, ranges=False)


def served(tmp_path: Path, *, ranges: bool) -> Iterator[WebServer]:
    folder = tmp_path / "web"
    folder.mkdir()
    server = WebServer(folder, ranges=ranges)
    yield server
    server.close()


@pytest.fixture
def memory() -> Iterator[MemoryFileSystem]:
    files = fsspec.filesystem("memory")
    yield files
    files.rm("/", recursive=True)


def write_rollouts(path: Path) -> None:
    write_scored(path, [[Sampled(1.0), Sampled(0.0)], [Sampled(0.5), Sampled(None)]])


def put(files: MemoryFileSystem, folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            files.pipe(f"/{path.relative_to(folder)}", path.read_bytes())


def write_forms(folder: Path) -> list[str]:
    """The same rows in every form; what to open of each."""
    folder.mkdir(exist_ok=True)
    (folder / "shards").mkdir()
    content = write_jsonl(folder / "rows.jsonl", ROWS).read_bytes()
    (folder / "rows.jsonl.gz").write_bytes(
        gzip.compress(content[:99]) + gzip.compress(content[99:])
    )
    (folder / "rows.json").write_text(json.dumps(ROWS))
    table = pa.Table.from_pylist(ROWS)
    pq.write_table(table, folder / "rows.parquet")
    for i in range(3):
        write_jsonl(folder / "shards" / f"{i}.jsonl", ROWS[10 * i : 10 * i + 10])
    return ["rows.jsonl", "rows.jsonl.gz", "rows.json", "rows.parquet", "shards/", "shards/*.jsonl"]


def same(url: str, local: Path | str) -> None:
    there, here = open_source(url), open_source(local)
    assert (there.name, there.num_rows) == (here.name, here.num_rows)
    assert there.fingerprint == here.fingerprint
    for options in ({}, {"shuffle_seed": 3}):
        assert list(there.rows(**options)) == list(here.rows(**options))
    assert [row.values for row in there.rows()] == ROWS


def test_a_web_servers_files_are_those_of_the_folder(web: WebServer) -> None:
    for form in write_forms(web.folder):
        same(f"{web.url}/{form}", web.folder / form)


def test_a_file_systems_files_are_those_of_the_folder(
    memory: MemoryFileSystem, tmp_path: Path
) -> None:
    datasets = pytest.importorskip("datasets")
    forms = [*write_forms(tmp_path / "x"), "saved"]
    datasets.disable_progress_bars()
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "x" / "saved", num_shards=2)
    put(memory, tmp_path / "x")
    for form in forms:
        same(f"memory://{form.rstrip('/')}", tmp_path / "x" / form)


def test_names_with_spaces_and_percent_signs(plain_web: WebServer) -> None:
    for name, url in (("a b.jsonl", "a%20b.jsonl"), ("a%20b.jsonl", "a%2520b.jsonl")):
        path = write_jsonl(plain_web.folder / name, ROWS)
        same(f"{plain_web.url}/{url}", path)
        same(f"file://{path}", path)
        path.unlink()


def test_a_broken_line_is_named_by_file_and_line(
    memory: MemoryFileSystem, web: WebServer, tmp_path: Path
) -> None:
    (web.folder / "a.jsonl").write_text('{"prompt": "x"}\n{"prompt": \n')
    (web.folder / "a.csv").write_bytes(b"prompt\nx\n\xff\n")
    (web.folder / "a.parquet").write_bytes(b"PAR1 and no more")
    put(memory, web.folder)
    for top in (web.url, "memory:/"):
        with pytest.raises(SourceError, match=r"^a\.jsonl:2: not a JSON object"):
            open_source(f"{top}/a.jsonl")
        with pytest.raises(SourceError, match=r"^a\.csv:3: not UTF-8"):
            open_source(f"{top}/a.csv")
        with pytest.raises(SourceError, match=r"^a\.parquet cannot be read as Parquet"):
            open_source(f"{top}/a.parquet")


def test_what_changes_behind_a_url_changes_nothing_in_a_run(web: WebServer) -> None:
    path = write_jsonl(web.folder / "a.jsonl", ROWS)
    source = open_source(f"{web.url}/a.jsonl")
    write_jsonl(path, [{"prompt": "other"}])
    assert [row.values for row in source.rows(shuffle_seed=None)] == ROWS
    assert open_source(f"{web.url}/a.jsonl").fingerprint != source.fingerprint


class Restless(MemoryFileSystem):
    """Where somebody writes to a file while it is read."""

    protocol = "restless"
    store: dict[str, Any] = {}  # noqa: RUF012
    cachable = False

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.replace("restless://", "memory://"))

    def get_file(self, rpath: str, *args: Any, **kwargs: Any) -> None:
        super().get_file(rpath, *args, **kwargs)
        self.pipe(rpath, self.cat(rpath) + b'{"prompt": "late"}\n')


def test_a_file_that_is_written_to_while_it_is_copied_is_refused() -> None:
    fsspec.register_implementation("restless", Restless, clobber=True)
    Restless().pipe("/a.jsonl", b'{"prompt": "x"}\n')
    with pytest.raises(SourceError, match=r"^restless://a\.jsonl changed while it was copied"):
        open_source("restless://a.jsonl")


def test_a_body_that_is_cut_off_is_an_error(web: WebServer) -> None:
    write_jsonl(web.folder / "a.jsonl", ROWS)
    web.cut = True
    with pytest.raises(SourceError, match=r"/a\.jsonl: ClientPayloadError"):
        open_source(f"{web.url}/a.jsonl")


def test_copies_have_no_name_and_little_memory(
    plain_web: WebServer, memory: MemoryFileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    long = "x" * 100_000
    path = write_jsonl(
        plain_web.folder / "a.jsonl", [{"prompt": long + str(i)} for i in range(400)]
    )
    assert path.stat().st_size > 40e6
    body = memoryview(path.read_bytes())  # the server's memory is no part of ours
    monkeypatch.setattr(Path, "read_bytes", lambda self: body)
    tracemalloc.start()
    try:
        source = open_source(f"{plain_web.url}/a.jsonl")
        assert len([row.data_idx for row in source.rows(shuffle_seed=1)]) == 400
        assert tracemalloc.get_traced_memory()[1] < 30e6
    finally:
        tracemalloc.stop()
    assert list((tmp_path / "tmp").iterdir()) == []


SECRET = "hushhush"


def secret_urls(web: WebServer, name: str) -> list[str]:
    return [
        f"{web.url}/{name}?key={SECRET}",
        f"{web.url}/{name}?key={SECRET}#{SECRET}",
        f"http://u:{SECRET}@{web.netloc}/{name}",
        f"HTTP://u:{SECRET}@{SECRET}@{web.netloc}/{name}?{SECRET}",
        f"simplecache::{web.url}/{name}?key={SECRET}",
    ]


def test_what_a_url_keeps_secret_is_in_no_message(
    plain_web: WebServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "eval_protocol_rft")
    (plain_web.folder / "bad.jsonl").write_text("{")
    (plain_web.folder / "empty.jsonl").write_text("")
    for name in ("bad.jsonl", "empty.jsonl", "none.jsonl", "x.txt", "*.csv", "a"):
        for url in secret_urls(plain_web, name):
            with pytest.raises(SourceError) as caught:
                open_source(url)
            assert SECRET not in "".join(traceback.format_exception(caught.value))
            assert SECRET not in caplog.text
    for url in (
        f"sftp://u:{SECRET}@h/x.jsonl",
        f"s3://{SECRET}@b/x.jsonl",
        f"nope://u:{SECRET}@h/x",
    ):
        with pytest.raises(SourceError) as caught:
            open_source([url])
        assert SECRET not in "".join(traceback.format_exception(caught.value))


def test_a_refusal_says_its_status(plain_web: WebServer) -> None:
    write_jsonl(plain_web.folder / "a.jsonl", ROWS)
    plain_web.key = SECRET
    with pytest.raises(SourceError, match=r"/a\.jsonl\?\*\*\*: HTTP 403 Forbidden$"):
        open_source(f"{plain_web.url}/a.jsonl?key=wrong")
    same(f"{plain_web.url}/a.jsonl?key={SECRET}", plain_web.folder / "a.jsonl")
    plain_web.key, plain_web.password = None, SECRET
    with pytest.raises(SourceError, match=r"//\*\*\*@.*/a\.jsonl: HTTP 401"):
        open_source(f"http://u:wrong@{plain_web.netloc}/a.jsonl")
    same(f"http://u:{SECRET}@{plain_web.netloc}/a.jsonl", plain_web.folder / "a.jsonl")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("s3://b/x.jsonl", "s3fs"),
        ("gs://b/x.jsonl", "gcsfs"),
        ("az://b/x.jsonl", "adlfs"),
        ("nope://b/x.jsonl", "Protocol not known: nope"),
        ("memory://x.jsonl", r"memory://x\.jsonl: no such file or folder"),
        ("memory://*.jsonl", r"memory://\*\.jsonl: no file has such a name"),
        (Path("s3://b/x.jsonl"), r"s3:/b/x\.jsonl: a URL must be given as text"),
    ],
)
def test_what_cannot_be_reached_says_what_is_missing(url: str | Path, message: str) -> None:
    for protocol, package in (("s3:", "s3fs"), ("gs:", "gcsfs"), ("az:", "adlfs")):
        if str(url).startswith(protocol + "//"):
            with contextlib.suppress(ImportError):
                __import__(package)
                pytest.skip(f"{package} is installed")
    with pytest.raises(SourceError, match=message):
        open_source(url)


def test_the_proxy_of_the_environment_is_asked(
    plain_web: WebServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_jsonl(plain_web.folder / "a.jsonl", ROWS)
    monkeypatch.setenv("HTTP_PROXY", plain_web.url)
    monkeypatch.setenv("http_proxy", plain_web.url)
    assert open_source("http://far.invalid/a.jsonl").num_rows == len(ROWS)
    assert plain_web.lines[-1].startswith("GET http://far.invalid/a.jsonl ")


HUB = """
import sys
from eval_protocol_rft.data import open_source
for name in sys.argv[1:]:
    try:
        print([row.values["prompt"] for row in open_source(name).rows()])
    except ValueError as error:
        print(error)
"""


class Hub(Loopback):
    """What `huggingface_hub` asks for a data set."""

    def __init__(self, files: dict[str, bytes]) -> None:
        hub = self
        self.files = files

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                pass

            def do_GET(self) -> None:
                body = hub.answer(self.path)
                self.send_response(404 if body is None else 200)
                self.send_header("content-length", str(len(body or b"")))
                self.send_header("content-type", "application/json")
                self.end_headers()
                self.wfile.write(body or b"")

        super().__init__(Handler)

    def answer(self, target: str) -> bytes | None:
        path = unquote(urlsplit(target).path)
        top = "/api/datasets/o/sums"
        if path in (top, f"{top}/revision/main"):
            return json.dumps({"id": "o/sums", "sha": "1" * 40, "siblings": []}).encode()
        if path.startswith(f"{top}/tree/main"):
            folder = path.removeprefix(f"{top}/tree/main").strip("/")
            inside = f"{folder}/" if folder else ""
            whole = "recursive=true" in target
            names = [name for name in self.files if name.startswith(inside)]
            entries = [
                {"type": "file", "oid": "0" * 40, "size": len(self.files[name]), "path": name}
                for name in names
                if whole or "/" not in name.removeprefix(inside)
            ]
            folders = {name.rpartition("/")[0] for name in names} - {folder, ""}
            entries += [{"type": "directory", "oid": "0" * 40, "path": name} for name in folders]
            return json.dumps(entries).encode()
        return self.files.get(path.removeprefix("/datasets/o/sums/resolve/main/"))


def test_data_sets_of_the_hugging_face_hub() -> None:
    def lines(*prompts: str) -> bytes:
        return "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts).encode()

    files = {
        "README.md": b"# Sums",
        "data/train-00000-of-00002.jsonl": lines("a", "b"),
        "data/train-00001-of-00002.jsonl": lines("c"),
    }
    hub = Hub(files)
    try:
        environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0"}

        def opened(*names: str) -> list[str]:
            command = [sys.executable, "-c", HUB, *names]
            run = subprocess.run(
                command, env=environment, text=True, stdout=subprocess.PIPE, check=True
            )
            return run.stdout.splitlines()

        assert opened(
            "hf://datasets/o/sums", "hf://datasets/o/sums/data/*-00001-*", "hf://datasets/o/none"
        ) == [
            "['a', 'b', 'c']",
            "['c']",
            "hf://datasets/o/none: no such file or folder",
        ]
        files["data/test-00000-of-00001.jsonl"] = lines("d")
        [error, train] = opened("hf://datasets/o/sums", "hf://datasets/o/sums/data/train*")
        assert "hf://datasets/o/sums holds several splits (test, train)" in error
        assert "as 'hf://datasets/o/sums/data/test*'" in error
        assert train == "['a', 'b', 'c']"
    finally:
        hub.close()


def test_generate_reads_a_url_and_keeps_its_secret(plain_web: WebServer, tmp_path: Path) -> None:
    rows = [{"prompt": f"{a}+{a}=", "ground_truth": str(2 * a)} for a in (11, 12)]
    content = write_jsonl(plain_web.folder / "sums.jsonl", rows).read_bytes()
    (plain_web.folder / "sums.jsonl.gz").write_bytes(gzip.compress(content))
    plain_web.key = SECRET
    model = ("--model", "local/arithmetic", "--max-tokens", 4, "--seed", 1)
    out = tmp_path / "out.jsonl"
    url = f"{plain_web.url}/sums.jsonl.gz?key={SECRET}"
    result = succeed("generate", url, "-o", out, *model)
    assert SECRET not in result.output
    assert [row.row_id for row in data.RolloutDataset(out)] == ["sums-0", "sums-1"]
    for path in tmp_path.iterdir():
        assert path.is_dir() or SECRET.encode() not in path.read_bytes()
    # The same data set, whatever it is read from.
    assert (
        "nothing to do"
        in succeed("generate", plain_web.folder / "sums.jsonl", "-o", out, *model).output
    )


@pytest.mark.parametrize("command", ["generate", "train", "stats"])
def test_ctrl_c_does_not_wait_for_a_slow_server(
    command: str, tmp_path: Path, zygote: Zygote
) -> None:
    (tmp_path / "tmp").mkdir()
    out = tmp_path / "out.parquet"
    goes_on = ". The same command goes on"
    test = "examples/arithmetic/test_arithmetic.py::test_arithmetic"
    model = ("--model", "local/arithmetic", "-o", out)
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}/rows.jsonl"
        arguments: dict[str, tuple[object, ...]] = {
            "generate": (url, *model),
            "train": (test, "--data", url, *model),
            "stats": (url,),
        }
        environment = {"TMPDIR": str(tmp_path / "tmp")}
        program = zygote.start(command, *arguments[command], env=environment)
        server.settimeout(300)  # where the command ends without asking
        asked, _ = server.accept()
        with asked:
            asked.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\nx")
            program.send_signal(signal.SIGINT)
            assert program.wait() == 130
    advice = {"generate": goes_on, "train": f"{goes_on} in {out}"}
    assert program.stderr == f"ep-rft: stopped{advice.get(command, '')}\n"
    assert [path.name for path in tmp_path.iterdir()] == ["tmp"]
    assert list((tmp_path / "tmp").iterdir()) == []


def test_every_command_reads_rollouts_from_anywhere(web: WebServer, tmp_path: Path) -> None:
    write_rollouts(web.folder / "r.parquet")
    write_rollouts(web.folder / "r.jsonl")
    for name in ("r.jsonl", "r.jsonl.metadata.json"):
        (web.folder / "gz").mkdir(exist_ok=True)
        content = (web.folder / name).read_bytes()
        (web.folder / "gz" / name).write_bytes(content)
    packed = web.folder / "gz" / "r.jsonl"
    packed.with_name("r.jsonl.gz").write_bytes(gzip.compress(packed.read_bytes()))
    packed.unlink()
    expected = succeed("stats", web.folder / "r.parquet").output
    inputs = [
        f"{web.url}/r.parquet?key={SECRET}",
        f"{web.url}/r.jsonl",
        f"{web.url}/gz/r.jsonl.gz",
        str(web.folder / "gz" / "r.jsonl.gz"),
        str(web.folder / "r*.parquet"),
    ]
    for number, name in enumerate(inputs):
        folder = tmp_path / str(number)
        folder.mkdir()
        assert succeed("stats", name, "--quiet").output == expected
        outputs = [
            succeed("show", name),
            succeed("sql", name, "select count(*) from completions"),
            succeed("filter", name, "-o", folder / "f.parquet", "--min-tokens", 1),
            succeed("report", name, "-o", folder / "r.html"),
            succeed("convert", name, folder / "c.jsonl"),
            succeed("datums", name, "-o", folder / "d.jsonl", "--format", "rl-step"),
        ]
        assert not any(SECRET in result.output for result in outputs)
        assert (
            data.RolloutDataset(folder / "c.jsonl").num_rows == data.RolloutDataset(name).num_rows
        )
        for path in folder.iterdir():
            assert SECRET.encode() not in path.read_bytes()


def test_a_broken_rollout_file_is_called_by_its_url(plain_web: WebServer) -> None:
    path = plain_web.folder / "r.jsonl"
    write_rollouts(path)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], "{", *lines[2:]]))
    url = f"{plain_web.url}/r.jsonl"
    with pytest.raises(data.FormatError) as caught:
        list(data.RolloutDataset(f"{url}?key={SECRET}"))
    assert str(caught.value).startswith(f"{url}?***:2: ")
    assert refused("stats", f"{url}?key={SECRET}").startswith(f"ep-rft: {url}?***:2: ")


@pytest.mark.parametrize(
    "name", [f"s3://u:{SECRET}@b/x.parquet", f"https://h/x.parquet?k={SECRET}"]
)
def test_outputs_to_urls_are_refused(name: str, tmp_path: Path) -> None:
    write_rollouts(tmp_path / "r.parquet")
    rows = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    for command in (
        ("generate", rows, "-o", name, "--model", "local/arithmetic"),
        ("filter", tmp_path / "r.parquet", "-o", name),
        ("convert", tmp_path / "r.parquet", name),
        ("report", tmp_path / "r.parquet", "-o", name),
        ("score", tmp_path / "r.parquet", "-e", "x.py::y", "-o", name),
    ):
        said = refused(*command)
        assert "a URL, and what is written goes to this machine" in said
        assert SECRET not in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.parquet", "rows.jsonl"]


def test_rollouts_behind_a_url_are_scored_into_a_file_here(
    plain_web: WebServer, tmp_path: Path
) -> None:
    write_rollouts(plain_web.folder / "r.parquet")
    (tmp_path / "rewards.py").write_text("def one(row):\n    return 1.0\n")
    evaluator = f"{tmp_path / 'rewards.py'}::one"
    url = f"{plain_web.url}/r.parquet"
    assert "name another file with -o" in refused("score", url, "-e", evaluator, "--name", "one")
    with pytest.raises(data.JobError, match=r"/r\.parquet is only read: name a new file"):
        data.score(url, evaluator, name="one")
    summary = data.score(url, evaluator, name="one", output=tmp_path / "out.parquet")
    assert summary.scored == summary.completions - summary.failed > 0
