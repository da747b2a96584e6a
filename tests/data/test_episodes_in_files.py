"""Episodes in rollout files: what is sampled in them, who is asked what, and who is left."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow.parquet as pq
import pytest
from eval_protocol.models import EvaluationRow
from eval_protocol.pytest.types import RolloutProcessorConfig
from typer.testing import CliRunner

from eval_protocol_rft import EpisodeRolloutProcessor, score_rows
from eval_protocol_rft.cli import app
from eval_protocol_rft.data._convert import convert
from eval_protocol_rft.data._dataset import RolloutDataset
from eval_protocol_rft.data._example_rules import ExampleRules
from eval_protocol_rft.data._files import JobError, write_rows
from eval_protocol_rft.data._filter import FilterRules, filter_rollouts
from eval_protocol_rft.data._format import FileMetadata, schema
from eval_protocol_rft.data._from_ep import extra_of, from_row
from eval_protocol_rft.data._row_groups import from_record_batch, to_record_batch
from eval_protocol_rft.data._sql import run_query
from eval_protocol_rft.data._stats import rollout_stats
from eval_protocol_rft.data._to_ep import to_row
from eval_protocol_rft.episodes._environment import EpisodeLimits
from eval_protocol_rft.local._sampler import load_local_sampler
from eval_protocol_rft.record import RolloutRecord, Score
from examples.retry import test_retry as example

N = 6
EVALUATOR = f"{Path(example.__file__)}::test_retry"


class Listening:
    """The bundled model, and what it was asked and answered in each session."""

    def __init__(self) -> None:
        self.model = load_local_sampler("arithmetic")
        self.tokenizer = self.model.tokenizer
        self.heard: dict[str, list[tuple[list[int], list[int]]]] = {}

    async def sample(self, prompt_ids: Any, params: Any, *, seed: int | None = None) -> Any:
        completion = await self.model.sample(prompt_ids, params, seed=seed)
        turns = self.heard.setdefault(params.session, [])
        turns.append((list(prompt_ids), completion.token_ids))
        return completion

    async def aclose(self) -> None:
        await self.model.aclose()


async def rolled_out(sampler: Any, rows: list[EvaluationRow]) -> list[EvaluationRow]:
    processor = EpisodeRolloutProcessor(
        example.second_try, sampler=sampler, limits=EpisodeLimits(turns=2)
    )
    config = RolloutProcessorConfig(
        completion_params={"model": "any", "n": N, "max_tokens": 8, "seed": 3},
        mcp_config_path="",
        semaphore=asyncio.Semaphore(64),
        server_script_path=None,
    )
    done = await asyncio.gather(*processor(rows, config))
    await processor.acleanup()
    return list(done)


@pytest.fixture(scope="module")
def heard_and_rows() -> tuple[Listening, list[dict[str, Any]]]:
    async def run() -> tuple[Listening, list[EvaluationRow]]:
        sampler = Listening()
        sums = example.sums()
        rows = [sums[at] for at in (17, 2048, 4321, 7000)]
        for number, row in enumerate(rows):
            row.input_metadata.row_id = f"row {number}"
        return sampler, await rolled_out(sampler, rows)

    sampler, rows = asyncio.run(run())
    return sampler, [msgspec.json.decode(row.model_dump_json()) for row in rows]


@pytest.fixture(scope="module")
def rows(heard_and_rows: Any) -> list[dict[str, Any]]:
    return heard_and_rows[1]


METADATA = FileMetadata(prompt_kind="messages")


def test_a_row_of_episodes_survives_being_in_a_file(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        again = to_row(from_row(row, 7, prompt_kind="messages"), METADATA)
        extra, back = row["execution_metadata"]["extra"], again["execution_metadata"]["extra"]
        assert again["messages"] == row["messages"]
        assert back["trajectories"] == extra["trajectories"]
        assert back["episodes"] == extra["episodes"]
        assert back["token_turn_traces"] == extra["token_turn_traces"]
        assert RolloutRecord.from_extra(back)


def test_a_conversation_that_ends_otherwise_survives_too(rows: list[dict[str, Any]]) -> None:
    """The seconds were up behind what the environment said, or an evaluator said something."""
    row = {**rows[0], "messages": [*rows[0]["messages"], {"role": "user", "content": "judged"}]}
    again = to_row(from_row(row, 7, prompt_kind="messages"), METADATA)
    assert again["messages"] == row["messages"]


def test_scores_of_a_file_are_not_those_of_other_episodes(rows: list[dict[str, Any]]) -> None:
    """Rolled out anew, with the same first turns and others behind."""
    completions = from_row(rows[0], 7, prompt_kind="messages")
    for completion in completions:
        completion.scores = {"reward_old": Score(reward=0.5)}
    row = to_row(completions, METADATA)
    back = from_row(row, 7, prompt_kind="messages")
    assert all(one.scores == {"reward_old": Score(reward=0.5)} for one in back)
    row["execution_metadata"]["extra"]["trajectories"][-1][-1]["tokens"][-1] += 1
    assert not any(one.scores for one in from_row(row, 7, prompt_kind="messages"))


def test_the_prompt_is_what_the_data_set_asked(rows: list[dict[str, Any]]) -> None:
    assert any(len(row["messages"]) > 2 for row in rows), "no episode of two turns comes first"
    for row in rows:
        for completion in from_row(row, 7, prompt_kind="text"):
            assert completion.prompt == row["messages"][0]["content"]


def test_without_its_first_episode_a_row_is_the_next_one(heard_and_rows: Any) -> None:
    sampler, rows = heard_and_rows
    heard = {tuple(turns[-1][0] + turns[-1][1]): turns for turns in sampler.heard.values()}
    for row in rows:
        completions = from_row(row, 7, prompt_kind="messages")
        for first in range(1, N):
            left = to_row(completions[first:], METADATA)
            extra = left["execution_metadata"]["extra"]
            record = RolloutRecord.from_extra(extra)
            assert record.episodes is not None
            assert record.trajectories is not None
            episode = record.episodes[0]
            assert [m["content"] for m in left["messages"]] == [
                m["content"] for m in episode.messages
            ]
            assert left["execution_metadata"]["finish_reason"] == episode.last_finish_reason
            whole = heard[tuple(record.trajectories[0][-1].tokens.tolist())]
            traces = [(t["prompt_ids"], t["completion_ids"]) for t in record.token_turn_traces]
            assert traces == whole
            assert EvaluationRow.model_validate(left)


def test_without_any_episode_a_row_is_what_was_asked(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        completions = from_row(row, 7, prompt_kind="messages")
        for completion in completions:
            completion.error, completion.error_kind = "gone", "timeout"
            completion.completion_ids = completion.logprobs = completion.response = None
        failed = to_row(completions, METADATA)
        assert [m["role"] for m in failed["messages"]] == ["user"]
        extra = failed["execution_metadata"]["extra"]
        assert not {"trajectories", "episodes", "token_turn_traces"} & extra.keys()
        assert "finish_reason" not in failed["execution_metadata"]


def test_the_commands_take_episodes_as_they_take_completions(
    rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    source = tmp_path / "rows.jsonl"
    source.write_bytes(b"".join(msgspec.json.encode(row) + b"\n" for row in rows))

    def run(*arguments: Any) -> str:
        done = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert done.exit_code == 0, done.output
        return done.output

    file, mixed, datums = (tmp_path / name for name in ("a.parquet", "b.parquet", "d.npz"))
    run("convert", source, file)
    run("score", file, "-e", EVALUATOR, "--quiet")
    judged = score_rows([EvaluationRow.model_validate(row) for row in rows], example.test_retry)
    expected = [row.execution_metadata.extra["rewards"] for row in judged]
    groups = list(RolloutDataset(file).groups())
    assert [[row.scores["reward"].reward for row in group] for group in groups] == expected

    run("filter", file, "-o", mixed, "--pass-rate", "0.01:0.99")
    kept = [row for row in judged if 0 < np.mean(row.execution_metadata.extra["rewards"]) < 1]
    assert kept
    run("datums", mixed, "-o", datums)
    sampled = sum(
        sum(segment["loss_mask"])
        for row in kept
        for segments in row.execution_metadata.extra["trajectories"]
        for segment in segments
    )
    with np.load(datums) as arrays:
        assert np.count_nonzero(arrays["weights"]) == sampled
    told = run("show", file)
    records = [RolloutRecord.from_extra(row["execution_metadata"]["extra"]) for row in rows]
    assert f"{sum(sum(record.sampled_counts) for record in records)} tokens" in told
    assert " | " in told, "no episode of two turns is shown"


@pytest.fixture(scope="module")
def file(rows: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("file")
    lines = folder / "rows.jsonl"
    lines.write_bytes(b"".join(msgspec.json.encode(row) + b"\n" for row in rows))
    convert(lines, folder / "r.parquet")
    return folder / "r.parquet"


def whole(rows: list[dict[str, Any]]) -> list[tuple[int, bool]]:
    """Sampled tokens of all turns of each episode, and whether its last one was cut off."""
    return [
        (sum(sum(segment["loss_mask"]) for segment in segments), episode["stop_reason"] == "length")
        for row in rows
        for extra in [row["execution_metadata"]["extra"]]
        for segments, episode in zip(extra["trajectories"], extra["episodes"], strict=True)
    ]


def test_columns_hold_the_segments_and_no_text_does(rows: list[dict[str, Any]], file: Path) -> None:
    table = pq.read_table(file)  # as any reader would
    extras = [row["execution_metadata"]["extra"] for row in rows]
    for key, column in (
        ("tokens", "segment_tokens"),
        ("logprobs", "segment_logprobs"),
        ("loss_mask", "segment_loss_mask"),
    ):
        stored = [[s[key] for s in segments] for e in extras for segments in e["trajectories"]]
        assert table.column(column).to_pylist() == stored
    told = [episode for extra in extras for episode in extra["episodes"]]
    assert table.column("turns").to_pylist() == [episode["turns"] for episode in told]
    assert (
        table.column("messages").to_pylist()[0][0]["content"] == rows[0]["messages"][0]["content"]
    )
    for text in table.column("evaluation_row").to_pylist():
        extra = json.loads(text)["execution_metadata"]["extra"]
        assert not {"trajectories", "episodes", "token_turn_traces"} & extra.keys()


def test_numbers_are_of_all_turns_in_every_command(
    rows: list[dict[str, Any]], file: Path, tmp_path: Path
) -> None:
    expected = whole(rows)
    assert len({n for n, _ in expected}) > 1
    stats = rollout_stats(file)
    assert stats.tokens == sum(n for n, _ in expected)
    assert stats.truncated == sum(cut for _, cut in expected)
    with run_query(file, "select tokens, truncated from completions") as batches:
        assert [tuple(row.values()) for row in batches.read_all().to_pylist()] == expected
    with run_query(file, "select sum(num_tokens) as n from rollouts") as batches:
        assert batches.read_all().column("n").to_pylist() == [stats.tokens]
    least = max(n for n, _ in expected)
    kept = filter_rollouts(file, tmp_path / "f.parquet", FilterRules(min_tokens=least))
    assert kept.kept == sum(n == least for n, _ in expected)
    rules = FilterRules(dedupe_completions=True)
    kept = filter_rollouts(file, tmp_path / "d.parquet", rules)
    different = {
        (i, json.dumps([segment["tokens"] for segment in segments]))
        for i, row in enumerate(rows)
        for segments in row["execution_metadata"]["extra"]["trajectories"]
    }
    assert kept.kept == len(different)


@pytest.mark.parametrize("first", [0, 4])
def test_what_columns_cannot_hold_of_an_episode_comes_back_too(
    rows: list[dict[str, Any]], first: int
) -> None:
    """Rows that another program wrote: fields of its own, none where ours have one."""
    row = msgspec.json.decode(msgspec.json.encode(rows[0]))
    extra = row["execution_metadata"]["extra"]
    one, other, *_ = extra["episodes"]
    one["judge"] = {"seen": [1, None]}
    other.pop("finish_reason")
    other["messages"][-1] |= {"weight": 0, "content": [{"type": "text", "text": "9"}]}
    completions = from_row(row, 7, prompt_kind="messages", first=first)
    batch = to_record_batch(completions, schema(METADATA, {}, episodes=True))
    again = to_row(from_record_batch(batch, METADATA), METADATA)
    assert again["execution_metadata"]["extra"]["episodes"] == extra["episodes"]
    assert again["messages"] == row["messages"]


@pytest.mark.parametrize(("to", "name"), [("trl", "t.parquet"), ("verl", "v.parquet")])
def test_an_episode_is_not_converted_to_its_first_turn_with_the_reward_of_all(
    rows: list[dict[str, Any]], tmp_path: Path, to: Any, name: str
) -> None:
    lines, file = tmp_path / "rows.jsonl", tmp_path / "r.parquet"
    lines.write_bytes(b"".join(msgspec.json.encode(row) + b"\n" for row in rows))
    convert(lines, file)
    with pytest.raises(JobError, match=r"an episode of 2 turns, .*--to ep"):
        convert(file, tmp_path / name, to_format=to)
    assert not (tmp_path / name).exists()
    convert(file, tmp_path / "again.jsonl", to_format="ep")
    again = map(msgspec.json.decode, (tmp_path / "again.jsonl").read_bytes().splitlines())
    for row, back in zip(rows, again, strict=True):
        extra, whole = (r["execution_metadata"]["extra"] for r in (row, back))
        assert whole["trajectories"] == extra["trajectories"]
    # What ended at once is all in its first turn.
    ended = [
        completion
        for i, row in enumerate(rows)
        for completion, episode in zip(
            from_row(row, i, prompt_kind="messages"), extra_of(row)["episodes"], strict=True
        )
        if episode["turns"] == 1
    ]
    write_rows(file, RolloutDataset(file).schema, ended)
    assert convert(file, tmp_path / name, to_format=to).completions == len(ended) > 0


def test_an_episode_is_an_example_of_what_the_model_said(file: Path, tmp_path: Path) -> None:
    reader = {"reward": Score(reward=1.0)}
    held = [msgspec.structs.replace(row, scores=reader) for row in RolloutDataset(file)]
    write_rows(tmp_path / "a.parquet", RolloutDataset(file).schema, held)
    rules = ExampleRules(best=N, dedupe="none", keep_truncated=True)
    summary = convert(
        tmp_path / "a.parquet", tmp_path / "b.parquet", to_format="sft", rules=rules, progress=False
    )
    examples = pq.read_table(tmp_path / "b.parquet").to_pylist()
    expected = [
        (segment["tokens"].tolist(), segment["loss_mask"].tolist())
        for row in held
        for segment in row.segments or ()
    ]
    assert [(e["input_ids"], e["completion_mask"]) for e in examples] == expected
    assert summary.examples == len(expected) >= summary.completions == len(held)
    for one in examples:
        place = (one["data_idx"], one["sample_idx"])
        [row] = [row for row in held if (row.data_idx, row.sample_idx) == place]
        assert row.episode is not None
        said = [message["content"] for message in one["prompt"] + one["completion"]]
        assert said == [message["content"] for message in row.episode["messages"]]
        assert one["completion"][0]["role"] == "assistant"
    for kind in ("kto", "dpo"):
        rules = ExampleRules(dedupe="none", keep_truncated=True)
        if kind == "dpo":
            for i, row in enumerate(held):
                row.scores = {"reward": Score(reward=float(i))}
            write_rows(tmp_path / "a.parquet", RolloutDataset(file).schema, held)
        with pytest.raises(JobError, match=r"an episode of 2 turns, and an example for"):
            convert(tmp_path / "a.parquet", tmp_path / "c.parquet", to_format=kind, rules=rules)  # type: ignore[arg-type]
    assert not (tmp_path / "c.parquet").exists()
