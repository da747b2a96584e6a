"""`make_loss`, losses over datums, and the training SDK's own `forward_backward_custom`."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from fireworks.training.sdk.types import Datum, ForwardBackwardOutput, ModelInput, TensorData

from eval_protocol_rft.training._algorithms import ALGORITHMS
from eval_protocol_rft.training._datums import TrainingDatum
from eval_protocol_rft.training.losses._corrections import TokenTIS
from eval_protocol_rft.training.losses._objective import make_loss
from eval_protocol_rft.training.losses._tensors import LossError
from tests.training.test_losses_reference import REFERENCES, draw_batch, flat

torch.set_num_threads(1)
VOCABULARY = 7
PPO = REFERENCES["ppo"][0]


def make_datums(seed: int = 0) -> list[TrainingDatum]:
    """The drawn batch as datums: random tokens, everything else as drawn, in float32."""
    rng = np.random.default_rng(seed)
    datums = []
    for i, s in enumerate(draw_batch(seed)):
        tokens = rng.integers(0, VOCABULARY, len(s.lp) + 1)
        datums.append(
            TrainingDatum(
                input_tokens=tokens[:-1],
                target_tokens=tokens[1:],
                logprobs=np.array(s.q, np.float32),
                advantages=np.array(s.advantages, np.float32),
                weights=np.array(s.weights, np.float32),
                prompt_length=s.mask.index(True) + 1,
                reward=1.0,
                truncated=False,
                group=0,
                row_id="row",
                completion=i,
            )
        )
    return datums


def current_logprobs(seed: int = 0) -> list[torch.Tensor]:
    return [torch.tensor(s.lp, requires_grad=True) for s in draw_batch(seed)]


@pytest.mark.parametrize("name", REFERENCES)
def test_a_loss_over_datums_is_the_loss_over_their_tensors(name: str) -> None:
    loss_fn = make_loss(name, REFERENCES[name][0], correction=TokenTIS(cap=1.1), kl_beta=0.2)
    batch, logprobs = draw_batch(0), current_logprobs()
    loss, metrics = loss_fn(
        make_datums(),
        logprobs,
        old_logprobs=[s.old for s in batch],
        reference_logprobs=[np.array(s.reference) for s in batch],
        entropies=[torch.ones(len(s.lp)) for s in batch],
    )
    expected, expected_metrics = loss_fn.on_tensors(flat(batch))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert metrics.pop("entropy:mean") == 1.0
    assert metrics == pytest.approx(expected_metrics, rel=1e-4, abs=1e-6)


def test_every_datum_gets_a_gradient_even_where_it_is_zero() -> None:
    """The SDK refuses a loss that leaves one datum without."""
    datums, logprobs = make_datums(), current_logprobs()
    loss, _ = make_loss("ppo", PPO)(datums, logprobs)
    loss.backward()
    assert all(lp.grad is not None for lp in logprobs)
    assert not logprobs[3].grad.any(), "its advantage is zero"


def test_micro_batches_add_up_to_the_batch() -> None:
    datums, whole, parts = make_datums(), current_logprobs(), current_logprobs()
    loss_fn = make_loss("gspo", REFERENCES["gspo"][0])
    total, _ = loss_fn(datums, whole)
    total.backward()
    pieces = [loss_fn(datums[i : i + 2], parts[i : i + 2])[0] for i in (0, 2, 4)]
    for piece in pieces:
        piece.backward()
    assert sum(piece.item() for piece in pieces) == pytest.approx(total.item(), rel=1e-5)
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_the_current_policy_as_old_policy_makes_every_ratio_one() -> None:
    datums, logprobs = make_datums(), current_logprobs()
    loss_fn = make_loss("ppo", PPO, correction=TokenTIS(cap=1.1))
    loss, metrics = loss_fn(datums, logprobs, old_logprobs="current")
    loss.backward()
    assert metrics["ratio:mean"] == metrics["ratio:max"] == 1.0
    for s, datum, lp in zip(draw_batch(0), datums, logprobs, strict=True):
        ratio = np.exp(np.array(s.lp) - np.array(s.q))
        expected = -np.minimum(ratio, 1.1) * datum.advantages * datum.weights
        np.testing.assert_allclose(lp.grad.numpy(), expected, rtol=1e-5, atol=1e-7)


def test_half_precision_logprobs_do_not_pull_the_sampling_logprobs_down() -> None:
    datums = make_datums()
    halves = [lp.detach().bfloat16() for lp in current_logprobs()]
    loss_fn = make_loss("importance_sampling", {})
    loss, metrics = loss_fn(datums, halves)
    expected, expected_metrics = loss_fn(datums, [half.float() for half in halves])
    assert loss.item() == expected.item()
    assert metrics == expected_metrics


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("pppo", {}, "unknown loss_fn 'pppo': one of cispo, clip_cov, dapo,"),
        ("cross_entropy", {}, "unknown loss_fn"),
        ("ppo", {}, "missing: clip_low_threshold, clip_high_threshold"),
        ("ppo", {**PPO, "eps": 0.2}, "unknown: eps "),
        ("ppo", {**PPO, "dual_clip_threshold": 3.0}, "unknown: dual_clip_threshold"),
        (
            "ppo",
            {"clip_low_threshold": 0.8, "clip_high": 1.2},
            "unknown: clip_high; missing: clip_h",
        ),
        ("ppo", {**PPO, "clip_low_threshold": None}, "missing: clip_low_threshold "),
        ("ppo", {**PPO, "clip_low_threshold": "0.8"}, "not a number: clip_low_threshold "),
        ("ppo", {**PPO, "clip_high_threshold": True}, "not a number: clip_high_threshold "),
        ("dro", {}, "missing: beta"),
        ("dro", {"beta": -1.0}, "beta"),
        ("dapo", {**PPO, "dual_clip_threshold": 0.9}, "dual_clip_threshold"),
        ("reinforce", {"beta": 0.1}, r"unknown: beta \(it takes nothing\)"),
    ],
)
def test_a_wrong_name_or_option_is_an_error_that_says_which(
    name: str, config: dict[str, Any], message: str
) -> None:
    with pytest.raises(LossError, match=message):
        make_loss(name, config)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_of_the_batch_builder_has_its_loss_here(name: str) -> None:
    algorithm = ALGORITHMS[name]
    loss, _ = make_loss(algorithm.loss_fn, algorithm.loss_fn_config)(
        make_datums(), current_logprobs()
    )
    assert loss.requires_grad


@pytest.mark.parametrize("name", ["reinforce", "importance_sampling", "gspo", "dro"])
def test_losses_of_one_configuration_are_equal_and_say_what_they_are(name: str) -> None:
    config, _ = REFERENCES[name]
    one, other = (make_loss(name, config) for _ in range(2))
    assert one == other
    assert hash(one) == hash(other)
    shown = ", ".join(f"{key}={value}" for key, value in config.items())
    assert f"policy_loss={type(one.policy_loss).__name__}({shown})" in repr(one)


def test_dapo_without_a_dual_clip_is_ppo() -> None:
    loss, metrics = make_loss("ppo", PPO)(make_datums(), current_logprobs())
    for config in (PPO, {**PPO, "dual_clip_threshold": None}):
        assert make_loss("dapo", config)(make_datums(), current_logprobs()) == (loss, metrics)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logprobs": current_logprobs()[:-1]}, "logprobs has 4 entries for 5 datums"),
        (
            {"logprobs": [*current_logprobs()[:-1], torch.zeros(7)]},
            r"logprobs\[4\] has shape \(7,\), the datum 8 target tokens",
        ),
        ({"old_logprobs": "curent"}, "old_logprobs"),
        ({"old_logprobs": [[0.0]] * 5}, r"old_logprobs\[0\] has shape \(1,\)"),
        ({"reference_logprobs": [np.zeros((9, 1))] * 5}, r"reference_logprobs\[0\] has shape"),
        ({"data": [], "logprobs": []}, "no datums"),
    ],
)
def test_arrays_that_do_not_fit_are_refused_with_the_datum(
    change: dict[str, Any], message: str
) -> None:
    arguments = {"data": make_datums(), "logprobs": current_logprobs()} | change
    with pytest.raises(LossError, match=message):
        make_loss("ppo", PPO)(**arguments)


def test_the_training_package_imports_without_torch() -> None:
    code = "import sys, eval_protocol_rft.training._datums as d; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


class BigramTrainer:
    """What the SDK's client talks to, in this process: a bigram model with real gradients."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.table = torch.randn(VOCABULARY, VOCABULARY, generator=generator, requires_grad=True)

    def logprobs(self, inputs: Any, targets: Any) -> torch.Tensor:
        rows = self.table[torch.as_tensor(inputs)].log_softmax(-1)
        return rows.gather(-1, torch.as_tensor(targets)[:, None])[:, 0]

    def run(self, data: Sequence[Datum], *, backward: bool) -> ForwardBackwardOutput:
        """Cross-entropy as the wire has it: sum(-logprob * weight), weights of any sign."""
        outputs, loss = [], torch.zeros(())
        for datum in data:
            inputs = datum.loss_fn_inputs
            lp = self.logprobs(datum.model_input.to_ints(), inputs["target_tokens"].to_torch())
            loss = loss - (lp * inputs["weights"].to_torch()).sum()
            outputs.append({"logprobs": TensorData.from_torch(lp.detach())})
        if backward:
            loss.backward()
        return ForwardBackwardOutput("TensorData", outputs, {"loss:sum": loss.item()})


