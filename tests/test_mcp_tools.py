"""Tools of MCP servers in a `ToolLoop`: real ones over stdio and HTTP that work, die and hang."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from eval_protocol.models import EvaluationRow
from eval_protocol.pytest import evaluation_test
from eval_protocol.pytest.types import RolloutProcessorConfig

from eval_protocol_rft import score_each_completion
from eval_protocol_rft.data._dataset import RolloutDataset
from eval_protocol_rft.data._files import JobError
from eval_protocol_rft.data._generate import agenerate
from eval_protocol_rft.episodes import _mcp
from eval_protocol_rft.episodes._episode_processor import EpisodeRolloutProcessor
from eval_protocol_rft.episodes._mcp import McpServers
from eval_protocol_rft.episodes._mcp_config import McpServerError, read_config
from eval_protocol_rft.episodes._tool_loop import ToolLoop
from eval_protocol_rft.rollout._processor import RolloutError
from tests.data.servers import write_jsonl
from tests.test_episodes import TOKENIZER, Scripted, a_row, call, roll_out
from tests.waiting import wait_until

SERVER = Path(__file__).with_name("mcp_server.py")


@pytest.fixture
def pids(tmp_path: Path) -> Iterator[Path]:
    """A folder where servers leave their process ids; none of them may outlive the test."""
    folder = tmp_path / "pids"
    folder.mkdir()
    yield folder
    wait_until(lambda: not living(folder), lambda: living(folder))


def living(folder: Path) -> list[int]:
    """The servers that run."""
    found = []
    for file in folder.iterdir():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(file.name), 0)
            found.append(int(file.name))
    return found


def config_of(pids: Path, **more: Any) -> dict[str, Any]:
    server = {"command": sys.executable, "args": [str(SERVER), str(pids)], **more}
    return {"mcpServers": {"tests": server}}


def calling(*calls: str) -> Callable[[int, str], str]:
    """Makes these calls, one a turn, and answers."""
    return lambda turn, prompt: calls[turn] if turn < len(calls) else "done"


def told(row: EvaluationRow) -> list[str]:
    """What tools answered."""
    return [str(message.content) for message in row.messages if message.role == "tool"]


def double(number: int) -> int:
    """Double it."""
    return 2 * number


async def test_tools_of_a_server_stand_beside_functions(pids: Path) -> None:
    config = config_of(pids)

    def world() -> ToolLoop:
        return ToolLoop(double, mcp=config)

    script = calling(call("add", a=2, b=3), call("double", number=5), call("parts"))
    row, sampler = await roll_out(world, script)
    assert told(row) == ['{"result": 5}', "10", "one\ntwo"]
    assert row.tools is not None
    names = [tool["function"]["name"] for tool in row.tools]
    assert names == ["double", "add", "note", "parts", "picture", "refuse", "wait", "die"]
    added = row.tools[1]["function"]
    assert added["description"] == "Add two numbers."
    assert set(added["parameters"]["properties"]) == {"a", "b"}
    assert '"name": "add"' in TOKENIZER.decode(sampler.exchanges[0][0])


async def test_each_episode_has_servers_of_its_own_unless_they_are_shared(pids: Path) -> None:
    config = config_of(pids)
    script = calling(call("note", text="a"))
    row, _ = await roll_out(lambda: ToolLoop(mcp=config), script, n=2)
    assert len(os.listdir(pids)) == 2
    assert told(row) == ['{"result": "a"}']

    shared = McpServers(config)
    for said in ("a", "a a"):
        row, _ = await roll_out(lambda: ToolLoop(mcp=shared), script)
        assert told(row) == [json.dumps({"result": said})]
    assert len(living(pids)) == 1
    await shared.aclose()


async def test_what_goes_wrong_with_a_call_is_told_to_the_model(pids: Path) -> None:
    config = config_of(pids)

    def world() -> ToolLoop:
        return ToolLoop(mcp=config)

    script = calling(
        call("add", a="two", b=3),
        call("refuse"),
        call("picture"),
        "<tool_call>" + '{"name": "add", "arguments": "much"}' + "</tool_call>",
        call("die"),
        call("add", a=2, b=3),
    )
    row, _ = await roll_out(world, script)
    answers = told(row)
    assert answers[0].startswith("Error executing tool add")
    assert answers[1:3] == ["Error: no", "(image/png, which is no text)"]
    assert "the MCP server 'tests'" in answers[-2]
    assert answers[-1].startswith("Error: add()")
    assert "the MCP server 'tests'" in answers[-1]


async def test_a_call_that_hangs_is_told_to_the_model(pids: Path) -> None:
    config = config_of(pids)
    row, _ = await roll_out(lambda: ToolLoop(mcp=config, seconds=0.2), calling(call("wait")))
    (answer,) = told(row)
    assert answer.startswith("Error: wait() took longer than 0.")


async def test_a_shared_server_that_died_is_started_for_the_next_episode(pids: Path) -> None:
    shared = McpServers(config_of(pids))
    script = calling(call("note", text="a"))
    await roll_out(lambda: ToolLoop(mcp=shared), script)
    (first,) = living(pids)
    os.kill(first, signal.SIGKILL)
    wait_until(lambda: not living(pids) or first not in living(pids))
    row, _ = await roll_out(lambda: ToolLoop(mcp=shared), script, n=4)
    assert told(row)
    assert len(os.listdir(pids)) == 2
    await shared.aclose()


async def test_a_shared_server_that_hung_as_it_started_is_started_for_the_next_episode(
    pids: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mended = tmp_path / "mended"
    script = (
        "import os, runpy, sys\n"
        f"if not os.path.exists({str(mended)!r}):\n"
        "    sys.exit(len(sys.stdin.read()))\n"
        f"sys.argv[1:] = [{str(pids)!r}]\n"
        f"runpy.run_path({str(SERVER)!r}, run_name='__main__')"
    )
    slow = {"command": sys.executable, "args": ["-c", script]}
    shared = McpServers({"mcpServers": {"slow": slow}})
    with monkeypatch.context() as patched:
        patched.setattr(_mcp, "_STARTING_SECONDS", 0.5)
        waiting = await asyncio.gather(shared.tools(), shared.tools(), return_exceptions=True)
    said = "the MCP server 'slow' cannot be used: it did not answer within 0.5 s of its start"
    assert list(map(str, waiting)) == [said, said]
    mended.touch()
    assert await shared.tools()
    await shared.aclose()


async def test_a_shared_server_that_hangs_is_started_for_the_next_episode(
    pids: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = McpServers(config_of(pids))
    await shared.tools()
    (first,) = living(pids)
    os.kill(first, signal.SIGSTOP)
    monkeypatch.setattr(_mcp, "_PING_SECONDS", 0.1)
    monkeypatch.setattr("mcp.client.stdio.PROCESS_TERMINATION_TIMEOUT", 0.1)
    assert await shared.tools()
    assert first not in living(pids)
    await shared.aclose()


async def test_a_server_that_cannot_be_used_costs_its_episode_and_says_why(pids: Path) -> None:
    script = "import sys; print('out of order', file=sys.stderr); sys.exit(1)"
    broken = {"mcpServers": {"broken": {"command": sys.executable, "args": ["-c", script]}}}
    missing = {"mcpServers": {"missing": {"command": "no-such-program"}}}
    unset = config_of(pids, env=["NO_SUCH_VARIABLE"])
    for config, said in (
        (broken, "'broken' cannot be used: .*out of order"),
        (missing, "'missing' cannot be used: FileNotFoundError.*no-such-program"),
        (unset, "'tests' cannot be used: .*not set: NO_SUCH_VARIABLE"),
    ):
        with pytest.raises(RolloutError, match=said):
            await roll_out(lambda config=config: ToolLoop(mcp=config), calling())


class Refusing(BaseHTTPRequestHandler):
    """Knows no key."""

    def do_POST(self) -> None:
        self.send_error(401, f"no {self.headers['Authorization']}")

    def log_message(self, *_: Any) -> None:
        """Not on the terminal."""


async def test_no_error_tells_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THE_KEY", "hunter2-key")
    monkeypatch.setenv("TOKEN", "hunter2-needed")
    script = "import os, sys; print(os.environ['TOKEN'], file=sys.stderr); sys.exit(1)"
    with ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/mcp?key=hunter2-query"
        servers = (
            {"url": url, "authorization": "Bearer ${THE_KEY}"},
            {"command": sys.executable, "args": ["-c", script], "env": {"TOKEN": "hunter2-env"}},
            {"command": sys.executable, "args": ["-c", script], "env": ["TOKEN"]},
            {"url": url.replace("://", "://u:pw@")},
            {"url": url.replace("://", "://hunter2user:hunter2%2Fpass@")},
        )
        for one in servers:
            config = {"mcpServers": {"secret": one}}
            with pytest.raises(RolloutError, match="'secret' cannot be used") as caught:
                await roll_out(lambda config=config: ToolLoop(mcp=config), calling())
            assert "hunter2" not in str(caught.value)
            assert "u:pw" not in str(caught.value)
        server.shutdown()


async def test_a_cancelled_rollout_leaves_no_server(pids: Path) -> None:
    config, begun = config_of(pids), asyncio.Event()

    class Waiting(Scripted):
        async def sample(self, prompt_ids: Any, params: Any, *, seed: int | None = None) -> Any:
            begun.set()
            await asyncio.Event().wait()

    processor = EpisodeRolloutProcessor(
        lambda: ToolLoop(mcp=config), sampler=Waiting(lambda turn, prompt: "")
    )
    (task,) = processor([a_row()], settings())
    await begun.wait()
    assert len(living(pids)) == 1
    await processor.acleanup()
    assert task.cancelled()


def settings(path: str = "") -> RolloutProcessorConfig:
    return RolloutProcessorConfig(
        completion_params={"model": "any", "max_tokens": 200},
        mcp_config_path=path,
        semaphore=asyncio.Semaphore(8),
        server_script_path=None,
        steps=30,
    )


@pytest.mark.parametrize("functions", [(), (double,)])
async def test_the_servers_of_an_evaluation_test_are_the_environments(
    pids: Path, tmp_path: Path, functions: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Eval Protocol's own agent has them: `env` names what must be set."""
    monkeypatch.setenv("SET_BY_THE_TEST", "1")
    path = tmp_path / "mcp.json"
    path.write_text(json.dumps(config_of(pids, env=["SET_BY_THE_TEST"])))
    world = (lambda: ToolLoop(*functions)) if functions else None
    processor = EpisodeRolloutProcessor(
        world, sampler=Scripted(calling(call("add", a=2, b=3), call("double", number=5)))
    )
    (task,) = processor([a_row()], settings(str(path)))
    row = await task
    await processor.acleanup()
    first, second = told(row)
    assert first == '{"result": 5}'
    assert (second == "10") == bool(functions)


