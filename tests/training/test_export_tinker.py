"""Datums of the real `tinker` package. Optional: needs tinker."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest

from eval_protocol_rft.training._types import ExportError, MissingPackageError
from eval_protocol_rft.training.export import tinker as export
from tests.training_batches import batch_of, prompt_groups

tinker = pytest.importorskip("tinker", reason="needs the extra `tinker`")

RL_INPUTS = {"target_tokens", "logprobs", "advantages"}


def batch(algorithm: str = "grpo", **options: Any) -> Any:
    return batch_of(prompt_groups(), algorithm=algorithm, **options)


@pytest.mark.parametrize("algorithm", ["grpo", "dapo", "dr_grpo", "cispo", "rloo"])
def test_real_datums_hold_what_the_batch_holds(algorithm: str) -> None:
    made = batch(algorithm, normalization="token")
    datums = export.to_datums(made)
    assert len(datums) == len(made.datums) == 12
    for datum, ours in zip(datums, made.datums, strict=True):
        assert isinstance(datum, tinker.Datum)
        assert datum.model_input.to_ints() == ours.input_tokens.tolist()
        arrays = {name: tensor.to_numpy() for name, tensor in datum.loss_fn_inputs.items()}
        assert set(arrays) == RL_INPUTS
        assert np.array_equal(arrays["target_tokens"], ours.target_tokens)
        assert np.array_equal(arrays["logprobs"], ours.logprobs)
        assert np.array_equal(arrays["advantages"], ours.advantages * ours.weights)
        assert [t.dtype for t in datum.loss_fn_inputs.values()] == ["int64", "float32", "float32"]


def test_gspo_says_over_which_tokens_the_sequence_ratio_goes() -> None:
    made = batch("gspo")
    for datum, ours in zip(export.to_datums(made), made.datums, strict=True):
        mask = datum.loss_fn_inputs["sequence_ratio_mask"]
        assert mask.dtype == "float32"
        assert mask.tolist() == [float(weight != 0) for weight in ours.weights]


def test_the_packages_own_wire_code_takes_them() -> None:
    conversion = pytest.importorskip("tinker.proto.request_conv")
    requests = pytest.importorskip("tinker.types.forward_backward_request")
    inputs = pytest.importorskip("tinker.types.forward_backward_input")
    made = batch()
    message = conversion.forward_backward_request_to_proto(
        requests.ForwardBackwardRequest(
            forward_backward_input=inputs.ForwardBackwardInput(
                data=export.to_datums(made),
                loss_fn=made.loss_fn,
                loss_fn_config=dict(made.loss_fn_config),
            ),
            model_id="m",
            seq_id=1,
        )
    )
    assert dict(message.loss_fn_config) == {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}
    for sent, ours in zip(message.data, made.datums, strict=True):
        (chunk,) = sent.model_input
        assert np.array_equal(np.frombuffer(chunk.encoded_text.tokens, "i4"), ours.input_tokens)
        tensor = sent.loss_fn_inputs["advantages"]
        assert list(tensor.shape) == [len(ours)]
        assert np.array_equal(np.frombuffer(tensor.dense, "f4"), ours.folded_advantages())


def test_a_loss_that_tinker_lacks_is_refused() -> None:
    with pytest.raises(ExportError, match="Tinker has no loss 'reinforce'"):
        export.to_datums(batch("reinforce"))


def test_a_missing_package_is_named_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tinker.types", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'eval-protocol-rft\[tinker\]'"):
        export.to_datums(batch())
