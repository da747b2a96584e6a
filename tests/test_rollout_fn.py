"""`rollout_fn(row)` as recipes call it: exact runs over real HTTP, and errors that are seen."""

import asyncio
import contextlib
import gc
import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from eval_protocol.models import EvaluateResult, EvaluationRow, Message, Status
from eval_protocol.pytest import evaluation_test

from eval_protocol_rft import FireworksTrainingRolloutProcessor, RetryPolicy, score_each_completion
from eval_protocol_rft.loop._rollout_fn import (
    RolloutFn,
    RolloutFnError,
    make_group_rollout_fn,
    make_rollout_fn,
    recipe_params,
)
from eval_protocol_rft.rollout._processor import RolloutError
from eval_protocol_rft.training._types import BiasedSamplingWarning
from eval_protocol_rft.training.export.cookbook import CookbookTypes
from tests.rollouts import chat_tokenizer, params_for, rendered, row_of, text_of
from tests.stub_server import Hang, Late, Seen, StubServer, sampled
from tests.stub_server import Status as HttpStatus

PARAMS = {"model": "m", "api_base": "http://h", "tokenizer": "t"}
QUICK = RetryPolicy(base_seconds=0.01, max_attempts=2)
REFUSED = HttpStatus(400, {"error": {"message": "no such thing"}})


@dataclass
class Run:
    segments: list[Any]
    run_id: str | None = None
    metadata: dict[str, Any] | None = None


@dataclass
class Rollout:
    runs: list[Run]
    row_meta: dict[str, Any] | None = None


TYPES = CookbookTypes(run=Run, rollout=Rollout)


@pytest.fixture
def processor() -> FireworksTrainingRolloutProcessor:
    return FireworksTrainingRolloutProcessor(tokenizer=chat_tokenizer(), retry=QUICK)


def letters(row: EvaluationRow) -> EvaluationRow:
    """A tenth for each letter of the answer."""
    row.evaluation_result = EvaluateResult(score=len(str(row.messages[-1].content)) / 10)
    return row


def longest(rows: list[EvaluationRow]) -> list[EvaluationRow]:
    """1 for the longest answers of a group."""
    most = max(len(str(row.messages[-1].content)) for row in rows)
    for row in rows:
        score = float(len(str(row.messages[-1].content)) == most)
        row.evaluation_result = EvaluateResult(score=score)
    return rows


def under_test(evaluator: Callable[..., Any], **options: Any) -> Any:
    """`evaluator` under `@evaluation_test`."""
    return evaluation_test(**{"input_rows": [[row_of()]], **options})(evaluator)


async def called(rollout_fn: RolloutFn, *rows: Any) -> list[Any]:
    try:
        return await asyncio.gather(*(rollout_fn(row) for row in rows))
    finally:
        await rollout_fn.aclose()


def assert_exact(run: Run, seen: Seen, prompt: list[int]) -> None:
    """The run is what the server sampled for this request, and its score is its own."""
    ids, logprobs = sampled(prompt, seen.seed, 32)
    [sample] = run.segments
    assert sample["tokens"] == [*prompt, *ids]
    assert sample["loss_mask"] == [0] * len(prompt) + [1] * len(ids)
    wanted = np.array([0.0] * len(prompt) + logprobs, np.float32)
    assert np.array_equal(np.array(sample["logprobs"], np.float32), wanted)
    raw = [0.0] * len(prompt) + [round(value * 1.25, 6) for value in logprobs]
    assert sample["raw_logprobs"] == raw
    assert sample["text"] == text_of(ids)
    assert sample["reward"] == len(text_of(ids)) / 10
    assert sample["finish_reason"] == "stop"


async def test_a_call_returns_the_exact_trajectory_and_its_score(
    server: StubServer, processor: FireworksTrainingRolloutProcessor
) -> None:
    test = under_test(
        score_each_completion(letters),
        completion_params=[params_for(server, seed=7)],
        rollout_processor=processor,
    )
    row = row_of()
    before = row.model_dump()
    [run] = await called(make_rollout_fn(test, types=TYPES), row)
    [seen] = server.requests
    assert_exact(run, seen, rendered("hi"))
    assert run.metadata == {"row_id": "row-1", "completion": 0, "policy_version": None}
    assert row.model_dump() == before


