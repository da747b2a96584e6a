"""`ep-rft generate --episodes`: each turn as it went over the wire, continued by the episode."""

from __future__ import annotations

import json
import random
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from eval_protocol_rft import EpisodeRolloutProcessor, data
from eval_protocol_rft._turn_payloads import turn_runs
from eval_protocol_rft.data._dataset import RolloutDataset
from eval_protocol_rft.data._files import JobError
from eval_protocol_rft.data._generate_episodes import episode_job
from eval_protocol_rft.data._job_store import parts_folder
from eval_protocol_rft.episodes._environment import Environment, EpisodeLimits, Step
from eval_protocol_rft.episodes._tool_loop import ToolLoop
from eval_protocol_rft.scoring._scored_rows import completion_views
from tests.data.servers import at, pairs, refused, rows_by_pair, stored, succeed, texts, write_jsonl
from tests.programs import Program, Zygote
from tests.stub_server import Late, StubServer, sampled
from tests.waiting import wait_until

PROMPTS, N, TOKENS = 8, 3, 8
WORLD = '''
from eval_protocol_rft import EpisodeRolloutProcessor
from eval_protocol_rft.episodes import Environment, EpisodeLimits, Step

class Talk(Environment):
    """Ends after a turn for data row 0, two for row 1, three for row 2, and so on round."""

    def reset(self, row):
        self.left = int(row.ground_truth) % 3 + 1
        self.level = row.input_metadata.dataset_info["level"]
        return [{"role": "user", "content": f"level {self.level}"}]

    def step(self, messages, assistant):
        self.left -= 1
        said = f"{len(messages)} before, then {assistant.content}"
        return Step(
            messages=[{"role": "user", "content": said}],
            done=not self.left,
            reward=self.left / 4,
            metrics={"left": self.left},
        )

class Moody(Talk):
    def step(self, messages, assistant):
        if self.level == 10:
            raise ValueError("not today")
        return super().step(messages, assistant)

class Forgetful(Talk):
    made = 0

    def reset(self, row):
        Forgetful.made += 1
        self.left = 1
        return [{"role": "user", "content": f"you are number {Forgetful.made}"}]

class NeedsSize(Talk):
    def __init__(self, size): ...

class NoSteps: ...

one = Talk()
WORDS = 3
processor = EpisodeRolloutProcessor(Talk, limits=EpisodeLimits(turns=2), on_rewrite="reject")

def judge(row):
    episode = row.execution_metadata.extra["episode"]
    said = " / ".join(str(message.content) for message in row.messages)
    from eval_protocol.models import EvaluateResult
    return EvaluateResult(score=float(episode["turns"]), reason=f"{episode['stop_reason']}: {said}")
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("episodes")
    (folder / "world.py").write_text(WORLD)
    rows = [{**row, "level": 10 * i} for i, row in enumerate(texts(PROMPTS))]
    write_jsonl(folder / "data.jsonl", rows)
    return folder


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "episodes.parquet"


def arguments(server: StubServer, folder: Path, tokenizer: Path, *, world: str = "Talk") -> list:
    named = at(server, tokenizer, max_tokens=TOKENS)
    return [*named, "--episodes", f"{folder / 'world.py'}::{world}", "-n", N]


def generate(folder: Path, output: Path, *further: Any) -> None:
    succeed("generate", folder / "data.jsonl", "-o", output, *further)


def requests(server: StubServer) -> list[tuple[tuple[int, ...], int]]:
    return [(seen.prompt, seen.seed) for seen in server.requests]


def turns(row: dict[str, Any]) -> list[tuple[tuple[int, ...], list[int], list[float]]]:
    """(prompt ids, sampled ids, logprobs) of each turn of a row, from its columns."""
    columns = ("segment_tokens", "segment_logprobs", "segment_loss_mask")
    found = []
    for tokens, logprobs, mask in zip(*(row[name] for name in columns), strict=True):
        assert len(tokens) == len(logprobs) == len(mask)
        for is_sampled, start, stop in turn_runs(mask):
            if is_sampled:
                found.append((tuple(tokens[:start]), tokens[start:stop], logprobs[start:stop]))
            else:
                assert not any(logprobs[start:stop])
    return found


def test_every_turn_has_the_ids_and_logprobs_that_went_over_the_wire(
    folder: Path, output: Path, server: StubServer, tokenizer_folder: Path
) -> None:
    generate(folder, output, *arguments(server, folder, tokenizer_folder))
    rows = rows_by_pair(output)
    assert list(rows) == pairs(PROMPTS, N)
    seeds = dict(requests(server))
    recorded = []
    for (i, _), row in rows.items():
        told = turns(row)
        assert row["turns"] == len(told) <= i % 3 + 1
        assert (told[0][0], row["seed"]) in set(requests(server))
        for t, (prompt, ids, logprobs) in enumerate(told):
            seed = row["seed"] if t == 0 else seeds[prompt]
            recorded.append((prompt, seed))
            wanted_ids, wanted = sampled(prompt, seed, TOKENS)
            assert ids == wanted_ids
            assert logprobs == np.array(wanted, np.float32).tolist()
        assert (tuple(row["prompt_ids"]), row["completion_ids"], row["logprobs"]) == told[0]
        cut = len(told[-1][1]) == TOKENS and row["stop_reason"] == "length"
        assert row["truncated"] == cut == (row["finish_reason"] == "length")
        assert row["attempts"] == len(told)
        assert [m["content"] for m in row["messages"][:2]] == [f"question {i}", f"level {10 * i}"]
        assert (row["row_messages"], row["prompt"]) == (1, f"question {i}")
    assert sorted(recorded) == sorted(requests(server))
    assert {row["stop_reason"] for row in rows.values()} == {"done", "length"}
    metadata = RolloutDataset(output).metadata
    assert metadata.schema_version == 2
    assert metadata.episodes is not None
    assert metadata.episodes.code.keys() == {"world.py"}


def test_the_evaluator_sees_the_whole_conversation(
    folder: Path, output: Path, server: StubServer, tokenizer_folder: Path
) -> None:
    generate(folder, output, *arguments(server, folder, tokenizer_folder))
    succeed("score", output, "-e", f"{folder / 'world.py'}::judge", "--quiet")
    for row in rows_by_pair(output).values():
        assert row["reward"] == row["turns"]
        said = " / ".join(message["content"] for message in row["messages"])
        assert row["reward_reason"] == f"{row['stop_reason']}: {said}"
    succeed("datums", output, "-o", output.with_suffix(".npz"), "--algorithm", "cispo", "--quiet")


def start(zygote: Zygote, folder: Path, output: Path, *further: object) -> Program:
    return zygote.start("generate", folder / "data.jsonl", "-o", output, *further)


def compared(path: Path) -> dict[Any, Any]:
    """All of each episode but what depends on when and how often it was asked for."""
    free = ("attempts", "seconds", "began_at", "request_id")
    return {
        pair: {name: value for name, value in row.items() if name not in free}
        for pair, row in rows_by_pair(path).items()
    }


def test_killed_at_any_moment_it_goes_on_with_exactly_the_episodes_that_are_missing(
    folder: Path,
    output: Path,
    zygote: Zygote,
    server: StubServer,
    tokenizer_folder: Path,
) -> None:
    whole = output.with_name("whole.parquet")
    with StubServer() as other:
        generate(folder, whole, *arguments(other, folder, tokenizer_folder))
    asked = arguments(server, folder, tokenizer_folder)
    server.script = lambda seen: Late(random.uniform(0.002, 0.03))

    def on_disk() -> set[tuple[tuple[int, ...], int]]:
        return {(tuple(row.prompt_ids), row.seed) for row in stored(output).values()}

    killed = 0
    for _ in range(3):
        before, begun = on_disk(), len(server.requests)
        command = start(zygote, folder, output, *asked)
        enough = begun + random.randrange(5, 25)
        wait_until(lambda enough=enough: len(server.requests) >= enough or output.exists())
        killed += command.kill() == -signal.SIGKILL
        assert not before.intersection(requests(server)[begun:])
        assert before <= on_disk()
    assert killed
    before, begun = on_disk(), len(server.requests)
    command = start(zygote, folder, output, *asked)
    assert command.wait() == 0, command.said
    assert not parts_folder(output).exists()
    last = requests(server)[begun:]
    assert len(last) == len(set(last))
    assert not before.intersection(last)
    assert compared(output) == compared(whole)


def test_an_environment_that_raises_costs_its_own_episodes_and_they_can_be_retried(
    folder: Path, output: Path, server: StubServer, tokenizer_folder: Path
) -> None:
    asked = arguments(server, folder, tokenizer_folder, world="Moody")
    generate(folder, output, *asked)
    failed = {pair: row for pair, row in rows_by_pair(output).items() if row["error"] is not None}
    assert {i for i, _ in failed} == {1}
    for row in failed.values():
        assert row["error"] == "turn 1: Moody.step() raised ValueError: not today"
        assert (row["error_kind"], row["turns"], row["segment_tokens"]) == ("internal", None, None)
    begun = len(server.requests)
    generate(folder, output, *asked, "--retry-failed")
    assert len(server.requests) - begun == len(failed)


def test_episodes_of_a_row_answer_one_prompt(
    folder: Path, output: Path, server: StubServer, tokenizer_folder: Path
) -> None:
    asked = arguments(server, folder, tokenizer_folder, world="Forgetful")
    generate(folder, output, *asked, "--limit", 1)
    rows = rows_by_pair(output).values()
    failed = [row for row in rows if row["error"] is not None]
    assert len(failed) == N - 1
    for row in failed:
        assert (row["error_kind"], row["attempts"]) == ("prompt", 0)
        assert "reset() said something else in episode" in row["error"]
    assert len(server.requests) == sum(row["attempts"] for row in rows)


REFUSED = {
    "no such file": ("nowhere.py::Talk", "there is no file"),
    "no such name": ("{world}::Walk", "world has no 'Walk'"),
    "no name": ("{world}", "names no environment"),
    "an environment": ("{world}::one", "is one Talk, and each episode needs its own"),
    "no steps": ("{world}::NoSteps", "is a class without step"),
    "arguments": ("{world}::NeedsSize", "needs arguments"),
    "no factory": ("{world}::WORDS", "is of type int, and makes no environments"),
}


@pytest.mark.parametrize(("name", "problem"), REFUSED.values(), ids=list(REFUSED))
def test_what_makes_no_environments_is_refused_before_anything_is_asked(
    name: str,
    problem: str,
    folder: Path,
    output: Path,
    server: StubServer,
    tokenizer_folder: Path,
) -> None:
    given = name.format(world=folder / "world.py")
    asked = [*at(server, tokenizer_folder), "--episodes", given]
    assert problem in refused("generate", folder / "data.jsonl", "-o", output, *asked)
    assert not server.requests
    assert not output.exists()


def test_what_is_not_for_episodes_is_refused_before_anything_is_asked(
    folder: Path, output: Path, server: StubServer, tokenizer_folder: Path
) -> None:
    asked = arguments(server, folder, tokenizer_folder)
    source = folder / "data.jsonl"
    said = refused("generate", source, "-o", output, *asked, "--engine", "ray")
    assert "use the local engine" in said
    plain = at(server, tokenizer_folder)
    said = refused("generate", source, "-o", output, *plain, "--max-turns", 3)
    assert "of episodes" in said
    ids = write_jsonl(output.with_name("ids.jsonl"), [{"prompt_token_ids": [70, 71]}])
    said = refused("generate", ids, "-o", output, *asked, "--prompt-key", "prompt_token_ids")
    assert "are token ids, and an episode renders its turns from messages" in said
    assert not server.requests


def test_a_job_goes_on_only_with_the_same_environment_and_limits(
    folder: Path, output: Path, server: StubServer, tokenizer_folder: Path, tmp_path: Path
) -> None:
    here = tmp_path / "own"
    here.mkdir()
    world = here / "own_world.py"
    world.write_text(WORLD)
    asked = [*at(server, tokenizer_folder), "-n", 1, "--episodes", f"{world}::Talk"]
    generate(folder, output, *asked)
    source, begun = folder / "data.jsonl", len(server.requests)
    said = refused("generate", source, "-o", output, *asked, "--max-turns", 2)
    assert "episodes.limits" in said
    said = refused("generate", source, "-o", output, *at(server, tokenizer_folder), "-n", 1)
    assert "episodes.environment" in said
    world.write_text(WORLD.replace("self.left / 4", "self.left / 5"))
    said = refused("generate", source, "-o", output, *asked)
    assert "the environment is an earlier version of it (changed: own_world.py)" in said
    world.write_text("# a comment\n" + WORLD.replace("class NoSteps: ...", ""))
    generate(folder, output, *asked)
    assert len(server.requests) == begun


def test_a_processor_brings_its_limits_and_flags_go_before_them(folder: Path) -> None:
    class Quick(Environment):
        def step(self, messages: Any, assistant: Any) -> Step:
            return Step(done=True)

    processor = EpisodeRolloutProcessor(Quick, limits=EpisodeLimits(turns=5), on_rewrite="reject")
    job = episode_job(processor, {"tokens": 99}, None)
    assert (job.environment, job.on_rewrite) == (Quick, "reject")
    assert job.limits == EpisodeLimits(turns=5, tokens=99)
    assert episode_job(Quick, EpisodeLimits(turns=2), "reject").limits == EpisodeLimits(turns=2)
    named = episode_job(f"{folder / 'world.py'}::processor", None, "split")
    assert (named.limits.turns, named.on_rewrite) == (2, "split")
    with pytest.raises(JobError, match="split_reasoning"):
        episode_job(EpisodeRolloutProcessor(Quick, split_reasoning=False), None, None)


def test_tools_of_the_environment_are_in_the_prompt_and_in_the_file(
    folder: Path, output: Path
) -> None:
    """With the bundled model, from Python."""

    def add(a: int, b: int) -> int:
        """Add."""
        return a + b

    def with_tools() -> ToolLoop:
        return ToolLoop(add)

    rows = write_jsonl(output.with_name("one.jsonl"), [{"prompt": "10+20="}])
    data.generate(
        rows, output, {"model": "local/arithmetic", "n": 2, "max_tokens": 8}, episodes=with_tools
    )
    table = pq.read_table(output)
    for text in table.column("tools").to_pylist():
        assert json.loads(text)[0]["function"]["name"] == "add"
    assert table.column("turns").to_pylist() == [1, 1]
    seen = RolloutDataset(output).evaluation_rows()
    for view in (view for row in seen for view in completion_views(row) or ()):
        assert [tool["function"]["name"] for tool in view.tools or ()] == ["add"]
