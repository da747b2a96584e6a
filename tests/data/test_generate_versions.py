"""A run through a hot-load of the weights, over real HTTP: nothing is lost, versions are known."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from eval_protocol_rft.data._dataset import RolloutDataset
from eval_protocol_rft.data._generate import agenerate
from eval_protocol_rft.sampling._retry import RetryPolicy
from tests.data.servers import at, rows_by_pair, succeed, texts, write_jsonl
from tests.rollouts import chat_tokenizer
from tests.stub_server import Answer, Changed, Seen, Status, StubServer
from tests.test_policy_versions import swapping

QUICK = RetryPolicy(max_attempts=2, base_seconds=0.05, cap_seconds=0.2)
"""Fewer attempts than a hot-load meets."""


class HotLoad:
    """Serves v1 for some requests, then is loading in two different words, then serves v2."""

    def __init__(self, *, after: int, swapping: float, loading: float) -> None:
        self.after = after
        self.swapping, self.loading = swapping, loading
        self.began: float | None = None
        self.loading_began: float | None = None
        self.statuses: Counter[int] = Counter()

    def __call__(self, seen: Seen) -> Answer:
        if self.began is None:
            if self.statuses[200] < self.after:
                return self._served("v1")
            self.began = time.monotonic()
        # Each takes its time, and as long as it takes until it was met.
        now = time.monotonic()
        if now < self.began + self.swapping or not self.statuses[425]:
            return self._turned_away(425, b"", {"retry-after-ms": "20"})
        self.loading_began = self.loading_began or now
        if now < self.loading_began + self.loading or not self.statuses[404]:
            return self._turned_away(404, b'{"error": {"message": "deployment is loading"}}', {})
        return self._served("v2")

    def _served(self, version: str) -> Answer:
        self.statuses[200] += 1
        return Changed(lambda reply: reply.update(model=f"{reply['model']}@{version}"))

    def _turned_away(self, status: int, body: bytes, headers: dict[str, str]) -> Answer:
        self.statuses[status] += 1
        return Status(status, body, headers)


@pytest.mark.parametrize("concurrency", [1, 2, 32])
async def test_every_completion_survives_a_hot_load(concurrency, tmp_path, server):
    server.script = hot_load = HotLoad(after=20, swapping=0.6, loading=0.9)
    output = tmp_path / "out.parquet"
    summary = await agenerate(
        write_jsonl(tmp_path / "data.jsonl", texts(16)),
        output,
        {"model": "m", "base_url": server.url, "n": 4, "max_tokens": 8, "seed": 1},
        tokenizer=chat_tokenizer(),
        concurrency=concurrency,
        retry=QUICK,
    )
    assert (summary.run.completions, summary.failed) == (64, 0)
    assert hot_load.statuses[425] >= 1
    assert hot_load.statuses[404] >= 1
    versions = Counter(row["policy_version"] for row in rows_by_pair(output).values())
    assert versions == {"v1": 20, "v2": 44}
    # Nor is the server hammered: each request in flight is turned away a few times, and then the
    # breaker lets through a probe now and then.
    assert hot_load.statuses[425] + hot_load.statuses[404] <= 20 + 4 * concurrency


def test_a_swap_in_the_midst_of_a_stream_is_in_the_file_and_reaches_the_datums(
    tmp_path, server, tokenizer_folder
):
    server.script = swapping
    data = write_jsonl(tmp_path / "data.jsonl", texts(8))
    output = tmp_path / "out.parquet"
    options = at(server, tokenizer_folder)
    succeed("generate", data, "-o", output, "-n", "4", "--extra-body", '{"stream": true}', *options)
    rows = rows_by_pair(output).values()
    assert {row["policy_version"] for row in rows} == {"v2"}
    for row in rows:
        assert row["first_policy_version"] == (None if row["seed"] % 2 else "v1")
    evaluator = tmp_path / "rewards_of_versions.py"
    evaluator.write_text("def length(row):\n    return float(len(row.messages[-1].content))\n")
    succeed("score", output, "-e", f"{evaluator}::length", "--workers", "1", "--quiet")
    spanning = sum(row["first_policy_version"] is not None for row in rows)
    assert 0 < spanning < len(rows)
    kept = succeed("datums", output, "-o", tmp_path / "kept.npz", "--algorithm", "reinforce")
    assert f"{len(rows)} datums" in kept.stdout
    asked = ("--algorithm", "reinforce", "--mixed-versions", "drop")
    left = succeed("datums", output, "-o", tmp_path / "left.npz", *asked)
    assert f"{len(rows) - spanning} datums" in left.stdout
    assert f"{spanning}  mixed_versions" in left.stdout


def test_a_file_of_before_a_column_is_read_continued_and_scored(tmp_path, server, tokenizer_folder):
    data = write_jsonl(tmp_path / "data.jsonl", texts(4))
    output = tmp_path / "out.parquet"
    command = ["generate", data, "-o", output, "-n", "2", *at(server, tokenizer_folder)]
    server.script = lambda seen: Status(400, b"too long") if seen.place == 5 else None
    succeed(*command)
    _without_the_columns(output)
    (failed,) = [(row.data_idx, row.sample_idx) for row in RolloutDataset(output) if row.failed]
    assert all(row.first_policy_version is None for row in RolloutDataset(output))
    assert all(row.past_end is None for row in RolloutDataset(output))
    server.script = lambda seen: None
    result = succeed(*command, "--retry-failed")
    assert "1 sampled" in result.stdout
    rows = list(RolloutDataset(output))
    assert len(rows) == 8
    assert not any(row.failed for row in rows)
    old = [row for row in rows if (row.data_idx, row.sample_idx) != failed]
    assert len(old) == 7
    assert all(row.first_policy_version is row.past_end is None for row in old)
    evaluator = tmp_path / "rewards_of_before.py"
    evaluator.write_text("def one(row):\n    return 1.0\n")
    succeed("score", output, "-e", f"{evaluator}::one", "--workers", "1", "--quiet")
    assert [row.reward for row in RolloutDataset(output)] == [1.0] * 8


def _without_the_columns(path: Path) -> None:
    table = pq.read_table(path)
    kept: pa.Table = table.drop_columns(["first_policy_version", "past_end"])
    pq.write_table(kept.replace_schema_metadata(table.schema.metadata), path)


def test_the_adaptive_limit_of_a_run_hears_of_the_servers_queue(tmp_path, tokenizer_folder):
    data = write_jsonl(tmp_path / "data.jsonl", texts(30))
    with StubServer() as server:
        full = b"vllm:num_requests_running 8\nvllm:num_requests_waiting 0\n"
        server.metrics = lambda: Status(200, full)
        options = at(server, tokenizer_folder, concurrency=None)
        succeed("generate", data, "-o", tmp_path / "a.parquet", *options)
        assert len(server.polls) == 1
        succeed("generate", data, "-o", tmp_path / "b.parquet", *at(server, tokenizer_folder))
        assert len(server.polls) == 1, "a fixed limit needs no metrics"
        server.metrics = lambda: Status(500)
        succeed("generate", data, "-o", tmp_path / "c.parquet", *options)
        assert len(rows_by_pair(tmp_path / "c.parquet")) == 30