async def test_a_plain_evaluator_needs_only_a_processor(
    server: StubServer, processor: FireworksTrainingRolloutProcessor
) -> None:
    rollout_fn = make_rollout_fn(
        letters, processor=processor, completion_params=params_for(server, seed=7), types=TYPES
    )
    [run] = await called(rollout_fn, row_of())
    assert_exact(run, server.requests[0], rendered("hi"))


IDS = [70, 71, 72, 73]


def asks_in_words(rows: list[dict[str, Any]]) -> list[EvaluationRow]:
    """An adapter that knows of messages alone."""
    return [EvaluationRow(messages=[Message(role="user", content="hi")]) for _ in rows]


@pytest.mark.parametrize("options", [{}, {"dataset_adapter": asks_in_words}], ids=["", "adapter"])
async def test_a_row_of_token_ids_is_its_own_prompt(
    server: StubServer, processor: FireworksTrainingRolloutProcessor, options: Any
) -> None:
    test = under_test(
        letters,
        completion_params=[params_for(server)],
        rollout_processor=processor,
        **options,
    )
    rollout_fn = make_rollout_fn(test, types=TYPES)
    line = {"prompt_token_ids": IDS, "ground_truth": "4"}
    runs = await called(rollout_fn, line, line, row_of())
    by_seed = {seen.seed: seen for seen in server.requests}
    assert len(by_seed) == 3
    assert sorted(seen.prompt for seen in by_seed.values()) == sorted(
        [tuple(IDS), tuple(IDS), tuple(rendered("hi"))]
    )
    for run, prompt in zip(runs, [IDS, IDS, rendered("hi")], strict=True):
        [sample] = run.segments
        assert sample["loss_mask"][: len(prompt)] == [0] * len(prompt)
        assert sample["tokens"][: len(prompt)] == prompt
        assert sample["text"]


@pytest.mark.parametrize("ending", ["ends", "raises", "is cancelled", "is cut off"])
def test_a_recipe_that_closes_nothing_leaves_no_noise(
    server: StubServer, processor: FireworksTrainingRolloutProcessor, ending: str
) -> None:
    rollout_fn = make_rollout_fn(
        letters, processor=processor, completion_params=params_for(server), types=TYPES
    )
    told: list[dict[str, Any]] = []

    async def recipe() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))
        await asyncio.gather(rollout_fn(row_of()), rollout_fn(row_of()))
        if ending == "raises":
            raise ZeroDivisionError
        if ending == "is cancelled":
            task = asyncio.current_task()
            assert task is not None
            task.cancel()
            await rollout_fn(row_of())
        if ending == "is cut off":
            asyncio.ensure_future(rollout_fn(row_of()))  # noqa: RUF006 - nobody waits for it
            await asyncio.sleep(0)

    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always", ResourceWarning)
        with contextlib.suppress(ZeroDivisionError, asyncio.CancelledError):
            asyncio.run(recipe())
        # In another loop it goes on, and that is closed too.
        [run] = asyncio.run(_gathered(rollout_fn))
        gc.collect()
    assert run.segments
    assert [w.message for w in warned if issubclass(w.category, ResourceWarning)] == []
    assert told == []


async def _gathered(rollout_fn: RolloutFn) -> list[Any]:
    return await asyncio.gather(rollout_fn(row_of()))


async def test_calls_for_one_row_are_its_runs_and_draw_their_own_completions(
    server: StubServer, processor: FireworksTrainingRolloutProcessor
) -> None:
    params = params_for(server, seed=7)

    async def seeds() -> list[int]:
        server.requests.clear()
        rollout_fn = make_rollout_fn(letters, processor=processor, completion_params=params)
        await called(rollout_fn, *[row_of()] * 6)
        return sorted(seen.seed for seen in server.requests)

    first = await seeds()
    assert len(set(first)) == 6
    assert await seeds() == first  # and a run from the start draws the same again


