"""Episodes of several turns: exact ids, stop reasons, and faults that cost one episode alone."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from eval_protocol.models import EvaluateResult, EvaluationRow, Message, StepOutput
from eval_protocol.pytest.types import RolloutProcessorConfig

from eval_protocol_rft.data._convert import convert
from eval_protocol_rft.data._dataset import RolloutDataset
from eval_protocol_rft.episodes._environment import (
    Environment,
    EpisodeLimits,
    RetryWithFeedback,
    Step,
)
from eval_protocol_rft.episodes._episode_processor import EpisodeRolloutProcessor
from eval_protocol_rft.episodes._tool_loop import ToolLoop
from eval_protocol_rft.local._tokenizer import load_tokenizer
from eval_protocol_rft.local.models import bundled_model_path
from eval_protocol_rft.record import RolloutRecord
from eval_protocol_rft.rollout._processor import RolloutError
from eval_protocol_rft.sampling._types import Completion, SamplingParams, TokenIds
from eval_protocol_rft.scoring._scored_rows import completion_views
from eval_protocol_rft.scoring._scorer import ascore_rows
from eval_protocol_rft.training._batch import build_batch
from tests.waiting import PATIENCE

TOKENIZER = load_tokenizer(str(bundled_model_path("arithmetic")))
END = TOKENIZER.tokenizer.eos_token_id


class Scripted:
    """Says what `script(turn, prompt text)` gives it, and keeps what went over the seam."""

    tokenizer = TOKENIZER

    def __init__(self, script: Callable[[int, str], str], *, seconds: float = 0.0) -> None:
        self.script = script
        self.seconds = seconds
        self.exchanges: list[tuple[list[int], list[int]]] = []

    async def sample(
        self, prompt_ids: TokenIds, params: SamplingParams, *, seed: int | None = None
    ) -> Completion:
        await asyncio.sleep(self.seconds)
        text = TOKENIZER.decode(list(prompt_ids))
        said = self.script(text.count("<|im_start|>assistant") - 1, text)
        ids = [*TOKENIZER.tokenizer.encode(said), END]
        cut = params.max_tokens is not None and len(ids) > params.max_tokens
        ids = ids[: params.max_tokens]
        self.exchanges.append((list(prompt_ids), ids))
        return Completion(
            token_ids=ids,
            logprobs=[-0.25] * len(ids),
            finish_reason="length" if cut else "stop",
            stop_reason=None if cut else END,
        )

    async def aclose(self) -> None:
        pass


def a_row(text: str = "What is 2+3?") -> EvaluationRow:
    row = EvaluationRow(messages=[Message(role="user", content=text)])
    row.input_metadata.row_id = "row"
    return row


async def roll_out(
    environment: Callable[[], Environment],
    script: Callable[[int, str], str],
    *,
    n: int = 1,
    row: EvaluationRow | None = None,
    params: dict[str, Any] | None = None,
    **options: Any,
) -> tuple[EvaluationRow, Scripted]:
    sampler = Scripted(script, seconds=options.pop("seconds", 0.0))
    rolled_out = await roll_out_from(sampler, environment, n=n, row=row, params=params, **options)
    return rolled_out, sampler


async def roll_out_from(
    sampler: Scripted,
    environment: Callable[[], Environment],
    *,
    n: int = 1,
    row: EvaluationRow | None = None,
    params: dict[str, Any] | None = None,
    slots: int = 64,
    **options: Any,
) -> EvaluationRow:
    processor = EpisodeRolloutProcessor(environment, sampler=sampler, **options)
    config = RolloutProcessorConfig(
        completion_params={"model": "any", "n": n, "max_tokens": 200, **(params or {})},
        mcp_config_path="",
        semaphore=asyncio.Semaphore(slots),
        server_script_path=None,
        steps=30,
    )
    (task,) = processor([row or a_row()], config)
    try:
        return await task
    finally:
        await processor.acleanup()


def add(a: int, b: int = 0) -> int:
    """Add two numbers."""
    return a + b


def call(name: str, **arguments: Any) -> str:
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


async def test_a_tool_is_called_and_its_answer_is_shown_to_the_model() -> None:
    def script(turn: int, prompt: str) -> str:
        return call("add", a=2, b=3) if turn == 0 else "The sum is 5."

    row, sampler = await roll_out(lambda: ToolLoop(add), script, n=2)

    assert [m.role for m in row.messages] == ["user", "assistant", "tool", "assistant"]
    assert row.messages[2].content == "5"
    assert row.messages[3].content == "The sum is 5."
    assert '"name": "add"' in TOKENIZER.decode(sampler.exchanges[0][0])
    record = RolloutRecord.from_extra(row.execution_metadata.extra)
    assert record.episodes is not None
    assert [e.stop_reason for e in record.episodes] == ["done", "done"]
    assert [e.turns for e in record.episodes] == [2, 2]
    assert len(record.token_turn_traces) == 2


async def test_segments_are_what_went_over_the_wire() -> None:
    def script(turn: int, prompt: str) -> str:
        return call("add", a=turn) if turn < 3 else "done"

    row, sampler = await roll_out(lambda: ToolLoop(add), script)

    record = RolloutRecord.from_extra(row.execution_metadata.extra)
    assert record.trajectories is not None
    ((segment,),) = record.trajectories
    last_prompt, last_answer = sampler.exchanges[-1]
    assert segment.tokens.tolist() == [*last_prompt, *last_answer]
    sampled = [i for i, one in enumerate(segment.loss_mask) if one]
    assert [segment.tokens[i] for i in sampled] == [t for _, ids in sampler.exchanges for t in ids]
    for (prompt, answer), (following, _) in zip(
        sampler.exchanges[:-1], sampler.exchanges[1:], strict=True
    ):
        assert following[: len(prompt) + len(answer)] == [*prompt, *answer]
    assert [segment.logprobs[i] for i in sampled] == [-0.25] * len(sampled)
    assert not any(
        lp for lp, one in zip(segment.logprobs, segment.loss_mask, strict=True) if not one
    )


async def test_one_reward_and_one_advantage_per_episode() -> None:
    def script(turn: int, prompt: str) -> str:
        return call("add", a=1) if turn == 0 else str(len(prompt) % 2)

    row, _ = await roll_out(lambda: ToolLoop(add), script, n=4)
    extra = row.execution_metadata.extra
    assert extra is not None
    extra["rewards"] = [0.0, 1.0, 0.0, 1.0]
    batch = build_batch([row], normalization="token")
    assert len(batch.datums) == 4
    for datum in batch.datums:
        assert len(set(datum.advantages[datum.mask].tolist())) == 1
    assert batch.stats.completions == 4
    assert sum(float(d.weights.sum()) for d in batch.datums) == pytest.approx(1.0)


async def test_an_evaluator_sees_each_episode_whole() -> None:
    texts = iter(["first", "second"])
    row, _ = await roll_out(Talk, lambda turn, prompt: next(texts) if turn == 0 else "end", n=2)
    views = completion_views(row)
    assert views is not None
    assert [[m.content for m in v.messages] for v in views] == [
        ["What is 2+3?", "first", "go on", "end"],
        ["What is 2+3?", "second", "go on", "end"],
    ]
    extra = views[0].execution_metadata.extra
    assert extra is not None
    assert extra["episode"]["step_rewards"] == [0.5, 0.5]
    assert "trajectories" not in extra
    assert "rft_schema" not in extra


async def test_rewards_of_steps_stand_in_the_evaluation_result() -> None:
    row, _ = await roll_out(Talk, lambda turn, prompt: "more" if turn == 0 else "end", n=2)
    (scored,) = await ascore_rows([row], lambda row: 1.0)
    again = EvaluationRow.model_validate_json(scored.model_dump_json())
    result = again.evaluation_result
    assert result is not None
    assert result.step_outputs is not None
    assert [(s.step_index, s.base_reward) for s in result.step_outputs] == [(0, 0.5), (1, 0.5)]


async def test_what_an_evaluator_says_of_steps_is_kept_per_episode() -> None:
    def judge(row: EvaluationRow) -> EvaluateResult:
        turns = (row.execution_metadata.extra or {})["episode"]["turns"]
        steps = [StepOutput(step_index=i, base_reward=i / 4, reason="so") for i in range(turns)]
        return EvaluateResult(score=1.0, step_outputs=steps)

    said = iter(["more", "end"])
    row, _ = await roll_out(Talk, lambda turn, prompt: next(said) if turn == 0 else "end", n=2)
    (scored,) = await ascore_rows([row], judge)
    record = RolloutRecord.from_extra(scored.execution_metadata.extra)
    assert record.completion_results is not None
    kept = [result.metrics["step_outputs"] for result in record.completion_results]
    assert [[step["base_reward"] for step in steps] for steps in kept] == [[0.0, 0.25], [0.0]]
    assert scored.evaluation_result is not None
    assert scored.evaluation_result.step_outputs is not None
    assert [step.reason for step in scored.evaluation_result.step_outputs] == ["so", "so"]


class Talk(Environment):
    """Says "go on" until it has heard "end"."""

    def step(self, messages: Any, assistant: Message) -> Step:
        done = "end" in str(assistant.content)
        return Step(messages=[{"role": "user", "content": "go on"}], done=done, reward=0.5)


@pytest.mark.parametrize(
    ("limits", "reason", "turns"),
    [
        (EpisodeLimits(turns=3), "turns", 3),
        (EpisodeLimits(tokens=150), "tokens", None),
        (EpisodeLimits(seconds=0.5), "seconds", None),
    ],
)
async def test_limits_end_an_episode_with_their_name(
    limits: EpisodeLimits, reason: str, turns: int | None
) -> None:
    row, sampler = await roll_out(Talk, lambda turn, prompt: "more", limits=limits, seconds=0.1)
    record = RolloutRecord.from_extra(row.execution_metadata.extra)
    assert record.episodes is not None
    (episode,) = record.episodes
    assert episode.stop_reason == reason
    assert turns is None or episode.turns == turns
    assert episode.turns == len(sampler.exchanges)
    for prompt, answer in sampler.exchanges:
        assert len(prompt) + len(answer) <= limits.tokens


async def test_a_turn_that_outlasts_the_episode_is_cancelled_and_left_out() -> None:
    def script(turn: int, prompt: str) -> str:
        sampler.seconds = 3600.0
        return "more"

    sampler = Scripted(script)
    async with asyncio.timeout(PATIENCE):
        row = await roll_out_from(sampler, Talk, limits=EpisodeLimits(seconds=1.0))
    record = RolloutRecord.from_extra(row.execution_metadata.extra)
    assert record.episodes is not None
    assert record.trajectories is not None
    assert (record.episodes[0].stop_reason, record.episodes[0].turns) == ("seconds", 1)
    ((prompt, answer),) = sampler.exchanges
    assert [segment.tokens.tolist() for segment in record.trajectories[0]] == [[*prompt, *answer]]


async def test_an_episode_whose_first_turn_never_comes_is_a_failure() -> None:
    with pytest.raises(RolloutError, match=r"\(timeout, .*first turn took longer than the 0.1 s"):
        await roll_out(Talk, lambda t, p: "x", seconds=3600, limits=EpisodeLimits(seconds=0.1))


async def test_waiting_for_a_slot_is_not_the_episodes_time() -> None:
    row, _ = await roll_out(
        Talk, lambda t, p: "end", n=4, slots=1, seconds=0.3, limits=EpisodeLimits(seconds=1.0)
    )
    record = RolloutRecord.from_extra(row.execution_metadata.extra)
    assert record.episodes is not None
    assert [episode.stop_reason for episode in record.episodes] == ["done"] * 4


async def test_no_more_environments_are_alive_than_rollouts_are_allowed() -> None:
    alive, most, made = 0, 0, 0

    class Counted(Talk):
        def __init__(self) -> None:
            nonlocal alive, most, made
            alive, made = alive + 1, made + 1
            most = max(most, alive)

        def close(self) -> None:
            nonlocal alive
            alive -= 1

    processor = EpisodeRolloutProcessor(
        Counted, sampler=Scripted(lambda t, p: "more" if t else "a")
    )
    config = RolloutProcessorConfig(
        completion_params={"model": "any", "n": 4, "max_tokens": 200},
        mcp_config_path="",
        semaphore=asyncio.Semaphore(3),
        server_script_path=None,
        steps=30,
    )
    rows = [a_row() for _ in range(6)]
    for number, row in enumerate(rows):
        row.input_metadata.row_id = str(number)
    await asyncio.gather(*processor(rows, config))
    await processor.acleanup()
    assert (made, most, alive) == (24, 3, 0)


async def test_a_turn_that_is_cut_off_ends_the_episode() -> None:
    row, _ = await roll_out(Talk, lambda turn, prompt: "a" * 50, params={"max_tokens": 10})
    record = RolloutRecord.from_extra(row.execution_metadata.extra)
    assert record.episodes is not None
    assert record.episodes[0].stop_reason == "length"


def once(bad: Callable[[], Any]) -> Callable[[], Environment]:
    """An environment whose first instance misbehaves in its step."""
    made = 0

    def make() -> Environment:
        nonlocal made
        made += 1
        first = made == 1

        class Faulty(Talk):
            def step(self, messages: Any, assistant: Message) -> Any:
                return bad() if first else super().step(messages, assistant)

        return Faulty()

    return make


def raises() -> None:
    raise KeyError("lost")


def exits() -> None:
    raise SystemExit(3)


def hangs() -> None:
    time.sleep(5)


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (raises, "raised KeyError"),
        (exits, "SystemExit"),
        (hangs, "took longer than 2 s"),
        (lambda: "nonsense", "returned str, not a Step"),
        (Step, "is not done and says nothing"),
        (lambda: Step(messages="hello"), "must be a list of messages"),
        (lambda: Step(messages=[{"role": "user", "content": 3}]), "a message is no message"),
        (lambda: Step(done=True, metrics={"x": object()}), "no JSON"),
        (lambda: Step(done=True, metrics={"x": float("inf")}), "no JSON"),
        (lambda: Step(done=True, reward=float("nan")), "the reward of a step is nan"),
        (lambda: Step(done=True, reward="1"), "the reward of a step is '1'"),
    ],
)
async def test_a_fault_costs_its_own_episode(bad: Callable[[], Any], said: str) -> None:
    # Enough for the steps of the others beside one that hangs.
    limits = EpisodeLimits(step_seconds=2.0 if bad is hangs else PATIENCE)
    row, _ = await roll_out(once(bad), lambda turn, prompt: "end", n=3, limits=limits)
    record = RolloutRecord.from_extra(row.execution_metadata.extra)
    assert len(record) == 2
    (failure,) = record.failures
    assert said in failure.message
    assert failure.kind == "internal"


async def test_hanging_environments_keep_nobody_waiting() -> None:
    let_go = threading.Event()

    class Hangs(Talk):
        def step(self, messages: Any, assistant: Message) -> Any:
            let_go.wait(600)

    limits = EpisodeLimits(step_seconds=0.1)
    try:
        with pytest.raises(RolloutError, match="took longer"):
            await asyncio.wait_for(roll_out(Hangs, lambda t, p: "x", n=64, limits=limits), PATIENCE)
    finally:
        let_go.set()


async def test_an_observation_beyond_its_limit_is_never_rendered() -> None:
    class Giant(Environment):
        def step(self, messages: Any, assistant: Message) -> Step:
            return Step(messages=[{"role": "user", "content": "x" * 100_000_000}])

    row, sampler = await roll_out(Giant, lambda turn, prompt: "more")
    record = RolloutRecord.from_extra(row.execution_metadata.extra)
    assert record.episodes is not None
    assert record.episodes[0].stop_reason == "observation"
    assert len(str(record.episodes[0].messages)) < 1000
    assert len(sampler.exchanges) == 1


async def test_a_step_of_an_async_environment_ends_neither_the_run_nor_its_siblings() -> None:
    async def cancelled() -> Step:
        inner = asyncio.create_task(asyncio.sleep(9))
        inner.cancel()
        await inner
        raise AssertionError

    async def exits() -> Step:
        raise SystemExit(3)

    for bad, said in ((cancelled, "CancelledError"), (exits, "SystemExit: 3")):
        row, _ = await roll_out(once(bad), lambda turn, prompt: "end", n=2)
        (failure,) = RolloutRecord.from_extra(row.execution_metadata.extra).failures
        assert said in failure.message


@pytest.mark.parametrize(
    "said",
    [
        [{"role": "user", "content": "no \ud83d way"}],
        [Message(role="user", content="no \ud83d way")],
    ],
)
async def test_half_a_surrogate_pair_costs_a_character_and_no_episode(said: Any) -> None:
    step = Step(messages=said, metrics={"half \ud83d": "\ud83d"})
    row, _ = await roll_out(
        once(lambda: step), lambda turn, prompt: "more" if turn < 1 else "end", n=2
    )
    record = RolloutRecord.from_extra(row.execution_metadata.extra)
    assert not record.failures
    first = record.episodes[0]
    assert first.messages[2]["content"] == "no \ufffd way"
    assert first.metrics["half \ufffd"] == "\ufffd"
    json.dumps(row.model_dump(mode="json"), ensure_ascii=False).encode()


async def test_half_a_surrogate_pair_in_what_a_tool_returns_or_raises_costs_a_character() -> None:
    def look(fails: bool) -> str:
        if fails:
            raise ValueError("bad \ud83d")
        return "seen \ud83d"

    turns = [call("look", fails=False), call("look", fails=True), "end"]
    row, _ = await roll_out(lambda: ToolLoop(look), lambda turn, prompt: turns[turn])
    record = RolloutRecord.from_extra(row.execution_metadata.extra)
    told = [m["content"] for m in record.episodes[0].messages if m["role"] == "tool"]
    assert told == ["seen \ufffd", "Error: look() raised ValueError: bad \ufffd"]


async def test_an_environment_that_cannot_be_made_costs_its_own_episode() -> None:
    made = 0

    def make() -> Environment:
        nonlocal made
        made += 1
        if made == 1:
            raise OSError("no world left")
        return Talk()

    row, _ = await roll_out(make, lambda turn, prompt: "end", n=3)
    record = RolloutRecord.from_extra(row.execution_metadata.extra)
    (failure,) = record.failures
    assert "make() raised OSError: no world left" in failure.message
    assert len(record) == 2

    class Unfinished(Talk, ABC):
        @abstractmethod
        def world(self) -> None: ...

    with pytest.raises(RolloutError, match=r"Unfinished\(\) raised TypeError: Can't instantiate"):
        await roll_out(Unfinished, lambda turn, prompt: "end")  # type: ignore[type-abstract]
    with pytest.raises(RolloutError, match="made a str without step"):
        await roll_out(lambda: "world", lambda turn, prompt: "end")  # type: ignore[arg-type,return-value]


@pytest.mark.parametrize("reward", [np.float32(0.5), np.int64(1), True])
async def test_rewards_are_kept_as_numbers(reward: Any) -> None:
    row, _ = await roll_out(
        once(lambda: Step(done=True, reward=reward)), lambda turn, prompt: "end"
    )
    again = EvaluationRow.model_validate_json(row.model_dump_json())
    record = RolloutRecord.from_extra(again.execution_metadata.extra)
    assert record.episodes is not None
    assert record.episodes[0].step_rewards == [float(reward)]


async def test_what_an_environment_does_to_messages_stays_with_it() -> None:
    class Rewrites(Talk):
        def step(self, messages: Any, assistant: Message) -> Step:
            for message in [*messages, assistant]:
                message.content = "REDACTED"
            messages.clear()
            told = Message(role="user", content="go on")
            self.told = [*getattr(self, "told", []), told]
            for one in self.told[:-1]:
                one.content = "REDACTED"
            return Step(messages=[told], done=len(self.told) == 3)

    row, sampler = await roll_out(Rewrites, lambda turn, prompt: f"answer {turn}", n=2)
    assert [m.content for m in row.messages] == [
        "What is 2+3?", "answer 0", "go on", "answer 1", "go on", "answer 2",
    ]  # fmt: skip
    assert not any("REDACTED" in TOKENIZER.decode(prompt) for prompt, _ in sampler.exchanges)
    record = RolloutRecord.from_extra(row.execution_metadata.extra)
    assert record.episodes is not None
    assert "REDACTED" not in json.dumps([episode.messages for episode in record.episodes])


async def test_an_episode_ends_where_the_models_context_does() -> None:
    class Small(Scripted):
        context_length = 120

    sampler = Small(lambda turn, prompt: "more")
    row = await roll_out_from(sampler, Talk, limits=EpisodeLimits(turns=50))
    record = RolloutRecord.from_extra(row.execution_metadata.extra)
    assert record.episodes is not None
    assert record.episodes[0].stop_reason == "tokens"
    assert record.episodes[0].turns > 1
    assert max(len(prompt) + len(answer) for prompt, answer in sampler.exchanges) <= 120


async def test_a_prompt_that_leaves_no_room_is_told_with_what_is_too_small() -> None:
    with pytest.raises(RolloutError, match=r"tokens, and the EpisodeLimits.tokens is 9"):
        await roll_out(Talk, lambda turn, prompt: "x", limits=EpisodeLimits(tokens=9))

    class Small(Scripted):
        context_length = 20

    with pytest.raises(RolloutError, match=r"and the model's context is 20"):
        await roll_out_from(Small(lambda turn, prompt: "x"), Talk)


async def test_an_episode_is_of_all_the_versions_that_sampled_its_turns() -> None:
    class Learning(Scripted):
        async def sample(self, *args: Any, **kwargs: Any) -> Completion:
            completion = await super().sample(*args, **kwargs)
            return replace(completion, policy_version=f"step-{len(self.exchanges)}")

    said = ["more", "more", "end"]
    row = await roll_out_from(Learning(lambda turn, prompt: said[turn]), Talk)
    sampling = RolloutRecord.from_extra(row.execution_metadata.extra).sampling
    assert sampling.policy_versions == ["step-3"]
    assert sampling.first_policy_versions == ["step-1"]


async def test_what_a_faulty_environment_says_of_itself_is_bounded() -> None:
    def raises() -> None:
        raise ValueError("x" * 10_000_000)

    row, _ = await roll_out(once(raises), lambda turn, prompt: "end", n=2)
    (failure,) = RolloutRecord.from_extra(row.execution_metadata.extra).failures
    assert "raised ValueError: xxx" in failure.message
    assert len(failure.message) < 3000

    giant = {"world": "x" * 2_000_000}
    row, _ = await roll_out(
        once(lambda: Step(done=True, metrics=giant)), lambda turn, prompt: "end", n=2
    )
    (failure,) = RolloutRecord.from_extra(row.execution_metadata.extra).failures
    assert "characters of JSON" in failure.message


async def test_a_giant_observation_ends_the_episode_and_is_not_cut() -> None:
    class Giant(Environment):
        def step(self, messages: Any, assistant: Message) -> Step:
            return Step(messages=[{"role": "user", "content": "x" * 100_000}])

    row, sampler = await roll_out(
        Giant, lambda turn, prompt: "more", limits=EpisodeLimits(tokens=1000)
    )
    record = RolloutRecord.from_extra(row.execution_metadata.extra)
    assert record.episodes is not None
    assert record.episodes[0].stop_reason == "tokens"
    assert len(sampler.exchanges) == 1


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        ("<tool_call>{not json</tool_call>", "not JSON"),
        (call("multiply", a=1), "there is no tool 'multiply'"),
        (call("add", a="many"), "wrong arguments: a"),
        (call("add"), "Field required"),
        (call("add", a=1, c=2), "c"),
        (call("broken"), "raised ZeroDivisionError"),
        (call("slow"), "took longer"),
        (call("endless"), "returned 150000 characters, more than the 100000"),
        (call("circular"), "is no JSON"),
    ],
)
async def test_a_bad_call_is_told_to_the_model(answer: str, told: str) -> None:
    def broken() -> float:
        return 1 / 0

    async def slow() -> None:
        await asyncio.sleep(PATIENCE)

    def endless() -> str:
        return "x" * 150_000

    def circular() -> list[Any]:
        world: list[Any] = []
        world.append(world)
        return world

    seconds = 0.1 if "slow" in answer else PATIENCE
    row, _ = await roll_out(
        lambda: ToolLoop(add, broken, slow, endless, circular, seconds=seconds),
        lambda turn, prompt: answer if turn == 0 else "sorry",
    )
    assert told in str(row.messages[2].content)
    assert row.messages[3].content == "sorry"


async def test_feedback_is_given_until_the_answer_is_right() -> None:
    def judge(row: EvaluationRow) -> EvaluateResult:
        right = row.messages[-1].content == "5"
        return EvaluateResult(score=float(right), reason="it is odd")

    row, _ = await roll_out(lambda: RetryWithFeedback(judge), lambda turn, prompt: str(3 + turn))
    assert [m.content for m in row.messages[1:]] == [
        "3", "That is not right: it is odd. Try again.",
        "4", "That is not right: it is odd. Try again.",
        "5",
    ]  # fmt: skip
    record = RolloutRecord.from_extra(row.execution_metadata.extra)
    assert record.episodes is not None
    assert record.episodes[0].step_rewards == [0.0, 0.0, 1.0]


async def test_a_row_that_is_rolled_out_again_begins_where_it_began() -> None:
    row, _ = await roll_out(Talk, lambda turn, prompt: "hm" if turn == 0 else "end")
    assert len(row.messages) == 4
    again, sampler = await roll_out(Talk, lambda turn, prompt: "end", row=row)
    assert [m.content for m in again.messages] == ["What is 2+3?", "end"]
    assert len(sampler.exchanges) == 1


async def test_episodes_of_a_row_answer_one_prompt() -> None:
    made = iter(range(10))

    class Differs(Talk):
        def reset(self, row: EvaluationRow) -> list[dict[str, str]]:
            return [{"role": "user", "content": f"world {next(made)}"}]

    with pytest.raises(RolloutError, match="said different things"):
        await roll_out(Differs, lambda turn, prompt: "end", n=2)


async def test_episodes_survive_a_rollout_file(tmp_path: Path) -> None:
    def script(turn: int, prompt: str) -> str:
        return call("add", a=1) if turn == 0 else "done"

    row, _ = await roll_out(lambda: ToolLoop(add), script, n=3)
    extra = row.execution_metadata.extra
    assert extra is not None
    extra["rewards"] = [0.0, 1.0, 0.5]
    rows, rollouts = tmp_path / "rows.jsonl", tmp_path / "rollouts.parquet"
    rows.write_text(row.model_dump_json() + "\n")
    convert(rows, rollouts)

    (back,) = RolloutDataset(rollouts).evaluation_rows()

    returned = RolloutRecord.from_extra(back.execution_metadata.extra)
    assert returned.trajectories == RolloutRecord.from_extra(extra).trajectories
    assert returned.episodes == RolloutRecord.from_extra(extra).episodes
    for ours, theirs in zip(build_batch([row]).datums, build_batch([back]).datums, strict=True):
        assert ours.target_tokens.tolist() == theirs.target_tokens.tolist()
        assert ours.weights.tolist() == theirs.weights.tolist()


async def test_the_calls_of_a_turn_share_their_time_and_the_rest_is_told_so() -> None:
    calls: list[float] = []

    async def slow() -> str:
        calls.append(1)
        await asyncio.sleep(PATIENCE)
        return "done"

    row, _ = await roll_out(
        lambda: ToolLoop(slow, seconds=1.0),
        lambda turn, prompt: call("slow") * 3 if turn == 0 else "end",
        limits=EpisodeLimits(step_seconds=PATIENCE),
    )
    told = [m.content for m in row.messages if m.role == "tool"]
    assert "took longer than" in told[0]
    assert told[1:] == ["Error: not called: the calls before it took 1 s"] * 2
    assert len(calls) == 1