@pytest.fixture
def sdk_client() -> Any:
    """The SDK's client with its two network calls answered by a `BigramTrainer`."""
    from fireworks.training.sdk.client import FiretitanTrainingClient, _ImmediateAPIFuture

    class Client(FiretitanTrainingClient):
        def __init__(self) -> None:
            self.trainer, self.holder = BigramTrainer(), None

        async def forward_async(self, data: Any, loss_fn: str, config: Any = None) -> Any:
            assert loss_fn == "cross_entropy"
            return _ImmediateAPIFuture(self.trainer.run(data, backward=False))

        async def forward_backward_async(self, data: Any, loss_fn: str, config: Any = None) -> Any:
            assert loss_fn == "cross_entropy"
            return _ImmediateAPIFuture(self.trainer.run(data, backward=True))

    return Client()


def to_sdk(datums: Sequence[TrainingDatum]) -> list[Datum]:
    return [
        Datum(
            model_input=ModelInput.from_ints(datum.input_tokens.tolist()),
            loss_fn_inputs={"target_tokens": datum.target_tokens.tolist()},
        )
        for datum in datums
    ]


@pytest.mark.parametrize("name", REFERENCES)
async def test_the_sdk_brings_the_gradient_of_the_loss_to_the_weights(
    name: str, sdk_client: Any
) -> None:
    datums, own = make_datums(), BigramTrainer()
    loss_fn = make_loss(name, REFERENCES[name][0], kl_beta=0.1)
    reference = [s.reference for s in draw_batch(0)]
    future = await sdk_client.forward_backward_custom_async(
        to_sdk(datums), loss_fn.for_sdk(datums, reference_logprobs=reference)
    )
    result = await future.result_async()

    logprobs = [own.logprobs(datum.input_tokens, datum.target_tokens) for datum in datums]
    loss, metrics = loss_fn(datums, logprobs, reference_logprobs=reference)
    loss.backward()
    torch.testing.assert_close(sdk_client.trainer.table.grad, own.table.grad)
    assert own.table.grad.abs().max() > 0.01
    assert {key: result.metrics[key] for key in metrics} == pytest.approx(metrics, rel=1e-6)
    assert "loss:sum" in result.metrics, "the trainer's own metrics stay"
    assert "loss:sum" not in metrics