async def test_lines_of_the_data_set_go_through_the_tests_adapter(
    server: StubServer, processor: FireworksTrainingRolloutProcessor
) -> None:
    def adapter(lines: list[dict[str, Any]]) -> list[EvaluationRow]:
        return [row_of(line["question"], row_id=None) for line in lines]

    test = under_test(
        letters,
        completion_params=[params_for(server, seed=7)],
        rollout_processor=processor,
        dataset_adapter=adapter,
    )
    line = {"question": "2+2?", "id": 1}
    one, other, again = await called(
        make_rollout_fn(test, types=TYPES), line, {"question": "3+3?"}, line
    )
    prompts = [rendered("2+2?"), rendered("3+3?"), rendered("2+2?")]
    for run, prompt in zip((one, other, again), prompts, strict=True):
        assert run.segments[0]["tokens"][: len(prompt)] == prompt
    # rows without an id get the one that their content has
    assert one.metadata["row_id"] == again.metadata["row_id"] != other.metadata["row_id"]


@pytest.mark.parametrize("is_async", [False, True])
async def test_the_tests_own_arguments_reach_the_evaluator(
    server: StubServer, processor: FireworksTrainingRolloutProcessor, is_async: bool
) -> None:
    def evaluator(row: EvaluationRow, bonus: float) -> EvaluationRow:
        row.evaluation_result = EvaluateResult(score=bonus)
        return row

    async def async_evaluator(row: EvaluationRow, bonus: float) -> EvaluationRow:
        await asyncio.sleep(0)
        return evaluator(row, bonus)

    test = under_test(
        async_evaluator if is_async else evaluator,
        completion_params=[params_for(server, seed=7)],
        rollout_processor=processor,
        evaluation_test_kwargs=[{"bonus": 0.25}],
    )
    [run] = await called(make_rollout_fn(test, types=TYPES), row_of())
    assert run.segments[0]["reward"] == 0.25
    other = make_rollout_fn(test, types=TYPES, evaluation_test_kwargs={"bonus": 0.5})
    [run] = await called(other, row_of())
    assert run.segments[0]["reward"] == 0.5


async def test_a_group_is_one_run_per_completion(
    server: StubServer, processor: FireworksTrainingRolloutProcessor
) -> None:
    params = params_for(server, seed=7, n=4)
    rollout_fn = make_group_rollout_fn(
        letters, processor=processor, completion_params=params, types=TYPES
    )
    [rollout] = await called(rollout_fn, row_of())
    assert len(rollout.runs) == 4
    by_tokens = {tuple(sampled(rendered("hi"), seen.seed, 32)[0]): seen for seen in server.requests}
    for run in rollout.runs:
        ids = run.segments[0]["tokens"][len(rendered("hi")) :]
        assert_exact(run, by_tokens[tuple(ids)], rendered("hi"))
    assert len({run.run_id for run in rollout.runs}) == 4


async def test_a_groupwise_evaluator_sees_the_group(
    server: StubServer, processor: FireworksTrainingRolloutProcessor
) -> None:
    test = under_test(
        longest,
        completion_params=[params_for(server, seed=7, n=5)],
        rollout_processor=processor,
        mode="groupwise",
    )
    [rollout] = await called(make_group_rollout_fn(test, types=TYPES), row_of())
    lengths = [len(run.segments[0]["text"]) for run in rollout.runs]
    rewards = [run.segments[0]["reward"] for run in rollout.runs]
    assert rewards == [float(length == max(lengths)) for length in lengths]


@dataclass
class Errors:
    """An `on_error` that keeps what it is told."""

    seen: list[tuple[Any, RolloutFnError]] = field(default_factory=list)

    def __call__(self, row: Any, error: RolloutFnError) -> None:
        self.seen.append((row, error))


def broken(row: EvaluationRow) -> EvaluationRow:
    raise KeyError("ground_truth")


async def test_an_evaluator_that_raises_is_an_error_with_its_line(
    server: StubServer, processor: FireworksTrainingRolloutProcessor
) -> None:
    params = params_for(server, seed=7)
    rollout_fn = make_rollout_fn(broken, processor=processor, completion_params=params)
    with pytest.raises(RolloutFnError) as raised:
        await called(rollout_fn, row_of())
    assert (raised.value.row_id, raised.value.completion) == ("row-1", 0)
    assert (
        "row 'row-1', run 0, completion 0: not scored: KeyError: 'ground_truth' (test_rollout"
        in (str(raised.value))
    )


