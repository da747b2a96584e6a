"""What is kept, recorded, retried and raised when a server fails: over real HTTP."""

from __future__ import annotations

import asyncio
import re

import pytest
from eval_protocol.exceptions import ResponseQualityError
from eval_protocol.models import EvaluationRow
from eval_protocol.pytest.evaluation_test_utils import rollout_processor_with_retry
from eval_protocol.pytest.exception_config import (
    BackoffConfig,
    ExceptionHandlerConfig,
    get_default_exception_handler_config,
)
from eval_protocol.pytest.rollout_result_post_processor import RolloutResultPostProcessor

from eval_protocol_rft import FireworksTrainingRolloutProcessor, RetryPolicy
from eval_protocol_rft.local._tokenizer import TokenizerError
from eval_protocol_rft.record import RecordError
from eval_protocol_rft.rollout._params import ParamsError
from eval_protocol_rft.rollout._processor import RolloutError
from eval_protocol_rft.rollout._prompts import PromptError
from eval_protocol_rft.sampling._types import Failure
from tests.rollouts import (
    assert_is_what_the_server_sampled,
    chat_tokenizer,
    config_of,
    params_for,
    record_of_row,
    roll_out,
    row_of,
)
from tests.serving import ScriptedSampler
from tests.stub_server import Changed, Drop, Hang, Raw, Status
from tests.waiting import PATIENCE

QUICK = RetryPolicy(base_seconds=0.01, max_attempts=3)
BUSY = Status(503, {"error": {"message": "overloaded"}})
REFUSED = Status(400, {"error": {"message": "no such thing", "type": "invalid_request_error"}})


@pytest.fixture
def processor() -> FireworksTrainingRolloutProcessor:
    return FireworksTrainingRolloutProcessor(tokenizer=chat_tokenizer(), retry=QUICK)


def only_failure(row: EvaluationRow) -> Failure:
    [failure] = record_of_row(row).failures
    return failure


BOTTOMLESS = b'{"perf_metrics": ' + b"[" * 100_000
FATAL = {
    "a refusal": (REFUSED, "refused", 1, 400, "no such thing"),
    "a missing model": (
        Status(404, {"error": {"message": "Model not found"}}),
        "refused",
        1,
        404,
        "check the model's name and the base URL",
    ),
    "an overload that lasts": (BUSY, "unavailable", 3, 503, "overloaded"),
    "an error inside a good status": (
        Status(200, {"error": {"message": "engine died", "code": 500}}),
        "unavailable",
        3,
        500,
        "engine died",
    ),
    "a redirect": (Status(307, headers={"Location": "/elsewhere"}), "refused", 1, 307, "HTTP 307"),
    "a page of HTML": (Status(200, b"<html>login</html>"), "contract", 1, None, "not JSON"),
    "a reply without a bottom": (Status(200, BOTTOMLESS), "contract", 1, None, "too deeply"),
    "an error without a bottom": (Status(500, BOTTOMLESS), "unavailable", 3, 500, "HTTP 500"),
    "a logprob too few": (
        Changed(lambda reply: reply["choices"][0]["logprobs"]["content"].pop()),
        "contract",
        1,
        None,
        "choices\\[0\\]: token_ids",
    ),
    "another prompt than was sent": (
        Changed(lambda reply: reply["choices"][0].update(prompt_token_ids=[1, 2, 3])),
        "contract",
        1,
        None,
        "prompt_token_ids .* differs from the prompt ids sent",
    ),
    "connections that always drop": (Drop(), "connection", 3, None, "Disconnected|reset"),
    "bodies that are always cut off": (Drop(within_body=True), "connection", 3, None, "http://127"),
    "no HTTP at all": (Raw(b"220 smtp ready\r\n\r\n"), "connection", 3, None, "http://127"),
}


