"""What a rollout leaves on one row."""

from __future__ import annotations

import asyncio
import json

import pytest
from eval_protocol.models import CompletionUsage

from eval_protocol_rft import FireworksTrainingRolloutProcessor
from tests.rollouts import (
    assert_is_what_the_server_sampled,
    chat_tokenizer,
    config_of,
    params_for,
    record_of_row,
    rendered,
    roll_out,
    row_of,
    scripted,
    text_of,
)
from tests.stub_server import Changed, sampled


async def test_a_row_gets_the_first_completion_as_its_answer_and_all_of_them_as_its_record(
    server, processor
):
    [row] = await roll_out(processor, row_of(), params_for(server, n=4))
    record = record_of_row(row)
    assert record.prompt_ids == rendered("hi")
    assert len(record) == 4
    assert len({seen.seed for seen in server.requests}) == 4
    assert {seen.seed for seen in server.requests} == set(record.sampling.seeds)
    assert_is_what_the_server_sampled(record)
    assert [message.model_dump(exclude_none=True) for message in row.messages] == [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": text_of(record.completion_ids[0])},
    ]


async def test_the_logprobs_are_those_of_sampling_and_the_raw_ones_stand_beside_them(
    server, processor
):
    params = params_for(server, n=2, temperature=0.8)
    [row] = await roll_out(processor, row_of(), params)
    record = record_of_row(row)
    for i, seed in enumerate(record.sampling.seeds):
        _, expected = sampled(record.prompt_ids, seed, 32)
        assert record.inference_logprobs[i] == expected
        assert record.raw_logprobs[i] == [round(value * 1.25, 6) for value in expected]


async def test_usage_is_summed_over_all_completions(server, processor):
    [row] = await roll_out(processor, row_of(), params_for(server, n=3))
    record = record_of_row(row)
    prompt, sampled_tokens = 3 * len(record.prompt_ids), sum(map(len, record.completion_ids))
    assert row.execution_metadata.usage == CompletionUsage(
        prompt_tokens=prompt,
        completion_tokens=sampled_tokens,
        total_tokens=prompt + sampled_tokens,
    )


async def test_the_rows_metadata_says_how_the_answer_ended_and_how_long_it_took(server, processor):
    [row] = await roll_out(processor, row_of(), params_for(server, max_tokens=2, n=2))
    metadata, record = row.execution_metadata, record_of_row(row)
    assert metadata.finish_reason == "length"
    assert record.finish_reasons == ["length", "length"]
    assert record.truncated == [True, True]
    assert metadata.tool_call_count == 0
    assert 0 < metadata.rollout_duration_seconds < 30
    assert max(record.sampling.seconds) <= metadata.rollout_duration_seconds


async def test_foreign_keys_of_extra_stay_and_an_older_record_goes_with_its_scores(
    server, processor
):
    row = row_of()
    row.execution_metadata.extra = {
        "run_index": 2,
        "mine": {"a": [1]},
        "rewards": [0.5, 0.5],
        "completion_results": [],
        "completion_ids": [[1], [2]],
        "raw_logprobs": [[0.0]],
    }
    [row] = await roll_out(processor, row, params_for(server, n=1))
    extra = row.execution_metadata.extra
    assert extra["run_index"] == 2
    assert extra["mine"] == {"a": [1]}
    assert "rewards" not in extra
    assert "completion_results" not in extra
    assert len(extra["completion_ids"]) == len(extra["raw_logprobs"]) == 1


async def test_what_the_cookbooks_adapter_reads_is_the_completion_that_became_the_answer(
    server, processor
):
    [row] = await roll_out(processor, row_of(), params_for(server, n=3))
    record = record_of_row(row)
    assert row.execution_metadata.extra["token_turn_traces"] == [
        {
            "prompt_ids": record.prompt_ids,
            "completion_ids": record.completion_ids[0],
            "completion_logprobs": record.inference_logprobs[0],
            "finish_reason": "stop",
        }
    ]


