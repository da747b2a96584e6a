"""Which completions are drawn alike and which are not."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from eval_protocol.models import EvalMetadata, EvaluationRow, Message

from eval_protocol_rft import (
    EpisodeRolloutProcessor,
    FireworksTrainingRolloutProcessor,
    RolloutRecord,
)
from eval_protocol_rft.episodes._environment import Environment, Step
from eval_protocol_rft.rollout._evaluation_run import RUN_KEYWORD
from tests.rollouts import (
    assert_is_what_the_server_sampled,
    chat_tokenizer,
    config_of,
    params_for,
    record_of_row,
    roll_out,
    row_of,
    scripted,
)
from tests.stub_server import sampled


def timeless(record: RolloutRecord) -> dict:
    """The record without what no two rollouts share."""
    extra = record.to_extra()
    for key in ("seconds", "request_ids", "began_at"):
        extra["sampling"].pop(key, None)
    return extra


async def test_the_same_seed_gives_the_same_record(server, tokenizer_folder):
    params = params_for(server, n=4, seed=17)
    records = []
    for _ in range(2):
        processor = FireworksTrainingRolloutProcessor(tokenizer=str(tokenizer_folder))
        [row] = await roll_out(processor, row_of(), params)
        records.append(timeless(record_of_row(row)))
    assert records[0] == records[1]
    assert records[0]["sampling"]["seed"] == 17


async def test_another_seed_another_row_and_another_completion_draw_with_other_seeds(
    server, processor
):
    rows = [row_of(row_id="a"), row_of(row_id="b")]
    one = await roll_out(processor, rows, params_for(server, n=4, seed=1))
    two = await roll_out(processor, row_of(row_id="a"), params_for(server, n=4, seed=2))
    seeds = [seed for row in [*one, *two] for seed in record_of_row(row).sampling.seeds]
    assert len(set(seeds)) == len(seeds) == 12
    assert all(0 <= seed < 2**31 for seed in seeds)


async def test_without_a_seed_fireworks_gets_one_for_each_completion_and_it_is_recorded(
    server, processor
):
    params = params_for(server, n=4, seed=None, model="accounts/a/models/m")
    [row] = await roll_out(processor, row_of(), params)
    record = record_of_row(row)
    assert sorted(record.sampling.seeds) == sorted(seen.seed for seen in server.requests)
    assert len(set(record.sampling.seeds)) == 4
    assert_is_what_the_server_sampled(record)
    again = params_for(server, n=4, seed=record.sampling.seed, model="accounts/a/models/m")
    [second] = await roll_out(processor, row_of(), again)
    assert record_of_row(second).completion_ids == record.completion_ids


async def test_without_a_seed_another_server_gets_none_and_draws_itself(server, processor):
    [row] = await roll_out(processor, row_of(), params_for(server, n=4, seed=None))
    record = record_of_row(row)
    assert all("seed" not in seen.body for seen in server.requests)
    assert (record.sampling.seed, record.sampling.seeds) == (None, [None] * 4)
    drawn = [sampled(record.prompt_ids, seen.seed, 32)[0] for seen in server.requests]
    assert sorted(record.completion_ids) == sorted(drawn)


async def test_without_a_seed_a_sampler_in_the_process_gets_one_that_is_recorded():
    sampler = scripted("ok")
    processor = FireworksTrainingRolloutProcessor(tokenizer=chat_tokenizer(), sampler=sampler)
    one, two = await roll_out(processor, [row_of(), row_of()], {"model": "any", "n": 2})
    first, second = record_of_row(one).sampling, record_of_row(two).sampling
    assert first.seed != second.seed
    assert {seed for _, _, seed in sampler.asked} == {*first.seeds, *second.seeds}
    [row] = await roll_out(processor, row_of(), {"model": "any", "n": 2, "seed": first.seed})
    assert record_of_row(row).sampling.seeds == first.seeds


async def test_repeated_runs_of_a_row_differ_and_repeat_themselves(server, tokenizer_folder):
    async def runs() -> list[list[int | None]]:
        processor = FireworksTrainingRolloutProcessor(tokenizer=str(tokenizer_folder))
        params = params_for(server, n=2, seed=3)
        rows = [row_of() for _ in range(3)]
        for i, row in enumerate(rows):
            row.execution_metadata.experiment_id = "experiment"
            row.execution_metadata.rollout_id = f"rollout-{i}"
        tasks = [task for row in rows for task in processor([row], config_of(params))]
        done = await asyncio.gather(*tasks)
        await processor.acleanup()
        return [record_of_row(row).sampling.seeds for row in done]

    first = await runs()
    assert len({seed for seeds in first for seed in seeds}) == 6
    assert await runs() == first


async def test_the_priority_schedulers_run_index_tells_runs_apart(server, processor):
    # Rows that are alike share their id and have every number once each.
    rows = [row_of(), row_of(), row_of(), row_of()]
    for row, run in zip(rows, (0, 1, 0, 1), strict=True):
        row.execution_metadata.extra = {"run_index": run}
    done = await roll_out(processor, rows, params_for(server, n=1, seed=3))
    seeds = [record_of_row(row).sampling.seeds[0] for row in done]
    assert len(set(seeds)) == 4
    plain = await roll_out(processor, [row_of(), row_of()], params_for(server, n=1, seed=3))
    assert seeds[:2] == [record_of_row(row).sampling.seeds[0] for row in plain]


def call_as_recipes_do(row: EvaluationRow) -> EvaluationRow:
    """fw-ai/cookbook's adapter: a deep copy of the row for each call, all its ids included."""
    return row.model_copy(deep=True)