@pytest.mark.parametrize("fault", FATAL)
async def test_three_of_four_are_kept_beside(server, processor, fault):
    answer, kind, attempts, status, message = FATAL[fault]
    server.script = lambda seen: answer if seen.place == 2 else None
    [row] = await roll_out(processor, row_of(), params_for(server, n=4, seed=5))
    record, failure = record_of_row(row), only_failure(row)
    [(failing, seeds)] = [
        (seed, [s.seed for s in server.requests if s.seed != seed])
        for seed in {s.seed for s in server.requests if s.place == 2}
    ]
    assert (failure.kind, failure.attempts, failure.status) == (kind, attempts, status)
    assert failure.seed == failing
    assert re.search(message, failure.message), failure.message
    assert len(record) == 3
    assert record.sampling.n == 4
    assert sorted([*record.sampling.indices, failure.index]) == [0, 1, 2, 3]
    assert record.sampling.indices == sorted(record.sampling.indices)
    assert set(record.sampling.seeds) == set(seeds)
    assert_is_what_the_server_sampled(record)
    assert row.messages[-1].content == record.completions_text[0]
    assert row.execution_metadata.usage.prompt_tokens == 3 * len(record.prompt_ids)


async def test_indices_and_seeds_stay_with_their_completion_when_the_first_one_fails(
    server, processor
):
    params = params_for(server, n=4, seed=5)
    [whole] = await roll_out(processor, row_of(), params)
    seeds = record_of_row(whole).sampling.seeds
    server.script = lambda seen: REFUSED if seen.seed == seeds[0] else None
    another = FireworksTrainingRolloutProcessor(tokenizer=chat_tokenizer())
    [row] = await roll_out(another, row_of(), params)
    record = record_of_row(row)
    assert only_failure(row).index == 0
    assert record.sampling.indices == [1, 2, 3]
    assert record.completion_ids == record_of_row(whole).completion_ids[1:]
    assert row.messages[-1].content == record.completions_text[0]


TRANSIENT = {
    "429": Status(429, {"error": "slow down"}),
    "425 while weights are swapped": Status(425),
    "500": Status(500, b"Internal Server Error"),
    "502 of a gateway": Status(502, b"<html>bad gateway</html>"),
    "503": BUSY,
    "504": Status(504),
    "520 of a proxy": Status(520),
    "a connection dropped before the reply": Drop(),
    "a connection dropped within the reply": Drop(within_body=True),
    "half of the reply, well delivered": Status(200, b'{"id":"c","object":"text_comple'),
    "an empty reply": Status(200, b""),
    "a generation that was aborted": Changed(
        lambda reply: reply["choices"][0].update(finish_reason="abort")
    ),
}


@pytest.mark.parametrize("fault", TRANSIENT)
async def test_one_more_attempt_gets_over(server, processor, fault):
    server.script = lambda seen: TRANSIENT[fault] if seen.attempt == 1 else None
    [row] = await roll_out(processor, row_of(), params_for(server, n=2))
    record = record_of_row(row)
    assert record.failures == []
    assert record.sampling.attempts == [2, 2]
    assert len(server.requests) == 4
    assert_is_what_the_server_sampled(record)


async def test_a_retry_asks_for_the_very_same_completion(server, processor):
    server.script = lambda seen: BUSY if seen.attempt < 3 else None
    await roll_out(processor, row_of(), params_for(server))
    bodies = [seen.body for seen in server.requests]
    assert len(bodies) == 3
    assert bodies[0] == bodies[1] == bodies[2]


async def test_retry_after_is_waited_out_and_only_by_the_completion_that_was_told_to(
    server, processor
):
    busy = Status(429, {"error": "slow down"}, {"Retry-After": "0.4"})
    server.script = lambda seen: busy if (seen.place, seen.attempt) == (1, 1) else None
    [row] = await roll_out(processor, row_of(), params_for(server, n=4))
    *first, again = server.requests
    told = next(seen for seen in first if seen.seed == again.seed)
    assert again.arrived - told.arrived >= 0.4
    assert len({seen.seed for seen in first}) == 4  # nobody else waited for it
    assert sorted(record_of_row(row).sampling.attempts) == [1, 1, 1, 2]


