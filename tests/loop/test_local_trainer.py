"""`LocalTrainer` against plain torch: the same gradients, the same steps, the same bits again."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

from eval_protocol_rft.loop._local_trainer import LocalTrainer
from eval_protocol_rft.loop._lora import add_lora, merged_names, merged_weights
from eval_protocol_rft.loop._run_options import LoraSettings, Optimizer
from eval_protocol_rft.loop._trainer import NamedLoss, SamplerWeights, Trainer, TrainerError
from eval_protocol_rft.training.losses import make_loss
from tests.loop.policies import (
    KeptWeights,
    arithmetic_sampler,
    datums,
    plain_logprobs,
    tiny_model,
)

PPO = NamedLoss(loss_fn="ppo", config={"clip_low_threshold": 0.8, "clip_high_threshold": 1.2})
PLAIN = NamedLoss(loss_fn="importance_sampling")


def trainer_of(model, **options) -> LocalTrainer:
    return LocalTrainer(model, sink=KeptWeights(), **options)


async def test_it_is_a_trainer() -> None:
    trainer = trainer_of(tiny_model())
    assert isinstance(trainer, Trainer)
    await trainer.aclose()
    await trainer.aclose()


@pytest.mark.parametrize("microbatch_tokens", [1, 40, 10_000])
async def test_one_step_is_adamw_on_the_sum_of_the_weighted_losses(microbatch_tokens: int) -> None:
    model, batch = tiny_model(), datums(7)
    reference = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(
        reference.parameters(), lr=0.01, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0
    )
    loss = torch.zeros(())
    for datum in batch:
        ratio = torch.exp(plain_logprobs(reference, datum) - torch.as_tensor(datum.logprobs))
        folded = torch.as_tensor(np.array(datum.advantages * datum.weights))
        loss = loss - (ratio * folded).sum()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.05)
    optimizer.step()

    trainer = trainer_of(
        model, optimizer=Optimizer(microbatch_tokens=microbatch_tokens, max_grad_norm=0.05)
    )
    told = await trainer.forward_backward(batch, PLAIN)
    metrics = await trainer.optim_step(learning_rate=0.01)

    assert told.metrics["policy_loss:sum"] == pytest.approx(loss.item(), rel=1e-4)
    assert metrics["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    for name, value in reference.state_dict().items():
        torch.testing.assert_close(trainer.weights()[name], value, rtol=1e-3, atol=1e-5)
    assert torch.equal(model.lm_head.weight, tiny_model().lm_head.weight)  # its own copy
    await trainer.aclose()


@pytest.mark.parametrize("name", ["clip_cov", "kl_cov"])
async def test_a_loss_of_the_whole_batch_does_not_depend_on_its_parts(name: str) -> None:
    config = {
        "clip_cov": {
            "clip_low_threshold": 0.8,
            "clip_high_threshold": 1.2,
            "clip_cov_ratio": 0.3,
            "clip_cov_lb": 0.0,
            "clip_cov_ub": 50.0,
        },
        "kl_cov": {"kl_cov_ratio": 0.3, "ppo_kl_coef": 0.5},
    }[name]
    model, batch = tiny_model(), datums(7)
    reference = copy.deepcopy(model)
    loss, expected = make_loss(name, config)(
        batch, [plain_logprobs(reference, datum) for datum in batch]
    )
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in reference.parameters()])
    for microbatch_tokens in (1, 40, 10_000):
        trainer = trainer_of(model, optimizer=Optimizer(microbatch_tokens=microbatch_tokens))
        told = await trainer.forward_backward(batch, NamedLoss(loss_fn=name, config=config))
        assert told.metrics["policy_loss:sum"] == pytest.approx(loss.item(), rel=1e-4)
        assert told.metrics["clip_fraction:mean"] == pytest.approx(expected["clip_fraction:mean"])
        norm = (await trainer.optim_step(learning_rate=0.01))["grad_norm"]
        assert norm == pytest.approx(gradient.norm().item(), rel=1e-4)
        await trainer.aclose()


async def test_gradients_gather_over_calls() -> None:
    batch = datums(6)
    whole, parts = trainer_of(tiny_model()), trainer_of(tiny_model())
    await whole.forward_backward(batch, PPO)
    await parts.forward_backward(batch[:2], PPO)
    await parts.forward_backward(batch[2:], PPO)
    one = await whole.optim_step(learning_rate=0.01)
    other = await parts.optim_step(learning_rate=0.01)
    assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
    with pytest.raises(TrainerError, match="no gradient"):
        await whole.optim_step(learning_rate=0.01)


async def test_a_loss_of_ones_own() -> None:
    batch = datums(3)

    def loss(data, logprobs):
        return -sum(values.sum() for values in logprobs), {"mine:sum": float(len(data))}

    trainer = trainer_of(tiny_model(), optimizer=Optimizer(microbatch_tokens=1))
    told = await trainer.forward_backward(batch, loss)
    assert told.metrics == {"mine:sum": 3.0}
    before = [values.sum() for values in told.logprobs]
    await trainer.optim_step(learning_rate=0.01)
    after = [values.sum() for values in await trainer.forward(batch)]
    assert sum(after) > sum(before)


async def test_logprobs_are_those_of_a_plain_forward_at_any_temperature() -> None:
    model, batch = tiny_model(), datums(5)
    trainer = trainer_of(model, temperature=0.7)
    for datum, own in zip(batch, await trainer.forward(batch, temperature=1.0), strict=True):
        expected = plain_logprobs(model, datum).detach().numpy()
        np.testing.assert_allclose(own[datum.mask], expected[datum.mask], atol=1e-5)
        assert not own[~datum.mask].any()
    warm = await trainer.forward(batch)
    assert not np.allclose(warm[0], (await trainer.forward(batch, temperature=1.0))[0])


async def test_the_reference_stays_where_training_began() -> None:
    batch = datums(4)
    trainer = trainer_of(tiny_model(), keep_reference=True)
    began = await trainer.forward(batch)
    penalised = NamedLoss(loss_fn="importance_sampling", kl_beta=0.5)
    told = await trainer.forward_backward(
        batch, penalised, reference_logprobs=await trainer.forward(batch, reference=True)
    )
    assert told.metrics["kl_loss:sum"] == pytest.approx(0, abs=1e-6)
    await trainer.optim_step(learning_rate=0.05)
    for old, reference in zip(began, await trainer.forward(batch, reference=True), strict=True):
        np.testing.assert_array_equal(old, reference)
    told = await trainer.forward_backward(
        batch, penalised, reference_logprobs=await trainer.forward(batch, reference=True)
    )
    assert told.metrics["kl_loss:sum"] > 1e-4
    with pytest.raises(TrainerError, match="keep_reference"):
        await trainer_of(tiny_model()).forward(batch, reference=True)


@pytest.mark.parametrize("lora", [None, LoraSettings(rank=4, alpha=8)])
async def test_what_was_saved_goes_on_to_the_last_bit(
    lora: LoraSettings | None, tmp_path: Path
) -> None:
    async def steps(trainer: LocalTrainer, first: int, last: int) -> None:
        for seed in range(first, last):
            await trainer.forward_backward(datums(4, seed=seed), PPO)
            await trainer.optim_step(learning_rate=0.01)

    straight = trainer_of(tiny_model(), lora=lora)
    await steps(straight, 0, 3)
    await straight.save(tmp_path)
    await steps(straight, 3, 6)
    torch.manual_seed(99)
    resumed = trainer_of(tiny_model(), lora=lora)
    await resumed.forward_backward(datums(4, seed=50), PPO)  # forgotten by load
    await resumed.load(tmp_path)
    await steps(resumed, 3, 6)

    for name, value in straight.weights().items():
        assert torch.equal(value, resumed.weights()[name]), name


async def test_another_models_state_is_refused(tmp_path: Path) -> None:
    trainer = trainer_of(tiny_model())
    await trainer.save(tmp_path)
    other = trainer_of(tiny_model(), lora=LoraSettings(rank=2))
    with pytest.raises(TrainerError, match="other parameters"):
        await other.load(tmp_path)


async def test_lora_trains_adapters_and_publishes_merged_weights() -> None:
    model, batch = tiny_model(tied=False), datums(4)
    sink = KeptWeights()
    trainer = LocalTrainer(model, sink=sink, lora=LoraSettings(rank=4, alpha=8))
    began = await trainer.forward(batch)
    for _ in range(3):
        await trainer.forward_backward(batch, PLAIN)
        await trainer.optim_step(learning_rate=0.05)
    await trainer.publish(1)

    ((version, weights),) = sink.published
    assert version == 1
    assert weights.keys() == model.state_dict().keys()
    assert torch.equal(weights["model.embed_tokens.weight"], model.model.embed_tokens.weight)
    merged = copy.deepcopy(model)
    merged.load_state_dict(weights)
    now = await trainer.forward(batch)
    for datum, own in zip(batch, now, strict=True):
        expected = plain_logprobs(merged, datum).detach().numpy()
        np.testing.assert_allclose(own[datum.mask], expected[datum.mask], atol=1e-4)
    assert not np.allclose(now[0], began[0])
    for old, reference in zip(began, await trainer.forward(batch, reference=True), strict=True):
        np.testing.assert_allclose(old, reference, atol=1e-6)


@pytest.mark.parametrize(
    "targets", [("lm_head",), ("embed_tokens",), ("q_proj", "embed_tokens"), ".*embed_tokens"]
)
def test_lora_on_a_weight_that_another_layer_shares_is_refused(targets) -> None:
    trainer_of(tiny_model(tied=False), lora=LoraSettings(rank=4, target_modules=targets))
    with pytest.raises(TrainerError, match=r"(lm_head|embed_tokens).*leave it out"):
        trainer_of(tiny_model(), lora=LoraSettings(rank=4, target_modules=targets))


def test_lora_on_a_layer_that_the_model_runs_twice_is_refused() -> None:
    model = tiny_model()
    model.model.layers[1].mlp = model.model.layers[0].mlp
    trainer_of(model, lora=LoraSettings(rank=4, target_modules=("q_proj",)))
    with pytest.raises(TrainerError, match=r"mlp\.up_proj"):
        trainer_of(model, lora=LoraSettings(rank=4, target_modules=("up_proj",)))


@pytest.mark.parametrize("targets", ["all-linear", ("embed_tokens", "lm_head", "q_proj")])
def test_merged_weights_are_the_adapted_models_and_only_adapted_ones_are_copied(targets) -> None:
    model = tiny_model(tied=False)
    reference = copy.deepcopy(model)
    adapted = add_lora(model.requires_grad_(False), LoraSettings(rank=4, target_modules=targets))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.3)
        words = torch.arange(10)[None]
        trained = adapted(input_ids=words).logits
        weights = merged_weights(adapted)
        reference.load_state_dict(weights)
        torch.testing.assert_close(reference(input_ids=words).logits, trained)
    own = {parameter.data_ptr() for parameter in adapted.parameters()}
    copied = {name for name, value in weights.items() if value.data_ptr() not in own}
    assert copied == merged_names(adapted)
    assert not {name for name in weights if "norm" in name} & copied


async def test_a_sampler_gets_only_what_adapters_changed_after_the_first_time() -> None:
    sampler = arithmetic_sampler()
    trainer = LocalTrainer(
        sampler.model, sink=SamplerWeights(sampler), lora=LoraSettings(rank=2), entropies=False
    )
    untouched = sampler.model.get_parameter("model.embed_tokens.weight")
    batch = datums(3, words=12)
    await trainer.publish(0)
    count = untouched._version  # of writes in place
    for version in (1, 2):
        await trainer.forward_backward(batch, PLAIN)
        await trainer.optim_step(learning_rate=0.01)
        await trainer.publish(version)
    assert untouched._version == count
    for name, value in sampler.model.state_dict().items():
        assert torch.equal(value, trainer.weights()[name]), name
    assert sampler.policy_version == "step-2"
    await trainer.aclose()
    await sampler.aclose()


async def test_a_gradient_that_is_not_finite_is_refused() -> None:
    trainer = trainer_of(tiny_model())
    await trainer.forward_backward(
        datums(2), lambda data, logprobs: (sum(v.sum() for v in logprobs) * float("inf"), {})
    )
    before = {name: value.clone() for name, value in trainer.weights().items()}
    with pytest.raises(TrainerError, match="norm is"):
        await trainer.optim_step(learning_rate=0.1)
    assert all(torch.equal(before[name], value) for name, value in trainer.weights().items())


async def test_weight_decay_spares_norms() -> None:
    trainer = trainer_of(tiny_model(), optimizer=Optimizer(weight_decay=0.5, max_grad_norm=None))
    before = {name: value.clone() for name, value in trainer.weights().items()}
    await trainer.forward_backward(
        datums(2), lambda data, logprobs: (0.0 * sum(v.sum() for v in logprobs), {})
    )
    await trainer.optim_step(learning_rate=0.1)
    after = trainer.weights()
    assert torch.equal(after["model.norm.weight"], before["model.norm.weight"])
    name = "model.layers.0.mlp.up_proj.weight"
    torch.testing.assert_close(after[name], before[name] * (1 - 0.1 * 0.5))


async def test_a_disk_that_is_full_is_said_with_the_file(tmp_path: Path) -> None:
    trainer = trainer_of(tiny_model())
    (tmp_path / "trainer.pt").symlink_to("/dev/full")
    with pytest.raises(TrainerError, match=r"trainer\.pt cannot be written; is there room"):
        await trainer.save(tmp_path)
    await trainer.aclose()