async def test_a_bulk_job_has_the_servers_of_the_evaluation_test(
    pids: Path, tmp_path: Path
) -> None:
    path = tmp_path / "mcp.json"
    path.write_text(json.dumps(config_of(pids)))

    @evaluation_test(
        input_rows=[[a_row()]],
        completion_params=[{"model": "any"}],
        rollout_processor=EpisodeRolloutProcessor(),
        mcp_config_path=str(path),
    )
    @score_each_completion
    def test_it(row: EvaluationRow) -> EvaluationRow:
        return row

    rows = write_jsonl(tmp_path / "data.jsonl", [{"prompt": "What is 2+3?"}])
    output = tmp_path / "out.parquet"

    async def generate() -> None:
        await agenerate(
            rows,
            output,
            {"model": "any", "n": 2, "max_tokens": 200},
            episodes=test_it,
            sampler=Scripted(calling(call("add", a=2, b=3))),
            progress=False,
        )

    await generate()
    for row in RolloutDataset(output):
        assert row.episode is not None
        assert row.episode["messages"][2]["content"] == '{"result": 5}'
        assert next(tool["function"]["name"] for tool in row.tools or ()) == "add"
    path.write_text(json.dumps(config_of(pids, env=["HOME"])))
    with pytest.raises(JobError, match="changed: mcp_config_path"):
        await generate()


