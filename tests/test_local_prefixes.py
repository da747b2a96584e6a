"""Turns of an episode go on from what the turns before computed, and nobody can tell but the clock.

Every logprob is compared with a plain forward over the whole sequence: no batch, no cache.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

import transformers  # noqa: E402
from transformers import AutoModelForCausalLM, PreTrainedModel  # noqa: E402

from eval_protocol_rft.local import _sampling_thread as local_worker  # noqa: E402
from eval_protocol_rft.local._cache import (  # noqa: E402
    KEPT_SHARE,
    Batch,
)
from eval_protocol_rft.local._sampler import (  # noqa: E402
    LocalSampler,
    load_local_sampler,
)
from eval_protocol_rft.sampling._types import (  # noqa: E402
    Completion,
    SamplingParams,
)
from tests.test_local_sampler import ARCHITECTURES, EXACT, SMALL  # noqa: E402

ANSWER = 6
PARAMS = SamplingParams(model="", max_tokens=ANSWER, extra={"ignore_eos": True})
GREEDY = replace(PARAMS, temperature=0.0)
FEEDBACKS = ((9, 8, 7), (5,), tuple(range(20, 60)), (3, 3), tuple(range(100, 109)))
"""What the environments of five episodes say after each answer, of several lengths."""


def new_model(config: transformers.PretrainedConfig | None = None) -> PreTrainedModel:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = config or transformers.LlamaConfig(**{**SMALL, "max_position_embeddings": 512})
    return AutoModelForCausalLM.from_config(config).eval()


def new_sampler(model: PreTrainedModel, **options: int) -> LocalSampler:
    return LocalSampler(model, load_local_sampler("arithmetic").tokenizer, **options)


@pytest.fixture
def model() -> PreTrainedModel:
    return new_model()


@pytest.fixture
def sampler(model) -> LocalSampler:
    return new_sampler(model)


@torch.no_grad()
def plain_logprobs(model, prompt: Sequence[int], completion: Completion) -> list[float]:
    ids = torch.tensor([[*prompt, *completion.token_ids]])
    logits_TV = model(ids, use_cache=False).logits[0, len(prompt) - 1 : -1].double()
    drawn_T1 = torch.tensor(completion.token_ids).unsqueeze(1)
    return logits_TV.log_softmax(-1).gather(1, drawn_T1).squeeze(1).tolist()


def assert_exact(model, prompt: Sequence[int], completion: Completion) -> None:
    expected = plain_logprobs(model, prompt, completion)
    assert completion.logprobs == pytest.approx(expected, abs=EXACT)


@contextmanager
def prefills(model) -> Iterator[list[tuple[int, int]]]:
    """The shapes, (rows, new columns), of the sampler's forwards that are no steps."""
    shapes: list[tuple[int, int]] = []

    def see(module, args, kwargs):
        # The plain forwards of these tests have no cache.
        if kwargs["use_cache"] and kwargs["input_ids"].shape[1] > 1:
            shapes.append(tuple(kwargs["input_ids"].shape))

    hook = model.register_forward_pre_hook(see, with_kwargs=True)
    try:
        yield shapes
    finally:
        hook.remove()


def named(session: str | None, params: SamplingParams = PARAMS) -> SamplingParams:
    return replace(params, session=session)


async def episode(
    sampler: LocalSampler, params: SamplingParams, feedback: Sequence[int], turns: int = 5
) -> list[tuple[list[int], Completion]]:
    """Each turn's prompt and completion."""
    prompt = [1, 2, *feedback]
    taken = []
    for turn in range(turns):
        completion = await sampler.sample(prompt, params, seed=turn)
        taken.append((prompt, completion))
        prompt = [*prompt, *completion.token_ids, *feedback, 10 + turn]
    return taken


async def episodes(sampler: LocalSampler, params: SamplingParams, sessions: bool):
    return await asyncio.gather(
        *(
            episode(sampler, named(f"episode {i}" if sessions else None, params), feedback)
            for i, feedback in enumerate(FEEDBACKS)
        )
    )


# Exactness


@pytest.mark.parametrize("name", ARCHITECTURES)
async def test_logprobs_of_every_turn_of_concurrent_episodes_equal_a_plain_forward(name):
    config = type(ARCHITECTURES[name]).from_dict(ARCHITECTURES[name].to_dict())
    config.max_position_embeddings = 512
    model = new_model(config)
    with prefills(model) as shapes:
        for taken in await episodes(new_sampler(model), PARAMS, sessions=True):
            for prompt, completion in taken:
                assert_exact(model, prompt, completion)
    assert sum(rows * columns for rows, columns in shapes) < 1200, "nothing was kept"


async def test_greedy_answers_are_the_same_with_and_without_sessions(model, sampler):
    apart = await episodes(new_sampler(model), GREEDY, sessions=False)
    kept = await episodes(sampler, GREEDY, sessions=True)
    for ours, theirs in zip(kept, apart, strict=True):
        assert [c.token_ids for _, c in ours] == [c.token_ids for _, c in theirs]