async def test_an_error_is_handed_over_where_the_caller_goes_on_without(
    server: StubServer, processor: FireworksTrainingRolloutProcessor
) -> None:
    errors = Errors()
    rollout_fn = make_rollout_fn(
        broken,
        processor=processor,
        completion_params=params_for(server, seed=7),
        on_error=errors,
    )
    row = row_of()
    assert await called(rollout_fn, row) == [None]
    [(given, error)] = errors.seen
    assert given is row
    assert error.completion == 0


async def test_a_failed_rollout_is_raised_with_its_cause(
    server: StubServer, processor: FireworksTrainingRolloutProcessor
) -> None:
    server.script = lambda seen: REFUSED
    params = params_for(server, seed=7)
    rollout_fn = make_rollout_fn(letters, processor=processor, completion_params=params)
    with pytest.raises(RolloutFnError, match="no such thing") as raised:
        await called(rollout_fn, row_of())
    assert isinstance(raised.value.__cause__, RolloutError)


async def test_a_group_with_a_failure_is_an_error_or_reported_and_smaller(
    server: StubServer, processor: FireworksTrainingRolloutProcessor
) -> None:
    server.script = lambda seen: REFUSED if seen.place % 3 == 1 else None
    errors = Errors()
    options: dict[str, Any] = {
        "processor": processor,
        "completion_params": params_for(server, seed=7, n=3),
        "types": TYPES,
    }
    with pytest.raises(RolloutFnError, match=r"completion \d: refused: .*no such thing"):
        await called(make_group_rollout_fn(letters, **options), row_of())
    options["completion_params"] = params_for(server, seed=8, n=3)
    rollout_fn = make_group_rollout_fn(letters, on_error=errors, **options)
    [rollout] = await called(rollout_fn, row_of())
    [(_, error)] = errors.seen
    kept = {run.metadata["completion"] for run in rollout.runs}
    assert kept | {error.completion} == {0, 1, 2}
    assert len(rollout.runs) == 2


class Watched(FireworksTrainingRolloutProcessor):
    """Keeps what is called on it, and can say that every rollout failed."""

    def __init__(self, status: Status | None = None) -> None:
        super().__init__(tokenizer=chat_tokenizer())
        self.calls: list[str] = []
        self.given: list[tuple[EvaluationRow, Any]] = []
        self.status = status

    def setup(self) -> None:
        self.calls.append("setup")

    def cleanup(self) -> None:
        self.calls.append("cleanup")

    def __call__(self, rows: Any, config: Any) -> Any:
        if self.status is None:
            return super().__call__(rows, config)

        self.given += [(row.model_copy(deep=True), config) for row in rows]

        async def failed(row: EvaluationRow) -> EvaluationRow:
            assert self.status is not None
            row.rollout_status = self.status
            return row

        return [asyncio.create_task(failed(row)) for row in rows]


async def test_a_processor_is_set_up_once_and_cleaned_up_at_the_end(server: StubServer) -> None:
    processor = Watched()
    rollout_fn = make_rollout_fn(
        letters, processor=processor, completion_params=params_for(server, seed=7)
    )
    assert processor.calls == []
    await called(rollout_fn, row_of(), row_of())
    assert processor.calls == ["setup", "cleanup"]
    await server.until(lambda: server.connections == 0)


@pytest.mark.parametrize("code", [Status.Code.INTERNAL, Status.Code.DEADLINE_EXCEEDED])
async def test_a_row_with_the_status_of_an_error_has_no_run(code: Status.Code) -> None:
    processor = Watched(Status(code=code, message="the environment died"))
    rollout_fn = make_rollout_fn(letters, processor=processor, completion_params=PARAMS)
    with pytest.raises(RolloutFnError, match="row 'row-1', run 0: the environment died"):
        await rollout_fn(row_of())


async def test_a_key_reaches_the_processor_and_no_row() -> None:
    processor = Watched(Status.rollout_error("-"))
    rollout_fn = make_rollout_fn(
        letters, processor=processor, completion_params=PARAMS | {"api_key": "fw-secret-key"}
    )
    with pytest.raises(RolloutFnError):
        await rollout_fn(row_of())
    [(row, config)] = processor.given
    assert config.completion_params["api_key"] == "fw-secret-key"
    assert "fw-secret-key" not in row.model_dump_json()


