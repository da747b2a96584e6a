"""The in-process sampler against plain forwards of the same model, alone and in crowds."""

from __future__ import annotations

import asyncio
import math
import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

import transformers  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from eval_protocol_rft.local import _sampling_thread as local_worker  # noqa: E402
from eval_protocol_rft.local._draw import stop_hit  # noqa: E402
from eval_protocol_rft.local._sampler import (  # noqa: E402
    LocalSampler,
    load_local_sampler,
)
from eval_protocol_rft.local.models import bundled_model_path  # noqa: E402
from eval_protocol_rft.sampling._types import (  # noqa: E402
    RefusedError,
    Sampler,
    SamplingError,
    SamplingParams,
)

EXACT = 1e-5
NONSENSE = 3e-4
"""Where the model has nothing sensible to say its logits are large, and its own float32 forward is
some 5e-5 from a float64 one."""
PLAIN = SamplingParams(model="arithmetic", max_tokens=24)
ENDLESS = replace(PLAIN, extra={"ignore_eos": True})
HOT = 4.0
"""At this temperature hardly two completions are the same."""
SUMS = ("17+25=", "88+99=", "99+10=", "40+12=", "63+58=")
QUESTIONS = ("17+25=", "8+9=", "99+10=", "Say something about the number 1234567.", "3")
"""Of several lengths; to some of them the model has nothing sensible to say."""


@pytest.fixture(scope="module")
def model():
    torch.set_num_threads(1)
    return AutoModelForCausalLM.from_pretrained(
        bundled_model_path("arithmetic"), dtype=torch.float32
    )


@pytest.fixture(scope="module")
def sampler(model):
    return LocalSampler(model, load_local_sampler("arithmetic").tokenizer)


@pytest.fixture(scope="module")
def prompts(sampler):
    return [render(sampler, question) for question in QUESTIONS]


def render(sampler, question):
    return sampler.tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
    )


@torch.no_grad()
def forward_logprobs(model, prompt_ids, completion, params):
    """[T] sampling and [T] raw logprobs by one plain forward over the whole sequence: no batch, no
    cache, float64 after the model, limits from their definitions."""
    ids = torch.tensor([[*prompt_ids, *completion.token_ids]])
    logits_TV = model(ids, use_cache=False).logits[0, len(prompt_ids) - 1 : -1].double()
    sampling, raw = [], []
    for logits_V, token in zip(logits_TV, completion.token_ids, strict=True):
        probabilities = (logits_V / params.temperature).softmax(-1).tolist()
        ranked = sorted(range(len(probabilities)), key=lambda i: -probabilities[i])
        ranked = ranked[: params.top_k or None]
        top_mass = math.fsum(probabilities[i] for i in ranked)
        nucleus, mass = [], 0.0
        for i in ranked:
            if mass < params.top_p * top_mass or params.top_p == 1:
                nucleus.append(i)
                mass += probabilities[i]
        assert token in nucleus
        sampling.append(math.log(probabilities[token] / mass))
        raw.append(logits_V.log_softmax(-1)[token].item())
    return sampling, raw


class Watch:
    """Sees every forward of a model, as (rows, new columns), and can hold one back."""

    def __init__(self, module, hold_at):
        self.forwards = []
        self.reached = threading.Event()
        self.release = threading.Event()
        self._hold_at = hold_at
        self._hook = module.register_forward_pre_hook(self._see, with_kwargs=True)

    def _see(self, module, args, kwargs):
        self.forwards.append(tuple(kwargs["input_ids"].shape))
        if len(self.forwards) == self._hold_at:
            self.reached.set()
            assert self.release.wait(30)

    async def held(self):
        assert await asyncio.to_thread(self.reached.wait, 30)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.release.set()
        self._hook.remove()


def watch(model, hold_at=None):
    return Watch(model, hold_at)


async def submit(*coroutines):
    """Tasks that have run until they wait for their completion."""
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    await asyncio.sleep(0)
    return tasks


def ids(completions):
    return [completion.token_ids for completion in completions]


# Exactness


