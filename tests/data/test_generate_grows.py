"""A trial, with `--limit` or a small n, grows in place to the whole job."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from eval_protocol_rft import data
from eval_protocol_rft.data import RolloutDataset
from eval_protocol_rft.sampling import Completion
from tests.data.servers import at, ep_rft, pairs, refused, sampled, succeed, texts, write_jsonl
from tests.rollouts import chat_tokenizer
from tests.serving import ScriptedSampler
from tests.stub_server import Seen, Status, StubServer
from tests.waiting import PATIENCE


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "d.jsonl", texts(6))


def generate(rows: Path, name: str, server: StubServer, folder: Path, *flags: object) -> Path:
    output = rows.parent / name
    succeed("generate", rows, "-o", output, *at(server, folder), *flags)
    return output


SHUFFLED = ("--shuffle-seed", 5)


@pytest.mark.parametrize("ending", ["parquet", "jsonl"])
@pytest.mark.parametrize(
    ("trial", "whole"),
    [
        (("--limit", 2), ()),
        (("--limit", 2), ("--limit", 4)),
        (("-n", 1), ("-n", 3)),
        (("--limit", 2, "-n", 2, *SHUFFLED), ("-n", 3, *SHUFFLED)),
    ],
    ids=str,
)
def test_what_is_missing_is_sampled_and_nothing_else(
    trial: tuple[Any, ...],
    whole: tuple[Any, ...],
    ending: str,
    rows: Path,
    server: StubServer,
    tokenizer_folder: Path,
) -> None:
    output = generate(rows, f"o.{ending}", server, tokenizer_folder, *trial)
    first = sampled(output)
    before = len(server.requests)
    generate(rows, f"o.{ending}", server, tokenizer_folder, *whole)
    grown = sampled(output)
    assert len(server.requests) - before == len(grown) - len(first)
    assert {(seen.prompt, seen.seed) for seen in server.requests} == {
        (tuple(row["prompt_ids"]), row["seed"]) for row in grown.values()
    }
    # As if it had been sampled at once, in the same order.
    at_once = generate(rows, f"once.{ending}", server, tokenizer_folder, *whole)
    assert list(grown.items()) == list(sampled(at_once).items())
    known, once = RolloutDataset(output).metadata, RolloutDataset(at_once).metadata
    assert (known.sampling, known.data) == (once.sampling, once.data)
    asked = len(server.requests)
    generate(rows, f"o.{ending}", server, tokenizer_folder, *whole)
    assert len(server.requests) == asked


def test_a_smaller_job_than_the_one_that_is_there_is_refused(
    rows: Path, server: StubServer, tokenizer_folder: Path
) -> None:
    output = generate(rows, "o.parquet", server, tokenizer_folder, "-n", 2)
    command = ["generate", rows, "-o", output, *at(server, tokenizer_folder)]
    assert "n: 2 there, 1 asked for" in refused(*command, "-n", 1)
    assert "data.limit: None there, 3 asked for" in refused(*command, "-n", 2, "--limit", 3)


def test_n_is_that_of_the_job_that_is_there(
    rows: Path, server: StubServer, tokenizer_folder: Path
) -> None:
    output = generate(rows, "o.parquet", server, tokenizer_folder, "-n", 3, "--limit", 2)
    generate(rows, "o.parquet", server, tokenizer_folder)
    assert list(sampled(output)) == pairs(6, 3)
    # Not of another job, whose place it takes.
    generate(rows, "o.parquet", server, tokenizer_folder, "--overwrite", "--temperature", 0.5)
    assert list(sampled(output)) == pairs(6, 1)


GRADER = """
def right(row):
    return float(row.input_metadata.dataset_info["ground_truth"] == row.ground_truth)
"""
"""Every column of the data set reaches an evaluator."""


def test_rewards_stay_and_what_is_new_is_unscored(
    rows: Path, server: StubServer, tokenizer_folder: Path
) -> None:
    (rows.parent / "reads_columns.py").write_text(GRADER)
    output = generate(rows, "o.parquet", server, tokenizer_folder, "--limit", 2)
    score = ["score", output, "-e", f"{rows.parent / 'reads_columns.py'}::right", "--quiet"]
    succeed(*score)
    generate(rows, "o.parquet", server, tokenizer_folder, "-n", 2)
    scores = [row.scores.get("reward") for row in RolloutDataset(output)]
    rewards = [score and score.reward for score in scores]
    assert rewards == [1.0, None, 1.0, None] + [None] * 8
    said = succeed(*score).stdout
    assert "12 of 12 completions of 6 rows have reward, mean 1.0000 (10 graded by this run)" in said


async def test_an_unfinished_job_grows_too(rows: Path) -> None:
    sampler = ScriptedSampler(
        lambda prompt, params, seed: Completion(
            token_ids=[64, 256], logprobs=[-1.0, -1.0], finish_reason="stop"
        )
    )
    params: dict[str, Any] = {"model": "m", "seed": 1}
    options: dict[str, Any] = {"tokenizer": chat_tokenizer(), "sampler": sampler}
    output = rows.parent / "o.parquet"
    held = 3
    sampler.held = lambda seed: len(sampler.asked) > held
    run = asyncio.create_task(data.agenerate(rows, output, {**params, "n": 1}, **options))
    assert await asyncio.to_thread(sampler.waiting.acquire, timeout=PATIENCE)
    run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await run
    assert not output.exists()
    there = sampled(output)
    sampler.held = lambda seed: False
    sampler.asked.clear()
    summary = await data.agenerate(rows, output, {**params, "n": 2}, **options)
    assert summary.total == 12
    assert len(sampler.asked) == 12 - len(there)
    assert sampled(output).items() >= there.items()
    assert list(sampled(output)) == pairs(6, 2)


@pytest.mark.parametrize(
    ("share", "code"), [(0.5, 0), (0.51, 1), (1, 1), (0, 0), (None, 0)], ids=str
)
def test_the_share_that_must_be_there_decides_how_it_ends(
    share: float | None, code: int, rows: Path, server: StubServer, tokenizer_folder: Path
) -> None:
    def odd_fail(seen: Seen) -> Status | None:
        return Status(400, b"{}") if seen.place % 2 else None

    server.script = odd_fail
    output = rows.parent / "o.parquet"
    flags = [] if share is None else ["--min-success", share]
    command = ["generate", rows, "-o", output, *at(server, tokenizer_folder, concurrency=1), *flags]
    # It is of all runs: in the second, nothing is left to do.
    for _ in range(2):
        result = ep_rft(*command)
        assert result.exit_code == code
        assert ("3 of 6 completions are there: less than" in result.stderr) is bool(code)
    assert len(sampled(output)) == 6


def test_a_job_is_continued_in_the_dtype_that_it_was_begun_in(rows: Path) -> None:
    output = rows.parent / "o.parquet"
    half = ("-o", output, "--model", "local/arithmetic", "--max-tokens", 2, "--dtype", "bfloat16")
    succeed("generate", rows, *half, "--limit", 1)
    sampling = RolloutDataset(output).metadata.sampling
    assert sampling is not None
    assert sampling.dtype == "bfloat16"
    before = output.read_bytes()
    assert "dtype: 'bfloat16' there, None asked for" in refused("generate", rows, *half[:-2])
    assert output.read_bytes() == before
    succeed("generate", rows, *half)
    assert len(RolloutDataset(output)) == 6
