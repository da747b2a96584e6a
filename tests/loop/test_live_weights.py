"""New weights reach the sampler: in place, between tokens, all or none."""

from __future__ import annotations

import asyncio
import itertools
import threading

import numpy as np
import pytest
import torch

from eval_protocol_rft.loop._local_trainer import LocalTrainer
from eval_protocol_rft.loop._trainer import NamedLoss, SamplerWeights
from eval_protocol_rft.sampling._types import Completion, RefusedError, SamplingParams
from tests.loop.policies import arithmetic_sampler

HANGS = 300.0
"""Seconds after which what a test waits for never comes."""
PARAMS = SamplingParams(model="local/arithmetic", max_tokens=8)
LONG = SamplingParams(
    model="local/arithmetic", max_tokens=200, temperature=5.0, extra={"ignore_eos": True}
)


def prompt(sampler, text: str = "17+25=") -> list[int]:
    return sampler.tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
    )


def noisy(sampler, scale: float = 0.05) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {
        name: value + scale * torch.randn_like(value)
        for name, value in sampler.model.state_dict().items()
    }


async def test_completions_carry_the_version_that_sampled_them() -> None:
    sampler = arithmetic_sampler(policy_version="step-0")
    before = await sampler.sample(prompt(sampler), PARAMS, seed=1)
    await sampler.load_weights(noisy(sampler), policy_version="step-1")
    after = await sampler.sample(prompt(sampler), PARAMS, seed=1)
    assert (before.policy_version, after.policy_version) == ("step-0", "step-1")
    assert before.logprobs != after.logprobs
    assert before.first_policy_version is None
    assert after.first_policy_version is None
    assert sampler.policy_version == "step-1"


async def test_a_completion_that_spans_two_versions_says_so() -> None:
    sampler = arithmetic_sampler(policy_version="old")
    drawn, queued = threading.Event(), threading.Event()
    forwards = itertools.count()

    def wait_at_the_fifth(*_: object) -> None:
        if next(forwards) == 5:
            drawn.set()
            queued.wait(HANGS)

    hook = sampler.model.register_forward_hook(wait_at_the_fifth)
    weights = noisy(sampler)
    running = asyncio.create_task(sampler.sample(prompt(sampler), LONG, seed=3))
    assert await asyncio.to_thread(drawn.wait, HANGS)
    loading = asyncio.create_task(sampler.load_weights(weights, policy_version="new"))
    await asyncio.sleep(0)  # it is queued: the thread is in the middle of a step
    queued.set()
    await loading
    hook.remove()
    spanning = await running
    assert isinstance(spanning, Completion)
    assert (spanning.first_policy_version, spanning.policy_version) == ("old", "new")
    undisturbed = await arithmetic_sampler().sample(prompt(sampler), LONG, seed=3)
    same = [
        a == pytest.approx(b, abs=1e-4)
        for a, b in zip(spanning.logprobs, undisturbed.logprobs, strict=True)
    ]
    swapped = same.index(False)
    assert all(same[:swapped])
    assert 0 < swapped < 200


async def test_weights_of_another_model_change_nothing() -> None:
    sampler = arithmetic_sampler(policy_version="a")
    good = {name: value.clone() for name, value in sampler.model.state_dict().items()}
    wrong = noisy(sampler)
    name = "model.layers.0.mlp.up_proj.weight"
    for broken, said in (
        ({**wrong, "extra": torch.zeros(1)}, "unknown extra"),
        ({k: v for k, v in wrong.items() if k != name}, f"lack {name}"),
        ({**wrong, name: torch.zeros(2, 2)}, f"misshape {name}"),
    ):
        with pytest.raises(RefusedError, match=said):
            await sampler.load_weights(broken, policy_version="b")
        assert sampler.policy_version == "a"
        for key, value in sampler.model.state_dict().items():
            assert torch.equal(value, good[key])


async def test_tied_weights_may_be_named_once() -> None:
    sampler = arithmetic_sampler()
    new = noisy(sampler)
    del new["lm_head.weight"]
    await sampler.load_weights(new, policy_version="b")
    assert torch.equal(sampler.model.lm_head.weight, new["model.embed_tokens.weight"])


async def test_a_held_sampler_begins_as_one_batch_whatever_the_order() -> None:
    texts = [f"{a}+{b}=" for a, b in zip(range(10, 40), range(60, 90), strict=True)]

    async def sampled(order: list[int]) -> dict[int, Completion]:
        sampler = arithmetic_sampler()
        with sampler.held():
            tasks = {
                i: asyncio.create_task(sampler.sample(prompt(sampler, texts[i]), PARAMS, seed=i))
                for i in order
            }
            while sampler.pending < len(texts):  # noqa: ASYNC110
                await asyncio.sleep(0)
            await asyncio.sleep(0.01)
            assert not any(task.done() for task in tasks.values())
        found = {i: await task for i, task in tasks.items()}
        await sampler.aclose()
        return found

    forward = await sampled(list(range(len(texts))))
    backward = await sampled(list(reversed(range(len(texts)))))
    for i in range(len(texts)):
        assert forward[i].token_ids == backward[i].token_ids
        assert forward[i].logprobs == backward[i].logprobs  # to the last bit


async def test_what_the_trainer_publishes_is_what_is_sampled() -> None:
    """After a step, the sampler's logprobs are those of the trainer's new weights."""
    from eval_protocol_rft.training._datums import TrainingDatum

    sampler = arithmetic_sampler()
    trainer = LocalTrainer(sampler.model, sink=SamplerWeights(sampler))
    ids = prompt(sampler)

    def datum(completion: Completion) -> TrainingDatum:
        tokens = np.array([*ids, *completion.token_ids])
        sampled = np.arange(len(tokens) - 1) >= len(ids) - 1
        logprobs = np.zeros(len(tokens) - 1, np.float32)
        logprobs[sampled] = completion.logprobs
        return TrainingDatum(
            input_tokens=tokens[:-1],
            target_tokens=tokens[1:],
            logprobs=logprobs,
            advantages=sampled.astype(np.float32),
            weights=sampled.astype(np.float32),
            prompt_length=len(ids),
            reward=1.0,
            truncated=completion.truncated,
            group=0,
            row_id="0",
            completion=0,
        )

    for version in range(1, 4):
        batch = [datum(await sampler.sample(ids, PARAMS, seed=seed)) for seed in range(4)]
        told = await trainer.forward_backward(batch, NamedLoss(loss_fn="importance_sampling"))
        for one, own in zip(batch, told.logprobs, strict=True):
            np.testing.assert_allclose(one.logprobs, own, atol=1e-5)
        await trainer.optim_step(learning_rate=1e-3)
        await trainer.publish(version)
        assert sampler.policy_version == f"step-{version}"
    await trainer.aclose()