async def test_only_what_follows_the_turn_before_is_run(model, sampler):
    with prefills(model) as shapes:
        await episode(sampler, named("one"), (3, 4, 5))
    # Feedback, its number, and the last answer's last token, which was drawn and never run.
    assert shapes == [(1, 5)] + [(1, 3 + 1 + 1)] * 4


async def test_without_a_session_every_turn_is_run_as_a_whole(model, sampler):
    with prefills(model) as shapes:
        await episode(sampler, PARAMS, (3, 4, 5), turns=3)
    assert shapes == [(1, 5), (1, 15), (1, 25)]


async def test_turns_that_join_together_are_run_together_whatever_their_lengths(model, sampler):
    histories = [list(range(5 + 20 * i)) for i in range(4)]
    news = [(1,), (1, 2, 3), tuple(range(30)), (7, 7)]
    with sampler.held():
        starts = [
            asyncio.create_task(sampler.sample([1, *h], named(str(i)), seed=i))
            for i, h in enumerate(histories)
        ]
        await asyncio.sleep(0)
    answers = [await start for start in starts]
    prompts = [
        [1, *h, *answer.token_ids, *new]
        for h, answer, new in zip(histories, answers, news, strict=True)
    ]
    with prefills(model) as shapes:
        with sampler.held():
            turns = [
                asyncio.create_task(sampler.sample(prompt, named(str(i)), seed=i))
                for i, prompt in enumerate(prompts)
            ]
            fresh = asyncio.create_task(sampler.sample(list(range(50)), named("new"), seed=9))
            await asyncio.sleep(0)
        completions = [await turn for turn in turns]
        assert_exact(model, list(range(50)), await fresh)
    assert sorted(shapes) == [(1, 50), (4, 31)]
    for prompt, completion in zip(prompts, completions, strict=True):
        assert_exact(model, prompt, completion)


async def test_a_prompt_that_departs_from_what_was_kept_is_right(model, sampler):
    prompt = list(range(40))
    first = await sampler.sample(prompt, named("s"), seed=1)
    late = [*prompt, *first.token_ids[:2], 250, *range(30)]
    early = [*prompt[:10], 251, *range(90)]
    other = [252, *range(150)]
    shorter = [*prompt[:10], 250]
    with prefills(model) as shapes:
        for changed in (late, early, other, shorter):
            assert_exact(model, changed, await sampler.sample(changed, named("s"), seed=2))
    assert [columns for _, columns in shapes] == [31, 91, 151, 11]


async def test_two_turns_of_a_session_at_once_are_both_right(model, sampler):
    first = await sampler.sample([1, 2, 3], named("s"), seed=0)
    prompts = [[1, 2, 3, *first.token_ids, *new] for new in ((4,), (4,), (5, 6, 7))]
    completions = await asyncio.gather(
        *(sampler.sample(prompt, named("s"), seed=i) for i, prompt in enumerate(prompts))
    )
    for prompt, completion in zip(prompts, completions, strict=True):
        assert_exact(model, prompt, completion)


async def test_an_episode_that_is_run_again_is_the_same_to_the_last_bit(sampler):
    once, again = [await episode(sampler, named("s"), (3, 4, 5)) for _ in range(2)]
    assert [c.logprobs for _, c in once] == [c.logprobs for _, c in again]


histories = st.lists(
    st.lists(
        st.tuples(
            st.integers(0, 3),
            st.lists(st.integers(0, 257), min_size=1, max_size=12),
            st.booleans(),
        ),
        min_size=1,
        max_size=5,
    ),
    min_size=1,
    max_size=6,
)