async def test_servers_of_an_evaluation_test_need_a_tool_loop(tmp_path: Path) -> None:
    from tests.test_worlds import OneTurn

    path = tmp_path / "mcp.json"
    path.write_text('{"mcpServers": {}}')
    for world, said in ((OneTurn, "mcp_config_path is for a ToolLoop"), (None, "no environment")):
        processor = EpisodeRolloutProcessor(world, sampler=Scripted(calling()))
        (task,) = processor([a_row()], settings(str(path) if world else ""))
        with pytest.raises((RolloutError, ValueError), match=said):
            await task
        await processor.acleanup()


async def test_a_server_over_http(pids: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    command = [sys.executable, str(SERVER), str(pids), str(port)]
    with subprocess.Popen(command) as process:  # noqa: ASYNC220 - it starts at once
        wait_until(lambda: answers(port))
        config = {"mcpServers": {"tests": {"url": f"http://127.0.0.1:{port}/mcp"}}}
        row, _ = await roll_out(
            lambda: ToolLoop(mcp=config), calling(call("note", text="a"), call("note", text="b"))
        )
        assert told(row) == ['{"result": "a"}', '{"result": "a b"}']
        process.kill()
        with pytest.raises(RolloutError, match="'tests' cannot be used"):
            await roll_out(lambda: ToolLoop(mcp=config), calling())


def answers(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
        return True
    return False


def test_servers_end_with_the_process(pids: Path, tmp_path: Path) -> None:
    program = f"""
import asyncio
from eval_protocol_rft.episodes import McpServers
servers = McpServers({config_of(pids)!r})
print(len(asyncio.run(servers.tools())))
"""
    file = tmp_path / "program.py"
    file.write_text(program)
    done = subprocess.run([sys.executable, str(file)], capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("7\n", 0), done.stderr
    assert len(os.listdir(pids)) == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is none"),
        ("[]", "is none"),
        ('{"servers": {}}', "mcpServers"),
        ('{"mcpServers": {"a": {}}}', "'a' needs either a command or a url"),
        ('{"mcpServers": {"a": {"url": "http://[a"}}}', "the url of MCP server 'a' is none"),
        ('{"mcpServers": {"a": {"command": 1}}}', "Expected `str"),
    ],
)
def test_a_wrong_configuration_is_told_before_anything_is_started(
    tmp_path: Path, text: str, said: str
) -> None:
    path = tmp_path / "mcp.json"
    with pytest.raises(McpServerError, match="cannot be read"):
        read_config(path)
    path.write_text(text)
    with pytest.raises(McpServerError, match=said):
        ToolLoop(mcp=path)