async def test_a_line_that_becomes_several_rows_is_an_error(
    server: StubServer, processor: FireworksTrainingRolloutProcessor
) -> None:
    test = under_test(
        letters,
        completion_params=[params_for(server, seed=7)],
        rollout_processor=processor,
        dataset_adapter=lambda lines: [row_of(line["question"]) for line in lines],
        preprocess_fn=lambda rows: rows * 2,
    )
    with pytest.raises(RolloutFnError, match="made 2 rows of one: pass EvaluationRows"):
        await make_rollout_fn(test)({"question": "2+2?"})


async def test_a_row_that_is_no_row_is_an_error_too(
    server: StubServer, processor: FireworksTrainingRolloutProcessor
) -> None:
    rollout_fn = make_rollout_fn(
        letters, processor=processor, completion_params=params_for(server, seed=7)
    )
    with pytest.raises(RolloutFnError, match="an EvaluationRow or a dict of the data set, not int"):
        await rollout_fn(3)  # type: ignore[arg-type]


async def test_cancelling_a_call_cancels_its_requests(
    server: StubServer, processor: FireworksTrainingRolloutProcessor
) -> None:
    server.script = lambda seen: Hang()
    errors = Errors()
    rollout_fn = make_rollout_fn(
        letters,
        processor=processor,
        completion_params=params_for(server, seed=7),
        on_error=errors,
    )
    task = asyncio.create_task(rollout_fn(row_of()))
    await server.until(lambda: len(server.requests) == 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await server.until(lambda: server.outcomes() == ["disconnected"])
    assert errors.seen == []  # whoever cancels knows
    await rollout_fn.aclose()
    await server.until(lambda: server.connections == 0)


async def test_completions_in_flight_are_limited(
    server: StubServer, processor: FireworksTrainingRolloutProcessor
) -> None:
    server.script = lambda seen: Late(0.02)
    rollout_fn = make_rollout_fn(
        letters,
        processor=processor,
        completion_params=params_for(server, seed=7),
        max_concurrency=2,
    )
    await called(rollout_fn, *[row_of()] * 12)
    assert server.peak == 2


def test_one_function_serves_one_event_loop_after_another(
    server: StubServer, processor: FireworksTrainingRolloutProcessor
) -> None:
    rollout_fn = make_rollout_fn(
        letters,
        processor=processor,
        completion_params=params_for(server, seed=7),
        max_concurrency=1,
        types=TYPES,
    )
    for _ in range(2):
        assert len(asyncio.run(called(rollout_fn, row_of(), row_of()))) == 2


@dataclass
class Setup:
    """The fields that the cookbook's recipes hand a rollout factory."""

    inference_base_url: str
    tokenizer_id: str
    sample_kwargs: dict[str, Any]
    api_key: str = "fw-secret-key"
    model: str = "accounts/a/deployments/d"
    completions_per_prompt: int = 2
    sampler: Any = None


def recipe_setup(url: str, tokenizer_id: str = "tok", **kwargs: Any) -> Setup:
    sample = {
        "max_tokens": 32,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "max_seq_len": 4096,
        "http_timeout": 60,
        "logprobs": True,
    }
    return Setup(url, tokenizer_id, {**sample, **kwargs})


async def test_a_recipe_runs_it_with_its_own_settings(
    server: StubServer, tokenizer_folder: Any
) -> None:
    setup = recipe_setup(server.url, str(tokenizer_folder), seed=7)
    test = under_test(
        letters,
        completion_params=[{"model": "other", "n": 8, "temperature": 0.1}],
        rollout_processor=FireworksTrainingRolloutProcessor(),
    )
    rollout_fn = make_rollout_fn(
        test, completion_params=recipe_params(setup) | {"n": 1}, types=TYPES
    )
    assert list(inspect.signature(rollout_fn).parameters) == ["row"]  # no context is asked for
    runs = await called(rollout_fn, *[row_of()] * setup.completions_per_prompt)
    assert [type(run) for run in runs] == [Run, Run]
    for seen in server.requests:
        assert seen.path == "/inference/v1/completions"
        assert seen.headers["Authorization"] == "Bearer fw-secret-key"
        assert seen.body["model"] == setup.model
        assert (seen.body["temperature"], seen.body["top_p"], seen.body["top_k"]) == (1.0, 1.0, 0)
        assert "max_seq_len" not in seen.body
    assert "fw-secret-key" not in repr(runs)


@pytest.mark.parametrize(
    ("url", "base"),
    [
        ("https://api.fireworks.ai", "https://api.fireworks.ai/inference"),
        ("https://gateway.example/", "https://gateway.example/inference"),
        ("https://h/inference/v1", "https://h/inference/v1"),
        ("https://d.direct.fireworks.ai", "https://d.direct.fireworks.ai"),
    ],
)
def test_the_recipes_gateway_serves_completions_under_inference(url: str, base: str) -> None:
    assert recipe_params(recipe_setup(url))["api_base"] == base


def test_what_a_recipe_asks_for_in_vain_is_refused() -> None:
    with pytest.raises(ValueError, match="router replay"):
        recipe_params(recipe_setup("http://h", include_routing_matrix=True))
    setup = recipe_setup("http://h")
    setup.sampler = object()
    with pytest.raises(ValueError, match="brings a sampler of its own"):
        recipe_params(setup)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"completion_params": [PARAMS | {"n": 4}]}, "n=4 and a RolloutRun is one trajectory"),
        ({"completion_params": [PARAMS, PARAMS]}, "2 sets of completion_params"),
        (
            {
                "completion_params": [PARAMS],
                "evaluation_test_kwargs": [{"bonus": 1}, {"bonus": 2}],
            },
            "2 sets of evaluation_test_kwargs",
        ),
        ({"completion_params": [{"n": 1}]}, "must name a model"),
    ],
)
def test_a_test_that_leaves_it_open_is_refused_at_once(
    options: dict[str, Any], message: str
) -> None:
    def evaluator(row: EvaluationRow, bonus: float = 0) -> EvaluationRow:
        return row

    processor = FireworksTrainingRolloutProcessor()
    with pytest.raises(ValueError, match=message):
        make_rollout_fn(under_test(evaluator, rollout_processor=processor, **options))