@given(rounds=histories, room=st.sampled_from([40, 120, 10_000]))
@settings(max_examples=20, deadline=None)
def test_any_history_of_sessions_that_grow_and_depart_is_exact(rounds, room):
    """Rounds of concurrent turns, several of one session among them, in any room."""

    async def play() -> None:
        own = new_sampler(model, max_batch_tokens=room)
        said: dict[int, list[int]] = {i: [1] for i in range(4)}
        for turns in rounds:
            prompts = []
            for session, new, departs in turns:
                history = said[session]
                start = history[: len(history) // 2] if departs else history
                prompts.append([*start, *new])
            completions = await asyncio.gather(
                *(
                    own.sample(prompt, named(str(turn[0])), seed=i)
                    for i, (turn, prompt) in enumerate(zip(turns, prompts, strict=True))
                )
            )
            for (session, _, _), prompt, completion in zip(
                turns, prompts, completions, strict=True
            ):
                assert_exact(model, prompt, completion)
                said[session] = [*prompt, *completion.token_ids]
            assert own._worker._prefixes.tokens <= room * KEPT_SHARE
        await own.aclose()

    model = new_model()
    asyncio.run(play())


# New weights


def other_weights(model) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {
        name: value + 0.1 * torch.randn_like(value) for name, value in model.state_dict().items()
    }


async def test_after_new_weights_nothing_is_reused(model, sampler):
    prompt = [1, 2, 3]
    first = await sampler.sample(prompt, named("s"), seed=0)
    await sampler.load_weights(other_weights(model), policy_version=None)
    longer = [*prompt, *first.token_ids, 4]
    with prefills(model) as shapes:
        assert_exact(model, longer, await sampler.sample(longer, named("s"), seed=1))
    assert shapes == [(1, len(longer))]


@pytest.mark.parametrize("version", [None, "new"])
async def test_a_turn_that_ran_across_new_weights_leaves_nothing_behind(model, sampler, version):
    prompt = [1, 2, 3]
    long = named("s", replace(PARAMS, max_tokens=300))
    running = asyncio.create_task(sampler.sample(prompt, long, seed=0))
    steps = []
    hook = model.register_forward_pre_hook(lambda *_: steps.append(1))
    while len(steps) < 3:  # noqa: ASYNC110
        await asyncio.sleep(0.001)
    await sampler.load_weights(other_weights(model), policy_version=version)
    assert not running.done()
    answer = await running
    hook.remove()
    longer = [*prompt, *answer.token_ids, 4]
    with prefills(model) as shapes:
        assert_exact(model, longer, await sampler.sample(longer, named("s"), seed=1))
    assert shapes == [(1, len(longer))]


# How much is kept, and how long


async def test_what_is_kept_has_a_bound_and_the_session_that_ended_longest_ago_goes(model):
    kept = 10 + ANSWER - 1
    sampler = new_sampler(model, max_batch_tokens=int(3.5 * kept / KEPT_SHARE))
    short = replace(PARAMS, max_tokens=1)
    prompts: dict[str, list[int]] = {}

    async def columns_run(name: str, prompt: list[int], params: SamplingParams) -> int:
        with prefills(model) as shapes:
            completion = await sampler.sample(prompt, named(name, params), seed=0)
        assert_exact(model, prompt, completion)
        prompts[name] = [*prompt, *completion.token_ids, 4]
        [(_, columns)] = shapes
        return columns

    for i, name in enumerate("abc"):
        assert await columns_run(name, [i, *range(9)], PARAMS) == 10
    assert sampler._worker._prefixes.tokens == 3 * kept
    assert await columns_run("a", prompts["a"], short) == 2
    # There is room for three and a half. Of b, c, a and d, the turn of b ended longest ago.
    assert await columns_run("d", [9, *range(9)], PARAMS) == 10
    assert sampler._worker._prefixes.tokens == 3 * kept + 2
    assert await columns_run("a", prompts["a"], short) == 2
    assert await columns_run("c", prompts["c"], short) == 2
    assert await columns_run("b", prompts["b"], short) == 10 + ANSWER + 1


async def test_a_turn_larger_than_the_bound_is_not_kept_and_evicts_nobody(model):
    sampler = new_sampler(model, max_batch_tokens=100)
    await sampler.sample([1, 2, 3], named("small"), seed=0)
    before = sampler._worker._prefixes.tokens
    await sampler.sample(list(range(60)), named("large"), seed=0)
    assert sampler._worker._prefixes.tokens == before == 3 + ANSWER - 1


async def test_where_keeping_fails_nobody_else_does(model, sampler, monkeypatch):
    def fails(self, row, length):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(Batch, "columns", fails)
        for prompt, completion in await episode(sampler, named("s"), (3, 4)):
            assert_exact(model, prompt, completion)
    assert sampler._worker._prefixes.tokens == 0


async def test_what_is_kept_outlives_an_idle_thread(model, sampler, monkeypatch):
    monkeypatch.setattr(local_worker, "IDLE_SECONDS", 0.02)
    first = await sampler.sample([1, 2, 3], named("s"), seed=0)
    thread = sampler._worker._thread
    if thread is not None:
        await asyncio.to_thread(thread.join, 10)
    assert sampler._worker._thread is None
    longer = [1, 2, 3, *first.token_ids, 4]
    with prefills(model) as shapes:
        assert_exact(model, longer, await sampler.sample(longer, named("s"), seed=1))
    assert shapes == [(1, 2)]


@pytest.mark.parametrize("idle", [0.02, 5.0], ids=["after its thread", "with its thread"])
async def test_closing_frees_what_is_kept(sampler, monkeypatch, idle):
    monkeypatch.setattr(local_worker, "IDLE_SECONDS", idle)
    await sampler.sample([1, 2, 3], named("s"), seed=0)
    assert sampler._worker._prefixes.tokens
    await asyncio.sleep(0.1)
    await sampler.aclose()
    assert not sampler._worker._prefixes.tokens


async def test_what_is_kept_is_the_turn_alone_and_not_the_batch_it_ran_in(sampler):
    """A view into the batch's buffers would keep all of them alive."""
    await asyncio.gather(
        *(sampler.sample([7] * length, named(str(length)), seed=0) for length in (3, 30, 90))
    )
    for name, (_, columns) in sampler._worker._prefixes._kept.items():
        for tensor in (tensor for layer in columns for tensor in layer):
            assert tensor.shape[-2] == int(name) + ANSWER - 1
            assert tensor.untyped_storage().nbytes() == tensor.nbytes
