"""Rows that bring their prompt as token ids are sampled from these ids, and from no others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from eval_protocol.models import EvaluationRow, InputMetadata

from eval_protocol_rft import EpisodeRolloutProcessor
from eval_protocol_rft.episodes._environment import RetryWithFeedback
from tests.data.servers import at, refused, rows_by_pair, succeed, write_jsonl
from tests.rollouts import chat_tokenizer, params_for, record_of_row, roll_out
from tests.serving import byte_tokenizer

IDS = byte_tokenizer().encode("no template rendered this")
SIZE = len(byte_tokenizer())


def brings(ids: Any, **fields: Any) -> EvaluationRow:
    return EvaluationRow.model_validate({"prompt_token_ids": ids, **fields})


def among_columns(ids: Any) -> EvaluationRow:
    info = InputMetadata(row_id="r", dataset_info={"prompt_token_ids": ids})
    return EvaluationRow(messages=[], input_metadata=info)


@pytest.mark.parametrize("make", [brings, among_columns])
async def test_the_processor_samples_from_the_rows_own_ids(make: Any, server, processor) -> None:
    [row] = await roll_out(processor, make(IDS), params_for(server, n=2))
    assert record_of_row(row).prompt_ids == IDS
    assert {seen.prompt for seen in server.requests} == {tuple(IDS)}
    assert [message.role for message in row.messages] == ["assistant"]
    # Rolled out again, it asks the same.
    [row] = await roll_out(processor, row, params_for(server, n=1))
    assert {seen.prompt for seen in server.requests} == {tuple(IDS)}


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        ([1, SIZE], rf"prompt_token_ids\[1\] is {SIZE}, and tokenizer .* 0 to {SIZE - 1}"),
        ([-1], r"prompt_token_ids\[0\] is -1"),
        ([1.0], r"prompt_token_ids\[0\] is 1.0, not a token id"),
        ([True], r"prompt_token_ids\[0\] is True, not a token id"),
        ([], "not empty"),
        ("hi", "must be a list of token ids"),
    ],
)
async def test_ids_that_are_none_of_the_vocabulary_are_refused_unsent(
    ids: Any, said: str, server, processor
) -> None:
    with pytest.raises(ValueError, match=said):
        await roll_out(processor, brings(ids), params_for(server))
    assert not server.requests


async def test_an_episode_needs_messages(server) -> None:
    processor = EpisodeRolloutProcessor(
        lambda: RetryWithFeedback(lambda row: 0.0), tokenizer=chat_tokenizer()
    )
    with pytest.raises(ValueError, match="renders its turns from messages"):
        await roll_out(processor, brings(IDS), params_for(server))


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_generate_samples_from_the_data_sets_ids(
    ending: str, tmp_path: Path, server, tokenizer_folder: Path
) -> None:
    rows = [{"prompt_token_ids": IDS[:k], "ground_truth": str(k)} for k in (5, 9)]
    data = tmp_path / f"data.{ending}"
    if ending == "jsonl":
        write_jsonl(data, rows)
    else:
        pq.write_table(pa.Table.from_pylist(rows), data)
    output = tmp_path / "r.parquet"
    command = ["generate", data, "-o", output, "-n", 2, *at(server, tokenizer_folder)]
    succeed(*command)
    assert {seen.prompt for seen in server.requests} == {tuple(IDS[:5]), tuple(IDS[:9])}
    for (i, _), row in rows_by_pair(output).items():
        assert row["prompt_ids"] == rows[i]["prompt_token_ids"]
        assert row["prompt"] == "no template rendered this"[: len(row["prompt_ids"])]
        assert row["ground_truth"] == rows[i]["ground_truth"]
    other = [*command[:3], tmp_path / "o.parquet", *command[4:]]
    assert "a system message would not reach them" in refused(*other, "--system", "s")
    kwargs = ["--chat-template-kwargs", '{"enable_thinking": true}']
    assert "enable_thinking would reach no chat template" in refused(*other, *kwargs)


def test_generate_refuses_ids_of_another_vocabulary(
    tmp_path: Path, server, tokenizer_folder: Path
) -> None:
    data = write_jsonl(tmp_path / "data.jsonl", [{"prompt_token_ids": [1, SIZE]}])
    command = ["generate", data, "-o", tmp_path / "r.parquet", *at(server, tokenizer_folder)]
    assert f"prompt_token_ids[1] is {SIZE}" in refused(*command)
    write_jsonl(data, [{"prompt_token_ids": ["hi"]}])
    assert "not a list of token ids" in refused(*command)
    assert not server.requests
