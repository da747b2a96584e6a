"""The whole way on the bundled model: sample, score, build datums, forward in torch, one step."""

from __future__ import annotations

import asyncio
import copy
import functools

import pytest
import torch
from eval_protocol.models import EvaluateResult, EvaluationRow, InputMetadata, Message
from eval_protocol.pytest.types import RolloutProcessorConfig
from transformers import AutoModelForCausalLM

from eval_protocol_rft import FireworksTrainingRolloutProcessor, score_rows
from eval_protocol_rft.local.models import bundled_model_path
from eval_protocol_rft.training._batch import TrainingBatch, build_batch
from eval_protocol_rft.training.losses._forward import token_logprobs
from eval_protocol_rft.training.losses._objective import Objective, make_loss
from tests.training.test_losses_reference import REFERENCES

torch.set_num_threads(1)
SUMS = [(a, b) for a in (12, 27, 38, 45) for b in (14, 23, 35, 41)]
ON_POLICY = ("ppo", "cispo", "dapo", "gspo", "importance_sampling", "reinforce", "dro")
"""Losses that agree while the policy is the one that sampled."""


def right_or_wrong(row: EvaluationRow) -> EvaluationRow:
    answer = str(row.messages[-1].content).strip()
    row.evaluation_result = EvaluateResult(score=float(answer == row.ground_truth))
    return row


async def sampled_rows(temperature: float) -> list[EvaluationRow]:
    rows = [
        EvaluationRow(
            messages=[Message(role="user", content=f"{a}+{b}=")],
            input_metadata=InputMetadata(row_id=f"{a}+{b}"),
            ground_truth=str(a + b),
        )
        for a, b in SUMS
    ]
    params = {"model": "local/arithmetic", "n": 8, "temperature": temperature, "max_tokens": 8}
    config = RolloutProcessorConfig(
        completion_params={**params, "seed": 7},
        mcp_config_path="",
        semaphore=asyncio.Semaphore(256),
        server_script_path=None,
    )
    processor = FireworksTrainingRolloutProcessor()
    try:
        return list(await asyncio.gather(*processor(rows, config)))
    finally:
        await processor.acleanup()


@functools.cache
def sampled(temperature: float) -> TrainingBatch:
    rows = score_rows(asyncio.run(sampled_rows(temperature)), right_or_wrong)
    return build_batch(rows, algorithm="grpo")


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    """The weights that sample, loaded once more as a training run would load them."""
    loaded = AutoModelForCausalLM.from_pretrained(bundled_model_path("arithmetic"))
    return loaded.float().eval()


def objective(name: str) -> Objective:
    return make_loss(name, REFERENCES[name][0])


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_every_ratio_is_one_while_the_policy_is_the_one_that_sampled(
    model: torch.nn.Module, temperature: float
) -> None:
    datums = sampled(temperature).datums
    with torch.no_grad():
        logprobs, entropies = token_logprobs(model, datums, temperature=temperature, entropies=True)
    count = 0
    for datum, lp in zip(datums, logprobs, strict=True):
        log_ratio = lp.double().numpy() - datum.logprobs
        assert abs(log_ratio).max() < 1e-5
        count += int(datum.mask.sum())
    assert count > 200

    _, metrics = objective("ppo")(datums, logprobs, entropies=entropies)
    assert metrics["tokens:sum"] == count
    assert metrics["ratio:max"] == pytest.approx(1.0, abs=1e-5)
    assert abs(metrics["sampler_kl_k1:mean"]) < 1e-5
    assert 0.0 <= metrics["sampler_kl_k3:mean"] < 1e-9
    assert metrics["effective_sample_fraction:mean"] == pytest.approx(1.0, abs=1e-9)
    assert metrics["clip_fraction:mean"] == 0.0
    # The sampler's surprise at what it drew estimates the entropy, here from hundreds of tokens.
    assert metrics["entropy:mean"] == pytest.approx(metrics["sampler_entropy:mean"], abs=0.1)


def test_the_wrong_temperature_shows_in_the_ratios(model: torch.nn.Module) -> None:
    datums = sampled(0.7).datums
    with torch.no_grad():
        _, metrics = objective("ppo")(datums, token_logprobs(model, datums).logprobs)
    assert metrics["sampler_kl_k3:mean"] > 1e-3


def policy_gradient(model: torch.nn.Module, name: str, batch: TrainingBatch) -> torch.Tensor:
    loss, _ = objective(name)(batch.datums, token_logprobs(model, batch.datums).logprobs)
    parameters = list(model.parameters())
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])


@pytest.mark.parametrize("name", ON_POLICY)
def test_on_policy_all_losses_give_one_gradient_and_a_step_along_it_raises_what_was_rewarded(
    model: torch.nn.Module, name: str
) -> None:
    datums = sampled(1.0).datums
    learner = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(learner.parameters(), lr=1e-4, weight_decay=0.0)
    before = token_logprobs(learner, datums).logprobs
    expected = parameter_gradient(learner, make_loss("reinforce", {})(datums, before)[0])

    objective(name)(datums, before)[0].backward()
    gradient = torch.cat([p.grad.flatten() for p in learner.parameters()])
    assert (gradient - expected).norm() < 1e-4 * expected.norm()

    optimizer.step()
    with torch.no_grad():
        after = token_logprobs(learner, datums).logprobs
    change = {0.0: 0.0, 1.0: 0.0}
    for datum, old, new in zip(datums, before, after, strict=True):
        change[datum.reward] += (new - old.detach()).sum().item()
    assert change[1.0] > 1.0
    assert change[0.0] < -1.0


def parameter_gradient(model: torch.nn.Module, loss: torch.Tensor) -> torch.Tensor:
    gradients = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    return torch.cat([gradient.flatten() for gradient in gradients])