HOWS = [
    {},
    {"temperature": 0.7},
    {"temperature": 1.5},
    {"top_p": 0.9},
    {"top_k": 5},
    {"temperature": 0.7, "top_p": 0.9, "top_k": 5},
]


@pytest.mark.parametrize("how", HOWS, ids=str)
@pytest.mark.parametrize(
    ("questions", "base", "bar"), [(SUMS, PLAIN, EXACT), (QUESTIONS, ENDLESS, NONSENSE)]
)
async def test_logprobs_equal_a_plain_forward_for_any_mix_of_prompt_lengths(
    sampler, model, how, questions, base, bar
):
    params = replace(base, **how)
    prompts = [render(sampler, question) for question in questions]
    jobs = [(prompt, seed) for prompt in prompts for seed in range(3)]
    completions = await asyncio.gather(*(sampler.sample(p, params, seed=s) for p, s in jobs))
    for (prompt, _), completion in zip(jobs, completions, strict=True):
        sampling, raw = forward_logprobs(model, prompt, completion, params)
        assert completion.logprobs == pytest.approx(sampling, abs=bar)
        assert completion.raw_logprobs == pytest.approx(raw, abs=bar)


SMALL = {
    "vocab_size": 259,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": 258,
}
ARCHITECTURES = {
    "grouped queries": transformers.LlamaConfig(**SMALL),
    "normalised queries": transformers.Qwen3Config(**SMALL),
    "sliding window": transformers.MistralConfig(**SMALL, sliding_window=8),
    "sliding and full layers": transformers.Gemma2Config(**SMALL, sliding_window=8),
    "learned positions": transformers.GPT2Config(
        vocab_size=259, n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.2
    ),
    "experts": transformers.Qwen3MoeConfig(
        **SMALL, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32
    ),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
async def test_requests_that_join_midway_are_as_exact_as_those_they_join(sampler, name):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(ARCHITECTURES[name]).eval()
    own = LocalSampler(model, sampler.tokenizer)
    hows = [replace(ENDLESS, max_tokens=40 + 3 * i, **how) for i, how in enumerate(HOWS)]
    early, late = ([7] * 5, [9, 8, 7]), ([11, 12] * 20, [13], [7] * 5)
    with watch(model, hold_at=6) as seen:
        first = await submit(*(own.sample(p, how, seed=1) for p in early for how in hows))
        await seen.held()
        then = await submit(*(own.sample(p, how, seed=2) for p in late for how in hows))
        seen.release.set()
        completions = await asyncio.gather(*first, *then)
    together = (len(early) + len(late)) * len(hows)
    assert max(rows for rows, columns in seen.forwards if columns == 1) == together
    jobs = [(prompt, how) for prompt in (*early, *late) for how in hows]
    for (prompt, how), completion in zip(jobs, completions, strict=True):
        sampling, raw = forward_logprobs(model, prompt, completion, how)
        assert completion.logprobs == pytest.approx(sampling, abs=EXACT)
        assert completion.raw_logprobs == pytest.approx(raw, abs=EXACT)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (transformers.MambaConfig(vocab_size=259, hidden_size=32, num_hidden_layers=1), "Linear"),
        (transformers.BloomConfig(vocab_size=259, hidden_size=32, n_layer=1, n_head=4), "context"),
    ],
    ids=["recurrent", "no context length"],
)
def test_a_model_that_cannot_be_batched_exactly_is_refused(sampler, config, words):
    with pytest.raises(RefusedError, match=words):
        LocalSampler(AutoModelForCausalLM.from_config(config), sampler.tokenizer)


async def test_a_seed_draws_the_same_tokens_alone_and_in_a_crowd(sampler, prompts):
    params = replace(ENDLESS, temperature=HOT)
    alone = [await sampler.sample(prompt, params, seed=7) for prompt in prompts]
    crowd = await asyncio.gather(
        *(sampler.sample(p, params, seed=s) for s in range(20) for p in prompts)
    )
    assert ids(crowd[7 * len(prompts) : 8 * len(prompts)]) == ids(alone)
    assert len({tuple(c.token_ids) for c in crowd}) == len(crowd)


