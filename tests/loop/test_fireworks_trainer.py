"""`FireworksTrainer` over the SDK's own client: gradients and steps, against a server that really
trains."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import AsyncIterator, Iterator
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("fireworks.training.sdk", reason="needs the extra `fireworks`")

from eval_protocol_rft.loop._trainer import (  # noqa: E402
    NamedLoss,
    Trainer,
    TrainerError,
)
from eval_protocol_rft.loop.fireworks._fireworks_trainer import FireworksTrainer  # noqa: E402
from eval_protocol_rft.loop.service.training._calls import CALLS  # noqa: E402
from eval_protocol_rft.training.losses._corrections import Rejection, TokenTIS  # noqa: E402
from eval_protocol_rft.training.losses._forward import token_logprobs  # noqa: E402
from eval_protocol_rft.training.losses._objective import make_loss  # noqa: E402
from eval_protocol_rft.training.losses._tensors import LossError  # noqa: E402
from tests.sums import arithmetic, sums_batch  # noqa: E402
from tests.trainer_service import (  # noqa: E402
    CLIP,
    OPTIMIZER,
    TrainerService,
    make_trainer,
    one_step,
    trainer_service,
)


@pytest.fixture
def server() -> Iterator[TrainerService]:
    with trainer_service() as running:
        yield running


@pytest.fixture
async def trainer(server: TrainerService) -> AsyncIterator[FireworksTrainer]:
    made = await asyncio.to_thread(make_trainer, server)
    yield made
    await made.aclose()


def gradients(module: Any) -> list[np.ndarray]:
    return [p.grad.numpy().copy() for p in module.parameters()]


def assert_same(ours: list[np.ndarray], theirs: list[np.ndarray]) -> None:
    """Up to float32 noise, measured on the scale of the whole gradient."""
    scale = max(float(np.abs(value).max()) for value in theirs)
    for mine, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-3, atol=1e-5 * scale)


def local_gradient(batch: Any, loss: Any, **tensors: Any) -> tuple[list[np.ndarray], float]:
    """The same loss by plain autograd, through the model, in this process."""
    module = copy.deepcopy(arithmetic()[0])
    value, _ = loss(batch.datums, token_logprobs(module, batch.datums).logprobs, **tensors)
    value.backward()
    return gradients(module), value.item()


async def test_it_is_a_trainer(trainer: FireworksTrainer) -> None:
    assert isinstance(trainer, Trainer)


async def test_forward_gives_the_models_logprobs_of_what_was_sampled(
    trainer: FireworksTrainer,
) -> None:
    batch = sums_batch()
    found = await trainer.forward(batch.datums)
    wanted = token_logprobs(arithmetic()[0], batch.datums).logprobs
    for ours, theirs, datum in zip(found, wanted, batch.datums, strict=True):
        np.testing.assert_allclose(ours, theirs.detach().numpy(), atol=1e-4)
        assert (ours[~datum.mask] == 0).all()
        assert (ours[datum.mask] < 0).all()


@pytest.mark.parametrize(
    ("loss_fn", "normalization"),
    [
        ("ppo", "none"),
        ("ppo", "token"),
        ("grpo", "sequence"),
        ("cispo", "sequence"),
        ("importance_sampling", "sequence"),
    ],
)
async def test_a_loss_that_the_server_knows_is_one_pass_and_our_gradient(
    server: TrainerService, trainer: FireworksTrainer, loss_fn: str, normalization: str
) -> None:
    batch = sums_batch(normalization=normalization)
    config = {} if loss_fn == "importance_sampling" else CLIP
    done = await trainer.forward_backward(batch.datums, NamedLoss(loss_fn=loss_fn, config=config))
    wanted, value = local_gradient(batch, make_loss(loss_fn, config))
    assert_same(gradients(server.module), wanted)
    assert [name for name, _ in server.asked.calls if "forward" in name] == ["forward_backward"]
    (asked,) = server.called("forward_backward")
    sent = asked["forward_backward_input"]
    assert sent["loss_fn"] == {"grpo": "ppo"}.get(loss_fn, loss_fn)
    assert (sent.get("loss_fn_config") or {}) == config
    assert done.metrics["loss:sum"] == pytest.approx(value, rel=1e-3, abs=1e-5)
    assert done.metrics["server_loss_difference:max"] < 1e-3 * max(1.0, abs(value))
    assert done.metrics["tokens:sum"] == sum(int(datum.mask.sum()) for datum in batch.datums)


async def test_ratios_can_be_taken_against_old_logprobs_by_the_server(
    server: TrainerService, trainer: FireworksTrainer
) -> None:
    batch = sums_batch()
    old = [
        values - 0.3 * datum.mask
        for values, datum in zip(await trainer.forward(batch.datums), batch.datums, strict=True)
    ]
    loss = NamedLoss(loss_fn="ppo", config=CLIP)
    done = await trainer.forward_backward(batch.datums, loss, old_logprobs=old)
    wanted, _ = local_gradient(batch, make_loss("ppo", CLIP), old_logprobs=old)
    assert_same(gradients(server.module), wanted)
    assert done.metrics["ratio:mean"] == pytest.approx(np.exp(0.3), rel=1e-3)


@pytest.mark.parametrize(
    ("loss_fn", "config", "kl_beta", "correction"),
    [
        ("ppo", CLIP, 0.1, None),
        ("ppo", CLIP, 0.0, TokenTIS(cap=2.0)),
        ("dro", {"beta": 0.05}, 0.0, None),
        ("gspo", CLIP, 0.0, None),
        ("reinforce", {}, 0.0, None),
        ("sapo", {"tau_pos": 1.0, "tau_neg": 1.05}, 0.0, None),
        ("geo_mean", CLIP, 0.0, None),
        ("kl_cov", {"kl_cov_ratio": 0.1, "ppo_kl_coef": 1.0}, 0.0, None),
        ("ppo", CLIP, 0.0, Rejection(kind="token_k3", high=0.01)),
    ],
)
async def test_any_other_loss_is_differentiated_here_and_trained_there(
    server: TrainerService,
    trainer: FireworksTrainer,
    loss_fn: str,
    config: dict[str, float],
    kl_beta: float,
    correction: Any,
) -> None:
    batch = sums_batch(normalization="token")
    tensors: dict[str, Any] = {}
    if kl_beta:
        tensors["reference_logprobs"] = [
            datum.logprobs - 0.2 * datum.mask for datum in batch.datums
        ]
    if correction:
        tensors["old_logprobs"] = [datum.logprobs + 0.2 * datum.mask for datum in batch.datums]
    loss = NamedLoss(loss_fn=loss_fn, config=config, kl_beta=kl_beta, correction=correction)
    done = await trainer.forward_backward(batch.datums, loss, **tensors)
    reference = make_loss(loss_fn, config, kl_beta=kl_beta, correction=correction)
    wanted, value = local_gradient(batch, reference, **tensors)
    assert_same(gradients(server.module), wanted)
    passes = [name for name, _ in server.asked.calls if "forward" in name]
    assert passes == ["forward", "forward_backward"]
    total = done.metrics["policy_loss:sum"] + done.metrics.get("kl_loss:sum", 0.0)
    assert total == pytest.approx(value, rel=1e-3, abs=1e-6)


async def test_a_loss_of_ones_own_sends_its_closed_form_gradient(
    server: TrainerService, trainer: FireworksTrainer
) -> None:
    batch = sums_batch()

    def loss(datums: Any, logprobs: Any) -> Any:
        assert all(
            (lp[~torch.from_numpy(d.mask)] == 0).all()
            for d, lp in zip(datums, logprobs, strict=True)
        )
        return sum((lp**2).sum() for lp in logprobs), {"mine:sum": 4.0}

    done = await trainer.forward_backward(batch.datums, loss)
    assert done.metrics["mine:sum"] == 4.0
    (asked,) = server.called("forward_backward")
    sent = asked["forward_backward_input"]["data"]
    for datum, logprobs, wire in zip(batch.datums, done.logprobs, sent, strict=True):
        weights = wire["loss_fn_inputs"]["weights"]["data"]
        # d/dlp of sum lp^2 is 2 lp, and the wire's weights are its negative.
        np.testing.assert_allclose(weights, -2.0 * logprobs, atol=1e-4)
        assert not np.any(np.array(weights)[~datum.mask])


async def test_gradients_add_up_until_one_undivided_adam_step(
    server: TrainerService, trainer: FireworksTrainer
) -> None:
    batch, loss = sums_batch(), NamedLoss(loss_fn="importance_sampling")
    half = len(batch.datums) // 2
    for part in (batch.datums[:half], batch.datums[half:]):
        await trainer.forward_backward(part, loss)
    gathered = gradients(server.module)
    whole, _ = local_gradient(batch, make_loss("importance_sampling", {}))
    assert_same(gathered, whole)
    metrics = await trainer.optim_step(learning_rate=3e-4)
    module = copy.deepcopy(arithmetic()[0])
    for parameter, gradient in zip(module.parameters(), gathered, strict=True):
        parameter.grad = torch.from_numpy(gradient)
    torch.optim.AdamW(
        module.parameters(), lr=3e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0
    ).step()
    trained = server.module
    for ours, theirs in zip(module.parameters(), trained.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert metrics["grad_norm"] > 0
    assert metrics["learning_rate"] == 3e-4
    (asked,) = server.called("optim_step")
    assert asked.get("grad_accumulation_normalization") is None
    assert asked["adam_params"] == {
        "learning_rate": 3e-4,
        "beta1": 0.9,
        "beta2": 0.95,
        "eps": 1e-8,
        "weight_decay": 0.0,
        "grad_clip_norm": 0.0,
    }


async def test_the_reference_stays_where_training_began(trainer: FireworksTrainer) -> None:
    batch = sums_batch()
    before = await trainer.forward(batch.datums, reference=True)
    await one_step(trainer, batch)
    moved = await trainer.forward(batch.datums)
    after = await trainer.forward(batch.datums, reference=True)
    for first, second, now in zip(before, after, moved, strict=True):
        np.testing.assert_array_equal(first, second)
        assert np.abs(now - second).max() > 1e-3


# What is refused, and what goes wrong


def test_another_temperature_is_refused() -> None:
    with pytest.raises(TrainerError, match=r"temperature 1\.5, .* sample at temperature 1"):
        FireworksTrainer(None, temperature=1.5, optimizer=OPTIMIZER)


async def test_a_loss_without_thresholds_never_reaches_the_server(
    server: TrainerService, trainer: FireworksTrainer
) -> None:
    with pytest.raises(LossError, match="clip_low_threshold"):
        await trainer.forward_backward(sums_batch().datums, NamedLoss(loss_fn="ppo"))
    assert not server.called("forward_backward")


async def test_logprobs_of_other_datums_never_reach_the_server(
    server: TrainerService, trainer: FireworksTrainer
) -> None:
    batch = sums_batch()
    with pytest.raises(TrainerError, match="old_logprobs has shapes"):
        await trainer.forward_backward(
            batch.datums,
            NamedLoss(loss_fn="ppo", config=CLIP),
            old_logprobs=[datum.logprobs[1:] for datum in batch.datums],
        )
    assert not server.called("forward_backward")


async def test_a_step_that_fails_on_the_server_says_how_to_go_on(
    trainer: FireworksTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(place: Any, body: bytes) -> Any:
        raise RuntimeError("device lost")

    monkeypatch.setitem(CALLS, "forward_backward", fail)
    with pytest.raises(TrainerError, match=r"device lost.*load the last saved state"):
        await one_step(trainer, sums_batch())


async def test_waiting_for_the_server_does_not_hold_up_the_event_loop(
    server: TrainerService, trainer: FireworksTrainer
) -> None:
    batch, ticks = sums_batch(), 0
    work = asyncio.create_task(one_step(trainer, batch))
    while not work.done():
        await asyncio.sleep(0.001)
        ticks += 1
    await work
    assert ticks > 5