async def test_a_retry_after_beyond_the_budget_is_not_waited_for(server):
    retry = RetryPolicy(base_seconds=0.01, max_seconds=5)
    processor = FireworksTrainingRolloutProcessor(tokenizer=chat_tokenizer(), retry=retry)
    server.script = lambda seen: Status(503, headers={"Retry-After": "600"})
    with pytest.raises(RolloutError, match="unavailable, 1 attempts"):
        await asyncio.wait_for(roll_out(processor, row_of(), params_for(server)), timeout=PATIENCE)
    assert len(server.requests) == 1


async def test_a_hang_ends_with_the_timeout_and_the_connection(server, processor):
    server.script = lambda seen: Hang() if seen.place == 0 else None
    params = params_for(server, n=4, http_timeout=0.5)
    [row] = await roll_out(processor, row_of(), params)
    failure = only_failure(row)
    assert (failure.kind, failure.attempts) == ("timeout", 3)
    assert "no whole reply within 0.5 s" in failure.message
    assert failure.seconds >= 1.5
    await server.until(lambda: server.outcomes().count("disconnected") == 3)


async def test_a_server_that_is_not_there_is_a_failed_connection(processor):
    params = {"model": "m", "api_base": "http://127.0.0.1:9"}
    with pytest.raises(RolloutError, match=r"\(connection, 3 attempts\): http://127.0.0.1:9/v1"):
        await roll_out(processor, row_of(), params)


async def test_a_row_with_too_few_survivors_is_an_error_and_stays_as_it_was(server):
    processor = FireworksTrainingRolloutProcessor(
        tokenizer=chat_tokenizer(), retry=QUICK, min_completions=3
    )
    server.script = lambda seen: REFUSED if seen.place in (1, 2) else None
    row = row_of(row_id="row-4")
    row.execution_metadata.extra = {"run_index": 1}
    before = row.model_dump()
    message = (
        "row row-4: 2 of 4 completions survived, 3 are needed; completion . failed "
        r"\(refused, 1 attempts\): HTTP 400: no such thing"
    )
    with pytest.raises(RolloutError, match=message):
        await roll_out(processor, row, params_for(server, n=4))
    assert row.model_dump() == before
    server.script = lambda seen: REFUSED if seen.place == 5 else None  # another run: other seeds
    [row] = await roll_out(processor, row, params_for(server, n=4))
    assert len(record_of_row(row)) == 3


async def test_asking_for_fewer_than_must_survive_is_refused(server):
    processor = FireworksTrainingRolloutProcessor(tokenizer=chat_tokenizer(), min_completions=3)
    with pytest.raises(ValueError, match="'n'\\] is 2, less than min_completions=3"):
        await roll_out(processor, row_of(), params_for(server, n=2))
    assert server.requests == []


@pytest.mark.parametrize(
    "error", [RolloutError, ParamsError, PromptError, TokenizerError, RecordError, ValueError]
)
def test_eval_protocol_does_not_resample_on(error):
    retried = tuple(get_default_exception_handler_config().retryable_exceptions)
    assert len(retried) > 10
    assert not issubclass(error, retried)
    assert issubclass(error, ValueError | RuntimeError)


async def eval_protocols_outcome(processor, params) -> EvaluationRow:
    """The row as Eval Protocol itself hands it on, with its own retries."""
    row = row_of()
    row.rollout_status = type(row.rollout_status).rollout_running()
    results = rollout_processor_with_retry(processor, [row], config_of(params), disable_tqdm=True)
    [row] = [result async for result in results]
    await processor.acleanup()
    return row


async def test_eval_protocol_asks_once_for_a_row_that_fails_for_good(server, processor):
    server.script = lambda seen: BUSY
    row = await eval_protocols_outcome(processor, params_for(server, n=2))
    assert row.rollout_status.is_error()
    assert "0 of 2 completions survived" in row.rollout_status.message
    assert sorted(seen.attempt for seen in server.requests) == [1, 1, 2, 2, 3, 3]
    assert [message.role for message in row.messages] == ["user"]