async def test_a_sampler_of_the_callers_is_used_and_stays_open(processor):
    sampler = scripted("ok")
    processor = FireworksTrainingRolloutProcessor(tokenizer=chat_tokenizer(), sampler=sampler)
    params = {"model": "accounts/x/models/y", "n": 2, "temperature": 0.3, "max_tokens": 9}
    [row] = await roll_out(processor, row_of(), params)
    assert record_of_row(row).completions_text == ["ok", "ok"]
    assert [asked.temperature for _, asked, _ in sampler.asked] == [0.3, 0.3]
    assert sampler.asked[0][0] == rendered("hi")
    assert sampler.closed == 0


async def test_there_is_one_task_per_row_in_the_rows_order(server, processor):
    rows = [row_of(f"row {i}", row_id=str(i)) for i in range(30)]
    tasks = processor(rows, config_of(params_for(server, n=2)))
    assert len(tasks) == 30
    assert all(isinstance(task, asyncio.Task) for task in tasks)
    for i, task in enumerate(tasks):
        row = await task
        assert row is rows[i]
        assert record_of_row(row).prompt_ids == rendered(f"row {i}")
    await processor.acleanup()
    assert processor([], config_of(params_for(server))) == []


async def test_a_row_is_plain_json(server, processor):
    params = params_for(server, n=3, extra_body={"logit_bias": {7: 1}, "metadata": ("a", 1)})
    [row] = await roll_out(processor, row_of(), params)
    extra = row.execution_metadata.extra
    assert json.loads(json.dumps(extra, allow_nan=False)) == extra
    again = type(row)(**json.loads(row.model_dump_json()))
    assert record_of_row(again) == record_of_row(row)


@pytest.mark.parametrize(
    ("asked", "truncated"),
    [
        ({}, False),
        ({"temperature": 0.5}, False),
        ({"top_k": -1}, False),
        ({"top_p": 0.9}, True),
        ({"top_k": 20}, True),
        ({"temperature": 0}, True),
        ({"extra_body": {"min_p": 0.1}}, True),
        ({"top_n_sigma": 1.0}, True),
        ({"xtc_probability": 0.5}, True),
        ({"no_repeat_ngram_size": 3}, True),
        ({"extra_body": {"top_n_sigma": -1, "xtc_probability": 0.0}}, False),
        ({"extra_body": {"dry_multiplier": 0.8}}, False),
        ({"extra_body": {"repetition_penalty": 1.2}}, False),
    ],
    ids=str,
)
async def test_the_record_says_whether_part_of_the_vocabulary_could_not_be_drawn(
    server, processor, asked, truncated
):
    [row] = await roll_out(processor, row_of(), params_for(server, **asked))
    assert record_of_row(row).sampling.support_truncated is truncated


async def test_the_record_says_how_it_was_sampled(server, processor):
    params = params_for(
        server,
        model="fireworks_ai/accounts/a/models/m",
        n=2,
        temperature=0.7,
        top_p=0.9,
        top_k=5,
        stop=["x", "y"],
        max_tokens=20,
        seed=11,
        extra_body={"min_p": 0.01, "prompt_cache_key": "k"},
    )
    server.script = lambda seen: Changed(lambda reply: reply.update(model=reply["model"] + "@v3"))
    [row] = await roll_out(processor, row_of(), params)
    sampling = record_of_row(row).sampling
    assert (sampling.model, sampling.n, sampling.seed) == ("accounts/a/models/m", 2, 11)
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.7, 0.9, 5)
    assert (sampling.max_tokens, sampling.stop) == (20, ["x", "y"])
    assert sampling.other == {"min_p": 0.01, "prompt_cache_key": "k"}
    assert sampling.logprobs == "sampling"
    assert (sampling.indices, sampling.attempts) == ([0, 1], [1, 1])
    assert sampling.request_ids == [f"req-{seed}-1" for seed in sampling.seeds]
    assert sampling.policy_versions == ["v3", "v3"]
    assert len(sampling.chat_template_hash) == 16