async def test_the_sdk_can_resume_from_a_forward_pass(sdk_client: Any) -> None:
    datums, own = make_datums(), BigramTrainer()
    data = to_sdk(datums)
    weightless = [
        Datum(d.model_input, {**d.loss_fn_inputs, "weights": [0.0] * len(ours)})
        for d, ours in zip(data, datums, strict=True)
    ]
    forward = sdk_client.trainer.run(weightless, backward=False)
    loss_fn = make_loss("cispo", REFERENCES["cispo"][0])
    future = await sdk_client.forward_backward_custom_async(
        data, loss_fn.for_sdk(datums), precomputed_forward=forward
    )
    await future.result_async()
    loss_fn(datums, [own.logprobs(d.input_tokens, d.target_tokens) for d in datums])[0].backward()
    torch.testing.assert_close(sdk_client.trainer.table.grad, own.table.grad)


async def test_datums_in_another_order_than_the_sdks_are_refused(sdk_client: Any) -> None:
    datums = make_datums()
    loss_fn = make_loss("ppo", PPO)
    with pytest.raises(LossError, match="datum 0: the trainer's target tokens"):
        await sdk_client.forward_backward_custom_async(
            to_sdk(datums[::-1]), loss_fn.for_sdk(datums)
        )
    with pytest.raises(LossError, match="made for 5 datums, the trainer has 4"):
        await sdk_client.forward_backward_custom_async(to_sdk(datums[:-1]), loss_fn.for_sdk(datums))
    assert sdk_client.trainer.table.grad is None