@pytest.mark.parametrize("error", [OSError("disk"), TimeoutError(), ConnectionError("x")])
async def test_eval_protocol_asks_once_when_a_sampler_of_the_callers_breaks_its_promise(error):
    def fail(prompt, params, seed):
        raise error

    sampler = ScriptedSampler(fail)
    processor = FireworksTrainingRolloutProcessor(tokenizer=chat_tokenizer(), sampler=sampler)
    row = await eval_protocols_outcome(processor, {"model": "m", "n": 2})
    assert row.rollout_status.is_error()
    assert type(error).__name__ in row.rollout_status.message
    assert len(sampler.asked) == 2


async def test_a_sampler_that_breaks_its_promise_takes_its_siblings_with_it():
    def fail(prompt, params, seed):
        raise KeyError("bug")

    sampler = ScriptedSampler(fail)
    seeds: list[int | None] = []

    def all_but_the_last(seed: int | None) -> bool:
        seeds.append(seed)
        return len(seeds) < 4

    sampler.held = all_but_the_last
    processor = FireworksTrainingRolloutProcessor(tokenizer=chat_tokenizer(), sampler=sampler)
    before = asyncio.all_tasks()
    with pytest.raises(RolloutError, match="row row-1: KeyError: 'bug'"):
        await roll_out(processor, row_of(), {"model": "m", "n": 4})
    assert all(sampler.cancelled.acquire(timeout=PATIENCE) for _ in range(3))
    assert asyncio.all_tasks() == before


async def test_cancelling_a_row_leaves_no_task_and_no_request(server, processor):
    server.script = lambda seen: Hang()
    before = asyncio.all_tasks()
    [task] = processor([row_of()], config_of(params_for(server, n=4), slots=3))
    await server.until(lambda: server.in_flight == 3)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert asyncio.all_tasks() == before
    await server.until(lambda: server.outcomes() == ["disconnected"] * 3)
    await server.until(lambda: server.connections == 0)
    await processor.acleanup()


async def test_cancelling_a_row_ends_the_pauses_between_its_attempts(server, processor):
    server.script = lambda seen: Status(429, headers={"Retry-After": "60"})
    before = asyncio.all_tasks()
    [task] = processor([row_of()], config_of(params_for(server, n=2)))
    await server.until(lambda: server.outcomes() == ["answered"] * 2)
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert asyncio.all_tasks() == before
    await processor.acleanup()


async def test_a_slot_is_free_again_after_a_cancelled_and_after_a_failed_attempt(server, processor):
    server.script = lambda seen: Hang() if seen.place == 0 else REFUSED
    config = config_of(params_for(server, n=3), slots=1)
    [task] = processor([row_of(row_id="a")], config)
    await server.until(lambda: server.in_flight == 1)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    with pytest.raises(RolloutError):
        await asyncio.wait_for(asyncio.gather(*processor([row_of(row_id="b")], config)), PATIENCE)
    assert config.semaphore._value == 1
    await processor.acleanup()


@pytest.mark.parametrize("drop", [True, False])
async def test_a_row_that_a_post_processor_sends_back_has_one_answer_and_the_newer_record(
    server, drop
):
    class TwiceAtLeast(RolloutResultPostProcessor):
        calls = 0

        def process(self, result: EvaluationRow) -> None:
            self.calls += 1
            if self.calls < 3:
                raise ResponseQualityError("not good enough")

    processor = FireworksTrainingRolloutProcessor(
        tokenizer=chat_tokenizer(), drop_trailing_assistant_messages=drop
    )
    config = config_of(
        params_for(server, n=2),
        post_processor=TwiceAtLeast(),
        exception_handler_config=ExceptionHandlerConfig(
            backoff_config=BackoffConfig(strategy="constant", base_delay=0.01)
        ),
    )
    results = rollout_processor_with_retry(processor, [row_of()], config, disable_tqdm=True)
    [row] = [result async for result in results]
    await processor.acleanup()
    assert [message.role for message in row.messages] == ["user", "assistant"]
    assert len({seen.prompt for seen in server.requests}) == 1
    assert len(server.requests) == 3 * 2
    assert row.messages[-1].content == record_of_row(row).completions_text[0]
    assert record_of_row(row).sampling.seeds == [seen.seed for seen in server.requests[-2:]]