def test_evaluators_that_do_not_fit_are_refused_at_once() -> None:
    processor = FireworksTrainingRolloutProcessor()
    options: dict[str, Any] = {"processor": processor, "completion_params": PARAMS}
    with pytest.raises(ValueError, match="use make_group_rollout_fn"):
        make_rollout_fn(longest, **options)
    whole = under_test(longest, completion_params=[PARAMS], mode="all", rollout_processor=processor)
    with pytest.raises(ValueError, match='mode="all"'):
        make_group_rollout_fn(whole)
    with pytest.raises(ValueError, match="pass processor="):
        make_rollout_fn(letters, completion_params=PARAMS)
    with pytest.raises(ValueError, match="max_concurrency must be at least 1, got 0"):
        make_rollout_fn(letters, **options, max_concurrency=0)


def test_biased_sampling_is_said_once_where_the_function_is_made() -> None:
    options: dict[str, Any] = {"processor": FireworksTrainingRolloutProcessor()}
    with pytest.warns(BiasedSamplingWarning, match="truncated support") as caught:
        make_rollout_fn(letters, completion_params=PARAMS | {"top_p": 0.9}, **options)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_rollout_fn(letters, completion_params=PARAMS, **options)


async def test_messages_before_the_last_question_stay_in_the_prompt(
    server: StubServer, processor: FireworksTrainingRolloutProcessor
) -> None:
    row = row_of("one", Message(role="assistant", content="1"), Message(role="user", content="two"))
    rollout_fn = make_rollout_fn(
        letters, processor=processor, completion_params=params_for(server, seed=7), types=TYPES
    )
    [run] = await called(rollout_fn, row)
    prompt = chat_tokenizer().apply_chat_template(
        [message.model_dump() for message in row.messages],
        add_generation_prompt=True,
        return_dict=False,
    )
    assert_exact(run, server.requests[0], prompt)