async def test_seeds_of_any_sign_and_size_work_and_without_one_each_draw_is_fresh(sampler, prompts):
    params = replace(ENDLESS, temperature=HOT)
    for seed in (0, -1, 2**31, 2**63, 2**64 - 1):
        first, second = await asyncio.gather(
            *(sampler.sample(prompts[0], params, seed=seed) for _ in range(2))
        )
        assert first.token_ids == second.token_ids
    fresh = await asyncio.gather(*(sampler.sample(prompts[0], params) for _ in range(8)))
    assert len({tuple(c.token_ids) for c in fresh}) == 8


async def test_tokens_come_as_often_as_their_logprobs_say(sampler, prompts):
    params = replace(PLAIN, max_tokens=1, temperature=2.0, top_k=20)
    completions = await asyncio.gather(
        *(sampler.sample(prompts[0], params, seed=seed) for seed in range(4000))
    )
    observed = Counter(c.token_ids[0] for c in completions)
    expected = {c.token_ids[0]: 4000 * math.exp(c.logprobs[0]) for c in completions}
    common = {token for token, count in expected.items() if count >= 5}
    rest = 4000 - sum(expected[token] for token in common)
    terms = [(observed[token] - expected[token]) ** 2 / expected[token] for token in common]
    terms.append((4000 - sum(observed[token] for token in common) - rest) ** 2 / max(rest, 1))
    assert len(common) > 3
    # Mean plus five standard deviations of the chi-square distribution.
    assert sum(terms) < len(common) + 5 * math.sqrt(2 * len(common))


async def test_greedy_equals_generate(sampler, model, prompts):
    params = replace(PLAIN, temperature=0.0, top_p=0.5, top_k=3)
    completions = await asyncio.gather(*(sampler.sample(prompt, params) for prompt in prompts))
    for prompt, completion in zip(prompts, completions, strict=True):
        expected = model.generate(
            torch.tensor([prompt]), max_new_tokens=params.max_tokens, do_sample=False
        )[0, len(prompt) :]
        assert completion.token_ids == expected.tolist()
        assert completion.logprobs == completion.raw_logprobs


# Where completions end


async def test_the_end_of_turn_token_is_kept_and_its_text_is_not(sampler, prompts):
    completion = await sampler.sample(prompts[0], PLAIN, seed=1)
    (end,) = sampler.eos_token_ids
    assert completion.token_ids[-1] == end == completion.stop_reason
    assert end not in completion.token_ids[:-1]
    assert completion.finish_reason == "stop"
    assert completion.text == sampler.tokenizer.decode(completion.token_ids[:-1])
    assert completion.text.isdigit()
    assert len(completion.logprobs) == len(completion.token_ids)


async def test_max_tokens_ends_a_completion_as_length(sampler, prompts):
    for limit in (1, 5):
        completion = await sampler.sample(prompts[0], replace(ENDLESS, max_tokens=limit), seed=3)
        assert len(completion.token_ids) == limit
        assert completion.finish_reason == "length"
        assert completion.truncated
        assert completion.stop_reason is None
        assert completion.text == sampler.tokenizer.decode(completion.token_ids)


async def test_an_end_of_turn_as_the_last_allowed_token_is_a_stop(sampler, prompts):
    whole = await sampler.sample(prompts[0], PLAIN, seed=1)
    limited = await sampler.sample(
        prompts[0], replace(PLAIN, max_tokens=len(whole.token_ids)), seed=1
    )
    assert limited.token_ids == whole.token_ids
    assert limited.finish_reason == "stop"