def call_with_a_new_row(row: EvaluationRow) -> EvaluationRow:
    """Made anew, with other random ids; what a notebook does."""
    return EvaluationRow(messages=row.messages)


def call_on_the_row_itself(row: EvaluationRow) -> EvaluationRow:
    return row


def call_on_a_row_of_an_earlier_run(row: EvaluationRow) -> EvaluationRow:
    """As the priority scheduler left it in a results file."""
    copy = row.model_copy(deep=True)
    copy.eval_metadata = EvalMetadata(name="t", num_runs=1, aggregation_method="mean")
    copy.execution_metadata.extra = {"run_index": 0}
    return copy


@pytest.mark.parametrize("row_id", ["row-1", None])
@pytest.mark.parametrize(
    "row_for_call",
    [
        call_as_recipes_do,
        call_with_a_new_row,
        call_on_the_row_itself,
        call_on_a_row_of_an_earlier_run,
    ],
)
def test_successive_calls_on_a_row_draw_anew_and_the_same_program_the_same(
    server, tokenizer_folder, row_for_call, row_id
):
    def program() -> list[list[list[int]]]:
        processor = FireworksTrainingRolloutProcessor(tokenizer=str(tokenizer_folder))
        row, drawn = row_of(row_id=row_id), []
        for clean_up in (False, False, True, True):

            async def call(clean_up: bool = clean_up) -> EvaluationRow:
                config = config_of(params_for(server, n=2, seed=7))
                (done,) = await asyncio.gather(*processor([row_for_call(row)], config))
                if clean_up:
                    await processor.acleanup()
                return done

            # Each in a loop of its own, as `asyncio.run` in a notebook or in a trainer's thread.
            drawn.append(record_of_row(asyncio.run(call())).completion_ids)
        return drawn

    drawn = program()
    assert len({tuple(ids) for completions in drawn for ids in completions}) == 8
    assert program() == drawn


async def test_calls_on_other_rows_change_no_draw(server, tokenizer_folder):
    async def program(*others: str) -> list[int | None]:
        processor = FireworksTrainingRolloutProcessor(tokenizer=str(tokenizer_folder))
        rows = [row_of("a", row_id=None), *(row_of(text, row_id=None) for text in others)]
        config = config_of(params_for(server, n=1, seed=7))
        copies = [row.model_copy(deep=True) for _ in range(2) for row in reversed(rows)]
        calls = [processor([row], config) for row in copies]
        done = await asyncio.gather(*(task for tasks in calls for task in tasks))
        await processor.acleanup()
        return [
            record_of_row(row).sampling.seeds[0] for row in done if row.messages[0].content == "a"
        ]

    alone = await program()
    assert len(set(alone)) == 2
    assert await program("b", "c") == alone


async def test_eval_protocols_retry_of_a_rollout_repeats_its_run(server, processor):
    params = params_for(server, n=2, seed=3)
    seeds = []
    for rollout in ("first", "second"):
        row = row_of()
        row.execution_metadata.rollout_id = rollout
        for kwargs in ({}, {"start_server": False}, {"start_server": False}):
            [row] = await asyncio.gather(*processor([row], config_of(params, kwargs=kwargs)))
            seeds.append(tuple(record_of_row(row).sampling.seeds))
    await processor.acleanup()
    assert seeds[0] == seeds[1] == seeds[2]
    assert seeds[3] == seeds[4] == seeds[5]
    assert not {*seeds[0]} & {*seeds[3]}


async def test_a_run_that_its_caller_numbers_is_the_same_each_time(server, processor):
    params = params_for(server, n=2, seed=3)
    seeds = []
    for run in (5, 0, 5):
        config = config_of(params, kwargs={RUN_KEYWORD: run})
        [row] = await asyncio.gather(*processor([row_of()], config))
        seeds.append(record_of_row(row).sampling.seeds)
    await processor.acleanup()
    assert seeds[0] == seeds[2] != seeds[1]


async def test_a_row_without_an_id_is_told_apart_by_its_prompt(server, processor):
    rows = [row_of("a", row_id=None), row_of("b", row_id=None), row_of("a", row_id=None)]
    done = await roll_out(processor, rows, params_for(server, n=1, seed=3))
    seeds = [record_of_row(row).sampling.seeds[0] for row in done]
    assert len(set(seeds)) == 3
    assert [row.input_metadata.row_id for row in done] == [None] * 3


class OneTurn(Environment):
    async def step(self, messages: Sequence[Message], assistant: Message) -> Step:
        return Step(done=True, reward=1.0)


async def test_successive_calls_draw_other_episodes_and_a_retry_the_same(server):
    processor = EpisodeRolloutProcessor(OneTurn, tokenizer=chat_tokenizer())
    params = params_for(server, n=2, seed=7)
    drawn = []
    for kwargs in ({}, {}, {"start_server": False}):
        row = row_of()
        row.execution_metadata.rollout_id = "one id for all"
        [row] = await asyncio.gather(*processor([row], config_of(params, kwargs=kwargs)))
        drawn.append(record_of_row(row).completion_ids)
    await processor.acleanup()
    assert drawn[0] != drawn[1] == drawn[2]
