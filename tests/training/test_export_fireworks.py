"""The Fireworks SDK's own client takes our datums, and what reaches the server is what we meant."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from eval_protocol_rft.training._types import ExportError, MissingPackageError
from eval_protocol_rft.training.export import fireworks
from tests.capture_server import CaptureServer, Pass, table_logprob, table_logprobs
from tests.training_batches import batch_of, prompt_groups

torch = pytest.importorskip("torch")
sdk = pytest.importorskip("fireworks.training.sdk.client", reason="needs the extra `fireworks`")
types = pytest.importorskip("fireworks.training.sdk.types")

from eval_protocol_rft.training.losses._objective import make_loss  # noqa: E402
from eval_protocol_rft.training.losses._tensors import LossError  # noqa: E402


@dataclass(frozen=True, slots=True)
class Trainer:
    client: Any
    server: CaptureServer

    def last(self, count: int = 1) -> list[Pass]:
        return self.server.passes[-count:]


@pytest.fixture(scope="module")
def trainer() -> Iterator[Trainer]:
    with CaptureServer() as server:
        service = sdk.FiretitanServiceClient(api_key="fw-test", base_url=server.url)
        yield Trainer(service.create_training_client(base_model="accounts/a/models/m"), server)
        service.close()


def batch(algorithm: str = "grpo", **options: Any) -> Any:
    return batch_of(prompt_groups(logprob=table_logprob), algorithm=algorithm, **options)


def trained(trainer: Trainer, made: Any) -> Any:
    """`made` as its own built-in loss."""
    data = fireworks.to_datums(made)
    return trainer.client.forward_backward(data, made.loss_fn, dict(made.loss_fn_config)).result()


def trained_custom(trainer: Trainer, made: Any) -> Any:
    """The same loss computed on this side."""
    data = fireworks.to_datums(made, loss_fn="cross_entropy")
    loss = make_loss(made.loss_fn, made.loss_fn_config)
    return trainer.client.forward_backward_custom(data, loss.for_sdk(made.datums)).result()


def current_logprobs(made: Any) -> list[Any]:
    return [
        torch.tensor(
            table_logprobs(d.input_tokens.tolist(), d.target_tokens.tolist()), dtype=torch.float64
        )
        for d in made.datums
    ]


@pytest.mark.parametrize("algorithm", ["grpo", "cispo", "rloo"])
def test_every_tensor_arrives_as_it_stands_in_the_batch(trainer: Trainer, algorithm: str) -> None:
    made = batch(algorithm, normalization="token")
    result = trained(trainer, made)
    (seen,) = trainer.last()
    assert (seen.kind, seen.loss_fn) == ("forward_backward", made.loss_fn)
    assert (seen.config or {}) == made.loss_fn_config
    assert len(seen.inputs) == len(made.datums) == 12
    for datum, tokens, inputs in zip(made.datums, seen.tokens, seen.inputs, strict=True):
        assert tokens == datum.input_tokens.tolist()
        assert np.array_equal(inputs["target_tokens"], datum.target_tokens)
        assert np.array_equal(inputs["logprobs"], datum.logprobs)
        assert np.array_equal(inputs["advantages"], datum.advantages * datum.weights)
    answered = [output["logprobs"].tolist() for output in result.loss_fn_outputs]
    assert answered == seen.logprobs()


@pytest.mark.parametrize("algorithm", ["grpo", "cispo", "rloo"])
@pytest.mark.parametrize("normalization", ["none", "token", "sequence", "constant"])
def test_the_server_without_a_mask_computes_our_weighted_loss(
    trainer: Trainer, algorithm: str, normalization: str
) -> None:
    length = 32 if normalization == "constant" else None
    made = batch(algorithm, normalization=normalization, constant_length=length)
    theirs = trained(trainer, made).metrics["loss:sum"]
    loss = make_loss(made.loss_fn, made.loss_fn_config)
    ours, _ = loss(made.datums, current_logprobs(made))
    assert theirs == pytest.approx(float(ours), rel=1e-5, abs=1e-7)


def test_cross_entropy_gets_target_tokens_and_weights(trainer: Trainer) -> None:
    made = batch(normalization="sequence")
    data = fireworks.to_datums(made, loss_fn="cross_entropy")
    result = trainer.client.forward_backward(data, "cross_entropy").result()
    (seen,) = trainer.last()
    for datum, inputs in zip(made.datums, seen.inputs, strict=True):
        assert np.array_equal(inputs["weights"], datum.weights)
    sampled = sum(int(datum.mask.sum()) for datum in made.datums)
    assert result.metrics["response_tokens"] == sampled  # the SDK's own count


def gradient(made: Any, by_token: Any) -> list[np.ndarray]:
    """-dL/dlogp per datum, from its closed form in (logp, ratio, sampling logp, advantage)."""
    wanted = []
    for datum, current in zip(made.datums, current_logprobs(made), strict=True):
        lp, q = current.numpy(), datum.logprobs.astype(np.float64)
        values = by_token(lp, np.exp(lp - q), q, datum.advantages.astype(np.float64))
        wanted.append(np.where(datum.mask, datum.weights * values, 0.0))
    return wanted


CLOSED_FORMS = {
    # r A, and nothing where the clip has the better of it
    "grpo": lambda lp, r, q, a: r * a * np.where(a > 0, r < 1.2, r > 0.8),
    "cispo": lambda lp, r, q, a: np.clip(r, 0.0, 4.0) * a,
    "rloo": lambda lp, r, q, a: r * a,
    "dro": lambda lp, r, q, a: a - 0.05 * (lp - q),
}


@pytest.mark.parametrize("algorithm", CLOSED_FORMS)
@pytest.mark.parametrize("normalization", ["none", "token"])
def test_a_custom_loss_sends_its_own_gradient(
    trainer: Trainer, algorithm: str, normalization: str
) -> None:
    made = batch(algorithm, normalization=normalization)
    result = trained_custom(trainer, made)
    forward, backward = trainer.last(2)
    assert [forward.kind, backward.kind] == ["forward", "forward_backward"]
    assert [forward.loss_fn, backward.loss_fn] == ["cross_entropy"] * 2
    wanted = gradient(made, CLOSED_FORMS[algorithm])
    for inputs, values in zip(backward.inputs, wanted, strict=True):
        np.testing.assert_allclose(inputs["weights"], values, rtol=1e-4, atol=1e-7)
    assert any((values < 0).any() for values in wanted)  # signed weights got through
    assert result.metrics["ratio:max"] > 1.2  # our metrics are merged into the result


def test_a_custom_loss_for_other_datums_is_refused(trainer: Trainer) -> None:
    made = batch()
    data = fireworks.to_datums(made, loss_fn="cross_entropy")
    loss = make_loss(made.loss_fn, made.loss_fn_config).for_sdk(made.datums)
    with pytest.raises(LossError, match="datum 0: the trainer's target tokens are not those"):
        trainer.client.forward_backward_custom([data[-1], *data[:-1]], loss)


def test_thousands_of_datums_travel_in_parts_and_come_back_in_order(trainer: Trainer) -> None:
    made = batch_of(prompt_groups(groups=400, size=3), algorithm="grpo")
    before = len(trainer.server.passes)
    result = trained(trainer, made)
    parts = trainer.server.passes[before:]
    assert [len(part.tokens) for part in parts] == [1024, 176]
    answered = [output["logprobs"].tolist() for output in result.loss_fn_outputs]
    assert answered == [values.tolist() for values in current_logprobs(made)]


def test_the_client_waits_for_a_result_that_takes_time(trainer: Trainer) -> None:
    trainer.server.polls_before_results = 3
    try:
        assert len(trained(trainer, batch()).loss_fn_outputs) == 12
    finally:
        trainer.server.polls_before_results = 0


def test_the_division_in_optim_step_is_asked_for_by_name(trainer: Trainer) -> None:
    adam = types.AdamParams(learning_rate=1e-5)
    trainer.client.optim_step(adam, grad_accumulation_normalization="num_loss_tokens").result()
    asked = trainer.server.called("optim_step")[-1]
    assert asked["grad_accumulation_normalization"] == "num_loss_tokens"


def test_a_capture_server_would_see_a_mask_that_does_not_belong(trainer: Trainer) -> None:
    (datum, *_) = batch().datums
    wrong = types.Datum(
        model_input=types.ModelInput.from_ints(datum.input_tokens.tolist()),
        loss_fn_inputs={
            "target_tokens": datum.target_tokens,
            "logprobs": datum.logprobs,
            "advantages": datum.advantages,
            "weights": datum.weights,
        },
    )
    with pytest.raises(Exception, match="ppo does not take"):
        trainer.client.forward_backward([wrong], "ppo").result()


def test_the_arrays_of_the_batch_are_not_copied_where_nothing_changes() -> None:
    (datum, *_) = batch().datums
    made = fireworks.to_datum(datum, loss_fn="ppo")
    assert np.shares_memory(made.loss_fn_inputs["target_tokens"].to_numpy(), datum.target_tokens)
    assert np.shares_memory(made.loss_fn_inputs["logprobs"].to_numpy(), datum.logprobs)


def test_the_built_in_dro_is_refused_where_it_would_train_on_the_prompt() -> None:
    with pytest.raises(ExportError, match=r"takes no mask, and \d+ of \d+ positions .*custom"):
        fireworks.to_datums(batch("dro"))


def test_a_missing_sdk_is_named_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fireworks.training.sdk.types", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'eval-protocol-rft\[fireworks\]'"):
        fireworks.to_datums(batch())