async def test_without_max_tokens_a_completion_may_fill_the_context(sampler, prompts):
    params = replace(ENDLESS, max_tokens=None)
    long = [*prompts[0]] * (sampler.context_length // len(prompts[0]) - 1)
    completion = await sampler.sample(long, params, seed=2)
    assert len(long) + len(completion.token_ids) == sampler.context_length
    assert completion.finish_reason == "length"


async def test_ignore_eos_goes_on_past_the_end_of_turn(sampler, prompts):
    completion = await sampler.sample(prompts[0], ENDLESS, seed=1)
    assert sampler.eos_token_ids & set(completion.token_ids[:-1])
    assert completion.finish_reason == "length"
    assert "<|im_end|>" in completion.text


async def test_a_stop_string_cuts_the_text_and_keeps_the_tokens(sampler, prompts):
    params = replace(ENDLESS, max_tokens=60, temperature=HOT)
    whole = await sampler.sample(prompts[3], params, seed=5)
    stop = whole.text[20:23]
    assert whole.text.find(stop) == 20
    stopped = await sampler.sample(prompts[3], replace(params, stop=("never", stop)), seed=5)
    until = next(
        i
        for i in range(1, len(whole.token_ids) + 1)
        if stop in sampler.tokenizer.decode(whole.token_ids[:i])
    )
    assert stopped.token_ids == whole.token_ids[:until]
    assert stopped.logprobs == pytest.approx(whole.logprobs[:until], abs=NONSENSE)
    assert stopped.text == whole.text[:20]
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", stop)


@given(
    pieces=st.lists(st.sampled_from(["a", "b", "ab", "ba", "bab", "aab", "c"]), max_size=30),
    stops=st.lists(st.text("abc", min_size=1, max_size=5), min_size=1, max_size=3),
)
def test_a_stop_string_is_found_at_the_token_that_completes_it(pieces, stops):
    def decode(tokens):
        return "".join(pieces[token] for token in tokens)

    hits = (
        (count, hit)
        for count in range(1, len(pieces) + 1)
        if (hit := stop_hit(range(count), stops, decode))
    )
    found = next(hits, None)
    first = next(
        (n for n in range(1, len(pieces) + 1) if any(s in decode(range(n)) for s in stops)), None
    )
    if first is None:
        assert found is None
        return
    count, (text, stop) = found
    assert count == first
    whole = decode(range(first))
    assert whole.startswith(text + stop)
    assert all(other not in whole[: len(text) + len(other) - 1] for other in stops)


@pytest.mark.parametrize("stop", ["é", "né!", "日本"])
def test_a_stop_string_of_several_bytes_a_character_is_found(sampler, stop):
    tokens = sampler.tokenizer.encode("x né! 日本語")

    def decode(part):
        return sampler.tokenizer.decode(list(part))

    text, found = next(
        hit for n in range(1, len(tokens) + 1) if (hit := stop_hit(tokens[:n], [stop], decode))
    )
    assert found == stop
    assert "x né! 日本語".startswith(text + stop)


# Running together


async def test_completions_of_one_prompt_that_wait_together_share_its_prefill(
    sampler, model, prompts
):
    with watch(model, hold_at=1) as seen:
        first = await submit(sampler.sample(prompts[1], PLAIN))
        await seen.held()
        rest = await submit(*(sampler.sample(prompts[0], PLAIN) for _ in range(8)))
        seen.release.set()
        await asyncio.gather(*first, *rest)
    prefills = [shape for shape in seen.forwards if shape[1] > 1]
    assert prefills == [(1, len(prompts[1])), (1, len(prompts[0]))]


async def test_finished_rows_leave_the_batch(sampler, model, prompts):
    limits = (2, 4, 4, 9)
    with watch(model, hold_at=1) as seen:
        first = await submit(sampler.sample(prompts[0], replace(ENDLESS, max_tokens=1)))
        await seen.held()
        rest = await submit(
            *(sampler.sample(prompts[0], replace(ENDLESS, max_tokens=n)) for n in limits)
        )
        seen.release.set()
        await asyncio.gather(*first, *rest)
    assert [rows for rows, columns in seen.forwards if columns == 1] == [4, 3, 3, 1, 1, 1, 1, 1]


async def test_max_batch_tokens_bounds_the_batch_and_the_rest_waits_in_order(model, sampler):
    prompt = render(sampler, "17+25=")
    params = replace(ENDLESS, max_tokens=5)
    narrow = LocalSampler(
        model, sampler.tokenizer, max_batch_tokens=3 * (len(prompt) + params.max_tokens)
    )
    finished = []

    async def one(index):
        await narrow.sample(prompt, params)
        finished.append(index)

    with watch(model) as seen:
        await asyncio.gather(*(one(index) for index in range(8)))
    steps = [rows for rows, columns in seen.forwards if columns == 1]
    assert max(steps) == 3
    assert sum(steps) == 8 * (params.max_tokens - 1)
    # Those of one batch end together; the batches come in order.
    assert [index // 3 for index in finished] == [0, 0, 0, 1, 1, 1, 2, 2]


async def test_a_request_larger_than_max_batch_tokens_runs_alone(model, sampler, prompts):
    tiny = LocalSampler(model, sampler.tokenizer, max_batch_tokens=1)
    completions = await asyncio.gather(*(tiny.sample(prompt, PLAIN, seed=4) for prompt in prompts))
    assert ids(completions) == ids([await sampler.sample(p, PLAIN, seed=4) for p in prompts])


# Callers that go away


async def test_a_cancelled_caller_leaves_the_batch_and_the_others_do_not_notice(
    sampler, model, prompts
):
    undisturbed = [await sampler.sample(prompts[1], ENDLESS, seed=seed) for seed in (1, 2)]
    with watch(model, hold_at=4) as seen:
        tasks = await submit(*(sampler.sample(prompts[1], ENDLESS, seed=s) for s in (1, 2, 3)))
        await seen.held()
        tasks[2].cancel()
        with pytest.raises(asyncio.CancelledError):
            await tasks[2]
        seen.release.set()
        completions = await asyncio.gather(*tasks[:2])
    assert ids(completions) == ids(undisturbed)
    rows = [rows for rows, columns in seen.forwards if columns == 1]
    assert max(rows) == 3
    assert rows[-10:] == [2] * 10


async def test_a_request_cancelled_while_it_waits_is_never_run(sampler, model, prompts):
    with watch(model, hold_at=1) as seen:
        first = await submit(sampler.sample(prompts[0], PLAIN))
        await seen.held()
        (waiting,) = await submit(sampler.sample(prompts[1], PLAIN))
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        seen.release.set()
        await asyncio.gather(*first)
    assert sum(columns > 1 for _, columns in seen.forwards) == 1


async def test_the_timeout_counts_from_the_request_and_says_how_far_it_came(
    sampler, model, prompts
):
    with watch(model, hold_at=3) as seen:
        told = r"within 0.3 s: [0-2] of at most 24 tokens"
        with pytest.raises(SamplingError, match=told) as late:
            await sampler.sample(prompts[0], replace(ENDLESS, timeout=0.3))
        assert late.value.kind == "timeout"
        seen.release.set()
        assert await sampler.sample(prompts[0], PLAIN)


def test_one_sampler_serves_one_event_loop_after_another(sampler, prompts):
    async def both():
        return await asyncio.gather(*(sampler.sample(p, PLAIN, seed=1) for p in prompts))

    assert ids(asyncio.run(both())) == ids(asyncio.run(both()))


def test_several_event_loops_share_a_sampler_at_once(sampler, prompts):
    def run(_):
        async def both():
            return await asyncio.gather(*(sampler.sample(p, PLAIN, seed=1) for p in prompts))

        return ids(asyncio.run(both()))

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(run, range(4)))
    assert results == [results[0]] * 4


async def test_an_event_loop_that_dies_takes_only_its_own_requests(sampler, model, prompts):
    def run_and_close():
        loop = asyncio.new_event_loop()
        task = loop.create_task(sampler.sample(prompts[0], ENDLESS))
        loop.run_until_complete(asyncio.sleep(0))
        assert seen.reached.wait(30)
        loop.close()
        return task

    with watch(model, hold_at=1) as seen:
        orphan = await asyncio.to_thread(run_and_close)
        (own,) = await submit(sampler.sample(prompts[1], ENDLESS, seed=1))
        seen.release.set()
        completion = await own
    assert len(completion.token_ids) == ENDLESS.max_tokens
    assert {rows for rows, _ in seen.forwards} == {1}, "the orphan was sampled on"
    assert not orphan.done()
    orphan.get_coro().close()


# When things go wrong


async def test_a_native_panic_fails_its_requests_and_leaves_the_sampler_working(
    sampler, model, prompts
):
    class Panic(BaseException):
        """As native code raises it: no Exception."""

    def panic(module, args):
        raise Panic("index out of bounds")

    hook = model.register_forward_pre_hook(panic)
    with pytest.raises(SamplingError, match="Panic: index out of bounds"):
        await sampler.sample(prompts[0], PLAIN)
    hook.remove()
    assert await sampler.sample(prompts[0], PLAIN)


async def test_a_model_error_fails_what_was_running_and_nothing_later(sampler, model, prompts):
    def fail(module, args):
        raise RuntimeError("no memory left")

    hook = model.register_forward_pre_hook(fail)
    outcomes = await asyncio.gather(
        *(sampler.sample(prompt, PLAIN, seed=1) for prompt in prompts), return_exceptions=True
    )
    hook.remove()
    assert [type(outcome) for outcome in outcomes] == [SamplingError] * len(prompts)
    assert {outcome.kind for outcome in outcomes} == {"internal"}
    assert "RuntimeError: no memory left" in str(outcomes[0])
    assert len({id(outcome) for outcome in outcomes}) == len(outcomes)
    assert (await sampler.sample(prompts[0], PLAIN, seed=1)).text.isdigit()


async def test_a_failing_step_spares_those_that_join_in_the_same_round(sampler, model, prompts):
    def fail_on_steps(module, args, kwargs):
        if kwargs["input_ids"].shape[1] == 1 and not joined.done():
            raise RuntimeError("lost")

    joined = asyncio.get_running_loop().create_future()
    with watch(model, hold_at=1) as seen:
        (running,) = await submit(sampler.sample(prompts[0], ENDLESS))
        await seen.held()
        hook = model.register_forward_pre_hook(fail_on_steps, with_kwargs=True)
        (joining,) = await submit(sampler.sample(prompts[1], replace(PLAIN, max_tokens=1)))
        seen.release.set()
        with pytest.raises(SamplingError, match="lost"):
            await running
        assert len((await joining).token_ids) == 1
        hook.remove()


async def test_logits_that_are_not_finite_fail_their_own_request(sampler, model, prompts):
    def spoil(module, args, output):
        output.logits[0] = math.nan

    clean = await sampler.sample(prompts[1], PLAIN, seed=1)
    with watch(model, hold_at=1) as seen:
        first = await submit(sampler.sample(prompts[0], replace(PLAIN, max_tokens=1)))
        await seen.held()
        tasks = await submit(*(sampler.sample(prompt, PLAIN, seed=1) for prompt in prompts[:2]))
        hook = model.register_forward_hook(spoil)
        seen.release.set()
        await asyncio.gather(*first, return_exceptions=True)
        with pytest.raises(SamplingError, match=r"completion token 0.*not finite"):
            await tasks[0]
        hook.remove()
        # Row 0 of later steps may be the other request: only its first token is safe from `spoil`.
        outcome = (await asyncio.gather(tasks[1], return_exceptions=True))[0]
    if isinstance(outcome, SamplingError):
        assert "completion token 0" not in str(outcome)
    else:
        assert outcome.token_ids == clean.token_ids


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"max_tokens": 2040}, "25 prompt tokens and max_tokens=2040 .* tokens: 2023 are left"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"top_k": -2}, "top_k is -2"),
        ({"stop": ("",)}, "stop has an empty string"),
        ({"extra": {"min_p": 0.1, "logit_bias": {}}}, "does not implement logit_bias, min_p"),
        ({"extra": {"ignore_eos": "yes"}}, "ignore_eos is 'yes'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
async def test_what_cannot_be_honoured_is_refused_by_name(sampler, prompts, change, words):
    with pytest.raises(RefusedError, match=words):
        await sampler.sample(prompts[0], replace(PLAIN, **change))


@pytest.mark.parametrize(
    ("prompt_ids", "words"),
    [
        ([], "no tokens"),
        ([1, 259], r"prompt_ids\[1\] is 259, outside the vocabulary of 259"),
        ([-1], r"prompt_ids\[0\] is -1"),
        ([1] * 2048, "2048 prompt tokens .* 0 are left"),
    ],
    ids=["empty", "too large", "negative", "too long"],
)
async def test_a_prompt_that_the_model_cannot_read_is_refused(sampler, prompt_ids, words):
    with pytest.raises(RefusedError, match=words):
        await sampler.sample(prompt_ids, replace(PLAIN, max_tokens=None))


async def test_fields_that_change_nothing_are_accepted(sampler, prompts):
    extra = {"user": "u", "logprobs": True, "return_token_ids": True, "raw_output": True}
    plain, decorated = [
        await sampler.sample(prompts[0], params, seed=1)
        for params in (PLAIN, replace(PLAIN, extra=extra))
    ]
    assert plain.token_ids == decorated.token_ids


# The sampler's life


def threads():
    return {t for t in threading.enumerate() if t.name == "local-sampler"}


async def test_closing_answers_what_is_pending_ends_the_thread_and_can_be_repeated(
    model, sampler, prompts
):
    own = LocalSampler(model, sampler.tokenizer)
    before = threads()
    with watch(model, hold_at=2) as seen:
        tasks = await submit(
            *(own.sample(prompt, replace(ENDLESS, max_tokens=190)) for prompt in prompts)
        )
        await seen.held()
        closing = asyncio.create_task(own.aclose())
        await asyncio.sleep(0.05)
        seen.release.set()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        await closing
    assert {str(outcome) for outcome in outcomes} == {"the local sampler was closed"}
    assert threads() <= before
    await own.aclose()
    assert await own.sample(prompts[0], PLAIN, seed=1)
    await own.aclose()


async def test_an_idle_thread_ends_by_itself(model, sampler, prompts, monkeypatch):
    monkeypatch.setattr(local_worker, "IDLE_SECONDS", 0.05)
    own = LocalSampler(model, sampler.tokenizer)
    before = threads()
    await own.sample(prompts[0], PLAIN)
    (thread,) = threads() - before
    await asyncio.to_thread(thread.join, 10)
    assert not thread.is_alive()
    assert await own.sample(prompts[0], PLAIN)


async def test_a_completion_says_which_weights_drew_it(model, sampler, prompts):
    own = LocalSampler(model, sampler.tokenizer, policy_version="step-7")
    completion = await own.sample(prompts[0], PLAIN)
    assert own.policy_version == completion.policy_version == "step-7"
    assert isinstance(own, Sampler)


def test_one_sampler_per_process_and_name():
    with ThreadPoolExecutor(4) as pool:
        loaded = list(pool.map(load_local_sampler, ["arithmetic"] * 4))
    assert all(one is loaded[0] for one in loaded)
    folder = str(bundled_model_path("arithmetic"))
    assert load_local_sampler(folder) is load_local_sampler(folder)


def test_a_model_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(RefusedError, match="cannot load the local model"):
        load_local_sampler(str(tmp_path))


def run_python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_torch_is_imported_only_to_make_a_sampler():
    done = run_python(
        "import sys, eval_protocol_rft.local._sampler\n"
        "assert not {'torch', 'transformers'} & sys.modules.keys()"
    )
    assert done.returncode == 0, done.stderr


def test_without_torch_the_error_names_what_to_install():
    done = run_python(
        "import sys\n"
        "sys.modules['torch'] = None\n"
        "from eval_protocol_rft.local._sampler import load_local_sampler\n"
        "load_local_sampler('arithmetic')"
    )
    assert "RefusedError" in done.stderr
    assert "pip install 'eval-protocol-rft[local]'" in done.stderr


def test_an_interpreter_that_exits_while_sampling_exits_cleanly():
    done = run_python(
        "import asyncio\n"
        "from eval_protocol_rft.local._sampler import load_local_sampler\n"
        "from eval_protocol_rft.sampling._types import SamplingParams\n"
        "sampler = load_local_sampler('arithmetic')\n"
        "params = SamplingParams(model='', extra={'ignore_eos': True})\n"
        "loop = asyncio.new_event_loop()\n"
        "tasks = [loop.create_task(sampler.sample([1] * 9, params)) for _ in range(100)]\n"
        "loop.run_until_complete(asyncio.sleep(0.1))\n"
    )
    assert done.returncode == 0, done.stderr
